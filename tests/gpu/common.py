"""What the measurements on a card share: how one is described, the card, the clock, and how a figure is held against
its prediction. A measurement is a `Benchmark`; run.py runs it item by item and writes what it finds."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "bench"), str(HERE.parent)]  # the benches' parts, and the tests' model configs
GIB, MIB = 2**30, 2**20
UNDER = 0.005  # the most by which a prediction may be too small


@dataclass(frozen=True)
class Benchmark:
    """One measurement.

    Attributes:
        items: dry -> the name of each row and what measures it: a dict for the record.
        goals: a record -> one line for each goal that its rows miss, with predictions computed anew where that is
        quick. columns: a row -> what a table shows of it. notes: a record -> lines to go below the table.
    """

    items: Callable[[bool], dict[str, Callable[[], dict]]]
    goals: Callable[[dict], list[str]]
    columns: Callable[[dict], dict[str, str]]
    notes: Callable[[dict], list[str]] = lambda record: []

    def misses(self, record: dict) -> list[str]:
        """What is wrong with a record: items that failed, and goals that were missed."""
        failed = [f"{row['name']}: {row['failed']}" for row in record["rows"] if "failed" in row]
        return failed + self.goals(record | {"rows": measured_rows(record)})


def measured_rows(record: dict) -> list[dict]:
    return [row for row in record["rows"] if not row.keys() & {"skipped", "failed"}]


class Skip(Exception):
    """An item that cannot be measured here, and why; the record keeps the reason."""


def device(dry: bool) -> str:
    return "cpu" if dry else "cuda"


def smi(what: str) -> str:
    """What nvidia-smi says of the card in use."""
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", "--id=0"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def used() -> int:
    """Bytes of the card's memory in use, by whomever."""
    return int(smi("memory.used")) * MIB


def machine(dry: bool) -> dict:
    """The head of a record."""
    head = {"dry": dry, "torch": torch.__version__, "date": date.today().isoformat()}
    if dry:
        return head | {"card": "none: a dry run on the CPU, with tiny shapes"}
    card = torch.cuda.get_device_properties(0)
    return head | {"card": card.name, "capability": [card.major, card.minor], "memory": card.total_memory,
                   "cuda": torch.version.cuda, "driver": smi("driver_version")}


def clock() -> float:
    """Seconds, once the card has done what it was told to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def off(what: str, predicted: float, measured: float, limit: float, under: float | None = UNDER) -> list[str]:
    """A line if the prediction is off by more than `limit`, or too small by more than `under`."""
    error = predicted / measured - 1
    if abs(error) > limit:
        return [f"{what}: {error:+.2%}, the goal is {limit:.0%}"]
    return [f"{what}: {error:+.2%}, too small by more than {under:.1%}"] if under is not None and -error > under else []
