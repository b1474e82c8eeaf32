"""A sheet to draw an idea on: boxes, arrows and words, in one look for light and dark pages.

The page shows through. What stands on it is of a grey that reads on white as well as on black; all other words stand
on boxes of their own colour. Frozen and trained things differ in colour, in border and in what is written on them.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK = "#7a7a7a"  # on white and on black: a contrast of 4.3 and 4.9
KINDS = {  # fill, words, border, line of the border
    "frozen": ("#2f5d85", "#ffffff", "#173450", "-"),
    "trains": ("#c8425a", "#ffffff", "#7d1f31", "--"),
    "data": ("#efe7cf", "#222222", "#9a8c2c", "-"),
    "quiet": ("#c9c9c9", "#222222", "#8a8a8a", "-"),
    "held": ("#e8b04a", "#222222", "#7d5a10", "-"),
}


class Sheet:
    """`width` x `height` units of about half an inch; (0, 0) is at the lower left. Widths of boxes are in units."""

    def __init__(self, width: float, height: float, scale: float = 0.5):
        self.fig = Figure(figsize=(width * scale, height * scale))
        self.fig.patch.set_alpha(0)
        self.axes = self.fig.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axes.axis("off")

    def box(self, x: float, y: float, width: float, height: float, words: str = "", kind: str = "quiet",
            size: float = 9) -> None:
        fill, ink, border, dash = KINDS[kind]
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08",
                                           facecolor=fill, edgecolor=border, linestyle=dash, linewidth=1.4))
        self.axes.text(x + width / 2, y + height / 2, words, color=ink, ha="center", va="center", fontsize=size)

    def words(self, x: float, y: float, words: str, size: float = 9, ha: str = "center", bold: bool = False) -> None:
        self.axes.text(x, y, words, color=INK, ha=ha, va="center", fontsize=size, weight="bold" if bold else "normal")

    def arrow(self, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, dashed: bool = False,
              color: str = INK) -> None:
        self.axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color, shrinkA=1,
                                            shrinkB=1, linewidth=1.5, zorder=3, linestyle="--" if dashed else "-",
                                            connectionstyle=f"arc3,rad={bend}"))

    def line(self, points: Sequence[tuple[float, float]], dashed: bool = False) -> None:
        self.axes.plot(*zip(*points), color=INK, linewidth=1.5, linestyle="--" if dashed else "-")

    def plus(self, x: float, y: float, sign: str = "+") -> None:
        self.axes.text(x, y, sign, color="#222222", ha="center", va="center", fontsize=13, weight="bold",
                       bbox={"boxstyle": "circle,pad=0.15", "facecolor": "#efe7cf", "edgecolor": "#9a8c2c"})

    def matrix(self, x: float, y: float, values: Sequence[Sequence], kind: str, name: str = "",
               cell: float = 0.8) -> None:
        """A matrix of numbers, its upper left corner at (x, y), its name above it."""
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                self.box(x + j * cell, y - (i + 1) * cell, cell * 0.94, cell * 0.94, f"{value}", kind)
        if name:
            self.words(x + len(values[0]) * cell / 2, y + 0.3, name, bold=True)
