"""The decoders that people fine-tune, written on the tape as their authors wrote them in torch.

In the shape comments N is batch x tokens, C the hidden size, H query heads, K key/value heads, D head size, F the MLP's
width, V the vocabulary, r the rank; sizes are element counts.
"""

from collections.abc import Callable

from .models import Linear, ModelSpec
from .tape import WIDTH, Tape, Tensor


class Matrix:
    """One linear of one layer: its weight, and an adapter if it is a target."""

    def __init__(self, tape: Tape, linear: Linear, run, adapted: bool):
        self.tape, self.linear, self.run = tape, linear, run
        trains, width = run.method == "full", WIDTH[run.dtype]
        part = "trainable weights" if trains else "frozen weights"
        self.weight = tape.state(linear.out * linear.inp, width, part, linear.name, trains, linear.out)
        self.bias = tape.state(linear.out, width, part, f"{linear.name} bias", trains) if linear.bias else None
        self.A = self.B = None
        if adapted:
            self.A = tape.state(run.rank * linear.inp, 4, "adapters", f"{linear.name} lora_A", True, run.rank)
            self.B = tape.state(run.rank * linear.out, 4, "adapters", f"{linear.name} lora_B", True, linear.out)

    def __call__(self, x: Tensor) -> Tensor:
        with self.tape.inside(self.linear.name):
            return self.base(x) if self.A is None else self.adapted(x)

    def base(self, x: Tensor) -> Tensor:
        return self.tape.linear(x, self.weight, self.linear.out, self.bias)

    def adapted(self, x: Tensor) -> Tensor:
        """`layers.LoRAFunction`: the adapter's part is added in place, and x, A and B are all that is kept."""
        tape, inp, out, rank, rows = self.tape, self.linear.inp, self.linear.out, self.run.rank, x.count // self.linear.inp
        with tape.unrecorded():
            y = self.base(x)  # N out
            seen = tape.cast(x, y.width)  # N in
            a = tape.cast(self.A, y.width)
            inner = tape.new(rows * rank, y.width, "x A^T")
            del a
            b = tape.cast(self.B, y.width)
            del b, inner, seen

        def backward(saved, grads, needs):
            x, A, B, W = saved
            width = grads[0].width
            seen, a, b = tape.cast(x, width), tape.cast(A, width), tape.cast(B, width)
            inner = tape.new(rows * rank, width, "gradient of x A^T")
            dA = tape.cast(tape.new(rank * inp, width, "gradient of lora_A"), A.width)
            again = tape.new(rows * rank, width, "x A^T again")
            dB = tape.new(rank * out, width, "gradient of lora_B")
            del again
            dB, dx = tape.cast(dB, B.width), None
            if needs[0]:
                w = tape.cast(W, width)
                dx = tape.new(rows * inp, width, "input gradient")
                del w
                dx = tape.cast(dx, x.width)
            return dx, dA, dB

        node = tape.node("lora", [x, self.A, self.B], [], backward, late=True)
        tape.keep(node, [x, self.A, self.B, self.weight])
        y.node = node
        return y


