"""Predictions: a choice or a number that the learner commits to before the run, and what is behind a wrong one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..tables import wrapped
from .compare import is_number, short
from .exercise import CheckFailed


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
