"""One training loop for every run: pretraining, full fine-tuning and LoRA differ only in what has requires_grad."""

import hashlib
import json
import math
import random
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import distributed
from .checkpoints import checksum, read_safetensors, save_tensors, write_file
from .config import check_name, is_number, require
from .injection import without_gradient
from .layers import AdapterLayer
from .losses import IGNORE, masked_cross_entropy
from .naming import plain_modules

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
    data: list[str] = field(default_factory=list)  # a digest of the batch

    def save(self, path: str | Path, every: int = 1) -> None:
        """Write the log as JSON, each list thinned to its every `every`-th step."""
        numbers = {k: v for k, v in asdict(self).items() if k != "data"}
        thin = {k: [round(x, 6) for x in v[::every]] if isinstance(v, list) else v for k, v in numbers.items()}
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
            on from it, with the numbers that an uninterrupted run would have given. Of the settings, the adapters, the
            frozen weights, the loss and the batches so far none may have changed; if nothing is left to do, a warning
            says so.
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
            then those of the step before), a checkpoint that is damaged or of another run, with the difference
            named, or a batch of fewer rows than parts.
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
           "clip": clip, "seed": seed, "optimizer": optimizer.__name__,
           "loss": getattr(loss, "__qualname__", repr(loss))}
    if checkpoint is not None:
        run |= what_trains(model, trained)

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
            log = load_checkpoint(checkpoint, trained, opt, run, batches)
            saved = len(log.loss)
        starts = distributed.gathered(torch.tensor(saved, device=device)).tolist()
        require(len(set(starts)) == 1, "all processes must see the same checkpoint, to go on from one step", starts)
        end = min(steps, last)
        if saved >= end and rank == 0:
            warnings.warn(f"{checkpoint} holds all {saved} steps of this run: nothing was left to do", stacklevel=2)
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
            batch = batches(step)
            log.data.append(digest_of(batch))
            batch = tuple(t.to(device) for t in batch)
            counted = (batch[1] != IGNORE).sum() if processes * accumulation > 1 else None
            total = 0
            for i in range(accumulation):
                with distributed.syncing(net, i + 1 == accumulation):
                    rows = distributed.piece(batch, rank * accumulation + i, processes * accumulation)
                    part = loss(net, *rows, counted)
                    (part * processes).backward()  # gradients are averaged over the processes
                    total = total + part.detach()
            if step == starts[0] and rank == 0 and (dead := without_gradient(net, after_backward=True)):
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
        metadata["sha256"] = sealed(tensors, metadata)
        write_file(path, lambda file: save_tensors(tensors, file, metadata))
    distributed.wait_for_all()


def load_checkpoint(path: str | Path, trained: list[Tensor], opt: torch.optim.Optimizer, run: dict,
                    batches: Callable[[int], tuple[Tensor, Tensor]] | None = None) -> Log:
    """Put a run back where `save_checkpoint` left it. Of the batches so far up to 64 are made again and compared.

    Raises:
        ValueError: a damaged file, or one of a run with other settings, adapters, frozen weights or data. Nothing has
            been changed then.
    """
    params: dict[int, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    tensors, metadata = read_safetensors(Path(path), kind="not a training checkpoint")
    try:
        if metadata["sha256"] != sealed(tensors, metadata):
            raise ValueError("its bytes are not those that were written")
        was, log = dict(**json.loads(metadata["run"])), Log(**json.loads(metadata["log"]))
        rng = torch.Generator()
        rng.set_state(tensors.pop("rng"))  # fails here if it is no random state
        for key, value in tensors.items():
            kind, i, *name = key.split(".")
            if kind == "param":
                params[int(i)] = value
            else:
                state.setdefault(int(i), {})[name[0]] = value
        if not len(log.loss) == len(log.lr) == len(log.grad_norm) == len(log.data):
            raise ValueError("its log has lists of different lengths")
    except Exception as e:  # the reader's errors have no common class: SafetensorError, OSError, KeyError, ...
        raise ValueError(f"{path} is damaged or not a training checkpoint: {e!r}") from None
    other = [difference(key, was.get(key), value) for key, value in run.items() if was.get(key) != value]
    if batches is not None and not other:
        seen, count = len(log.data), min(len(log.data), 64)
        steps = {round(i * (seen - 1) / max(count - 1, 1)) for i in range(count)}
        if changed := [step for step in sorted(steps) if digest_of(batches(step)) != log.data[step]]:
            other = [f"other data: the batch of step {changed[0]} is not the one that it saw"]
    if other:
        more = f" and {len(other) - 4} more" * (len(other) > 4)
        raise ValueError(f"{path} is of another run ({', '.join(other[:4])}{more}); delete it to start afresh")
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


# ---------------------------------------------------------------- whose checkpoint it is


def what_trains(model: nn.Module, trained: list[Tensor]) -> dict:
    """What a checkpoint must say of a model so that it is not taken for another's: the parameters that train, the
    adapters with their settings (a value, or a dict of them by module where they differ), and a digest of what is
    frozen, of which about 1,024 entries a tensor are looked at."""
    names = {id(p): name for name, p in model.named_parameters()}
    layers = {name: m for name, m in plain_modules(model, seen=set()) if isinstance(m, AdapterLayer)}
    found: dict = {"targets": sorted(layers)}
    settings = {name: {"method": type(m).__name__} | {key: value for key, value in vars(m).items() if key != "training"
                and not key.startswith("_") and isinstance(value, (int, float, str))} for name, m in layers.items()}
    for key in sorted({key for own in settings.values() for key in own}):
        values = {name: own.get(key) for name, own in settings.items()}
        found[key] = next(iter(values.values())) if len(set(values.values())) == 1 else values
    wanted, frozen = {id(p) for p in trained}, hashlib.sha256()
    for name, t in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        if id(t) not in wanted:
            flat = distributed.full_tensor(t.detach()).flatten()
            entries = flat[:: max(1, len(flat) // 1024)].contiguous().cpu()
            frozen.update(f"{name} {tuple(t.shape)} {t.dtype}".encode() + entries.view(torch.uint8).numpy().tobytes())
    return found | {"parameters": [names.get(id(p), "?") for p in trained], "frozen weights": frozen.hexdigest()[:12]}


def digest_of(batch: tuple[Tensor, ...]) -> str:
    """16 hexadecimal digits that tell a batch from others."""
    return checksum({str(i): t for i, t in enumerate(batch)})[:16]


def sealed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """The checksum of a checkpoint: of its tensors, its settings and its log."""
    words = "\n".join(metadata[key] for key in ("run", "log"))
    return hashlib.sha256((checksum(tensors) + words).encode()).hexdigest()


def difference(key: str, there: Any, here: Any) -> str:
    """One difference between two runs, in a few words."""
    if isinstance(there, list) and isinstance(here, list) and all(isinstance(x, str) for x in there + here):
        only = {"there": [x for x in there if x not in here], "here": [x for x in here if x not in there]}
        said = [f"{', '.join(names[:3])}{', ...' * (len(names) > 3)} only {where}"
                for where, names in only.items() if names]
        return f"{key}: {' and '.join(said) or 'in another order'}"
    if isinstance(there, dict) or isinstance(here, dict):  # by module, on one side at least
        a, b = (x if isinstance(x, dict) else dict.fromkeys(there if x is here else here, x) for x in (there, here))
        name = next((name for name in b if a.get(name) != b[name]), next(iter(a)))
        key, there, here = f"{key} of {name}", a.get(name), b.get(name)
    return f"{key} {str(there)[:60]} there, {str(here)[:60]} here"
