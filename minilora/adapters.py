"""An adapter on disk, in PEFT's format: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

What is saved here opens in PEFT and vLLM, and what they save opens here. The safetensors metadata also carries the
fingerprint of the base, so that an adapter on the wrong base is refused, not silently wrong.
"""

import json
import os
import warnings
from collections.abc import Collection
from dataclasses import replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from .bases import on_disk
from .beside import beside
from .checkpoints import copy_safetensors, read_safetensors, save_tensors
from .config import LoRAConfig, variants
from .distributed import flat, full_tensor, gathered_whole, is_main_process
from .fingerprints import fingerprint as fingerprint
from .fingerprints import marks
from .injection import adapter_layers, inject, remove
from .layers import AdapterLayer, LoRALayer
from .naming import part_of, plain_parameters, starts
from .pair import read_config_of_pair, read_pair, write_pair
from .peft_format import PREFIX, AdapterFile, as_tensors_say, by_names_here, format_of, in_use, keys_of, usual_key
from .planning import planned
from .tables import quoted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT, HALF = "minilora.base", "minilora.base.float16"  # in the metadata: see `marks`
MOST_ENTRIES = 2**28  # of a LoRA factor: a vocabulary of a million at rank 256
PART = 2**22  # entries that are looked at in one go
SMALL = 2**28  # bytes of a file that is read at once; a larger one is mapped
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of what an adapter's file may hold


def save_adapter(model: nn.Module, folder: str | os.PathLike, tokenizer: Any = None) -> None:
    """Write the model's adapters to `folder`, all at once or not at all: LoRA and its variants in PEFT's format, the
    relatives of peft_methods.py in one like it.

    A PiSSA adapter is written as the plain one of twice the rank that does the same to the untouched base. Where
    several processes train one model, all call this and the first one writes: the same file as one process would.
    `tokenizer`, one of transformers', is written beside it, for ``AutoTokenizer.from_pretrained(folder)``.

    Raises:
        ValueError: the model has no adapters, or one that holds NaN or infinite values.
        OSError: the disk said no. What stood in `folder` still stands there.
    """
    with gathered_whole(model):
        form = format_of(first_layer(model).peft_type)
        tensors = {key: full_tensor(t.detach()).cpu().contiguous() for key, t in places(model).items()}
        if flat(model):  # it takes the memory back on the way out
            tensors = {key: t.clone() for key, t in tensors.items()}
        (*base, half), config = marks(model), form.write(model)
    for key, t in tensors.items():
        if not t.isfinite().all():
            raise ValueError(f"{key} holds NaN or infinite values: the training diverged, nothing was saved")
    ours = {id(p) for layer in adapter_layers(model).values() for p in layer.own().values()}
    if lost := [name for name, p in plain_parameters(model) if p.requires_grad and id(p) not in ours]:
        warnings.warn(f"{', '.join(lost[:4])}{', ...' * (len(lost) > 4)} can train too and is not saved: an adapter "
                      "file holds adapters and what modules_to_save names", stacklevel=2)
    if is_main_process():
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_adapter(folder, tensors, config, "-".join(base), half)


def load_adapter(model: nn.Module, folder: str | os.PathLike, any_base: bool = False) -> nn.Module:
    """Inject the adapter in `folder`, saved here or by PEFT, into a plain model, in place. Returns `model`.

    With `any_base` also one whose fingerprint says that it was trained on other weights (on the 4-bit form of this
    base, say). The shapes must fit all the same.

    Raises:
        ValueError: the folder is damaged or no adapter, needs something this package does not do, was trained on
            another base, or names or shapes differ from the model's. The model is then as before.
    """
    return insert_adapter(model, read_adapter(folder), any_base)


def insert_adapter(model: nn.Module, adapter: AdapterFile, any_base: bool = False) -> nn.Module:
    """`load_adapter`, from an adapter that has been read."""
    lora = isinstance(adapter.config, LoRAConfig)
    if lora:  # before anything is made: a file may ask for a rank that no memory holds
        adapter = check_fits(in_use(by_names_here(adapter, model), model), model)
    if not any_base:
        check_base(adapter, model)
    cards = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(list(cards)):  # what is drawn for A is overwritten: the caller's numbers stay
        inject(model, adapter.config, any_rank=True)
    here = places(model)
    if not lora and (wrong := misfits(adapter.tensors, {key: t.shape for key, t in here.items()}, model)):
        remove(model)
        raise ValueError(no_fit(adapter, wrong))
    with torch.no_grad():
        for key, t in here.items():
            if key in adapter.tensors:
                t.copy_(adapter.tensors[key])
    return model


