"""One training loop for every experiment: pretraining, full fine-tuning and LoRA differ only in what has requires_grad."""

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import distributed
from .config import is_number, require
from .helpdesk import IGNORE, check_name, endless_batches, evaluate, load_task, tokenizer
from .llama import Llama, LlamaConfig
from .shipped import written

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


def masked_cross_entropy(model: nn.Module, ids: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the targets that are not -100. ids, targets (B, T) -> scalar.

    With `counted`, the sum divided by that: for rows that are a part of a batch, their part of its mean.
    """
    if hasattr(model, "chunked_loss"):  # a streamed decoder's, which never has all logits at once
        return model.chunked_loss(ids, targets, counted)
    logits, targets = model(ids).flatten(0, 1), targets.flatten()  # (B T, V), (B T,)
    if counted is None:
        return F.cross_entropy(logits, targets, ignore_index=IGNORE)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / counted


def train(model: nn.Module, batches: Callable[[int], tuple[Tensor, Tensor]], *, steps: int, lr: float,
          warmup: int = 10, schedule: str = "cosine", weight_decay: float = 0.0, clip: float | None = 1.0, seed: int = 0,
          parameters: Iterable | None = None, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
          on_step: Callable[[int, nn.Module, Log], None] | None = None, checkpoint: str | Path | None = None,
          every: int = 200, stop_at: int | None = None, progress: bool = True, accumulation: int = 1,
          parallel: str | None = None) -> Log:
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
            stays shared out, and what reads it afterwards (`save_adapter`, `evaluate`) is to be called in every process.
            Dropout differs from one process to the other. Without torchrun it makes no difference.

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
            loss = 0
            for i in range(accumulation):
                with distributed.syncing(net, i + 1 == accumulation):
                    rows = distributed.piece(batch, rank * accumulation + i, processes * accumulation)
                    part = masked_cross_entropy(net, *rows, counted)
                    (part * processes).backward()  # gradients are averaged over the processes
                    loss = loss + part.detach()
            loss = distributed.gathered(loss).sum()
            norm = distributed.full_tensor(nn.utils.clip_grad_norm_(trained, math.inf if clip is None else clip))
            if not (loss.isfinite() and norm.isfinite()):
                opt.zero_grad()
                raise ValueError(f"at step {step} the loss is {loss.item()} and the gradient's norm {norm.item()}: the "
                                 f"learning rate {lr} is too high, or the batch has no target")
            log.loss.append(loss.item())
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
        fresh = path.with_name(path.name + ".tmp")
        tensors["rng"] = torch.get_rng_state()
        save_file(tensors, fresh, {"run": json.dumps(run), "log": json.dumps(asdict(log))})
        os.replace(fresh, path)
    distributed.wait_for_all()


def load_checkpoint(path: str | Path, trained: list[Tensor], opt: torch.optim.Optimizer, run: dict) -> Log:
    """Put a run back where `save_checkpoint` left it.

    Raises:
        ValueError: a damaged file, or one of a run with other settings or parameters.
    """
    params: dict[int, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as f:
            tensors, metadata = {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}
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


# ---------------------------------------------------------------- the base

CARD = """# The help-desk base{kind}

A Llama-style decoder of {parameters:,} parameters for the made-up support conversations of `minilora/helpdesk.py`.

- Data: the `general` corpus, drawn without end (seed {seed}), in the second part with more of its
  questions about listed facts; only replies are scored. No slot combination or phrasing of the validation and test files is in it.
- Command: `{command}` ({steps} + {more} steps of {batch} conversations{stopped})
- Time: {hours:.2f} hours on {threads} threads, torch {torch}
- Held-out (`general`, test file): loss {score.loss:.4f} nats a token, exact match {score.exact:.1%}
- The loss of every tenth step is in `log.json`.
"""


def pretrain(folder: Path, steps: int, more: int, early: int, batch: int, lr: float, seed: int = 0,
             parallel: str | None = None) -> None:
    """Pretrain the base: write ``base`` and, as it stands after `early` steps, ``base_early`` to `folder`.

    `steps` at a peak learning rate of `lr`, then `more` at a third of it, in which every other conversation is one
    about listed facts: looking up comes late. A run that was interrupted goes on from its checkpoints in `folder`.

    Raises:
        ValueError: `early` is not among the first `steps`; else what `train` and `stream` raise.
    """
    require(steps < 1 or 0 <= early < steps, f"early must be from 0 to below the {steps} steps", early)
    config = LlamaConfig(len(tokenizer()), hidden_size=160, intermediate_size=448, num_hidden_layers=4,
                         num_attention_heads=5, max_position_embeddings=256, tie_word_embeddings=True)
    model = Llama(config, seed)
    run = {"steps": steps, "more": more, "early": early, "batch": batch, "lr": lr, "seed": seed}
    command = " ".join(["python -m minilora.train", *(f"--{key} {value}" for key, value in run.items())])
    examples = load_task("general").test

    def ship(name: str, log: Log) -> None:
        model.save_pretrained(folder / name)
        score = evaluate(model, examples)
        if not distributed.is_main_process():
            return
        tokenizer().save(folder / name / "tokenizer.json")
        log.save(folder / name / "log.json", every=10)
        is_early = name == "base_early"
        (folder / name / "README.md").write_text(CARD.format(
            kind=", stopped early" * is_early, stopped=f", stopped after {early}" * is_early, command=command, **run,
            parameters=log.trained, hours=log.seconds / 3600, threads=torch.get_num_threads(), torch=torch.__version__,
            score=score))

    def on_step(step: int, model: nn.Module, log: Log) -> None:
        if step == early:  # gradients are there, the weights are those of `early` steps
            ship("base_early", log)

    common = {"warmup": 100, "weight_decay": 0.1, "seed": seed, "parallel": parallel}
    log = train(model, endless_batches("general", batch=batch, seed=seed), steps=steps, lr=lr, **common,
                on_step=on_step, checkpoint=folder / "pretraining_1.safetensors")
    second = train(model, endless_batches("general", "facts", batch=batch, seed=seed), steps=more, lr=lr / 3, **common,
                   checkpoint=folder / "pretraining_2.safetensors")
    log = Log(log.loss + second.loss, log.lr + second.lr, log.grad_norm + second.grad_norm,
              log.seconds + second.seconds, log.trained)
    ship("base", log)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m minilora.train", description="Pretrain the base of the notebooks.")
    parser.add_argument("--folder", type=Path, help="where to; data/ of the checkout by default")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--more", type=int, default=2000)
    parser.add_argument("--early", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", choices=distributed.WAYS, help="under torchrun: how its processes share the model")
    try:
        options = vars(parser.parse_args(arguments))
        pretrain(written(options.pop("folder"), "the base"), **options)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun one speaks
            print(f"minilora.train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
