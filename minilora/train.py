"""One training loop for every run: pretraining, full fine-tuning and LoRA differ only in what has requires_grad."""

import json
import math
import random
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import distributed
from .checkpoints import read_safetensors, save_tensors, write_file
from .config import check_name, is_number, require
from .injection import without_gradient
from .losses import IGNORE, masked_cross_entropy

Loss = Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]
SCHEDULES = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1 - share,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
}


@dataclass
class Log:
    """What a run did, one number per step in each list."""

    loss: list[float] = field(default_factory=list)  # mean nats per counted target
    lr: list[float] = field(default_factory=list)  # of the first parameter group
    grad_norm: list[float] = field(default_factory=list)  # over all trained parameters, before clipping
    seconds: float = 0.0  # wall time of all steps
    trained: int = 0  # number of parameters that train

    def save(self, path: str | Path, every: int = 1) -> None:
        """Write the log as JSON, each list thinned to its every `every`-th step."""
        thin = {k: [round(x, 6) for x in v[::every]] if isinstance(v, list) else v for k, v in asdict(self).items()}
        Path(path).write_text(json.dumps({"every": every, **thin}) + "\n")


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """What multiplies the peak learning rate: a straight rise over `warmup` steps, then the schedule."""
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[schedule]((step - warmup) / max(steps - warmup, 1))


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's random numbers."""
    random.seed(seed)
    torch.manual_seed(seed)


