"""What every test starts from: no network, one thread, a fixed seed; memory that lies askew where that is asked for."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# MKL may choose its kernel by where a tensor lies in memory, and round differently. In this mode it does not: the same
# numbers give the same bits wherever they lie, and a test that asks for equal bits asks for what our code promises.
# MKL_CBWR= , empty, leaves MKL as it is.
os.environ.setdefault("MKL_CBWR", "AUTO")

import pytest
import torch
from shifted import ENVIRONMENT, Shifted

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--shift-memory", metavar="SEED", help="move every tensor 4 to 60 bytes off its boundary, at "
                     "random; tests of what lies in memory (bytes, traces, compiled code) are not for this. With "
                     "MKL_CBWR= (empty) MKL's kernels feel it, and what asks for equal bits fails rightly")


def pytest_configure(config):
    if seed := config.getoption("--shift-memory"):
        os.environ[ENVIRONMENT] = seed


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
