"""An adapter on disk, in PEFT's format: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

What is saved here opens in PEFT and vLLM, and what they save opens here. The safetensors metadata also carries the
fingerprint of the base, so that an adapter on the wrong base is refused, not silently wrong.
"""

import ctypes
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .checkpoints import read_json, read_safetensors
from .config import LoRAConfig, entry_matches, scaling
from .distributed import full_tensor, is_main_process
from .injection import inject, lora_layers, plain_name, planned
from .layers import LoRALayer

CONFIG, WEIGHTS, FINGERPRINT = "adapter_config.json", "adapter_model.safetensors", "minilora.base"
PREFIX = "base_model.model."

# our name of a setting -> PEFT's
SETTINGS = {"rank": "r", "alpha": "lora_alpha", "target_modules": "target_modules", "dropout": "lora_dropout",
            "use_rslora": "use_rslora", "use_dora": "use_dora", "rank_pattern": "rank_pattern",
            "alpha_pattern": "alpha_pattern"}
# settings that make an adapter more than A and B on whole layers
UNSUPPORTED = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
               "layers_to_transform", "exclude_modules", "lora_bias", "alora_invocation_tokens", "use_qalora",
               "arrow_config", "use_bdlora", "kasa_config", "monteclora_config", "velora_config", "megatron_config")
# starts that leave the base's weights alone; the others (pissa, olora, corda, loftq, lora_ga) subtract from them
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from disk: its settings, its tensors by PEFT's keys, and its base's fingerprint or None."""

    folder: Path
    config: LoRAConfig
    tensors: dict[str, Tensor]
    base: str | None


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the model's adapters to `folder` in PEFT's format, all at once or not at all.

    A PiSSA adapter is written as the plain one of twice the rank that does the same to the untouched base. Where several
    processes train one model, all call this and the first one writes: the same file as one process would.

    Raises:
        ValueError: the model has no adapters, or one that holds NaN or infinite values.
        OSError: the disk said no. What stood in `folder` still stands there.
    """
    tensors, layers = {}, lora_layers(model)
    for name, layer in layers.items():
        A, B, _ = plain_factors(layer)
        parts = {"lora_A": A, "lora_B": B, "lora_magnitude": layer.lora_magnitude if layer.use_dora else None}
        tensors |= {key: full_tensor(parts[own].detach()).cpu().contiguous()
                    for own, key in keys_of(name, layer.kind, layer.use_dora).items()}
    for key, t in tensors.items():
        if not t.isfinite().all():
            raise ValueError(f"{key} holds NaN or infinite values: the training diverged, nothing was saved")
    fan_in_fan_out = all(layer.kind == "conv1d" for layer in layers.values())
    base = fingerprint(model)
    if is_main_process():
        write_adapter(folder, tensors, peft_config(config_of(model), fan_in_fan_out), base)


def load_adapter(model: nn.Module, folder: str | os.PathLike, any_base: bool = False) -> nn.Module:
    """Inject the adapter in `folder`, saved here or by PEFT, into a plain model, in place. Returns `model`.

    With `any_base` also one whose fingerprint says that it was trained on other weights (on the 4-bit form of this
    base, say). The shapes must fit all the same.

    Raises:
        ValueError: the folder is damaged or no LoRA adapter, needs something this package does not do, was trained on
            another base, or names or shapes differ from the model's. The model is then as before.
    """
    return insert_adapter(model, read_adapter(folder), any_base)


def insert_adapter(model: nn.Module, adapter: AdapterFile, any_base: bool = False) -> nn.Module:
    """`load_adapter`, from an adapter that has been read."""
    check_fits(adapter, model)
    if not any_base:
        check_base(adapter, model)
    inject(model, adapter.config, any_rank=True)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            for own, key in keys_of(name, layer.kind, layer.use_dora).items():
                getattr(layer, own).copy_(adapter.tensors[key])
    return model


def read_adapter(folder: str | os.PathLike) -> AdapterFile:
    """Read and check the files alone; no pickle is ever opened.

    Raises:
        ValueError: no such folder, a file missing or damaged, or an adapter of a kind that is not supported.
    """
    folder = Path(folder)
    return AdapterFile(folder, read_config(folder), *read_tensors(folder))


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of ``adapter_model.safetensors`` and the fingerprint beside them; a ValueError if it is damaged."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        hint = f"; {pickles[0]} may be a pickle, which can run code and is never opened: convert it" if pickles else ""
        raise ValueError(f"{folder} holds no {WEIGHTS}{hint}")
    tensors, metadata = read_safetensors(path)
    for key, t in tensors.items():
        if not t.is_floating_point() or not t.float().isfinite().all():
            raise ValueError(f"{key!r} in {path} holds {t.dtype} values that are not all finite floating-point numbers")
    return tensors, metadata.get(FINGERPRINT)


