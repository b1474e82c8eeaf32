"""The runner of notebooks: what it reports, what it refuses, and that it leaves files alone unless told."""

import nbformat
import pytest
import run_notebooks
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from run_notebooks import main

GOOD = ["import os\nprint(os.path.basename(os.getcwd()))", "n = 2\nn", "kept = bytearray(300 * 2**20)\ndel kept"]


@pytest.fixture
def write(tmp_path):
    def write(name, *sources):
        cells = [new_markdown_cell("A title."), *map(new_code_cell, sources)]
        nbformat.write(new_notebook(cells=cells, metadata={"toc": 1}), tmp_path / name)
        return tmp_path / name
    return write


def test_two_notebooks_a_good_one_and_one_that_connects(write, capsys):
    good = write("01_good.ipynb", *GOOD)
    bad = write("02_bad.ipynb", "n = 1", "import urllib.request\nurllib.request.urlopen('http://192.0.2.1')", "n = 3")
    before = good.read_bytes(), bad.read_bytes()
    assert main([str(good), str(bad)]) == 1
    lines = capsys.readouterr().out.splitlines()
    name, cells, seconds, peak, result = lines[1].split()
    assert (name, cells, result) == ("01_good", "3", "ok") and float(seconds) > 0 and 300 < float(peak) < 600
    assert lines[2].split()[::4] == ["02_bad", "FAILED"] and lines[3].endswith("1 of 2 ok")
    assert lines[4] == "budget of 90 s and 2048 MiB a notebook: kept by all"
    assert lines[5].startswith("02_bad: code cell 2, `import urllib.request`: URLError")
    assert "must run without a network" in lines[5]
    assert (good.read_bytes(), bad.read_bytes()) == before


def test_inplace_writes_clean_outputs_back_and_refuses_stderr(write, capsys):
    good, loud = write("01_good.ipynb", *GOOD), write("02_loud.ipynb", "import sys\nsys.stderr.write('watch out')")
    before = loud.read_bytes()
    assert main([str(good), str(loud), "--inplace"]) == 1
    assert "02_loud: code cell 1 writes to stderr: watch out" in capsys.readouterr().out
    assert loud.read_bytes() == before
    nb = nbformat.read(good, as_version=4)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3] and code[1].outputs[0].execution_count == 2
    assert code[0].outputs[0].text == good.parent.name + "\n" and all(cell.metadata == {} for cell in nb.cells)
    assert set(nb.metadata) == {"kernelspec", "language_info"} and nb.metadata.language_info == {"name": "python"}


def test_a_notebook_that_is_not_there(capsys):
    assert main(["99"]) == 2
    assert "no notebook '99'" in capsys.readouterr().err


def test_a_notebook_without_its_extras_is_left_out_unless_asked_for(write, capsys, monkeypatch):
    good = write("01_good.ipynb", "n = 1")
    real = write("14_real.ipynb", "import no_such_package")
    monkeypatch.setattr(run_notebooks, "FOLDER", good.parent)
    monkeypatch.setattr(run_notebooks, "EXTRAS", {"14": ("torch", "no_such_package")})
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("1 of 1 ok") and "14_real" not in "".join(lines[:-1])
    assert lines[-1] == "14_real: left out, it needs no_such_package (requirements-dev.txt)"
    assert main(["14"]) == 1
    assert "No module named 'no_such_package'" in capsys.readouterr().out
    monkeypatch.setattr(run_notebooks, "EXTRAS", {"14": ("torch",)})
    real.write_bytes(good.read_bytes())
    assert main([]) == 0
    assert "2 of 2 ok" in capsys.readouterr().out
