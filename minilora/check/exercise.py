"""An exercise: inputs, a reference, and a diagnosis of what another function makes of the inputs."""

import copy
import hashlib
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..grading.calls import Call, Failure, call, failure, short
from .compare import as_tensor, difference, is_number, is_plain
from .relations import relation

MORE = 20  # inputs that are drawn beside those of the table


class CheckFailed(AssertionError):
    """The learner's answer is not right yet. Jupyter shows the one line alone; nbgrader gives no points."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class Case(NamedTuple):
    """One set of arguments: a number that the exercise's own draw is given, and the seed of torch's and Python's
    generators. `drawn` asks for arguments of which nothing is known beforehand."""

    number: int
    seed: int
    drawn: bool = False


class Outcome(NamedTuple):
    """What came of one call: its value, its failure, the name of an argument that it changed in place, and what it
    printed."""

    value: Any = None
    error: Failure | None = None
    changed: str | None = None
    printed: str = ""


@dataclass(frozen=True)
class Exercise:
    """Checks a learner's function against a reference, and recognises the known mistakes.

    Args:
        name: the function that the learner writes.
        reference: an independent right answer, best written in another way than the solution.
        inputs: number -> the arguments, a tuple. The generators of torch and of `random` are seeded before each call,
            so `torch.randn` will do. Vary the shapes with the number, and keep sizes apart that a mistake could mix up
            (rank, alpha, d_in, d_out).
        mistakes: (wrong function, message) pairs. A learner who gets the same results, or raises the same error, as a
            wrong function on every input is told its message.
        tolerance: error allowed in a floating-point entry, as a share of the largest expected entry.
        rounds: how many inputs of `inputs` are tried, each with its own number; `MORE` are drawn besides.
        in_place: the function is meant to change its arguments.
        observe: (result, *arguments) -> what is compared in place of the result, as a layer's output or a module's
            parameters after the call.
        recorded: False calls the function with autograd's recording turned off, as autograd calls a backward.
        draw: as `inputs`: arguments from which no table can tell the answer. Needed where `inputs` are a table
            themselves, or give the answer away by their sizes.
        situations: (condition on the arguments, words) pairs. A function that is wrong only where a condition holds is
            told its words: "wrong where <words>".
    """

    name: str
    reference: Callable
    inputs: Callable[[int], tuple]
    mistakes: Sequence[tuple[Callable, str]]
    tolerance: float = 1e-5
    rounds: int = 4
    in_place: bool = False
    observe: Callable | None = None
    recorded: bool = True
    draw: Callable[[int], tuple] | None = None
    situations: Sequence[tuple[Callable, str]] = ()

    def __call__(self, function: Callable) -> None:
        """Print one line if `function` is right.

        Raises:
            CheckFailed: with one line that names the mistake.
        """
        problem = self.diagnose(function)
        if problem:
            raise CheckFailed(f"not yet: {problem}") from None
        print(f"ok: {self.name} is right on {len(self.cases)} fresh inputs")

    def diagnose(self, function: Callable) -> str | None:
        """What is wrong with `function`, or None."""
        if not callable(function):
            return self.uncalled(short(function))
        return self.judge(self.cases, self.outcomes(function))

    def uncalled(self, what: str) -> str:
        return f"hand over the function {self.name} itself, without calling it (this is {what})"

    # ---------------------------------------------------------------- cases

    @property
    def cases(self) -> list[Case]:
        """The same for everybody and every time, so that a message can be relied on."""
        return [Case(number, number) for number in range(self.rounds)] + self.drawn_cases(0, MORE)

    def drawn_cases(self, seed: int, count: int) -> list[Case]:
        """Cases that nobody can foresee who does not know the seed."""
        digests = (hashlib.sha256(f"{seed} {self.name} {i}".encode()).digest() for i in range(count))
        return [Case(i % self.rounds, int.from_bytes(digest[:7], "big"), True) for i, digest in enumerate(digests)]

    def arguments(self, case: Case) -> tuple:
        """The arguments of a case, a copy of its own each time; the random states are put back."""
        return copy.deepcopy(self.pristine(case))

    def pristine(self, case: Case) -> tuple:
        """The arguments of a case, to look at only."""
        kept = self.__dict__.setdefault("drawn arguments", {})
        if case not in kept:
            state = random.getstate()
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(case.seed)
                random.seed(case.seed)
                try:
                    drawn = (self.draw if case.drawn and self.draw else self.inputs)(case.number)
                    kept[case] = copy.deepcopy(drawn)  # a table's own entry may be drawn again
                finally:
                    random.setstate(state)
        return kept[case]

    # ---------------------------------------------------------------- outcomes

    def outcomes(self, function: Callable, cases: Sequence[Case] | None = None) -> list[Outcome]:
        return [self.outcome(function, case) for case in (self.cases if cases is None else cases)]

    def outcome(self, function: Callable, case: Case) -> Outcome:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(case.seed)
            done = call(function, self.arguments(case), self.recorded, listed=self.observe is not None)
        return self.seen(done, self.pristine(case))

    def known_outcome(self, function: Callable, case: Case) -> Outcome:
        """The outcome of the reference or of a mistake in the table, which stays what it is."""
        kept = self.__dict__.setdefault("known outcomes", {})
        if (function, case) not in kept:
            kept[function, case] = self.outcome(function, case)
        return kept[function, case]

    def seen(self, done: Call, before: tuple) -> Outcome:
        """What the exercise looks at in a call, given its arguments as they were."""
        value = done.value
        if done.failure:
            return Outcome(error=done.failure, printed=done.printed)
        if self.observe and (value is not None or self.in_place):
            try:
                value = self.observe(value, *done.after)
            except Exception as error:  # a value of another kind than the exercise asks for
                return Outcome(error=failure(error), printed=done.printed)
        names = () if self.in_place else inspect.signature(self.reference).parameters
        changed = (name for name, b, a in zip(names, before, done.after) if difference(a, b, 0))
        return Outcome(value, changed=next(changed, None), printed=done.printed)

    # ---------------------------------------------------------------- diagnosis

    def judge(self, cases: Sequence[Case], got: Sequence[Outcome],
              expected: Sequence[Outcome] | None = None) -> str | None:
        """What is wrong with these outcomes, or None; `expected` are the reference's, where they are known already."""
        expected = expected or [self.known_outcome(self.reference, case) for case in cases]
        if all(self.right(g, e) for g, e in zip(got, expected, strict=True)):
            return None
        problem = self.known(cases, got, expected) or self.describe(cases, got, expected)
        return f"{problem}; you printed: {got[0].printed}" if got[0].printed else problem

    def known(self, cases: Sequence[Case], got: Sequence[Outcome], expected: Sequence[Outcome]) -> str | None:
        """The message of the mistake in the table that has the same outcomes, on every input or at least wherever the
        function gives something wrong."""
        wrong = [i for i, (g, e) in enumerate(zip(got, expected)) if not self.right(g, e)]
        table = []
        for mistake, message in self.mistakes:
            if self.alike(got[wrong[0]], self.known_outcome(mistake, cases[wrong[0]])):
                same = [self.alike(g, self.known_outcome(mistake, case)) for g, case in zip(got, cases)]
                if all(same):
                    return message
                made = [i for i in wrong if not got[i].error]  # an error at an edge may come on top
                if len(made) > 2 and all(same[i] for i in made):
                    table.append((sum(same), message))
        most, message = max(table, default=(0, None))
        return message if 4 * most >= 3 * len(cases) else None

    def right(self, got: Outcome, expected: Outcome) -> bool:
        if expected.error:
            return got.error is not None and expected.error.kind in got.error.parents
        return not got.error and not got.changed and not difference(got.value, expected.value, self.tolerance)

    def alike(self, got: Outcome, other: Outcome) -> bool:
        if got.error or other.error:
            return bool(got.error and other.error) and got.error[::2] == other.error[::2]
        return got.changed == other.changed and not difference(got.value, other.value, self.tolerance)

    def describe(self, cases: Sequence[Case], got: Sequence[Outcome], expected: Sequence[Outcome]) -> str:
        """Names a mistake that is not in the table."""
        wrong = [not self.right(g, e) for g, e in zip(got, expected)]
        case, g, e = next((c, g, e) for c, g, e, w in zip(cases, got, expected, wrong) if w)
        if g.error and "NotImplementedError" in g.error.parents or g.value is ...:
            return f"{self.name} is not written yet; the folded cell below has a hint"
        changed = next((o.changed for o in got if o.changed), None)
        if changed:
            return f"{self.name} changes its argument {changed} in place; make a new value instead"
        if not any(o.error or o.value is not None for o in got) and any(o.value is not None for o in expected):
            return f"{self.name} returns None; is the return missing?"
        where = "" if all(wrong) else self.where(cases, wrong)
        if g.error:
            at = f", at `{g.error.line}`" if g.error.line else ""
            return f"{where}{self.name} raised {g.error.kind}: {short(g.error.text)}{at}"
        if e.error:
            return f"{where}{self.name} returned {short(g.value)}, expected {e.error.kind}: {short(e.error.text)}"
        if isinstance(g.value, Iterator):  # as map and filter give one too
            listed = isinstance(e.value, (list, tuple))
            advice = "put list(...) around it" if listed else f"expected {type(e.value).__name__}"
            return f"{self.name} returns a generator; {advice}"
        if not varies(got) and varies(expected):
            return f"the result of {self.name} does not depend on its input"
        word = self.other_word(got, expected)
        return word or where + "; ".join(filter(None, (self.related(got, expected), self.shown(case, g, e))))

    def where(self, cases: Sequence[Case], wrong: Sequence[bool]) -> str:
        """The situation that holds wherever the function is wrong, and least often where it is right."""
        held = [[bool(condition(*self.pristine(case))) for case in cases] for condition, _ in self.situations]
        spared = [sum(h and not w for h, w in zip(holds, wrong)) if all(h for h, w in zip(holds, wrong) if w)
                  else len(cases) for holds in held]
        best = min(range(len(held)), key=spared.__getitem__, default=None)
        if best is None or spared[best] > (len(cases) - sum(wrong)) / 2:
            return ""
        return f"wrong where {self.situations[best][1]}: "

    def other_word(self, got: Sequence[Outcome], expected: Sequence[Outcome]) -> str | None:
        """A word that is none of the few that are asked for."""
        words = sorted({o.value for o in expected if isinstance(o.value, str)})
        given = next((o.value for o in got if isinstance(o.value, str) and o.value not in words), None)
        if given is None or len(words) > 8 or not all(isinstance(o.value, str) for o in expected):
            return None
        return f"{short(given)!r} is none of the answers that are asked for: {', '.join(map(repr, words))}"

    def related(self, got: Sequence[Outcome], expected: Sequence[Outcome]) -> str | None:
        """One relation between every result and the expected one."""
        values = [(g.value, e.value) for g, e in zip(got, expected)]
        if not all(is_number(v) or isinstance(v, torch.Tensor) for pair in values for v in pair):
            return None
        pairs = [(as_tensor(g), as_tensor(e)) for g, e in values]
        if any(g.dtype == torch.bool or g.is_floating_point() > e.is_floating_point() or
               (g.ndim and g.dtype != e.dtype) for g, e in pairs):
            return None
        whole = not any(e.is_floating_point() for _, e in pairs)
        found = relation(pairs, 0.0 if whole else self.tolerance)
        return found and f"the result is {found}"

    def shown(self, case: Case, g: Outcome, e: Outcome) -> str:
        arguments = self.pristine(case)
        inside = ", ".join(map(repr, arguments))
        what = f"{self.name}({inside})" if is_plain(arguments) and len(inside) <= 120 else "the result"
        return difference(g.value, e.value, self.tolerance, what) or "the result differs from one call to the next"


def varies(outcomes: Sequence[Outcome]) -> bool:
    return any(o.error or difference(o.value, outcomes[0].value, 0) for o in outcomes)
