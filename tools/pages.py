"""Writes what the notebooks already say into the pages that gather it: ``python tools/pages.py``.

README.md gets the ten lines of examples/ten_lines.py, two of the figures, an answer of the memory calculator and the
map of the notebooks; docs/CALCULATOR.md how far such answers are off and what was measured on a card;
docs/PUBLISHED.md the calculator's answers beside published measurements; docs/CLAIMS.md the ledger of claims;
notebooks/TEACHING.md the misconception behind each wrong answer to a prediction; notebooks/LESSONS.md where the minutes
come from, and the usual mistakes in each exercise. A generated part stands between
``<!-- NAME -->`` and ``<!-- /NAME -->``; nobody types there. A test holds the pages against the notebooks.
"""

import base64
import contextlib
import importlib
import io
import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "gpu"))

import minutes
import run as gpu
from common import measured_rows

from minilora.check import Estimate, Exercise, Prediction, brief
from minilora.cli import main
from minilora.experiments import measured
from minilora.memory import published

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ROW = re.compile(r"^\|(.+)\|(.+)\|(.+)\|[ \t]*$", re.MULTILINE)
# A source: in brackets at the end of a claim. "paper" alone is LoRA's; other papers and issues go by their names.
SOURCE = re.compile(r"\s*\(((?:the lesson|paper|rsLoRA|[A-Z])[^()]*)\)\s*$")
FIGURES = (("06", 0), ("11", 2))  # (notebook, which of its figures)
QUESTION = ("memory --model llama-3-8b --method qlora --rank 16 --targets all-linear --batch 1 --seq 2048 "
            "--card rtx-4090")
HEART = {"00": "the lesson in one sitting: an adapter built, trained, merged and swapped",
         "01": "a census of one training step, formula against measured bytes",
         "02": "recover a hidden low-rank update, rank by rank",
         "03": "one budget spent on different modules of a pretrained decoder",
         "04": "alpha / r against alpha / sqrt(r), rank 1 to 256",
         "05": "the spectra of real updates, full fine-tuning's and LoRA's, beside random controls",
         "06": "LoRA against full fine-tuning, each at its own best learning rate, near task and far",
         "07": "six faults, diagnosed blind from curves and reports",
         "08": "a thousand merges and unmerges, naive and exact",
         "09": "every adapter on every task and base",
         "10": "NF4 from normal quantiles, and an adapter on a 4-bit base",
         "11": "the title of the lesson put to the test: what fits, and the streamed base that makes it so",
         "12": "prompt, prefix, (IA)3, bottleneck adapters, BitFit and LoRA on one task",
         "13": "capstone: budget, train, compare, ship, defend",
         "14": "optional: the same steps on a real pretrained transformer",
         "15": "optional: from a model's folder and a file of rows to an adapter that can be served"}


@dataclass
class Claim:
    """One row of a notebook's last table."""

    notebook: Path
    text: str
    source: str
    shown: str
    verdict: str

    @property
    def cells(self) -> list[int]:
        """The numbers of the code cells that show it."""
        return [int(n) for part in re.findall(r"\bcells? ((?:\d+(?:, | and | to )?)+)", self.shown)
                for n in re.findall(r"\d+", part)]


def markdown(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]


def claims(path: Path) -> list[Claim]:
    """The claims of one notebook, in order; the source is what stands in brackets at the end of a claim."""
    table = "\n".join(markdown(path)).split("## What you can now claim")[-1]
    found = []
    for text, shown, verdict in ROW.findall(table)[2:]:
        source = SOURCE.search(text)
        found.append(Claim(path, SOURCE.sub("", text).strip(), source[1] if source else "", shown.strip(),
                           verdict.strip()))
    return found


