"""The anonymous memory of a streamed training step on a CPU, beside the plan.

    OMP_NUM_THREADS=1 python tests/bench/stream_memory.py FOLDER [--quick]

1. A model of 4.26 GiB in 16 bits (Llama-2-7B's layers, ten of them) trains three steps on 1 x 64 tokens, LoRA of rank 8
   on q and v, under a hard budget of 1.2 GiB (RLIMIT_DATA) above what the process had before.
2. Layers of width 1024, 4 to 32 of them: what a layer more costs is one saved input, and its adapter with its gradient
   and Adam's two moments.

Every row is a process of its own. Measured is RssAnon of /proc/self/status, every millisecond, less what it was before
the decoder was made and after a step of a tiny one (what torch sets up once for itself). Pages that are mapped from the
store's files are not anonymous. The plan is `memory.estimate`'s, made for CUDA's kernels. Exits with 1 if the first
row is over its budget or more than 5% from the plan. FOLDER takes 5 GiB and keeps the stores, for another run.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from minilora import LoRAConfig
from minilora.llama import LlamaConfig
from minilora.memory import ModelSpec, Training, estimate
from minilora.stream_run import bytes_of, measure
from minilora.weight_store import Store, build_store

MIB, GIB = 2**20, 2**30
BIG = LlamaConfig(32000, 4096, 11008, 10, 32, max_position_embeddings=512)
SMALL = LlamaConfig(4096, 1024, 2816, 32, 8, max_position_embeddings=512)
BUDGET, QV, RANK = int(1.2 * GIB), ("q_proj", "v_proj"), 8


def plan(config: LlamaConfig, seq: int) -> int:
    run = Training("lora", RANK, QV, seq=seq, checkpointing=True, base="disk")
    return estimate(ModelSpec.from_config(config.to_hf()), run).peak


def child(folder: str, layers: int, seq: int) -> None:
    """Train and print what it took; fewer layers than the store has are its first ones."""
    store = Store.open(folder, verify=False)
    store = replace(store, config=replace(store.config, num_hidden_layers=layers))
    interpreter = bytes_of("RssAnon")
    found = measure(store, LoRAConfig(RANK, 16, QV), 1, seq, 3, torch.device("cpu"), BUDGET)
    print(json.dumps(found | {"interpreter": interpreter}))


def row(folder: Path, config: LlamaConfig, seq: int) -> float:
    command = [sys.executable, __file__, str(folder), "--child", str(config.num_hidden_layers), "--seq", str(seq)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found, planned = json.loads(done.stdout), plan(config, seq)
    print(f"{config.num_hidden_layers:>6} {seq:>5} {planned / MIB:>9.1f} {found['peak'] / MIB:>9.1f} "
          f"{found['peak'] / planned:>15.3f} {found['interpreter'] / MIB:>12.1f} {found['moved'] / GIB:>10.3f} "
          f"{found['step']:>7.2f}  " + ", ".join(f"{loss:.3f}" for loss in found["loss"]), flush=True)
    return found["peak"] / planned


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--child", type=int)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="the table over layers alone")
    parser.add_argument("--build", action="store_true", help="the stores alone")
    o = parser.parse_args()
    torch.set_num_threads(1)
    if o.child:
        child(str(o.folder), o.child, o.seq)
        sys.exit()
    for name, config in [("small", SMALL)] + [("big", BIG)] * (not o.quick):
        build_store(config, o.folder / name)
    if o.build:
        sys.exit()
    print(f"{'layers':>6} {'seq':>5} {'plan, MiB':>9} {'peak, MiB':>9} {'measured / plan':>15} {'interpreter':>12} "
          f"{'moved, GiB':>10} {'s, step':>7}  loss")
    ratio = 1.0
    if not o.quick:
        store = Store.open(o.folder / "big")
        print(f"{store.nbytes / GIB:.2f} GiB on disk, every checksum right; budget {BUDGET / GIB:.1f} GiB")
        del store
        ratio = row(o.folder / "big", BIG, 64)
    for layers in (4, 8, 16, 32):
        row(o.folder / "small", replace(SMALL, num_hidden_layers=layers), 256)
    sys.exit(abs(ratio - 1) > 0.05)
