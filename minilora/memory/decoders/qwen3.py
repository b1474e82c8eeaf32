"""Qwen3 (2505.09388): Llama with a norm over each head of q and k."""

from ..ledger import Tensor
from ..models import ModelSpec, register
from .hugging_face import Matrices
from .llama import Llama, LlamaDecoder

HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


class Qwen3Decoder(LlamaDecoder):
    """`Qwen3ForCausalLM`."""

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        ops, (q, k, v) = self.ops, self.spec.layout.qkv
        q, k = (ops.view(m[norm](ops.view(m[name](x)))) for name, norm in zip((q, k), HEAD_NORMS))
        return q, k, ops.view(m[v](x))


@register
class Qwen3(Llama):
    model_type = "qwen3"
    decoder, own_decoder = Qwen3Decoder, None
    mlp_bias_field = ""

    def extra_norms(self, spec: ModelSpec) -> dict[str, int]:
        return dict.fromkeys(HEAD_NORMS, spec.head_dim)
