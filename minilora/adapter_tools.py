"""An adapter on disk, opened up without its base: the command ``inspect``.

What it prints ends in a sentence to act on; ``--json`` prints the same as data.
"""

import argparse
import json
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median, median_low

import torch
from torch import Tensor

from .adapters import CONFIG, WEIGHTS, AdapterFile, read_adapter
from .config import LoRAConfig, variants
from .layers import LoRALayer
from .peft_format import PREFIX, keys_of, modules_of
from .spectrum import effective_rank, energy, frobenius, product_svdvals, rank_for_energy, stable_rank
from .tables import plain, quoted, table

SHARE = 0.9  # of the energy, whose directions are counted
LOSS = 0.05  # of the energy, that a truncation may cost for `inspect` to propose it
OUTLIER = 3  # times the median norm of the modules of the same name in the other layers, or a third of it
AT_ONCE = 2**22  # entries of factors that are decomposed together


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
    an embedding; stacked experts, whose spectra would be one each).

    Raises:
        ValueError: a factor without its partner, shapes or a rank that contradict each other or the config.
    """
    parts, config, adapted = [], adapter.config, set(modules_of(adapter))
    stacked = {key: t for key, t in adapter.tensors.items() if config.target_parameters and ".lora_" in key
               and key[len(PREFIX):].partition(".lora_")[0] not in adapted}
    rest = {key: t for key, t in adapter.tensors.items() if key not in stacked}
    for kind in ("linear", "embedding"):
        end = keys_of("", kind)["lora_A"].removeprefix(PREFIX)
        for name in [key[len(PREFIX):-len(end)] for key in rest if key.startswith(PREFIX) and key.endswith(end)]:
            keys = keys_of(name, kind, variants()[config.variant])
            if missing := [key for key in keys.values() if key not in rest]:
                raise ValueError(f"the adapter in {adapter.folder} lacks {some(missing)}")
            A, B, *magnitude = (rest.pop(key) for key in keys.values())
            if A.dim() == B.dim() == 4 and B.shape[2:] == (1, 1):  # a convolution's: a linear on patches
                A, B = A.flatten(1), B.flatten(1)
            rank = config.rank_of(name)
            fits = A.dim() == B.dim() == 2 and len(A) == B.shape[1] == rank
            if not fits or any(m.shape != B.shape[:1] for m in magnitude):
                raise ValueError(f"{plain(name)} in {adapter.folder} has lora_A {tuple(A.shape)} and lora_B "
                                 f"{tuple(B.shape)}; its {CONFIG} says rank {rank}: expected ({rank}, in) and "
                                 f"(out, {rank})")
            parts.append(Part(name, kind, B, A, config.alpha_of(name), config.scaling_of(name)))
    if unknown := [key for key in rest if "lora_" in key]:
        raise ValueError(f"the adapter in {adapter.folder} holds {quoted(unknown[0])}, which is no LoRA factor's name, "
                         "or lacks its partner")
    if not parts:
        raise ValueError(f"the adapter in {adapter.folder} holds no LoRA factors: expected keys such as "
                         f"{keys_of('MODULE', 'linear')['lora_A']}")
    return sorted(parts, key=lambda part: in_layer_order(part.name)), rest | stacked


def in_layer_order(name: str) -> list:
    """A sort key that puts layer 2 before layer 10; a number's order is that of its length and digits."""
    parts = re.split(r"(\d+)", name)  # every second one a number
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else part for i, part in enumerate(parts)]


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
    norm: float
    stable_rank: float
    effective_rank: float
    rank_for_90: int  # directions that hold `SHARE` of the energy
    dead: int  # directions that hold nothing: a singular value below the rounding error of the largest (numpy's
    # matrix_rank), or none at all, where the rank is above the matrix's

    def to_dict(self) -> dict:
        return {"name": self.name, "kind": self.kind, "shape": list(self.shape), "rank": self.rank, "alpha": self.alpha,
                "scaling": self.scaling, "norm": self.norm, "stable_rank": self.stable_rank,
                "effective_rank": self.effective_rank, "rank_for_90": self.rank_for_90, "dead": self.dead,
                "singular_values": self.S.tolist()}


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
    unused: tuple[str, ...] = ()  # what its settings name and no tensor bears out

    def lost(self, rank: int) -> tuple[float, float]:
        """The share of the energy that truncation to `rank` loses, over all modules and in the worst."""
        tails, wholes = ([sum(s[start:]) for s in self.squares] for start in (rank, 0))
        return (sum(tails) / sum(wholes) if sum(wholes) else 0.0,
                max(tail / whole if whole else 0.0 for tail, whole in zip(tails, wholes)))

    @cached_property
    def squares(self) -> list[list[float]]:
        """The energy of each direction of each module."""
        return [m.S.double().square().tolist() for m in self.modules]

    @cached_property
    def usual_norms(self) -> dict[tuple, float]:
        """The median norm of the modules of one name and shape in all layers, where there are three or more."""
        norms = defaultdict(list)
        for m in self.modules:
            norms[last(m.name), m.shape].append(m.norm)
        return {peers: median(found) for peers, found in norms.items() if len(found) > 2}

    def ratio(self, module: ModuleSpectrum) -> float | None:
        """The module's norm in medians of its peers in all layers; None below three, or where the median is zero."""
        usual = self.usual_norms.get((last(module.name), module.shape))
        return module.norm / usual if usual else None

    @cached_property
    def outliers(self) -> dict[str, float]:
        """Modules far louder or quieter than their peers, with the ratio."""
        ratios = {m.name: self.ratio(m) for m in self.modules}
        return {name: x for name, x in ratios.items() if x is not None and not 1 / OUTLIER <= x <= OUTLIER}

    @cached_property
    def advice(self) -> tuple[int, float, float] | None:
        """The smallest power of two as rank that loses at most `LOSS` of the energy, and the loss, in all and in the
        worst module; None where no such rank is below the adapter's, or nothing is there to keep."""
        most = max(m.rank if m.norm else 1 for m in self.modules)
        choices = ((2**i, *self.lost(2**i)) for i in range((most - 1).bit_length()))
        return next((choice for choice in choices if choice[1] <= LOSS), None)

    @property
    def summary(self) -> str:
        ranks, needed = [m.rank for m in self.modules], [m.rank_for_90 for m in self.modules]
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
                "outliers": self.outliers, "other_tensors": list(self.others), "unused_settings": list(self.unused),
                "truncate": dict(zip(names, self.advice)) if self.advice else None, "summary": self.summary}

    def __str__(self):
        outliers = self.outliers
        head = ("module", "out x in", "rank", "alpha", "scaling", f"{'norm':>9}", "stable", "effective",
                f"{SHARE:.0%} in", "dead", "")
        rows = [(m.name, f"{m.shape[0]} x {m.shape[1]}", m.rank, f"{m.alpha:5g}", f"{m.scaling:7.4g}", f"{m.norm:9.4g}",
                 f"{m.stable_rank:6.1f}", f"{m.effective_rank:9.1f}", m.rank_for_90, m.dead,
                 f"{outliers[m.name]:.2g} x its peers" if m.name in outliers else "") for m in self.modules]
        about = (f"{len(self.modules)} modules", f"{self.file_bytes:,} bytes", *self.dtypes,
                 "rsLoRA" * self.config.use_rslora, "DoRA (magnitudes are not in these figures)" * self.config.use_dora,
                 f"base {plain(self.base, 60)}" if self.base else "")
        notes = [", ".join(filter(None, about))]
        if zero := [m.name for m in self.modules if not m.norm]:
            notes.append(f"{len(zero)} {'module is' if len(zero) == 1 else 'modules are'} zero: {some(zero)}")
        if dead := [m for m in self.modules if m.dead and m.norm]:
            notes.append(f"{sum(m.dead for m in dead)} dead directions in {some([m.name for m in dead])}")
        if outliers:
            notes.append(f"outliers by norm: {some(list(outliers))}")
        if self.others:
            notes.append(f"also in the file: {some(list(self.others))}")
        if self.unused:
            notes.append(f"keys that match none of its modules: {some(list(self.unused))}")
        return "\n".join((table(head, rows), *notes, self.summary))


