"""Grades a folder of submitted notebooks, without nbgrader: ``python -m minilora.grade FOLDER [--csv grades.csv]``.

A submission is a file NN_*.ipynb anywhere under FOLDER, and its student the first folder: FOLDER/mia/02_....ipynb. All
are read before one of them runs. Each runs in a process of its own, which knows neither the references nor the seed:
inputs go in, outputs come out as plain data, and this process compares. Outputs, and checks that were edited, do not
count. The CSV has a row for each exercise: student, notebook, exercise, points, of, message, flags.

To be quick, only imports, functions and classes are run; where an exercise then misses a name, the whole notebook is.
"""

import argparse
import base64
import csv
import importlib.util
import math
import os
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from .grading.calls import short
from .grading.nursery import Ended, Nursery
from .grading.papers import Paper, collect, exercises_of, read
from .grading.wire import Other, Unreadable, decode, decode_call, encode
from .grading.worker import definitions

__all__ = ["COLUMNS", "definitions", "exercises", "main", "read"]
COLUMNS = ("student", "notebook", "exercise", "points", "of", "message", "flags")
SECONDS = 120  # for one cell, or for one exercise
PATIENCE = 5  # so many times SECONDS for a whole submission
DRAWN = 24  # inputs that nobody can foresee, beside the ones that the notebook tries
DONE = "done"
MISSING = "there is no such function or class in the notebook"


def exercises(path: Path) -> dict:
    """Name -> checker of the notebook that a file is named after.

    Raises:
        ValueError: there is no such notebook.
    """
    found = exercises_of(path.name[:2])
    if not found:
        raise ValueError(f"no notebook {path.name[:2]}")
    return found


class Examination:
    """The cases of one exercise, drawn once for all submissions, and the judgement over what came back."""

    lock = threading.Lock()  # the generators of random numbers are the process's

    def __init__(self, exercise, seed: int):
        self.exercise = exercise
        self.parts = [(cases, exercise.outcomes(exercise.reference, cases))
                      for cases in (exercise.cases, exercise.drawn_cases(seed, DRAWN))]
        cases = [case for cases, _ in self.parts for case in cases]
        self.before = [sent(exercise.arguments(case)) for case in cases]
        self.request = {"do": "call", "name": exercise.name, "recorded": exercise.recorded,
                        "listed": exercise.observe is not None,
                        "cases": base64.b64encode(pickle.dumps([*map(exercise.arguments, cases)])).decode()}

    def judge(self, reply: dict) -> str:
        """What is wrong with the answers in `reply`, or "".

        Raises:
            Ended: it is no reply to this request.
        """
        if reply.get("missing"):
            return MISSING
        if "uncalled" in reply:
            return self.exercise.uncalled(short(reply["uncalled"]))
        calls = reply.get("calls")
        if not isinstance(calls, list) or len(calls) != len(self.before):
            raise Ended("sends what was not asked for")
        try:
            done = [decode_call(call, before) for call, before in zip(calls, self.before)]
            with self.lock:
                outcomes = [self.exercise.seen(d, b) for d, b in zip(done, self.before)]
                problems = (self.exercise.judge(cases, [outcomes.pop(0) for _ in cases], expected)
                            for cases, expected in self.parts)
                return next(filter(None, problems), "")
        except Unreadable as error:
            return f"{self.exercise.name} gives what cannot be compared: {error}"
        except Exception as error:  # a number of 1,000 digits, a name that no dict may hold: whatever they thought of
            return f"{self.exercise.name} gives what cannot be compared: {type(error).__name__}: {short(error)}"


def sent(arguments: tuple) -> tuple:
    """Arguments as they come back from a function that leaves them alone."""
    copies = (decode(encode(a)) for a in arguments)
    return tuple(a if isinstance(copy, Other) else copy for a, copy in zip(arguments, copies))


class Examiner:
    """Grades submissions with the cases of one seed."""

    def __init__(self, nursery: Nursery, seed: int, seconds: float = SECONDS):
        self.nursery, self.seed, self.seconds = nursery, seed, seconds
        self.stopped = False
        self.examinations: dict[str, dict[str, Examination]] = {}

    def stop(self) -> None:
        """Ends what runs, as after Ctrl-C."""
        self.stopped = True
        for student in list(self.nursery.students):
            student.let_go()

    def prepare(self, number: str) -> None:
        if number not in self.examinations:
            self.examinations[number] = {name: Examination(exercise, self.seed)
                                         for name, exercise in exercises_of(number).items()}

    def grade(self, paper: Paper) -> dict[str, str]:
        """Exercise -> "ok" or what is wrong, for one submission, whatever it does."""
        exams = self.examinations[paper.number]
        if paper.problem:
            return dict.fromkeys(exams, paper.problem)
        found: dict[str, str] = {}
        skip: set[str] = set()
        end = time.monotonic() + PATIENCE * self.seconds
        while True:  # each attempt leaves out one step more than the one before
            at, why = self.attempt(paper, exams, skip, found, end)
            if at in exams and why:
                found[at] = f"{at} {why}"
            if not why or at in skip or at == "start" or self.stopped or time.monotonic() > end:
                return {name: found.get(name) or f"not graded: {at} {why}" for name in exams}
            skip.add(at)

    def attempt(self, paper: Paper, exams: dict[str, Examination], skip: set[str], found: dict[str, str],
                end: float) -> tuple[str, str]:
        """One process over a submission; fills `found`. Returns the step at which it ended, and why or ""."""
        at = "start"

        def ask(request: dict) -> dict:
            return student.ask(request, 0 if self.stopped else max(0.01, min(self.seconds, end - time.monotonic())))

        with self.nursery.student() as student:
            try:
                for whole in (False, True):
                    for number, source in enumerate(paper.cells, 1):
                        at = f"{'cell' if whole else 'definitions of cell'} {number}"
                        if at not in skip:
                            ask({"do": "cell", "source": source, "whole": whole})
                    for at in (name for name in exams if name not in skip and found.get(name) != "ok"):
                        found[at] = exams[at].judge(ask(exams[at].request)) or "ok"
                    if not any("NameError" in problem or problem == MISSING for problem in found.values()):
                        break
                return DONE, ""
            except Ended as ended:
                return at, str(ended)


