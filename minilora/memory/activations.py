"""The activations of an MLP, played on a ledger, by their names in config.json. A new one is one more entry."""

from collections.abc import Callable
from functools import partial

from .ledger import Tensor
from .ops import Ops

POWER = ("power", "scaled power", "gradient")  # what the derivative of a power allocates


def kernel(ops: Ops, x: Tensor, name: str, saves: str = "input") -> Tensor:
    """One kernel, which keeps its input or its output."""
    return ops.unary(x, name, saves)


def gelu_new(ops: Ops, x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(c (x + 0.044715 x^3))), one operator after the other: it keeps four tensors, not one."""

    def inner(x: Tensor) -> Tensor:
        cube = ("x^3", "input", POWER)
        cube = ops.unary(ops.cast(x, 4) if ops.autocast else x, *cube)  # autocast takes powers in fp32
        cube = ops.unary(cube, "scaled x^3")
        return ops.add(x, cube)

    half = ops.unary(x, "x / 2")
    t = ops.unary(inner(x), "scaled sum")
    t = ops.unary(t, "tanh", "output")
    t = ops.unary(t, "1 + tanh", backward=())
    return ops.mul(half, t, "output")


def gelu_bloom(ops: Ops, x: Tensor) -> Tensor:
    """The same as one function, which keeps only x; at most four temporaries live at once, in backward five."""
    count, width = x.count, x.width

    def temporaries(most: int, then: str) -> Tensor:
        parts = [ops.new(count, width, "part") for _ in range(most)]
        del parts[2:]
        return ops.new(count, width, then)

    node = ops.node("gelu", [x], [], lambda s, g, n: [temporaries(5, "gradient")], late=True)
    y = temporaries(4, "output")
    y.node = node
    ops.keep(node, [x])
    return y


ACTIVATIONS: dict[str, Callable[[Ops, Tensor], Tensor]] = {
    "silu": partial(kernel, name="silu"),
    "relu": partial(kernel, name="relu", saves="output"),
    "gelu": partial(kernel, name="gelu"),
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": partial(kernel, name="gelu_pytorch_tanh"),
    "gelu_bloom": gelu_bloom,
}
