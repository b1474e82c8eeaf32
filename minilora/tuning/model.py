"""The model of a run: transformers' decoder, our layers in it, and a loss that makes logits only where they count."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..config import check_name, require
from ..losses import IGNORE, ChunkedCrossEntropy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("cuda", "mps", "cpu")


def pick_device(name: str | None) -> torch.device:
    """The device of that name; by default cuda, mps or cpu, the first that is there; under torchrun this process's."""
    if name is None and distributed.many():
        return distributed.device()
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    require(kind in DEVICES and (not number or number.isdigit()), "device must be cuda, cuda:NUMBER, mps or cpu", name)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}[kind]
    require(there, "device must be one that this machine has", name)
    return torch.device(name)


def pick_dtype(name: str | None, device: torch.device) -> str:
    """The type of the base's weights: bfloat16 on a card that computes in it, else float32, where the sums of a CPU
    are exact and its 16-bit products slow."""
    if name is None:
        return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    check_name("dtype", name, DTYPES)
    return name


def load_config(name: str) -> Any:
    """transformers' config of a folder, or of a name on the hub."""
    from transformers import AutoConfig

    missing_folder(name)
    return AutoConfig.from_pretrained(name)


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    missing_folder(name)
    return AutoTokenizer.from_pretrained(name)


def load_model(name: str, dtype: str = "float32", device: torch.device | str = "cpu") -> nn.Module:
    """transformers' causal language model in a folder, or of a name on the hub, in evaluation mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    missing_folder(name)
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype]).to(device).eval()


def missing_folder(name: str) -> None:
    """Raise a ValueError for a name that can only be a folder's and is none: no hub is asked for it."""
    if not name.strip():
        raise ValueError("model must be a folder or a name on the hub, got an empty one")
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name} is a file, expected a folder with a config.json, or a name on the hub")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{name} holds no config.json; expected the folder of a Hugging Face model")
    if not path.is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~")) or "\\" in name):
        raise ValueError(f"there is no folder {name}, and it is no name on the hub, which are as Qwen/Qwen3-0.6B")


def tokens_that_end(tokenizer: Any, stop: str, model: nn.Module) -> list[int]:
    """The tokens at which a reply is over: the model's own, the tokenizer's, and what ends a turn in the template."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [own] if isinstance(own, int) else list(own or ())
    last = tokenizer(stop, add_special_tokens=False)["input_ids"][-1:] if stop else []
    return list(dict.fromkeys(x for x in [*found, tokenizer.eos_token_id, *last] if x is not None))


class WithLoss(nn.Module):
    """A causal language model that is called with (ids, targets, counted) and returns the loss, as `train` wants it.

    Where the head is a plain function of the last hidden state, logits are made for the counted tokens alone: of a
    conversation, the reply's. Heads that do more (a cap or a scale on the logits) are asked for all.

    Shapes: ids (B, T), or (B, 2, T) with positions for packed rows; targets (B, T).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.narrow = has_plain_head(model)

    def forward(self, ids: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        which = targets != IGNORE  # (B, T)
        counted = which.sum() if counted is None else counted
        if not self.narrow:
            logits = self.model(**inputs(ids), use_cache=False).logits[which]  # (N, V)
            return F.cross_entropy(logits.float(), targets[which], reduction="sum") / counted
        head = self.model.get_output_embeddings()
        hidden = self.model.get_decoder()(**inputs(ids), use_cache=False).last_hidden_state[which]  # (N, C)
        trained = [p for p in head.parameters() if p.requires_grad and torch.is_grad_enabled()]
        return ChunkedCrossEntropy.apply(hidden.float(), targets[which], counted, In32(head),
                                         torch.is_grad_enabled() and hidden.requires_grad, *trained)


class In32(nn.Module):
    """A head whose logits are fp32, as transformers' loss has them."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, y: Tensor) -> Tensor:  # (N, C) -> (N, V)
        return self.head(y.to(self.head.weight.dtype)).float()


def inputs(ids: Tensor) -> dict[str, Tensor]:
    if ids.dim() == 2:
        return {"input_ids": ids}
    return {"input_ids": ids[:, 0], "position_ids": ids[:, 1]}


@torch.no_grad()
def has_plain_head(model: nn.Module) -> bool:
    """Whether the logits are the head of the decoder's last hidden state, and nothing else: tried on eight tokens."""
    head = model.get_output_embeddings()
    if head is None or not hasattr(model, "get_decoder") or not isinstance(head, nn.Linear):
        return False
    ids = torch.arange(8, device=next(model.parameters()).device)[None] % model.config.get_text_config().vocab_size
    training, decoder = model.training, model.get_decoder()
    model.eval()
    try:
        whole = model(ids, use_cache=False).logits.float()
        parts = head(decoder(ids, use_cache=False).last_hidden_state).float()
    except (TypeError, AttributeError):
        return False
    finally:
        model.train(training)
    return parts.shape == whole.shape and torch.allclose(parts, whole, rtol=1e-3, atol=1e-4)


def loss_of(net: nn.Module, ids: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
    """What `train` calls: the model knows its loss."""
    return net(ids, targets, counted)


@torch.no_grad()
def scores(net: WithLoss, rows, batch: int, pad: int) -> dict[str, float]:
    """Loss (nats a counted token) and exact match (share of rows of which greedy generation gives every counted token,
    each after the right ones) on encoded rows; the number of tokens counted."""
    from .batches import collate

    training, device = net.training, next(net.parameters()).device
    net.eval()
    loss, tokens, exact = 0.0, 0, 0
    order = sorted(rows, key=lambda row: len(row.ids))
    try:
        for i in range(0, len(order), batch):
            ids, targets = (t.to(device) for t in collate(order[i:i + batch], pad))
            which = targets != IGNORE
            logits = picked_logits(net, ids, which)  # (N, V)
            loss += F.cross_entropy(logits, targets[which], reduction="sum").item()
            right = torch.ones_like(which)
            right[which] = logits.argmax(-1) == targets[which]
            exact, tokens = exact + int(right.all(1).sum()), tokens + int(which.sum())
    finally:
        net.train(training)
    return {"loss": loss / max(tokens, 1), "exact": exact / len(order), "tokens": tokens}


def picked_logits(net: WithLoss, ids: Tensor, which: Tensor) -> Tensor:
    """fp32 logits at the places that `which` says: (B, T) -> (N, V)."""
    model = net.model
    if net.narrow:
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state[which]
        return In32(model.get_output_embeddings())(hidden)
    return model(ids, use_cache=False).logits[which].float()
