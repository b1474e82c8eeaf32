"""Exercise checkers that name the mistake, and predictions that answer a wrong guess; one module a notebook.

    from minilora.check import nb02
    nb02.merged_weight(merged_weight)   # prints "ok: ..." or fails with "not yet: <the likely mistake>", on one line
    nb02.first_step.reveal("c")         # prints the misconception behind the guess, then the answer
"""

import inspect
import io
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..tables import wrapped


class CheckFailed(AssertionError):
    """The learner's answer is not right yet. Jupyter shows the one line alone; nbgrader gives no points."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class Outcome(NamedTuple):
    """What came of one call: its value, the error it raised, the name of an argument that it changed in place, and
    what it printed."""

    value: Any = None
    error: Exception | None = None
    changed: str | None = None
    printed: str = ""


@dataclass(frozen=True)
class Exercise:
    """Checks a learner's function against a reference, and recognises the known mistakes.

    Args:
        name: the function that the learner writes.
        reference: an independent right answer, best written in another way than the solution.
        inputs: seed -> the arguments, a tuple. torch's generator is seeded before each call, so `torch.randn` will do.
            Vary the shapes with the seed, and keep sizes apart that a mistake could mix up (rank, alpha, d_in, d_out).
        mistakes: (wrong function, message) pairs. A learner who gets the same results, or raises the same error, as a
            wrong function on every input is told its message.
        tolerance: error allowed in a floating-point entry, as a share of the largest expected entry.
        rounds: how many seeds are tried.
        in_place: the function is meant to change its arguments.
        observe: (result, *arguments) -> what is compared in place of the result, as a layer's output or a module's
            parameters after the call.
    """

    name: str
    reference: Callable
    inputs: Callable[[int], tuple]
    mistakes: Sequence[tuple[Callable, str]]
    tolerance: float = 1e-5
    rounds: int = 4
    in_place: bool = False
    observe: Callable | None = None

    def __call__(self, function: Callable) -> None:
        """Print one line if `function` is right.

        Raises:
            CheckFailed: with one line that names the mistake.
        """
        problem = self.diagnose(function)
        if problem:
            raise CheckFailed(f"not yet: {problem}") from None
        print(f"ok: {self.name} is right on {self.rounds} fresh inputs")

    def diagnose(self, function: Callable) -> str | None:
        """What is wrong with `function`, or None."""
        if not callable(function):
            return f"hand over the function {self.name} itself, without calling it (this is {short(function)})"
        expected, got = self.outcomes(self.reference), self.outcomes(function)
        if all(self.right(g, e) for g, e in zip(got, expected)):
            return None
        problem = self.known(got) or self.describe(function, got, expected)
        return f"{problem}; you printed: {got[0].printed}" if got[0].printed else problem

    def known(self, got: Sequence[Outcome]) -> str | None:
        """The message of the mistake in the table that has the same outcomes."""
        return next((message for mistake, message in self.mistakes
                     if all(self.alike(g, m) for g, m in zip(got, self.outcomes(mistake)))), None)

    def outcomes(self, function: Callable) -> list[Outcome]:
        return [self.outcome(function, seed) for seed in range(self.rounds)]

    def outcome(self, function: Callable, seed: int) -> Outcome:
        """One call on fresh arguments; what the function prints or warns is held back, the random state put back."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"), \
                redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()):
            before, arguments = self.fresh(seed), self.fresh(seed)
            try:
                value = function(*arguments)
                if self.observe and (value is not None or self.in_place):
                    value = self.observe(value, *arguments)
            except Exception as error:  # whatever the learner's code raises is for the learner to read
                return Outcome(error=error, printed=short(out.getvalue(), 200))
        names = () if self.in_place else inspect.signature(self.reference).parameters
        changed = (name for name, b, a in zip(names, before, arguments) if difference(a, b, 0))
        return Outcome(value, changed=next(changed, None), printed=short(out.getvalue(), 200))

    def fresh(self, seed: int) -> tuple:
        torch.manual_seed(seed)
        return self.inputs(seed)

    def right(self, got: Outcome, expected: Outcome) -> bool:
        if expected.error:
            return isinstance(got.error, type(expected.error))
        return not got.error and not got.changed and not difference(got.value, expected.value, self.tolerance)

    def alike(self, got: Outcome, other: Outcome) -> bool:
        if got.error or other.error:
            return type(got.error) is type(other.error) and str(got.error) == str(other.error)
        return got.changed == other.changed and not difference(got.value, other.value, self.tolerance)

    def describe(self, function: Callable, got: Sequence[Outcome], expected: Sequence[Outcome]) -> str:
        """Names a mistake that is not in the table."""
        seed, g, e = next((s, g, e) for s, (g, e) in enumerate(zip(got, expected)) if not self.right(g, e))
        if isinstance(g.error, NotImplementedError) or g.value is ...:
            return f"{self.name} is not written yet; the folded cell below has a hint"
        if g.error:
            return f"{self.name} raised {type(g.error).__name__}: {short(g.error)}{where_raised(g.error, function)}"
        if e.error:
            return f"{self.name} returned {short(g.value)}, expected {type(e.error).__name__}: {short(e.error)}"
        if g.changed:
            return f"{self.name} changes its argument {g.changed} in place; make a new value instead"
        if g.value is None and e.value is not None:
            return f"{self.name} returns None; is the return missing?"
        if isinstance(g.value, Iterator):  # as map and filter give one too
            listed = isinstance(e.value, (list, tuple))
            advice = "put list(...) around it" if listed else f"expected {type(e.value).__name__}"
            return f"{self.name} returns a generator; {advice}"
        if not varies(got) and varies(expected):
            return f"the result of {self.name} does not depend on its input"
        with torch.random.fork_rng(devices=[]):
            arguments = self.fresh(seed)
        inside = ", ".join(map(repr, arguments))
        what = f"{self.name}({inside})" if is_plain(arguments) and len(inside) <= 120 else "the result"
        return difference(g.value, e.value, self.tolerance, what)


