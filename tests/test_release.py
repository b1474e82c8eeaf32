"""The student version: solutions and outputs out, all else in, and each checker says that nothing is written yet."""

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbgrader.preprocessors import ClearSolutions

from minilora.check import CheckFailed
from minilora.grade import definitions, exercises
from minilora.release import main, release, strip

FOLDER = Path(__file__).parents[1] / "notebooks"

SOLUTION = '''def double(n):
    """Twice n."""
    ### BEGIN SOLUTION
    two = 2

    return two * n
    ### END SOLUTION


class Triple:
    def __call__(self, n):
        ### BEGIN SOLUTION
        return 3 * n
        ### END SOLUTION'''
STUDENT = '''def double(n):
    """Twice n."""
    # YOUR CODE HERE
    raise NotImplementedError()


class Triple:
    def __call__(self, n):
        # YOUR CODE HERE
        raise NotImplementedError()'''


def cell(source, solution):
    meta = dict(schema_version=3, grade_id="double" if solution else "check", solution=solution, grade=not solution,
                locked=not solution, task=False) | ({} if solution else {"points": 1})
    return new_code_cell(source, metadata={"nbgrader": meta}, execution_count=2,
                         outputs=[new_output("stream", name="stdout", text="ok: double is right")])


@pytest.fixture
def book():
    setup = "from minilora.check import Exercise\ntwice = Exercise('double', lambda n: 2 * n, lambda seed: (seed,), [])"
    return new_notebook(cells=[
        new_code_cell(setup, execution_count=1, outputs=[new_output("stream", name="stdout", text="kept")]),
        cell(SOLUTION, True), cell("twice(double)", False), new_markdown_cell("<details>Twice: γ = 2.</details>")])


def released(book, tmp_path):
    (tmp_path / "solved").mkdir()
    nbformat.write(book, tmp_path / "solved" / "01_a.ipynb")
    (path,), _, _ = release(tmp_path / "solved", tmp_path / "student")
    return nbformat.read(path, as_version=4)


def test_solutions_go_and_all_else_stays(book, tmp_path):
    setup, solution, check, hint = released(book, tmp_path).cells
    assert solution.source == STUDENT and check.source == "twice(double)"
    assert all(c.outputs == [] and c.execution_count is None for c in (setup, solution, check))
    assert setup.source == book.cells[0].source and hint == book.cells[3]
    assert [c.metadata for c in (solution, check)] == [c.metadata for c in book.cells[1:3]]
    assert {c.id for c in book.cells} == {setup.id, solution.id, check.id, hint.id}


def test_work_is_kept(book, tmp_path, capsys):
    path = tmp_path / "student" / "01_a.ipynb"
    fresh = released(book, tmp_path)
    assert main([str(tmp_path / "solved"), str(path.parent)]) == 0  # as it was: nothing to keep
    assert "worked on" not in capsys.readouterr().out
    mine = path.read_text().replace("YOUR CODE HERE", "mine")
    path.write_text(mine)
    assert main([str(tmp_path / "solved"), str(path.parent)]) == 0 and path.read_text() == mine
    assert "kept 1 more that have been worked on" in capsys.readouterr().out
    assert main(["--overwrite", str(tmp_path / "solved"), str(path.parent)]) == 0
    assert nbformat.read(path, as_version=4) == fresh


def test_the_student_version_runs_to_the_checker_which_points_to_the_hint(book, tmp_path):
    setup, solution, check, _ = released(book, tmp_path).cells
    names = {}
    exec(setup.source, names)
    exec(solution.source, names)
    with pytest.raises(CheckFailed, match="not yet: double is not written yet; the folded cell below has a hint"):
        exec(check.source, names)


def same_as_nbgrader(book):
    theirs, _ = ClearSolutions().preprocess(copy.deepcopy(book), {})
    ours = nbformat.reads(json.dumps(strip(json.loads(nbformat.writes(book)))), as_version=4)
    return [c.source for c in ours.cells] == [c.source for c in theirs.cells]


