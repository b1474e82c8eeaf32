"""Mistral (2310.06825): Llama without biases, and with a window: how many tokens back one sees."""

from ..ledger import Tensor
from ..models import register
from .llama import Llama, LlamaDecoder


class MistralDecoder(LlamaDecoder):
    """`MistralForCausalLM`; until transformers 4.45 with rotary tables of each layer, and keys and values repeated."""

    def position_tables(self, x: Tensor) -> list[Tensor]:
        return [] if self.run.software.old_mistral else super().position_tables(x)

    def turned(self, q: Tensor, k: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
        if not self.run.software.old_mistral:
            return super().turned(q, k, tables)
        return super().turned(q, k, super().position_tables(k))

    def fused_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.run.software.old_mistral:
            k, v = (self.ops.unary(t, "repeated", count=q.count) for t in (k, v))
        return super().fused_attention(q, k, v, mask)


@register
class Mistral(Llama):
    model_type = "mistral"
    decoder = MistralDecoder
    attention_bias_field = mlp_bias_field = ""
    window = 4096  # if its config is silent
