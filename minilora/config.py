"""What to adapt and how loudly: the one place that knows scaling and how a name matches a target."""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module

from .patterns import PatternTable
from .tables import plain, quoted

ALL_LINEAR = "all-linear"
VARIANTS: dict[str, type] = {}  # name -> class of the layer; every class enters itself (see layers.LoRALayer)


@dataclass(frozen=True)
class LoRAConfig:
    """The choices of a LoRA fine-tune (Hu et al. 2021, arXiv 2106.09685).

    Args:
        rank: r, the inner size of ``B @ A``.
        alpha: how loud the update is; the update is ``scaling * B @ A``.
        target_modules: names to adapt. In a sequence each entry matches a module of exactly that name, or whose name
            ends in a dot and the entry (``"q_proj"``, ``"layers.0.mlp.up_proj"``). A single string is a regular
            expression for the whole name, or ``"all-linear"``: every linear but the output head.
        dropout: share of the input's entries that the adapter does not see in training.
        use_rslora: scale by alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023, 2312.03732).
        use_dora: the variant that trains each output row's length apart from its direction (Liu et al. 2024,
        2402.09353). init: ``"kaiming"`` (A uniform in +-1/sqrt(d_in), B zero) or the name of another variant of the
            layer, each a file in variants/: ``"pissa"``, ``"lora_fa"``, ``"vera"``.
        rank_pattern: ranks for particular modules. A key is a regular expression for the whole name or for its end
            after a dot; the first that matches wins.
        alpha_pattern: the same for alpha.
        seed: of what a variant draws once for all layers (VeRA).
        modules_to_save: modules that train whole beside the adapters and are saved with them, such as a new head; names
            as in `target_modules`.
        trainable_tokens: rows of an embedding that train whole, by its name, such as {"embed_tokens": (5, 6)}.
        target_parameters: stacked experts (parameters.py) by name, such as ("experts.gate_up_proj",); targets may then
            be ().

    Raises:
        ValueError: a value outside its range.
    """

    rank: int = 8
    alpha: float = 16
    target_modules: str | tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    modules_to_save: tuple[str, ...] = ()
    trainable_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()

    def __post_init__(self):
        targets, patterns = self.target_modules, (self.rank_pattern, self.alpha_pattern)
        require(isinstance(targets, Iterable), "target_modules must be names or a regular expression", targets)
        if not isinstance(targets, str):
            targets = tuple(targets)
            object.__setattr__(self, "target_modules", targets)
        for own in ("modules_to_save", "target_parameters"):
            names = getattr(self, own)
            listed = not isinstance(names, str) and isinstance(names, Iterable)
            object.__setattr__(self, own, names := tuple(names) if listed else names)
            require(listed and all(isinstance(n, str) and n for n in names), f"{own} must be a list of names", names)
        rows = self.trainable_tokens
        require(isinstance(rows, Mapping) and all(
            isinstance(name, str) and isinstance(ids, (list, tuple)) and ids
            and all(type(i) is int and i >= 0 for i in ids) for name, ids in rows.items()),
                "trainable_tokens must map names to lists of tokens", rows)
        object.__setattr__(self, "trainable_tokens", {name: tuple(dict.fromkeys(ids)) for name, ids in rows.items()})
        require((targets or self.target_parameters) and all(isinstance(t, str) and t for t in targets),
                "target_modules must name modules", targets)
        require(is_number(self.dropout) and 0 <= self.dropout < 1, "dropout must be in [0, 1)", self.dropout)
        require(isinstance(self.use_rslora, bool), "use_rslora must be True or False", self.use_rslora)
        require(isinstance(self.use_dora, bool), "use_dora must be True or False", self.use_dora)
        require(type(self.seed) is int and 0 <= self.seed < 2**63, "seed must be an integer of 0 or more", self.seed)
        require(all(isinstance(p, Mapping) for p in patterns), "a pattern must map names to values", patterns)
        ranks = {"rank": self.rank} | {f"rank_pattern[{k!r}]": r for k, r in self.rank_pattern.items()}
        for where, rank in ranks.items():
            require(type(rank) is int and 0 < rank < 2**31, f"{where} must be a positive integer", rank)
        alphas = {"alpha": self.alpha} | {f"alpha_pattern[{k!r}]": a for k, a in self.alpha_pattern.items()}
        for where, alpha in alphas.items():
            require(is_number(alpha) and alpha != 0, f"{where} must be a finite number other than 0", alpha)
        if self.init != "kaiming":
            named = {name: layer for name, layer in variants().items() if layer.choice == {"init": name}}
            require(self.init in named, f"init must be 'kaiming' or {' or '.join(map(repr, sorted(named)))}", self.init)
            named[self.init].check(self)
            require(not self.use_dora, f"init={self.init!r} and DoRA are two variants: use_dora must be False", True)
        _ = self.target_table, self.rank_table, self.alpha_table  # made now, so that a wrong pattern is said now

    @cached_property
    def target_table(self) -> PatternTable[bool]:
        return PatternTable({self.target_modules: True} if isinstance(self.target_modules, str) else {})

    @cached_property
    def target_names(self) -> frozenset[str]:
        return frozenset(() if isinstance(self.target_modules, str) else self.target_modules)

    @cached_property
    def rank_table(self) -> PatternTable[int]:
        return PatternTable(self.rank_pattern, ending)

    @cached_property
    def alpha_table(self) -> PatternTable[float]:
        return PatternTable(self.alpha_pattern, ending)

    @property
    def variant(self) -> str:
        """The name of the layer's variant, a key of `VARIANTS`: "lora" is the plain one."""
        return "dora" if self.use_dora else "lora" if self.init == "kaiming" else self.init

    def matches(self, name: str) -> bool:
        """Whether the module called `name` is a target ("all-linear" is decided by the module's kind, not here)."""
        if isinstance(self.target_modules, str):
            return self.target_table.get(name, False)
        return not self.target_names.isdisjoint(ends(name))

    def rank_of(self, name: str) -> int:
        """The rank of module `name`: its pattern's, else `rank`."""
        return self.rank_table.get(name, self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of module `name`: its pattern's, else `alpha`."""
        return self.alpha_table.get(name, self.alpha)

    def scaling_of(self, name: str) -> float:
        """What multiplies ``B @ A`` in module `name`."""
        return scaling(self.rank_of(name), self.alpha_of(name), self.use_rslora)


def variants() -> dict[str, type]:
    """Every variant of the LoRA layer by name: those in variants/, and those that others have defined."""
    import_module(f"{__package__}.variants")  # only now: nobody waits for torch to write down a config
    return VARIANTS


def scaling(rank: int, alpha: float, use_rslora: bool = False) -> float:
    """alpha / rank (LoRA, section 4.1), or alpha / sqrt(rank) (rsLoRA, theorem 3.2)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def entry_matches(entry: str, name: str) -> bool:
    """A list entry matches the whole name or its end after a dot."""
    return name == entry or name.endswith("." + entry)


def ends(name: str) -> list[str]:
    """The name and what follows each of its dots: what a list entry may be to match it."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def ending(pattern: str) -> str:
    """A pattern's key matches the whole name or its end after a dot, as a regular expression."""
    return rf"(.*\.)?({pattern})"


def is_number(x) -> bool:
    """A finite int or float; True and False are none."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def require(ok, what: str, got) -> None:
    if not ok:
        raise ValueError(f"{plain(what)}, got {quoted(got)}")


def check_name(kind: str, name: str, names: Iterable[str]) -> None:
    """Raise a ValueError, with the nearest of the names there are, unless `name` is one of them."""
    if name not in names:
        near = get_close_matches(str(name), names, n=1)
        hint = f"; near: {near[0]}" if near else ""
        raise ValueError(f"no {kind} {quoted(name)}, expected one of {', '.join(names)}{hint}")
