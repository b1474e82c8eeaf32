"""What every test starts from: no network, one thread, a fixed seed; memory that lies askew where that is asked for.

Large tables are run by a sample that meets every kind of cell; `pytest tests --whole` runs all of them.
"""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
# MKL may choose its kernel by where a tensor lies in memory, and round differently. In this mode it does not: the same
# numbers give the same bits wherever they lie, and a test that asks for equal bits asks for what our code promises.
# MKL_CBWR= , empty, leaves MKL as it is.
os.environ.setdefault("MKL_CBWR", "AUTO")

import pytest
import torch
from shifted import ENVIRONMENT, Shifted

torch.set_num_threads(1)

# A shell that starts a command in the background lets it ignore Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--shift-memory", metavar="SEED", help="move every tensor 4 to 60 bytes off its boundary, at "
                     "random; tests of what lies in memory (bytes, traces, compiled code) are not for this. With "
                     "MKL_CBWR= (empty) MKL's kernels feel it, and what asks for equal bits fails rightly")
    parser.addoption("--whole", action="store_true", help="all of the large tables, minutes each, not the sample that "
                     "meets every kind of cell")


def pytest_configure(config):
    config.addinivalue_line("markers", "whole: a cell of a large table that --whole alone runs")
    if seed := config.getoption("--shift-memory"):
        os.environ[ENVIRONMENT] = seed


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--whole"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("whole")])
        items[:] = [item for item in items if not item.get_closest_marker("whole")]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def memory(seeded):
    """On a boundary as ever, or shifted."""
    seed = os.environ.get(ENVIRONMENT)
    if not seed:
        yield
        return
    with Shifted(int(seed)):
        yield
