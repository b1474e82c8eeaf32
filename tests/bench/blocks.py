"""A stack of GPT-2-like transformer blocks with one linear each for q, k, v, o, up and down, fitted out with every LoRA
library that is compared here. A new peer is a new entry in `PEERS`."""

import copy
import warnings

import loralib
import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora import LoRAConfig, inject

ATTENTION, ALL = ("q", "k", "v", "o"), ("q", "k", "v", "o", "up", "down")


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def stack(blocks: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width, width // 64) for _ in range(blocks))).to(device, dtype)


def with_loralib(model: nn.Module, rank: int, targets: tuple, dropout: float) -> nn.Module:
    for block in model:
        for name in targets:
            old = getattr(block, name)
            new = loralib.Linear(old.in_features, old.out_features, rank, 2 * rank, dropout)
            new = new.to(old.weight.device, old.weight.dtype)
            new.load_state_dict(old.state_dict(), strict=False)
            setattr(block, name, new)
    loralib.mark_only_lora_as_trainable(model)
    return model


def with_peft(model: nn.Module, rank: int, targets: tuple, dropout: float, **options) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), lora_dropout=dropout)
        return peft.get_peft_model(model, config, **options)


# name -> the model adapted: (base, rank, targets, dropout) -> module
PEERS = {
    "ours": lambda m, rank, targets, dropout: inject(m, LoRAConfig(rank, 2 * rank, targets, dropout)),
    "PEFT": with_peft,
    "PEFT, adapters in the base's dtype": lambda *a: with_peft(*a, autocast_adapter_dtype=False),
    "loralib": with_loralib,
}


def adapted(base: nn.Module, peer: str, rank: int, targets: tuple, dropout: float = 0.0) -> nn.Module:
    """A copy of `base` with the peer's adapters, B moved off zero, in training mode."""
    model = PEERS[peer](copy.deepcopy(base), rank, targets, dropout)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.02)
    return model.train()
