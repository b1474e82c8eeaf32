"""How long a notebook takes to work through: what there is to read, to look at and to write, at assumed rates.

The rates are assumptions. Nobody was timed: whoever teaches the course can measure, and put the rates in below.
"""

import re
from pathlib import Path
from typing import NamedTuple

import nbformat

WORDS = 180  # of prose, a minute: text with mathematics, read once
PRINTED = 240  # of printed words, a minute: results and answers to predictions, skimmed
CODE = 12  # lines of code a minute, to read
INLINE, DISPLAYED = 3, 10  # words that a formula stands for, in a line and on a line of its own
LOOK = 1  # minutes for a figure, for a prediction, and for all runs of a notebook together
EXERCISE, LINE = 3, 1.5  # minutes for an exercise, and for each line of the solution besides
SOLUTION = re.compile(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", re.DOTALL)


class Work(NamedTuple):
    """What there is to do in one notebook, counted."""

    words: int  # of prose; formulas count for INLINE or DISPLAYED of them
    printed: int
    code: int  # lines that stand there
    figures: int
    predictions: int
    exercises: int
    written: int  # lines that the learner writes, as many as the solutions have

    @property
    def minutes(self) -> float:
        looked = LOOK * (self.figures + self.predictions + 1)
        return (self.words / WORDS + self.printed / PRINTED + self.code / CODE + looked
                + EXERCISE * self.exercises + LINE * self.written)


def lines_of(source: str) -> list[str]:
    """Lines of code, without blank ones, comments, imports and a docstring on a line of its own."""
    return [line for line in source.splitlines() if line.strip() and not re.match(r'\s*(#|"""|from |import )', line)]


def words_of(text: str) -> int:
    displayed, text = len(re.findall(r"\$\$.*?\$\$", text, re.DOTALL)), re.sub(r"(?s)\$\$.*?\$\$", " ", text)
    inline, text = len(re.findall(r"\$[^$\n]+\$", text)), re.sub(r"\$[^$\n]+\$", " ", text)
    text = re.sub(r"(?s)```.*?```|<[^>]+>|[|#*`_]", " ", text)
    return len(re.findall(r"\w[\w'.,-]*", text)) + INLINE * inline + DISPLAYED * displayed


def work(path: Path) -> Work:
    """Everything in one notebook that takes time."""
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    solutions = [found[1] for cell in code for found in [SOLUTION.search(cell.source)] if found]
    given = [cell.source for cell in code if not SOLUTION.search(cell.source)]
    return Work(words=sum(words_of(cell.source) for cell in cells if cell.cell_type == "markdown"),
                printed=sum(len(output.get("text", "").split()) for output in outputs),
                code=sum(len(lines_of(source)) for source in given),
                figures=sum("image/png" in output.get("data", {}) for output in outputs),
                predictions=sum(source.count(".reveal(") for source in given),
                exercises=len(solutions), written=sum(len(lines_of(source)) for source in solutions))


def said(path: Path) -> int:
    """The minutes that the first cell of the notebook names."""
    found = re.search(r"(\d+) minutes", nbformat.read(path, as_version=4).cells[0].source)
    if not found:
        raise ValueError(f"{path.name}: the first cell names no minutes, expected 'N minutes'")
    return int(found[1])


def table(paths: list[Path]) -> str:
    """Counts, the minutes that follow from them, and the minutes that the notebook names."""
    rows = [(path.name[:2], work(path), said(path)) for path in paths]
    lines = ["| | words | printed words | lines to read | figures | predictions | exercises | lines to write "
             "| minutes by the model | minutes named |", "|---|---|---|---|---|---|---|---|---|---|"]
    lines += [f"| {name} | " + " | ".join(f"{n:,}" for n in done) + f" | {done.minutes:.0f} | {named} |"
              for name, done, named in rows]
    sums = [sum(column) for column in zip(*(done for _, done, _ in rows))]
    lines.append(f"| all | {' | '.join(f'{n:,}' for n in sums)} | {sum(done.minutes for _, done, _ in rows):.0f} | "
                 f"{sum(named for *_, named in rows)} |")
    return "\n".join(lines)
