"""Adapt the base to a task; sweeps of such runs, and their records in data/measured/."""

import copy
import itertools
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from ..config import LoRAConfig
from ..helpdesk import batches, evaluate, load_base, load_task
from ..injection import inject
from ..llama import Llama
from ..peft_methods import Method
from ..shipped import DATA, written
from ..train import Log, train

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
EVERYWHERE = ATTENTION + MLP
LR = {"lora": 1e-2, "full": 1e-3}  # what the learning-rate sweep found best on tone


@dataclass
class Run:
    """A model adapted to a task: its log, and loss (nats a token) and exact match on the test file."""

    model: nn.Module
    log: Log
    loss: float
    exact: float


def adapt(task: str, config: LoRAConfig | Method | None = None, *, base: str | nn.Module = "base", steps: int = 150,
          lr: float | None = None, batch: int = 32, seed: int = 0, on_step: Callable | None = None,
          prepare: Callable[[nn.Module], None] | None = None) -> Run:
    """Fine-tune a copy of the base on a task's train file and score it on its test file.

    Args:
        config: the LoRA, or its relative, to inject; None trains every weight.
        base: a base's name, "random" (its shape, fresh weights), or a model, which is left alone.
        lr: the peak learning rate; None takes that of `LR`.
        seed: of the order of the batches, the adapter's start and dropout.
        prepare: called with the model when it is about to train.
    """
    if isinstance(base, nn.Module):
        model = copy.deepcopy(base)
    else:
        model = Llama(load_base().config, seed) if base == "random" else load_base(base)
    torch.manual_seed(seed)
    if config is None:
        model.requires_grad_(True)
    else:
        inject(model, config)
    if prepare is not None:
        prepare(model)
    data = load_task(task)
    log = train(model, batches(data.train, batch, seed), steps=steps, seed=seed, on_step=on_step, progress=False,
                lr=lr or LR["full" if config is None else "lora"])
    return Run(model, log, *evaluate(model, data.test))


SWEEPS: dict[str, Callable[[], list[dict]]] = {}


def sweep(function: Callable[[], list[dict]]) -> Callable[[], list[dict]]:
    """Makes a function that trains and returns rows a sweep of the command line."""
    SWEEPS[function.__name__] = function
    return function


def grid(*axes) -> tqdm:
    """Every combination, with a progress bar."""
    return tqdm(list(itertools.product(*axes)))


def measured(name: str) -> dict:
    """A recorded sweep: {"command", "machine", "rows"}.

    Raises:
        ValueError: nothing of that name is recorded.
    """
    path = DATA / "measured" / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*"))
        raise ValueError(f"no record {name!r}, expected one of {', '.join(known)}")
    return json.loads(path.read_text())


def record(name: str, rows: list[dict], command: str, folder: Path | None = None, **more) -> None:
    """Write rows to data/measured/ (or `folder`) with the command and the machine that made them, and `more`."""
    folder = folder or written(None, "the record") / "measured"
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({"command": command, "machine": machine, **more})[:-1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(f'{head}, "rows": [\n{lines}\n]}}\n')


def rounded_row(row: dict, digits: int = 4) -> dict:
    """A row with its floats, also those in lists, rounded for a file."""
    return {key: [round(x, digits) for x in value] if isinstance(value, list) else
            round(value, digits) if isinstance(value, float) else value for key, value in row.items()}
