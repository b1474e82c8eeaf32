"""Notebook 01: what a training step sends to other processes."""

import argparse
import json
import subprocess
import sys

import torch

from ..config import LoRAConfig
from ..distributed import WAYS, Wire, is_main_process, many
from ..helpdesk import batches, load_base, load_task
from ..injection import inject
from ..train import train
from .run import ATTENTION, LR, MLP, grid, sweep


@sweep
def wire() -> list[dict]:
    """Notebook 01: bytes that each process sends in a step of fine-tuning the base, full and LoRA, by DDP and FSDP."""
    rows = []
    for method, parallel, processes in grid(LR, WAYS, (2, 4)):
        alone = exchange(method, None)["loss"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run([*torchrun, "-m", "minilora", "wire", "--method", method, "--parallel", parallel],
                              capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        gap = max(abs(a - b) for a, b in zip(alone, found.pop("loss"), strict=True))
        rows.append(found | {"loss_gap": float(f"{gap:.1e}")})
    return rows


def exchange(method: str, parallel: str | None, steps: int = 20) -> dict:
    """Fine-tune the base on `tone`, LoRA of rank 8 on all linears or every weight: the losses, and what this process
    sent in the last step, by kind (bytes)."""
    model = load_base()
    torch.manual_seed(0)
    if method == "lora":
        inject(model, LoRAConfig(8, 16, ATTENTION + MLP))
    sent, data = {}, batches(load_task("tone").train, 16)
    with Wire() as counter:
        log = train(model, data, steps=steps, lr=LR[method], parallel=parallel, progress=False,
                    on_step=lambda *_: (sent.clear(), sent.update(counter.take())))
    processes = torch.distributed.get_world_size() if many() else 1
    return {"method": method, "parallel": parallel, "processes": processes, "trained": log.trained, "sent": sent,
            "loss": log.loss}


def wire_command(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("--method", choices=LR, default="lora")
    parser.add_argument("--parallel", choices=WAYS, default="ddp")
    found = exchange(**vars(parser.parse_args(arguments)))
    if is_main_process():
        print(json.dumps(found))
