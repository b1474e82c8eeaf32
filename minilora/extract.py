"""Adapters written anew at the rank that is asked for: the commands ``truncate`` (an adapter, cut) and ``extract`` (the
adapter nearest to the difference of two checkpoints).

Both print the error of each module and end in a sentence; ``--json`` prints the same as data.
"""

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .adapter_tools import in_layer_order, last, named, parts_of, percent, some
from .adapters import check_free, read_adapter, read_settings, write_adapter
from .bases import kind_of
from .checkpoints import read_json, read_tensor, tensor_files
from .config import LoRAConfig, entry_matches
from .hub_names import empty_model, names_here
from .layers import LoRALayer
from .peft_format import keys_of, peft_config
from .spectrum import LowRank, extract_lora, truncate
from .tables import plain, quoted, table

# weights that are no linear's, by the last part of their name: embeddings and the output head
NO_LINEAR = re.compile(r".*embed.*|wte|wpe|shared|relative_attention_bias|lm_head|output", re.IGNORECASE)
CONV1D_MODELS, CONV1D = ("gpt2", "openai-gpt"), ("c_attn", "q_attn", "c_fc", "c_proj")  # these store W transposed


@dataclass(frozen=True)
class Written:
    """An adapter that was written as the nearest of its rank; str() is a table of the error of each module."""

    folder: Path
    modules: dict[str, LowRank]
    left_out: tuple[str, ...] = ()  # what changed and is not in the adapter
    note: str = ""

    @property
    def lost(self) -> float:
        """The share of the energy that is not in the adapter, over its modules."""
        whole = sum(m.norm**2 for m in self.modules.values())
        return sum((m.norm * m.error) ** 2 for m in self.modules.values()) / whole if whole else 0.0

    @property
    def summary(self) -> str:
        ranks, worst = [len(m.A) for m in self.modules.values()], max(self.modules, key=lambda n: self.modules[n].error)
        rank = f"rank {max(ranks)}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
        return (f"{self.folder}: {len(ranks)} modules at {rank}, which lose {percent(self.lost)} of the energy "
                f"(at most {percent(self.modules[worst].error ** 2)}, in {plain(worst, 120)})")

    def to_dict(self) -> dict:
        modules = [{"name": name, "shape": [len(m.B), m.A.shape[1]], "rank": len(m.A), "norm": m.norm, "error": m.error}
                   for name, m in self.modules.items()]
        return {"folder": str(self.folder), "modules": modules, "energy_lost": self.lost,
                "left_out": list(self.left_out), "note": self.note, "summary": self.summary}

    def __str__(self):
        rows = [(name, f"{len(m.B)} x {m.A.shape[1]}", len(m.A), f"{m.norm:9.4g}", f"{m.error:.4f}",
                 f"{percent(m.error**2):>11}") for name, m in self.modules.items()]
        notes = [f"not in the adapter, though it changed: {some(list(self.left_out))}"] if self.left_out else []
        notes += [self.note] if self.note else []
        head = ("module", "out x in", "rank", f"{'norm':>9}", " error", "energy lost")
        return "\n".join((table(head, rows), *notes, self.summary))


def truncate_adapter(folder: str | os.PathLike, out: str | os.PathLike, *, rank: int | None = None,
                     energy: float | None = None) -> Written:
    """Write the adapter in `folder` to `out` with every module cut to `rank`, or to the rank that keeps a share of its
    energy: the nearest there is (`spectrum.truncate`). The scaling goes into the factors; its base stays its base.

    A module of a smaller rank keeps it. With DoRA the update B A is what is cut; the magnitudes stay.

    Raises:
        ValueError: as `inspect_adapter`, a rank above every module's, or an `out` that holds an adapter already.
    """
    adapter = read_adapter(folder, only=(LoRALayer.peft_type,))
    parts, _ = parts_of(adapter)
    if adapter.config.target_parameters:
        raise ValueError(f"{adapter.folder} adapts stacked experts ({adapter.config.target_parameters[0]}), which "
                         "cannot be truncated")
    most = max(len(p.A) for p in parts)
    if rank is not None and rank > most:
        raise ValueError(f"rank {rank} is above the adapter's {most}: truncation only makes a rank smaller")
    check_free(out)
    cut = {p.name: named(p.name, truncate, p.B, p.A, p.scaling, energy=energy,
                         rank=None if rank is None else min(rank, *p.B.shape, *p.A.shape)) for p in parts}
    config = read_settings(adapter.folder) | rank_settings(cut)
    new = tensors_of({p.name: (p.kind, cut[p.name]) for p in parts})
    tensors = adapter.tensors | {key: like(t, adapter.tensors[key]) for key, t in new.items()}
    write_adapter(out, tensors, config, adapter.base, adapter.half)
    return Written(Path(out), cut)