def ledger() -> str:
    """Every claim that someone else made, the lesson's part by part, then the LoRA paper's, then those of others."""
    everything = [claim for path in NOTEBOOKS for claim in claims(path) if claim.source]
    order = ("the lesson", "paper")
    lines = ["| claim | made in | tested in | verdict |", "|---|---|---|---|"]
    for c in sorted(everything, key=lambda c: ([not c.source.startswith(who) for who in order], c.source)):
        where = f"[{c.notebook.name[:2]}](../notebooks/{c.notebook.name})"
        if c.cells:
            where += f", cell{'s' * (len(c.cells) > 1)} {', '.join(map(str, sorted(c.cells)))}"
        lines.append(f"| {c.text} | {c.source} | {where} | {c.verdict} |")
    return "\n".join(lines)


def sequence() -> str:
    """The map: every notebook, the experiment at its heart, and its minutes, as its first cell has them."""
    lines = ["| | notebook | the experiment at its heart | minutes |", "|---|---|---|---|"]
    for path in NOTEBOOKS:
        first, number = markdown(path)[0], path.name[:2]
        title, minutes = re.match(r"# \d\d · (.+)", first)[1], re.search(r"(\d+) minutes", first)[1]
        lines.append(f"| {number} | [{title}](notebooks/{path.name}) | {HEART[number]} | {minutes} |")
    return "\n".join(lines)


def misconceptions() -> str:
    """Every prediction, and what is behind each wrong answer to it."""
    lines = []
    for path in NOTEBOOKS:
        module = importlib.import_module(f"minilora.check.nb{path.name[:2]}")
        asked = {name: value for name, value in vars(module).items() if isinstance(value, Prediction | Estimate)}
        lines.append(f"**{re.match('# (.+)', markdown(path)[0])[1]}**\n")
        for name, value in asked.items():
            if isinstance(value, Prediction):
                wrong = [(f"{choice}", text) for choice, text in value.answers.items() if choice != value.right]
                lines.append(f"- `{name}`: {value.right} is right. {value.answers[value.right]}")
            else:
                wrong = [(f"{brief(ratio)} times the measured value", text) for ratio, text in value.misconceptions]
                lines.append(f"- `{name}`, a number:")
            lines += [f"  - {choice}: {text}" for choice, text in wrong]
        lines.append("")
    return "\n".join(lines).strip()


def key() -> str:
    """Every exercise, and what its checker says to the mistakes that are usual."""
    lines = []
    for path in NOTEBOOKS:
        module = importlib.import_module(f"minilora.check.nb{path.name[:2]}")
        lines.append(f"**{re.match('# (.+)', markdown(path)[0])[1]}**\n")
        for name, exercise in vars(module).items():
            if isinstance(exercise, Exercise):
                lines.append(f"- `{name}`")
                lines += [f"  - {message}" for _, message in exercise.mistakes]
        lines.append("")
    return "\n".join(lines).strip()


def code() -> str:
    """The first program, which a test runs."""
    return f"```python\n{(ROOT / 'examples' / 'ten_lines.py').read_text(encoding='utf-8')}```"


def figures() -> str:
    """Two figures of the notebooks, side by side; their alternative text is the sentence under them."""
    shown = "".join(f'<img src="notebooks/figures/{name}.png" width="48%" alt="{alt}">\n'
                    for name, (_, alt) in pictures().items())
    return f"<p>\n{shown}</p>"


def pictures() -> dict[str, tuple[bytes, str]]:
    """Name -> (PNG, alternative text) of the figures for README.md, as the notebooks hold them."""
    found = {}
    for number, which in FIGURES:
        (path,) = (p for p in NOTEBOOKS if p.name.startswith(number))
        cells = (cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
        output = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})][which]
        alt = output.metadata["image/png"]["alt"]
        found[f"{number}_{which}"] = base64.b64decode(output.data["image/png"]), alt
    return found


