"""One training step on a tape: the model, its optimizer's state, forward, backward, the optimizer's step."""

from collections.abc import Callable

from .blocks import OurDecoder
from .hf import Transformers
from .models import ModelSpec
from .tape import Tape, Tensor

OURS = ("llama", "mistral", "qwen2")  # the families that `llama.Llama` is


def play(spec: ModelSpec, run, layers: int) -> Tape:
    """A step of `layers` layers, from the second on: the optimizer has its state."""
    tape = Tape(autocast=run.autocast, shares=run.shares, offload=run.offload)
    model = decoder(tape, spec, run, layers)
    model.targets = tape.state(run.batch * run.seq, 8, "inputs", "targets")
    make_state, update = OPTIMIZERS[run.optimizer]
    state = [t for leaf, rows in tape.leaves for t in make_state(tape, leaf, rows)]
    if run.cards > 1 and run.zero < 2:  # DistributedDataParallel sums gradients in buckets of its own
        state += [tape.state(leaf.count, leaf.width, "buckets", "gradients to be summed") for leaf, _ in tape.leaves]
    for _ in range(min(run.accumulation, 2)):  # from the second on gradients are there before the forward
        tape.place, tape.module = ("forward", None), ""
        visitors = [tape.new(size, 1, name, also=True, part="visiting weights") for name, size in run.visitors(spec)]
        loss = model.loss()
        tape.casts.clear()
        tape.backward(loss)
        del visitors
    tape.place, tape.module, tape.part = ("optimizer", None), run.optimizer, "optimizer temporaries"
    update(tape, tape.leaves)
    return tape


def play_prefill(spec: ModelSpec, run, layers: int) -> Tape:
    """The forward over the prompts, with the cache and every adapter in place: when serving holds most."""
    tape = Tape()
    model = decoder(tape, spec, run, layers)
    others = [tape.state(t.count, t.width, "adapters", "the other adapters") for t, _ in tape.leaves
              for _ in range(run.adapters - 1)]
    tape.recording, model.cache = False, []
    y = model.decode()  # N C
    model.head_of(Tensor(run.batch * spec.hidden, y.width, y.storage))  # of the last position alone
    del others
    return tape


def decoder(tape: Tape, spec: ModelSpec, run, layers: int):
    ours = run.implementation == "minilora" and spec.family in OURS
    return (OurDecoder if ours else Transformers)(tape, spec, run, layers)


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
    """`torch.optim.Adafactor`, one weight after the other. A loop's variables keep the last weight's tensors until the
    next one's are there: two updates meet."""
    for leaf, rows in leaves:
        tape.place, width = ("optimizer", tape.layers[leaf]), leaf.width
        if rows:
            row_mean = tape.new(rows, width, "mean of rows")
            column_mean = tape.new(leaf.count // rows, width, "mean of columns")
            estimate = tape.new(leaf.count, width, "second moment")
            mean = tape.new(1, width, "mean of row means")
            del mean
        else:
            square = tape.new(leaf.count, width, "square")
            estimate = tape.new(leaf.count, width, "second moment")
        update = estimate


def nothing(tape: Tape, leaves: list) -> None:
    """Everything in place."""


def adamw_8bit_state(tape: Tape, leaf: Tensor, rows: int) -> list[Tensor]:
    """bitsandbytes: a byte an element and fp32 a block of 256 (Dettmers 2021, 2110.02861); below 4096 elements fp32."""
    if leaf.count < 4096:
        return [tape.state(leaf.count, 4, "optimizer", name) for name in ("adam m", "adam v")]
    return [tape.state(*size, "optimizer", name) for name in ("adam m", "adam v")
            for size in ((leaf.count, 1), (-(-leaf.count // 256), 4))]


def lion(tape: Tape, leaves: list) -> None:
    """The authors' code, one weight after the other (Chen et al. 2023, 2302.06675, program 1): the sign of a blend of
    momentum and gradient."""
    for leaf, _ in leaves:
        tape.place = ("optimizer", tape.layers[leaf])
        parts = [tape.new(leaf.count, leaf.width, name) for name in ("momentum's part", "gradient's part")]
        update = tape.new(leaf.count, leaf.width, "update")
        del parts
        sign = tape.new(leaf.count, leaf.width, "sign")
        del sign


OPTIMIZERS = {
    "adamw": (full_states("adam m", "adam v"), adamw),
    "sgd": (full_states(), nothing),
    "momentum": (full_states("momentum"), nothing),
    "adafactor": (adafactor_state, adafactor),
    "lion": (full_states("momentum"), lion),
    "adamw8bit": (adamw_8bit_state, nothing),
}