def test_nbgrader_strips_the_same(book):
    assert same_as_nbgrader(book)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_nbgrader_strips_the_same_from_every_notebook(path):
    book = nbformat.read(path, as_version=4)
    assert same_as_nbgrader(book) and "SOLUTION" in nbformat.writes(book)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem[:2])
def test_every_checker_of_a_released_notebook_points_to_its_hint(path):
    cells = strip(json.loads(path.read_text()))["cells"]
    names, checks = {"__name__": "__main__"}, exercises(path)
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile(definitions("".join(cell["source"])), path.name, "exec"), names)
    for name, check in checks.items():
        with pytest.raises(CheckFailed, match="is not written yet; the folded cell below has a hint"):
            check(names[name])
        (at,) = (i for i, c in enumerate(cells) if "".join(c["source"]).endswith(f".{name}({name})"))
        assert "".join(cells[at + 1]["source"]).startswith("<details>")  # the hint that the message speaks of


@pytest.mark.parametrize("old, new", [
    ("    ### END SOLUTION\n\n\n", "\n"), ("    ### BEGIN SOLUTION\n    two", "    two"),
    ("### BEGIN SOLUTION", "# BEGIN")])
def test_broken_marks_are_one_clear_error_and_write_nothing(book, tmp_path, capsys, old, new):
    broken = copy.deepcopy(book)
    broken.cells[1].source = SOLUTION.replace(old, new)
    assert broken.cells[1].source != SOLUTION
    nbformat.write(book, tmp_path / "01_a.ipynb")
    nbformat.write(broken, tmp_path / "02_b.ipynb")
    assert main([str(tmp_path), str(tmp_path / "student")]) == 2
    assert "02_b.ipynb: cell" in capsys.readouterr().err and not (tmp_path / "student").exists()


