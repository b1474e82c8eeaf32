"""The plan of a streamed step of 175 billion weights, and the same step traced whole on fake tensors, layer by layer.

    OMP_NUM_THREADS=1 python tests/bench/stream_175b.py [--layers 96] [--verbose]

GPT-3 175B's shape (Brown et al. 2020, table 2.1) in our decoder, whose gated MLP of width 8/3 d makes the same 12 d^2
weights a layer; NF4, LoRA of rank 4 on q and v, 1 x 2048 tokens, the base in the host's memory. The trace follows
stream.py itself: its slots, its visits, its chunked loss. Exits with 1 if the two differ by more than 2%.
"""

import argparse
import sys
import time

import torch

from minilora import LoRAConfig, inject, lora_parameters
from minilora.llama import LlamaConfig
from minilora.memory import ModelSpec, Training, estimate
from minilora.memory.tracer import fake, trace
from minilora.stream import StreamedLlama
from minilora.weight_store import Store

GIB = 2**30

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=96)
    parser.add_argument("--verbose", action="store_true", help="print the plan and the trace whole")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    config = LlamaConfig(50257, 12288, 32768, arguments.layers, 96, tie_word_embeddings=True)
    with fake():
        model = inject(StreamedLlama(Store.hollow(config, "nf4")), LoRAConfig(4, 8, ("q_proj", "v_proj")))
        adamw = torch.optim.AdamW(lora_parameters(model), lr=1e-3)
        ids, targets = (torch.randint(config.vocab_size, (1, 2048)) for _ in range(2))
        for p in lora_parameters(model):  # the optimizer's state, as after a first step
            p.grad = torch.zeros_like(p)
        adamw.step()
        adamw.zero_grad()
    with trace() as t:
        model.loss(ids, targets).backward()
        adamw.step()
        adamw.zero_grad()
    bill = estimate(ModelSpec.from_config(config.to_hf()),
                    Training("qlora", 4, ("q_proj", "v_proj"), seq=2048, checkpointing=True, base="host"))
    print(f"traced in {time.process_time() - start:.0f} s of CPU, {len(t.timeline):,} moments")
    print(f"plan  {bill.peak / GIB:.3f} GiB, at: {bill.moment}\ntrace {t.peak / GIB:.3f} GiB, at: {t.moment}\n"
          f"trace / plan {t.peak / bill.peak:.4f}")
    print(*([bill, t] if arguments.verbose else [bill]), sep="\n\n")
    sys.exit(abs(t.peak / bill.peak - 1) > 0.02)
