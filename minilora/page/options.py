"""What the page can ask: the options of ``minilora memory``, read off its parser, and a filled form as its words."""

import inspect
import re
from argparse import SUPPRESS, BooleanOptionalAction
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache

from ..memory.cards import CARDS
from ..memory.cli import SET_BY_STACKS, add_memory_options
from ..memory.config_file import suggest
from ..memory.models import FAMILIES
from ..memory.run import KNOWN, Serving, Training
from ..refusals import Parser

State = Mapping[str, str]  # an option's name, as the parser has it, and what was typed; a flag is "yes" or "no"
CONFIG = "config.json"  # what a pasted one is called
LEFT_OUT = ("help", "json")
FIELDS = {"targets": "target_modules"}  # options that are not called as the field that they fill
# What stands in the form first, in this order; the rest is folded away.
FIRST = ("model", "config", "card", "cards", "zero", "method", "rank", "targets", "batch", "seq", "stack", "serve")


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        kind: "flag" (yes or no), "switch" (yes or not there), "choice", "number" or "text".
        only: "training" or "serving" where it goes with that alone, else "".
        about: what it means, for people. by_stack: it is as the stack has it if nothing is said.
    """

    name: str
    kind: str
    choices: tuple[str, ...] = ()
    only: str = ""
    about: str = ""
    by_stack: bool = False

    @property
    def field(self) -> str:
        return FIELDS.get(self.name, self.name)


@cache
def parser() -> Parser:
    made = Parser(prog="minilora memory")
    add_memory_options(made)
    return made


@cache
def options() -> dict[str, Option]:
    """Name -> option: those that stand first, then the rest as the command line has them."""
    told = abouts(Serving) | abouts(Training)
    found = {}
    for action in parser()._actions:
        if action.dest in LEFT_OUT or action.help == SUPPRESS:  # the latter are there to be refused with a reason
            continue
        field = FIELDS.get(action.dest, action.dest)
        flag, switch = isinstance(action, BooleanOptionalAction), action.nargs == 0
        choices = {"card": CARDS, "family": FAMILIES}.get(action.dest) or KNOWN.get(field, ())
        kind = "flag" if flag else "switch" if switch else "choice" if choices else (
            "number" if action.type is int else "text")
        trains, serves = (field in kind_of.__dataclass_fields__ for kind_of in (Training, Serving))
        only = "training" if trains and not serves else "serving" if serves and not trains else ""
        found[action.dest] = Option(action.dest, kind, tuple(map(str, choices)), only,
                                    told.get(field) or str(action.help or ""), field in SET_BY_STACKS)
    return {name: found[name] for name in (*FIRST, *(name for name in found if name not in FIRST))}


def abouts(kind: type) -> dict[str, str]:
    """Field -> what the docstring of its dataclass says of it."""
    names = {field.name for field in fields(kind)}
    _, _, arguments = inspect.cleandoc(kind.__doc__ or "").partition("Args:\n")
    lines = [" ".join(entry.split()) for entry in re.split(r"\n {4}(?=\w)", "\n" + arguments.partition("\n\n")[0])]
    found = {}
    for line in lines:
        for entry in re.split(r"(?<=\.) (?=\w+: )", line):
            heads, _, text = entry.partition(": ")
            found |= {head: text for head in heads.split(", ") if head in names}
    return found


def words_of(state: State) -> list[str]:
    """A filled form as the words after ``minilora memory``.

    Raises:
        ValueError: an option that there is not, or a flag that is neither yes nor no.
    """
    words = []
    for name in sorted(state, key=lambda name: list(options()).index(name) if name in options() else 0):
        if name not in options():
            raise ValueError(f"no option {name!r}; {suggest(name, options())}")
        option, value = options()[name], state[name]
        long = "--" + name.replace("_", "-")
        if option.kind in ("flag", "switch"):
            if value not in ("yes", "no"):
                raise ValueError(f"{name} must be yes or no, got {value!r}")
            words += [long] * (value == "yes") + ["--no-" + long[2:]] * (value == "no" and option.kind == "flag")
        else:
            value = CONFIG if name == "config" else value
            words += [f"{long}={value}"] if value.startswith("-") else [long, value]
    return words
