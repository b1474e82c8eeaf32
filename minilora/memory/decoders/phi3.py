"""Phi-3 (2404.14219): Llama with q, k and v in one matrix, gate and up in another."""

from typing import Any

from ..ledger import Tensor
from ..models import Fields, register
from .hugging_face import Matrices
from .llama import Llama, LlamaDecoder


class Phi3Decoder(LlamaDecoder):
    """`Phi3ForCausalLM`."""

    heads_first = True

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        qkv = m[self.spec.layout.qkv[0]](x)
        q, k, v = (self.ops.view(self.ops.slice(qkv, n)) for n in self.sizes_of_q_k_v(qkv))
        return q, k, v

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ops = self.ops
        if cos.count == self.run.seq * self.spec.head_dim:
            y = super().rotate(x, cos, sin)
            return ops.unary(y, "cat with what is not turned", backward=())
        part, rest = self.parts(x)
        return ops.cat(super().rotate(part, cos, sin), rest)


@register
class Phi3(Llama):
    model_type = "phi3"
    decoder, own_decoder = Phi3Decoder, None
    qkv = ("self_attn.qkv_proj",)
    up = ("mlp.gate_up_proj",)
    targets = ("qkv_proj",)
    dropout_field = "resid_pdrop"
    attention_bias_field = mlp_bias_field = ""
    window = 0

    def read(self, config: Fields) -> dict[str, Any]:
        return super().read(config) | {"rotary": config.rotary(1.0)}
