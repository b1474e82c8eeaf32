"""How fast the spectrum is: ``python tests/bench/spectrum_speed.py [--no-dense]``; the dense SVD takes minutes.

Three figures, on one thread, medians of several runs:
  product_svd at 4096 x 4096, rank 16, against ``torch.linalg.svd`` of the dense product in one run: at least 1,000;
  product_svd at 12288 x 12288, rank 16: below 20 ms;
  ``python -m minilora inspect`` on an adapter of a 7B model (random, rank 64, all linears, 224 modules, fp32, in a
  temporary folder): the time of the whole process and its peak resident memory, below 5 s and 1.5 GiB.
On a busy machine the wall clock says how busy it is, the processor time beside it how much there was to do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from minilora import LoRAConfig
from minilora.adapters import write_adapter
from minilora.peft_format import keys_of, peft_config
from minilora.spectrum import product_svd

ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096))  # name -> (out, in), Llama-2-7B
MLP = {"gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}


def timed(f, times: int) -> list[tuple[float, float]]:
    """Wall-clock and processor milliseconds of each run."""
    f()  # the first call pays for memory
    runs = []
    for _ in range(times):
        wall, busy = time.perf_counter(), time.thread_time()
        f()
        runs.append(((time.perf_counter() - wall) * 1e3, (time.thread_time() - busy) * 1e3))
    return runs


def say(what: str, runs: list[tuple[float, float]]) -> None:
    wall, busy = zip(*runs)
    print(f"{what}: {median(wall):.2f} ms wall ({min(wall):.2f} to {max(wall):.2f}), {median(busy):.2f} ms processor",
          flush=True)


def write_7b(folder: Path, rank: int = 64) -> None:
    """A random adapter on every linear of Llama-2-7B's shape, 159,907,840 numbers at rank 64."""
    tensors = {}
    for layer in range(32):
        for part, shapes in (("self_attn", ATTENTION), ("mlp", MLP)):
            for name, (out, inp) in shapes.items():
                keys = keys_of(f"model.layers.{layer}.{part}.{name}", "linear")
                tensors[keys["lora_A"]], tensors[keys["lora_B"]] = torch.randn(rank, inp), torch.randn(out, rank) * 0.01
    write_adapter(folder, tensors, peft_config(LoRAConfig(rank, 16, (*ATTENTION, *MLP))))


def inspect(folder: Path) -> tuple[float, float, int]:
    """Wall-clock seconds, processor seconds and peak resident bytes of the command."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "minilora", "inspect", str(folder), "--json"],
                               stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    modules = json.loads(process.stdout.read())["modules"]
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0 and len(modules) == 224 and modules[0]["rank"] == 64
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-dense", action="store_true", help="leave out the dense SVD")
    parser.add_argument("--write", metavar="FOLDER", help="only write the adapter of a 7B model to FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.write:
        write_7b(Path(options.write))
        sys.exit()
    for dtype in (torch.float32, torch.float64):
        for d in (4096, 12288):
            B, A = torch.randn(d, 16, dtype=dtype), torch.randn(16, d, dtype=dtype)
            thin = timed(lambda: product_svd(B, A), 25)
            if not options.no_dense and d == 4096 and dtype == torch.float32:
                product, wall, busy = B @ A, time.perf_counter(), time.thread_time()
                torch.linalg.svd(product, full_matrices=False)
                full = (time.perf_counter() - wall) * 1e3, (time.thread_time() - busy) * 1e3
                thin += timed(lambda: product_svd(B, A), 25)  # half before and half after, for the machine's moods
                wall, busy = (x / median(xs) for x, xs in zip(full, zip(*thin)))
                print(f"dense SVD 4096 x 4096 {dtype}: {full[0] / 1e3:.1f} s wall, {full[1] / 1e3:.1f} s processor: "
                      f"{wall:,.0f} and {busy:,.0f} times as long as", flush=True)
            say(f"product_svd {d} x {d} rank 16 {dtype}", thin)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "adapter")
        # by another process: the kernel counts the peak of the one that starts a command as the command's own
        subprocess.run([sys.executable, __file__, "--write", folder], check=True)
        for _ in range(3):
            wall, busy, peak = inspect(folder)
            print(f"inspect, 224 modules of rank 64: {wall:.2f} s wall, {busy:.2f} s processor, "
                  f"{peak / 2**30:.2f} GiB peak", flush=True)
