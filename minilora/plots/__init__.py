"""Figures: each is shown with the sentence that says what it shows, computed from the same arrays.

Read in greyscale as well as in colour: series differ in shade, dash and marker; bars differ in shade and hatch.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation

from ..tables import wrapped

if TYPE_CHECKING:
    from ..memory.bill import Bill
    from ..memory.fitting import Verdict

SHADES = ("#111111", "#d1495b", "#30638e", "#9a8c2c", "#7d7d7d", "#8e44ad")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 2)))
MARKERS = ("o", "s", "^", "D", "v", "x")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "++", "--")

STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
              "grid.alpha": 0.3,
              "legend.frameon": False, "lines.markersize": 5}


def styled(draw: Callable) -> Callable:
    """The function, under our style: matplotlib's own settings are the user's, and stay as they are."""

    @wraps(draw)
    def drawn(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


@styled
def show(fig: Figure, sentence: str) -> None:
    """Show the figure in a notebook, with `sentence` as its alternative text, and print the sentence."""
    from IPython.display import Image, display  # only a notebook needs it

    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=90, bbox_inches="tight")
    display(Image(png.getvalue(), alt=sentence))
    print(wrapped(sentence))


def canvas(title: str, xlabel: str = "", ylabel: str = "", width: float = 6.4, height: float = 3.6):
    """A figure with one pair of axes, labelled."""
    fig = Figure(figsize=(width, height))
    axes = fig.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel)
    return fig, axes


@styled
def lines(x: Sequence | Mapping[str, Sequence], series: Mapping[str, Sequence], *, title: str, xlabel: str, ylabel: str,
          logx: bool = False, logy: bool = False, dots: Sequence[str] = (), limit: tuple[str, float] | None = None,
          bands: Mapping[str, tuple[Sequence, Sequence]] = {}) -> Figure:
    """Curves over a common x.

    Args:
        x: values along x, or a dict of label -> x where the series differ.
        series: label -> values; those named in `dots` are drawn as hollow markers without a line, so
            that a curve under them can be seen.
        logx, logy: logarithmic axes; x is then marked at its own values.
        limit: (label, value) of a horizontal line.
        bands: label -> (low, high), shaded around the curve: the least and the most of several seeds.
    """
    fig, axes = canvas(title, xlabel, ylabel)
    for i, (label, y) in enumerate(series.items()):
        here = x[label] if isinstance(x, Mapping) else x
        around: Any = {"linestyle": "none", "markerfacecolor": "none", "markersize": 9} if label in dots else {}
        axes.plot(here, y, label=label, color=SHADES[i % 6], **({"linestyle": DASHES[i % 6]} | around),
                  marker=MARKERS[i % 6] if len(here) <= 40 else "")
        if label in bands:
            axes.fill_between(here, *bands[label], color=SHADES[i % 6], alpha=0.2, linewidth=0)
    if limit:
        axes.axhline(limit[1], color="#7d7d7d", linewidth=1, linestyle=":", label=limit[0])
    if logx:
        axes.set_xscale("log", base=2)
        ticks = sorted({v for xs in (x.values() if isinstance(x, Mapping) else [x]) for v in xs})
        axes.set_xticks(ticks, [f"{v:g}" for v in ticks], minor=False)
    if logy:
        logarithmic(axes)
    if len(series) > 1 or limit:
        axes.legend()
    return fig


def logarithmic(axes) -> None:
    """Count y in powers, written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PlainLog())
    axes.yaxis.set_minor_formatter(PlainLog())


class PlainLog(LogFormatterSciNotation):
    """0.02 in place of 2 x 10^-2, at the ticks that matplotlib would label."""

    def __call__(self, x, pos=None):
        label = super().__call__(x, pos)
        return f"{x:g}" if label and 1e-4 <= x < 1e6 else label


@styled
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
        logarithmic(axes)
    axes.set_xticks(at, groups)
    axes.grid(axis="x", visible=False)
    if len(series) > 1 or dots:
        axes.legend()
    return fig


