"""Our decoder and our LoRA layer, written on the tape line by line; transformers' and PEFT's are in `hf.py`.

In the shape comments N is batch x tokens, C the hidden size, H query heads, K key/value heads, D head size, F the MLP's
width, V the vocabulary, r the rank; sizes are element counts.
"""

from .models import Linear, ModelSpec
from .tape import WIDTH, Tape, Tensor, as_view


POWER = ("power", "scaled power", "gradient")  # what the derivative of a power allocates
PLUS_EPS, INVERSE_ROOT = ("mean + eps", "", ()), ("1 / rms", "output", POWER)


LOSS_CHUNK = 512  # tokens


class Matrix:
    """One linear of one layer: its weight, dense or in 4 bits, and our adapter if it is a target."""

    def __init__(self, tape: Tape, linear: Linear, run, adapted: bool):
        self.tape, self.linear, self.run, self.width = tape, linear, run, WIDTH[run.dtype]
        self.flat = linear.name in ("fc1", "fc2")  # OPT's MLP lays its tokens in one row
        self.weight = self.codes = self.bias = self.A = self.B = None
        size = linear.out * linear.inp
        if run.method == "qlora":
            self.codes = tape.four_bit(size, linear.name, run.double_quant, run.implementation == "transformers")
        else:
            self.weight = tape.weight(size, self.width, linear.name, run.method == "full", linear.out)
        if linear.bias:
            self.bias = tape.weight(linear.out, self.width, f"{linear.name} bias", run.method == "full")
        if adapted:
            self.A = tape.state(run.rank * linear.inp, 4, "adapters", f"{linear.name} lora_A", True, run.rank)
            self.B = tape.state(run.rank * linear.out, 4, "adapters", f"{linear.name} lora_B", True, linear.out)
            self.B.node.copies = run.implementation == "minilora"

    def __call__(self, x: Tensor) -> Tensor:
        with self.tape.inside(self.linear.name):
            return self.base(x) if self.A is None else self.adapted(x)

    def base(self, x: Tensor) -> Tensor:
        if self.codes:
            return self.four_bit_base(x)
        return self.tape.linear(x, self.weight, self.linear.out, self.bias, flat=self.flat)

    def four_bit_base(self, x: Tensor) -> Tensor:
        """`quant.Linear4bitFunction`: keeps nothing, makes the dense weight in forward and again in backward."""
        tape, inp, out, rows, x_width = self.tape, self.linear.inp, self.linear.out, x.count // self.linear.inp, x.width

        def backward(saved, grads, needs):
            w = self.dequantise(grads[0].width)
            dx = tape.new(rows * inp, grads[0].width, "input gradient")
            del w
            return [tape.cast(dx, x_width)]

        node = tape.node("linear in 4 bits", [x], [], backward)
        with tape.unrecorded():
            x = tape.amp(x)
            y = tape.linear(x, self.dequantise(x.width), out)
        y.node = node
        return y

    def dequantise(self, width: int) -> Tensor:
        """`quant.dequantise`: piece by piece of 2^24 weights, through the table of all pairs of levels."""
        tape, blocks = self.tape, -(-self.linear.out * self.linear.inp // 64)
        levels = tape.new(16, 4, "levels")
        table = tape.new(512, 4, "pairs of levels")  # on a real device it is kept from one call to the next
        del levels
        absmax = None
        if self.run.double_quant:
            absmax = tape.new(blocks, 4, "absmax")
            if blocks % 256:
                absmax = tape.new(-(-blocks // 256) * 256, 4, "absmax")
        w = tape.new(blocks * 64, width, "dense weight")
        for start in range(0, blocks, 2**18):
            here = min(2**18, blocks - start)
            numbers = tape.new(here * 32, 4, "codes as numbers")
            pairs = tape.new(here * 32, 8, "pairs of levels")
            del numbers
        w.count = self.linear.out * self.linear.inp  # the last block may be longer than the weight
        return w

    def adapted(self, x: Tensor) -> Tensor:
        """`layers.LoRAFunction`: the adapter's part is added in place, and x, A and B are all that is kept."""
        tape, inp, out, rank = self.tape, self.linear.inp, self.linear.out, self.run.rank
        rows = x.count // inp
        with tape.unrecorded():
            seen = self.dropped(x)[0]  # N in
            a = tape.cast(self.A, x.width)
            a, thin = (tape.cast(t, tape.amp_width(t)) for t in (a, seen))
            inner = tape.new(rows * rank, thin.width, "x A^T")
            del a, thin
            y = self.base(x)  # N out
            b = tape.cast(self.B, y.width)
            del b, inner, seen

        def backward(saved, grads, needs):
            x, A, B, W = saved
            width = grads[0].width
            seen, mask = self.dropped(x)
            seen, a, b = tape.cast(seen, width), tape.cast(A, width), tape.cast(B, width)
            inner = tape.new(rows * rank, width, "gradient of x A^T")
            dA = tape.cast(tape.new(rank * inp, width, "gradient of lora_A"), A.width)
            again = tape.new(rows * rank, width, "x A^T again")
            dB = tape.new(rank * out, width, "gradient of lora_B")
            del again
            dB, dx = tape.cast(dB, B.width), None
            if needs[0]:
                W = self.dequantise(self.width) if W is None else W
                w = tape.cast(W, width)
                dx = tape.new(rows * inp, width, "input gradient")
                del w
                if mask:
                    through_adapter = tape.new(rows * inp, width, "input gradient of the adapter")
                    mask = tape.cast(mask, width)
                    del through_adapter, mask
                dx = tape.cast(as_view(dx), x.width)
            return dx, dA, dB

        node = tape.node("lora", [x, self.A, self.B], [], backward, late=True)
        tape.keep(node, [x, self.A, self.B, self.weight])
        y.node = node
        return y

    def dropped(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input that the adapter sees, and dropout's mask, drawn anew from its seed."""
        if not self.run.dropout:
            return rows, None
        draws = self.tape.new(-(-rows.count // 4), 8, "random numbers")  # 16 bits an entry
        mask = self.tape.new(rows.count, rows.width, "mask")
        del draws
        return self.tape.new(rows.count, rows.width, "x after dropout"), mask


class Decoder:
    """What every decoder has: embedding, layers, last norm, head."""

    adapter = Matrix

    def __init__(self, tape: Tape, spec: ModelSpec, run, layers: int):
        self.tape, self.spec, self.run = tape, spec, run
        adapter = Matrix if run.implementation == "minilora" else self.adapter
        adapted, self.cache = run.targets(spec), None
        self.embedding = self.weight(spec.vocab * spec.embedding, "embed_tokens", spec.vocab)
        if spec.positions:
            self.positions = self.weight(spec.positions * spec.hidden, "positions", spec.positions)
        if spec.layout.embedding_norm:
            self.embedding_norm = self.norm_weight()
        if spec.embedding != spec.hidden:
            self.projections = [self.weight(spec.hidden * spec.embedding, "projection", spec.hidden) for _ in range(2)]
        self.layers = []
        for i in range(layers):
            tape.place = ("start", i)
            matrices = {m.name: adapter(tape, m, run, m in adapted) for m in spec.linears()}
            self.layers.append((matrices, [self.norm_weight() for _ in range(spec.layout.norms)]))
        tape.place = ("start", None)
        self.last_norm = self.norm_weight() if spec.last_norm else None
        self.head = self.embedding if spec.tied else self.weight(spec.vocab * spec.embedding, "lm_head", spec.vocab)
        self.ids = tape.state(run.batch * run.seq, 8, "inputs", "ids")

    def weight(self, count: int, name: str, rows: int = 0) -> Tensor:
        return self.tape.weight(count, WIDTH[self.run.outer_dtype], name, self.run.method == "full", rows)

    def norm_weight(self) -> tuple[Tensor, ...]:
        """Weight, and LayerNorm's bias."""
        return tuple(self.weight(self.spec.hidden, "norm") for _ in range(1 if self.spec.layout.rms else 2))

    def decode(self) -> Tensor:
        """What the head sees, N C."""
        tape = self.tape
        tape.place = ("forward", None)
        x, *held = self.embed()  # some code holds on to what x was made of
        tables = self.tables(x)
        for i, layer in enumerate(self.layers):
            tape.place = ("forward", i)

            def run(x: Tensor, layer=layer, tables=self.tables_of(tables, i), held=held[1:2]) -> Tensor:
                return self.block(x, layer, tables)

            x = tape.checkpoint(run, x) if self.run.checkpointing else run(x)
        tape.place = ("forward", None)
        return self.norm(x, self.last_norm) if self.last_norm else x

    def loss(self) -> Tensor:
        return self.chunked_loss(self.decode()) if self.run.streamed else self.whole_loss()

    def head_of(self, y: Tensor) -> Tensor:
        """Logits, N V."""
        with self.tape.inside("lm_head"):
            return self.tape.linear(y, self.head, self.spec.vocab)

    def chunked_loss(self, y: Tensor) -> Tensor:
        """The loss of so many tokens at a time and the gradient of y with it: logits, log-softmax and their gradient
        are there of one chunk alone, and the head is needed once."""
        tape, count, width = self.tape, y.count, y.width
        tape.module = "loss"
        node = tape.node("loss in chunks", [y], [], lambda s, g, n: [s[0]], late=True)
        gradient = tape.new(count, width, "input gradient")
        size = min(LOSS_CHUNK, self.run.batch * self.run.seq) * self.spec.vocab
        chunk = [tape.new(size, width, name) for name in ("logits", "log-softmax", "gradient of the logits")]
        del chunk
        loss = tape.new(1, width, "loss", node=node)
        tape.keep(node, [gradient])
        return loss

    def cached(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """When serving, keys and values are written to the cache, which has room for all that will come."""
        if self.cache is None:
            return k, v
        spec, run = self.spec, self.run
        size = run.batch * (run.prompt + run.new) * spec.kv_heads * spec.head_dim
        room = [self.tape.new(size, k.width, name, part="KV cache") for name in ("keys", "values")]
        self.cache += room
        return tuple(Tensor(t.count, t.width, r.storage) for t, r in zip((k, v), room))

    def tables_of(self, tables: list[Tensor], layer: int) -> list[Tensor]:
        return tables

    def mean_square(self, wide: Tensor) -> Tensor:
        """Of every row, (N,)."""
        square = self.tape.unary(wide, "square", "input", POWER)
        return self.tape.unary(square, "mean", count=wide.count // self.spec.hidden)

    def fused_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`scaled_dot_product_attention`, causal: the kernel that CUDA chooses."""
        tape, spec, run = self.tape, self.spec, self.run
        rows, grouped = run.batch * spec.heads, spec.heads != spec.kv_heads
        if min(tape.amp_width(t) for t in (q, k, v)) == 2 and spec.head_dim <= 256:
            if not spec.head_dim % 8:
                return tape.fused_attention(q, k, v, rows * run.seq)
            padded = lambda t: tape.unary(t, "padded", count=t.count // spec.head_dim * (-(-spec.head_dim // 8) * 8))
            y = tape.fused_attention(*(padded(tape.amp(t)) for t in (q, k, v)), rows * run.seq)
            y = tape.slice(y, q.count)
            return tape.copy(y) if spec.heads > 1 else y  # a single head's rows need not be laid out anew
        if not grouped:
            return tape.fused_attention(q, k, v, rows * -(-run.seq // 32) * 32)
        return tape.plain_attention(q, k, v, run.batch, run.seq, spec.heads, q.width)


class OurDecoder(Decoder):
    """`llama.Llama`, line by line."""

    def __init__(self, tape: Tape, spec: ModelSpec, run, layers: int):
        super().__init__(tape, spec, run, layers)
        size = spec.context * spec.head_dim, WIDTH[run.dtype]
        self.angles = [tape.state(*size, "buffers", "rotary table") for _ in range(2)]

    def whole_loss(self) -> Tensor:
        return self.tape.cross_entropy(self.head_of(self.decode()), self.targets)

    def embed(self) -> list[Tensor]:
        with self.tape.inside("embed_tokens"):
            return [self.tape.embedding(self.ids, self.embedding, self.spec.hidden)]  # N C

    def tables(self, x: Tensor) -> list[Tensor]:
        """Cosine and sine of this sequence, (T, D) each: views, where the width is the model's."""
        size = self.run.seq * self.spec.head_dim
        return [self.tape.cast(Tensor(size, t.width, t.storage), x.width) for t in self.angles]

    def block(self, x: Tensor, layer: tuple, tables: list[Tensor]) -> Tensor:
        m, (norm1, norm2) = layer
        x = self.tape.add(x, self.attention(self.norm(x, norm1), m, tables), "residual sum")
        return self.tape.add(x, self.mlp(self.norm(x, norm2), m), "residual sum")

    def norm(self, x: Tensor, weights: tuple[Tensor]) -> Tensor:
        tape, weight = self.tape, weights[0]
        with tape.inside("norm"):
            if x.width == weight.width == 4:
                return tape.rms_norm(x, weight)
            wide = tape.cast(x, 4)
            wide = tape.mul(wide, tape.unary(tape.unary(self.mean_square(wide), *PLUS_EPS), *INVERSE_ROOT))
            return tape.mul(weight, tape.cast(wide, x.width), "output")

    def attention(self, x: Tensor, m: dict, tables: list[Tensor]) -> Tensor:
        tape, spec = self.tape, self.spec
        plain = self.run.dtype == "float32" and not self.run.autocast and spec.heads != spec.kv_heads
        q, k, v = (tape.view(m[f"self_attn.{p}_proj"](x), copy_back=plain) for p in "qkv")  # N H D, N K D
        with tape.inside("attention"):
            q, k = self.rotate(q, *tables), self.rotate(k, *tables)
            k, v = self.cached(k, v)
            y = self.fused_attention(q, k, v)  # N H D
        return m["self_attn.o_proj"](tape.copy(y, back=True) if plain else tape.view(y))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tape = self.tape
        return tape.add(tape.mul(x, cos), tape.mul(tape.unary(x, "rolled by half"), sin))

    def mlp(self, x: Tensor, m: dict) -> Tensor:
        tape = self.tape
        return m["mlp.down_proj"](tape.mul(tape.unary(m["mlp.gate_proj"](x), "silu", "input"), m["mlp.up_proj"](x)))
