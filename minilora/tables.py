"""Numbers as text: aligned tables and byte counts, text in lines, and text of strangers made safe to print.

Light, so that every room can use it.
"""

import textwrap
from collections.abc import Sequence

MOST_IN_CELL, MOST_IN_LINE, MOST_QUOTED = 120, 600, 160  # characters of a stranger's text


def plain(text: object, most: int = MOST_IN_LINE) -> str:
    """Text as it may go to a terminal, in one line: what is no printable character (a line end, an escape code, a mark
    that turns the direction of reading) as Python writes it, such as ``\\x1b``; dots for the middle of a long text."""
    text = str(text)
    if len(text) > most:  # before the escapes, so that no work is done on megabytes
        text = f"{text[:most * 2 // 3]} ... {text[-most // 3:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(value: object, most: int = MOST_QUOTED) -> str:
    """A value from a file as Python writes it, for an error: escaped, and cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits, lists of a thousand depths
        text = f"a {type(value).__name__} too large to be shown"
    return plain(text, most)


def table(head: tuple, rows: Sequence[tuple]) -> str:
    """Rows under a head, columns aligned: numbers to the right, words to the left."""
    cells = [[f"{c:,}" if isinstance(c, int) else plain(c, MOST_IN_CELL) for c in row] for row in (head, *rows)]
    right = [rows and isinstance(rows[0][i], int) for i in range(len(head))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def bytes_text(count: int) -> str:
    """A byte count in the unit that suits it, binary: 1536 -> "1.50 KiB"."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count:,} B" if unit == "B" else f"{size:,.2f} {unit}"


def wrapped(text: str, indent: int = 0) -> str:
    """Text in lines that a notebook's page holds, later ones indented; JupyterLab breaks within words."""
    return textwrap.fill(text, 110, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
