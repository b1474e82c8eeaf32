"""How fast 4-bit weights become dense, beside the plain table look-up and, if it is installed, bitsandbytes' CPU call.

    python tests/bench/dequantise.py [--sizes 256 1024 4096] [--rounds 15]

Square NF4 matrices with double quantisation. Each figure is nanoseconds of CPU time a weight, the median of rounds in
which the candidates take turns on one thread; CPU time of that thread, so that a busy machine blurs it little. "write"
is a plain fill of the output, which nothing that returns a fresh tensor beats by much. The last columns are ratios of
medians: above 1, ours is the faster. Ours is first checked to equal the plain look-up, every bit.
"""

import argparse
import contextlib
import io
import statistics
import time

import torch
from torch import Tensor

from minilora.quant import BLOCK, LEVELS, QuantisedTensor, dequantise, dequantise_absmax, quantise, unpack

try:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
except ImportError:
    quantize_4bit = None


def plain(q: QuantisedTensor, dtype: torch.dtype) -> Tensor:
    """The definition in three lines: unpack, look up, multiply."""
    levels = torch.tensor(LEVELS[q.kind])[unpack(q.codes).long()].view(-1, BLOCK)  # (b, 64)
    absmax = dequantise_absmax(q.absmax, q.absmax_scale, q.absmax_mean)  # (b,)
    return (levels * absmax[:, None]).to(dtype).view(q.shape)


def race(size: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Candidate -> nanoseconds of CPU time a weight."""
    torch.manual_seed(0)
    weight = torch.randn(size, size).to(dtype)
    q = quantise(weight)
    assert torch.equal(dequantise(q, dtype), plain(q, dtype))
    candidates = {"ours": lambda: dequantise(q, dtype), "plain": lambda: plain(q, dtype),
                  "write": lambda: torch.empty(size, size, dtype=dtype).fill_(1)}
    if quantize_4bit:
        theirs = quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK, compress_statistics=True)
        candidates["bitsandbytes"] = lambda: dequantize_4bit(*theirs)
    seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(s) / size**2 * 1e9 for name, s in seconds.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ["ours", "plain", "write"] + ["bitsandbytes"] * bool(quantize_4bit)
    others = [name for name in names if name not in ("ours", "write")]
    print(f"{'size':>6} {'dtype':<9}" + "".join(f"{n:>14}" for n in names)
          + "".join(f"{n + '/ours':>20}" for n in others))
    for size in options.sizes:
        for dtype in (torch.float32, torch.bfloat16):
            took = race(size, dtype, options.rounds)
            print(f"{size:>6} {str(dtype)[6:]:<9}" + "".join(f"{took[n]:>14.3f}" for n in names)
                  + "".join(f"{took[n] / took['ours']:>20.2f}" for n in others), flush=True)
