"""The decoders of Hugging Face transformers, line by line on the tape, and PEFT's LoRA layer.

Sources: transformers 5, ``models/*/modeling_*.py`` and ``loss/loss_utils.py``; peft 0.21, ``tuners/lora/layer.py``.
Left out: position numbers and rotary frequencies, a few bytes a token.
"""

from .blocks import INVERSE_ROOT, PLUS_EPS, POWER, Decoder, Matrix
from .models import ModelSpec
from .tape import WIDTH, Tape, Tensor


SOFTCAP = (("divided by the cap",), ("tanh", "output"), ("times the cap",))  # cap * tanh(x / cap)


class PeftMatrix(Matrix):
    """`peft.tuners.lora.Linear`: x is copied to the adapter's fp32, and the sum is made in fp32 and cast back; on a
    4-bit base `Linear4bit`, which works on a copy of the base's output."""

    def adapted(self, x: Tensor) -> Tensor:
        tape, rank, out = self.tape, self.run.rank, self.linear.out
        result = self.base(x)
        if self.codes:
            result = tape.copy(result)
        width = result.width
        if not (self.codes and tape.autocast):
            x = tape.cast(x, self.A.width)
        inner = tape.linear(tape.dropout(x, self.run.dropout), self.A, rank, what="x A^T", flat=self.flat)
        update = tape.linear(inner, self.B, out, what="x A^T B^T", flat=self.flat)
        del inner
        update = tape.unary(update, "scaled update")
        if self.codes and not tape.autocast:
            update = tape.cast(update, width)
        result = tape.add(result, update, "sum with the update")
        del update
        return result if self.codes else tape.cast(result, width)

    def four_bit_base(self, x: Tensor) -> Tensor:
        """bitsandbytes' `Linear4bit` (0.50): x is cast to the compute dtype, the output back to x's."""
        x_width = x.width
        return self.tape.cast(super().four_bit_base(self.tape.cast(x, self.width)), x_width)

    def dequantise(self, width: int) -> Tensor:
        """Its kernel makes the dense weight at once."""
        size = self.linear.out * self.linear.inp
        absmax = self.tape.new(-(-size // 64), 4, "absmax") if self.run.double_quant else None
        return self.tape.new(size, width, "dense weight")


class Transformers(Decoder):
    """``AutoModelForCausalLM`` of the model's family."""

    adapter = PeftMatrix

    def __init__(self, tape: Tape, spec: ModelSpec, run, layers: int):
        super().__init__(tape, spec, run, layers)
        if spec.layout.rms:
            self.frequencies = [tape.state(spec.head_dim // 2, 4, "buffers", "rotary frequencies") for _ in range(2)]
        if spec.family == "gemma2":
            self.scale = tape.state(1, WIDTH[run.dtype], "buffers", "sqrt(C)")

    def whole_loss(self) -> Tensor:
        tape, run = self.tape, self.run
        y = self.decode()  # held by the model's output until the loss is there
        logits = self.head_of(y)
        with tape.inside("loss"):
            wide = tape.cast(logits, 4)
            padded = tape.new(run.batch * (run.seq + 1), 8, "padded labels")
            return tape.cross_entropy(wide, tape.new(run.batch * run.seq, 8, "shifted labels"))

    def head_of(self, y: Tensor) -> Tensor:
        logits = super().head_of(self.project(y, out=True))
        with self.tape.inside("lm_head"):
            for step in SOFTCAP if self.spec.family == "gemma2" else ():
                logits = self.tape.unary(logits, *step)
        return logits

    def embed(self) -> list[Tensor]:
        """The layers' input, and what the model's forward holds beside it."""
        tape, spec, run = self.tape, self.spec, self.run
        with tape.inside("embed_tokens"):
            x = tape.embedding(self.ids, self.embedding, spec.embedding)  # N C
            if spec.family == "gemma2":
                x = tape.unary(x, "times sqrt(C)")
            if run.checkpointing and run.method != "full" and run.implementation == "transformers":
                tape.require_grad(x)  # `enable_input_require_grads`, which PEFT asks for
            if spec.embedding != spec.hidden:
                x = self.project(x)
        held = [x]
        if spec.family != "bloom":
            held.append(tape.new((run.batch if spec.family == "opt" else 1) * run.seq, 8, "position numbers"))
        if spec.positions:
            with tape.inside("positions"):
                numbers = held[1] if spec.family == "gpt2" else tape.new(held[1].count, 8, "position numbers + 2")
                held.append(tape.embedding(numbers, self.positions, spec.hidden))
                del numbers
                x = tape.add(x, held[2])
                if spec.family == "gpt2":
                    x = tape.dropout(x, spec.dropout)
        if spec.layout.embedding_norm:
            x = self.norm(x, self.embedding_norm)
        return [x, *held]

    def project(self, x: Tensor, out: bool = False) -> Tensor:
        """OPT-350M's way between the widths of its embedding and of its layers."""
        if self.spec.embedding == self.spec.hidden:
            return x
        weight, width = self.projections[out], self.spec.embedding if out else self.spec.hidden
        return self.tape.linear(x, weight, width, what="projection")

    def tables_of(self, tables: list[Tensor], layer: int) -> list[Tensor]:
        return [*tables[:2], tables[2 + layer % 2]] if self.spec.family == "gemma2" else tables

    def tables(self, x: Tensor) -> list[Tensor]:
        """Cosine and sine of this sequence, (T, D) each, or ALiBi's slopes and the causal mask."""
        tape, spec, run = self.tape, self.spec, self.run
        tables = []
        with tape.inside("positions"):
            if spec.layout.rms:
                tables = [tape.new(run.seq * spec.head_dim, x.width, "rotary table", part="activations") for _ in "cs"]
            elif spec.family == "bloom":
                tables = [tape.new(run.batch * spec.heads * run.seq, x.width, "ALiBi", part="activations")]
            if self.eager:  # Gemma-2 has one for each kind of layer
                tables += [tape.new(run.batch * run.seq * run.seq, x.width, "causal mask", part="activations")
                           for _ in range(1 + (spec.family == "gemma2"))]
        return tables

    @property
    def eager(self) -> bool:
        return self.run.attention == "eager" or self.spec.family in ("gemma2", "bloom")

    def block(self, x: Tensor, layer: tuple, tables: list[Tensor]) -> Tensor:
        return getattr(self, f"{self.spec.family}_block", self.usual_block)(x, layer, tables)

    def usual_block(self, x: Tensor, layer: tuple, tables: list[Tensor]) -> Tensor:
        tape, spec = self.tape, self.spec
        m, norms = layer
        before = spec.last_norm or spec.family != "opt"  # OPT-350M's norms stand after the sums
        residual = x
        h = self.norm(x, norms[0]) if before else x
        h, weights = self.attention(h, m, tables)  # attention's weights, if there are any, live as long as the layer
        if spec.layout.norms == 4:
            h = self.norm(h, norms[1])
        h = tape.dropout(h, spec.dropout)
        h = tape.add(residual, h, "residual sum")
        if not before:
            h = self.norm(h, norms[0])
        residual = h
        h = self.norm(h, norms[-2 if spec.layout.norms == 4 else -1]) if before else h
        if spec.family == "opt":
            h = m["fc1"](h)
            h = self.activate(h)
            h = m["fc2"](h)
        else:
            h = self.mlp(h, m)
        if spec.layout.norms == 4:
            h = self.norm(h, norms[-1])
        h = tape.dropout(h, spec.dropout)
        h = tape.add(residual, h, "residual sum")
        return h if before else self.norm(h, norms[-1])

    def gpt2_block(self, x: Tensor, layer: tuple, tables: list[Tensor]) -> Tensor:
        tape = self.tape
        m, norms = layer
        normed = self.norm(x, norms[0])
        out, weights = self.attention(normed, m, tables)
        h = tape.add(out, x, "residual sum")
        normed = self.norm(h, norms[1])
        return tape.add(h, self.mlp(normed, m), "residual sum")

    def bloom_block(self, x: Tensor, layer: tuple, tables: list[Tensor]) -> Tensor:
        m, norms = layer
        normed = self.norm(x, norms[0])
        h, weights = self.attention(normed, m, tables, x)
        normed = self.norm(h, norms[1])
        return self.mlp(normed, m, h)

    def norm(self, x: Tensor, weight: tuple[Tensor, ...]) -> Tensor:
        tape = self.tape
        with tape.inside("norm"):
            if len(weight) == 2:
                return tape.layer_norm(x, *weight)
            wide = tape.cast(x, 4)
            mean = self.mean_square(wide)
            if self.spec.family == "gemma2":
                wide = tape.mul(wide, tape.unary(tape.unary(mean, *PLUS_EPS), *INVERSE_ROOT))
                shifted = tape.unary(tape.cast(weight[0], 4), "1 + weight", backward=())
                wide = tape.mul(wide, shifted)
                return tape.cast(wide, x.width)
            wide = tape.mul(wide, tape.unary(tape.unary(mean, *PLUS_EPS), *INVERSE_ROOT))
            return tape.mul(weight[0], tape.cast(wide, x.width), "output")

    # Attention

    def attention(self, x: Tensor, m: dict, tables: list[Tensor],
                  residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        tape, spec, f = self.tape, self.spec, self.spec.layout
        if len(f.qkv) == 1:
            q, k, v = self.split(m[f.qkv[0]](x))
        else:
            q = m[f.qkv[0]](x)
            if spec.family == "opt":
                q = tape.unary(q, "scaled q")
            q = tape.view(q, copy_back=f.rms)
            k, v = (tape.view(m[name](x), copy_back=f.rms and name == f.qkv[1]) for name in f.qkv[1:])
        with tape.inside("attention"):
            if f.rms:
                q, k = self.rotate(q, *tables[:2]), self.rotate(k, *tables[:2])
            k, v = self.cached(k, v)
            y, weights = (self.eager_attention(q, k, v, tables[-1]) if self.eager
                          else (self.fused_attention(q, k, v), None))
        y = tape.copy(y) if spec.family == "phi3" and not self.eager else tape.view(y)
        return self.finish(m[f.out](y), residual), weights

    def finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """What some families do inside attention and MLP, others around them: dropout, and BLOOM the residual sum."""
        if self.spec.family in ("gpt2", "bloom"):
            y = self.tape.dropout(y, self.spec.dropout)
        return y if residual is None else self.tape.add(residual, y, "residual sum")

    def split(self, qkv: Tensor) -> list[Tensor]:
        spec = self.spec
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        sizes = [n * (qkv.count // (q + 2 * kv)) for n in (q, kv, kv)]
        if spec.family == "gpt2":
            return [self.tape.view(t) for t in self.tape.split(qkv, sizes)]
        return [self.tape.view(self.tape.slice(qkv, n)) for n in sizes]

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tape, half = self.tape, x.count // 2

        def turned(x: Tensor) -> Tensor:
            left, right = tape.slice(x, half), tape.slice(x, half)
            return tape.cat(tape.unary(right, "negated half"), left)

        y = tape.add(tape.mul(x, cos), tape.mul(turned(x), sin))
        return tape.unary(y, "cat with what is not turned", backward=()) if self.spec.family == "phi3" else y

    def eager_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """With all scores in memory, their softmax in fp32. Returns its weights too."""
        tape, spec, run = self.tape, self.spec, self.run
        scores, width, bloom = run.batch * spec.heads * run.seq**2, q.width, spec.family == "bloom"
        if spec.heads != spec.kv_heads:
            k, v = (tape.unary(t, "repeated", count=q.count) for t in (k, v))
            w = tape.bmm(tape.copy(q), k, scores, "scores")
        else:
            q, k = tape.copy(q), tape.copy(k)
            v = tape.copy(v) if bloom else v
            w = tape.bmm(q, k, scores, "scores")
        if not bloom:
            w = tape.unary(w, "scaled scores")
        if spec.family == "gemma2":
            for step in SOFTCAP:
                w = tape.unary(w, *step)
        w = tape.add(w, mask, "masked scores")
        w = tape.cast(self.softmax(w), width)
        w = tape.dropout(w, spec.attention_dropout)
        y = tape.bmm(w, v if spec.heads != spec.kv_heads or bloom else tape.copy(v), q.count, "output")
        return tape.copy(y, back=True), w

    def softmax(self, w: Tensor) -> Tensor:
        """In fp32, of a copy if need be; GPT-2's in the width of the scores, but for autocast."""
        wide = w if self.spec.family == "gpt2" and not self.tape.autocast else self.tape.cast(w, 4)
        return self.tape.unary(wide, "softmax", "output")

    # The MLP

    def mlp(self, x: Tensor, m: dict, residual: Tensor | None = None) -> Tensor:
        tape, f = self.tape, self.spec.layout
        if len(f.up) == 2:
            y = m[f.down](tape.mul(self.activate(m[f.up[0]](x)), m[f.up[1]](x)))
            return y
        if f.gated:
            up = m[f.up[0]](x)
            gate, up = tape.split(up, [up.count // 2] * 2)
            up = tape.mul(up, self.activate(gate))
            return m[f.down](up)
        h = m[f.up[0]](x)
        h = self.activate(h)
        h = m[f.down](h)
        return self.finish(h, residual)

    def activate(self, x: Tensor) -> Tensor:
        tape, kind = self.tape, self.spec.activation
        with tape.inside("activation"):
            if kind == "relu":
                return tape.unary(x, "relu", "output")
            if kind == "gelu_new":
                return self.gelu_new(x)
            if kind == "gelu_bloom":
                return self.gelu_bloom(x)
            return tape.unary(x, kind, "input")

    def gelu_new(self, x: Tensor) -> Tensor:
        """0.5 x (1 + tanh(c (x + 0.044715 x^3))), one operator after the other: it keeps four tensors, not one."""
        tape = self.tape

        def inner(x: Tensor) -> Tensor:
            cube = ("x^3", "input", POWER)
            cube = tape.unary(tape.cast(x, 4) if tape.autocast else x, *cube)  # autocast takes powers in fp32
            cube = tape.unary(cube, "scaled x^3")
            return tape.add(x, cube)

        half = tape.unary(x, "x / 2")
        t = tape.unary(inner(x), "scaled sum")
        t = tape.unary(t, "tanh", "output")
        t = tape.unary(t, "1 + tanh", backward=())
        return tape.mul(half, t, "output")

    def gelu_bloom(self, x: Tensor) -> Tensor:
        """The same as one function, which keeps only x; at most four temporaries live at once, in backward five."""
        tape, count, width = self.tape, x.count, x.width

        def temporaries(most: int, then: str) -> Tensor:
            parts = [tape.new(count, width, "part") for _ in range(most)]
            del parts[2:]
            return tape.new(count, width, then)

        node = tape.node("gelu", [x], [], lambda s, g, n: [temporaries(5, "gradient")], late=True)
        y = temporaries(4, "output")
        y.node = node
        tape.keep(node, [x])
        return y