def extract_adapter(base: str | os.PathLike, tuned: str | os.PathLike, out: str | os.PathLike, *,
                    rank: int | None = None, energy: float | None = None, targets: Iterable[str] = (),
                    device: str = "cpu") -> Written:
    """Write the adapter nearest to the difference of two checkpoints (`spectrum.extract_lora`), in PEFT's format.

    One tensor of each is in memory at a time. A module is every linear weight that differs: two-dimensional and no
    embedding or output head, by its name. What else differs, in value or shape, is named as left out. Modules are
    called what the installed transformers calls them in memory; without it, what they are called on disk.

    Args:
        base, tuned: a folder with ``model.safetensors`` or its shards and index, or one safetensors file.
        targets: names to take, as `LoRAConfig` matches them; all linears if empty.
        device: where the dense SVDs are computed.

    Raises:
        ValueError: not two checkpoints of one architecture, none that differ, NaN or infinite or quantised weights, a
            rank above a matrix's, a weight that is fused with others in memory, or an `out` that holds an adapter
            already.
    """
    files, targets = (tensor_files(Path(base)), tensor_files(Path(tuned))), tuple(targets)
    check_free(out)
    check_device(device)
    names = {key.removesuffix(".weight"): key for key in sorted(files[0].keys() | files[1].keys(), key=in_layer_order)}
    here, kinds, note = in_memory(Path(base), names)
    check_targets(targets, [*names, *filter(None, here.values())])
    transposed, found, left_out = transposes(Path(base), names), {}, []
    for name, key in tqdm(names.items(), desc="extract", unit="tensor", disable=None):
        W0 = W = None  # one pair at a time, not two
        W0, W = (read_tensor(f[key], key) if key in f else None for f in files)
        linear = key.endswith(".weight") and not NO_LINEAR.fullmatch(last(name)) and W0 is not None and W0.dim() == 2
        wanted = not targets or any(entry_matches(target, n) for target in targets for n in (name, here[name] or name))
        chosen = linear and wanted and kinds.get(here[name], "linear") in ("linear", "conv1d")
        if chosen and (W is None or W.shape != W0.shape):
            there = "missing" if W is None else tuple(W.shape)
            raise ValueError(f"{plain(key)} is {tuple(W0.shape)} in {base} and {there} in {tuned}: not one "
                             "architecture")
        if W0 is None or W is None or W.shape != W0.shape or not torch.equal(W0.to(W.dtype), W):
            if not chosen:
                left_out.append(key)
                continue
            if (now := here[name]) is None:
                raise ValueError(f"{plain(key)} differs, and is no module of its own in this version of the model but "
                                 "a part of a larger parameter, such as stacked experts: no adapter goes around it. "
                                 "Name the modules to take with targets")
            delta = difference(key, W0, W).to(device)
            found[now] = named(key, extract_lora, delta.T if name in transposed else delta, rank=rank, energy=energy)
    if not found:
        raise ValueError(f"no linear weight of {base} differs in {tuned}" + " among the targets" * bool(targets)
                         + (f"; what differs: {some(left_out)}" if left_out else ""))
    others = (kinds or names).keys() - found.keys()
    ends = {name: last(name) for name in found}
    entries = {name if any(entry_matches(end, other) for other in others) else end for name, end in ends.items()}
    conv1d = found.keys() <= {here[name] for name in transposed}
    config = peft_config(LoRAConfig(target_modules=tuple(sorted(entries))), conv1d)
    write_adapter(out, tensors_of({name: ("linear", x) for name, x in found.items()}), config | rank_settings(found))
    return Written(Path(out), found, tuple(left_out), note)


def difference(key: str, W0: Tensor, W: Tensor) -> Tensor:
    """W - W0, at least in fp32, where the difference of two 16-bit numbers close to each other is exact."""
    unquantised = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if W0.dtype not in unquantised or W.dtype not in unquantised:
        raise ValueError(f"{plain(key)} is stored as {W0.dtype} and {W.dtype}: dequantise the checkpoint first")
    wide = torch.promote_types(torch.promote_types(W0.dtype, W.dtype), torch.float32)
    return W.to(wide) - W0.to(wide)


