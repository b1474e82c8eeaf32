"""Figures: each is shown with the sentence that says what it shows, computed from the same arrays.

Read in greyscale as well as in colour: series differ in shade, dash and marker; bars differ in shade and hatch.
"""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

SHADES = ("#111111", "#d1495b", "#30638e", "#9a8c2c", "#7d7d7d", "#b5b5b5")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "x")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "++", "--")

matplotlib.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                        "grid.alpha": 0.3, "legend.frameon": False, "lines.markersize": 5}


def show(fig: Figure, sentence: str) -> None:
    """Show the figure in a notebook, with `sentence` as its alternative text, and print the sentence."""
    from IPython.display import Image, display  # only a notebook needs it

    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=90, bbox_inches="tight")
    display(Image(png.getvalue(), alt=sentence))
    print(sentence)


def canvas(title: str, xlabel: str = "", ylabel: str = "", width: float = 6.4, height: float = 3.6):
    """A figure with one pair of axes, labelled."""
    fig = Figure(figsize=(width, height))
    axes = fig.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel)
    return fig, axes


def lines(x: Sequence, series: Mapping[str, Sequence], *, title: str, xlabel: str, ylabel: str, logx: bool = False,
          logy: bool = False, dots: Sequence[str] = (), limit: tuple[str, float] | None = None) -> Figure:
    """Curves over a common x.

    Args:
        x: values along x, or a dict of label -> x where the series differ.
        series: label -> values; those named in `dots` are drawn as markers without a line.
        logx, logy: logarithmic axes; x is then marked at its own values.
        limit: (label, value) of a horizontal line.
    """
    fig, axes = canvas(title, xlabel, ylabel)
    for i, (label, y) in enumerate(series.items()):
        here = x[label] if isinstance(x, Mapping) else x
        axes.plot(here, y, label=label, color=SHADES[i % 6], linestyle="none" if label in dots else DASHES[i % 6],
                  marker=MARKERS[i % 6] if len(here) <= 40 else "")
    if limit:
        axes.axhline(limit[1], color="#7d7d7d", linewidth=1, linestyle=":", label=limit[0])
    if logx:
        axes.set_xscale("log", base=2)
        ticks = sorted({v for xs in (x.values() if isinstance(x, Mapping) else [x]) for v in xs})
        axes.set_xticks(ticks, [f"{v:g}" for v in ticks], minor=False)
    if logy:
        axes.set_yscale("log")
    if len(series) > 1 or limit:
        axes.legend()
    return fig


def bars(groups: Sequence[str], series: Mapping[str, Sequence], *, title: str, ylabel: str, xlabel: str = "",
         stacked: bool = False, logy: bool = False, dots: tuple[str, Sequence] | None = None,
         width: float = 6.4) -> Figure:
    """Bars over named groups, side by side or stacked.

    Args:
        dots: (label, values) to mark on top, one a group: what was measured beside what was computed. NaN marks none.
        width: of the figure, in inches.
    """
    fig, axes = canvas(title, xlabel, ylabel, width)
    at, low = np.arange(len(groups)), np.zeros(len(groups))
    wide = 0.7 if stacked else 0.8 / len(series)
    for i, (label, y) in enumerate(series.items()):
        y = np.asarray(y, dtype=float)
        where = at if stacked else at + (i - (len(series) - 1) / 2) * wide
        axes.bar(where, y, wide, bottom=low if stacked else None, label=label, color=SHADES[i % 6], alpha=0.75,
                 hatch=HATCHES[i % 8], edgecolor="white")
        low = low + y if stacked else low
    if dots:
        axes.plot(at, dots[1], "o", color="white", markeredgecolor="black", markersize=9, label=dots[0])
    if logy:
        axes.set_yscale("log")
    axes.set_xticks(at, groups)
    axes.grid(axis="x", visible=False)
    if len(series) > 1 or dots:
        axes.legend()
    return fig


def grid(values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], *, title: str, xlabel: str,
         ylabel: str, unit: str, form: str = "{:.0f}") -> Figure:
    """A table of numbers as shaded cells, each with its number written in it."""
    values = np.asarray(values, dtype=float)
    fig, axes = canvas(title, xlabel, ylabel, width=1.8 + 0.75 * len(columns), height=1.4 + 0.38 * len(rows))
    image = axes.imshow(values, cmap="Greys", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for i, row in enumerate(values):
        for j, v in enumerate(row):
            axes.text(j, i, form.format(v), ha="center", va="center", color="white" if v > middle else "black")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)
    fig.colorbar(image, label=unit)
    return fig