def train(model: nn.Module, batches: Callable[[int], tuple[Tensor, Tensor]], *, steps: int, lr: float,
          warmup: int = 10, schedule: str = "cosine", weight_decay: float = 0.0, clip: float | None = 1.0,
          seed: int = 0,
          parameters: Iterable | None = None, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
          on_step: Callable[[int, nn.Module, Log], None] | None = None, checkpoint: str | Path | None = None,
          every: int = 200, stop_at: int | None = None, progress: bool = True, accumulation: int = 1,
          parallel: str | None = None, loss: Loss = masked_cross_entropy) -> Log:
    """Train `model` in place on the parameters that have requires_grad.

    Under torchrun, every process calls this with the same arguments. Each takes its rows of every batch; the numbers
    are those of one process, but for the order in which they are summed. Process 0 writes the checkpoint, from which
    any number of processes goes on.

    Args:
        batches: step -> (ids, targets), each (B, T); targets are -100 where the loss does not count.
        lr: the peak learning rate. What worked in the help-desk world: 1e-2 for LoRA, 1e-3 for full fine-tuning.
        warmup: steps of straight rise to `lr`, before `schedule` ("constant", "linear" or "cosine") takes it down.
        clip: largest global gradient norm; None leaves gradients alone.
        seed: seeds Python and torch when the run starts (dropout draws from there).
        parameters: what trains, if not every parameter with requires_grad: tensors, or the optimizer's groups, each
            with its own peak "lr" if it has one (LoRA+).
        optimizer: its class, called with (parameters, lr=, weight_decay=).
        on_step: called as on_step(step, model, log) after backward and clipping, before the update, so that gradients
            are there to look at.
        checkpoint: a safetensors file, written every `every` steps and at the end. If it is there already the run goes
            on from it, with the numbers that an uninterrupted run would have given.
        stop_at: end after this many steps of the planned `steps`, as if interrupted.
        accumulation: in how many parts, one after the other, each process takes its rows of a batch; less memory for
            activations, and no more exchange of gradients than without.
        parallel: how several processes share the model, "ddp" or "fsdp": see `distributed.share_out`. Under "fsdp" it
            stays shared out, and what reads it afterwards (`save_adapter`, `evaluate`) is to be called in every
            process. Dropout differs from one process to the other. Without torchrun it makes no difference.

        loss: called as loss(model, ids, targets, counted) for each part of a batch; `counted` is the number of targets
            of the whole batch to divide the sum by, or None where the part is the batch.

    Returns:
        Log: loss, learning rate and gradient norm of every step.

    Raises:
        ValueError: nothing to train, a setting out of range, a loss or gradient that is not finite (the weights are
            then those of the step before), a checkpoint that is damaged or of another run, or a batch of fewer rows
            than parts.
        SystemExit: another process of the run is gone: see `distributed.ending_as_one`.
    """
    check_name("schedule", schedule, SCHEDULES)
    last = steps if stop_at is None else stop_at
    for name, value, least in (("steps", steps, 1), ("stop_at", last, 1), ("warmup", warmup, 0), ("every", every, 1),
                               ("accumulation", accumulation, 1)):
        require(type(value) is int and value >= least, f"{name} must be an integer from {least} on", value)
    require(is_number(lr) and lr > 0, "lr must be a positive number", lr)
    require(clip is None or (is_number(clip) and clip > 0), "clip must be a positive number or None", clip)
    require(is_number(weight_decay) and weight_decay >= 0, "weight_decay must be a number from 0 on", weight_decay)
    groups = list(parameters) if parameters is not None else [p for p in model.parameters() if p.requires_grad]
    if not groups:
        raise ValueError("nothing to train: no parameter has requires_grad")
    opt = optimizer(groups, lr=lr, weight_decay=weight_decay)
    peaks = [group["lr"] for group in opt.param_groups]
    require(all(is_number(peak) and peak > 0 for peak in peaks), "every group's lr must be a positive number", peaks)
    trained = [p for group in opt.param_groups for p in group["params"]]
    if not trained or not all(p.requires_grad for p in trained):
        raise ValueError("nothing to train: `parameters` must hold tensors, each with requires_grad")
    rank, processes = distributed.init(parallel)
    net, saved = model, 0
    run = {"steps": steps, "lr": peaks, "warmup": warmup, "schedule": schedule, "weight_decay": weight_decay,
           "clip": clip, "seed": seed, "optimizer": optimizer.__name__}

    def advice() -> str:
        return (f"The checkpoint {checkpoint} stands, at step {saved}: the same command goes on from there." if saved
                else "There is no checkpoint yet: the same command starts afresh.")

    with distributed.ending_as_one(advice):
        if processes > 1:
            net, trained = distributed.share_out(model, parallel, trained)
            left = iter(trained)
            opt = optimizer([{**group, "params": [next(left) for _ in group["params"]]} for group in opt.param_groups],
                            lr=lr, weight_decay=weight_decay)
        device, log = trained[0].device, Log(trained=sum(p.numel() for p in trained))
        seed_everything(seed)
        if checkpoint is not None and Path(checkpoint).exists():
            log = load_checkpoint(checkpoint, trained, opt, run)
            saved = len(log.loss)
        starts = distributed.gathered(torch.tensor(saved, device=device)).tolist()
        require(len(set(starts)) == 1, "all processes must see the same checkpoint, to go on from one step", starts)
        end = min(steps, last)
        model.train()
        opt.zero_grad()  # what a backward pass before this run may have left
        bar = tqdm(range(saved, end), initial=saved, total=steps, disable=not progress or rank > 0, leave=False)
        for step in bar:
            start = time.perf_counter()
            factor = learning_rate_factor(step, steps, warmup, schedule)
            for group, peak in zip(opt.param_groups, peaks):
                group["lr"] = peak * factor
            if processes > 1:
                distributed.seed_step(seed, step)
            batch = tuple(t.to(device) for t in batches(step))
            counted = (batch[1] != IGNORE).sum() if processes * accumulation > 1 else None
            total = 0
            for i in range(accumulation):
                with distributed.syncing(net, i + 1 == accumulation):
                    rows = distributed.piece(batch, rank * accumulation + i, processes * accumulation)
                    part = loss(net, *rows, counted)
                    (part * processes).backward()  # gradients are averaged over the processes
                    total = total + part.detach()
            if step == starts[0] and rank == 0 and (dead := without_gradient(net)):
                warnings.warn(f"no gradient reaches the adapters at {', '.join(dead[:5])}{', ...' * (len(dead) > 5)}: "
                              "they will stay as they started", stacklevel=2)
            total = distributed.gathered(total).sum()
            norm = distributed.full_tensor(nn.utils.clip_grad_norm_(trained, math.inf if clip is None else clip))
            if not (total.isfinite() and norm.isfinite()):
                opt.zero_grad()
                raise ValueError(f"at step {step} the loss is {total.item()} and the gradient's norm {norm.item()}: "
                                 f"the learning rate {lr} is too high, or the batch has no target")
            log.loss.append(total.item())
            log.lr.append(opt.param_groups[0]["lr"])
            log.grad_norm.append(norm.item())
            if on_step is not None:
                on_step(step, model, log)
            opt.step()
            opt.zero_grad()
            log.seconds += time.perf_counter() - start
            if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == end):
                save_checkpoint(checkpoint, trained, opt, run, log)
                saved = step + 1
            if step % 10 == 0:
                bar.set_postfix(loss=f"{log.loss[-1]:.3f}")
    return log


