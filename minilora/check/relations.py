"""How all results of a function stand to the expected ones: a square, a reciprocal, one too many, twice as much."""

from collections.abc import Sequence

import torch
from torch import Tensor

RELATIONS = (  # what comes of the expected result, and how to say it
    (lambda e: -e, "what is expected with the other sign"),
    (lambda e: e**2, "the square of what is expected: is a root missing?"),
    (lambda e: e.sqrt(), "the root of what is expected: one root too many, or a square is missing"),
    (lambda e: 1 / e, "1 divided by what is expected: it is upside down"),
    (lambda e: 1 - e, "1 minus what is expected: it is the other part"),
    (lambda e: e.log(), "the logarithm of what is expected: exp brings it back"),
    (lambda e: e.exp(), "exp of what is expected"),
    (lambda e: e.abs(), "what is expected without its sign"),
    (lambda e: e.clamp(min=0), "what is expected, but never below 0: do not cut it off"),
    (lambda e: e.clamp(max=1), "what is expected, but never above 1: do not cap it"),
    (lambda e: e.clamp(0, 1), "what is expected, but cut off at 0 and at 1"),
    (lambda e: e.round(), "what is expected, rounded to a whole number"),
    (lambda e: e.floor(), "what is expected, rounded down to a whole number"),
    (lambda e: e.ceil(), "what is expected, rounded up to a whole number"),
    (lambda e: (100 * e).round() / 100, "what is expected, rounded to two digits: give it as it is"),
)


def relation(pairs: Sequence[tuple[Tensor, Tensor]], tolerance: float) -> str | None:
    """What every result of (result, expected) `pairs` is, as "2 times what is expected"; None if nothing fits all.
    The tolerance is a share of the largest entry, 0 for whole numbers."""
    if len(pairs) < 2 or any(g.shape != e.shape or not e.numel() for g, e in pairs):
        return None
    pairs = [(g.double(), e.double()) for g, e in pairs]
    if not all(g.isfinite().all() and e.isfinite().all() for g, e in pairs):
        return None
    factor = ratio(pairs)
    if factor and abs(factor - 1) > tolerance and agree(pairs, lambda e: factor * e, tolerance):
        return f"{factor:.6g} times what is expected" if factor != -1 else RELATIONS[0][1]
    for change, words in RELATIONS[1:]:
        if agree(pairs, change, tolerance):
            return words
    if all(e.ndim == 0 for _, e in pairs):
        return shift([(g - e).item() for g, e in pairs], tolerance * max(abs(e.item()) for _, e in pairs))
    return None


def ratio(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The factor that turns the first expected result that is not zero into what came."""
    whole = next(((g, e) for g, e in pairs if e.any()), None)
    if whole is None:
        return 0.0
    g, e = whole
    return ((g * e).sum() / (e * e).sum()).item()


def agree(pairs: Sequence[tuple[Tensor, Tensor]], change, tolerance: float) -> bool:
    wanted = [change(e) for _, e in pairs]
    return all(w.isfinite().all() for w in wanted) and all(
        torch.isclose(g, w, rtol=0, atol=tolerance * (w.abs().max().item() or 1.0)).all()
        for (g, _), w in zip(pairs, wanted))


def shift(differences: list[float], slack: float) -> str | None:
    """The same difference everywhere, or whole numbers that are off by one, always to one side, where they are off."""
    first = differences[0]
    if first and all(abs(d - first) <= slack for d in differences):
        return f"{abs(first):g} {'more' if first > 0 else 'less'} than what is expected"
    for one, words in ((1.0, "one too many"), (-1.0, "one too few")):
        if one in differences and all(d in (0.0, one) for d in differences):
            return f"{words} at times: look at what happens at the edge"
    return None
