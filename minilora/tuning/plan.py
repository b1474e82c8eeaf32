"""Before a run: what it needs on this device, whether that is there, and what would make it fit. The learning rate."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..memory.bill import Bill
from ..memory.cards import Card
from ..memory.fitting import FITS, NOT, Verdict, need, priced
from ..memory.models import ModelSpec
from ..memory.run import Training
from ..tables import bytes_text

# What notebook 06 measured at width 160 on its near task, with alpha 32 at every rank: LoRA's best rate, and how many
# times full fine-tuning's that is. By the power of the width that Thinking Machines give for Llama models, both fall
# with the model's width. Their rule (Tinker's documentation) is 10 * 5e-5 * (2000 / width)^0.781: 2.9e-4 at width
# 4096, where ours has 2.4e-4. For Qwen their power is 0.0775, hardly a fall: for a wide Qwen ours is low. Measured
# here at width 160 alone.
WIDTH, LORA_RATE, ABOVE_FULL, POWER, ALPHA = 160, 3e-3, 5, 0.78, 32


def learning_rate(method: str, hidden: int) -> float:
    """The peak learning rate by the course's rule, rounded to two digits: the same for every rank."""
    rate = LORA_RATE * (WIDTH / hidden) ** POWER / (ABOVE_FULL if method == "full" else 1)
    return float(f"{rate:.1e}")


@dataclass(frozen=True)
class Plan:
    """What a run will take, priced as our decoder's. What runs is transformers': beside the live bytes of its steps
    plans are 1.03 to 1.20 in fp32 and 0.89 to 1.01 in bf16 (tests/bench/tune_plan.py: Llama and Qwen2 of width 256, on
    a CPU).

    Attributes:
        bill: the calculator's, or None where it does not know the model's family; then why says so.
        verdict: against this device's memory, or None where nobody knows how much that has.
        ways: up to three changes, as options, each of which makes a run fit that does not.
    """

    run: Training
    bill: Bill | None
    verdict: Verdict | None
    ways: tuple[str, ...] = ()
    why: str = ""

    @property
    def fits(self) -> bool:
        return self.verdict is None or self.verdict.answer != NOT

    def __str__(self):
        if self.bill is None:
            return f"no plan: {self.why}"
        said = f"peak {bytes_text(self.bill.peak)} at: {self.bill.moment}"
        if self.verdict is None:
            return said + " (how much memory there is nobody knows here)"
        low, high = self.verdict.need
        said += (f"; {bytes_text(low)} to {bytes_text(high)} of {bytes_text(self.verdict.usable[0])}: "
                 f"{self.verdict.answer}")
        return said

    def refusal(self) -> str:
        """Why this run is not begun, and what would make it fit."""
        ways = "; ".join(f"({i}) {way}" for i, way in enumerate(self.ways, 1)) or "no change that we know"
        return (f"the run does not fit: it needs {bytes_text(self.verdict.need[0])} and there are "
                f"{bytes_text(self.verdict.usable[1])}. What would make it fit: {ways}. --anyway tries all the same")


def make_plan(config: Any, name: str, run: Training, device: torch.device, budget: int | None = None) -> Plan:
    """The plan of a run on a model with that config. `budget`: plan with so many bytes, not with what is free.

    Raises:
        ValueError: what this model cannot do: a target it lacks, a rank or sequence too large.
    """
    try:
        spec = ModelSpec.from_config(config.to_dict() | {"_name_or_path": name})
    except ValueError as error:
        return Plan(run, None, None, why=str(error))
    bill = priced(spec, run)
    room = budget or memory_of(device)
    if room is None:
        return Plan(run, bill, None)
    judged = lambda changed: judge_room(priced(spec, changed), device, room)
    verdict = judged(run)
    ways = () if verdict.answer == FITS else tuple(ways_to_fit(spec, run, lambda r: judged(r).answer))
    return Plan(run, bill, verdict, ways)


