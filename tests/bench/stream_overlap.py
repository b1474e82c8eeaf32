"""Does prefetching hide the reading? A streamed training step beside its computing alone and its reading alone.

    OMP_NUM_THREADS=1 python tests/bench/stream_overlap.py FOLDER [--rounds 9] [--layers 16]

For each number of tokens, in turns within one run (medians of the rounds):
    step      as it is, the next layer prefetched by a thread
    compute   the same step, but nothing is copied: the slots keep what they hold
    read      the same visits in the same order, nothing is computed
    one by one   the control: a step without prefetching, which should take compute + read
The last column, step / max(compute, read), is to be at most 1.25. "page cache": the store is in memory, reading it is
copying it, and takes a core. "disk": a shard is thrown out of the page cache after every visit (madvise, then
posix_fadvise), so that each visit reads the disk. "bus": a visit takes as long as a bus of so many bytes a second
would (--bus, half a GB by default), the copying thread asleep for the rest, as a card's copy engine takes no core.
Wants two idle cores: it computes on one, and copies on the other. On a busy machine copying and computing share what
there is, nothing can be hidden but sleep, and only "bus" says something; the load is printed.
"""

import argparse
import ctypes
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from minilora import LoRAConfig, inject, lora_parameters
from minilora.llama import LlamaConfig
from minilora.stream import StreamedLlama
from minilora.weight_store import Store, build_store

CONFIG = LlamaConfig(4096, 1024, 2816, 32, 8, max_position_embeddings=512)
PAGE, DONTNEED = os.sysconf("SC_PAGESIZE"), 4  # MADV_DONTNEED
LIBC = ctypes.CDLL(None)


def throw_out(model: StreamedLlama, i: int, files: list[Path]) -> None:
    """Let no page of a shard stay in memory."""
    for w in model.visits.shards[i]:
        start = -(-w.rest.data_ptr() // PAGE) * PAGE
        size = w.rest.data_ptr() + w.rest.nbytes - start
        if size > 0:
            LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), DONTNEED)
    fd = os.open(files[i], os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def decoder(store: Store, files: list[Path], source: str, bus: float,
            prefetch: bool) -> tuple[StreamedLlama, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = inject(StreamedLlama(store, prefetch=prefetch), LoRAConfig(8, 16)).train()
    copy = model.visits.copy

    def copied(i, free):
        start, done = time.perf_counter(), copy(i, free)
        if source == "disk":
            throw_out(model, i, files)
        if source == "bus":
            time.sleep(max(0.0, sum(w.rest.nbytes for w in model.visits.shards[i]) / bus + start - time.perf_counter()))
        return done

    model.visits.copy = copied
    return model, torch.optim.AdamW(lora_parameters(model), lr=1e-4)


def timed(what) -> float:
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def measure(store: Store, files: list[Path], seq: int, source: str, bus: float, rounds: int) -> tuple[float, ...]:
    layers = store.config.num_hidden_layers
    model, adamw = decoder(store, files, source, bus, prefetch=True)
    slow, adamw_of_slow = decoder(store, files, source, bus, prefetch=False)
    ids, targets = torch.randint(store.config.vocab_size, (2, 1, seq), generator=torch.Generator().manual_seed(0))

    def step(model=model, opt=adamw):
        model.loss(ids, targets).backward()
        opt.step()
        opt.zero_grad()

    def compute():
        copy, model.visits.copy = model.visits.copy, lambda i, free: (None, 0.0)
        step()
        model.visits.copy = copy

    def read():
        for i in (*range(layers + 1), *reversed(range(layers))):
            model.visits.fetch(i)

    kinds = (step, compute, read, lambda: step(slow, adamw_of_slow))
    times = [[timed(kind) for kind in kinds] for _ in range(rounds + 1)][1:]  # the first warms up
    return tuple(statistics.median(column) for column in zip(*times))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--seqs", type=int, nargs="+", default=[16, 64, 256, 512])
    parser.add_argument("--sources", nargs="+", default=["page cache", "disk", "bus"])
    parser.add_argument("--bus", type=float, default=0.5e9)
    o = parser.parse_args()
    torch.set_num_threads(1)
    build_store(CONFIG, o.folder / "small")
    store = Store.open(o.folder / "small", verify=False)
    store = replace(store, config=replace(CONFIG, num_hidden_layers=o.layers))
    files = [o.folder / "small" / f"layer_{i:05}.safetensors" for i in range(o.layers)]
    files.append(o.folder / "small" / "head.safetensors")
    print(f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{'from':<10} {'tokens':>6} {'step, s':>8} {'compute':>8} {'read':>8} {'one by one':>10} "
          f"{'step / max(compute, read)':>26}")
    worst = 0.0
    for source in o.sources:
        for seq in o.seqs:
            step, compute, read, slow = measure(store, files, seq, source, o.bus, o.rounds)
            worst = max(worst, ratio := step / max(compute, read))
            print(f"{source:<10} {seq:>6} {step:>8.3f} {compute:>8.3f} {read:>8.3f} "
                  f"{slow:>10.3f} {ratio:>26.3f}", flush=True)
    sys.exit(worst > 1.25)
