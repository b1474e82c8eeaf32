"""The calculator under the browser's Python, to the byte: reference counts are what the ledger lives on."""

import random

import page_pyodide
import pytest

from minilora.memory.models import FAMILIES, PRESETS
from minilora.memory.run import METHODS
from minilora.memory.stacks import STACKS


def sample() -> list[dict[str, str]]:
    """A model of every family that has a preset, with methods in turn and a stack; all: tests/bench/pyodide_equal.py."""
    draw, models = random.Random(0), {spec.family: name for name, spec in PRESETS.items()}
    assert len(models) > 6 and set(models) <= set(FAMILIES)
    states = [{"model": model, "method": METHODS[i % 3], "stack": stack, "seq": "256"} for i, (model, stack) in enumerate(
        (model, stack) for model in models.values() for stack in draw.sample(list(STACKS), 1))]
    return [*states, {"model": "llama-3-8b", "serve": "yes"}, {"model": "gpt2", "rank": "0"}]


@pytest.mark.skipif(page_pyodide.NODE is None or not page_pyodide.PYODIDE.is_dir(), reason="needs node, and Pyodide: npm ci")
def test_python_in_the_browser_counts_as_here():
    assert page_pyodide.differences(sample()) == []
