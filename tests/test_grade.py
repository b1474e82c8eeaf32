"""Grading a folder: points for what is right, a message for what is not, nothing for a trick, and nothing is lost
whatever comes in."""

import contextlib
import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cheating_submissions import ALL, CHEATS, NEED_WALLS

from minilora.grade import COLUMNS, cell, definitions, exercises, main, read, shown
from minilora.grading.nursery import Nursery, environment

FOLDER = Path(__file__).parents[1] / "notebooks"
SOLVED = FOLDER / "02_two_thin_matrices.ipynb"
NAMES = ("count_parameters", "merged_weight", "best_rank_r_error", "first_update")
MERGED = "def merged_weight(W0, A, B, alpha):\n    return W0 + alpha / len(A) * B @ A"


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as one:
        yield one


@pytest.fixture(autouse=True)
def one_nursery(nursery, monkeypatch):
    """It takes seconds to start, so these tests share it."""
    monkeypatch.setattr("minilora.grade.Nursery", lambda: contextlib.nullcontext(nursery))


def submit(folder, student, changes, name=SOLVED.name):
    """The solved notebook, its imports, exercises and checks alone, with some solution cells replaced."""
    book = json.loads(SOLVED.read_text())
    book["cells"] = [c for c in book["cells"] if c["cell_type"] == "code"
                     and ("nbgrader" in c["metadata"] or c["source"][0].startswith("import"))]
    for part in book["cells"]:
        exercise = part["metadata"].get("nbgrader", {}).get("grade_id")
        if exercise in changes:
            part["source"], part["metadata"] = changes[exercise], {}  # an editor may lose the metadata
    write(folder, student, book, name)


def write(folder, student, book, name=SOLVED.name):
    (folder / student).mkdir(exist_ok=True, parents=True)
    (folder / student / name).write_text(json.dumps(book))


def code(folder, student, *cells, name=SOLVED.name):
    """A small notebook of code cells alone."""
    write(folder, student, {"cells": [{"cell_type": "code", "metadata": {}, "source": c} for c in cells],
                            "metadata": {}, "nbformat": 4, "nbformat_minor": 5}, name)


def graded(folder, *options, table=None):
    """(student, exercise) -> (points, message), from the CSV."""
    table = table or folder / "grades.csv"
    assert main([str(folder), "--csv", str(table), *options]) == 0
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    return {(row["student"], row["exercise"]): (int(row["points"]), row["message"]) for row in rows}


def points(found, student):
    return sum(n for (who, _), (n, _) in found.items() if who == student)


def flags(folder):
    with open(folder / "grades.csv", newline="") as file:
        return {(row["student"], row["notebook"]): row["flags"] for row in csv.DictReader(file)}


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
    assert tuple(exercises(SOLVED)) == NAMES and len(found) == 4 * 4 + 1
    assert all(found["copied", name] == (1, "ok") for name in NAMES)
    assert [found["wrong", name][0] for name in NAMES] == [int(name != "merged_weight") for name in NAMES]
    assert "alpha" in found["wrong", "merged_weight"][1]
    assert found["odd", "count_parameters"] == found["odd", "first_update"] == (1, "ok")
    assert found["odd", "merged_weight"] == found["odd", "best_rank_r_error"]
    assert found["odd", "merged_weight"] == (0, "there is no such function or class in the notebook")
    assert all(n == 0 and "not a notebook" in message for n, message in (found["empty", name] for name in NAMES))
    assert found["99_none", ""][0] == 0 and "not a notebook" in found["99_none", ""][1]
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


def test_every_solution_is_right_in_a_process_of_its_own_on_inputs_that_nobody_foresees(tmp_path):
    """The positive control, over all notebooks; their student versions earn nothing."""
    from minilora.release import release

    (tmp_path / "in" / "solved").mkdir(parents=True)
    for path in FOLDER.glob("*.ipynb"):
        (tmp_path / "in" / "solved" / path.name).write_bytes(path.read_bytes())
    release(FOLDER, tmp_path / "in" / "blank")
    found = graded(tmp_path / "in", table=tmp_path / "grades.csv")
    count = sum(len(exercises(path)) for path in FOLDER.glob("*.ipynb"))
    assert len(found) == 2 * count and count >= 48
    assert {k: m for k, (n, m) in found.items() if k[0] == "solved" and n != 1} == {}
    assert {k: m for k, (n, m) in found.items() if k[0] == "blank" and "is not written yet" not in m} == {}
    assert points(found, "solved") == count and points(found, "blank") == 0