@dataclass(frozen=True)
class Prediction:
    """A choice that the learner commits to before the run.

    Args:
        right: the right choice.
        answers: for every choice what to say about it: why it is right, or the misconception behind it.
    """

    right: str
    answers: Mapping[str, str]

    def reveal(self, guess: str | None) -> None:
        """Print what is behind the guess, then the answer; with None for a guess, what is behind every choice."""
        if isinstance(guess, str):
            guess = guess.strip().lower()
        if guess is not None and (not isinstance(guess, str) or guess not in self.answers):
            raise CheckFailed(f"not yet: the guess is {short(repr(guess))}, expected one of {', '.join(self.answers)}")
        others = [choice for choice in self.answers if choice != self.right and guess in (None, choice)]
        for choice in others:
            print(wrapped(f"{choice}: not so. {self.answers[choice]}", 3))
        print(wrapped(f"{self.right}: right. {self.answers[self.right]}", 3))


@dataclass(frozen=True)
class Estimate:
    """A number that the learner commits to before the run.

    Args:
        misconceptions: (ratio, message) pairs: a guess that is `ratio` times the measured value, within a tenth, is
            told the message.
        within: a guess counts as right up to this factor above or below the measured value.
        far_above: what to say to a guess of more than a million times the measured value, in bytes for gigabytes.
    """

    misconceptions: Sequence[tuple[float, str]]
    within: float = 1.5
    far_above: str = ""

    def reveal(self, guess: float | None, measured: float) -> None:
        """Print how far the guess is from the measured value, a positive number, and what is behind it."""
        if guess is None:
            for ratio, message in self.misconceptions:
                print(wrapped(f"about {brief(ratio)} times the measured value: not so. {message}", 3))
            return
        if not is_number(guess) or not guess > 0:
            raise CheckFailed(f"not yet: the guess is {short(repr(guess))}, expected a number above 0")
        ratio = guess / measured
        reason = next((message for r, message in self.misconceptions if abs(ratio / r - 1) < 0.1),
                      self.far_above if ratio > 1e6 else "")
        if not reason and 1 / self.within <= ratio <= self.within:
            print(f"right: your guess is within a factor of {self.within:g} of the measured value")
        else:
            size = f"{brief(ratio)} times" if ratio > 1 else f"1/{brief(1 / ratio)} of"
            print(wrapped(f"not so: your guess is {size} the measured value. {reason}", 3))


