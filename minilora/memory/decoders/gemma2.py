"""Gemma 2 (2408.00118): Llama with a norm after attention and MLP too, and capped scores and logits."""

from ..ledger import WIDTH, Tensor
from ..models import ModelSpec, register
from ..ops import Ops
from ..run import Run
from .decoder import INVERSE_ROOT, PLUS_EPS, Layer
from .hugging_face import SCALED, SOFTCAP
from .llama import Llama, LlamaDecoder


class Gemma2Decoder(LlamaDecoder):
    """`Gemma2ForCausalLM`."""

    always_eager = True  # no fused kernel caps scores
    windows = ("window", "")  # local and global attention take turns
    score_steps, logit_steps = (*SCALED, *SOFTCAP), SOFTCAP

    def __init__(self, ops: Ops, spec: ModelSpec, run: Run, layers: int):
        super().__init__(ops, spec, run, layers)
        self.scale = ops.state(1, WIDTH[run.dtype], "buffers", "sqrt(C)")

    def scaled(self, x: Tensor) -> Tensor:
        return self.ops.unary(x, "times sqrt(C)")

    def tables_of(self, tables: list, layer: int) -> list:
        return [*tables[:2], tables[2 + layer % 2]]

    def block(self, x: Tensor, layer: Layer, tables: list[Tensor]) -> Tensor:
        ops, spec = self.ops, self.spec
        m, norms = layer
        residual = x
        h = self.norm(x, norms[0])
        h, weights = self.attention(h, m, tables)
        h = self.norm(h, norms[1])
        h = ops.dropout(h, spec.dropout)
        h = ops.add(residual, h, "residual sum")
        residual = h
        h = self.norm(h, norms[2])
        h = self.mlp(h, m)
        h = self.norm(h, norms[3])
        h = ops.dropout(h, spec.dropout)
        return ops.add(residual, h, "residual sum")

    def norm(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """All in fp32, and the weight counts from 1."""
        ops = self.ops
        with ops.inside("norm"):
            wide = ops.cast(x, 4)
            mean = self.mean_square(wide, weights[0].count)
            wide = ops.mul(wide, ops.unary(ops.unary(mean, *PLUS_EPS), *INVERSE_ROOT))
            shifted = ops.unary(ops.cast(weights[0], 4), "1 + weight", backward=())
            wide = ops.mul(wide, shifted)
            return ops.cast(wide, x.width)


@register
class Gemma2(Llama):
    model_type = "gemma2"
    decoder, own_decoder = Gemma2Decoder, None
    norms = 4
    tied = True
    activation, activation_field = "gelu_pytorch_tanh", "hidden_activation"
    mlp_bias_field = ""
