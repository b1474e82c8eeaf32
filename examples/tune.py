"""Adapt the base to a task, in one process or many: the same script, and a run that was stopped goes on.

    python examples/tune.py
    torchrun --standalone --nproc-per-node 4 examples/tune.py
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/tune.py
"""

from minilora import LoRAConfig, inject, save_adapter
from minilora.helpdesk import batches, load_base, load_task
from minilora.train import train

model = inject(load_base(), LoRAConfig(rank=8, alpha=16, target_modules="all-linear"))
train(model, batches(load_task("tone").train, 32), steps=150, lr=1e-2, parallel="fsdp", accumulation=2,
      checkpoint="run.safetensors", every=50)
save_adapter(model, "my_adapter")    # every process calls it, the first one writes
