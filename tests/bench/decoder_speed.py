"""A training step and greedy generation of our decoder beside transformers' Llama, at the size of the help-desk base.

    python tests/bench/decoder_speed.py [--rounds 15] [--threads N] [--longest 216]

Both have the same random weights, in fp32, and get the same batches in turns, in one process; what they compute is
checked to be equal. A figure is the median over the rounds, in milliseconds of wall time; a ratio is transformers'
median over ours, so above 1 we are faster. The last ratio is of the medians of processor time, which other programs
on a busy machine disturb less. A training step is forward, loss, backward and AdamW on 64 rows of 80 tokens, as in
pretraining. Generation is a help-desk reply (40 tokens in, 24 out) and on to the end of the context (40 in, 216 out),
with a stop token that never comes, so that both make every token.
"""

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers

from minilora.helpdesk import tokenizer
from minilora.llama import Llama, LlamaConfig


def models() -> tuple[Llama, torch.nn.Module]:
    """Ours and theirs, the size of data/base, with the same weights."""
    config = LlamaConfig(len(tokenizer()), hidden_size=160, intermediate_size=448, num_hidden_layers=4,
                         num_attention_heads=5, max_position_embeddings=256, tie_word_embeddings=True)
    ours, settings = Llama(config, seed=0), config.to_hf()
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def medians(rounds: int, ours: Callable, theirs: Callable, same: Callable) -> list[float]:
    """Median wall milliseconds of both, then median processor milliseconds of both; two rounds before warm up."""
    wall, cpu = ([], []), ([], [])
    for number in range(rounds + 2):
        results = []
        for i, work in enumerate((ours, theirs)):
            start = time.perf_counter(), time.process_time()
            results.append(work())
            if number >= 2:
                wall[i].append(time.perf_counter() - start[0])
                cpu[i].append(time.process_time() - start[1])
        assert same(*results), "ours and transformers' did not compute the same"
    return [1e3 * statistics.median(times) for times in (*wall, *cpu)]


def training_step(model: torch.nn.Module, logits: Callable, ids: torch.Tensor) -> Callable[[], float]:
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> float:
        loss = F.cross_entropy(logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.item()

    return step


def generation(ours: Llama, theirs: torch.nn.Module, ids: torch.Tensor, new: int) -> tuple[Callable, Callable]:
    said, mask = set(ours.generate(ids, new).flatten().tolist()), torch.ones_like(ids)
    stop = next(word for word in range(ours.config.vocab_size) if word not in said)
    return (lambda: ours.generate(ids, new, stop),
            lambda: theirs.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=stop,
                                    pad_token_id=stop)[:, ids.shape[1]:])


def main(rounds: int, threads: int, longest: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    print(f"{os.cpu_count()} CPUs ({platform.machine()}), load {os.getloadavg()[0]:.1f}, {threads} threads, "
          f"torch {torch.__version__}, transformers {transformers.__version__}, {rounds} rounds\n")
    print(f"{'':<38}{'ours ms':>10}{'theirs ms':>11}{'ratio':>8}{'needed':>8}{'ratio of processor time':>26}")
    ours, theirs = models()
    words = ours.config.vocab_size
    rows = [(f"generation, batch {batch}, 40 in, {new} out", 2.0, torch.randint(words, (batch, 40)), new)
            for batch in (1, 8) for new in (24, longest)]
    rows.append(("training step, batch 64, 80 tokens", 1.0, torch.randint(words, (64, 80)), 0))
    for name, needed, ids, new in rows:
        if new:
            ours.eval(), theirs.eval()
            work, same = generation(ours, theirs, ids, new), torch.equal
        else:
            ours.train(), theirs.train()
            work = (training_step(ours, ours, ids),
                    training_step(theirs, lambda ids: theirs(ids, use_cache=False).logits, ids))
            same = lambda a, b: abs(a - b) < 1e-3
        a, b, cpu_a, cpu_b = medians(rounds, *work, same)
        print(f"{name:<38}{a:>10.1f}{b:>11.1f}{b / a:>8.2f}{needed:>8.1f}{cpu_b / cpu_a:>26.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--longest", type=int, default=216)
    main(**vars(parser.parse_args()))
