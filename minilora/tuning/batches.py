"""Rows of tokens as batches: split, cut, filled up or packed, in an order that the seed and the step alone decide."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses import IGNORE
from .data import Rows
from .templates import Chat, Encoded


@dataclass(frozen=True)
class Tokens:
    """The rows of a file as tokens. cut: how many were longer than `seq`; empty: lines of rows of which then nothing
    was left to learn."""

    rows: tuple[Encoded, ...]
    cut: int
    empty: tuple[int, ...]

    @property
    def counted(self) -> int:
        return sum(sum(row.trained) for row in self.rows)


def tokenised(chat: Chat, rows: Rows, seq: int | None = None) -> Tokens:
    """All rows of a file as tokens, at most `seq` each: the end of a longer row is left out.

    Raises:
        ValueError: a row that the tokenizer or its template cannot write, with its line; a file of which nothing is
            left.
    """
    found, cut, empty = [], 0, []
    for row in rows.rows:
        try:
            encoded = chat.encode(row)
        except ValueError as error:
            raise ValueError(f"{rows.path}, line {row.line}: {error}") from None
        if seq is not None and len(encoded.ids) > seq:
            cut, encoded = cut + 1, Encoded(row.line, encoded.ids[:seq], encoded.trained[:seq])
        # the first token is nobody's next
        (found if any(encoded.trained[1:]) else empty).append(encoded)
    if not found:
        raise ValueError(f"{rows.path}: no row has anything to learn within {seq} tokens; expected a longer --seq")
    return Tokens(tuple(found), cut, tuple(row.line for row in empty))


def split(rows: Sequence[Encoded], share: float, seed: int) -> tuple[list[Encoded], list[Encoded]]:
    """(training, validation): `share` of the rows, at least one if it is not 0, chosen by the seed."""
    count = max(1, round(share * len(rows))) if share else 0
    if count >= len(rows):
        raise ValueError(f"{len(rows)} rows are too few to hold {count} back; expected more rows or --eval-share 0")
    held = set(random.Random(f"split {seed}").sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def collate(rows: Sequence[Encoded], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows as ids (B, T) and the next token at each place (B, T), -100 where it does not count.

    Short rows are filled up at the right, where causal attention cannot see it: no mask is needed.
    """
    longest = max(len(row.ids) for row in rows) - 1
    ids = torch.full((len(rows), longest), pad)
    targets = torch.full((len(rows), longest), IGNORE)
    for i, row in enumerate(rows):
        tokens, trained = torch.tensor(row.ids), torch.tensor(row.trained)
        ids[i, :len(tokens) - 1] = tokens[:-1]
        targets[i, :len(tokens) - 1] = tokens[1:].where(trained[1:], IGNORE)
    return ids, targets


def packed(rows: Sequence[Encoded], seq: int, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows one behind the other in as few lines of `seq` tokens as come of it, the longest first into the first line
    with room: ids and positions (B, 2, T), and targets (B, T). Positions begin again with each row, by which
    transformers keeps the rows of a line apart."""
    lines: list[list[Encoded]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        size = len(row.ids) - 1
        at = next((i for i, left in enumerate(room) if left >= size), None)
        if at is None:
            lines.append([])
            room.append(seq)
            at = len(lines) - 1
        lines[at].append(row)
        room[at] -= size
    longest = seq - min(room)
    ids, targets = torch.full((len(lines), 2, longest), pad), torch.full((len(lines), longest), IGNORE)
    for i, line in enumerate(lines):
        start = 0
        for row in line:
            one, wanted = collate([row])
            end = start + one.shape[1]
            ids[i, 0, start:end], ids[i, 1, start:end] = one[0], torch.arange(end - start)
            targets[i, start:end] = wanted[0]
            start = end
        ids[i, 1, start:] = torch.arange(longest - start)
    return ids, targets


def batches(rows: Sequence[Encoded], batch: int, seed: int, pad: int,
            pack: int | None = None) -> Callable[[int], tuple[Tensor, Tensor]]:
    """step -> (ids, targets) of `batch` rows: every epoch a new order. The last batch of an epoch takes what is left
    over and fills it up from the beginning of the same order. With `pack`, lines of so many tokens."""
    if not 1 <= batch <= len(rows):
        raise ValueError(f"a step takes {batch} rows and there are {len(rows)} to train on; expected a batch of "
                         "that many at most")
    per_epoch = steps_an_epoch(len(rows), batch)

    def at(step: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(step, per_epoch)
        order = random.Random(f"{seed} {epoch}").sample(range(len(rows)), len(rows))
        order += order[:per_epoch * batch - len(rows)]
        chosen = [rows[i] for i in order[place * batch:(place + 1) * batch]]
        return packed(chosen, pack, pad) if pack else collate(chosen, pad)

    return at


def steps_an_epoch(rows: int, batch: int) -> int:
    return -(-rows // batch)