def places(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's adapters by their keys on disk."""
    first = first_layer(model)
    prefix = format_of(first.peft_type).prefix
    own = {f"{prefix}{name}.{end}": t for name, layer in adapter_layers(model).items()
           for end, t in layer.saved().items()}
    return own | first.common()


def first_layer(model: nn.Module) -> AdapterLayer:
    return next(iter(adapter_layers(model).values()))


def read_adapter(folder: str | os.PathLike, only: Collection[str] = ()) -> AdapterFile:
    """Read and check the files alone; no pickle is ever opened. `only`: the peft_types that are wanted, if not all.

    Raises:
        ValueError: no such folder, a file missing or damaged, or an adapter of a kind that is not supported.
    """
    folder = Path(folder)

    def read() -> AdapterFile:
        config, (tensors, base, half) = read_config(folder, only), read_tensors(folder)
        usual = {usual_key(key): key for key in tensors}
        if twice := [key for key in tensors if usual[usual_key(key)] != key]:
            other = usual[usual_key(twice[0])]
            raise ValueError(f"{folder / WEIGHTS} holds {quoted(twice[0])} twice, as {quoted(other)} too")
        tensors = {key: tensors[written] for key, written in usual.items()}
        adapter = AdapterFile(folder, config, tensors, base, half)
        return as_tensors_say(adapter, read_settings(folder)) if isinstance(config, LoRAConfig) else adapter

    return read_pair(folder, CONFIG, WEIGHTS, read)


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], str | None, str | None]:
    """The tensors of ``adapter_model.safetensors``, the fingerprint beside them, and that of the base's fp16 copy; a
    ValueError if it is damaged."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        hint = f"; {pickles[0]} may be a pickle, which can run code and is never opened: convert it" if pickles else ""
        raise ValueError(f"{folder} holds no {WEIGHTS}{hint}")
    tensors, metadata = safe_tensors(path)
    return tensors, metadata.get(FINGERPRINT), metadata.get(HALF)


def safe_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file, each tensor one that an adapter may hold; else a ValueError."""
    small = path.stat().st_size <= SMALL
    tensors, metadata = copy_safetensors(path) if small else read_safetensors(path)
    for key, t in tensors.items():
        if t.dtype not in DTYPES:
            raise ValueError(f"{quoted(key)} in {path} holds {t.dtype} values, expected finite floating-point numbers "
                             "of 16 bits or more")
        if "lora_" in key and t.numel() > MOST_ENTRIES:
            raise ValueError(f"{quoted(key)} in {path} has the shape {tuple(t.shape)}: no layer's factor is so large, "
                             f"expected at most {MOST_ENTRIES:,} entries")
        if not is_finite(t):
            raise ValueError(f"{quoted(key)} in {path} holds {t.dtype} values that are not all finite floating-point "
                             "numbers")
    return tensors, metadata


def is_finite(t: Tensor) -> bool:
    """Whether all entries are finite as fp32, which an adapter is; a part at a time: a file may be huge."""
    parts = (t,) if t.numel() <= PART else t.flatten().split(PART)
    # the largest absolute value is NaN where one entry is, and costs a tenth of asking every entry
    return all(isfinite(vector_norm(part.float(), inf).item()) for part in parts if part.numel())


def read_config(folder: Path, only: Collection[str] = ()) -> Any:
    """``adapter_config.json`` as a `LoRAConfig`, or as a relative's config. A missing r or alpha means 8, as in PEFT.

    Raises:
        ValueError: missing, not JSON, of a method unknown here, or asking for what is not supported here.
    """
    path, values = folder / CONFIG, read_settings(folder)
    kind = values.get("peft_type", LoRALayer.peft_type)
    if only and kind not in only:
        raise ValueError(f"{path}: is of peft_type {quoted(kind)}; "
                         f"only {' or '.join(map(repr, only))} can be loaded here")
    try:
        return format_of(kind).read(values)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def read_settings(folder: Path) -> dict:
    """``adapter_config.json`` as it stands; a ValueError if it is missing or holds no JSON object."""
    if (settings := read_config_of_pair(folder, CONFIG, WEIGHTS)) is None:
        raise ValueError(f"{folder} is no adapter folder: it holds no {CONFIG}")
    return settings


