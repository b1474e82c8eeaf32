"""What each process of tests/test_distributed.py runs: torchrun ... tests/distributed_worker.py JOB FOLDER"""

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import small
import torch
import torch.distributed as dist
from torch import nn

from minilora import (
    AdapterBank,
    LoRAConfig,
    inject,
    load_adapter,
    lora_parameters,
    merge,
    remove,
    report,
    save_adapter,
    unmerge,
)
from minilora.distributed import WAYS, Wire, is_main_process
from minilora.helpdesk import IGNORE
from minilora.llama import Llama, LlamaConfig
from minilora.train import Log, train

# every size a multiple of 4, so that shares are even and the closed form of FSDP is exact
SHAPE = LlamaConfig(64, 32, 48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    tie_word_embeddings=True)
ADAPTER = LoRAConfig(4, 8, "all-linear")
STEPS, DOUBLE = 20, torch.float64


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eleven rows that count in threes, so that processes get unequal numbers of rows, and of targets."""
    g = torch.Generator().manual_seed(step)
    ids = (torch.randint(64, (11, 1), generator=g) + 3 * torch.arange(9)) % 64  # (11, 9)
    targets = ids[:, 1:].masked_fill(torch.arange(8) < torch.randint(7, (11, 1), generator=g), IGNORE)
    return ids[:, :-1], targets


def model(config: LoRAConfig | None = ADAPTER, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same on every process and in every run; `config` None: every weight trains."""
    made = Llama(SHAPE, seed=0).to(dtype)
    torch.manual_seed(0)
    return inject(made, config) if config else made


def run(m: nn.Module, batches: Callable = data, **settings) -> Log:
    return train(m, batches, **({"steps": STEPS, "lr": 1e-2, "warmup": 3, "progress": False} | settings))


def counted(m: nn.Module, **settings) -> tuple[Log, list[dict]]:
    """The log, and what each step sent."""
    sent = []
    with Wire() as wire:
        log = run(m, on_step=lambda *_: sent.append(wire.take()), **settings)
    return log, sent


def error(batches: Callable = data, **settings) -> str:
    try:
        run(model(), batches, **settings)
    except ValueError as e:
        return str(e)
    return ""


@torch.no_grad()
def moved(m: nn.Module) -> nn.Module:
    """The adapters away from their start, as if trained."""
    for p in lora_parameters(m):
        p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
    return m


def at_birth(folder: Path, **settings) -> None:
    """Save the adapters before the first update, from within the run."""
    run(moved(model()), stop_at=1, on_step=lambda step, m, log: save_adapter(m, folder), **settings)


def variant(name: str, **settings) -> list[float]:
    """Losses of a short run of a model of another kind, in double precision; of a 16-bit base the first norm."""
    kinds = {"dora": {"use_dora": True}, "pissa": {"init": "pissa"}}
    if name == "looked at":  # every weight trains, and a forward before the update gathers those of this step
        look = torch.no_grad()(lambda step, m, log: m(data(step)[0]))
        return run(model(None, DOUBLE), stop_at=5, on_step=look, **settings).loss
    m = model(LoRAConfig(4, 8, "all-linear", **kinds.get(name, {})), torch.bfloat16 if name == "16-bit" else DOUBLE)
    m.model.checkpointing = name == "checkpointing"
    log = run(m, stop_at=5, **settings)
    return log.grad_norm[:1] if name == "16-bit" else log.loss  # later steps of 16 bits amplify their roundings


VARIANTS = ("dora", "pissa", "16-bit", "checkpointing", "looked at")


def compare(folder: Path) -> dict:
    """Everything that is compared with one process."""
    found = {"no parallel": error(), "wrong parallel": error(parallel="dp"),
             "few rows": error(parallel="ddp", accumulation=6),
             "diverged": error(parallel="fsdp", lr=1e30, clip=None, schedule="constant", optimizer=torch.optim.SGD)}
    for parallel in WAYS:
        here, m = folder / parallel, model(dtype=DOUBLE)
        here.mkdir(exist_ok=True)
        log, sent = counted(m, parallel=parallel, checkpoint=here / "end.safetensors")
        save_adapter(m, here / "trained")
        accumulated, less = counted(model(dtype=DOUBLE), parallel=parallel, accumulation=2, stop_at=5)
        single, bytes_lora = counted(model(), parallel=parallel)
        _, bytes_full = counted(model(None), parallel=parallel, stop_at=5)
        shutil.copy(folder / "start.safetensors", here / f"start{rank()}.safetensors")  # the run overwrites its own
        resumed = run(model(dtype=DOUBLE), parallel=parallel, checkpoint=here / f"start{rank()}.safetensors")
        at_birth(here / "born", parallel=parallel)
        found[parallel] = {
            "double": log.loss, "norm": log.grad_norm, "trained": log.trained, "resumed": resumed.loss,
            "accumulated": accumulated.loss, "single": (single.loss[0], single.grad_norm[0]),
            "sent": {"lora": bytes_lora, "full": bytes_full, "double": sent, "accumulated": less},
            **{name: variant(name, parallel=parallel) for name in VARIANTS}}
    # dropout: other masks in each process, and the same ones after a restart
    masked = LoRAConfig(4, 8, "all-linear", dropout=0.5)
    drop = lambda **more: run(model(masked, DOUBLE), parallel="ddp", **more).loss
    found["dropout"] = drop(stop_at=8)
    seeds = [None] * dist.get_world_size()
    dist.all_gather_object(seeds, torch.initial_seed())
    found["seeds"] = seeds
    drop(stop_at=3, checkpoint=folder / "dropout.safetensors")
    torch.manual_seed(rank())
    found["dropout resumed"] = drop(stop_at=8, checkpoint=folder / "dropout.safetensors")
    found["dropout other"] = drop(stop_at=8, seed=1)
    own = folder / f"own{rank()}.safetensors"  # a checkpoint that process 0 alone can see
    if is_main_process():
        shutil.copy(folder / "start.safetensors", own)
    try:
        run(model(dtype=DOUBLE), parallel="ddp", checkpoint=own)
    except ValueError as e:
        found["own checkpoint"] = str(e)
    return found


