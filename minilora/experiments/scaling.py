"""Notebooks 04 and 06: rank, alpha and learning rate."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..helpdesk import batches, evaluate, load_base, load_task
from ..injection import inject, lora_layers
from ..train import Log, train
from .run import ATTENTION, MLP, adapt, grid, sweep


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
def limits() -> list[dict]:
    """Notebook 06: what LoRA lacks on the far task (parts of the model trained alone), and a base that fits ill."""
    cases = [("cipher", "base", "model.layers", (3e-3, 1e-2, 3e-2)),
             ("cipher", "base", "model.embed_tokens", (1e-2, 3e-2, 1e-1)),
             ("tone", "base_early", "lora", (3e-3, 1e-2, 3e-2)), ("tone", "base_early", "", (3e-4, 1e-3, 3e-3))]
    rows = []
    for (task, base, part, rates), i in grid(cases, range(3)):
        model, data = load_base(base), load_task(task)
        torch.manual_seed(0)
        if part == "lora":
            inject(model, LoRAConfig(8, 32, ATTENTION + MLP))
        else:
            model.requires_grad_(False).get_submodule(part).requires_grad_(True)  # "" is the whole model
        log = train(model, batches(data.train, 16), steps=60, lr=rates[i], progress=False)
        loss, exact = evaluate(model, data.test)
        rows.append({"task": task, "base": base, "part": part or "full", "lr": rates[i], "seed": 0,
                     "trained": log.trained, "validation": round(evaluate(model, data.validation).loss, 4),
                     "loss": round(loss, 4), "exact": exact})
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
