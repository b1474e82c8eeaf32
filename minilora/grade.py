"""Grades a folder of submitted notebooks, without nbgrader: ``python -m minilora.grade FOLDER [--csv grades.csv]``.

A submission is a file NN_*.ipynb anywhere under FOLDER, and its student the first folder: FOLDER/mia/02_....ipynb. Each
is read in a process of its own, and the checkers of `minilora.check` are asked about what it defines; outputs, and checks
that were edited, do not count. The CSV has a row for each exercise: student, notebook, exercise, points, of, message.

To be quick, only imports, functions and classes are run; where an exercise then misses a name, the whole notebook is.
Submissions are programs: grade those of people you trust, or in a container.
"""

import argparse
import ast
import csv
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

COLUMNS = ("student", "notebook", "exercise", "points", "of", "message")
SECONDS = 120  # for one cell, or for one exercise
DONE = "done"
MISSING = "there is no such function or class in the notebook"


def read(path: Path) -> list[str]:
    """The code cells of a notebook.

    Raises:
        ValueError: it is none.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a notebook that can be read: {type(error).__name__}: {error}") from None


def exercises(path: Path) -> dict:
    """Name -> checker of the notebook that a file is named after.

    Raises:
        ValueError: there is no such notebook.
    """
    from .check import Exercise  # with it comes torch, which the parent process can do without

    try:
        module = importlib.import_module(f".check.nb{path.name[:2]}", __package__)
    except ImportError:
        raise ValueError(f"no notebook {path.name[:2]}") from None
    return {name: value for name, value in vars(module).items() if isinstance(value, Exercise)}


def definitions(source: str) -> str:
    """The imports, functions and classes of a cell; nothing of a broken one."""
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
    try:
        return "\n".join(ast.unparse(node) for node in ast.parse(source).body if isinstance(node, kinds))
    except (SyntaxError, ValueError):
        return ""


def work(path: Path, skip: set[str], say: Callable[[str, str], None]) -> None:
    """Runs one submission; says ("at", step) before each step, and (exercise, message) of each result.

    Args:
        skip: the steps to leave out, because they ended a process before this one.
    """
    from IPython.terminal.interactiveshell import TerminalInteractiveShell  # a cell may hold a magic

    shell, checks = TerminalInteractiveShell.instance(), exercises(path)
    names = shell.user_ns
    for whole in (False, True):
        for number, source in enumerate(read(path), 1):
            step = f"{'cell' if whole else 'definitions of cell'} {number}"
            if step not in skip:
                say("at", step)
                shell.run_cell(source if whole else definitions(shell.transform_cell(source)))
        problems = {}
        for name in (n for n in checks if n not in skip):
            say("at", name)
            problem = checks[name].diagnose(names[name]) if name in names else MISSING
            say(name, problem or "ok")
            problems[name] = problem or ""
        if not any("NameError" in problem or problem == MISSING for problem in problems.values()):
            break
    say("at", DONE)


def attempt(path: Path, skip: set[str], found: dict[str, str], seconds: float) -> tuple[str, str]:
    """One process over a submission; fills `found`. Returns the step at which it ended and why, "" if it is done."""
    command = [sys.executable, "-m", "minilora.grade", "--worker", str(path), json.dumps(sorted(skip))]
    environment = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    worker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True, env=environment)
    said: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: [*map(said.put, worker.stdout), said.put("")], daemon=True).start()
    at = "start"
    try:
        while line := said.get(timeout=seconds):
            key, value = json.loads(line)
            if key == "at":
                at = value
            elif found.get(key) != "ok":
                found[key] = value
        return at, "" if at == DONE else "ends the whole process"
    except queue.Empty:
        return at, f"takes longer than {seconds:g} s"
    finally:
        worker.kill()
        worker.wait()


def grade(path: Path, seconds: float = SECONDS) -> dict[str, str]:
    """Exercise -> "ok" or what is wrong, for one submission, whatever it does.

    Raises:
        ValueError: no notebook has the number that the file's name begins with.
    """
    names = list(exercises(path))
    try:
        read(path)
    except ValueError as error:
        return dict.fromkeys(names, str(error))
    found: dict[str, str] = {}
    skip: set[str] = set()
    while True:  # each attempt leaves out one step more than the one before
        at, why = attempt(path, skip, found, seconds)
        if at in names and why:
            found[at] = f"{at} {why}"
        if not why or at in skip or at == "start":
            return {name: found.get(name, f"not graded: {at} {why}") for name in names}
        skip.add(at)


def rows(folder: Path, path: Path, seconds: float) -> list[tuple]:
    parts = path.relative_to(folder).parts
    who = (parts[0] if len(parts) > 1 else path.stem, path.name)
    try:
        results = grade(path, seconds)
    except ValueError as error:
        return [(*who, "", 0, 0, str(error))]
    return [(*who, name, int(message == "ok"), 1, message) for name, message in results.items()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minilora.grade", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--csv", type=Path, default=Path("grades.csv"), help="(default: grades.csv)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"a cell or an exercise (default: {SECONDS})")
    options = parser.parse_args(arguments)
    papers = sorted(p for p in options.folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    if not papers:
        print(f"no notebooks in {options.folder}", file=sys.stderr)
        return 2
    totals: dict[str, list[int]] = {}
    with open(options.csv, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(COLUMNS)
        for path in tqdm(papers, unit="notebook"):
            for row in rows(options.folder, path, options.seconds):
                out.writerow(row)
                total = totals.setdefault(row[0], [0, 0])
                total[0], total[1] = total[0] + row[3], total[1] + row[4]
            file.flush()  # what is graded stays graded, whatever comes
    width = max(map(len, totals))
    for student, (points, of) in totals.items():
        print(f"{student:{width}} {points:4} of {of}")
    print(f"every exercise: {options.csv}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        channel = os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a submission prints is not for the channel
        work(Path(sys.argv[2]), set(json.loads(sys.argv[3])),
             lambda *message: print(json.dumps(message), file=channel, flush=True))
    else:
        sys.exit(main())
