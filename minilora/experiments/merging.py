"""Notebook 08: what a merged adapter costs at inference."""

import random
import statistics
import time
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from ..config import LoRAConfig
from ..helpdesk import load_base
from ..injection import inject, merge
from ..llama import Llama, LlamaConfig
from .run import ATTENTION, MLP, sweep

SHAPES = {"one token": ("help-desk", 1, 1), "a message": ("help-desk", 1, 64), "32 messages": ("help-desk", 32, 64),
          "one token, wider": ("wider", 1, 1), "a message, wider": ("wider", 1, 64)}


@sweep
def latency() -> list[dict]:
    """Notebook 08: a forward pass with LoRA on all linears, beside and merged, in multiples of the base's time."""
    return [merged_latency(name, rounds=101) for name in tqdm(SHAPES)]


def merged_latency(shape: str, rounds: int) -> dict:
    """One row of `latency`: median seconds of a forward pass, in multiples of the base's. The models take turns, so
    that other work on the machine falls on all alike; "base again" shows what is noise."""
    kind, batch, seq = SHAPES[shape]
    wide = LlamaConfig(730, 768, 2048, 4, 12, tie_word_embeddings=True)
    models = {name: load_base() if kind == "help-desk" else Llama(wide, seed=0)
              for name in ("base", "base again", "beside", "merged", "merged for good")}
    for name in ("beside", "merged", "merged for good"):
        inject(models[name], LoRAConfig(8, 16, ATTENTION + MLP))
    merge(models["merged"])
    merge(models["merged for good"], permanent=True)
    ids = torch.arange(batch * seq).view(batch, seq) % 730  # (B, T)
    seconds = interleaved({name: lambda model=model: model(ids) for name, model in models.items()}, rounds)
    ratios = {name: round(s / seconds["base"], 3) for name, s in seconds.items() if name != "base"}
    return {"shape": shape, "batch": batch, "tokens": seq} | ratios


@torch.no_grad()
def interleaved(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median processor seconds of each call; they run in turn, in an order drawn anew each round (two to warm up)."""
    seconds, order = {name: [] for name in calls}, list(calls)
    for i in range(rounds + 2):
        random.Random(i).shuffle(order)
        for name in order:
            start = time.process_time()
            calls[name]()
            if i >= 2:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}
