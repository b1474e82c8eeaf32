"""What it costs to trace one LoRA step of a model of GPT-3 175B's shape: seconds, resident memory, and what it says.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/bench/trace_175b.py

96 layers of width d = 12288 with 96 heads, as GPT-3 (Brown et al. 2020, table 2.1), in our decoder: its gated MLP, of
width 8/3 d in the place of 4 d, makes the same 12 d^2 weights a layer. bf16, rank 4 on q and v, 1 x 2048 tokens.
CPU seconds are the process's own, so that what else runs on the machine does not count; the wall clock stands beside
them. Two steps are traced, and the second is what is told. "Resident" is the largest resident set of the whole process.
"""

import argparse
import resource
import time

import torch

from minilora.llama import LlamaConfig
from minilora.memory.traced_step import training_step
from minilora.memory.tracer import fake, measure

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=96)
    parser.add_argument("--verbose", action="store_true", help="print the whole traces")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"start of Python and torch: {time.process_time():.1f} s of CPU")
    shape = LlamaConfig(50257, 12288, 32768, arguments.layers, 96, tie_word_embeddings=True)
    for checkpointing in (False, True):
        cpu, wall = time.process_time(), time.perf_counter()
        with fake():
            step = training_step(shape, rank=4, target_modules=("q_proj", "v_proj"), seq=2048,
                                 checkpointing=checkpointing)
        built = time.process_time()
        t = measure(step)
        end, wall = time.process_time(), time.perf_counter() - wall
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"checkpointing {checkpointing!s:5}: {end - cpu:5.1f} s of CPU ({built - cpu:.1f} of them to make the "
              f"model; wall {wall:.1f} s), resident {resident:.2f} GiB\n  peak {t.peak / 2**30:.2f} GiB, reserved "
              f"{t.reserved / 2**30:.2f} GiB, {len(t.timeline):,} moments; at {t.moment}\n  "
              + ", ".join(f"{kind} {n / 2**30:.2f} GiB" for kind, n in t.parts.items()))
        if arguments.verbose:
            print(t)
