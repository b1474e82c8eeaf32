"""The parts of an answer: first the bill, then what takes longer, each by itself and each asked for when it is seen."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ..memory.bill import timeline
from ..memory.cards import CARDS, Card
from ..memory.fitting import CHANGES, judge, priced
from ..memory.models import PRESETS, ModelSpec
from ..memory.run import METHODS, Serving, Training
from . import charts, grids, render
from .asked import Asked, as_json, asked, command_of, effective, state_of

Reply = dict[str, Any]


def bill(was: Asked, budget: float) -> Reply:
    """The answer itself, with what of the rest is cheap."""
    html = {"verdict": render.verdict(was), "parts": charts.bar(was.bill, was.verdict) + render.parts(was.bill),
            "moment": render.moment(was.bill), "items": render.items(was.bill),
            "cards": grids.cards(was)}
    return {"html": html, "command": command_of(was.words), "effective": effective(was), "json": as_json(was),
            "title": render.title(was), "said": render.said(was)}


def changes(was: Asked, budget: float) -> Reply:
    """What makes the peak smaller, the most first."""
    if isinstance(was.run, Serving):
        return {"html": {"changes": render.no_changes()}}
    end, found = time.monotonic() + budget, []
    for what in CHANGES:
        if time.monotonic() > end:
            return {"again": True}
        found += [change] if (change := tried(was, what)) else []
    found.sort(key=lambda change: -change.saves)
    return {"html": {"changes": render.changes(was, found)}}


@lru_cache(maxsize=1024)
def tried(was: Asked, what: str) -> render.Tried | None:
    """A change of the run and the state that applies it; None where it saves nothing or does not go with the run."""
    run = was.run
    try:
        changed = replace(run, **CHANGES[what](run))  # pyright: ignore[reportArgumentType]
        then = priced(was.spec, changed)  # pyright: ignore[reportArgumentType]
    except ValueError:
        return None
    if then.peak >= was.bill.peak:
        return None
    state = state_of(was, changed)  # pyright: ignore[reportArgumentType]
    answer = judge(then, was.card).answer if was.card else ""
    return render.Tried(what, was.bill.peak - then.peak, answer, tuple(sorted(state.items())))


def curve(was: Asked, budget: float) -> Reply:
    """What is held at each moment of a step."""
    if isinstance(was.run, Serving):
        return {"html": {"curve": ""}}
    return {"html": {"curve": charts.curve(moments(was.spec, was.run), was.verdict)}}


@lru_cache(maxsize=8)
def moments(spec: ModelSpec, run: Training) -> list[tuple[int, str]]:
    return timeline(spec, run)


def items(was: Asked, budget: float) -> Reply:
    """Every item with its formula."""
    from ..memory.formulas import formulas  # when it is asked for: fractions and decimal take a browser a while

    return {"html": {"items": render.items(was.bill, formulas(was.spec, was.run))}}


def models(was: Asked, budget: float) -> Reply:
    """This card for all models and methods, as many as the time allows."""
    card, end, rows = was.card or CARDS["rtx-4090"], time.monotonic() + budget, []
    ways = METHODS if isinstance(was.run, Training) else ("16 bits", "4 bits")
    for name in PRESETS:
        if rows and time.monotonic() > end:
            break
        rows.append((name, [cell(was, name, method, card) for method in ways]))
    done = len(rows) == len(PRESETS)
    reply: Reply = {"html": {"models": grids.models(card, ways, rows, len(PRESETS))}}
    return reply if done else reply | {"again": True}


@lru_cache(maxsize=4096)
def cell(was: Asked, model: str, method: str, card: Card) -> grids.Cell:
    """Another model by another method in this run's way."""
    state = {name: text for name, text in was.state if name not in ("config", "family", "method", "four_bit")}
    state |= {"model": model, "card": card.name}
    state |= {"method": method} if isinstance(was.run, Training) else {"four_bit": "yes"} if method == "4 bits" else {}
    key = tuple(sorted(state.items()))
    try:
        there = asked(key)
        return grids.Cell(key, there.verdict, "")
    except ValueError as error:
        return grids.Cell(key, None, str(error))


PARTS: dict[str, Callable[[Asked, float], Reply]] = {"bill": bill, "changes": changes, "curve": curve, "items": items,
                                                     "models": models}
