"""Tensors that lie at odd places in memory, as a mapped file's or a bucket's do.

A CPU's matrix kernels may round differently where a tensor does not begin on a boundary of 64 bytes, and not every
processor's do: a test that is green on one may be red on another. `pytest --shift-memory SEED` moves what every
operation returns 4 to 60 bytes off that boundary, in forward, in backward and in the optimizer, so that any machine
shows it.
"""

import random

import numpy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ENVIRONMENT = "MINILORA_SHIFT_MEMORY"  # the seed, for the processes that a test starts
BOUNDARY = 64  # bytes: what torch's allocator aligns to


def storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class Shifted(TorchDispatchMode):
    """Re-homes each new dense floating-point CPU tensor; views and what an operation writes in place stay."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.random = random.Random(seed)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = {storage(t) for t in tree_leaves((args, kwargs)) if plain(t)}
        out = operation(*args, **(kwargs or {}))
        return tree_map(lambda t: self.shifted(t) if plain(t) and storage(t) not in given else t, out)

    def shifted(self, t: Tensor) -> Tensor:
        size = t.element_size()
        if not t.is_floating_point() or size > 8 or t.numel() == 0 or t.requires_grad:
            return t
        buffer = numpy.empty(t.untyped_storage().nbytes() + 2 * BOUNDARY, numpy.uint8)
        start = -buffer.ctypes.data % BOUNDARY + size * self.random.randrange(max(1, 4 // size), BOUNDARY // size)
        home = torch.frombuffer(buffer, dtype=t.dtype, count=t.untyped_storage().nbytes() // size, offset=start)
        return home.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(t)


def plain(t) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" and t.layout == torch.strided