@styled
def grid(values: Sequence[Sequence[float]] | np.ndarray, rows: Sequence[str], columns: Sequence[str], *,
         title: str, xlabel: str,
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


# ---------------------------------------------------------------- memory: each returns the figure and its sentence

GIB = 2**30


@styled
def bills(bills: Mapping[str, "Bill"], *, title: str = "What a training step holds at its peak",
          limit: tuple[str, float] | None = None) -> tuple[Figure, str]:
    """Bills (`memory.estimate`) as stacked bars, part by part. `limit`: (label, bytes) of a line, say a card's size."""
    shares = [(part, size / bill.peak) for bill in bills.values() for part, size in bill.parts.items()]
    parts = list(dict.fromkeys(part for part, share in shares if share > 0.001))  # what can be seen
    series = {part: [bill.parts.get(part, 0) / GIB for bill in bills.values()] for part in parts}
    fig = bars(list(bills), series, title=title, ylabel="GiB", stacked=True, width=max(6.4, 1.2 * len(bills)))
    axes = fig.axes[0]
    if limit:
        axes.axhline(limit[1] / GIB, color="#111111", linewidth=1, linestyle=":", label=limit[0])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig, "; ".join(f"{name}: {bill.peak / GIB:.1f} GiB, most of it {max(bill.parts, key=bill.parts.__getitem__)}"
                          for name, bill in bills.items())


@styled
def timeline(points: Sequence[tuple[int, str]], *, title: str = "Bytes held, operator by operator",
             limit: tuple[str, float] | None = None) -> tuple[Figure, str]:
    """The live bytes of one step, from (bytes, phase) of each moment: `memory.bill.timeline`, or a trace's."""
    size, phases = np.array([p[0] for p in points]) / GIB, [p[1] for p in points]
    fig, axes = canvas(title, "moment", "GiB", width=8)
    starts = np.arange(0, len(size), max(1, len(size) // 600))  # more than the eye can part: the largest of each run
    tops, there = np.maximum.reduceat(size, starts), [phases[i] for i in starts]
    for i, phase in enumerate(dict.fromkeys(phases)):
        here = np.array([p == phase for p in there])
        axes.fill_between(starts, np.where(here, tops, np.nan), step="post", label=phase if here.any() else None,
                          color=SHADES[i % 6], alpha=0.6, hatch=HATCHES[i % 8], linewidth=0)
    axes.step(starts, tops, where="post", color="#111111", linewidth=0.5)
    if limit:
        axes.axhline(limit[1] / GIB, color="#111111", linewidth=1, linestyle=":", label=limit[0])
    at = int(size.argmax())
    axes.plot(at, size[at], "o", color="white", markeredgecolor="black", label="peak")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig, f"the peak of {size[at]:.2f} GiB falls in the {phases[at]}, at moment {at:,} of {len(size):,}"


@styled
def fit_grid(verdicts: Mapping[str, Mapping[str, "Verdict"]], *, title: str,
             xlabel: str = "", ylabel: str = "") -> tuple[Figure, str]:
    """row -> column -> `memory.fitting.judge`'s verdict, as cells that say what is needed (GiB); light is what fits."""
    rows, columns = list(verdicts), list(next(iter(verdicts.values())))
    shade = {"fits": 0.0, "too close to call": 0.35, "does not fit": 0.7}
    values = np.array([[shade[verdicts[row][column].answer] for column in columns] for row in rows])
    fig, axes = canvas(title, xlabel, ylabel, width=2.4 + 1.1 * len(columns), height=1.4 + 0.38 * len(rows))
    axes.imshow(values, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            mark = {"fits": "fits", "too close to call": "close", "does not fit": "no"}[verdicts[row][column].answer]
            axes.text(j, i, f"{verdicts[row][column].need[0] / GIB:,.1f}\n{mark}", ha="center", va="center", fontsize=9,
                      color="white" if values[i, j] > 0.5 else "black")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)
    count = {answer: int((values == s).sum()) for answer, s in shade.items()}
    return fig, ", ".join(f"{n} of {values.size} {answer}" for answer, n in count.items())


@styled
def levels(values: Sequence[float] | np.ndarray, kinds: Mapping[str, Sequence[float]], *, title: str, xlabel: str,
           within: float = 0.5) -> tuple[Figure, str]:
    """A histogram of weights over their block's absmax, over the levels of each kind.

    Args:
        values: from -1 to 1. kinds: name -> its levels.
        within: the sentence counts weights and levels nearer to zero than this.
    """
    values = np.asarray(values)
    share, edges = np.histogram(values, bins=80, range=(-1, 1))
    share = 100 * share / len(values)
    fig, axes = canvas(title, xlabel, "share of the weights (% a bin)", width=8)
    axes.bar(edges[:-1], share, np.diff(edges), align="edge", color="#b5b5b5", edgecolor="white", linewidth=0.3)
    lines = [-share.max() * (0.12 + 0.16 * i) for i in range(len(kinds))]
    for i, (at, y) in enumerate(zip(kinds.values(), lines)):
        axes.plot(at, np.full(len(at), y), linestyle="none", marker=MARKERS[i % 6], color=SHADES[i % 6])
    ticks = [t for t in axes.get_yticks() if 0 <= t <= share.max()]
    axes.set_yticks([*lines, *ticks], [*kinds, *(f"{t:g}" for t in ticks)])
    axes.set_ylim(1.6 * lines[-1], 1.08 * share.max())
    axes.axhline(0, color="#111111", linewidth=0.8)
    near = np.mean(np.abs(values) < within)
    counts = " and ".join(f"{int((np.abs(at) < within).sum())} of {len(at)} levels of {name}"
                          for name, at in kinds.items())
    return fig, f"{near:.0%} of the weights are nearer to zero than {within:g} of their absmax; so are {counts}"


# ---------------------------------------------------------------- notebook 07


@styled
def symptom_grid(cells: Mapping[str, Mapping[str, tuple[str, bool]]], *, title: str) -> tuple[Figure, str]:
    """fault -> symptom -> (what was seen, whether it is out of order), as cells; dark is out of order."""
    rows, columns = list(cells), list(next(iter(cells.values())))
    odd = np.array([[cells[row][column][1] for column in columns] for row in rows])
    fig, axes = canvas(title, "symptom", "fault", width=1.6 + 0.72 * len(columns), height=1.4 + 0.3 * len(rows))
    axes.imshow(0.7 * odd, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            axes.text(j, i, cells[row][column][0], ha="center", va="center", fontsize=9,
                      color="white" if odd[i, j] else "black")
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(np.arange(0.5, len(columns) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
    axes.grid(visible=False)
    axes.grid(which="minor", color="#7d7d7d", alpha=1)
    axes.tick_params(which="minor", length=0)
    apart = len({tuple(row) for row in odd.tolist()}) == len(rows)
    counts = "; ".join(f"{row}: {n} of {len(columns)}" for row, n in zip(rows, odd.sum(1).tolist()))
    return fig, f"out of order: {counts}. Every row darkens other cells: {apart}."


# ---------------------------------------------------------------- notebook 12


@styled
def tradeoff(sizes: Mapping[str, int], quality: Mapping[str, Mapping[str, float]], notes: Mapping[str, str], *,
             title: str, ylabel: str) -> tuple[Figure, str]:
    """Quality against trained parameters (logarithmic), one panel a task.

    Args:
        sizes: method -> trained parameters.
        quality: task -> method -> how good, higher is better.
        notes: method -> what the legend says behind its name.
    """
    fig = Figure(figsize=(3.4 * len(quality) + 2.8, 3.6))
    panels = fig.subplots(1, len(quality), sharey=True, squeeze=False)[0]
    for axes, (task, values) in zip(panels, quality.items()):
        for i, name in enumerate(sizes):
            axes.plot(sizes[name], values[name], linestyle="none", marker="os^Dv*XpP"[i % 9], markersize=9,
                      color=SHADES[i] if i < 5 else "white", markeredgecolor="black" if i < 5 else SHADES[i - 5],
                      markeredgewidth=1 if i < 5 else 2, label=f"{name}: {notes[name]}")
        axes.set(xscale="log", title=task, xlabel="trained parameters")
    panels[0].set_ylabel(ylabel)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    fig.suptitle(title, y=1.02)
    order = {task: sorted(values, key=values.__getitem__, reverse=True) for task, values in quality.items()}
    return fig, " ".join(f"{task}, from the best: {'; '.join(f'{n}: {quality[task][n]:.1f}' for n in names)}."
                         for task, names in order.items())
