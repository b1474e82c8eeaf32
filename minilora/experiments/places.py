"""Notebook 03: which modules to adapt."""

from ..config import LoRAConfig
from .run import ATTENTION, MLP, adapt, grid, sweep


@sweep
def targets() -> list[dict]:
    """Notebook 03: which modules to adapt, at (nearly) one budget of trainable parameters; full fine-tuning beside."""
    budgets = {"q": (("q_proj",), 16), "k": (("k_proj",), 16), "v": (("v_proj",), 16), "o": (("o_proj",), 16),
               "q, v": (("q_proj", "v_proj"), 8), "q, k, v, o": (ATTENTION, 4), "up": (("up_proj",), 8),
               "down": (("down_proj",), 8), "gate, up, down": (MLP, 3), "all": (ATTENTION + MLP, 2), "full": (None, 0)}
    rows = []
    for task, (name, (modules, rank)), seed in grid(("tone", "ticket"), budgets.items(), range(2)):
        run = adapt(task, modules and LoRAConfig(rank, 2 * rank, modules), steps=80, seed=seed)
        rows.append({"task": task, "targets": name, "rank": rank, "seed": seed, "trained": run.log.trained,
                     "loss": round(run.loss, 4), "exact": run.exact})
    return rows
