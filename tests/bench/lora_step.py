"""Time of a training step (forward, backward, AdamW) of a stack of transformer blocks, beside the other libraries.

    python tests/bench/lora_step.py [--device cuda] [--dtype bfloat16] [--blocks 4] [--batch 4] [--seq 128]

Every row is run once a round, in an order drawn anew, so that a slow moment of the machine hits all alike; the figures
are medians. The floor is the frozen base alone, forward and the gradient of its input, which every row computes.
"by FLOPs" is the floor and the arithmetic that LoRA adds (x A^T is computed twice, as nothing is saved), were a thin
product as efficient as a square one. It is not: it takes the time to read x or the gradient, seven times a linear.
On one CPU thread the clock counts the process's own time, which other programs disturb less.
"""

import argparse
import copy
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from blocks import ALL, ATTENTION, PEERS, adapted, stack
from torch import nn

SCENES = {"all linears, rank 8": (8, ALL), "all linears, rank 64": (64, ALL), "attention only, rank 8": (8, ATTENTION)}


def flops(model: nn.Sequential, rank: int, targets: tuple, batch: int, seq: int) -> tuple[int, int]:
    """Of one step: the floor's (forward and input's gradient), and what LoRA adds to it."""
    floor = added = 0
    for block in model:
        floor += 6 * 4 * batch * seq * seq * block.q.in_features // 2  # scores and values, causal; 2 forward, 4 back
        for name in ALL:
            out, inp = getattr(block, name).weight.shape
            floor += 2 * 2 * batch * seq * out * inp
            # x A^T twice, dA and dx with in; B^T's product, its gradient and dB with out
            added += 2 * batch * seq * rank * (4 * inp + 3 * out) * (name in targets)
    return floor, added


def step(model: nn.Module, x: torch.Tensor, opt: torch.optim.Optimizer | None) -> None:
    model(x).float().square().mean().backward()
    x.grad = None
    if opt:
        opt.step()
        opt.zero_grad()


def contestants(base: nn.Module, rank: int, targets: tuple, dropout: float = 0.0) -> dict[str, Callable[[], nn.Module]]:
    """Row -> what makes its model."""
    rows = {"the floor": lambda: copy.deepcopy(base).requires_grad_(False)}
    rows |= {peer: partial(adapted, base, peer, rank, targets, dropout) for peer in PEERS}
    return rows | {"full fine-tuning": lambda: copy.deepcopy(base)}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer | None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-4, fused=True) if trainable else None


def measure(models: dict[str, nn.Module], x: torch.Tensor, rounds: int, clock) -> dict[str, list[float]]:
    """Row -> seconds of its steps."""
    optimizers = {name: optimizer_of(m) for name, m in models.items()}
    seconds, order = defaultdict(list), list(models)
    for i in range(rounds + 2):  # two to warm up
        random.Random(i).shuffle(order)
        for name in order:
            start = clock()
            step(models[name], x, optimizers[name])
            if i >= 2:
                seconds[name].append(clock() - start)
    return {name: seconds[name] for name in models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    for name, value in (("width", 768), ("blocks", 4), ("batch", 4), ("seq", 128), ("rounds", 15), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--scene", type=int, choices=range(len(SCENES)), help="only this one")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    cuda = a.device.startswith("cuda")

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.process_time() if a.threads == 1 and not cuda else time.perf_counter()

    base = stack(a.blocks, a.width, getattr(torch, a.dtype), a.device)
    x = torch.randn(a.batch, a.seq, a.width, dtype=getattr(torch, a.dtype), device=a.device, requires_grad=True)
    for scene in list(SCENES) if a.scene is None else [list(SCENES)[a.scene]]:
        rank, targets = SCENES[scene]
        models = {name: make() for name, make in contestants(base, rank, targets, a.dropout).items()}
        seconds = measure(models, x, a.rounds, clock)
        floor = statistics.median(seconds["the floor"])
        least, added = flops(base, rank, targets, a.batch, a.seq)
        print(f"\n{scene}; {a.blocks} blocks, width {a.width}, {a.batch} x {a.seq} tokens, {a.dtype}, {a.device}, "
              f"{a.rounds} rounds")
        print(f"{'':<36}{'ms, median':>12}{'quartiles':>18}{'of the floor':>14}")
        for name, s in seconds.items():
            low, middle, high = statistics.quantiles(s, n=4)
            between = f"{1e3 * low:.1f} to {1e3 * high:.1f}"
            print(f"{name:<36}{1e3 * middle:>12.2f}{between:>18}{middle / floor:>14.3f}")
        print(f"{'by FLOPs':<36}{1e3 * floor * (1 + added / least):>12.2f}{'':>18}{1 + added / least:>14.3f}")


if __name__ == "__main__":
    main()