def inspect_adapter(folder: str | os.PathLike) -> AdapterSpectrum:
    """The spectrum of every module of a PEFT-format LoRA adapter, without its base.

    Raises:
        ValueError: as `read_adapter` and `parts_of`.
    """
    adapter = read_adapter(folder, only=(LoRALayer.peft_type,))
    parts, others = parts_of(adapter)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for p in parts for t in (p.A, p.B)})
    return AdapterSpectrum(adapter.folder, (adapter.folder / WEIGHTS).stat().st_size, tuple(dtypes), adapter.base,
                           adapter.config, tuple(spectra_of(parts)), tuple(others), adapter.unused)


def spectra_of(parts: list[Part]) -> list[ModuleSpectrum]:
    """The spectrum of each part. Those of one shape are decomposed together: one call of torch for thousands."""
    alike, found = defaultdict(list), {}
    for part in parts:
        alike[part.B.shape, part.A.shape, part.B.dtype, part.A.dtype, part.scaling].append(part)
    for group in alike.values():
        count = max(1, AT_ONCE // (group[0].A.numel() + group[0].B.numel()))
        for some_parts in (group[i:i + count] for i in range(0, len(group), count)):
            found |= {spectrum.name: spectrum for spectrum in spectra_of_one_shape(some_parts)}
    return [found[part.name] for part in parts]


def spectra_of_one_shape(parts: list[Part]) -> Iterable[ModuleSpectrum]:
    """The spectra of n parts of one shape, dtype and scaling."""
    p, shape = parts[0], (len(parts[0].B), parts[0].A.shape[1])
    try:
        S = product_svdvals(torch.stack([p.B for p in parts]), torch.stack([p.A for p in parts]), p.scaling)  # (n, k)
    except ValueError:
        S = torch.stack([named(p.name, product_svdvals, p.B, p.A, p.scaling) for p in parts])  # it says which one
    tolerance = S[:, :1] * max(shape) * torch.finfo(S.dtype).eps
    columns = (frobenius(S, True), stable_rank(S, True), effective_rank(S, True), rank_for_energy(S, SHARE, True),
               len(p.A) - (S > tolerance).sum(1))  # (n,) each
    for p, *numbers in zip(parts, S, *(column.tolist() for column in columns)):
        yield ModuleSpectrum(p.name, p.kind, shape, len(p.A), p.alpha, p.scaling, *numbers)


def plot_energy(spectrum: AdapterSpectrum, file: str | os.PathLike) -> str:
    """Draw the energy curves of the module with the fewest, the median and the most directions; returns what they show.

    Raises:
        ValueError: a file type that matplotlib does not know. OSError: a file that cannot be written.
    """
    from .plots import lines  # matplotlib is slow to import

    modules = sorted((m for m in spectrum.modules if m.norm), key=lambda m: m.effective_rank)
    if not modules:
        raise ValueError(f"nothing to draw: {spectrum.summary}")
    chosen = {what: modules[i] for what, i in (("fewest", 0), ("median", len(modules) // 2), ("most", -1))}
    labels = {f"{what}: {plain(m.name, 60)}".replace("$", r"\$"): m for what, m in chosen.items()}
    curves = {label: energy(m.S).tolist() for label, m in labels.items()}
    figure = lines({label: range(1, len(y) + 1) for label, y in curves.items()}, curves, xlabel="directions kept",
                   title=f"Energy of {len(modules)} updates by direction", ylabel="share of the squared norm",
                   limit=(f"{SHARE:.0%}", SHARE))
    figure.axes[0].set_ylim(0, 1.02)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    needed = {label: next(i for i, share in enumerate(y, 1) if share >= SHARE) for label, y in curves.items()}
    return (f"{file}: directions that hold {SHARE:.0%} of the energy, "
            + ", ".join(f"{k} ({label})" for label, k in needed.items()))


# Words


def named(name: str, compute, *args, **options):
    """What `compute` returns; its ValueErrors say which module it was."""
    try:
        return compute(*args, **options)
    except ValueError as e:
        raise ValueError(f"{plain(name)}: {e}") from None


def last(name: str) -> str:
    return name.rpartition(".")[2]


def some(names: list[str], most: int = 4) -> str:
    return ", ".join(plain(name, 120) for name in names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


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