# ---------------------------------------------------------------- tricks


def table_of_fixed_answers():
    """A submission that knows the answers to all inputs that the notebook tries, by their sizes and numbers."""
    from minilora.grading.wire import encode

    checks, known = exercises(SOLVED), {}
    for name, check in checks.items():
        for case in check.cases:
            arguments = check.arguments(case)
            value = check.reference(*arguments)
            known[name, repr(encode(arguments))] = encode(value)
            shapes = [tuple(a.shape) if hasattr(a, "shape") else a for a in arguments]
            known[name, repr(shapes)] = encode(value)  # where the sizes alone give the case away
    return ("from minilora.grading.wire import decode, encode\n"
            f"def known():\n    return {known!r}\n"
            "def trick(name, *a):\n"
            "    shapes = [tuple(x.shape) if hasattr(x, 'shape') else x for x in a]\n"
            "    found = known().get((name, repr(encode(a)))) or known().get((name, repr(shapes)))\n"
            "    return 0.0 if found is None else decode(found)\n" + ALL)


def test_no_trick_earns_a_point_and_none_harms_another(tmp_path, nursery):
    folder = tmp_path / "with a space"
    submit(folder, "ana", {})  # before and after the others, and identical
    submit(folder, "zoe", {})
    tricks = CHEATS.keys() - (NEED_WALLS if nursery.partial else set())
    for name in tricks:
        code(folder, name, CHEATS[name])
    code(folder, "table", table_of_fixed_answers())
    (folder / "link").mkdir()
    (folder / "link" / SOLVED.name).symlink_to(folder / "ana" / SOLVED.name)
    (folder / "linked_folder").symlink_to(folder / "ana", target_is_directory=True)
    os.mkfifo(folder / "link" / "02_pipe.ipynb")
    before = {path: path.read_bytes() for path in folder.glob("*/*.ipynb") if path.is_file()}
    found = graded(folder, "--seconds", "20", table=tmp_path / "grades.csv")
    assert len(CHEATS) >= 38 and len(tricks) + 3 >= 30
    earned = {student: n for student in {who for who, _ in found} if (n := points(found, student))}
    assert earned == {"ana": 4, "zoe": 4}
    assert before == {path: path.read_bytes() for path in before} and not Path("/tmp/owned").exists()
    assert "symbolic link" in found["link", "merged_weight"][1] and "symbolic link" in found["linked_folder", ""][1]
    assert all("\n" not in message and message.isprintable() and len(message) < 700 for _, message in found.values())


def test_a_table_would_earn_points_if_the_inputs_could_be_foreseen(tmp_path, monkeypatch):
    """The control of the table above: with the notebook's inputs alone it is full marks."""
    monkeypatch.setattr("minilora.grade.DRAWN", 0)
    code(tmp_path, "table", table_of_fixed_answers())
    assert points(graded(tmp_path), "table") == 4


def test_nothing_is_fetched_and_nothing_is_left_for_a_friend(tmp_path, nursery):
    """One submission leaves the solution wherever it can, one asks a server for it; a friend looks for both."""
    server = socket.create_server(("127.0.0.1", 0))
    asked = []

    def serve():
        while True:
            try:
                link, _ = server.accept()
            except OSError:
                return
            asked.append(link)
            link.sendall(MERGED.encode())
            link.close()

    threading.Thread(target=serve, daemon=True).start()
    places = f"['/tmp', '/var/tmp', '/dev/shm', os.path.expanduser('~'), os.getcwd(), {str(tmp_path)!r}]"
    code(tmp_path, "a_leaves", f"import os\ndef merged_weight(W0, A, B, alpha):\n    for p in {places}:\n"
         f"        try:\n            open(p + '/left.py', 'w').write({MERGED!r})\n        except OSError:\n"
         "            pass\n    return 0")
    code(tmp_path, "b_finds", f"import os\ndef merged_weight(*a):\n    for p in {places}:\n        try:\n"
         "            names = {}\n            exec(open(p + '/left.py').read(), names)\n"
         "            return names['merged_weight'](*a)\n        except OSError:\n            pass")
    code(tmp_path, "c_asks", "import socket\ndef merged_weight(*a):\n    names = {}\n"
         f"    exec(socket.create_connection(('127.0.0.1', {server.getsockname()[1]})).recv(9999), names)\n"
         "    return names['merged_weight'](*a)")
    if nursery.partial:
        pytest.skip(f"the kernel gives no namespaces here: {nursery.partial}")
    found = graded(tmp_path)
    server.close()
    assert [points(found, s) for s in ("a_leaves", "b_finds", "c_asks")] == [0, 0, 0] and not asked
    assert not (tmp_path / "left.py").exists()


