"""The two grids: this run on all cards, and this card for all models and methods."""

from dataclasses import dataclass

from ..memory.cards import CARDS, Card
from ..memory.fitting import Verdict, judge
from ..tables import bytes_text
from .asked import Asked
from .html import Html, joined, size, span, table_of, tag, unseen
from .render import CLASS, MARK, address, mark


@dataclass(frozen=True)
class Cell:
    """One model by one method: the state that asks for it, and the verdict or why there is none."""

    state: tuple[tuple[str, str], ...]
    verdict: Verdict | None
    error: str


def cards(was: Asked) -> Html:
    """This run on every card, each a link that chooses it."""
    rows = []
    for card in CARDS.values():
        found, here = judge(was.bill, card), card == was.card
        state = tuple(sorted((dict(was.state) | {"card": card.name}).items()))
        name = tag("a", card.name, href=address(state), aria_current="true" if here else None)
        rows.append((name, mark(found.answer), span(*card.usable), size(found.margin)))
    return table_of(("card", unseen("verdict"), "usable", "left at worst"), rows, numbers=(3,), spare=(2,))


def models(card: Card, ways: tuple[str, ...], rows: list[tuple[str, list[Cell]]], of: int) -> Html:
    """Every model by every method on this card, each a link that asks for it."""
    body = [(name, *(cell_of(cell, name, method) for cell, method in zip(cells, ways))) for name, cells in rows]
    progress = "" if len(rows) == of else f": {len(rows)} of {of} models so far"
    return joined(tag("p", f"On {card.name}, all else as chosen{progress}. In a cell: what it may need at most.",
                      class_="quiet"),
                  table_of(("model", *ways), body, numbers=tuple(range(1, len(ways) + 1))))


def cell_of(cell: Cell, model: str, method: str) -> Html:
    if cell.verdict is None:
        return tag("span", "–", title=cell.error, class_="quiet")
    answer = cell.verdict.answer
    return tag("a", tag("span", MARK[answer], aria_hidden="true"), " ", bytes_text(cell.verdict.need[1]),
               href=address(cell.state), class_=f"mark {CLASS[answer]}", aria_label=(
                   f"{model}, {method}: {answer}, needs at most {bytes_text(cell.verdict.need[1])}"))
