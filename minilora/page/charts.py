"""The two charts, as SVG from the bill's own numbers. Lengths are percentages, so that text keeps its size."""

from ..memory.bill import PARTS, Bill
from ..memory.fitting import Verdict, need
from ..tables import bytes_text
from .html import Html, joined, size, tag

GIB = 2**30
STEPS = 360  # of the curve: each the most of the moments in it
HEIGHT, WIDTH = 1000, 1000  # of the curve's own drawing, stretched to the page
PHASES = {"start": "start", "forward": "forward", "recompute": "backward", "backward": "backward",
          "optimizer": "optimizer"}


def percent(share: float) -> str:
    return f"{100 * share:.3f}%"


def ticks(most: int) -> list[int]:
    """Round numbers of bytes from 0 to `most`: at most five."""
    step = 2**20
    while most / step > 4:
        step *= 2
    return list(range(0, most + 1, step))


def short(count: int) -> str:
    """1 GiB, 512 MiB: a tick's label."""
    number, _, unit = bytes_text(count).partition(" ")
    return f"{float(number.replace(',', '')):g} {unit}" if count else "0"


def bar(bill: Bill, verdict: Verdict | None) -> Html:
    """The parts beside each other, what may come on top, and the card's usable memory, to one scale."""
    low, high = need(bill)
    whole = max(high, verdict.usable[1] if verdict else 0)
    scale = lambda count: percent(count / whole / 1.02)
    drawn, x = [], 0
    for part, count in bill.parts.items():
        drawn.append(tag("rect", tag("title", f"{part}: {bytes_text(count)} ({count:,} bytes)"), x=scale(x), y=8,
                         width=scale(count), height=34, class_=f"p{PARTS.index(part)}"))
        x += count
    drawn.append(tag("rect", tag("title", f"gaps and scratch, at most: {bytes_text(high - low)}"), x=scale(low), y=8,
                     width=scale(high - low), height=34, class_="maybe"))
    if verdict:
        least, most = verdict.usable
        drawn += [tag("rect", tag("title", f"a run can use {bytes_text(least)} to {bytes_text(most)}"), x=scale(least),
                      y=0, width=scale(most - least), height=50, class_="limit"),
                  tag("line", x1=scale(least), x2=scale(least), y1=0, y2=50, class_="edge")]
    for tick in ticks(whole):
        drawn += [tag("line", x1=scale(tick), x2=scale(tick), y1=50, y2=55, class_="axis"),
                  tag("text", short(tick), x=scale(tick), y=69, class_="tick" if tick else "tick first")]
    about = f"{bytes_text(low)} of tensors, up to {bytes_text(high)} with gaps and scratch" + (
        f"; the card has {bytes_text(verdict.usable[0])} to {bytes_text(verdict.usable[1])}" if verdict else "")
    keys = [tag("span", tag("span", class_="swatch maybe", aria_hidden="true"), "gaps and scratch, at most ",
                size(high - low))]
    if verdict:
        keys.append(tag("span", tag("span", class_="swatch limit", aria_hidden="true"), "where the card's memory ends"))
    return joined(tag("svg", *drawn, role="img", aria_label=about, width="100%", height=74, class_="bar"),
                  tag("p", *keys, class_="keys"))


def curve(moments: list[tuple[int, str]], verdict: Verdict | None) -> Html:
    """The memory of one step over its moments, an operator each."""
    most = max(count for count, _ in moments)
    end = verdict.usable[1] if verdict else 0
    whole = max(most, end if end < 2 * most else 0) * 1.12  # a card with far more room would press the curve flat
    phases = stretches([PHASES[phase] for _, phase in moments])
    n = len(moments)
    top = [max(count for count, _ in moments[i * n // STEPS:max((i + 1) * n // STEPS, i * n // STEPS + 1)])
           for i in range(min(STEPS, n))]
    y = lambda count: round(HEIGHT * (1 - count / whole), 1)
    across = WIDTH / len(top)
    line = "".join(f"H{i * across:.1f}V{y(count)}" for i, count in enumerate(top))
    path = f"M0 {HEIGHT}{line}H{WIDTH}V{HEIGHT}Z"
    drawn = [tag("rect", tag("title", phase), x=percent(start / n), y=0, width=percent((end - start) / n), height=180,
                 class_="phase odd" if i % 2 else "phase") for i, (phase, start, end) in enumerate(phases)]
    drawn.append(tag("svg", tag("path", d=path, class_="area"), viewBox=f"0 0 {WIDTH} {HEIGHT}", width="100%",
                     height=180, preserveAspectRatio="none"))
    for tick in ticks(int(whole))[1:]:
        drawn += [tag("line", x1="0", x2="100%", y1=180 * y(tick) / HEIGHT, y2=180 * y(tick) / HEIGHT, class_="grid"),
                  tag("text", short(tick), x=4, y=180 * y(tick) / HEIGHT - 4, class_="tick first")]
    if verdict and end < whole:
        top_y, bottom_y = (180 * y(count) / HEIGHT for count in verdict.usable[::-1])
        drawn.append(tag("rect", tag("title", "where the card's memory ends"), x=0, y=top_y, width="100%",
                         height=max(bottom_y - top_y, 1), class_="limit"))
    drawn += [tag("text", phase, x=percent((start + end) / 2 / n), y=196, class_="tick")
              for phase, start, end in phases if (end - start) / n > 0.12]
    when = 100 * max(range(n), key=lambda i: moments[i][0]) / n
    about = (f"Memory over one step: it begins at {bytes_text(moments[0][0])}, is at its most, {bytes_text(most)}, "
             f"after {when:.0f}% of the step's operators, and ends at {bytes_text(moments[-1][0])}."
             + " The card's memory ends above this picture." * bool(end > whole))
    return joined(tag("svg", *drawn, role="img", aria_label=about, width="100%", height=202, class_="curve"),
                  tag("p", about, class_="quiet"))


def stretches(phases: list[str]) -> list[tuple[str, int, int]]:
    """Runs of the same phase: (phase, first, behind the last)."""
    found, start = [], 0
    for i in range(1, len(phases) + 1):
        if i == len(phases) or phases[i] != phases[start]:
            found.append((phases[start], start, i))
            start = i
    return found
