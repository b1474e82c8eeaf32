"""One training step on a tape: the model, its optimizer's state, forward, backward, the optimizer's step."""

from collections.abc import Callable

from .blocks import OurDecoder
from .hf import Transformers
from .models import ModelSpec
from .tape import Tape, Tensor

OURS = ("llama", "mistral", "qwen2")  # the families that `llama.Llama` is


def play(spec: ModelSpec, run, layers: int) -> Tape:
    """A step of `layers` layers, from the second on: the optimizer has its state."""
    tape = Tape(autocast=run.autocast)
    ours = run.implementation == "minilora" and spec.family in OURS
    model = (OurDecoder if ours else Transformers)(tape, spec, run, layers)
    make_state, update = OPTIMIZERS[run.optimizer]
    state = [t for leaf, rows in tape.leaves for t in make_state(tape, leaf, rows)]
    loss = model.loss()
    tape.casts.clear()
    tape.backward(loss)
    tape.place, tape.module = ("optimizer", None), run.optimizer
    update(tape, tape.leaves)
    return tape
# ---------------------------------------------------------------- optimizers: the state of a weight, and the step


def full_states(*names: str) -> Callable:
    return lambda tape, leaf, rows: [tape.state(leaf.count, leaf.width, "optimizer", name) for name in names]


def at_once(tape: Tape, what: str, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """One foreach operator's results."""
    return [tape.new(*size, what, also=i > 0) for i, size in enumerate(sizes)]


def adamw(tape: Tape, leaves: list) -> None:
    at_once(tape, "root of v", [(leaf.count, leaf.width) for leaf, _ in leaves])


def adafactor_state(tape: Tape, leaf: Tensor, rows: int) -> list[Tensor]:
    """Row and column means of a matrix, all of a vector (Shazeer & Stern 2018, 1804.04235)."""
    sizes = [rows, leaf.count // rows] if rows else [leaf.count]
    return [tape.state(size, leaf.width, "optimizer", "second moment") for size in sizes]


def adafactor(tape: Tape, leaves: list) -> None:
    matrices = [(leaf.count, leaf.width) for leaf, rows in leaves if rows]
    vectors = [(leaf.count, leaf.width) for leaf, rows in leaves if not rows]
    update = at_once(tape, "update", matrices)
    at_once(tape, "mean of a row's", [(1, width) for _, width in matrices])
    del update
    at_once(tape, "update", vectors)


def nothing(tape: Tape, leaves: list) -> None:
    """Everything in place."""


def adamw_8bit_state(tape: Tape, leaf: Tensor, rows: int) -> list[Tensor]:
    """bitsandbytes: a byte an element and fp32 per block of 256 (Dettmers 2021, 2110.02861); fp32 below 4096 elements."""
    if leaf.count < 4096:
        return [tape.state(leaf.count, 4, "optimizer", name) for name in ("adam m", "adam v")]
    return [tape.state(*size, "optimizer", name) for name in ("adam m", "adam v")
            for size in ((leaf.count, 1), (-(-leaf.count // 256), 4))]


def lion(tape: Tape, leaves: list) -> None:
    """One weight after the other (Chen et al. 2023, 2302.06675): the sign of a blend of momentum and gradient."""
    if leaves:
        largest = max(leaf.count * leaf.width for leaf, _ in leaves)
        at_once(tape, "update", [(largest, 1)])


OPTIMIZERS = {
    "adamw": (full_states("adam m", "adam v"), adamw),
    "sgd": (full_states(), nothing),
    "momentum": (full_states("momentum"), nothing),
    "adafactor": (adafactor_state, adafactor),
    "lion": (full_states("momentum"), lion),
    "adamw8bit": (adamw_8bit_state, nothing),
}
