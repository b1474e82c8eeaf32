"""Granite 3 (also PowerLM, 2408.13359): Llama with a multiplier on the embedding, on what joins the residual stream
and on the logits."""

from ..ledger import Tensor
from ..models import register
from .decoder import Layer
from .llama import Llama, LlamaDecoder


class GraniteDecoder(LlamaDecoder):
    """`GraniteForCausalLM`."""

    logit_steps = (("divided by the scale",),)

    def positioned(self, x: Tensor) -> list[Tensor]:
        return super().positioned(self.ops.unary(x, "times the multiplier"))

    def block(self, x: Tensor, layer: Layer, tables: list[Tensor]) -> Tensor:
        ops = self.ops
        m, norms = layer
        residual = x
        h = self.norm(x, norms[0])
        h, weights = self.attention(h, m, tables)
        h = ops.add(residual, ops.unary(h, "times the multiplier"), "residual sum")
        residual = h
        h = self.norm(h, norms[1])
        h = self.mlp(h, m)
        return ops.add(residual, ops.unary(h, "times the multiplier"), "residual sum")


@register
class Granite(Llama):
    model_type = "granite"
    decoder, own_decoder = GraniteDecoder, None
