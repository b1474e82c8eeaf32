"""Grading a folder: points for what is right, a message for what is not, and nothing is lost whatever comes in."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minilora.grade import COLUMNS, definitions, exercises, main, read

FOLDER = Path(__file__).parents[1] / "notebooks"
SOLVED = FOLDER / "02_two_thin_matrices.ipynb"


def submit(folder, student, changes, name=SOLVED.name):
    """The solved notebook with some solution cells replaced."""
    book = json.loads(SOLVED.read_text())
    for cell in book["cells"]:
        exercise = cell["metadata"].get("nbgrader", {}).get("grade_id")
        if exercise in changes:
            cell["source"], cell["metadata"] = changes[exercise], {}  # an editor may lose the metadata
    (folder / student).mkdir(exist_ok=True)
    (folder / student / name).write_text(json.dumps(book))


def graded(folder, *options):
    assert main([str(folder), "--csv", str(folder / "grades.csv"), *options]) == 0
    with open(folder / "grades.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    return {(row["student"], row["exercise"]): (int(row["points"]), row["message"]) for row in rows}


def test_from_nothing_to_full(tmp_path, capsys):
    submit(tmp_path, "copied", {})
    submit(tmp_path, "wrong", {"merged_weight": "def merged_weight(W0, A, B, alpha):\n    return W0 + alpha * B @ A"})
    submit(tmp_path, "odd", {  # a global and a magic, no function at all, a broken cell, an edited check
        "count_parameters": "%matplotlib inline\none = 1\ndef count_parameters(shapes, rank):\n"
                            "    return one * sum(rank * sum(shape) for shape in shapes)",
        "merged_weight": "pass", "best_rank_r_error": "def best_rank_r_error(:", "check_merged_weight": "print('ok')"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / SOLVED.name).touch()
    (tmp_path / "99_none.ipynb").write_text("{}")
    found = graded(tmp_path)
    names = list(exercises(SOLVED))
    assert len(names) == 4 and len(found) == 4 * 4 + 1
    assert all(found["copied", name] == (1, "ok") for name in names)
    assert [found["wrong", name][0] for name in names] == [int(name != "merged_weight") for name in names]
    assert "alpha" in found["wrong", "merged_weight"][1]
    assert found["odd", "count_parameters"] == found["odd", "first_update"] == (1, "ok")
    assert found["odd", "merged_weight"] == found["odd", "best_rank_r_error"]
    assert found["odd", "merged_weight"] == (0, "there is no such function or class in the notebook")
    assert all(points == 0 and "not a notebook" in message for points, message in (found["empty", n] for n in names))
    assert found["99_none", ""] == (0, "no notebook 99")
    out = capsys.readouterr().out
    assert [re.search(rf"^{s} +(\d) of 4$", out, re.M)[1] for s in ("copied", "wrong", "odd", "empty")] == list("4320")


def test_a_crash_and_an_endless_loop_cost_their_own_exercise_only(tmp_path):
    submit(tmp_path, "crash", {
        "merged_weight": "import os\ndef merged_weight(W0, A, B, alpha):\n    os._exit(0)",
        "first_update": "def first_update(x, G, A, alpha, lr):\n    while True:\n        pass"})
    found = graded(tmp_path, "--seconds", "15")
    assert found == {("crash", "count_parameters"): (1, "ok"), ("crash", "best_rank_r_error"): (1, "ok"),
                     ("crash", "merged_weight"): (0, "merged_weight ends the whole process"),
                     ("crash", "first_update"): (0, "first_update takes longer than 15 s")}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem[:2])
def test_every_solution_stands_on_definitions_alone(path):
    """So that grading a class takes seconds a student; in one process here, checkers and all."""
    names, checks = {"__name__": "__main__"}, exercises(path)
    for source in read(path):
        exec(compile(definitions(source), path.name, "exec"), names)
    assert checks and {name: check.diagnose(names[name]) for name, check in checks.items()} == dict.fromkeys(checks)


def test_a_folder_without_notebooks_is_one_clear_error(tmp_path):
    done = subprocess.run([sys.executable, "-m", "minilora.grade", tmp_path / "none"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"no notebooks in {tmp_path / 'none'}\n")