def save_checkpoint(path: str | Path, trained: list[Tensor], opt: torch.optim.Optimizer, run: dict, log: Log) -> None:
    """Write parameters, optimizer state, random state and log to one safetensors file; never a half-written one.

    Of several processes all call this and the first one writes; the others return when it has.
    """
    tensors = {f"param.{i}": p for i, p in enumerate(trained)}
    for i, state in opt.state_dict()["state"].items():
        tensors |= {f"state.{i}.{key}": value for key, value in state.items() if value is not None}
    tensors = distributed.collect(tensors)
    if distributed.is_main_process():
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors["rng"] = torch.get_rng_state()
        metadata = {"run": json.dumps(run), "log": json.dumps(asdict(log))}
        write_file(path, lambda file: save_tensors(tensors, file, metadata))
    distributed.wait_for_all()


def load_checkpoint(path: str | Path, trained: list[Tensor], opt: torch.optim.Optimizer, run: dict) -> Log:
    """Put a run back where `save_checkpoint` left it.

    Raises:
        ValueError: a damaged file, or one of a run with other settings or parameters.
    """
    params: dict[int, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    tensors, metadata = read_safetensors(Path(path), kind="not a training checkpoint")
    try:
        was, log = dict(**json.loads(metadata["run"])), Log(**json.loads(metadata["log"]))
        rng = torch.Generator()
        rng.set_state(tensors.pop("rng"))  # fails here if it is no random state
        for key, value in tensors.items():
            kind, i, *name = key.split(".")
            if kind == "param":
                params[int(i)] = value
            else:
                state.setdefault(int(i), {})[name[0]] = value
        if not len(log.loss) == len(log.lr) == len(log.grad_norm):
            raise ValueError("its log has lists of different lengths")
    except Exception as e:  # the reader's errors have no common class: SafetensorError, OSError, KeyError, ...
        raise ValueError(f"{path} is damaged or not a training checkpoint: {e!r}") from None
    if was != run:
        other = ", ".join(f"{k} {was.get(k)} there, {run[k]} here" for k in run if was.get(k) != run[k])
        raise ValueError(f"{path} is of another run ({other}); delete it to start afresh")
    here = {i: p.shape for i, p in enumerate(trained)}
    if {i: p.shape for i, p in params.items()} != here or not state.keys() <= here.keys():
        raise ValueError(f"{path} is of a run that trains other parameters; delete it to start afresh")
    state = {i: {key: distributed.like(value, trained[i]) for key, value in own.items()} for i, own in state.items()}
    opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})
    with torch.no_grad():
        for i, p in enumerate(trained):
            p.copy_(distributed.like(params[i], p))
    torch.set_rng_state(rng.get_state())
    return log
