"""Generation beside the plain path, at sizes where copying weights pays and where it does not.

    python tests/bench/generate_cost.py [--rounds 15] [--threads N]

Three random decoders of (width, layers) generate 1 and 30 tokens after a prompt of 16, with the fast path as `generate`
chooses it, and with it never taken; in turns, the order changing from round to round, in one process. A figure is the
median over the rounds, in milliseconds of processor time, which other programs disturb less than wall time; the ratio,
plain over ours, is the median of the rounds' own ratios. Both must say the same tokens. Exits with 1 if a ratio is below
0.97.
"""

import argparse
import os
import statistics
import sys
import time

import torch

from minilora import fast_decode
from minilora.llama import Llama, LlamaConfig

SIZES = ((160, 4), (768, 12), (2048, 8))
LEAST = 0.97


def timed(model: Llama, ids: torch.Tensor, new: int, plain: bool, times: int) -> tuple[float, torch.Tensor]:
    """Processor milliseconds of a generation, the mean of so many, and what it said."""
    pays, fast_decode.pays = fast_decode.pays, (lambda *_: False) if plain else fast_decode.pays
    try:
        start = time.process_time()
        for _ in range(times):
            said = model.generate(ids, new)
        return 1e3 * (time.process_time() - start) / times, said
    finally:
        fast_decode.pays = pays


def compare(width: int, layers: int, new: int, rounds: int) -> tuple[float, float, float]:
    """Median milliseconds of ours and of the plain path, and the median of plain over ours."""
    config = LlamaConfig(1000, width, width * 14 // 5, layers, width // 32, max_position_embeddings=64)
    model, ids, times = Llama(config, seed=0).eval(), torch.randint(1000, (1, 16)), {False: [], True: []}
    enough = max(1, round(100 / timed(model, ids, new, True, 1)[0]))  # a tenth of a second each, that noise may even out
    for i in range(rounds + 1):
        said = {}
        for plain in (False, True) if i % 2 else (True, False):
            seconds, said[plain] = timed(model, ids, new, plain, enough)
            times[plain].append(seconds)
        assert torch.equal(said[False], said[True]), "the fast path says other tokens than the plain one"
    ours, plain = times[False][1:], times[True][1:]  # the first round warms up
    return *map(statistics.median, (ours, plain)), statistics.median(b / a for a, b in zip(ours, plain))


def main(rounds: int, threads: int) -> int:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {threads} threads, torch {torch.__version__}, "
          f"{rounds} rounds\n\n{'width x layers':<16}{'tokens':>7}{'fast path':>11}{'ours ms':>10}{'plain ms':>10}{'ratio':>8}")
    least = []
    for width, layers in SIZES:
        with torch.device("meta"):
            decoder = Llama(LlamaConfig(1000, width, width * 14 // 5, layers, width // 32)).model
        for new in (1, 30):
            ours, plain, ratio = compare(width, layers, new, rounds)
            least.append(ratio)
            taken = "taken" if fast_decode.pays(decoder, new) else "not taken"
            print(f"{f'{width} x {layers}':<16}{new:>7}{taken:>11}{ours:>10.1f}{plain:>10.1f}{ratio:>8.3f}", flush=True)
    return int(min(least) < LEAST)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    sys.exit(main(**vars(parser.parse_args())))
