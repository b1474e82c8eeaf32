"""The help-desk world's tasks: their files, and batches of ids and targets from them or drawn without end."""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..config import check_name, require
from ..losses import IGNORE
from ..shipped import DATA
from .generator import Example, draw, vocabulary
from .names import SPLITS, TASKS
from .tokens import Tokenizer, tokenizer


@dataclass(frozen=True)
class Task:
    """A task's three lists of (prompt, reply)."""

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]


def load_task(name: str) -> Task:
    """The task called `name`, from its files of fixed content in data/tasks/.

    Raises:
        ValueError: no such task, or a file of it that is missing or damaged.
    """
    check_name("task", name, TASKS)
    return Task(name, *(read_examples(task_file(DATA, name, split)) for split in SPLITS))


def read_examples(path: Path) -> list[Example]:
    try:
        return [Example(**json.loads(line)) for line in path.read_text().splitlines()]
    except (ValueError, OSError, TypeError) as e:
        raise ValueError(f"{path} is missing, damaged or no task file: {e}") from None


def task_file(folder: Path, name: str, split: str) -> Path:
    return folder / "tasks" / f"{name}_{split}.jsonl"


def collate(examples: Iterable[Example]) -> tuple[Tensor, Tensor]:
    """Examples as ids (B, T) and the next token at each place (B, T): -100 where it is not part of the reply.

    Short rows are filled up at the right, where causal attention cannot see it.
    """
    tok, rows = tokenizer(), []
    for prompt, reply in examples:
        head, tail = tok.encode(prompt), tok.encode(reply) + [tok.end]
        rows.append((head + tail[:-1], [IGNORE] * (len(head) - 1) + tail))
    longest = max(len(ids) for ids, _ in rows)
    pad = lambda row, filler: row + [filler] * (longest - len(row))
    return (torch.tensor([pad(ids, tok.pad) for ids, _ in rows]),
            torch.tensor([pad(targets, IGNORE) for _, targets in rows]))


def batches(examples: list[Example], batch: int = 32, seed: int = 0) -> Callable[[int], tuple[Tensor, Tensor]]:
    """step -> (ids, targets): every epoch a new order, which `seed` and the step alone decide."""
    if not 1 <= batch <= len(examples):
        raise ValueError(f"batch must be from 1 to the {len(examples)} examples there are, got {batch}")
    per_epoch = len(examples) // batch

    def at(step: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(step, per_epoch)
        order = random.Random(f"{seed} {epoch}").sample(range(len(examples)), len(examples))
        return collate(examples[i] for i in order[place * batch:(place + 1) * batch])

    return at


def endless_batches(*tasks: str, batch: int = 64, seed: int = 0) -> Callable[[int], tuple[Tensor, Tensor]]:
    """step -> (ids, targets) of training examples of the tasks, in turn, drawn afresh without end; `seed` and the step
    alone decide. "facts" stands for that part of `general` alone.

    Sixteen batches are drawn together and cut by length, so that little of a batch is padding.

    Raises:
        ValueError: no such task, or a batch of no examples.
    """
    for task in tasks:
        check_name("task", task, (*TASKS, "facts"))
    require(tasks, "stream needs at least one task", tasks)
    require(type(batch) is int and batch > 0, "batch must be a positive integer", batch)

    @lru_cache(maxsize=1)
    def pool(number: int) -> list[list[Example]]:
        rng = random.Random(f"{' '.join(tasks)} stream {seed} {number}")
        drawn = [draw(rng, tasks[i % len(tasks)], "train") for i in range(16 * batch)]
        drawn.sort(key=lambda e: len(e.prompt + e.reply))
        return rng.sample([drawn[i:i + batch] for i in range(0, len(drawn), batch)], 16)

    return lambda step: collate(pool(step // 16)[step % 16])


def write_files(folder: Path) -> None:
    """Write the tokenizer and every task's files to `folder`."""
    for name in ("base", "tasks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Tokenizer(vocabulary()).save(folder / "base" / "tokenizer.json")
    for name in TASKS:
        for split, size in zip(SPLITS, (800, 200, 200)):
            rng = random.Random(f"{name} {split}")
            lines = [json.dumps(draw(rng, name, split)._asdict()) for _ in range(size)]
            task_file(folder, name, split).write_text("\n".join(lines) + "\n")
