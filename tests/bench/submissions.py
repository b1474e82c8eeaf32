"""A class of 100 over all notebooks, graded: how many points it should get and gets, and how long that takes.

    python tests/bench/submissions.py [--seconds 60]

For every notebook: all solved, nothing written, one exercise that gives None, one whose process ends. Then every trick
of cheating_submissions.py, each on another notebook, and files that are no notebooks. A difference between the points
that are due and those that were given is printed and makes the exit code 1.
"""

import argparse
import ast
import csv
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from cheating_submissions import TRICKS, submission

from minilora.grade import exercises, main
from minilora.release import strip
from minilora.shipped import shipped

ENDS = {"none": "return None", "exits": "import os; os._exit(0)"}


def with_one(book: dict, name: str, body: str) -> dict:
    """A solved notebook in which exercise `name` has another body."""
    def source(cell):
        text = "".join(cell["source"])
        if cell["cell_type"] != "code" or f"def {name}(" not in text:
            return cell
        tree = ast.parse(text)
        for node in tree.body:
            if getattr(node, "name", "") == name:
                node.body = ast.parse(body).body
        return cell | {"source": ast.unparse(tree)}
    return book | {"cells": [source(cell) for cell in book["cells"]]}


def hand_in(folder: Path) -> dict[str, int]:
    """Writes the class to `folder`; student -> points that are due."""
    due = {}

    def write(student: str, name: str, book: dict | bytes, points: int) -> None:
        (folder / student).mkdir(parents=True, exist_ok=True)
        data = book if isinstance(book, bytes) else json.dumps(book).encode()
        (folder / student / name).write_bytes(data)
        due[student] = due.get(student, 0) + points

    paths = sorted(shipped("notebooks").glob("*.ipynb"))
    for i, path in enumerate(paths):
        book, names = json.loads(path.read_text()), list(exercises(path))
        write(f"solved {path.name[:2]}", path.name, book, len(names))
        write(f"blank {path.name[:2]}", path.name, strip(book), 0)
        for kind, body in ENDS.items():
            write(f"{kind} {path.name[:2]}", path.name, with_one(book, names[i % len(names)], body), len(names) - 1)
    for i, trick in enumerate(TRICKS):
        path = paths[i % len(paths)]
        cell = submission(trick, path.name[:2], dict.fromkeys(exercises(path), "*a"))
        write(f"cheat {trick}", path.name, {"cells": [{"cell_type": "code", "metadata": {}, "source": cell}]}, 0)
    for name, data in {"empty": b"", "binary": bytes(range(256)), "list": b"[1]", "deep": b"[" * 10**5}.items():
        write(f"odd {name}", paths[0].name, data, 0)
    (folder / "odd link").symlink_to(folder / "solved 01", target_is_directory=True)
    return due | {"odd link": 0}


def bench() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", default="60")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, table = Path(place, "in"), Path(place, "grades.csv")
        due, start = hand_in(folder), time.perf_counter()
        if main([str(folder), "--csv", str(table), "--seconds", options.seconds]):
            return 1
        seconds = time.perf_counter() - start
        with open(table, newline="") as file:
            rows = list(csv.DictReader(file))
    given = Counter()
    for row in rows:
        given[row["student"]] += int(row["points"])
    wrong = {student: (points, given[student]) for student, points in due.items() if given[student] != points}
    kinds = Counter(student.split()[0] for student in due)
    print(f"{len(due)} submissions ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}), {len(rows)} exercises, "
          f"{sum(due.values())} points due, {sum(given.values())} given, in {seconds:.0f} s")
    for student, (points, got) in wrong.items():
        print(f"{student}: {points} due, {got} given", [row["message"] for row in rows if row["student"] == student])
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(bench())
