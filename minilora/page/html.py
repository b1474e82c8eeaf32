"""HTML from Python: text is escaped unless it is HTML already."""

from html import escape

from ..tables import bytes_text

EMPTY = ("input", "link", "meta")  # without an end


class Html(str):
    """Text that is HTML, or SVG."""

    __slots__ = ()


def tag(element: str, /, *inside: object, **attributes: object) -> Html:
    """An element. In attributes' names `_` is `-`, at the end nothing (`class_`); None and False leave one out."""
    written = "".join(f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
                      for key, value in attributes.items() if value is not None and value is not False)
    return Html(f"<{element}{written}>" + ("" if element in EMPTY else f"{joined(*inside)}</{element}>"))


def joined(*parts: object) -> Html:
    """Parts one after another, what is no HTML escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(str(part), quote=False) for part in parts))


def size(count: int) -> Html:
    """A byte count for people; the bytes themselves when pointed at."""
    return tag("data", bytes_text(count), value=count, title=f"{count:,} bytes")


def span(low: int, high: int) -> Html:
    """A range; its unit once, where both have the same."""
    (first, unit), last = bytes_text(low).split(), bytes_text(high).split()[1]
    low_shown = tag("data", first, value=low, title=f"{low:,} bytes") if unit == last else size(low)
    return joined(low_shown, " to ", size(high))


def unseen(text: str) -> Html:
    """For those who listen alone."""
    return tag("span", text, class_="unseen")


def table_of(head: tuple, rows: list[tuple], numbers: tuple[int, ...] = (), spare: tuple[int, ...] = ()) -> Html:
    """A table whose first column heads its rows; `numbers`: columns that stand to the right; `spare`: that a narrow
    screen does without."""
    classes = [" ".join(["number"] * (i in numbers) + ["spare"] * (i in spare)) or None for i in range(len(head))]
    body = [tag("tr", *(tag("td" if i else "th", cell, class_=classes[i], scope=None if i else "row")
                        for i, cell in enumerate(row))) for row in rows]
    return tag("table", tag("thead", tag("tr", *(tag("th", cell, class_=c, scope="col")
                                                 for cell, c in zip(head, classes)))), tag("tbody", *body))
