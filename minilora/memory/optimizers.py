"""Optimizers: of each the state of a weight and the step on the ledger, and the real one that a trace runs.

So what can be priced can be traced. A new optimizer is one more entry of `OPTIMIZERS`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .ledger import Tensor
from .ops import Ops
from .packages import require_package

if TYPE_CHECKING:
    import torch

Leaves = list[tuple[Tensor, int]]  # what trains, each with its number of rows (0: a vector)


@dataclass(frozen=True)
class Optimizer:
    """One optimizer, on the ledger and real.

    Attributes:
        state: plays what a weight (of so many rows, 0 for a vector) has before the step: ``state(ops, leaf, rows)``.
        update: plays the step on all weights at once: ``update(ops, leaves)``; `ops.layers` knows a leaf's layer.
        make: the real optimizer, ``make(parameters, lr)``; it imports torch itself.
    """

    state: Callable[[Ops, Tensor, int], list[Tensor]]
    update: Callable[[Ops, Leaves], None]
    make: "Callable[[Iterable[torch.nn.Parameter], float], torch.optim.Optimizer]"


def full_states(*names: str) -> Callable[[Ops, Tensor, int], list[Tensor]]:
    """One entry a weight under each name, in the weight's dtype."""
    return lambda ops, leaf, rows: [ops.state(leaf.count, leaf.width, "optimizer", name) for name in names]


def from_torch(name: str, **options) -> Callable:
    """``torch.optim``'s optimizer of this name."""

    def make(parameters, lr: float):
        import torch

        return getattr(torch.optim, name)(parameters, lr=lr, **options)

    return make


def in_place(ops: Ops, leaves: Leaves) -> None:
    """A step that allocates nothing."""


# ---------------------------------------------------------------- AdamW


def adamw(ops: Ops, leaves: Leaves) -> None:
    """One foreach operator's results, all weights at once."""
    roots = [ops.new(leaf.count, leaf.width, "root of v", also=i > 0) for i, (leaf, _) in enumerate(leaves)]
    del roots


