"""The command line's frame: what holds for every command."""

import re
import subprocess
import sys

import pytest

from minilora.__main__ import COMMANDS, main


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


def test_a_reader_that_has_had_enough_is_no_error():
    run = subprocess.Popen([sys.executable, "-m", "minilora", "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert (run.stderr.read(), run.wait()) == (b"", 0)
    run.stderr.close()