def judge_room(bill: Bill, device: torch.device, room: int) -> Verdict:
    """A bill against a device that has `room` bytes."""
    card = Card(str(device), room, room, 1.0, 1.0)
    return Verdict(card, need(bill), card.usable if device.type == "cuda" else (room, room))


def memory_of(device: torch.device) -> int | None:
    """Bytes that a run may come to hold there: all that a card has; of the CPU's memory, what is free."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def held_now(device: torch.device) -> int | None:
    """The most bytes held so far on a card; without one, what of this process's memory is resident and no file's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return None


# ---------------------------------------------------------------- what would make it fit

# option -> what it changes in the run; {} where it changes nothing
MOVES: dict[str, Callable[[Training, ModelSpec], dict]] = {
    "--method": lambda r, s: {"method": "lora" if r.method == "full" else "qlora"} if r.method != "qlora" else {},
    "--checkpointing": lambda r, s: {} if r.checkpointing else {"checkpointing": True},
    "--batch": lambda r, s: {"batch": r.batch // 2, "accumulation": 2 * r.accumulation} if r.batch > 1 else {},
    "--seq": lambda r, s: {"seq": r.seq // 2} if r.seq > 128 else {},
    "--dtype": lambda r, s: {"dtype": "bfloat16"} if r.dtype == "float32" else {},
    "--rank": lambda r, s: {"rank": r.rank // 2} if r.rank > 1 and r.method != "full" else {},
    "--targets": lambda r, s: {"target_modules": s.layout.targets} if r.target_modules == "all-linear"
                 and r.method != "full" else {},
}
SAYS = {"method": "--method {}", "checkpointing": "--checkpointing", "batch": "--batch {}",
        "accumulation": "--accumulation {}", "seq": "--seq {}", "dtype": "--dtype {}", "rank": "--rank {}",
        "target_modules": "--targets {}"}


def ways_to_fit(spec: ModelSpec, run: Training, answer: Callable[[Training], str], most: int = 3) -> Iterator[str]:
    """Up to three changes, the smallest first: each option alone where that is enough, else with others."""
    found: list[tuple[int, int, str]] = []
    for first in MOVES:
        if changed := reach(spec, run, first, answer):
            options, saved = words(run, changed), priced(spec, run).peak - priced(spec, changed).peak
            found.append((options.count("--"), saved, options))
    yield from list(dict.fromkeys(options for _, _, options in sorted(found)))[:most]


def reach(spec: ModelSpec, run: Training, first: str, answer: Callable[[Training], str]) -> Training | None:
    """The run with one option changed until it fits; where that is not enough, with whatever saves most after it."""
    now = moved(spec, run, first)
    while now is not None and answer(now) != FITS:
        now = moved(spec, now, first) or next(iter(sorted(
            filter(None, (moved(spec, now, other) for other in MOVES)), key=lambda r: priced(spec, r).peak)), None)
    return now


def moved(spec: ModelSpec, run: Training, option: str) -> Training | None:
    """The run one step along an option, if that makes it smaller."""
    change = MOVES[option](run, spec)
    try:
        changed = replace(run, **change) if change else None
        return changed if changed and priced(spec, changed).peak < priced(spec, run).peak else None
    except ValueError:  # this does not go with this model
        return None


def words(run: Training, changed: Training) -> str:
    """The options that make one run of another."""
    different = [name for name in SAYS if getattr(run, name) != getattr(changed, name)]
    value = lambda name: ",".join(v) if isinstance(v := getattr(changed, name), tuple) else v
    return " ".join(SAYS[name].format(value(name)) for name in different)



def less(plan: Plan) -> list[str]:
    """Up to three changes that take a quarter off the peak, for a run that found too little memory all the same."""
    if plan.bill is None:
        return []
    spec, most = plan.bill.spec, plan.bill.peak * 3 // 4
    return list(ways_to_fit(spec, plan.run, lambda run: FITS if priced(spec, run).peak <= most else NOT))
