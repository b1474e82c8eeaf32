"""What a type checker says of a caller's mistakes: the public names are no `Any`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import minilora

ROOT = Path(__file__).parents[1]
PROGRAM = """
from minilora import LoRAConfig, inject, plan
from minilora.memory import ModelSpec, Training, estimate

config = LoRAConfig(rank=8, alpha=16)
peak: int = estimate(ModelSpec.preset("llama-3-8b"), Training(method="qlora")).peak
wrong = LoRAConfig(rnk="eight")
plan(config)
inject("model", config)
"""


def test_the_public_names_are_those_that_are_looked_up():
    assert minilora.__all__ == sorted(minilora._ROOM)


@pytest.mark.skipif(not shutil.which("pyright", path=Path(sys.executable).parent), reason="needs pyright")
def test_a_wrong_argument_is_an_error_to_a_type_checker(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{ROOT.as_posix()}"], "include": ["program.py"]}}')
    done = subprocess.run([Path(sys.executable).with_name("pyright"), "-p", tmp_path, "--pythonpath", sys.executable],
                          capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if " - error: " in line]
    assert done.returncode == 1 and [int(line.split(":")[1]) for line in errors] == [7, 8, 9], done.stdout
    assert 'No parameter named "rnk"' in errors[0]