def check_fits(adapter: AdapterFile, model: nn.Module) -> AdapterFile:
    """The adapter, whose targets are now those that its tensors name. Its targets may mean modules of which it has no
    tensor: in a part of the model of which it has none at all (a vision tower, say, that the model it was trained on
    did not have) they are left out, by name; in a part that it adapts, tensors are missing.

    Raises:
        ValueError: the first few ways in which modules, ranks or shapes are not those of `model`.
    """
    layer = variants()[adapter.config.variant]
    try:
        rows = dict(planned(model, adapter.config, any_rank=True))
        others = beside(model, adapter.config)
    except ValueError as e:
        raise ValueError(no_fit(adapter, [str(e)])) from None
    keys = {row: keys_of(row.name, row.kind, layer) for row in rows}
    known = [row.name for row in rows if any(key in adapter.tensors for key in keys[row].values())]
    parts = {start for name in known for start in starts(name)}
    if absent := [row.name for row in rows if known and part_of(row.name) not in parts]:
        warnings.warn(f"{adapter.folder} has no tensors for {', '.join(absent[:4])}{', ...' * (len(absent) > 4)}, "
                      "which its targets mean too: left as they are", stacklevel=4)
        rows = {row: module for row, module in rows.items() if row.name not in absent}
        adapter = replace(adapter, config=replace(adapter.config, target_modules=tuple(row.name for row in rows)))
    expected = {key: on_disk(module, own, layer.shapes(*row.shape, row.rank)[own])
                for row, module in rows.items() for own, key in keys[row].items()}
    expected |= {f"{PREFIX}{other.name}.{key}": shape for other in others for key, shape in other.shapes.items()}
    common = layer.common_shapes([row.shape for row in rows], adapter.config.rank)
    expected |= {key: shape for key, shape in common.items() if key in adapter.tensors}
    if wrong := misfits(adapter.tensors, expected, model):
        raise ValueError(no_fit(adapter, wrong))
    return adapter


def misfits(have: dict[str, Tensor], expected: dict[str, tuple], model: nn.Module) -> list[str]:
    """In what the tensors of a file differ from what is expected: names that lack, are too many, shapes."""
    wrong = [f"{key} is missing" for key in expected if key not in have]
    # PEFT may add a copy of an adapted embedding's own weight, which is fine as long as it is one
    base = {PREFIX + name: p for name, p in plain_parameters(model)}
    wrong += [f"{quoted(key)} has no place in the model" for key, t in have.items()
              if key not in expected and not is_copy(t, base.get(key.replace(".base_layer.", ".")))]
    return wrong + [f"{key} has shape {tuple(have[key].shape)}, the model needs {tuple(shape)}"
                    for key, shape in expected.items() if key in have and have[key].shape != shape]


def no_fit(adapter: AdapterFile, wrong: list[str]) -> str:
    more = f"; and {len(wrong) - 4} more" * (len(wrong) > 4)
    return f"the adapter in {adapter.folder} does not fit this model: {'; '.join(wrong[:4])}{more}"


def is_copy(t: Tensor, weight: Tensor | None) -> bool:
    return weight is not None and torch.equal(t.to(weight), weight)


def check_base(adapter: AdapterFile, model: nn.Module) -> None:
    """Raise a ValueError if the fingerprint is another base's; an adapter without one (PEFT's) passes."""
    shapes, weights, half = marks(model)
    here = f"{shapes}-{weights}"
    if adapter.base in (None, here) or (adapter.base.split("-")[0], adapter.half) == (shapes, half):
        return
    what = "weights" if adapter.base.split("-")[0] == shapes else "architecture"
    raise ValueError(f"the adapter in {adapter.folder} was trained on another base: other {what} (its base is "
                     f"{quoted(adapter.base)}, this model is {here!r}). To load it all the same: any_base=True")


def write_adapter(folder: str | os.PathLike, tensors: dict[str, Tensor], config: dict, base: str | None = None,
                  half: str | None = None) -> None:
    """Write an adapter folder so that at any moment `read_adapter` finds the old adapter or the new one, whole: the two
    files are replaced inside the folder as pair.py says. Everything else in it stays, and so does the folder itself.

    The same adapter is the same bytes. An OSError means that the disk said no; the old adapter is still there then.
    """
    metadata = {"format": "pt"} | {key: mark for key, mark in ((FINGERPRINT, base), (HALF, half)) if mark}
    text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    write_pair(Path(folder), CONFIG, WEIGHTS, text, lambda path: save_tensors(tensors, path, metadata))


def check_free(out: str | os.PathLike) -> None:
    """Raise a ValueError if an adapter cannot be written to `out`, or would replace one: before the work, not after."""
    out = Path(out)
    if (out / WEIGHTS).exists() or (out / CONFIG).exists():
        raise ValueError(f"{out} holds an adapter already: name another folder")
    if first := next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None):
        raise ValueError(f"{first} is a file: name a folder")
