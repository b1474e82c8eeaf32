"""States of the calculator's page, drawn at random, and what the command line says of them."""

import contextlib
import io
import json
import random

from minilora.cli import main
from minilora.memory.cards import CARDS
from minilora.memory.models import PRESETS
from minilora.memory.run import METHODS
from minilora.memory.stacks import STACKS
from minilora.page.options import options

RANKS, BATCHES, SEQUENCES = (1, 4, 8, 16, 64, 256), (1, 1, 1, 2, 3, 8), (16, 100, 512, 1024, 2048)


def random_states(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Different states over all presets, stacks and options; some make no sense, as people's do."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        serves = draw.random() < 0.15
        state = {"model": draw.choice(list(PRESETS))} | ({"serve": "yes"} if serves else {
            "method": draw.choice(METHODS), "stack": draw.choice(list(STACKS)), "seq": str(draw.choice(SEQUENCES)),
            "rank": str(draw.choice(RANKS))})
        state["batch"] = str(draw.choice(BATCHES))
        state |= {"targets": "all-linear"} if draw.random() < 0.7 else {}
        state |= {"card": draw.choice(list(CARDS))} if draw.random() < 0.7 else {}
        others = [o for o in options().values() if o.name not in (*state, "config", "family", "serve", "targets")
                  and o.only != ("training" if serves else "serving")]
        for option in draw.sample(others, draw.choice((0, 1, 1, 2, 3))):
            if option.kind == "flag":
                state[option.name] = draw.choice(("yes", "no"))
            elif option.choices:
                state[option.name] = draw.choice(option.choices)
            elif option.kind == "number":
                state[option.name] = str(draw.choice((1, 2, 4)))
            elif option.name == "dropout":
                state["dropout"] = draw.choice(("0.0", "0.05"))
        if state not in found:
            found.append(state)
    return found


def sample(states: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """`count` of the states, among which every family, stack, method and option comes up that comes up in all."""
    seen, new, others = set(), [], []
    for state in states:
        kinds = {*state, PRESETS[state["model"]].family, state.get("stack"), state.get("method")}
        (others if kinds <= seen else new).append(state)
        seen |= kinds
    assert len(new) <= count <= len(states)
    return [*new, *others][:count]


def words(state: dict[str, str]) -> list[str]:
    """A state as a person would type it."""
    typed = []
    for name, value in state.items():
        long, kind = name.replace("_", "-"), options()[name].kind
        typed += {"yes": [f"--{long}"], "no": [f"--no-{long}"]}[value] if kind in ("flag", "switch") else [
            f"--{long}", value]
    return typed


def command_line(typed: list[str]) -> dict | str:
    """What ``minilora memory ... --json`` prints, or the one line with which it refuses."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["memory", *typed, "--json"])
    assert (code, err.getvalue().count("\n")) in ((0, 0), (2, 1))
    return json.loads(out.getvalue()) if code == 0 else err.getvalue().rstrip("\n")
