"""Cohere's Command R: attention and MLP side by side on one norm, which is a LayerNorm without bias in fp32."""

from typing import Any

from ..activations import POWER
from ..ledger import Tensor
from ..models import Fields, ModelSpec, register
from .decoder import INVERSE_ROOT, PLUS_EPS, Layer
from .hugging_face import Matrices
from .llama import Llama, LlamaDecoder
from .qwen3 import HEAD_NORMS


class CohereDecoder(LlamaDecoder):
    """`CohereForCausalLM`."""

    logit_steps = (("times the scale",),)

    def block(self, x: Tensor, layer: Layer, tables: list) -> Tensor:
        ops = self.ops
        m, norms = layer
        h = self.norm(x, norms[0])
        attended, weights = self.attention(h, m, tables)
        through = self.mlp(h, m)
        return ops.add(ops.add(x, attended, "sum with attention"), through, "residual sum")

    def norm(self, x: Tensor, weights: tuple[Tensor, ...], row: int = 0) -> Tensor:
        """Over `row` numbers, else over all of the weight's."""
        ops, rows = self.ops, x.count // (row or weights[0].count)
        with ops.inside("norm"):
            wide = ops.cast(x, 4)
            mean = ops.unary(wide, "mean", count=rows)
            square = ops.unary(ops.add(wide, mean, "less the mean"), "square", "input", POWER)
            variance = ops.unary(square, "variance", count=rows)
            del square
            centred = ops.add(wide, mean, "less the mean")
            wide = ops.mul(centred, ops.unary(ops.unary(variance, *PLUS_EPS), *INVERSE_ROOT))
            del centred
            wide = ops.mul(ops.cast(weights[0], 4), wide)
            return ops.cast(wide, x.width)

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        ops, names = self.ops, self.spec.layout.qkv
        q, k, v = (ops.view(m[name](x), copy_back=name != names[2]) for name in names)
        if HEAD_NORMS[0] in m:
            q, k = (m[norm](t, row=self.spec.head_dim) for t, norm in zip((q, k), HEAD_NORMS))
        return q, k, v

    def turned(self, q: Tensor, k: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
        """In fp32; pairs turn that stand side by side."""
        ops, width = self.ops, q.width
        q, k = ops.cast(q, 4), ops.cast(k, 4)
        turned = [self.rotate(t, *tables[:2]) for t in (q, k)]
        q, k = (ops.cast(t, width) for t in turned)
        return q, k


@register
class Cohere(Llama):
    model_type = "cohere"
    decoder, own_decoder = CohereDecoder, None
    norms = 1
    tied = True
    mlp_bias_field = ""

    def extra_norms(self, spec: ModelSpec) -> dict[str, int]:
        widths = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim) if spec.qk_norm else ()
        return dict(zip(HEAD_NORMS, widths))

    def read(self, config: Fields) -> dict[str, Any]:
        return super().read(config) | {"qk_norm": config.flag("use_qk_norm", False)}
