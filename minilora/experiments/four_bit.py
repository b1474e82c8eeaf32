"""Notebook 10: bases of few bits."""

import torch
from torch import nn

from ..config import LoRAConfig
from ..helpdesk import evaluate, load_base, load_task
from ..quant import BLOCK, nf4_levels, quantise_model
from .run import adapt, grid, sweep


@torch.no_grad()
def in_few_bits(model: nn.Module, bits: int, shuffle: bool = False) -> nn.Module:
    """Round every linear of the blocks, in place, to the NormalFloat of so many bits with an fp32 absmax a block of 64.

    The weights stay dense: this is about what rounding loses, not about memory. shuffle: the rounded weights of each
    matrix change places at random, so that their histogram is right and nothing else.
    """
    levels = torch.tensor(nf4_levels(bits))
    for linear in (m for m in model.model.layers.modules() if isinstance(m, nn.Linear)):
        blocks = linear.weight.view(-1, BLOCK)  # (b, 64)
        absmax = blocks.abs().amax(1, keepdim=True)
        blocks.copy_(levels[(blocks / absmax)[..., None].sub(levels).abs().argmin(-1)] * absmax)
        if shuffle:
            flat = linear.weight.view(-1)
            flat.copy_(flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))])
    return model


@sweep
def four_bit() -> list[dict]:
    """Notebook 10: LoRA on bases of fewer and fewer bits, on shuffled codes, and full fine-tuning; before and after."""
    config = LoRAConfig(8, 16, "all-linear")
    bases = {"full": load_base(), "fp32": load_base(), "NF4": quantise_model(load_base()),
             "INT4": quantise_model(load_base(), kind="int4"), "3 bits": in_few_bits(load_base(), 3),
             "2 bits": in_few_bits(load_base(), 2), "NF4, shuffled": in_few_bits(load_base(), 4, shuffle=True)}
    before = {(task, name): evaluate(base, load_task(task).test) for task in ("tone", "general")
              for name, base in bases.items()}
    rows = []
    for (task, name), seed in grid(before, range(2)):
        run = adapt(task, None if name == "full" else config, base=bases[name], steps=60, seed=seed)
        loss, exact = before[task, name]
        rows.append({"task": task, "base": name, "seed": seed, "trained": run.log.trained,
                     "loss_before": round(loss, 4), "exact_before": exact, "loss": round(run.loss, 4),
                     "exact": run.exact})
    return rows
