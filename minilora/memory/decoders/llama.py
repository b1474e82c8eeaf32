"""Llama (2302.13971): RMSNorm, rotary positions, grouped heads, a gated MLP. Other families build on it."""

from ..ledger import Tensor, as_view
from ..linears import adapted_together
from ..models import Family, ModelSpec, register
from ..ops import Ops
from ..run import Run
from .decoder import INVERSE_ROOT, PLUS_EPS, Layer
from .hugging_face import HuggingFaceDecoder, Matrices
from .minilora import OurDecoder


class LlamaDecoder(HuggingFaceDecoder):
    """`LlamaForCausalLM`."""

    def __init__(self, ops: Ops, spec: ModelSpec, run: Run, layers: int):
        super().__init__(ops, spec, run, layers)
        self.frequencies = [ops.state(spec.head_dim // 2, 4, "buffers", "rotary frequencies") for _ in range(2)]

    def position_tables(self, x: Tensor) -> list[Tensor]:
        """Cosine and sine of this sequence, (T, D) each, or as much of D as turns."""
        size = self.run.seq * int(self.spec.head_dim * self.spec.rotary)
        return [self.ops.new(size, x.width, "rotary table", part="activations") for _ in range(2)]

    def block(self, x: Tensor, layer: Layer, tables: list[Tensor]) -> Tensor:
        ops, spec = self.ops, self.spec
        m, norms = layer
        residual = x
        h = self.norm(x, norms[0])
        h, weights = self.attention(h, m, tables)  # attention's weights, if there are any, live as long as the layer
        h = ops.dropout(h, spec.dropout)
        h = ops.add(residual, h, "residual sum")
        residual = h
        h = self.norm(h, norms[1])
        h = self.mlp(h, m)
        h = ops.dropout(h, spec.dropout)
        return ops.add(residual, h, "residual sum")

    def norm(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        ops = self.ops
        with ops.inside("norm"):
            if self.run.kernels == "unsloth":
                return ops.fast_rms_norm(x, weights[0])
            wide = ops.cast(x, 4)
            mean = self.mean_square(wide, weights[0].count)
            wide = ops.mul(wide, ops.unary(ops.unary(mean, *PLUS_EPS), *INVERSE_ROOT))
            return ops.mul(weights[0], ops.cast(wide, x.width), "output")

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        ops, names = self.ops, self.spec.layout.qkv
        if self.fused_adapters(m):
            q, k, v = (ops.view(t) for t in adapted_together(ops, x, [m[name] for name in names]))
            return q, k, v
        torch = self.run.attention != "flash"  # whose gradients are of the heads before the tokens
        q = ops.view(m[names[0]](x), copy_back=torch)
        k, v = (ops.view(m[name](x), copy_back=torch and name == names[1]) for name in names[1:])
        return q, k, v

    def fused_adapters(self, m: Matrices) -> bool:
        """unsloth's functions over q, k and v, and over the attention's output, want adapters on all of 4-bit bases."""
        names = (*self.spec.layout.qkv, self.spec.layout.out)
        return self.run.kernels == "unsloth" and self.run.method == "qlora" and all(m[n].A for n in names)

    def turned(self, q: Tensor, k: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.rotate(q, *tables[:2]), self.rotate(k, *tables[:2])

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ops, half = self.ops, x.count // 2
        if self.run.kernels == "unsloth":  # in place, and so in backward
            return Tensor(x.count, x.width, x.storage, ops.node("rotary", [x], [], lambda s, g, n: [as_view(g[0])]))

        def turned(x: Tensor) -> Tensor:
            left, right = ops.slice(x, half), ops.slice(x, half)
            return ops.cat(ops.unary(right, "negated half"), left)

        return ops.add(ops.mul(x, cos), ops.mul(turned(x), sin))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What of each head turns, and what does not."""
        turning = x.count // self.spec.head_dim * int(self.spec.head_dim * self.spec.rotary)
        return self.ops.slice(x, turning), self.ops.slice(x, x.count - turning)

    def attended(self, y: Tensor, m: Matrices) -> Tensor:
        out = m[self.spec.layout.out]
        return adapted_together(self.ops, y, [out])[0] if self.fused_adapters(m) else out(y)

    def mlp(self, x: Tensor, m: Matrices, residual: Tensor | None = None) -> Tensor:
        """Down, of the activated gate times up; gate and up may be one matrix."""
        ops, f = self.ops, self.spec.layout
        if len(f.up) == 1:
            up = m[f.up[0]](x)
            gate, up = ops.split(up, [up.count // 2] * 2)
            up = ops.mul(up, self.activate(gate))
            return m[f.down](up)
        gate, up = f.up
        return m[self.spec.layout.down](self.ops.mul(self.activate(m[gate](x)), m[up](x)))


@register
class Llama(Family):
    model_type = "llama"
    decoder, own_decoder = LlamaDecoder, OurDecoder
    layer = "model.layers."
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out = "self_attn.o_proj"
    up = ("mlp.gate_proj", "mlp.up_proj")
    down = "mlp.down_proj"
    targets = ("q_proj", "v_proj")
    gated = rms = grouped = True
    attention_bias_field, mlp_bias_field = "attention_bias", "mlp_bias"
