"""Our own time on a model of 500 linears: inject, three training steps, save, load, beside PEFT's.

    python tests/bench/many_linears.py [--linears 500] [--width 64] [--runs 5]

The overhead of the three steps is what they take beyond the same steps of the plain form, x W^T + b + s (x A^T) B^T,
written out by hand over the same tensors. The total must stay under one second. Seconds of the process's own time on
one thread, which other programs disturb less; medians of the runs.
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections import defaultdict

import peft
import torch
from torch import nn

from minilora import LoRAConfig, inject, load_adapter, lora_parameters, save_adapter
from minilora.injection import lora_layers


class Stack(nn.Module):
    def __init__(self, linears: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(linears))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + 0.01 * layer(x)
        return x


def by_hand(model: nn.Module):
    """The adapted stack's function without our modules."""
    parts = [(m.base_layer.weight, m.base_layer.bias, m.lora_A, m.lora_B, m.scaling) for m in model.layers]

    def forward(x: torch.Tensor) -> torch.Tensor:
        for W, b, A, B, s in parts:
            x = x + 0.01 * (nn.functional.linear(x, W, b) + s * (x @ A.T) @ B.T)
        return x

    return forward


def train(forward, parameters: list, x: torch.Tensor) -> None:
    opt = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(3):
        forward(x).square().mean().backward()
        opt.step()
        opt.zero_grad()


def run(linears: int, width: int, folder: str) -> dict[str, float]:
    """Seconds by part, ours and PEFT's."""
    seconds, start = {}, 0.0

    def took(part: str) -> None:
        nonlocal start
        seconds[part], start = time.process_time() - start, time.process_time()

    base, x = Stack(linears, width), torch.randn(32, width)
    model, back, names = copy.deepcopy(base), copy.deepcopy(base), [f"layers.{i}" for i in range(linears)]
    start = time.process_time()
    inject(model, LoRAConfig(8, 16, names))
    took("inject")
    train(model, lora_parameters(model), x)
    took("3 steps")
    save_adapter(model, folder + "/ours")
    took("save")
    load_adapter(back, folder + "/ours")
    took("load")
    assert len(lora_layers(back)) == linears and torch.equal(back(x), model(x))
    start = time.process_time()
    train(by_hand(model), lora_parameters(model), x)
    took("3 steps by hand")

    model, back = copy.deepcopy(base), copy.deepcopy(base)
    start = time.process_time()
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=names))
    took("PEFT inject")
    train(model, [p for p in model.parameters() if p.requires_grad], x)
    took("PEFT 3 steps")
    model.save_pretrained(folder + "/peft")
    took("PEFT save")
    peft.PeftModel.from_pretrained(back, folder + "/peft")
    took("PEFT load")
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("linears", 500), ("width", 64), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    runs = defaultdict(list)
    for _ in range(a.runs):
        with tempfile.TemporaryDirectory() as folder:
            for part, s in run(a.linears, a.width, folder).items():
                runs[part].append(s)
    middle = {part: statistics.median(s) for part, s in runs.items()}
    for part, s in middle.items():
        print(f"{part:<18}{s:>8.3f} s")
    own = {part: middle[part] for part in ("inject", "save", "load")}
    own["3 steps beyond by hand"] = middle["3 steps"] - middle["3 steps by hand"]
    print(f"our own time       {sum(own.values()):>8.3f} s = " + " + ".join(f"{p} {s:.3f}" for p, s in own.items()))
