"""Numbers as text: aligned tables and byte counts, and text in lines. Light, so that every room can use it."""

import textwrap


def table(head: tuple, rows: list[tuple]) -> str:
    """Rows under a head, columns aligned: numbers to the right, words to the left."""
    cells = [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in (head, *rows)]
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
    """Text in lines that a notebook's page holds, the second and later ones indented; JupyterLab breaks within words."""
    return textwrap.fill(text, 110, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
