"""What a LoRA linear makes autograd keep for backward, beside the other libraries, counted with saved-tensor hooks.

    python tests/bench/saved_bytes.py

"one linear": bytes per token beyond the input, the weights and the adapters, of a 768 x 768 linear of rank 8.
"a block": MiB that a whole transformer block (width 768, all six linears adapted, 2,048 tokens) keeps, everything but
parameters and its input; the frozen block without adapters is the first row.
loralib's adapters have the base's dtype; PEFT's are fp32 by default, as ours are.
"""

import copy
import warnings

import torch
from blocks import ALL, PEERS, adapted, stack
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

TOKENS = (8, 256)
SCENES = {  # name -> dtype of the base, dropout, autocast
    "fp32": (torch.float32, 0.0, False),
    "fp32, dropout 0.1": (torch.float32, 0.1, False),
    "bf16": (torch.bfloat16, 0.0, False),
    "bf16, dropout 0.1": (torch.bfloat16, 0.1, False),
    "fp32, autocast bf16": (torch.float32, 0.0, True),
}


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(768, 768)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


def saved_bytes(model: nn.Module, x: Tensor, autocast: bool = False) -> int:
    """Bytes of the storages that autograd keeps, each counted once, beyond the input's and the parameters'."""
    known = {t.untyped_storage()._cdata for t in (x, *model.parameters())}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(x)
    return sum(s.nbytes() for key, s in kept.items() if key not in known)


def figures(dtype: torch.dtype, dropout: float, autocast: bool) -> dict[str, tuple[float, float]]:
    """Row -> bytes per token of one linear, MiB of a block."""
    x = torch.randn(*TOKENS, 768, dtype=dtype, requires_grad=True)
    one, block = nn.Sequential(One().to(dtype)), stack(1, 768, dtype)
    rows = {"no adapter": tuple(copy.deepcopy(m).requires_grad_(False) for m in (one, block))}
    rows |= {peer: (adapted(one, peer, 8, ("q",), dropout), adapted(block, peer, 8, ALL, dropout)) for peer in PEERS}
    return {name: (saved_bytes(a, x, autocast) / x[..., 0].numel(), saved_bytes(b, x, autocast) / 2**20)
            for name, (a, b) in rows.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for scene, options in SCENES.items():
        print(f"\n{scene:<36}{'one linear, bytes a token':>28}{'a block, MiB':>16}")
        for name, (one, block) in figures(*options).items():
            print(f"{name:<36}{one:>28.1f}{block:>16.1f}")