class OurDecoder:
    """`llama.Llama`, line by line."""

    def __init__(self, tape: Tape, spec: ModelSpec, run, layers: int):
        self.tape, self.spec, self.run = tape, spec, run
        self.trains, self.width = run.method == "full", WIDTH[run.dtype]
        adapted = spec.targets(run.target_modules) if run.method != "full" else ()
        self.embedding = self.weight(spec.vocab * spec.hidden, "embed_tokens", spec.vocab)
        self.layers = []
        for i in range(layers):
            matrices = {m.name: Matrix(tape, m, run, m in adapted) for m in spec.linears()}
            self.layers.append((matrices, self.weight(spec.hidden, "norm"), self.weight(spec.hidden, "norm")))
        self.norm_weight = self.weight(spec.hidden, "norm")
        self.head = self.embedding if spec.tied else self.weight(spec.vocab * spec.hidden, "lm_head", spec.vocab)
        self.tables = [tape.state(spec.context * spec.head_dim, self.width, "buffers", "rotary table") for _ in "cs"]
        self.ids, self.targets = (tape.state(run.batch * run.seq, 8, "inputs", n) for n in ("ids", "targets"))

    def weight(self, count: int, name: str, rows: int = 0) -> Tensor:
        return self.tape.state(count, self.width, "trainable weights" if self.trains else "frozen weights", name,
                               self.trains, rows)

    def loss(self) -> Tensor:
        return self.tape.cross_entropy(self.logits(), self.targets)

    def logits(self) -> Tensor:
        tape, spec = self.tape, self.spec
        y = self.decode()
        with tape.inside("lm_head"):
            return tape.linear(y, self.head, spec.vocab)  # N V

    def decode(self) -> Tensor:
        tape, spec = self.tape, self.spec
        tape.place = ("forward", None)
        with tape.inside("embed_tokens"):
            x = tape.embedding(self.ids, self.embedding, spec.hidden)  # N C
        size = self.run.seq * spec.head_dim
        tables = [tape.cast(Tensor(size, t.width, t.storage), x.width) for t in self.tables]  # T D
        for i, layer in enumerate(self.layers):
            tape.place = ("forward", i)
            if self.run.checkpointing:
                x = tape.checkpoint(lambda x, layer=layer: self.block(x, layer, tables), x)
            else:
                x = self.block(x, layer, tables)
        tape.place = ("forward", None)
        return self.norm(x, self.norm_weight)

    def block(self, x: Tensor, layer: tuple, tables: list[Tensor]) -> Tensor:
        matrices, norm1, norm2 = layer
        x = self.tape.add(x, self.attention(self.norm(x, norm1), matrices, tables), "residual sum")
        return self.tape.add(x, self.mlp(self.norm(x, norm2), matrices), "residual sum")

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        tape = self.tape
        with tape.inside("norm"):
            if x.width == weight.width == 4:
                return self.fused_norm(x, weight)
            wide = tape.cast(x, 4)
            wide = tape.mul(wide, self.inverse_rms(wide))
            return tape.mul(weight, tape.cast(wide, x.width), "output")

    def inverse_rms(self, wide: Tensor) -> Tensor:
        """1 / rms of every row, (N,)."""
        tape, rows = self.tape, wide.count // self.spec.hidden
        power = ("power", "scaled power", "gradient")
        square = tape.unary(wide, "square", "input", power)
        mean = tape.unary(square, "mean", count=rows)
        del square
        mean = tape.unary(mean, "mean + eps", backward=())
        return tape.unary(mean, "1 / rms", "output", power)

    def fused_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """One kernel; keeps x, the weight and 1 / rms."""
        tape, count, size = self.tape, x.count, weight.count

        def backward(saved, grads, needs):
            dx = tape.new(count, 4, "input gradient") if needs[0] else None
            return dx, tape.new(size, 4, "weight gradient") if needs[1] else None

        node = tape.node("norm", [x, weight], [], backward, late=True)
        rms = tape.new(count // size, 4, "1 / rms")
        y = tape.new(count, 4, "output", node=node)
        tape.keep(node, [x, weight, rms])
        return y

    def attention(self, x: Tensor, m: dict, tables: list[Tensor]) -> Tensor:
        tape, spec = self.tape, self.spec
        q, k, v = (tape.view(m[f"self_attn.{p}_proj"](x)) for p in "qkv")  # N H D, N K D
        with tape.inside("attention"):
            q, k = self.rotate(q, *tables), self.rotate(k, *tables)
            y = tape.flash_attention(q, k, v, self.run.batch * self.run.seq * spec.heads)  # N H D
        return m["self_attn.o_proj"](tape.view(y))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tape = self.tape
        left, right = tape.halves(x)
        return tape.add(tape.mul(x, cos), tape.mul(tape.cat(tape.unary(right, "negated half"), left), sin))

    def mlp(self, x: Tensor, m: dict) -> Tensor:
        tape = self.tape
        return m["mlp.down_proj"](tape.mul(tape.unary(m["mlp.gate_proj"](x), "silu", "input"), m["mlp.up_proj"](x)))


def play(spec: ModelSpec, run, layers: int) -> Tape:
    """One training step, from the second on: the optimizer has its state."""
    tape = Tape(autocast=run.autocast)
    model = OurDecoder(tape, spec, run, layers)
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
