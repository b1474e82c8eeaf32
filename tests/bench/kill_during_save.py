"""Kill processes that save adapters to one folder, while others save there and read there, and look at what is found.

    python tests/bench/kill_during_save.py [--kills 200] [--writers 3] [--readers 2]

Each writer saves two adapters of its own in turns, of different ranks and weights, as fast as it can. At a random moment
one of them is killed (SIGKILL), and a new one takes its place. Readers load what is there all the time, and so does the
parent after every kill: what is found must be one of the writers' adapters, every bit, config and weights of one save.
As the control, the same with a save that writes the files in place. "midway" counts kills that left something of a save
behind; "litter" is what is left of that in the folder after one more save.
"""

import argparse
import json
import mmap
import os
import random
import signal
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from minilora import LoRAConfig, inject, lora_parameters, save_adapter
from minilora.adapters import CONFIG, WEIGHTS, read_adapter
from minilora.checkpoints import lock
from minilora.injection import lora_layers
from minilora.pair import note_of
from minilora.peft_format import config_of, keys_of, peft_config

COUNTS = ("saves", "failed saves", "reads", "broken reads")


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


def is_whole(folder: Path, adapters: dict[int, dict[str, torch.Tensor]]) -> bool:
    """Whether the folder holds one of `adapters`, by rank, bit for bit."""
    try:
        found = read_adapter(folder)
        wanted = adapters[found.config.rank]
        return wanted.keys() == found.tensors.keys() and all(map(torch.equal, wanted.values(),
                                                                 (found.tensors[key] for key in wanted)))
    except (ValueError, KeyError):
        return False


class Tally:
    """Counts that processes share, each with a row of its own."""

    def __init__(self, rows: int):
        self.memory = mmap.mmap(-1, 32 * rows)

    def add(self, row: int, what: str) -> None:
        place = 32 * row + 8 * COUNTS.index(what)
        self.memory[place:place + 8] = struct.pack("q", struct.unpack("q", self.memory[place:place + 8])[0] + 1)

    def total(self, what: str) -> int:
        return sum(row[COUNTS.index(what)] for row in struct.iter_unpack("4q", self.memory[:]))


def forever(tally: Tally, row: int, work: Callable[[int], bool], done: str, failed: str) -> int:
    """A child that works until it is killed, and counts; its process id."""
    child = os.fork()
    if child == 0:
        i = 0
        while True:
            i += 1
            tally.add(row, done)
            with suppress(Exception):
                if work(i):
                    continue
            tally.add(row, failed)
    return child


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def left_over(folder: Path) -> int:
    """How many dead writers' folders there are, and a note in place of a config."""
    dead = 0
    for path in folder.glob(".*.tmp"):
        with suppress(BlockingIOError):
            if (held := lock(path)) is not None:
                os.close(held)
                dead += path.exists()
    return dead + (note_of(folder, CONFIG).exists() and not (folder / CONFIG).exists())


def run(kills: int, save=save_adapter, seed: int = 0, writers: int = 1, readers: int = 0) -> dict[str, int]:
    """Counts: what was found after each kill ("whole" or "broken"), and what the writers and readers met."""
    models = {rank: adapted(rank) for rank in range(2, 2 + 2 * writers)}
    found, draw, tally = {"whole": 0, "broken": 0, "midway": 0}, random.Random(seed), Tally(writers + readers)
    with tempfile.TemporaryDirectory() as scratch:
        folder, adapters = Path(scratch) / "adapter", {}
        for rank, model in models.items():
            save_adapter(model, folder)
            adapters[rank] = {key: t.clone() for key, t in read_adapter(folder).tensors.items()}

        def write(row: int) -> int:
            def work(i: int) -> bool:
                save(models[2 + 2 * row + i % 2], folder)
                return True

            return forever(tally, row, work, "saves", "failed saves")

        alive = [write(row) for row in range(writers)]
        watching = [forever(tally, writers + i, lambda _: is_whole(folder, adapters), "reads", "broken reads")
                    for i in range(readers)]
        for _ in range(kills):
            time.sleep(draw.uniform(0.005, 0.1))
            row = draw.randrange(writers)
            end(alive[row])
            found["midway"] += left_over(folder) > 0
            found["whole" if is_whole(folder, adapters) else "broken"] += 1
            alive[row] = write(row)
        for child in (*alive, *watching):
            end(child)
        save_adapter(models[2], folder)
        found["litter"] = len(os.listdir(folder)) - 2
    return found | {what: tally.total(what) for what in COUNTS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--writers", type=int, default=3)
    parser.add_argument("--readers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, save in (("minilora", save_adapter), ("files in place", save_in_place)):
        found = run(options.kills, save, writers=options.writers, readers=options.readers)
        print(f"{name + ':':<16}{options.kills} kills: " + ", ".join(f"{n:,} {what}" for what, n in found.items()), flush=True)
