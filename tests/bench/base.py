"""What the shipped base must do, measured: general answers, each task untouched, and after adaptation.

    python tests/bench/base.py

Exact match on the test files, losses in nats a token, seconds of training on one thread. Exit code 1: a goal is missed.
"""

import sys

import torch

from minilora.config import LoRAConfig
from minilora.experiments import ATTENTION, MLP, adapt
from minilora.helpdesk import TASKS, evaluate, load_base, load_task

torch.set_num_threads(1)  # a second one gains little at this size
lora = LoRAConfig(8, 16, ATTENTION + MLP)
missed = []


def row(what: str, loss: float, exact: float, goal: str, ok: bool, seconds: float | None = None) -> None:
    took = f"{seconds:6.1f} s" if seconds else ""
    print(f"{what:<44} loss {loss:7.4f}  exact {exact:6.1%}  {took:>8}  {goal:<30} {'ok' if ok else 'MISSED'}",
          flush=True)
    missed.extend([what] * (not ok))


base = load_base()
score = evaluate(base, load_task("general").test)
row("base, general", *score, "at least 95%", score.exact >= 0.95)
score = evaluate(load_base("base_early"), load_task("general").test)
row("early base, general", *score, "a weak base: under 50%", score.exact < 0.5)
for task in TASKS[1:]:
    score = evaluate(base, load_task(task).test)
    row(f"base untouched, {task}", *score, "under 10%", score.exact < 0.1)
for task in ("tone", "ticket"):
    run = adapt(task, lora)
    row(f"LoRA rank 8, {task}", run.loss, run.exact, "at least 90% in under 60 s",
        run.exact >= 0.9 and run.log.seconds < 60, run.log.seconds)
    for weak in ("random", "base_early"):
        control = adapt(task, lora, base=weak)
        row(f"the same on {weak}, {task}", control.loss, control.exact, "under half of that",
            control.exact < run.exact / 2, control.log.seconds)
run = adapt("catalogue", lora)
row("LoRA rank 8, catalogue", run.loss, run.exact, "", True, run.log.seconds)
full = adapt("cipher", steps=600, lr=3e-3)
row("full fine-tuning, cipher", full.loss, full.exact, "", True, full.log.seconds)
thin = adapt("cipher", LoRAConfig(1, 2, ATTENTION + MLP), steps=600)
row("LoRA rank 1, cipher", thin.loss, thin.exact, "20 points below full",
    full.exact - thin.exact >= 0.2, thin.log.seconds)
sys.exit(bool(missed))