def adamw_8bit_state(ops: Ops, leaf: Tensor, rows: int) -> list[Tensor]:
    """bitsandbytes: a byte an element and fp32 a block of 256 (Dettmers 2021, 2110.02861); below 4096 elements fp32."""
    if leaf.count < 4096:
        return [ops.state(leaf.count, 4, "optimizer", name) for name in ("adam m", "adam v")]
    return [ops.state(*size, "optimizer", name) for name in ("adam m", "adam v")
            for size in ((leaf.count, 1), (-(-leaf.count // 256), 4))]


def fused_state(ops: Ops, leaf: Tensor, rows: int) -> list[Tensor]:
    """The kernel's count of steps is on the device too."""
    return [ops.state(1, 4, "optimizer", "count of steps"), *full_states("adam m", "adam v")(ops, leaf, rows)]


PAGED = 100_000  # bitsandbytes' Optimizer2State.get_state_buffer: a smaller state is not paged


def paged_adamw_state(ops: Ops, leaf: Tensor, rows: int) -> list[Tensor]:
    """fp32 in managed memory, which the driver moves to the host when the device is full; a small one is not."""
    return [ops.state(leaf.count, 4, "optimizer", name) for name in ("adam m", "adam v") if leaf.count < PAGED]


def paged_adamw_8bit_state(ops: Ops, leaf: Tensor, rows: int) -> list[Tensor]:
    """As `adamw_8bit_state`, the bytes paged; the numbers of each block are not."""
    if leaf.count < PAGED:
        return adamw_8bit_state(ops, leaf, rows)
    return [ops.state(-(-leaf.count // 256), 4, "optimizer", name) for name in ("adam m", "adam v")]


def from_bitsandbytes(name: str) -> Callable:
    def make(parameters, lr: float):
        return getattr(require_package("bitsandbytes", f"optimizer {name} is that of bitsandbytes").optim,
                       name)(parameters, lr)

    return make


# ---------------------------------------------------------------- Adafactor


def adafactor_state(ops: Ops, leaf: Tensor, rows: int) -> list[Tensor]:
    """Row and column means of a matrix or of each in a stack, all of a vector (Shazeer & Stern 2018, 1804.04235)."""
    sizes = [rows, leaf.count // rows * ops.stacks.get(leaf, 1)] if rows else [leaf.count]
    return [ops.state(size, leaf.width, "optimizer", "second moment") for size in sizes]


def adafactor(ops: Ops, leaves: Leaves) -> None:
    """`torch.optim.Adafactor`, one weight after the other. A loop's variables keep the last weight's tensors until the
    next one's are there: two updates meet."""
    for leaf, rows in leaves:
        ops.place, width, stack = ("optimizer", ops.layers[leaf]), leaf.width, ops.stacks.get(leaf, 1)
        if rows:
            row_mean = ops.new(rows, width, "mean of rows")
            column_mean = ops.new(leaf.count // rows * stack, width, "mean of columns")
            estimate = ops.new(leaf.count, width, "second moment")
            mean = ops.new(stack, width, "mean of row means")
            del mean
        else:
            square = ops.new(leaf.count, width, "square")
            estimate = ops.new(leaf.count, width, "second moment")
        update = estimate


# ---------------------------------------------------------------- Lion


def lion(ops: Ops, leaves: Leaves) -> None:
    """The authors' code, one weight after the other (Chen et al. 2023, 2302.06675, program 1): the sign of a blend of
    momentum and gradient."""
    for leaf, _ in leaves:
        ops.place = ("optimizer", ops.layers[leaf])
        parts = [ops.new(leaf.count, leaf.width, name) for name in ("momentum's part", "gradient's part")]
        update = ops.new(leaf.count, leaf.width, "update")
        del parts
        sign = ops.new(leaf.count, leaf.width, "sign")
        del sign


def make_lion(parameters, lr: float):
    """torch has none."""
    import torch

    class Lion(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self) -> None:
            for p in self.param_groups[0]["params"]:
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                update = m * 0.9 + p.grad * 0.1
                p.add_(torch.sign(update), alpha=-lr)
                m.mul_(0.99).add_(p.grad, alpha=0.01)

    return Lion(parameters, {})


# ---------------------------------------------------------------- Muon


def muon(ops: Ops, leaves: Leaves) -> None:
    """`torch.optim.Muon`, one matrix after the other: five steps of Newton and Schulz in bfloat16, each by the product
    of the matrix with itself on its shorter side."""
    for leaf, rows in leaves:
        ops.place, side = ("optimizer", ops.layers[leaf]), min(rows, leaf.count // rows)
        update = ops.new(leaf.count, leaf.width, "gradient and momentum")
        x = ops.cast(update, 2)
        norms = [ops.new(1, 2, name) for name in ("norm", "norm and a little")]
        del norms
        for _ in range(5):
            gram = ops.new(side * side, 2, "product with itself")
            polynomial = ops.new(side * side, 2, "polynomial of the product")
            x = ops.new(leaf.count, 2, "nearer to orthogonal")
        del gram, polynomial
        update = x
        del x


OPTIMIZERS = {
    "adamw": Optimizer(full_states("adam m", "adam v"), adamw, from_torch("AdamW")),
    "sgd": Optimizer(full_states(), in_place, from_torch("SGD")),
    "momentum": Optimizer(full_states("momentum"), in_place, from_torch("SGD", momentum=0.9)),
    "adafactor": Optimizer(adafactor_state, adafactor, from_torch("Adafactor")),
    "lion": Optimizer(full_states("momentum"), lion, make_lion),
    "muon": Optimizer(full_states("momentum"), muon, from_torch("Muon")),
    "adamw_fused": Optimizer(fused_state, in_place, from_torch("AdamW", fused=True)),
    "adamw8bit": Optimizer(adamw_8bit_state, in_place, from_bitsandbytes("AdamW8bit")),
    "paged_adamw": Optimizer(paged_adamw_state, in_place, from_bitsandbytes("PagedAdamW32bit")),
    "paged_adamw8bit": Optimizer(paged_adamw_8bit_state, in_place, from_bitsandbytes("PagedAdamW8bit")),
}
