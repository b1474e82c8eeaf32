"""Kill runs in training, alone and under torchrun, resume each, and compare with a run that was never killed.

    python tests/bench/kill_in_training.py [--kills 100] [--seed 0]

Every way to share a model (one process, ddp and fsdp on two) with every variant of the LoRA layer trains 40 steps with a
checkpoint after every second one. At a random moment all its processes are killed (SIGKILL); then the same command goes
on from what is there. Adapters, losses and gradient norms must be those of the whole run, bit for bit. Exits with 1
if one is not.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from minilora.distributed import WAYS

WORK = """
import sys, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[4])
from distributed_worker import SHAPE, data
from minilora import LoRAConfig, inject
from minilora.llama import Llama
from minilora.train import train
warnings.simplefilter("ignore")
choice, way = eval(sys.argv[2]), sys.argv[3]
model = Llama(SHAPE, seed=0)
torch.manual_seed(0)
inject(model, LoRAConfig(4, target_modules="all-linear", dropout=0.1, **choice))
print("go", flush=True)
train(model, data, steps=40, lr=1e-2, progress=False, every=2, checkpoint=sys.argv[1],
      parallel=None if way == "alone" else way)
"""
CHOICES = ({}, {"use_dora": True}, {"init": "pissa"}, {"init": "lora_fa"}, {"init": "vera"})


def command(path: Path, choice: dict, way: str) -> list[str]:
    many = [] if way == "alone" else ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
                                      "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    script = path.parent / "work.py"
    script.write_text(WORK)
    return [sys.executable, *many, str(script), str(path), repr(choice), way, str(Path(__file__).parents[1])]


def start(path: Path, choice: dict, way: str) -> subprocess.Popen:
    """A run in a process group of its own."""
    return subprocess.Popen(command(path, choice, way), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(path: Path, choice: dict, way: str) -> tuple[str, float]:
    """What it said on stderr if it failed, and the seconds it trained for."""
    run = start(path, choice, way)
    assert run.stdout.readline() == "go\n", run.stderr.read()
    begun = time.perf_counter()
    _, said = run.communicate()
    return said if run.returncode else "", time.perf_counter() - begun


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
                said, seconds = finish(path, choice, way)
                assert not said, said
                whole[repr(choice), way] = path, seconds
            path = Path(scratch) / f"killed_{i}"
            run = start(path, choice, way)
            assert run.stdout.readline() == "go\n", run.stderr.read()
            time.sleep(draw.uniform(0, whole[repr(choice), way][1]))
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
            steps.append(len(log_of(path)["loss"]) if path.exists() else 0)
            said, _ = finish(path, choice, way)
            found = "failed" if said else "same" if same(path, whole[repr(choice), way][0]) else "different"
            counts[found] += 1
            if found != "same":
                print(f"kill {i}, {way}, {choice}: {found}. {said[-500:]}", flush=True)
            if (i + 1) % len(cases) == 0 or i + 1 == kills:
                print(f"{i + 1} kills over {len(whole)} cases: {dict(counts)}; killed before the first checkpoint "
                      f"{steps.count(0)}, after the last {steps.count(40)}, in between {sum(0 < s < 40 for s in steps)}",
                      flush=True)
    return int(counts["same"] != kills)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(main(**vars(parser.parse_args())))