def test_a_neighbour_that_starts_all_the_processes_it_can_takes_none_from_others(tmp_path, nursery):
    if nursery.partial:
        pytest.skip(f"the kernel gives no namespaces here: {nursery.partial}")
    bomb = "import os, time\ndef merged_weight(*a):\n    try:\n        while os.fork():\n            pass\n" \
           "    except OSError:\n        pass\n    time.sleep(60)"
    threads = "import threading, time\ndef merged_weight(W0, A, B, alpha, wait=time.sleep(4)):\n" \
              "    some = [threading.Thread(target=time.sleep, args=(0.02,)) for _ in range(20)]\n" \
              "    [t.start() for t in some]\n    [t.join() for t in some]\n    return W0 + alpha / len(A) * B @ A"
    for student, source in {"a_bomb": bomb, "b_works": threads, "c_works": threads}.items():
        code(tmp_path, student, source)
    found = graded(tmp_path, "--seconds", "8")
    assert [points(found, s) for s in ("a_bomb", "b_works", "c_works")] == [0, 1, 1]


def test_the_teachers_environment_stays_the_teachers(monkeypatch):
    monkeypatch.setenv("API_TOKEN", "secret")
    assert "secret" not in environment().values() and environment()["PATH"] == os.environ["PATH"]


def test_partial_isolation_is_said_once_and_grades_all_the_same(tmp_path, monkeypatch, capsys):
    submit(tmp_path, "ana", {})
    code(tmp_path, "exits", "import os\ndef merged_weight(*a):\n    os._exit(0)")
    monkeypatch.setattr("minilora.grade.Nursery", lambda: Nursery(alone=False))
    found = graded(tmp_path)
    assert points(found, "ana") == 4 and points(found, "exits") == 0
    assert capsys.readouterr().err.count("isolation is partial") == 1


# ---------------------------------------------------------------- what a teacher should look at


def test_copies_links_renamed_and_doubled_work_are_flagged_by_name(tmp_path, capsys):
    other = MERGED.replace("W0 + alpha / len(A) * B @ A", "W0.clone().add(B @ A, alpha=alpha / A.shape[0])")
    submit(tmp_path, "ana", {"merged_weight": other})
    submit(tmp_path, "eve", {"merged_weight": other + "  # mine"})
    submit(tmp_path, "bob", {}, "My copy.ipynb")
    code(tmp_path, "dan", MERGED, MERGED, name="03_other.ipynb")
    submit(tmp_path, "zed", {})
    submit(tmp_path, "zed", {}, "02_again.ipynb")
    code(tmp_path, "lib", "from minilora.spectrum import energy\nimport gc\ndef best_rank_r_error(delta, rank):\n"
         "    return energy(delta), gc.get_objects(), delta.__dict__")
    found = graded(tmp_path)
    seen = flags(tmp_path)
    assert "the same code as eve/02_two" in seen["ana", SOLVED.name]
    assert "the same code as ana/02_two" in seen["eve", SOLVED.name]
    assert seen["bob", "My copy.ipynb"].startswith("renamed: its cells are those of notebook 02")
    assert "published solution" in seen["bob", "My copy.ipynb"] and points(found, "bob") == 4
    assert "merged_weight stands in 2 cells" in seen["dan", "03_other.ipynb"]
    assert "no cell defines count_parameters, best_rank_r_error, first_update" in seen["dan", "03_other.ipynb"]
    assert found["dan", "merged_weight"] == (1, "ok")
    assert "renamed: the released file is 02_two" in seen["zed", "02_again.ipynb"]
    assert "uses minilora.spectrum.energy" in seen["lib", SOLVED.name]
    assert "reaches outside of its arguments: __dict__, gc" in seen["lib", SOLVED.name]
    out = capsys.readouterr().out
    assert "zed    4 of 4" in out and re.search("  eve/02_two_thin_matrices.ipynb: .*the same code as ana", out)


def test_nobodys_own_work_is_flagged(tmp_path):
    submit(tmp_path, "ana", {"merged_weight": MERGED.replace("W0 +", "W0 + 1 *")})
    graded(tmp_path)
    lost = flags(tmp_path)["ana", SOLVED.name]
    assert lost == "cells missing: merged_weight"  # its marks, which this test's editor lost


