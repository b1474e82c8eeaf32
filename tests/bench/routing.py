"""What it costs to route a batch of 32 rows over 8 adapters, beside one adapter for all and PEFT's mixed batch; and
what a switch costs.

    python tests/bench/routing.py [--device cuda] [--dtype bfloat16] [--rounds 15]

Two models: the notebooks' base (28 linears), and two transformer blocks of width 768. The adapters, on all
linears, are the same files for both libraries; inference only. Every row runs once a round, in an order drawn anew; the
figures are medians. "routed, with entry" builds the route and leaves it again around its one forward; "routed" is the
forward inside, as in generation, where one route serves many. On one CPU thread the clock counts the process's own
time. The control: both libraries must give the same numbers, and the mixed batch others than one adapter for all.
"""

import argparse
import copy
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from blocks import ALL, stack
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from minilora import AdapterBank
from minilora.helpdesk import load_base

ROWS = 32
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = {"all of rank 8": [8] * 8, "ranks 2 to 16": [2, 4, 8, 16] * 2}


def files(base: nn.Module, targets: list[str], ranks: dict[str, int], folder: str) -> None:
    for name, rank in ranks.items():
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_" in key:
                    p.normal_(0, 0.02)
        model.save_pretrained(str(Path(folder) / name))


def interleaved(rows: dict, rounds: int, clock) -> dict[str, float]:
    """Row -> median seconds."""
    seconds, order = {name: [] for name in rows}, list(rows)
    for i in range(rounds + 2):  # two to warm up
        random.Random(i).shuffle(order)
        for name in order:
            start = clock()
            rows[name]()
            if i >= 2:
                seconds[name].append(clock() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def near(a: Tensor, b: Tensor) -> bool:
    return (a.float() - b.float()).norm() < {torch.float32: 1e-4}.get(a.dtype, 0.03) * b.float().norm()


@torch.no_grad()
def measure(base: nn.Module, targets: list[str], ranks: list[int], x: Tensor, rounds: int, clock) -> tuple[dict, dict]:
    """Median seconds of a forward by row, and of a switch of adapter by library; one adapter for each of `ranks`."""
    adapters = [f"adapter{i}" for i in range(len(ranks))]
    names = [adapters[i % len(ranks)] for i in range(len(x))]
    bank, single = AdapterBank(copy.deepcopy(base)), AdapterBank(copy.deepcopy(base))
    inside = AdapterBank(copy.deepcopy(base))  # stays in one route
    with tempfile.TemporaryDirectory() as folder:
        files(base, targets, dict(zip(adapters, ranks)), folder)
        for name in adapters:
            for b in (bank, single, inside):
                b.load(name, Path(folder) / name)
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), Path(folder) / adapters[0], adapters[0]).eval()
        for name in adapters[1:]:
            theirs.load_adapter(str(Path(folder) / name), name)

    def routed() -> Tensor:
        with bank.route(names):
            return bank.model(x)

    with inside.route(names):
        single.use(adapters[-1])
        theirs.set_adapter(adapters[-1])
        alone, mixed, its = single.model(x), routed(), slice(len(ranks) - 1, None, len(ranks))  # its rows
        assert near(theirs(x), alone) and near(mixed[its], alone[its]) and near(mixed, alone) == (len(ranks) == 1)
        assert near(theirs(x, adapter_names=names), mixed)
        forward = interleaved({
            "base": lambda: base(x),
            "ours, one adapter": lambda: single.model(x),
            "ours, routed": lambda: inside.model(x),
            "ours, routed, with entry": routed,
            "PEFT, one adapter": lambda: theirs(x),
            "PEFT, mixed batch": lambda: theirs(x, adapter_names=names),
        }, rounds, clock)
    turn = iter(range(10**9))
    switch = interleaved({
        "ours": lambda: bank.use(adapters[next(turn) % len(ranks)]),
        "PEFT": lambda: theirs.set_adapter(adapters[next(turn) % len(ranks)]),
    }, 10 * rounds, clock)
    return forward, switch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    for name, value in (("seq", 64), ("rounds", 15), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(a.threads)
    cuda, dtype = a.device.startswith("cuda"), getattr(torch, a.dtype)

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.process_time() if a.threads == 1 and not cuda else time.perf_counter()

    small = load_base().to(a.device, dtype).eval()
    ids = torch.randint(0, small.config.vocab_size, (ROWS, a.seq), device=a.device)
    x = torch.randn(ROWS, a.seq, 768, device=a.device, dtype=dtype)
    shapes = {"notebooks' base": (small, LLAMA, ids),
              "2 blocks of width 768": (stack(2, 768, dtype, a.device).eval(), list(ALL), x)}
    for shape, (base, targets, x) in shapes.items():
        for what, ranks in RANKS.items():
            forward, switch = measure(base.requires_grad_(False), targets, ranks, x, a.rounds, clock)
            print(f"\n{shape}, {what}; {ROWS} x {a.seq} tokens, {a.dtype}, {a.device}")
            print(f"{'':<28}{'ms, median':>12}{'of one adapter':>16}")
            for name, s in forward.items():
                print(f"{name:<28}{1e3 * s:>12.2f}{s / forward['ours, one adapter']:>16.3f}")
            print("a switch, ms: " + ", ".join(f"{name} {1e3 * s:.3f}" for name, s in switch.items()))


if __name__ == "__main__":
    main()
