"""Phi-3 (2404.14219): Llama with q, k and v in one matrix, gate and up in another."""

from ..ledger import Tensor
from ..models import register
from .hugging_face import Matrices
from .llama import Llama, LlamaDecoder


class Phi3Decoder(LlamaDecoder):
    """`Phi3ForCausalLM`."""

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        qkv = m[self.spec.layout.qkv[0]](x)
        q, k, v = (self.ops.view(self.ops.slice(qkv, n)) for n in self.sizes_of_q_k_v(qkv))
        return q, k, v

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = super().rotate(x, cos, sin)
        return self.ops.unary(y, "cat with what is not turned", backward=())

    def joined(self, y: Tensor) -> Tensor:
        return self.ops.view(y) if self.eager else self.ops.copy(y)

    def mlp(self, x: Tensor, m: Matrices, residual: Tensor | None = None) -> Tensor:
        ops, f = self.ops, self.spec.layout
        up = m[f.up[0]](x)
        gate, up = ops.split(up, [up.count // 2] * 2)
        up = ops.mul(up, self.activate(gate))
        return m[f.down](up)


@register
class Phi3(Llama):
    model_type = "phi3"
    decoder, own_decoder = Phi3Decoder, None
    qkv = ("self_attn.qkv_proj",)
    up = ("mlp.gate_up_proj",)
    targets = ("qkv_proj",)
    dropout_field = "resid_pdrop"
    attention_bias_field = mlp_bias_field = ""
