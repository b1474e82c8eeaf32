"""The plan of `minilora tune` beside the live bytes of the step that it runs.

    python tests/bench/tune_plan.py

The plan prices our decoder; what runs is transformers' with our layers. Small random Llamas and Qwen2s take real steps on
the CPU, and every storage is followed (`memory.tracer`). Printed is plan / live bytes. Exits with 1 if more was live than
the plan's upper end has for tensors (`FRAGMENTATION`; the workspace, which outweighs so small a model, is not counted):
then a run that "fits" might not. What a plan is short of is taken from the allocator's room.
"""

import sys

import torch
import transformers

from minilora import LoRAConfig, inject
from minilora.memory.bill import estimate
from minilora.memory.fitting import FRAGMENTATION
from minilora.memory.models import ModelSpec
from minilora.memory.optimizers import OPTIMIZERS
from minilora.memory.run import METHODS, Training
from minilora.memory.tracer import measure
from minilora.quant import quantise_model
from minilora.tuning.model import WithLoss

SIZES = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": False}
BATCH, SEQ, RANK = 4, 128, 16


def live(config, method: str, dtype: str, checkpointing: bool) -> int:
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if method == "qlora":
        quantise_model(model)
    whole = WithLoss(model).train()
    if method != "full":
        inject(model, LoRAConfig(RANK, 2 * RANK, "all-linear"))
    optimizer = OPTIMIZERS["adamw"].make([p for p in whole.parameters() if p.requires_grad], 1e-3)
    ids, targets = torch.randint(SIZES["vocab_size"], (2, BATCH, SEQ))  # every token counts

    def step() -> None:
        whole(ids, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return measure(step, real=True).peak


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ratios, short = [], 0
    for family in ("llama", "qwen2"):
        config = transformers.AutoConfig.for_model(family, **SIZES)
        for dtype in ("float32", "bfloat16"):
            for method in METHODS:
                for checkpointing in (False, True):
                    bill = estimate(ModelSpec.from_config(config.to_dict()),
                                    Training(method, RANK, "all-linear", BATCH, SEQ, dtype=dtype, loss="chunked",
                                             checkpointing=checkpointing))
                    held = live(config, method, dtype, checkpointing)
                    ratios.append(bill.peak / held)
                    short += bill.peak * FRAGMENTATION < held
                    print(f"{family:6} {dtype:9} {method:6} {'checkpointing' if checkpointing else '':13} "
                          f"{held / 2**20:6.1f} MiB live, plan / live {ratios[-1]:.3f}", flush=True)
    print(f"plan / live: {min(ratios):.3f} to {max(ratios):.3f}; {short} of {len(ratios)} above the plan's upper end, workspace apart")
    return int(short > 0)


if __name__ == "__main__":
    sys.exit(main())
