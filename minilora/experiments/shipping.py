"""Notebook 13: candidates for shipping."""

from ..config import LoRAConfig
from ..helpdesk import evaluate, load_task
from .run import EVERYWHERE, Run, adapt, grid, rounded_row, sweep

CANDIDATES = {  # name -> modules, rank, base
    "q and v, rank 1": (("q_proj", "v_proj"), 1, "base"),
    "q and v, rank 8": (("q_proj", "v_proj"), 8, "base"),
    "all, rank 1": (EVERYWHERE, 1, "base"),
    "all, rank 2": (EVERYWHERE, 2, "base"),
    "all, rank 8": (EVERYWHERE, 8, "base"),
    "all, rank 2, random weights": (EVERYWHERE, 2, "random"),
}


def candidate(task: str, name: str, seed: int = 0) -> tuple[Run, dict]:
    """A run of one of `CANDIDATES`, and its row: its size and its scores on the validation file, none on the test."""
    modules, rank, base = CANDIDATES[name]
    run = adapt(task, LoRAConfig(rank, 2 * rank, modules), base=base, steps=60, seed=seed)
    validation = load_task(task).validation
    loss, exact = evaluate(run.model, validation)
    return run, rounded_row({"task": task, "candidate": name, "rank": rank, "seed": seed, "trained": run.log.trained,
                             "loss": loss, "right": round(exact * len(validation)), "of": len(validation)})


@sweep
def candidates() -> list[dict]:
    """Notebook 13: ranks and targets to choose from, with the control on random weights, by the validation file."""
    return [candidate(task, name, seed)[1] for task, name, seed in grid(("tone", "ticket"), CANDIDATES, range(2))]
