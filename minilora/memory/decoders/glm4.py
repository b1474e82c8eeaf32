"""GLM-4 (2406.12793; GLM-4-0414): norms before and after attention and MLP, rotary positions of a part of each head."""

from typing import Any

from ..ledger import Tensor
from ..models import Fields, register
from .decoder import Layer
from .llama import Llama, LlamaDecoder


class Glm4Decoder(LlamaDecoder):
    """`Glm4ForCausalLM`."""

    heads_first = True

    def block(self, x: Tensor, layer: Layer, tables: list) -> Tensor:
        ops = self.ops
        m, norms = layer
        residual = x
        h = self.norm(x, norms[0])
        h, weights = self.attention(h, m, tables)
        h = self.norm(h, norms[1])
        h = ops.add(residual, h, "residual sum")
        residual = h
        h = self.norm(h, norms[2])
        h = self.mlp(h, m)
        h = self.norm(h, norms[3])
        return ops.add(residual, h, "residual sum")

    def turned(self, q: Tensor, k: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The tables' first half, each number of it twice; pairs turn that stand side by side."""
        ops = self.ops
        cos, sin = (ops.new(t.count, t.width, "rotary table of pairs") for t in tables[:2])
        parts = [self.parts(t) for t in (q, k)]
        turned = [self.rotate(part, cos, sin) for part, _ in parts]
        q, k = (ops.cat(t, rest) for t, (_, rest) in zip(turned, parts))
        return q, k


@register
class Glm4(Llama):
    model_type = "glm4"
    decoder, own_decoder = Glm4Decoder, None
    up = ("mlp.gate_up_proj",)
    norms = 4
    mlp_bias_field = ""

    def read(self, config: Fields) -> dict[str, Any]:
        return super().read(config) | {"out_bias": False, "rotary": config.rotary(0.5)}
