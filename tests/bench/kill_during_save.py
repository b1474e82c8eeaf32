"""Kill a process that saves adapters, again and again, and look at what stands on the disk.

    python tests/bench/kill_during_save.py [--kills 100]

A child saves adapters A (rank 2) and B (rank 5) in turns to one folder until SIGKILL stops it at a random moment. What
is found must load and equal A or B, every bit. As the control, the same with a save that writes the files in place.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from minilora import LoRAConfig, inject, load_adapter, lora_parameters, save_adapter
from minilora.adapters import CONFIG, WEIGHTS
from minilora.injection import lora_layers
from minilora.peft_format import config_of, keys_of, peft_config


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))


def adapted(rank: int) -> nn.Module:
    model = inject(base(), LoRAConfig(rank, 16, ("0", "1", "2", "3")))
    with torch.no_grad():
        for p in lora_parameters(model):
            p.normal_()
    return model


def save_in_place(model: nn.Module, folder: Path) -> None:
    """What most code does: two files, one after the other."""
    tensors = {
        key: getattr(layer, own).detach()
        for name, layer in lora_layers(model).items()
        for own, key in keys_of(name, layer.kind).items()
    }
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(peft_config(config_of(model))))


def found(folder: Path, models: dict[str, nn.Module]) -> str:
    """The adapter in `folder`: "A", "B" or "broken"."""
    try:
        loaded = lora_parameters(load_adapter(base(), folder))
    except ValueError:
        return "broken"
    for name, model in models.items():
        if all(torch.equal(a, b) for a, b in zip(loaded, lora_parameters(model), strict=True)):
            return name
    return "broken"


def run(kills: int, save=save_adapter, seed: int = 0) -> dict[str, int]:
    """Counts of what was found after each kill, and of the kills that interrupted a save midway ("midway")."""
    models, counts, draw = (
        {"A": adapted(2), "B": adapted(5)},
        {"A": 0, "B": 0, "broken": 0, "midway": 0},
        random.Random(seed),
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        for _ in range(kills):
            save_adapter(models["A"], folder)
            child = os.fork()
            if child == 0:
                while True:
                    for name in "BA":
                        save(models[name], folder)
            time.sleep(draw.uniform(0.005, 0.1))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            counts["midway"] += len(os.listdir(scratch)) > 1
            counts[found(folder, models)] += 1
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    kills = parser.parse_args().kills
    torch.set_num_threads(1)
    print(f"{'save':<14} {'kills':>6} {'A':>5} {'B':>5} {'broken':>7} {'midway':>7}")
    for name, save in (("minilora", save_adapter), ("files in place", save_in_place)):
        c = run(kills, save)
        print(f"{name:<14} {kills:>6} {c['A']:>5} {c['B']:>5} {c['broken']:>7} {c['midway']:>7}")