def waiting(folder: Path, parallel: str, victim: int | None = None) -> None:
    """A long run; from step 3 on process `victim` is paused, if there is one. Files say which process it is, and that
    step 3 has been reached."""

    def on_step(step: int, m: nn.Module, log: Log) -> None:
        if step == 3 and victim in (None, rank()):
            (folder / "step 3").write_text(str(os.getpid()))
            if victim is not None:
                os.kill(os.getpid(), signal.SIGSTOP)

    run(model(), steps=10**6, parallel=parallel, on_step=on_step)


def interrupted(folder: Path, parallel: str, victim: int | None = None) -> dict:
    """A run that saves as it goes; at step 12 process `victim` is killed."""

    def on_step(step: int, m: nn.Module, log: Log) -> None:
        if step in (5, 10, 15):
            save_adapter(m, folder / parallel / "adapter")
        if step == 12 and rank() == victim:
            (folder / parallel / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    log = run(model(dtype=DOUBLE), parallel=parallel, every=5, on_step=on_step,
              checkpoint=folder / parallel / "run.safetensors")
    return {"loss": log.loss}


ARCHITECTURES = {"llama": small.hf_llama, "gpt2": small.gpt2, "bert": small.bert}


def verbs(folder: Path) -> dict:
    """Train, report, save, load, merge, unmerge, remove and a bank, on models of transformers that are shared out."""
    found = {}
    for parallel, (name, make) in itertools.product(WAYS, ARCHITECTURES.items()):
        here, m = folder / f"{parallel} {name}", inject(make(), ADAPTER)
        losses = run(m, lambda step: (small.IDS, small.IDS), stop_at=3, parallel=parallel).loss
        with torch.no_grad():
            trained = m.eval()(small.IDS).logits
        save_adapter(m, here)
        dist.barrier()  # process 0 has written it
        again = load_adapter(make(), here)
        said = {}
        for verb, call in (("merge", merge), ("bank", lambda m: AdapterBank(m)), ("remove", remove)):
            try:
                call(m)
            except ValueError as e:
                said[verb] = str(e)
            if verb == "merge" and not said:
                said["merged"] = float((small.logits(m) - trained).abs().max())
                unmerge(m)
        found[f"{parallel} {name}"] = {
            "losses": losses, "trainable": report(again).trainable, "said": said,
            "loaded": float((small.logits(again) - trained).abs().max()),
            "moved": float((small.logits(make()) - trained).abs().max()),
            "removed": "remove" in said or torch.equal(small.logits(m), small.logits(make()))}
    found["fsdp 1"] = fsdp_1(folder)
    return found


def fsdp_1(folder: Path) -> dict:
    """Save from a model that FSDP 1 has cut, blocks and whole, after a step; merge must say no."""
    from torch.distributed.fsdp import FullyShardedDataParallel as Cut

    here, m = folder / "fsdp 1", moved(inject(small.hf_llama(), ADAPTER))
    m.model.layers = nn.ModuleList([Cut(layer, use_orig_params=True, device_id=torch.device("cpu"))
                                    for layer in m.model.layers])
    m = Cut(m, use_orig_params=True, device_id=torch.device("cpu"))
    m(small.IDS).logits.square().mean().backward()
    torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=100).step()
    with torch.no_grad():
        trained = m(small.IDS).logits
    save_adapter(m, here)
    dist.barrier()
    said = ""
    try:
        merge(m)
    except ValueError as e:
        said = str(e)
    return {"loaded": float((small.logits(load_adapter(small.hf_llama(), here)) - trained).abs().max()),
            "moved": float((small.logits(moved(inject(small.hf_llama(), ADAPTER))) - trained).abs().max()), "said": said}


def main(job: str, folder: Path, *rest: str) -> None:
    if job == "compare":
        found = compare(folder)
    elif job == "verbs":
        found = verbs(folder)
    elif job == "wait":
        waiting(folder, rest[0], *map(int, rest[1:]))
    elif job == "kill":
        found = interrupted(folder, rest[0], int(rest[1]))
    else:
        found = {parallel: interrupted(folder, parallel) for parallel in WAYS}
    if is_main_process():
        (folder / f"{job}.json").write_text(json.dumps(found))


def rank() -> int:
    return int(os.environ["RANK"])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
