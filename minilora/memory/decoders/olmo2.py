"""OLMo 2 (2501.00656): Llama with its norms after attention and MLP, and a norm over all heads of q and of k."""

from ..ledger import Tensor
from ..models import ModelSpec, register
from .decoder import INVERSE_ROOT, PLUS_EPS, Layer
from .hugging_face import Matrices
from .llama import Llama, LlamaDecoder
from .qwen3 import HEAD_NORMS


class Olmo2Decoder(LlamaDecoder):
    """`Olmo2ForCausalLM`."""

    def block(self, x: Tensor, layer: Layer, tables: list[Tensor]) -> Tensor:
        ops = self.ops
        m, norms = layer
        h, weights = self.attention(x, m, tables)
        h = self.norm(h, norms[0])
        x = ops.add(x, h, "residual sum")
        h = self.mlp(x, m)
        h = self.norm(h, norms[1])
        return ops.add(x, h, "residual sum")

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        ops, (q, k, v) = self.ops, self.spec.layout.qkv
        q, k = (ops.view(m[norm](m[name](x)), copy_back=True) for name, norm in zip((q, k), HEAD_NORMS))
        return q, k, ops.view(m[v](x))

    def position_tables(self, x: Tensor) -> list[Tensor]:
        """In fp32, whatever x is."""
        size = self.run.seq * self.spec.head_dim
        return [self.ops.new(size, 4, "rotary table", part="activations") for _ in range(2)]

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.ops.cast(super().rotate(x, cos, sin), x.width)

    def norm(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """The weight is multiplied in fp32."""
        ops = self.ops
        with ops.inside("norm"):
            wide = ops.cast(x, 4)
            mean = self.mean_square(wide, weights[0].count)
            wide = ops.mul(wide, ops.unary(ops.unary(mean, *PLUS_EPS), *INVERSE_ROOT))
            return ops.cast(ops.mul(weights[0], wide), x.width)


@register
class Olmo2(Llama):
    model_type = "olmo2"
    decoder, own_decoder = Olmo2Decoder, None
    mlp_bias_field = ""

    def extra_norms(self, spec: ModelSpec) -> dict[str, int]:
        return dict(zip(HEAD_NORMS, (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim)))
