"""What is asked: a state of the form, understood as the command line understands its words."""

import shlex
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from ..memory.bill import Bill
from ..memory.cards import Card
from ..memory.cli import SET_BY_STACKS, as_dict, run_of, shape_of, stored_as
from ..memory.config_file import check_size, parsed
from ..memory.fitting import Verdict, judge, priced
from ..memory.models import ModelSpec, NotPriced
from ..memory.run import Serving, Training
from .options import CONFIG, FIELDS, State, options, parser, words_of

# What the page shows first: a model of today on a card that many have.
START = {"model": "qwen3-8b", "card": "rtx-4090", "method": "qlora", "rank": "16", "targets": "all-linear",
         "batch": "1", "seq": "2048", "stack": "trl"}


@dataclass(frozen=True)
class Asked:
    """A state that makes sense: the words of the command line, and what they mean."""

    state: tuple[tuple[str, str], ...]
    words: tuple[str, ...]
    spec: ModelSpec
    run: Training | Serving
    card: Card | None

    @property
    def bill(self) -> Bill:
        return priced(self.spec, self.run)  # pyright: ignore[reportArgumentType]

    @property
    def verdict(self) -> Verdict | None:
        return judge(self.bill, self.card) if self.card else None


@lru_cache(maxsize=64)
def asked(state: tuple[tuple[str, str], ...]) -> Asked:
    """What a state means.

    Raises:
        ValueError: as the command line has it.
    """
    filled = dict(state)
    words = words_of(filled)
    given = parser().parse_args(words)
    if "config" in filled:
        text = filled["config"].encode(errors="surrogatepass")
        check_size(len(text), CONFIG)
        spec = shape_of_config(parsed(text, CONFIG), given.family)
    else:
        spec = shape_of(given)
        assert isinstance(spec, ModelSpec)  # as every known model's is
    run = run_of(given, Serving if given.serve else Training, stored_as(spec))
    run.check(spec)
    return Asked(state, tuple(words), spec, run, None if given.card is None else Card.of(given.card))


def shape_of_config(config: dict, family: str | None) -> ModelSpec:
    try:
        return ModelSpec.from_config(config, family, CONFIG)
    except NotPriced as error:  # following its own code takes PyTorch, which no browser has
        raise ValueError(f"{error}; the command line answers for it: minilora memory --config FOLDER") from None


def state_of(was: Asked, run: Training) -> dict[str, str]:
    """The state that asks for this run instead, all else as it was.

    A stack brings settings with it, by method, so with another stack or method those are said that it would set
    otherwise.
    """
    state = dict(was.state)
    for field in fields(run):
        if getattr(run, field.name) != getattr(was.run, field.name):
            state = with_value(state, field.name, getattr(run, field.name))
    if (run.stack, run.method) == (was.run.stack, was.run.method):
        return state
    for name in SET_BY_STACKS:
        state = with_value(state, name, getattr(run, name))
    for name in sorted(SET_BY_STACKS - dict(was.state).keys()):
        if means(without := {key: text for key, text in state.items() if key != name}, was.spec) == run:
            state = without
    return state


def means(state: State, spec: ModelSpec) -> Training | None:
    """The run that a state asks for, None if it makes no sense."""
    try:
        return run_of(parser().parse_args(words_of(state)), Training, stored_as(spec))
    except ValueError:
        return None


def with_value(state: State, field: str, value: object) -> dict[str, str]:
    """The state with a field of the run as it should be."""
    name = next((option for option, of in FIELDS.items() if of == field), field)
    kept = {key: text for key, text in state.items() if key != name}
    if value is None:
        return kept
    if isinstance(value, bool):
        return kept | {name: "yes" if value else "no"}
    return kept | {name: ",".join(value) if isinstance(value, tuple) else str(value)}


def command_of(words: tuple[str, ...]) -> str:
    return shlex.join(["minilora", "memory", *words])


def effective(was: Asked) -> dict[str, str]:
    """What holds for each option that nothing was typed for."""
    run, found = was.run, {}
    for name, option in options().items():
        value = getattr(run, option.field, None)
        if option.field in run.__dataclass_fields__ and value is not None:
            found[name] = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    if isinstance(run, Training) and run.target_modules is None:
        found["targets"] = ",".join(was.spec.layout.targets)
    return found


def as_json(was: Asked) -> dict[str, Any]:
    return as_dict(was.run, was.bill, *[was.verdict] * bool(was.verdict))
