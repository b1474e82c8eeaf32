"""Notebook 07: faults and their symptoms."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from tqdm.auto import tqdm

from ..adapters import fingerprint, load_adapter, save_adapter
from ..config import LoRAConfig
from ..helpdesk import evaluate, load_base, load_task
from ..injection import lora_layers
from ..train import Log
from .run import EVERYWHERE, adapt, grid, rounded_row, sweep

HEALTHY = LoRAConfig(8, 16, EVERYWHERE)


def zero_A(model: nn.Module) -> None:
    for layer in lora_layers(model).values():
        nn.init.zeros_(layer.lora_A)


def unfreeze(model: nn.Module) -> None:
    model.requires_grad_(True)


def forget_alpha(folder: Path) -> None:
    """Drop alpha from an adapter's file; every reader then takes PEFT's default of 8."""
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    del settings["lora_alpha"]
    path.write_text(json.dumps(settings))


FAULTS = {  # what differs from the healthy run: arguments of `examine`
    "healthy": {},
    "rank": {"config": LoRAConfig(1, 2, EVERYWHERE)},
    "modules": {"config": LoRAConfig(8, 16, ("q_proj",))},
    "base": {"base": "base_early"},
    "zeros": {"prepare": zero_A},
    "unfrozen": {"prepare": unfreeze},
    "scale": {"spoil": forget_alpha},
}


def examine(task: str = "catalogue", config: LoRAConfig = HEALTHY, *, base: str = "base",
            prepare: Callable[[nn.Module], None] | None = None, spoil: Callable[[Path], None] | None = None,
            steps: int = 100, seed: int = 0) -> dict:
    """Train an adapter, save it, load it on a fresh base, and note what a doctor would ask for.

    Args:
        prepare: as in `adapt`.
        spoil: called with the adapter's folder after it was saved.

    Returns:
        modules, trained: adapted modules, trained parameters.
        loss: of every step, nats a token.
        grad_A, grad_B: mean over the steps of the gradient's norm over all A, over all B, before clipping.
        update: mean over the modules of ||s B A||_F / ||W||_F.
        base_changed: whether the trained model's base has another fingerprint than before.
        exact: of the model as trained, on the test file. served: of the file loaded on a fresh base.
        base_exact: of the base on the general test file.
    """
    norms = []

    def watch(step: int, model: nn.Module, log: Log) -> None:
        unclip = max(1.0, log.grad_norm[-1])  # train clips at 1
        layers = lora_layers(model).values()
        norms.append([unclip * nn.utils.get_total_norm([getattr(layer, which).grad for layer in layers]).item()
                      for which in ("lora_A", "lora_B")])

    fresh = load_base(base)
    run = adapt(task, config, base=base, steps=steps, seed=seed, prepare=prepare, on_step=watch)
    with torch.no_grad():
        layers = lora_layers(run.model).values()
        moved = [layer.scaling * (layer.lora_B @ layer.lora_A).norm() / layer.weight.norm() for layer in layers]
    noted = {"modules": len(layers), "trained": run.log.trained, "loss": run.log.loss,
             "grad_A": sum(a for a, _ in norms) / steps, "grad_B": sum(b for _, b in norms) / steps,
             "update": torch.stack(moved).mean().item(), "base_changed": fingerprint(run.model) != fingerprint(fresh),
             "exact": run.exact, "base_exact": evaluate(fresh, load_task("general").test).exact}
    with TemporaryDirectory() as folder:
        save_adapter(run.model, folder)
        if spoil is not None:
            spoil(Path(folder))
        noted["served"] = evaluate(load_adapter(fresh, folder, any_base=True), load_task(task).test).exact
    return noted


@sweep
def faults() -> list[dict]:
    """Notebook 07: the healthy run and each fault, as `examine` sees them; the loss of every fifth step."""
    rows = []
    for (name, differs), seed in grid(FAULTS.items(), range(2)):
        noted = examine(**differs, seed=seed)
        noted["loss"] = noted["loss"][::5] + noted["loss"][-1:]
        rows.append({"fault": name, "seed": seed} | rounded_row(noted))
    return rows


@sweep
def barely_moved() -> list[dict]:
    """Notebook 07: the three checks of "we used LoRA and quality barely moved": base fit, rank and placement on tone.

    The same checks on the catalogue are among `faults`; here are the ranks between.
    """
    config = {name: differs.get("config", HEALTHY) for name, differs in FAULTS.items()}
    runs = [("tone", "healthy", "base"), ("tone", "base", "base_early"), ("tone", "rank", "base"),
            ("tone", "modules", "base")]
    runs = [(task, name, base, config[name]) for task, name, base in runs]
    runs += [("catalogue", f"rank {r}", "base", LoRAConfig(r, 2 * r, EVERYWHERE)) for r in (2, 4)]
    rows = []
    for task, name, base, lora in tqdm(runs):
        run = adapt(task, lora, base=base, steps=100)
        rows.append(rounded_row({"task": task, "run": name, "trained": run.log.trained,
                                 "loss": run.loss, "exact": run.exact}))
    return rows


@sweep
def barely_moved_longer() -> list[dict]:
    """Notebook 07: is it the rank and the place, or the time? The catalogue with four times the steps of `faults`."""
    rows = []
    for name, seed in tqdm([("rank", 0), ("modules", 0), ("rank", 1), ("modules", 1), ("healthy", 0)]):
        run = adapt("catalogue", FAULTS[name].get("config", HEALTHY), steps=400, seed=seed)
        rows.append(rounded_row({"task": "catalogue", "run": name, "steps": 400, "seed": seed,
                                 "trained": run.log.trained, "loss": run.loss, "exact": run.exact}))
    return rows
