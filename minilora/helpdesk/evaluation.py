"""Scores and answers of a model in the help-desk world, and the pretrained bases of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..config import check_name, require
from ..llama import Llama
from ..losses import IGNORE
from ..shipped import DATA
from .generator import Example, conversation
from .names import BASES
from .tasks import collate
from .tokens import tokenizer


class Score(NamedTuple):
    loss: float  # mean nats per reply token
    exact: float  # share of replies that greedy generation gives word for word


@contextmanager
def evaluating(model) -> Iterator[None]:
    """The model in evaluation mode, without gradients; afterwards in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def evaluate(model, examples: list[Example], batch: int = 128) -> Score:
    """Loss and exact match on `examples`.

    Greedy generation gives the reply exactly if and only if each of its tokens, <end> included, is the most likely
    one after the tokens before it. One forward pass over prompt and reply checks that, so nothing is generated.

    Raises:
        ValueError: no examples, or one that is longer than the model's context.
    """
    require(examples and type(batch) is int and batch > 0, "evaluate needs examples and a positive batch", batch)
    loss, tokens, exact = 0.0, 0, 0
    order = sorted(examples, key=lambda e: len(e.prompt) + len(e.reply))
    with evaluating(model):
        for i in range(0, len(order), batch):
            ids, targets = (t.to(getattr(model, "device", None)) for t in collate(order[i:i + batch]))
            logits, counted = model(ids), targets != IGNORE  # (B, T, V), (B, T)
            loss += F.cross_entropy(logits[counted], targets[counted], reduction="sum").item()
            tokens += counted.sum().item()
            exact += ((logits.argmax(-1) == targets) | ~counted).all(1).sum().item()
    return Score(loss / tokens, exact / len(examples))


def load_base(name: str = "base") -> Llama:
    """The pretrained base of this world from data/, in fp32: "base", or "base_early", the same run stopped early.

    Raises:
        ValueError: no such base, or a damaged one.
    """
    check_name("base", name, BASES)
    return Llama.from_pretrained(DATA / name)


def answer(model, message: str, system: str = "", max_new: int = 48) -> str:
    """What the model replies to a customer's message, greedily.

    Raises:
        ValueError: an empty message, unknown words or characters, or more tokens than the context holds.
    """
    if not message.strip():
        raise ValueError("the message is empty, expected at least one word")
    tok = tokenizer()
    ids = tok.encode(conversation(message, system))
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise ValueError(f"the prompt has {len(ids)} tokens, expected fewer than the context of "
                         f"{model.config.max_position_embeddings}")
    with evaluating(model):
        reply = model.generate(torch.tensor([ids], device=model.device), min(max_new, room), stop=tok.end)[0].tolist()
    return tok.decode(reply[:reply.index(tok.end)] if tok.end in reply else reply)