def test_a_solution_without_metadata_or_without_marks_is_refused(book):
    plain = json.loads(nbformat.writes(book))
    plain["cells"][1]["metadata"] = {}
    with pytest.raises(ValueError, match="marked as a solution"):
        strip(plain)
    unmarked = json.loads(nbformat.writes(book))
    unmarked["cells"][1]["source"] = ["n = 1"]
    with pytest.raises(ValueError, match="marked as a solution"):
        strip(unmarked)


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_released(book, tmp_path, capsys):
    for name, text in {"02_b": "{", "03_c": "[]", "04_d": '{"cells": [{"source": 3}]}'}.items():
        (tmp_path / f"{name}.ipynb").write_text(text)
    (tmp_path / "05_e.ipynb").symlink_to(tmp_path / "nowhere")
    (tmp_path / "06_f.ipynb").mkdir()
    nbformat.write(book, tmp_path / "07_g.ipynb")
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == f"1 student notebooks in {tmp_path / 'out'}\n"
    assert err.splitlines() == [
        "not released: 02_b.ipynb is no notebook", "not released: 03_c.ipynb is no notebook",
        "not released: 04_d.ipynb is no notebook",
        "not released: 05_e.ipynb cannot be read: No such file or directory",
        "not released: 06_f.ipynb cannot be read: Is a directory"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["07_g.ipynb"]


def test_a_full_disk_leaves_no_half_notebook(book, tmp_path, capsys, monkeypatch):
    """Which the next run would keep as somebody's work."""
    for name in ("01_a", "02_b"):
        nbformat.write(book, tmp_path / f"{name}.ipynb")
    target, write, count = tmp_path / "out", os.fsync, []

    def full(descriptor):
        count.append(descriptor)
        if len(count) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert main([str(tmp_path), str(target)]) == 2
    out, err = capsys.readouterr()
    assert err == f"not released: {target / '01_a.ipynb'} cannot be written: No space left on device\n"
    assert [path.name for path in target.iterdir()] == ["02_b.ipynb"]
    assert main([str(tmp_path), str(target)]) == 0 and "kept" not in capsys.readouterr().out
    (target / "01_a.ipynb").write_text("{")  # as the release of old left it
    assert main([str(tmp_path), str(target)]) == 0 and "kept 1 more" in capsys.readouterr().out


def test_a_release_killed_at_any_moment_leaves_whole_notebooks(tmp_path):
    names = [path.name for path in FOLDER.glob("*.ipynb")]
    whole = tmp_path / "whole"
    release(FOLDER, whole)
    for delay in (0.0, 0.01, 0.02, 0.04):
        run = subprocess.Popen([sys.executable, "-c", "import sys, minilora.release as r; print(flush=True); "
                                f"r.release(r.Path({str(FOLDER)!r}), r.Path({str(tmp_path / 'cut')!r}))"],
                               stdout=subprocess.PIPE)
        run.stdout.readline()
        time.sleep(delay)
        run.kill()
        run.wait()
        for path in (tmp_path / "cut").glob("*.ipynb"):
            assert path.read_bytes() == (whole / path.name).read_bytes()
    assert release(FOLDER, tmp_path / "cut").kept == [] and names


def test_a_target_that_is_a_file_is_one_clear_line(book, tmp_path, capsys):
    nbformat.write(book, tmp_path / "01_a.ipynb")
    (tmp_path / "file").touch()
    assert main([str(tmp_path), str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"cannot make the folder {tmp_path / 'file'}: File exists\n"


def test_the_command(book, tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2 and "no notebooks in" in capsys.readouterr().err
    nbformat.write(book, tmp_path / "01_a.ipynb")
    assert main([str(tmp_path), str(tmp_path)]) == 2 and "choose another folder" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"1 student notebooks in {tmp_path / 'out'}\n"
    assert main(["a", "b", "c"]) == main(["--overwrit"]) == 2


def test_nbgrader_releases_grades_and_gives_feedback(book, tmp_path, monkeypatch):
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # it calls alembic
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source" / "week").mkdir(parents=True)
    nbformat.write(book, tmp_path / "source" / "week" / "01_a.ipynb")
    course = NbGraderAPI(config=Config({"CourseDirectory": {"root": str(tmp_path)}}))
    assert course.generate_assignment("week")["success"]
    blank = tmp_path / "release" / "week" / "01_a.ipynb"
    assert STUDENT in nbformat.read(blank, as_version=4).cells[1].source
    for student, file in (("solved", tmp_path / "source" / "week" / "01_a.ipynb"), ("blank", blank)):
        (tmp_path / "submitted" / student / "week").mkdir(parents=True)
        shutil.copy(file, tmp_path / "submitted" / student / "week")
        assert course.autograde("week", student)["success"] and course.generate_feedback("week", student)["success"]
        page = (tmp_path / "feedback" / student / "week" / "01_a.html").read_text()
        assert ("not yet: double is not written yet" in page) == (student == "blank")
    with course.gradebook as grades:
        assert {s.student.id: s.score for s in grades.assignment_submissions("week")} == {"solved": 1, "blank": 0}


def test_one_copied_cell_stops_no_class_and_no_slow_cell_is_cut_off(book, tmp_path, monkeypatch):
    from nbgrader.apps import NbGraderAPI
    from nbgrader.preprocessors import Execute
    from traitlets.config import Config

    from minilora.nbgrader_config import configure

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source" / "week").mkdir(parents=True)
    nbformat.write(book, tmp_path / "source" / "week" / "01_a.ipynb")
    doubled = copy.deepcopy(book)
    doubled.cells[1:1] = copy.deepcopy(book.cells[1:2])
    doubled.cells[1].source, doubled.cells[1].id = "def double(n):\n    return 0", "copy"
    (tmp_path / "submitted" / "mia" / "week").mkdir(parents=True)
    nbformat.write(doubled, tmp_path / "submitted" / "mia" / "week" / "01_a.ipynb")
    config = Config({"CourseDirectory": {"root": str(tmp_path)}})
    plain = NbGraderAPI(config=config.copy())
    assert plain.generate_assignment("week")["success"] and not plain.autograde("week", "mia")["success"]
    configure(config)
    ours = NbGraderAPI(config=config)
    assert ours.autograde("week", "mia")["success"]
    with ours.gradebook as grades:
        assert [s.score for s in grades.assignment_submissions("week")] == [1]
    assert Execute().timeout == 30 and Execute(config=config).timeout == 600