def read_config(folder: Path) -> LoRAConfig:
    """``adapter_config.json`` as a `LoRAConfig`. A missing r or alpha means 8, as in PEFT.

    Raises:
        ValueError: missing, not JSON, not LoRA, or asking for what is not supported here.
    """
    path, values = folder / CONFIG, read_settings(folder)
    if (kind := values.get("peft_type", "LORA")) != "LORA":
        raise ValueError(f"{path} is of peft_type {kind!r}; only 'LORA' can be loaded")
    for setting in UNSUPPORTED:
        if values.get(setting):
            raise ValueError(f"{path} sets {setting}, which is not supported: an adapter here is A and B on whole "
                             "layers that target_modules names, nothing else")
    if (bias := values.get("bias", "none")) != "none":
        raise ValueError(f"{path} sets bias={bias!r}, which is not supported: it retrains the base's biases")
    if (start := values.get("init_lora_weights", True)) not in KEEPS_BASE:
        raise ValueError(f"{path} was initialised by {start!r}, which changes the base's weights: convert it to a "
                         "plain adapter first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)")
    found = {ours: values[theirs] for ours, theirs in SETTINGS.items() if values.get(theirs) is not None}
    try:
        return LoRAConfig(**{"alpha": 8, "target_modules": ()} | found)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def read_settings(folder: Path) -> dict:
    """``adapter_config.json`` as it stands; a ValueError if it is missing or holds no JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no adapter folder: it holds no {CONFIG}")
    return read_json(path)


def check_fits(adapter: AdapterFile, model: nn.Module) -> None:
    """Raise a ValueError that names the first few ways in which modules, ranks or shapes are not those of `model`."""
    have, expected, wrong = adapter.tensors, {}, []
    try:
        for row, _ in planned(model, adapter.config, any_rank=True):
            (out, inp), r = row.shape, row.rank
            shapes = {"lora_A": (r, inp), "lora_B": (out, r), "lora_magnitude": (out,)}
            expected |= {key: shapes[own] for own, key in keys_of(row.name, row.kind, adapter.config.use_dora).items()}
    except ValueError as e:
        wrong = [str(e)]
    else:
        wrong += [f"{key} is missing" for key in expected if key not in have]
        # PEFT may add a copy of an adapted embedding's own weight, which is fine as long as it is one
        base = {PREFIX + name: p for name, p in model.named_parameters(remove_duplicate=False)}
        wrong += [f"{key!r} has no place in the model" for key, t in have.items()
                  if key not in expected and not is_copy(t, base.get(plain_name(key)))]
        wrong += [f"{key} has shape {tuple(have[key].shape)}, the model needs {shape}"
                  for key, shape in expected.items() if key in have and have[key].shape != shape]
    if wrong:
        more = f"; and {len(wrong) - 4} more" * (len(wrong) > 4)
        raise ValueError(f"the adapter in {adapter.folder} does not fit this model: {'; '.join(wrong[:4])}{more}")


def is_copy(t: Tensor, weight: Tensor | None) -> bool:
    return weight is not None and torch.equal(t.to(weight), weight)


def check_base(adapter: AdapterFile, model: nn.Module) -> None:
    """Raise a ValueError if the fingerprint is another base's; an adapter without one (PEFT's) passes."""
    if adapter.base is None or adapter.base == (here := fingerprint(model)):
        return
    what = "weights" if adapter.base.split("-")[0] == here.split("-")[0] else "architecture"
    raise ValueError(f"the adapter in {adapter.folder} was trained on another base: other {what} (its base is "
                     f"{adapter.base!r}, this model is {here!r}). To load it all the same: any_base=True")


def fingerprint(model: nn.Module) -> str:
    """``architecture-weights`` of the base, two short hashes; the same with or without adapters, merged or not.

    The first covers every parameter's name and shape, the second about 1,024 evenly spaced entries of each, rounded to
    bfloat16, so that a base and its bfloat16 copy agree and a 70B model takes a moment, not minutes. A change to
    entries in between goes unseen: it tells bases apart, it does not prove them equal.
    """
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    layers = [m for m in model.modules() if isinstance(m, LoRALayer)]
    adapters = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    unmerged = {id(layer.base_layer.weight): layer.unmerged[0] for layer in layers if layer.merged}
    # a tied weight counts under each of its names: merging one of its users would part them
    base = {plain_name(name): unmerged.get(id(p), p).detach()
            for name, p in model.named_parameters(remove_duplicate=False) if id(p) not in adapters}
    for name, p in sorted(base.items()):
        shapes.update(f"{name} {tuple(p.shape)}\n".encode())
        entries = full_tensor(p).flatten()[:: max(1, p.numel() // 1024)].to(torch.bfloat16).contiguous()
        weights.update(name.encode() + entries.cpu().view(torch.uint8).numpy().tobytes())
    return f"{shapes.hexdigest()[:12]}-{weights.hexdigest()[:12]}"


# The format


def keys_of(name: str, kind: str, use_dora: bool) -> dict[str, str]:
    """Our parameter -> PEFT's key, for the module called `name`."""
    keys = ({"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"} if kind == "embedding" else
            {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"})
    if use_dora:
        keys["lora_magnitude"] = "lora_magnitude_vector"
    return {own: f"{PREFIX}{name}.{key}" for own, key in keys.items()}


def plain_factors(layer: LoRALayer) -> tuple[Tensor, Tensor, float]:
    """A, B and alpha of the plain adapter equal to this layer's: the layer's own, or for PiSSA those of rank 2r.

    B A - B0 A0 = [B, -B0] [A; A0] (PiSSA, 2404.02948, appendix on conversion); alpha grows so that scaling stays.
    """
    if layer.init != "pissa":
        return layer.lora_A, layer.lora_B, layer.alpha
    A = torch.cat((full_tensor(layer.lora_A), layer.start_A))  # (2r, in)
    B = torch.cat((full_tensor(layer.lora_B), -layer.start_B), dim=1)  # (out, 2r)
    return A, B, layer.scaling / scaling(2 * layer.rank, 1, layer.use_rslora)


def config_of(model: nn.Module) -> LoRAConfig:
    """The config that describes the adapters a model has; a ValueError if they disagree on rsLoRA, DoRA or dropout.

    A target is named by its last part where every module of that name is adapted, by its whole name elsewhere.
    """
    layers = lora_layers(model)
    flags = {(layer.use_rslora, layer.use_dora, layer.dropout) for layer in layers.values()}
    if len(flags) > 1:
        raise ValueError("the adapters differ in use_rslora, use_dora or dropout, which a file can only say once")
    (use_rslora, use_dora, dropout), = flags
    others = {plain_name(name) for name, _ in model.named_modules()} - layers.keys()
    last = {name: name.rpartition(".")[2] for name in layers}
    targets = {name if any(entry_matches(end, other) for other in others) else end for name, end in last.items()}
    ranks = {name: layer.rank * (2 if layer.init == "pissa" else 1) for name, layer in layers.items()}
    alphas = {name: plain_factors(layer)[2] for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    # anchored: a pattern's key would also match the end of a longer name
    return LoRAConfig(rank, alpha, tuple(sorted(targets)), dropout, use_rslora, use_dora,
                      rank_pattern={f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
                      alpha_pattern={f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha})


def peft_config(config: LoRAConfig, fan_in_fan_out: bool = False) -> dict:
    """The ``adapter_config.json`` of a config."""
    settings = {theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()}
    return settings | {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True, "bias": "none",
        "fan_in_fan_out": fan_in_fan_out, "modules_to_save": None, "init_lora_weights": True,
    }


def write_adapter(folder: str | os.PathLike, tensors: dict[str, Tensor], config: dict, base: str | None = None) -> None:
    """Write an adapter folder so that at any moment it holds the old adapter or the new one, whole.

    Both files are written to a folder beside it, which then takes its place in one step. Other files in it stay. An
    OSError means that the disk said no; `folder` is then as it was.
    """
    folder = Path(folder).resolve()
    fresh = folder.with_name(f".{folder.name}.saving")
    files = {WEIGHTS: save(tensors, {"format": "pt"} | ({FINGERPRINT: base} if base else {})),
             CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
    shutil.rmtree(fresh, ignore_errors=True)  # what an interrupted save left
    try:
        if folder.exists():
            shutil.copytree(folder, fresh, symlinks=True, ignore=shutil.ignore_patterns(*files))
        else:
            fresh.mkdir(parents=True)
        for name, data in files.items():
            with open(fresh / name, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())  # so that a power cut after the exchange finds the bytes
        exchange(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def exchange(fresh: Path, folder: Path) -> None:
    """Swap two folders' names in one step (Linux); elsewhere in two, between which `folder` is gone for an instant."""
    at_cwd, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if not folder.exists():
        fresh.rename(folder)
        return
    try:
        if ctypes.CDLL(None).renameat2(at_cwd, os.fsencode(fresh), at_cwd, os.fsencode(folder), swap) == 0:
            return
    except (AttributeError, OSError, TypeError):
        pass  # no such call here
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
