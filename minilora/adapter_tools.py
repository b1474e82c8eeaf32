"""Adapters on disk, opened up without their base: the commands ``inspect``, ``truncate`` and ``extract``.

What each prints ends in a sentence to act on; ``--json`` prints the same as data.
"""

import argparse
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from statistics import median, median_low

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from .adapters import CONFIG, WEIGHTS, AdapterFile, read_adapter, write_adapter
from .peft_format import PREFIX, keys_of, peft_config
from .config import LoRAConfig, entry_matches, variants
from .layers import LoRALayer
from .spectrum import (LowRank, effective_rank, energy, extract_lora, frobenius, product_svdvals, rank_for_energy,
                       stable_rank, truncate)
from .tables import table

SHARE = 0.9  # of the energy, whose directions are counted
LOSS = 0.05  # of the energy, that a truncation may cost for `inspect` to propose it
OUTLIER = 3  # times the median norm of the modules of the same name in the other layers, or a third of it
# weights that are no linear's, by the last part of their name: embeddings and the output head
NO_LINEAR = re.compile(r".*embed.*|wte|wpe|shared|relative_attention_bias|lm_head|output", re.IGNORECASE)
CONV1D_MODELS, CONV1D = ("gpt2", "openai-gpt"), ("c_attn", "q_attn", "c_fc", "c_proj")  # these store W transposed


# The parts of an adapter


@dataclass(frozen=True)
class Part:
    """One adapted module of a file: its update is ``scaling * B @ A``."""

    name: str
    kind: str  # "embedding" or "linear", which GPT-2's Conv1D is in a file
    B: Tensor  # (out, r)
    A: Tensor  # (r, in)
    alpha: float
    scaling: float


def parts_of(adapter: AdapterFile) -> tuple[list[Part], dict[str, Tensor]]:
    """The modules of an adapter in the order of the layers, and tensors that are none of theirs (PEFT may add a copy of
    an embedding).

    Raises:
        ValueError: a factor without its partner, shapes or a rank that contradict each other or the config.
    """
    rest, parts, config = dict(adapter.tensors), [], adapter.config
    for kind in ("linear", "embedding"):
        end = keys_of("", kind)["lora_A"].removeprefix(PREFIX)
        for name in [key[len(PREFIX):-len(end)] for key in rest if key.startswith(PREFIX) and key.endswith(end)]:
            keys = keys_of(name, kind, variants()[config.variant])
            if missing := [key for key in keys.values() if key not in rest]:
                raise ValueError(f"the adapter in {adapter.folder} lacks {', '.join(missing)}")
            A, B, *magnitude = (rest.pop(key) for key in keys.values())
            rank = config.rank_of(name)
            fits = A.dim() == B.dim() == 2 and len(A) == B.shape[1] == rank
            if not fits or any(m.shape != B.shape[:1] for m in magnitude):
                raise ValueError(f"{name} in {adapter.folder} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}; "
                                 f"its {CONFIG} says rank {rank}: expected ({rank}, in) and (out, {rank})")
            parts.append(Part(name, kind, B, A, config.alpha_of(name), config.scaling_of(name)))
    if unknown := [key for key in rest if "lora_" in key]:
        raise ValueError(f"the adapter in {adapter.folder} holds {unknown[0]!r}, which is no LoRA factor's name, or "
                         "lacks its partner")
    if not parts:
        raise ValueError(f"the adapter in {adapter.folder} holds no LoRA factors: expected keys such as "
                         f"{keys_of('MODULE', 'linear')['lora_A']}")
    return sorted(parts, key=lambda part: in_layer_order(part.name)), rest


def in_layer_order(name: str) -> list:
    """A sort key that puts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# Inspect


@dataclass(frozen=True)
class ModuleSpectrum:
    """One module's update, from its singular values `S` (k,), which are those of ``scaling * B @ A``."""

    name: str
    kind: str
    shape: tuple[int, int]  # (out, in)
    rank: int
    alpha: float
    scaling: float
    S: Tensor

    @property
    def norm(self) -> float:
        return frobenius(self.S)

    @property
    def dead(self) -> int:
        """Directions that hold nothing: a singular value below the rounding error of the largest (numpy's matrix_rank),
        or none at all, where the rank is above the matrix's."""
        tolerance = self.S[0] * max(self.shape) * torch.finfo(self.S.dtype).eps
        return self.rank - int((self.S > tolerance).sum())

    def to_dict(self) -> dict:
        return {"name": self.name, "kind": self.kind, "shape": list(self.shape), "rank": self.rank, "alpha": self.alpha,
                "scaling": self.scaling, "norm": self.norm, "stable_rank": stable_rank(self.S),
                "effective_rank": effective_rank(self.S), "rank_for_90": rank_for_energy(self.S, SHARE),
                "dead": self.dead, "singular_values": self.S.tolist()}


