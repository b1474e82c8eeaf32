"""BLOOM (2211.05100): ALiBi in place of positions, a norm after the embedding, all biased."""

from ..ledger import Tensor
from ..models import Family, register
from .decoder import Layer
from .hugging_face import HuggingFaceDecoder, Matrices


class BloomDecoder(HuggingFaceDecoder):
    """`BloomForCausalLM`."""

    always_eager = True  # ALiBi is added to the scores

    def positioned(self, x: Tensor) -> list[Tensor]:
        held = x
        x = self.norm(x, self.embedding_norm)
        return [x, held]

    def position_tables(self, x: Tensor) -> list[Tensor]:
        size = self.run.batch * self.spec.heads * self.run.seq
        return [self.ops.new(size, x.width, "ALiBi", part="activations")]

    def block(self, x: Tensor, layer: Layer, tables: list[Tensor]) -> Tensor:
        m, norms = layer
        normed = self.norm(x, norms[0])
        h, weights = self.attention(normed, m, tables, x)
        normed = self.norm(h, norms[1])
        return self.mlp(normed, m, h)

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        qkv = m[self.spec.layout.qkv[0]](x)
        q, k, v = (self.ops.view(self.ops.slice(qkv, n)) for n in self.sizes_of_q_k_v(qkv))
        return q, k, v

    def finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        y = self.ops.dropout(y, self.spec.dropout)
        return y if residual is None else self.ops.add(residual, y, "residual sum")

    def eager_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`baddbmm` scales the scores as it adds ALiBi to them."""
        ops, spec, run = self.ops, self.spec, self.run
        scores, width = run.batch * spec.heads * run.seq**2, q.width
        q, k, v = ops.copy(q), ops.copy(k), ops.copy(v)
        w = ops.bmm(q, k, scores, "scores")
        w = ops.add(w, mask, "masked scores")
        w = ops.cast(self.softmax(w), width)
        w = ops.dropout(w, spec.attention_dropout)
        y = ops.bmm(w, v, q.count, "output")
        return ops.copy(y, back=True), w


@register
class Bloom(Family):
    model_type = "bloom"
    decoder = BloomDecoder
    layer = "transformer.h."
    biased = tied = embedding_norm = True
    qkv = ("self_attention.query_key_value",)
    out = "self_attention.dense"
    up = ("mlp.dense_h_to_4h",)
    down = "mlp.dense_4h_to_h"
    targets = ("query_key_value",)
    names = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "max_position_embeddings": "seq_length"}
    widens = 4
    activation, activation_field = "gelu_bloom", "activation"