# ---------------------------------------------------------------- the command


def shown(text: str) -> str:
    """A stranger's text on one line, without what a terminal would obey or what would turn the line around."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cell(value) -> str:
    """A cell of the CSV that no spreadsheet takes for a formula."""
    text = shown(str(value))
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def rows(examiner: Examiner, paper: Paper) -> list[tuple[str, int, str]]:
    """(exercise, points, message) of one submission."""
    if not exercises_of(paper.number):
        return [("", 0, paper.problem or f"no notebook {paper.number}")]
    return [(name, int(message == "ok"), message) for name, message in examiner.grade(paper).items()]


def positive(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of seconds above 0")
    return seconds


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m minilora.grade", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--csv", type=Path, default=Path("grades.csv"), help="(default: grades.csv)")
    parser.add_argument("--seconds", type=positive, default=SECONDS,
                        help=f"for a cell or an exercise (default: {SECONDS})")
    parser.add_argument("--seed", type=int, help="draws the inputs of an earlier run again (default: a fresh one)")
    parser.error = lambda problem: (print(f"{parser.prog}: {problem}", file=sys.stderr), sys.exit(2))
    options = parser.parse_args(arguments)
    options.seed = int.from_bytes(os.urandom(6), "big") if options.seed is None else options.seed
    return options


def main(arguments: list[str] | None = None) -> int:
    try:
        options = options_of(arguments)
    except SystemExit as end:  # argparse has said why
        return int(end.code or 0)
    if not hasattr(os, "fork"):
        print("grading needs Linux or macOS: a submission runs in a process that is forked", file=sys.stderr)
        return 2
    if importlib.util.find_spec("IPython") is None:
        print("grading needs IPython, which runs the cells of a notebook: pip install ipython", file=sys.stderr)
        return 2
    papers = collect(options.folder) if options.folder.is_dir() else []
    if not papers:
        print(f"no notebooks in {options.folder}", file=sys.stderr)
        return 2
    try:
        file = open(options.csv, "w", newline="", encoding="utf-8")
    except OSError as error:
        print(f"cannot write {options.csv}: {error.strerror}", file=sys.stderr)
        return 2
    try:
        with file, Nursery() as nursery:
            if nursery.partial:
                print("isolation is partial: a submission here can read files and reach the network, so grade those "
                      f"of people you trust, and look at what is flagged ({nursery.partial})", file=sys.stderr)
            totals = examine(papers, Examiner(nursery, options.seed, options.seconds), file)
    except RuntimeError as error:
        print(f"nothing is graded: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; what was graded stands in {options.csv}", file=sys.stderr)
        return 130
    report(papers, totals)
    print(f"every exercise: {options.csv}; inputs of this run again: --seed {options.seed}")
    return 0


def examine(papers: list[Paper], examiner: Examiner, file) -> dict[str, list[int]]:
    """Grades all, writes each row as it comes, and returns student -> [points, of]."""
    out = csv.writer(file)
    out.writerow(COLUMNS)
    for paper in papers:
        examiner.prepare(paper.number)
    totals: dict[str, list[int]] = {}
    best: dict[tuple[str, str, str], int] = {}  # an exercise is worth one point, however many copies come in
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        graded = pool.map(lambda paper: rows(examiner, paper), papers)
        for paper, results in zip(papers, tqdm(graded, total=len(papers), unit="notebook")):
            total = totals.setdefault(paper.student, [0, 0])
            for name, points, message in results:
                key = (paper.student, paper.number, name)
                of, gained = int(bool(name) and key not in best), max(0, points - best.get(key, 0))
                if key in best:
                    message += " (a second copy)"
                best[key] = max(points, best.get(key, 0))
                out.writerow([*map(cell, (paper.student, paper.name, name)), gained, of, cell(message),
                              cell("; ".join(paper.flags))])
                total[0], total[1] = total[0] + gained, total[1] + of
            file.flush()  # what is graded stays graded, whatever comes
    finally:
        examiner.stop()
        pool.shutdown(cancel_futures=True)
    return totals


def report(papers: list[Paper], totals: dict[str, list[int]]) -> None:
    width = max(len(shown(student)) for student in totals)
    for student, (points, of) in totals.items():
        print(f"{shown(student):{width}} {points:4} of {of}")
    flagged = [paper for paper in papers if paper.flags]
    if flagged:
        print("to look at by eye:")
        for paper in flagged:
            print(f"  {shown(paper.student)}/{shown(paper.name)}: {shown(short('; '.join(paper.flags), 300))}")


if __name__ == "__main__":
    sys.exit(main())
