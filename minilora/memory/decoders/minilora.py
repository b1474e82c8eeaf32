"""Our decoder, `llama.Llama`, written on the ledger line by line."""

from ..ledger import WIDTH, Tensor
from ..models import ModelSpec
from ..ops import Ops
from ..run import Run
from .decoder import INVERSE_ROOT, PLUS_EPS, Decoder, Layer


class OurDecoder(Decoder):
    """`llama.Llama`, line by line."""

    def __init__(self, ops: Ops, spec: ModelSpec, run: Run, layers: int):
        super().__init__(ops, spec, run, layers)
        size = spec.context * spec.head_dim, WIDTH[run.dtype]
        self.angles = [ops.state(*size, "buffers", "rotary table") for _ in range(2)]

    def whole_loss(self) -> Tensor:
        return self.ops.cross_entropy(self.head_of(self.decode()), self.targets)

    def embed(self) -> list[Tensor]:
        with self.ops.inside("embed_tokens"):
            return [self.ops.embedding(self.ids, self.embedding, self.spec.hidden)]  # N C

    def tables(self, x: Tensor) -> list[Tensor]:
        """Cosine and sine of this sequence, (T, D) each: views, where the width is the model's."""
        size = self.run.seq * self.spec.head_dim
        return [self.ops.cast(Tensor(size, t.width, t.storage), x.width) for t in self.angles]

    def block(self, x: Tensor, layer: Layer, tables: list[Tensor]) -> Tensor:
        m, (norm1, norm2) = layer
        x = self.ops.add(x, self.attention(self.norm(x, norm1), m, tables), "residual sum")
        return self.ops.add(x, self.mlp(self.norm(x, norm2), m), "residual sum")

    def norm(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        ops, weight = self.ops, weights[0]
        with ops.inside("norm"):
            if x.width == weight.width == 4:
                return ops.rms_norm(x, weight)
            wide = ops.cast(x, 4)
            wide = ops.mul(wide, ops.unary(ops.unary(self.mean_square(wide), *PLUS_EPS), *INVERSE_ROOT))
            return ops.mul(weight, ops.cast(wide, x.width), "output")

    def attention(self, x: Tensor, m: dict, tables: list[Tensor]) -> Tensor:
        ops, spec = self.ops, self.spec
        plain = spec.heads != spec.kv_heads and (self.run.attention == "efficient" or self.run.dtype == "float32"
                                                 and not self.run.autocast) or self.run.attention == "plain"
        q, k, v = (ops.view(m[f"self_attn.{p}_proj"](x), copy_back=plain) for p in "qkv")  # N H D, N K D
        with ops.inside("attention"):
            q, k = self.rotate(q, *tables), self.rotate(k, *tables)
            k, v = self.cached(k, v)
            y = self.fused_attention(q, k, v)  # N H D
        return m["self_attn.o_proj"](ops.copy(y, back=True) if plain else ops.view(y))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ops = self.ops
        return ops.add(ops.mul(x, cos), ops.mul(ops.unary(x, "rolled by half"), sin))

    def mlp(self, x: Tensor, m: dict) -> Tensor:
        ops = self.ops
        return m["mlp.down_proj"](ops.mul(ops.unary(m["mlp.gate_proj"](x), "silu", "input"), m["mlp.up_proj"](x)))