def answer() -> str:
    """One question to the calculator, as it is typed, and what it answers."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(shlex.split(QUESTION))
    return f"```\n$ minilora {QUESTION}\n{out.getvalue().rstrip()}\n```"


def accuracy() -> str:
    """How far the calculators of tests/bench/memory_peers.py are from the trace, over the fine-tunes each answers."""
    rows = measured("peers")["rows"]
    lines = ["| calculator | answers | mean difference from the trace | lowest | highest |", "|---|---|---|---|---|"]
    for who in [key for key in rows[0] if key not in ("model", "options", "trace")]:
        off = [row[who] / row["trace"] - 1 for row in rows if row[who]]
        lines.append(f"| {'minilora' if who == 'ours' else who} | {len(off)} of {len(rows)} "
                     f"| {sum(map(abs, off)) / len(off):.1%} | {min(off):+.1%} | {max(off):+.1%} |")
    return "\n".join(lines)


def published_summary() -> str:
    """The calculator against published memory, by kind of run."""
    lines = ["| runs | rows | mean difference from the card | lowest | highest |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in published.summary(published_rows()))])


def published_table() -> str:
    """Every published row: measured, predicted, the cause of the difference; or why it is left out."""
    lines = ["| run | measured | predicted | off | cause |", "|---|---|---|---|---|"]
    for m in published_rows():
        cells = ((m.name, f"{m.peak:,}", "", "left out", m.left_out) if m.left_out else
                 (m.name, f"{m.peak:,}", f"{m.predicted:,}", f"{m.predicted / m.peak - 1:+.3%}", published.cause(m)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def published_rows() -> list[published.Measured]:
    return published.measurements(ROOT / "data" / "published" / "memory.csv")


def card() -> str:
    """What tests/gpu/run.py measures, and what its records say."""
    lines = ["| | rows | on a card |", "|---|---|---|"]
    described = dict(re.findall(r"run\.py (\w+) +(.+): (?:data/measured/)?gpu_\w+\.json", gpu.__doc__))
    for name, benchmark in gpu.BENCHMARKS.items():
        file, found = gpu.RECORDS / f"gpu_{name}.json", "not measured yet"
        if file.exists():
            record = json.loads(file.read_text())
            missed, rows = len(benchmark.misses(record)), len(measured_rows(record))
            found = f"{record['card']}, {record['date']}: {rows} rows, " + (f"{missed} goals missed" if missed else
                                                                           "every goal met")
        lines.append(f"| `{name}`: {described[name]} | {len(benchmark.items(False))} | {found} |")
    return "\n".join(lines)


PAGES = {ROOT / "README.md": {"code": code, "figures": figures, "answer": answer, "map": sequence},
         ROOT / "docs" / "CALCULATOR.md": {"published_summary": published_summary, "accuracy": accuracy, "card": card},
         ROOT / "docs" / "PUBLISHED.md": {"published_summary": published_summary, "published": published_table},
         ROOT / "docs" / "CLAIMS.md": {"ledger": ledger},
         ROOT / "notebooks" / "TEACHING.md": {"misconceptions": misconceptions},
         ROOT / "notebooks" / "LESSONS.md": {"minutes": lambda: minutes.table(NOTEBOOKS), "key": key}}


def filled(page: Path) -> str:
    """The page with its generated parts made anew.

    Raises:
        ValueError: a mark is missing.
    """
    text = page.read_text(encoding="utf-8")
    for name, make in PAGES[page].items():
        parts = re.split(f"(<!-- {name} -->\n|\n<!-- /{name} -->)", text)
        if len(parts) != 5:
            raise ValueError(f"{page.name} must hold <!-- {name} --> and <!-- /{name} --> once, on lines of their own")
        text = "".join((*parts[:2], make(), *parts[3:]))
    return text


if __name__ == "__main__":
    for name, (png, _) in pictures().items():
        (ROOT / "notebooks" / "figures").mkdir(exist_ok=True)
        (ROOT / "notebooks" / "figures" / f"{name}.png").write_bytes(png)
    for page in PAGES:
        page.write_text(filled(page), encoding="utf-8")
        print(f"{page.relative_to(ROOT)} is up to date")
