"""How a result differs from the one that was expected, in words."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch

from ..grading.calls import short
from ..grading.wire import name_of


def difference(got: Any, expected: Any, tolerance: float, what: str = "the result") -> str | None:
    """Says how `got` differs from `expected` (numbers, tensors, modules, and containers of these), or None."""
    if type(got) is type(expected) and type(got) in (int, float, str, bool, type(None)) and got == expected:
        return None
    if isinstance(expected, torch.nn.Module) and isinstance(got, torch.nn.Module):
        got, expected = contents(got), contents(expected)
    if isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple)):
        if are_names(expected) and are_names(got) and list(got) != list(expected):
            return names_difference(list(got), list(expected), what)
        if len(got) != len(expected):
            return f"{what} has {len(got)} entries, expected {len(expected)}"
        got, expected = dict(enumerate(got)), dict(enumerate(expected))
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        if got.keys() != expected.keys():
            return f"{what} has the keys {short(list(got))}, expected {short(list(expected))}"
        # what an exercise observes has names of its own, as "the outputs"
        names = {k: k if str(k).startswith("the ") else f"{what}[{k!r}]" for k in expected}
        found = (difference(got[k], expected[k], tolerance, names[k]) for k in expected)
        return next(filter(None, found), None)
    if is_number(expected) and is_number(got) or isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor):
        return tensor_difference(as_tensor(got), as_tensor(expected), tolerance, what)
    if type(got) is not type(expected) and not (isinstance(expected, str) and isinstance(got, str)):
        wanted = f"a tensor of shape {tuple(expected.shape)}" if isinstance(expected, torch.Tensor) else short(expected)
        found = getattr(got, "type_name", type(got).__name__)  # of a value from another process
        return f"{what} is {short(repr(got), 40)} ({found}), expected {wanted} ({type(expected).__name__})"
    if type(expected).__eq__ is object.__eq__:  # a function or a plain object: a fresh one is never equal to another
        return None
    same = np.array_equal(got, expected) if isinstance(expected, np.ndarray) else got == expected
    return None if same else f"{what} is {short(got)!r}, expected {short(expected)!r}"


def are_names(values: Any) -> bool:
    return len(values) > 0 and all(isinstance(v, str) for v in values)


def names_difference(got: list[str], expected: list[str], what: str) -> str:
    """How one list of names differs from another: doubled, missing, too many, or in another order."""
    twice = next((name for name in got if got.count(name) > expected.count(name) > 0), None)
    missing = [name for name in expected if name not in got]
    extra = [name for name in got if name not in expected]
    if twice is not None:
        found = f"has {twice!r} {got.count(twice)} times"
    elif extra or missing:
        parts = [f"{words} {short(', '.join(map(repr, names)))}" for words, names in
                 (("lacks", missing), ("has", extra)) if names]
        found = " and ".join(parts) + (", which does not belong there" if extra else "")
    else:
        found = "has the right names in another order"
    return f"{what} {found}: it is {short(got)}, expected {short(expected)}"


def contents(module: torch.nn.Module) -> dict[str, Any]:
    """Every tensor of a module, and which parameters train."""
    trains = {f"{name}.requires_grad": p.requires_grad for name, p in module.named_parameters()}
    return dict(module.state_dict()) | trains


def is_number(value: Any) -> bool:
    """A plain number, a fraction, NumPy's or a tensor of no dimensions: the learner may return any of them."""
    return isinstance(value, (Real, np.number, np.bool_)) or isinstance(value, torch.Tensor) and value.ndim == 0


def as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, Real) and not isinstance(value, (int, np.number)):  # as float and Fraction are
        return torch.tensor(float(value), dtype=torch.float64)
    return torch.as_tensor(value).detach()


def tensor_difference(got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> str | None:
    if got.shape != expected.shape:
        return f"{what} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if kind(got) != kind(expected) and not (kind(got) == (False, False) and kind(expected) == (False, True)):
        if kind(got) == (False, True) and kind(expected) == (False, False):
            return f"{what} is a decimal number ({got.item()}), expected a whole one: use // or int()"
        return f"{what} is of dtype {name_of(got)}, expected {name_of(expected)}"
    if torch.equal(got, expected):
        return None
    g, e = got.double(), expected.double()
    scale = e[e.isfinite()].abs().max().item() if e.isfinite().any() else 0.0
    slack = tolerance * (scale or 1.0) if expected.is_floating_point() else 0.0  # whole numbers agree exactly
    close = torch.isclose(g, e, rtol=0, atol=slack, equal_nan=True)
    if close.all():
        return None
    if g.ndim == 0:
        share = (g / e).item() if e and g else 0.0
        size = f" ({share:.3g} times that)" if expected.is_floating_point() and abs(share - 1) > 1e-3 and share else ""
        return f"{what} is {written(got)}, expected {written(expected)}{size}"
    if e.isfinite().all() and not g.isfinite().all():
        return f"{what} has entries that are not finite"
    ratio = (g * e).sum() / (e * e).sum()
    if ratio and torch.isclose(g, ratio * e, rtol=0, atol=slack).all():
        return f"{what} is {ratio:.6g} times what is expected"
    if g.ndim == 2 and g.shape == e.T.shape and torch.isclose(g, e.T, rtol=0, atol=slack).all():
        return f"{what} is transposed"
    at = tuple((~close).nonzero()[0].tolist())
    return (f"{what} is wrong in {(~close).sum()} of {g.numel()} entries: at {list(at)} it is {written(got[at])}, "
            f"expected {written(expected[at])}")


def written(x: torch.Tensor) -> str:
    return f"{x.item():.6g}" if x.is_floating_point() else str(x.item())


def kind(x: torch.Tensor) -> Any:
    """The dtype; for a single number only whether it is boolean, whole or floating."""
    return x.dtype if x.ndim else (x.dtype == torch.bool, x.is_floating_point())


def is_plain(value: Any) -> bool:
    """Numbers and strings, and lists and tuples of these: they read well in a message."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
