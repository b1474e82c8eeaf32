"""Notebook 05: how low-rank a real update is."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import LoRAConfig
from ..helpdesk import evaluate, load_base, load_task
from ..layers import LoRALayer
from ..spectrum import energy, extract_lora, intruder_dimensions, rank_for_energy, subspace_similarity
from .run import ATTENTION, MLP, adapt, grid, sweep


@torch.no_grad()
def updates(model: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """What fine-tuning added to each linear in the blocks, by name, (out, in): scaling * B @ A where it was LoRA."""
    pairs = {name: (model.get_submodule(name), start) for name, start in base.named_modules()
             if isinstance(start, nn.Linear) and ".layers." in name}
    return {name: now.scaling * now.lora_B @ now.lora_A if isinstance(now, LoRALayer) else now.weight - start.weight
            for name, (now, start) in pairs.items()}


@torch.no_grad()
def rebuilt(model: nn.Module, base: nn.Module, deltas: dict[str, Tensor]) -> nn.Module:
    """A copy of a fully fine-tuned model in which the linears in the blocks are the base's plus `deltas`."""
    model = copy.deepcopy(model)
    for name, delta in deltas.items():
        model.get_submodule(name).weight.copy_(base.get_submodule(name).weight + delta)
    return model


def pooled(deltas: Iterable[Tensor]) -> Tensor:
    """One spectrum for matrices of one smaller side k, (k,): the root of the sum of their squared i-th singular values.

    Its energy is the share of all their squared norms that is left when each is cut to rank i.
    """
    return torch.stack([torch.linalg.svdvals(d) for d in deltas]).square().sum(0).sqrt()


@sweep
def spectra() -> list[dict]:
    """Notebook 05: how the energy of an update is spread, what a cut to a lower rank keeps, and which directions two
    runs share. Loss and exact match after a cut are those of the model with its embeddings and norms left as tuned."""
    base, ranks, deltas, rows = load_base(), (1, 2, 4, 8, 16, 32, 64, 160), {}, []
    runs = {"full": ("tone", 0, 1e-3, 80, 0), "full again": ("tone", 0, 1e-3, 80, 1),
            "r = 8": ("tone", 8, 1e-2, 80, 0), "r = 8 again": ("tone", 8, 1e-2, 80, 1),
            "r = 64": ("tone", 64, 1e-2, 80, 0), "r = 64 again": ("tone", 64, 1e-2, 80, 1),
            "r = 8, calm": ("tone", 8, 2e-3, 160, 0), "r = 64, calm": ("tone", 64, 2e-3, 160, 0),
            "cipher": ("cipher", 0, 1e-3, 80, 0), "cipher again": ("cipher", 0, 1e-3, 80, 1),
            "cipher, longer": ("cipher", 0, 1e-3, 320, 0)}
    for name, (task, rank, lr, steps, seed) in tqdm(runs.items()):
        config = LoRAConfig(rank, 2 * rank, ATTENTION + MLP) if rank else None
        run = adapt(task, config, steps=steps, lr=lr, seed=seed)
        deltas[name] = d = updates(run.model, base)
        S, weights = pooled(d.values()), {n: base.get_submodule(n).weight for n in d}
        row = {"run": name, "task": task, "rank": rank, "lr": lr, "steps": steps, "seed": seed,
               "loss": round(run.loss, 4), "exact": run.exact, "rank_for_90": rank_for_energy(S, 0.9),
               "energy": {r: round(float(energy(S)[r - 1]), 4) for r in ranks},
               "intruders": sum(intruder_dimensions(W, W + d[n]).count for n, W in weights.items())}
        if not rank and not seed:
            cuts = {r: {n: near.B @ near.A for n, x in d.items() for near in [extract_lora(x, rank=r)]} for r in ranks}
            scores = {r: evaluate(rebuilt(run.model, base, cut), load_task(task).test) for r, cut in cuts.items()}
            row["cut"] = {r: [round(score.loss, 4), score.exact] for r, score in scores.items()}
        rows.append(row)
    pairs = [("full", "full again"), ("r = 8", "r = 8 again"), ("r = 64", "r = 64 again"), ("r = 8", "r = 64"),
             ("r = 8, calm", "r = 64, calm"), ("full", "r = 8"), ("full", "cipher"), ("cipher", "cipher again")]
    for (one, other), side in grid(pairs, ("input", "output")):
        phi = torch.stack([shared_directions(x, deltas[other][n], side) for n, x in deltas[one].items()]).mean(0)
        rows.append({"pair": [one, other], "side": side, "phi": [round(p, 4) for p in phi.tolist()]})
    return rows


def shared_directions(delta1: Tensor, delta2: Tensor, side: str = "input", most: int = 8) -> Tensor:
    """phi(i, i) for i = 1 to `most`, (most,), of the leading right ("input") or left ("output") singular vectors of two
    updates (`subspace_similarity`)."""
    U1, U2 = ((Vh.T if side == "input" else U)[:, :most]
              for U, _, Vh in (torch.linalg.svd(d, full_matrices=False) for d in (delta1, delta2)))
    return subspace_similarity(U1, U2).diagonal()