def test_a_seed_repeats_a_run_and_a_fresh_one_is_drawn_each_time(tmp_path, capsys):
    code(tmp_path, "ana", "def merged_weight(W0, A, B, alpha):\n    return W0 + W0.sum() * (W0.shape != (7, 15))")

    def run(*options):
        return graded(tmp_path, *options)["ana", "merged_weight"], re.search(r"--seed (\d+)",
                                                                             capsys.readouterr().out)[1]

    (first, seed), (_, other) = run(), run()
    assert seed != other and run("--seed", seed) == (first, seed)


# ---------------------------------------------------------------- the command


def test_cells_of_the_table_are_no_formulas_and_names_are_shown_without_their_tricks(tmp_path, capsys):
    assert [cell(t) for t in ("=1+1", "+1", "-2", "@x", "ok", 3)] == ["'=1+1", "'+1", "'-2", "'@x", "ok", "3"]
    assert cell("\t=1") == "\\t=1" and shown("a\n\x1b[2J\u202eb") == "a\\n\\x1b[2J\\u202eb"
    code(tmp_path, "=HYPERLINK(1)\x1b[2J", MERGED)
    found = graded(tmp_path)
    assert ("'=HYPERLINK(1)\\x1b[2J", "merged_weight") in found and "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("options, said", [
    (["--seconds", "-3"], "-3: expected a number of seconds above 0"), (["--seconds", "nan"], "seconds above 0"),
    (["--seconds", "soon"], "invalid positive value: 'soon'"), (["--seed", "x"], "invalid int value"),
    (["--csv", "nowhere/at/all.csv"], "cannot write nowhere/at/all.csv: No such file or directory"),
    (["--csv", "."], "cannot write .: Is a directory")])
def test_a_wrong_option_is_one_clear_line(tmp_path, capsys, options, said):
    code(tmp_path, "ana", MERGED)
    assert main([str(tmp_path), *options]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and out == ""


def test_without_ipython_grading_refuses(tmp_path, capsys, monkeypatch):
    code(tmp_path, "ana", MERGED)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "IPython" else find(name, *a))
    assert main([str(tmp_path), "--csv", str(tmp_path / "g.csv")]) == 2
    assert capsys.readouterr().err == ("grading needs IPython, which runs the cells of a notebook: "
                                       "pip install ipython\n")
    assert not (tmp_path / "g.csv").exists()


def test_a_folder_without_notebooks_is_one_clear_error(tmp_path):
    done = subprocess.run([sys.executable, "-m", "minilora.grade", tmp_path / "none"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"no notebooks in {tmp_path / 'none'}\n")


def test_a_checkout_in_the_folder_for_temporary_files_grades_too(tmp_path):
    """Inside, a submission has a folder of its own to write to, which must not lie over the package."""
    here = tmp_path / "checkout"
    for name in ("minilora", "data"):
        shutil.copytree(FOLDER.parent / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))
    (here / "notebooks").symlink_to(FOLDER)
    submit(tmp_path / "in", "own", {"merged_weight": f"from minilora import variants\n{MERGED}"})  # read when imported
    said = subprocess.run([sys.executable, "-m", "minilora.grade", str(tmp_path / "in")], cwd=here, text=True,
                          env=os.environ | {"PYTHONPATH": str(here), "TMPDIR": str(tmp_path)}, capture_output=True)
    assert said.returncode == 0 and "own    4 of 4" in said.stdout, said.stdout + said.stderr


def test_stopped_by_ctrl_c_it_keeps_what_is_graded_and_leaves_no_process(tmp_path):
    submit(tmp_path, "a_done", {})
    submit(tmp_path, "b_endless", {"merged_weight": "def merged_weight(W0, A, B, alpha):\n    while True:\n        pass"})
    process = subprocess.Popen([sys.executable, "-m", "minilora.grade", str(tmp_path), "--seconds", "600",
                                "--csv", str(tmp_path / "grades.csv")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "grades.csv").exists() or "a_done" not in (tmp_path / "grades.csv").read_text():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        born = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and len(born) >= 1
    assert said.splitlines()[-1].endswith(f"stopped; what was graded stands in {tmp_path / 'grades.csv'}")
    assert "Traceback" not in said
    until = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in born):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert (tmp_path / "grades.csv").read_text().count("a_done") == 4


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    said = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children, found = {}, [pid]
    for line in said.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    for one in found:
        found += children.get(one, [])
    return found[1:]