@dataclass(frozen=True)
class AdapterSpectrum:
    """What is inside an adapter; str() is a table that ends in a sentence to act on."""

    folder: Path
    file_bytes: int
    dtypes: tuple[str, ...]
    base: str | None  # the fingerprint, where the file has one
    config: LoRAConfig
    modules: tuple[ModuleSpectrum, ...]
    others: tuple[str, ...]  # keys of tensors that are no adapter's

    def lost(self, rank: int) -> tuple[float, float]:
        """The share of the energy that truncation to `rank` loses, over all modules and in the worst."""
        squares = [m.S.double().square() for m in self.modules]
        tails, wholes = ([float(s.sum()) for s in parts] for parts in ([s[rank:] for s in squares], squares))
        return (sum(tails) / sum(wholes) if sum(wholes) else 0.0,
                max(tail / whole if whole else 0.0 for tail, whole in zip(tails, wholes)))

    def ratio(self, module: ModuleSpectrum) -> float | None:
        """The module's norm in medians of the modules of the same name and shape in all layers; None below three."""
        def peer(m: ModuleSpectrum) -> tuple:
            return last(m.name), m.shape

        norms = [m.norm for m in self.modules if peer(m) == peer(module)]
        return module.norm / median(norms) if len(norms) > 2 and median(norms) else None

    @property
    def outliers(self) -> dict[str, float]:
        """Modules far louder or quieter than their peers, with the ratio."""
        ratios = {m.name: self.ratio(m) for m in self.modules}
        return {name: x for name, x in ratios.items() if x is not None and not 1 / OUTLIER <= x <= OUTLIER}

    @property
    def advice(self) -> tuple[int, float, float] | None:
        """The smallest power of two as rank that loses at most `LOSS` of the energy, and the loss, in all and in the
        worst module; None where no such rank is below the adapter's, or nothing is there to keep."""
        most = max(m.rank if m.norm else 1 for m in self.modules)
        choices = ((2**i, *self.lost(2**i)) for i in range((most - 1).bit_length()))
        return next((choice for choice in choices if choice[1] <= LOSS), None)

    @property
    def summary(self) -> str:
        ranks, needed = [m.rank for m in self.modules], [rank_for_energy(m.S, SHARE) for m in self.modules]
        if not any(needed):
            return "every update is zero (B, or an embedding's A, as at the start): the adapter changes nothing"
        rank = f"rank {max(ranks)}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
        typical, most = median_low(needed), max(needed)
        where = f"in {typical}" if typical == most else f"in {typical} (the median module; at most {most})"
        if advice := self.advice:
            r, lost, worst = advice
            return (f"{rank}, but {SHARE:.0%} of the energy is {where}: `python -m minilora truncate "
                    f"{shlex.quote(str(self.folder))} OUT --rank {r}` loses {percent(lost)} (at most {percent(worst)} "
                    "in a module)")
        if max(ranks) == 1:
            return "rank 1: there is nothing to truncate"
        half = max(ranks) // 2
        return (f"{rank}, and in use: {SHARE:.0%} of the energy is {where}, half the rank would lose "
                f"{percent(self.lost(half)[0])}")

    def to_dict(self) -> dict:
        names = ("rank", "energy_lost", "energy_lost_in_worst_module")
        return {"folder": str(self.folder), "file_bytes": self.file_bytes, "dtypes": list(self.dtypes),
                "base": self.base, "use_rslora": self.config.use_rslora, "use_dora": self.config.use_dora,
                "modules": [m.to_dict() | {"norm_over_peers": self.ratio(m)} for m in self.modules],
                "outliers": self.outliers, "other_tensors": list(self.others),
                "truncate": dict(zip(names, self.advice)) if self.advice else None, "summary": self.summary}

    def __str__(self):
        outliers = self.outliers
        head = ("module", "out x in", "rank", "alpha", "scaling", f"{'norm':>9}", "stable", "effective",
                f"{SHARE:.0%} in", "dead", "")
        rows = [(m.name, f"{m.shape[0]} x {m.shape[1]}", m.rank, f"{m.alpha:5g}", f"{m.scaling:7.4g}", f"{m.norm:9.4g}",
                 f"{stable_rank(m.S):6.1f}", f"{effective_rank(m.S):9.1f}", rank_for_energy(m.S, SHARE), m.dead,
                 f"{outliers[m.name]:.2g} x its peers" if m.name in outliers else "") for m in self.modules]
        about = (f"{len(self.modules)} modules", f"{self.file_bytes:,} bytes", *self.dtypes,
                 "rsLoRA" * self.config.use_rslora, "DoRA (magnitudes are not in these figures)" * self.config.use_dora,
                 f"base {self.base}" if self.base else "")
        notes = [", ".join(filter(None, about))]
        if zero := [m.name for m in self.modules if not m.norm]:
            notes.append(f"{len(zero)} {'module is' if len(zero) == 1 else 'modules are'} zero: {some(zero)}")
        if dead := [m for m in self.modules if m.dead and m.norm]:
            notes.append(f"{sum(m.dead for m in dead)} dead directions in {some([m.name for m in dead])}")
        if outliers:
            notes.append(f"outliers by norm: {some(list(outliers))}")
        if self.others:
            notes.append(f"also in the file: {some(list(self.others))}")
        return "\n".join((table(head, rows), *notes, self.summary))


