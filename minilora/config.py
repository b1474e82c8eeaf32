"""What to adapt and how loudly: the one place that knows scaling and how a name matches a target."""

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

ALL_LINEAR = "all-linear"


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
        use_dora: train each output row's length apart from its direction (Liu et al. 2024, 2402.09353).
        init: ``"kaiming"`` (A uniform in +-1/sqrt(d_in), B zero) or ``"pissa"`` (A and B are the leading singular
            part of W, the base keeps the rest; Meng et al. 2024, 2404.02948).
        rank_pattern: ranks for particular modules. A key is a regular expression for the whole name or for its end
            after a dot; the first that matches wins.
        alpha_pattern: the same for alpha.

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

    def __post_init__(self):
        targets, patterns = self.target_modules, (self.rank_pattern, self.alpha_pattern)
        require(isinstance(targets, Iterable), "target_modules must be names or a regular expression", targets)
        if not isinstance(targets, str):
            targets = tuple(targets)
            object.__setattr__(self, "target_modules", targets)
        require(targets and all(isinstance(t, str) and t for t in targets), "target_modules must name modules", targets)
        require(is_number(self.dropout) and 0 <= self.dropout < 1, "dropout must be in [0, 1)", self.dropout)
        require(self.init in ("kaiming", "pissa"), "init must be 'kaiming' or 'pissa'", self.init)
        require(isinstance(self.use_rslora, bool), "use_rslora must be True or False", self.use_rslora)
        require(isinstance(self.use_dora, bool), "use_dora must be True or False", self.use_dora)
        require(all(isinstance(p, Mapping) for p in patterns), "a pattern must map names to values", patterns)
        ranks = {"rank": self.rank} | {f"rank_pattern[{k!r}]": r for k, r in self.rank_pattern.items()}
        for where, rank in ranks.items():
            require(type(rank) is int and 0 < rank < 2**31, f"{where} must be a positive integer", rank)
        alphas = {"alpha": self.alpha} | {f"alpha_pattern[{k!r}]": a for k, a in self.alpha_pattern.items()}
        for where, alpha in alphas.items():
            require(is_number(alpha) and alpha != 0, f"{where} must be a finite number other than 0", alpha)
        if self.init == "pissa":
            require(not self.use_dora, "init='pissa' splits W, which DoRA needs whole: use_dora must be False", True)
            require(min(alphas.values()) > 0, "init='pissa' takes the root of the scaling: alpha must be above 0", alphas)
        for pattern in [targets] * isinstance(targets, str) + [ending(key) for p in patterns for key in p]:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as e:
                raise ValueError(f"{pattern!r} is not a regular expression: {e}") from None

    def matches(self, name: str) -> bool:
        """Whether the module called `name` is a target ("all-linear" is decided by the module's kind, not here)."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        return any(entry_matches(entry, name) for entry in self.target_modules)

    def rank_of(self, name: str) -> int:
        """The rank of module `name`: its pattern's, else `rank`."""
        return next((rank for key, rank in self.rank_pattern.items() if pattern_matches(key, name)), self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of module `name`: its pattern's, else `alpha`."""
        return next((alpha for key, alpha in self.alpha_pattern.items() if pattern_matches(key, name)), self.alpha)

    def scaling_of(self, name: str) -> float:
        """What multiplies ``B @ A`` in module `name`."""
        return scaling(self.rank_of(name), self.alpha_of(name), self.use_rslora)


def scaling(rank: int, alpha: float, use_rslora: bool = False) -> float:
    """alpha / rank (LoRA, section 4.1), or alpha / sqrt(rank) (rsLoRA, theorem 3.2)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def entry_matches(entry: str, name: str) -> bool:
    """A list entry matches the whole name or its end after a dot."""
    return name == entry or name.endswith("." + entry)


def pattern_matches(pattern: str, name: str) -> bool:
    """A pattern's key matches the whole name or its end after a dot, as a regular expression."""
    return re.fullmatch(ending(pattern), name) is not None


def ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})"


def is_number(x) -> bool:
    """A finite int or float; True and False are none."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def require(ok, what: str, got) -> None:
    if not ok:
        raise ValueError(f"{what}, got {got!r}")


def check_name(kind: str, name: str, names: Iterable[str]) -> None:
    """Raise a ValueError, with the nearest of the names there are, unless `name` is one of them."""
    if name not in names:
        near = get_close_matches(str(name), names, n=1)
        hint = f"; near: {near[0]}" if near else ""
        raise ValueError(f"no {kind} {name!r}, expected one of {', '.join(names)}{hint}")
