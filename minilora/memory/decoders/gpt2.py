"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, q, k and v in one matrix, dropout in every layer."""

from ..ledger import Tensor
from ..models import Family, register
from .decoder import Layer
from .hugging_face import HuggingFaceDecoder, Matrices


class GPT2Decoder(HuggingFaceDecoder):
    """`GPT2LMHeadModel`."""

    def positioned(self, x: Tensor) -> list[Tensor]:
        ops, spec = self.ops, self.spec
        held = [x, ops.new(self.run.seq, 8, "position numbers")]
        with ops.inside("positions"):
            held.append(ops.embedding(held[1], self.positions, spec.hidden))
            x = ops.add(x, held[2])
            x = ops.dropout(x, spec.dropout)
        return [x, *held]

    def block(self, x: Tensor, layer: Layer, tables: list[Tensor]) -> Tensor:
        ops = self.ops
        m, norms = layer
        normed = self.norm(x, norms[0])
        out, weights = self.attention(normed, m, tables)
        h = ops.add(out, x, "residual sum")
        normed = self.norm(h, norms[1])
        return ops.add(h, self.mlp(normed, m), "residual sum")

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        qkv = m[self.spec.layout.qkv[0]](x)
        q, k, v = (self.ops.view(t) for t in self.ops.split(qkv, self.sizes_of_q_k_v(qkv)))
        return q, k, v

    def softmax(self, w: Tensor) -> Tensor:
        """In the width of the scores, but for autocast."""
        return self.ops.unary(self.ops.cast(w, 4) if self.ops.autocast else w, "softmax", "output")

    def finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        return self.ops.dropout(y, self.spec.dropout)


@register
class GPT2(Family):
    model_type = "gpt2"
    decoder = GPT2Decoder
    layer = "transformer.h."
    qkv = ("attn.c_attn",)
    out = "attn.c_proj"
    up = ("mlp.c_fc",)
    down = "mlp.c_proj"
    targets = ("c_attn",)
    biased = tied = True
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
             "intermediate_size": "n_inner", "max_position_embeddings": "n_positions"}
    widens = 4
    position_offset = 0
    activation, activation_field = "gelu_new", "activation_function"
    dropout, dropout_field = 0.1, "resid_pdrop"
    attention_dropout, attention_dropout_field = 0.1, "attn_pdrop"
