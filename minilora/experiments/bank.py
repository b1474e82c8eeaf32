"""Notebook 09: every adapter on every task and base."""

import copy
from pathlib import Path

from tqdm.auto import tqdm

from ..adapters import load_adapter, save_adapter
from ..config import LoRAConfig
from ..helpdesk import TASKS, evaluate, load_base, load_task
from ..llama import Llama
from ..shipped import DATA, written
from .run import ATTENTION, MLP, adapt, grid, measured, sweep


@sweep
def adapters(folder: Path | None = None) -> list[dict]:
    """Notebooks 08, 09 and 13: five small adapters, each scored on its own task and base, written to data/adapters/
    (or to adapters/ in `folder`)."""
    rows, folder = [], written(folder, "the adapters") / "adapters"
    for name, base in tqdm((("tone", "base"), ("ticket", "base"), ("catalogue", "base"), ("cipher", "base"),
                            ("tone_early", "base_early"))):
        run = adapt(name.removesuffix("_early"), LoRAConfig(2, 4, ATTENTION + MLP), base=base)
        save_adapter(run.model, folder / name)
        rows.append({"adapter": name, "base": base, "rank": 2, "trained": run.log.trained, "loss": round(run.loss, 4),
                     "exact": run.exact})
    return rows


def next_base() -> Llama:
    """The base's next version, as a desk may make one: 20 steps of full fine-tuning on the catalogue."""
    return adapt("catalogue", steps=20).model


@sweep
def combinations() -> list[dict]:
    """Notebook 09: the base alone ("none") and every adapter of data/adapters/, on every base and every task."""
    rows, bases = [], {"base": load_base(), "base_next": next_base(), "base_early": load_base("base_early")}
    shelf = ("none", *(row["adapter"] for row in measured("adapters")["rows"]))
    for base, adapter, task in grid(bases, shelf, TASKS):
        model = copy.deepcopy(bases[base])
        if adapter != "none":
            load_adapter(model, DATA / "adapters" / adapter, any_base=True)
        loss, exact = evaluate(model, load_task(task).test)
        rows.append({"base": base, "adapter": adapter, "task": task, "loss": round(loss, 4), "exact": exact})
    return rows