def rank_settings(modules: dict[str, LowRank]) -> dict:
    """PEFT's settings for factors that are the whole update: alpha is each module's rank, so the scaling is 1."""
    ranks = {name: len(m.A) for name, m in modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}  # anchored, as `config_of`
    return {"r": rank, "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": pattern, "use_rslora": False}


def like(t: Tensor, before: Tensor) -> Tensor:
    """A factor of another rank in the form that a file has for it: of a convolution a kernel, or one of 1 x 1."""
    if before.dim() == 2:
        return t
    return t[..., None, None] if before.shape[2:] == (1, 1) else t.view(-1, *before.shape[1:])


def tensors_of(modules: dict[str, tuple[str, LowRank]]) -> dict[str, Tensor]:
    """PEFT's keys and the factors, for kind and factors by module."""
    return {key: {"lora_A": m.A, "lora_B": m.B}[own].cpu().contiguous()
            for name, (kind, m) in modules.items() for own, key in keys_of(name, kind).items()}


# Checkpoints


def in_memory(base: Path, names: Iterable[str]) -> tuple[dict[str, str | None], dict[str, str | None], str]:
    """What modules are called in memory (None: fused with others there), the kind of every module there (`kind_of`;
    empty where no model could be asked), and what is to be said about that."""
    path = (base if base.is_dir() else base.parent) / "config.json"
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict) or not config.get("architectures"):
        return {name: name for name in names}, {}, ""
    if (model := empty_model(config)) is None:
        return ({name: name for name in names}, {}, f"modules are called what {base} calls them: no transformers is "
                f"installed that knows {quoted(config['architectures'])} and what it calls them in memory")
    kinds = {name: kind_of(module) for name, module in model.named_modules()}
    here = names_here(model, names)
    # what is no module at all is no linear either: `kinds` says so by leaving it None
    return here, kinds | {now: None for now in here.values() if now is not None and now not in kinds}, ""


def transposes(base: Path, names: Iterable[str]) -> set[str]:
    """The modules that are GPT-2's Conv1D, whose weight is (in, out). Only the model type can tell."""
    named_so = {name for name in names if last(name) in CONV1D}
    config = (base if base.is_dir() else base.parent) / "config.json"
    if not named_so:
        return set()
    try:
        model_type = read_json(config)["model_type"]
    except (ValueError, KeyError) as e:
        raise ValueError(f"{plain(min(named_so))} may be stored transposed, as in GPT-2, or not, which the model_type "
                         f"in {config} would tell: {e!r}") from None
    return named_so if model_type in CONV1D_MODELS else set()


def check_targets(targets: Iterable[str], names: Iterable[str]) -> None:
    for target in targets:
        if not any(entry_matches(target, name) for name in names):
            near = get_close_matches(target[:100], {last(name) for name in names}, n=3)
            raise ValueError(f"target {quoted(target)} matches no weight" + (f"; near: {some(near)}" if near else ""))


def check_device(device: str) -> None:
    """Raise a ValueError unless torch can compute there; on "meta" it computes shapes alone."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"cannot compute on {quoted(device)}: {str(e).splitlines()[0]}") from None


# The commands


def truncate_command(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="the adapter")
    options = cut_options(parser, arguments)
    show(truncate_adapter(options.folder, options.out, rank=options.rank, energy=options.energy), options)


def extract_command(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    for name, what in (("base", "before"), ("tuned", "after")):
        parser.add_argument(name, metavar=name.upper(), help=f"the checkpoint {what}: a folder or a safetensors file")
    parser.add_argument("--targets", nargs="+", default=(), metavar="NAME",
                        help="the names, or ends of names, of the modules to take (default: all linears)")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda (default: cpu)")
    options = cut_options(parser, arguments)
    show(extract_adapter(options.base, options.tuned, options.out, rank=options.rank, energy=options.energy,
                         targets=options.targets, device=options.device), options)


def cut_options(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """What the two commands that write an adapter have in common."""
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="the rank of every module")
    size.add_argument("--energy", type=float, help="or the share of each module's energy to keep, such as 0.95")
    parser.add_argument("--json", action="store_true", help="print data in place of the table")
    return parser.parse_args(arguments)


def show(written: Written, options: argparse.Namespace) -> None:
    print(json.dumps(written.to_dict(), indent=2) if options.json else written)
