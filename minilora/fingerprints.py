"""Which base an adapter was trained on: hashes of a model's names, shapes and a sample of its weights."""

import hashlib

import torch
from torch import nn

from .distributed import full_tensor
from .layers import AdapterLayer
from .naming import plain_parameters


def fingerprint(model: nn.Module) -> str:
    """``architecture-weights`` of the base, two short hashes; the same with or without adapters, merged or not.

    The first covers every parameter's name and shape, the second about 1,024 evenly spaced entries of each, rounded to
    bfloat16, so that a base and its bfloat16 copy agree and a 70B model takes a moment, not minutes. A change to
    entries in between goes unseen: it tells bases apart, it does not prove them equal.
    """
    return "-".join(marks(model)[:2])


def marks(model: nn.Module) -> tuple[str, str, str]:
    """The two hashes of `fingerprint`, and the second one of entries rounded to float16. No rounding agrees with both
    16-bit formats, so a file has both: a base and its float16 copy agree in the third."""
    shapes, brain, half = (hashlib.sha256() for _ in range(3))
    layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
    adapters = {id(p) for layer in layers for p in layer.own().values()}
    own = {id(new): before for layer in layers for new, before in layer.replaced().items()}
    # a tied weight counts under each of its names: merging one of its users would part them
    base = {name: own.get(id(p), p).detach() for name, p in plain_parameters(model) if id(p) not in adapters}
    for name, p in sorted(base.items()):
        shapes.update(f"{name} {tuple(p.shape)}\n".encode())
        p = p.dequantize() if type(p).__module__.startswith("torchao") else full_tensor(p)
        entries = p.flatten()[:: max(1, p.numel() // 1024)].cpu()
        for dtype, found in ((torch.bfloat16, brain), (torch.float16, half)):
            found.update(name.encode() + entries.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
    return shapes.hexdigest()[:12], brain.hexdigest()[:12], half.hexdigest()[:12]
