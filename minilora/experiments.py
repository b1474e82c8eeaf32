"""The experiments behind the notebooks: adapt the base to a task, and sweeps of such runs, recorded in data/measured/.

    python -m minilora.experiments targets        writes data/measured/targets.json, with the command and the machine

A recorded sweep is a list of rows; every notebook that shows one trains a row of it again and compares.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .config import LoRAConfig, need
from .desk import DATA, batches, evaluate, load_base, load_task
from .insert import inject, lora_layers
from .llama import Llama
from .train import Log, train

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LR = {"lora": 1e-2, "full": 1e-3}  # what the learning-rate sweep found best on tone


@dataclass
class Run:
    """A model adapted to a task: its log, and loss (nats a token) and exact match on the test file."""

    model: nn.Module
    log: Log
    loss: float
    exact: float


def adapt(task: str, config: LoRAConfig | None = None, *, base: str | nn.Module = "base", steps: int = 150,
          lr: float | None = None, batch: int = 32, seed: int = 0, on_step: Callable | None = None) -> Run:
    """Fine-tune a copy of the base on a task's train file and score it on its test file.

    Args:
        config: the LoRA to inject; None trains every weight.
        base: a base's name, "random" (its shape, fresh weights), or a model, which is left alone.
        lr: the peak learning rate; None takes that of `LR`.
        seed: of the order of the batches, the adapter's start and dropout.
    """
    if isinstance(base, nn.Module):
        model = copy.deepcopy(base)
    else:
        model = Llama(load_base().config, seed) if base == "random" else load_base(base)
    torch.manual_seed(seed)
    if config is None:
        model.requires_grad_(True)
    else:
        inject(model, config)
    data = load_task(task)
    log = train(model, batches(data.train, batch, seed), steps=steps, seed=seed, on_step=on_step, progress=False,
                lr=lr or LR["full" if config is None else "lora"])
    return Run(model, log, *evaluate(model, data.test))


SWEEPS: dict[str, Callable[[], list[dict]]] = {}


def sweep(function: Callable[[], list[dict]]) -> Callable[[], list[dict]]:
    """Makes a function that trains and returns rows a sweep of the command line."""
    SWEEPS[function.__name__] = function
    return function


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


@sweep
def race() -> list[dict]:
    """Notebook 06: full fine-tuning (here rank 0) and LoRA, each at its own learning rates, on a near and a far task.
    The validation loss is there to choose the learning rate, the test file to score.

    alpha is 32 at every rank, as where the "about ten times" was measured (Schulman et al. 2025).
    """
    rows = []
    arms = [("tone", 0), ("cipher", 0), ("tone", 8), ("cipher", 8), ("tone", 64), ("cipher", 64), ("tone", 1)]
    rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    for (task, rank), i, seed in grid(arms, range(4), range(3)):
        lr = rates[i + (rank > 0 or task == "cipher")]  # four that hold the bottom
        config = LoRAConfig(rank, 32, ATTENTION + MLP) if rank else None
        run = adapt(task, config, steps=60, batch=16, lr=lr, seed=seed)
        validation = evaluate(run.model, load_task(task).validation).loss
        rows.append({"task": task, "rank": rank, "lr": lr, "seed": seed, "trained": run.log.trained,
                     "validation": round(validation, 4), "loss": round(run.loss, 4), "exact": run.exact})
    return rows


@sweep
def ranks() -> list[dict]:
    """Notebook 04: the first 10 updates at alpha / r and at alpha / sqrt(r), with Adam and with plain gradient descent.

    alpha is 16 throughout. Rank 256 is more than these matrices have: wasteful, but sound algebra.
    """
    rows = []
    optimizers = {"adam": (torch.optim.AdamW, 1e-3), "sgd": (torch.optim.SGD, 0.01)}
    for name, use_rslora, rank, seed in grid(optimizers, (False, True), (1, 4, 16, 64, 256), range(3)):
        optimizer, lr = optimizers[name]
        config = LoRAConfig(rank, 16, ATTENTION + MLP, use_rslora=use_rslora)
        log = watched(config, optimizer=optimizer, lr=lr, seed=seed)
        rows.append({"optimizer": name, "rslora": use_rslora, "rank": rank, "seed": seed}
                    | {what: [float(f"{x:.4g}") for x in values] for what, values in log.items()})
    return rows


def watched(config: LoRAConfig, *, steps: int = 11, lr: float = 1e-3, optimizer: type = torch.optim.AdamW,
            seed: int = 0, base: nn.Module | None = None, data: Callable | None = None) -> dict[str, list[float]]:
    """A short LoRA run at a constant learning rate, without clipping, that logs how loud the adapter is at every step.

    Args:
        base: changed in place; None takes the pretrained one.
        data: step -> (ids, targets), as in `train`; None takes `tone` in batches of 16.

    Returns:
        Lists whose entry t is taken after t updates: "loss"; "update", ||s BA||_F over all adapted modules together;
        "grad_A", "grad_B", likewise; "activation", the root mean square of s BA x over modules, tokens and features.
    """
    torch.manual_seed(seed)
    model = inject(base or load_base(), config, any_rank=True)
    layers, squares = list(lora_layers(model).values()), []
    log = {"update": [], "grad_A": [], "grad_B": [], "activation": []}

    @torch.no_grad()
    def heard(layer, inputs, output):
        squares.append((layer.scaling * layer.product(inputs[0], layer.lora_A, layer.lora_B)).square().mean())

    @torch.no_grad()
    def on_step(step, model, _):
        # matrices this small are quicker to form than the QR of spectrum.product_norm
        log["update"].append(norm_of_all(layer.scaling * layer.lora_B @ layer.lora_A for layer in layers))
        log["grad_A"].append(norm_of_all(layer.lora_A.grad for layer in layers))
        log["grad_B"].append(norm_of_all(layer.lora_B.grad for layer in layers))
        log["activation"].append(torch.stack(squares).mean().sqrt().item())
        squares.clear()

    hooks = [layer.register_forward_hook(heard) for layer in layers]
    done = train(model, data or batches(load_task("tone").train, 16, seed), steps=steps, lr=lr, warmup=0,
                 schedule="constant", clip=None, seed=seed, optimizer=optimizer, on_step=on_step, progress=False)
    for hook in hooks:
        hook.remove()
    return {"loss": done.loss} | log


def norm_of_all(tensors: Iterable[Tensor]) -> float:
    return torch.stack([t.norm() for t in tensors]).norm().item()


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent k of the power law y = c x^k that fits best: a straight line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def twins(base: nn.Module, data: Callable, config: LoRAConfig, p: float, q: float, *, steps: int = 8, lr: float = 1e-3,
          seed: int = 0, eps: float = 1e-30, clip: float | None = None) -> tuple[Log, Log, float]:
    """Two LoRA runs on copies of `base` that Adam cannot tell apart: the second has alpha / (p q), A0 times p, and the
    learning rates p lr for A and q lr for B (Schulman et al. 2025, "LoRA Without Regret").

    The second run's gradients are 1 / p (A) and 1 / q (B) of the first's. Adam divides that out if its eps is 0, and
    s BA stays the same. A true 0 will not do: the first gradient of A is zero, and 0 / 0 is no number.

    Returns:
        Both logs, and ||s BA - its twin|| / ||s BA|| over all modules after the last step.
    """
    logs, updates = [], []
    for p, q in ((1, 1), (p, q)):
        torch.manual_seed(seed)
        model = inject(copy.deepcopy(base), dataclasses.replace(config, alpha=config.alpha / (p * q)))
        layers = lora_layers(model).values()
        for layer in layers:
            layer.lora_A.data *= p
        groups = [{"params": [layer.lora_A for layer in layers], "lr": p * lr, "eps": eps},
                  {"params": [layer.lora_B for layer in layers], "lr": q * lr, "eps": eps}]
        logs.append(train(model, data, steps=steps, lr=lr, parameters=groups, clip=clip, seed=seed, progress=False))
        updates.append([(layer.scaling * layer.lora_B @ layer.lora_A).detach() for layer in layers])
    apart = norm_of_all(a - b for a, b in zip(*updates)) / norm_of_all(updates[0])
    return *logs, apart


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The learning rate at the bottom of a U: of the parabola through the logarithms of the best point and of its two
    neighbours, which need not be evenly spaced.

    Raises:
        ValueError: the best point is at an end, so that the bottom may lie beyond it.
    """
    i = int(np.argmin(losses))
    need(0 < i < len(rates) - 1, "the best learning rate must lie inside the sweep", rates[i])
    a, b, _ = np.polyfit(np.log(rates[i - 1:i + 2]), np.log(losses[i - 1:i + 2]), 2)
    return float(np.exp(-b / (2 * a)))


def grid(*axes) -> tqdm:
    """Every combination, with a progress bar."""
    return tqdm(list(itertools.product(*axes)))


def measured(name: str) -> dict:
    """A recorded sweep: {"command", "machine", "rows"}.

    Raises:
        ValueError: nothing of that name is recorded.
    """
    path = DATA / "measured" / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"no record {name!r}, expected one of {', '.join(sorted(p.stem for p in path.parent.glob('*')))}")
    return json.loads(path.read_text())


def record(name: str, rows: list[dict], command: str) -> None:
    """Write rows to data/measured/ with the command and the machine that made them."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({"command": command, "machine": machine})[:-1]
    (DATA / "measured").mkdir(exist_ok=True)
    (DATA / "measured" / f"{name}.json").write_text(f'{head}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m minilora.experiments", description=__doc__.partition("\n")[0])
    parser.add_argument("sweep", choices=SWEEPS)
    name = parser.parse_args().sweep
    record(name, SWEEPS[name](), f"python -m minilora.experiments {name}")