def inspect_adapter(folder: str | os.PathLike) -> AdapterSpectrum:
    """The spectrum of every module of a PEFT-format LoRA adapter, without its base.

    Raises:
        ValueError: as `read_adapter` and `parts_of`.
    """
    adapter = read_adapter(folder, only=(LoRALayer.peft_type,))
    parts, others = parts_of(adapter)
    modules = tuple(ModuleSpectrum(p.name, p.kind, (len(p.B), p.A.shape[1]), len(p.A), p.alpha, p.scaling,
                                   named(p.name, product_svdvals, p.B, p.A, p.scaling)) for p in parts)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for p in parts for t in (p.A, p.B)})
    return AdapterSpectrum(adapter.folder, (adapter.folder / WEIGHTS).stat().st_size, tuple(dtypes), adapter.base,
                           adapter.config, modules, tuple(others))


def plot_energy(spectrum: AdapterSpectrum, file: str | os.PathLike) -> str:
    """Draw the energy curves of the module with the fewest, the median and the most directions; returns what they show.

    Raises:
        ValueError: a file type that matplotlib does not know. OSError: a file that cannot be written.
    """
    from .plots import lines  # matplotlib is slow to import

    modules = sorted((m for m in spectrum.modules if m.norm), key=lambda m: effective_rank(m.S))
    if not modules:
        raise ValueError(f"nothing to draw: {spectrum.summary}")
    chosen = {what: modules[i] for what, i in (("fewest", 0), ("median", len(modules) // 2), ("most", -1))}
    labels = {f"{what}: {m.name}": m for what, m in chosen.items()}
    curves = {label: energy(m.S).tolist() for label, m in labels.items()}
    figure = lines({label: range(1, len(y) + 1) for label, y in curves.items()}, curves, xlabel="directions kept",
                   title=f"Energy of {len(modules)} updates by direction", ylabel="share of the squared norm",
                   limit=(f"{SHARE:.0%}", SHARE))
    figure.axes[0].set_ylim(0, 1.02)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    needed = {label: next(i for i, share in enumerate(y, 1) if share >= SHARE) for label, y in curves.items()}
    return (f"{file}: directions that hold {SHARE:.0%} of the energy, "
            + ", ".join(f"{k} ({label})" for label, k in needed.items()))


# Truncate and extract


@dataclass(frozen=True)
class Written:
    """An adapter that was written as the nearest of its rank; str() is a table of the error of each module."""

    folder: Path
    modules: dict[str, LowRank]
    left_out: tuple[str, ...] = ()  # what changed and is not in the adapter

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
                f"(at most {percent(self.modules[worst].error ** 2)}, in {worst})")

    def to_dict(self) -> dict:
        modules = [{"name": name, "shape": [len(m.B), m.A.shape[1]], "rank": len(m.A), "norm": m.norm, "error": m.error}
                   for name, m in self.modules.items()]
        return {"folder": str(self.folder), "modules": modules, "energy_lost": self.lost,
                "left_out": list(self.left_out), "summary": self.summary}

    def __str__(self):
        rows = [(name, f"{len(m.B)} x {m.A.shape[1]}", len(m.A), f"{m.norm:9.4g}", f"{m.error:.4f}",
                 f"{percent(m.error**2):>11}") for name, m in self.modules.items()]
        notes = [f"not in the adapter, though it changed: {some(list(self.left_out))}"] if self.left_out else []
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
    most = max(len(p.A) for p in parts)
    if rank is not None and rank > most:
        raise ValueError(f"rank {rank} is above the adapter's {most}: truncation only makes a rank smaller")
    check_free(out)
    cut = {p.name: named(p.name, truncate, p.B, p.A, p.scaling, energy=energy,
                         rank=None if rank is None else min(rank, *p.B.shape, *p.A.shape)) for p in parts}
    config = json.loads((adapter.folder / CONFIG).read_text(encoding="utf-8")) | rank_settings(cut)
    tensors = dict(adapter.tensors) | tensors_of({p.name: (p.kind, cut[p.name]) for p in parts})
    write_adapter(out, tensors, config, adapter.base)
    return Written(Path(out), cut)


def extract_adapter(base: str | os.PathLike, tuned: str | os.PathLike, out: str | os.PathLike, *,
                    rank: int | None = None, energy: float | None = None, targets: Iterable[str] = (),
                    device: str = "cpu") -> Written:
    """Write the adapter nearest to the difference of two checkpoints (`spectrum.extract_lora`), in PEFT's format.

    One tensor of each is in memory at a time. A module is every linear weight that differs: two-dimensional and no
    embedding or output head, by its name. What else differs, in value or shape, is named as left out.

    Args:
        base, tuned: a folder with ``model.safetensors`` or its shards and index, or one safetensors file.
        targets: names to take, as `LoRAConfig` matches them; all linears if empty.
        device: where the dense SVDs are computed.

    Raises:
        ValueError: not two checkpoints of one architecture, none that differ, NaN or infinite or quantised weights, a
            rank above a matrix's, or an `out` that holds an adapter already.
    """
    files, targets = (tensor_files(base), tensor_files(tuned)), tuple(targets)
    check_free(out)
    check_device(device)
    names = {key.removesuffix(".weight"): key for key in sorted(files[0].keys() | files[1].keys(), key=in_layer_order)}
    check_targets(targets, names)
    transposed, found, left_out = transposes(Path(base), names), {}, []
    for name, key in tqdm(names.items(), desc="extract", unit="tensor", disable=None):
        W0 = W = None  # one pair at a time, not two
        W0, W = (read(f[key], key) if key in f else None for f in files)
        linear = key.endswith(".weight") and not NO_LINEAR.fullmatch(last(name)) and W0 is not None and W0.dim() == 2
        chosen = linear and (not targets or any(entry_matches(target, name) for target in targets))
        if chosen and (W is None or W.shape != W0.shape):
            there = "missing" if W is None else tuple(W.shape)
            raise ValueError(f"{key} is {tuple(W0.shape)} in {base} and {there} in {tuned}: not one architecture")
        if W0 is None or W is None or W.shape != W0.shape or not torch.equal(W0.to(W.dtype), W):
            if not chosen:
                left_out.append(key)
                continue
            delta = difference(key, W0, W).to(device)
            found[name] = named(key, extract_lora, delta.T if name in transposed else delta, rank=rank, energy=energy)
    if not found:
        raise ValueError(f"no linear weight of {base} differs in {tuned}" + " among the targets" * bool(targets)
                         + (f"; what differs: {some(left_out)}" if left_out else ""))
    others = names.keys() - found.keys()
    ends = {name: last(name) for name in found}
    entries = {name if any(entry_matches(end, other) for other in others) else end for name, end in ends.items()}
    config = peft_config(LoRAConfig(target_modules=tuple(sorted(entries))), found.keys() <= transposed)
    write_adapter(out, tensors_of({name: ("linear", x) for name, x in found.items()}), config | rank_settings(found))
    return Written(Path(out), found, tuple(left_out))


def difference(key: str, W0: Tensor, W: Tensor) -> Tensor:
    """W - W0, at least in fp32, where the difference of two 16-bit numbers close to each other is exact."""
    plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if W0.dtype not in plain or W.dtype not in plain:
        raise ValueError(f"{key} is stored as {W0.dtype} and {W.dtype}: dequantise the checkpoint first")
    wide = torch.promote_types(torch.promote_types(W0.dtype, W.dtype), torch.float32)
    return W.to(wide) - W0.to(wide)


def rank_settings(modules: dict[str, LowRank]) -> dict:
    """PEFT's settings for factors that are the whole update: alpha is each module's rank, so the scaling is 1."""
    ranks = {name: len(m.A) for name, m in modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}  # anchored, as `config_of`
    return {"r": rank, "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": pattern, "use_rslora": False}


def tensors_of(modules: dict[str, tuple[str, LowRank]]) -> dict[str, Tensor]:
    """PEFT's keys and the factors, for kind and factors by module."""
    return {key: {"lora_A": m.A, "lora_B": m.B}[own].cpu().contiguous()
            for name, (kind, m) in modules.items() for own, key in keys_of(name, kind).items()}


# Checkpoints


def tensor_files(path: str | os.PathLike) -> dict[str, Path]:
    """The file in which each tensor of a checkpoint lies: a safetensors file, or a folder with one or its shards.

    Raises:
        ValueError: no such file or folder, a shard missing, an index or a file that is damaged.
    """
    path = Path(path)
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if index.is_file() and not single.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = sorted(path / name for name in shards)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{index} is no index of shards: {e!r}") from None
    elif (files := [path if path.is_file() else single]) and not files[0].is_file():
        raise ValueError(f"{path} is no checkpoint: expected a folder with {single.name} or {index.name}, or a file")
    found = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file.name}, named in {index.name}, is missing from {path}")
        try:
            with safe_open(file, framework="pt") as f:
                found |= dict.fromkeys(f.keys(), file)
        except Exception as e:  # the reader's errors have no common class
            raise ValueError(f"{file} is damaged or not a safetensors file: {e!r}") from None
    return found


def read(file: Path, key: str) -> Tensor:
    """One tensor; the file is closed again, so that its pages do not add up."""
    with safe_open(file, framework="pt") as f:
        return f.get_tensor(key)


def transposes(base: Path, names: Iterable[str]) -> set[str]:
    """The modules that are GPT-2's Conv1D, whose weight is (in, out). Only the model type can tell."""
    named_so = {name for name in names if last(name) in CONV1D}
    config = (base if base.is_dir() else base.parent) / "config.json"
    if not named_so:
        return set()
    try:
        model_type = dict(json.loads(config.read_text(encoding="utf-8")))["model_type"]
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise ValueError(f"{min(named_so)} may be stored transposed, as in GPT-2, or not, which the model_type in "
                         f"{config} would tell: {e!r}") from None
    return named_so if model_type in CONV1D_MODELS else set()


def check_targets(targets: Iterable[str], names: Iterable[str]) -> None:
    for target in targets:
        if not any(entry_matches(target, name) for name in names):
            near = get_close_matches(target, {last(name) for name in names}, n=3)
            raise ValueError(f"target {target!r} matches no weight" + (f"; near: {', '.join(near)}" if near else ""))


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"cannot compute on {device!r}: {str(e).splitlines()[0]}") from None


def check_free(out: str | os.PathLike) -> None:
    if (Path(out) / WEIGHTS).exists():
        raise ValueError(f"{out} holds an adapter already: name another folder")


# Words


def named(name: str, compute, *args, **options):
    """What `compute` returns; its ValueErrors say which module it was."""
    try:
        return compute(*args, **options)
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None


def last(name: str) -> str:
    return name.rpartition(".")[2]


def some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.095 else "under 0.1%" if 0 < share < 0.001 else f"{100 * share:.2g}%"


# The commands


def inspect_command(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("folder", metavar="FOLDER", help=f"with {CONFIG} and {WEIGHTS}")
    parser.add_argument("--json", action="store_true", help="print data in place of the table")
    parser.add_argument("--plot", metavar="FILE", help="draw the energy curves to FILE (.png, .pdf, .svg)")
    options = parser.parse_args(arguments)
    spectrum = inspect_adapter(options.folder)
    sentence = plot_energy(spectrum, options.plot) if options.plot else ""
    print(json.dumps(spectrum.to_dict(), indent=2) if options.json else spectrum)
    if options.plot and not options.json:
        print(sentence)


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
