"""The command line's frame: what holds for every command."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from minilora import __version__, cli, refusals
from minilora.cli import COMMANDS, main


def test_without_a_command_it_lists_them_all(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert COMMANDS and all(f"  {name} " in said for name in COMMANDS)


@pytest.mark.parametrize("arguments, said", [(["inspct"], "no command 'inspct', expected one of .*; near: inspect"),
                                             (["memory", "--model", "gpt2", "--bogus"], "minilora memory: .*--bogus")])
def test_a_wrong_word_is_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.search(said, err)


def test_it_says_its_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"minilora {__version__}\n"


def needs(package):
    def command(parser, arguments):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return type("room", (), {"models_command": staticmethod(command)})


@pytest.mark.parametrize("package, wanted", [
    ("matplotlib.figure", "matplotlib, which is not installed: pip install 'minilora[notebooks]'"),
    ("transformers", "transformers, which is not installed: pip install 'minilora[hf]'"),
    ("IPython", "IPython, which is not installed: pip install 'minilora[notebooks]'"),
    ("nbgrader", "nbgrader, which is not installed: pip install 'minilora[teach]'"),
    ("bitsandbytes", "bitsandbytes, which is not installed: pip install bitsandbytes")])
def test_a_package_that_is_not_there_is_one_line(package, wanted, monkeypatch, capsys):
    monkeypatch.setattr(cli, "import_module", lambda name: needs(package))
    assert main(["models"]) == 2
    assert capsys.readouterr() == ("", f"minilora models: this needs {wanted}\n")


def test_a_room_of_ours_that_is_not_there_is_no_missing_package(monkeypatch):
    monkeypatch.setattr(cli, "import_module", lambda name: needs("minilora.room"))
    with pytest.raises(ModuleNotFoundError, match="minilora.room"):
        main(["models"])


def test_every_extra_that_is_named_is_there():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for package, extra in refusals.EXTRAS.items():
        assert any(package.lower() in line.lower() for line in extras[extra]), (package, extra)


def test_a_reader_that_has_had_enough_is_no_error():
    run = subprocess.Popen([sys.executable, "-m", "minilora", "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert (run.stderr.read(), run.wait()) == (b"", 0)
    run.stderr.close()


@pytest.mark.parametrize("error, code, said", [
    (KeyboardInterrupt(), 130, "minilora models: interrupted"),
    (RecursionError("depth"), 2, "minilora models: something is nested too deeply: depth"),
    (MemoryError("of 4 GiB"), 2, "minilora models: there is not enough memory: of 4 GiB"),
    (ValueError("a\x1b[2J\nb" + "x" * 10**6), 2, None),
])
def test_every_end_is_one_line(error, code, said, monkeypatch, capsys):
    def broken(parser, arguments):
        raise error

    monkeypatch.setattr("minilora.memory.cli.models_command", broken)
    assert main(["models"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err[:-1].isprintable() and len(err) < 700
    assert said is None or err == said + "\n"
