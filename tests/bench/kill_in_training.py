"""Kill runs in training, alone and under torchrun, resume each, and compare with a run that was never killed.

    python tests/bench/kill_in_training.py [--kills 100] [--seed 0]

Every way to share a model (one process, ddp and fsdp on two) with every variant of the LoRA layer trains 40 steps with a
checkpoint after every second one. At a random moment all its processes are killed (SIGKILL); then the same call goes on
from what is there. Adapters, optimizer state, losses and gradient norms must be those of the whole run, bit for bit.
Exits with 1 if one is not. The processes are forks, told of each other as torchrun does.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from distributed_worker import SHAPE, data

from minilora import LoRAConfig, inject
from minilora.distributed import WAYS
from minilora.llama import Llama
from minilora.train import train

CHOICES = ({}, {"use_dora": True}, {"init": "pissa"}, {"init": "lora_fa"}, {"init": "vera"})


def work(path: Path, choice: dict, way: str) -> None:
    model = Llama(SHAPE, seed=0)
    torch.manual_seed(0)
    inject(model, LoRAConfig(4, target_modules="all-linear", dropout=0.1, **choice))
    train(model, data, steps=40, lr=1e-2, progress=False, every=2, checkpoint=path,
          parallel=None if way == "alone" else way)


def start(path: Path, choice: dict, way: str) -> list[int]:
    """The processes of a run."""
    processes = 1 if way == "alone" else 2
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                               "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
                warnings.simplefilter("ignore")
                work(path, choice, way)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return children


def finish(path: Path, choice: dict, way: str) -> tuple[bool, float]:
    """Whether a run failed, and the seconds it took."""
    begun = time.perf_counter()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in start(path, choice, way)]
    return any(codes), time.perf_counter() - begun


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same tensors and numbers (seconds apart)."""
    x, y = load_file(a), load_file(b)
    logs = [log_of(path) for path in (a, b)]
    return x.keys() == y.keys() and all(map(torch.equal, x.values(), (y[key] for key in x))) and logs[0] == logs[1]


def log_of(path: Path) -> dict:
    data = path.read_bytes()
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["log"]) | {"seconds": 0}


def main(kills: int, seed: int) -> int:
    draw, counts, steps, whole = random.Random(seed), Counter(), [], {}
    cases = [(choice, way) for way in ("alone", *WAYS) for choice in CHOICES]
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(kills):
            choice, way = cases[i % len(cases)]
            if (repr(choice), way) not in whole:
                path = Path(scratch) / f"whole_{len(whole)}"
                failed, seconds = finish(path, choice, way)
                assert not failed
                whole[repr(choice), way] = path, seconds
            path = Path(scratch) / f"killed_{i}"
            children = start(path, choice, way)
            time.sleep(draw.uniform(0, whole[repr(choice), way][1]))
            for child in children:
                os.kill(child, signal.SIGKILL)
            for child in children:
                os.waitpid(child, 0)
            steps.append(len(log_of(path)["loss"]) if path.exists() else 0)
            failed, _ = finish(path, choice, way)
            found = "failed" if failed else "same" if same(path, whole[repr(choice), way][0]) else "different"
            counts[found] += 1
            if found != "same":
                print(f"kill {i}, {way}, {choice}: {found}", flush=True)
            if (i + 1) % len(cases) == 0 or i + 1 == kills:
                print(f"{i + 1} kills over {len(whole)} cases: {dict(counts)}; killed before the first checkpoint "
                      f"{steps.count(0)}, after the last {steps.count(40)}, in between {sum(0 < s < 40 for s in steps)}",
                      flush=True)
    return int(counts["same"] != kills)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    torch.set_num_threads(1)
    sys.exit(main(**vars(parser.parse_args())))
