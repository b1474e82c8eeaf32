"""One call of a learner's function, and what came of it."""

import io
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import torch


class Failure(NamedTuple):
    """An exception in words: its class, the classes above it, its text, and the learner's own line that raised it."""

    kind: str
    parents: tuple[str, ...]
    text: str
    line: str = ""


class Call(NamedTuple):
    """What came of one call: its value or its failure, the arguments as it left them, and what it printed."""

    value: Any = None
    failure: Failure | None = None
    after: tuple = ()
    printed: str = ""


def call(function: Callable, arguments: tuple, recorded: bool = True, listed: bool = False) -> Call:
    """Calls `function`; what it prints or warns is held back, and torch's random state is put back.

    Args:
        recorded: False turns autograd's recording off, as inside a backward.
        listed: a generator becomes the list of what it gives.
    """
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(recorded), \
            warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()) as out, \
            redirect_stderr(io.StringIO()):
        value = problem = None
        try:
            value = function(*arguments)
            if listed and isinstance(value, Iterator):
                value = list(value)
        except Exception as error:  # whatever the learner's code raises is for the learner to read
            problem = failure(error, function)
        return Call(value, problem, arguments, short(out.getvalue(), 200))


def failure(error: Exception, function: Callable | None = None) -> Failure:
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    lines = [frame.line for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file and frame.line]
    kinds = tuple(c.__name__ for c in type(error).__mro__)
    return Failure(kinds[0], kinds, short(error, 500), lines[-1] if lines else "")


def short(value: Any, limit: int = 120) -> str:
    """`value` on one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[:limit - 3] + "..."