def brief(ratio: float) -> str:
    """Two digits, without an exponent."""
    return f"{ratio:.2g}" if ratio < 99.5 else f"{ratio:,.0f}"


def is_plain(value: Any) -> bool:
    """Numbers and strings, and lists and tuples of these: they read well in a message."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def varies(outcomes: Sequence[Outcome]) -> bool:
    return any(o.error or difference(o.value, outcomes[0].value, 0) for o in outcomes)


def short(value: Any, limit: int = 120) -> str:
    """`value` on one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[:limit - 3] + "..."


def where_raised(error: Exception, function: Callable) -> str:
    """The learner's own line that raised `error`."""
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    lines = [frame.line for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file and frame.line]
    return f", at `{lines[-1]}`" if lines else ""


def difference(got: Any, expected: Any, tolerance: float, what: str = "the result") -> str | None:
    """Says how `got` differs from `expected` (numbers, tensors, modules, and containers of these), or None."""
    if isinstance(expected, torch.nn.Module) and isinstance(got, torch.nn.Module):
        got, expected = contents(got), contents(expected)
    if isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple)):
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
    if type(got) is not type(expected):
        wanted = f"a tensor of shape {tuple(expected.shape)}" if isinstance(expected, torch.Tensor) else short(expected)
        return f"{what} is {short(repr(got), 40)} ({type(got).__name__}), expected {wanted} ({type(expected).__name__})"
    if type(expected).__eq__ is object.__eq__:  # a function or a plain object: a fresh one is never equal to another
        return None
    same = np.array_equal(got, expected) if isinstance(expected, np.ndarray) else got == expected
    return None if same else f"{what} is {short(got)!r}, expected {short(expected)!r}"


def contents(module: torch.nn.Module) -> dict[str, Any]:
    """Every tensor of a module, and which parameters train."""
    trains = {f"{name}.requires_grad": p.requires_grad for name, p in module.named_parameters()}
    return dict(module.state_dict()) | trains


def is_number(value: Any) -> bool:
    """A plain number, NumPy's or a tensor of no dimensions: the learner may return any of them."""
    return isinstance(value, (int, float, np.number, np.bool_)) or isinstance(value, torch.Tensor) and value.ndim == 0


def as_tensor(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else torch.as_tensor(value).detach()


def tensor_difference(got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> str | None:
    if got.shape != expected.shape:
        return f"{what} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if kind(got) != kind(expected):
        if kind(got) == (False, True) and kind(expected) == (False, False):
            return f"{what} is a decimal number ({got.item()}), expected a whole one: use // or int()"
        return f"{what} is of dtype {name_of(got)}, expected {name_of(expected)}"
    g, e = got.double(), expected.double()
    scale = e[e.isfinite()].abs().max().item() if e.isfinite().any() else 0.0
    slack = tolerance * (scale or 1.0) if expected.is_floating_point() else 0.0  # whole numbers agree exactly
    close = torch.isclose(g, e, rtol=0, atol=slack, equal_nan=True)
    if close.all():
        return None
    if g.ndim == 0:
        return f"{what} is {written(got)}, expected {written(expected)}"
    if e.isfinite().all() and not g.isfinite().all():
        return f"{what} has entries that are not finite"
    ratio = (g * e).sum() / (e * e).sum()
    if ratio and torch.isclose(g, ratio * e, rtol=0, atol=slack).all():
        return f"{what} is {ratio:.6g} times the expected one"
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


def name_of(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
