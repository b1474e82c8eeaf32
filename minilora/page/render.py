"""An answer as HTML: the verdict, the parts, the moment, what to change, the items."""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from ..memory.bill import BASES, PARTS, Bill
from ..memory.cards import CARDS
from ..memory.fitting import CLOSE, FITS, FRAGMENTATION, NOT, judge, need
from ..tables import bytes_text
from .asked import Asked
from .html import Html, joined, size, span, table_of, tag, unseen

CLASS = {FITS: "fits", CLOSE: "close", NOT: "not"}
MARK = {FITS: "✓", CLOSE: "≈", NOT: "✕"}
SENTENCE = {FITS: "It fits.", CLOSE: "Too close to call.", NOT: "It does not fit."}
HELD = 6  # items shown beside the moment of the peak
WEIGHTS = ("frozen weights", "trainable weights")


@dataclass(frozen=True)
class Tried:
    """A change of the run: what it saves, whether the run then fits, and the state that asks for it."""

    what: str
    saves: int
    answer: str
    state: tuple[tuple[str, str], ...]


def address(state: tuple[tuple[str, str], ...]) -> str:
    """A state as the page's address has it."""
    return "#" + urlencode(state)


def mark(answer: str) -> Html:
    """A verdict in a cell: a sign and its words, so that colour is never alone."""
    return tag("span", tag("span", MARK[answer], aria_hidden="true"), f" {answer}", class_=f"mark {CLASS[answer]}")


def place(was: Asked) -> str:
    cards = getattr(was.run, "cards", 1)
    return (f"each of {cards} × " if cards > 1 else "") + (was.card.name if was.card else "")


def title(was: Asked) -> str:
    """Of the window."""
    verdict = was.verdict
    return f"{verdict.answer if verdict else bytes_text(was.bill.peak)}: {was.spec.name}" + (
        f" on {was.card.name}" if was.card else "")


def said(was: Asked) -> str:
    """The answer in a sentence, to be read aloud."""
    low, high = need(was.bill)
    if (verdict := was.verdict) is None:
        return f"{was.spec.name} needs {bytes_text(low)} to {bytes_text(high)}. {how_many(was.bill)}"
    return (f"{SENTENCE[verdict.answer]} {was.spec.name} needs {bytes_text(low)} to {bytes_text(high)} of "
            f"{bytes_text(verdict.usable[0])} to {bytes_text(verdict.usable[1])} on {place(was)}.")


def how_many(bill: Bill) -> str:
    fitting = [card for card in CARDS.values() if judge(bill, card).answer == FITS]
    if not fitting:
        return "No single card of those we know has room for it."
    smallest = min(fitting, key=lambda card: card.usable[0])
    return f"It fits {len(fitting)} of {len(CARDS)} cards; the smallest is {smallest.name}."


def verdict(was: Asked) -> Html:
    """Whether it fits, what it needs of what there is, and what is taken for granted."""
    found, needed = was.verdict, need(was.bill)
    if found is None:
        first = tag("p", how_many(was.bill), class_="verdict")
        second = tag("p", "Needs ", tag("strong", span(*needed)), ".")
    else:
        answer = found.answer
        left = f"{bytes_text(abs(found.margin))} " + ("to spare at worst" if found.margin >= 0 else "short at worst")
        first = tag("p", tag("span", MARK[answer], class_="sign", aria_hidden="true"), " ", SENTENCE[answer],
                    class_=f"verdict {CLASS[answer]}")
        second = tag("p", "Needs ", tag("strong", span(*needed)), " of the ", tag("strong", span(*found.usable)),
                     f" that a run can use on {place(was)}: {left}.")
        if found.bus_seconds:
            second += tag("p", f"A step takes at least {found.bus_seconds:.2f} s on the bus and "
                               f"{found.compute_seconds:.2f} s of computing beside it.")
    why = tag("details", tag("summary", "Why a range?"), tag("p", (
        f"The lower figure is what the step's tensors hold at their fullest moment, {was.bill.peak:,} bytes. The upper "
        f"one allows for gaps between the allocator's blocks (up to {FRAGMENTATION:g} times) and the kernels' scratch. "
        "A card's usable memory is a range too: drivers report less than the name says, and CUDA takes some.")))
    return joined(first, second, tag("p", "Taken for granted: ", was.run.assumptions(), ".", class_="quiet"), why)


def parts(bill: Bill) -> Html:
    """The legend of the bar: every part, what it takes and its share."""
    rows = [(joined(swatch(part), part), size(count), f"{count / bill.peak:.1%}") for part, count in bill.parts.items()]
    rows.append((tag("strong", "at the peak"), tag("strong", size(bill.peak)), "100.0%"))
    more = [tag("p", what, ": ", size(count), " a step", class_="quiet") for what, count in bill.moved.items()]
    more += [tag("p", f"on the {where}: ", size(count), class_="quiet") for where in BASES[1:]
             if (count := bill.elsewhere(where))]
    return joined(table_of(("part", "memory", "share"), rows, numbers=(1, 2)), *more)


def swatch(part: str) -> Html:
    return tag("span", class_=f"swatch p{PARTS.index(part)}", aria_hidden="true")


def moment(bill: Bill) -> Html:
    """When most is held, and by what, weights that stay aside."""
    weights = sum(count for part, count in bill.parts.items() if part in WEIGHTS)
    largest = sorted((row for row in bill.rows if row.part not in WEIGHTS), key=lambda row: -row.bytes)[:HELD]
    return joined(tag("p", "Most is held at: ", tag("strong", bill.moment), ". The weights have ", size(weights),
                      " of it; the largest of the rest:"),
                  tag("ul", *(tag("li", swatch(row.part), size(row.bytes), f" {row.name} ",
                                  tag("span", row.part, class_="quiet")) for row in largest)))


def changes(was: Asked, found: list[Tried]) -> Html:
    """What makes the peak smaller, the most first, each with a link that applies it."""
    if not found:
        return tag("p", "No single change that we know of makes it smaller.", class_="quiet")
    head = ("change", "saves", *(["then"] if was.card else []), unseen("apply"))
    rows = [(change.what, size(change.saves), *([mark(change.answer)] if was.card else []),
             tag("a", "apply", class_="button", href=address(change.state), aria_label=f"apply: {change.what}"))
            for change in found]
    return table_of(head, rows, numbers=(1,))


def no_changes() -> Html:
    return tag("p", "Changes are worked out for training.", class_="quiet")


def items(bill: Bill, formulas: Mapping[tuple[str, str], str] | None = None) -> Html:
    """Every item held at the peak, the largest first; formulas, where they are there already."""
    rows = [(joined(swatch(row.part), row.name), row.part, f"{row.count:,}", size(row.bytes), f"{row.bytes:,}",
             tag("code", formulas[row.part, row.name]) if formulas else "…")
            for row in sorted(bill.rows, key=lambda row: -row.bytes)]
    return table_of(("item", "part", "storages", "memory", "bytes", "bytes, as a formula"), rows, numbers=(2, 3, 4))
