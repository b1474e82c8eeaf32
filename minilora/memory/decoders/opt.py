"""OPT (2205.01068): GPT-3's shape with q, k and v apart. The 350M has a narrower embedding and late norms."""

from typing import Any

from ..ledger import Tensor
from ..models import Family, Fields, Linear, ModelSpec, register
from .decoder import Layer
from .hugging_face import HuggingFaceDecoder, Matrices


class OPTDecoder(HuggingFaceDecoder):
    """`OPTForCausalLM`."""

    def positioned(self, x: Tensor) -> list[Tensor]:
        ops, spec = self.ops, self.spec
        held = [x, ops.new(self.run.batch * self.run.seq, 8, "position numbers")]
        with ops.inside("positions"):
            numbers = ops.new(held[1].count, 8, "position numbers + 2")
            held.append(ops.embedding(numbers, self.positions, spec.hidden))
            del numbers
            x = ops.add(x, held[2])
        return [x, *held]

    def block(self, x: Tensor, layer: Layer, tables: list[Tensor]) -> Tensor:
        ops, spec = self.ops, self.spec
        m, norms = layer
        before = spec.last_norm  # where no norm stands before the head, those of the layers stand after the sums
        residual = x
        h = self.norm(x, norms[0]) if before else x
        h, weights = self.attention(h, m, tables)
        h = ops.dropout(h, spec.dropout)
        h = ops.add(residual, h, "residual sum")
        if not before:
            h = self.norm(h, norms[0])
        residual = h
        h = self.norm(h, norms[1]) if before else h
        h = m["fc1"](h)
        h = self.activate(h)
        h = m["fc2"](h)
        h = ops.dropout(h, spec.dropout)
        h = ops.add(residual, h, "residual sum")
        return h if before else self.norm(h, norms[1])

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        ops, names = self.ops, self.spec.layout.qkv
        q = m[names[0]](x)
        q = ops.unary(q, "scaled q")
        q = ops.view(q)
        k, v = (ops.view(m[name](x)) for name in names[1:])
        return q, k, v


@register
class OPT(Family):
    model_type = "opt"
    decoder = OPTDecoder
    layer = "model.decoder.layers."
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out = "self_attn.out_proj"
    up = ("fc1",)
    down = "fc2"
    targets = ("q_proj", "v_proj")
    biased = tied = True
    attention_bias_field = "enable_bias"
    names = {"intermediate_size": "ffn_dim"}
    position_offset = 2  # it counts from row 2
    activation, activation_field = "relu", "activation_function"
    dropout, dropout_field = 0.1, "dropout"

    def linears(self, spec: ModelSpec) -> tuple[Linear, ...]:
        """Its MLP lays its tokens in one row."""
        return tuple(Linear(m.name, m.out, m.inp, m.bias, flat=m.name in ("fc1", "fc2")) for m in super().linears(spec))

    def read(self, config: Fields) -> dict[str, Any]:
        sizes = super().read(config)
        return sizes | {
            "embedding": config.size("word_embed_proj_dim", sizes["hidden"]),
            "last_norm": config.flag("do_layer_norm_before", True) and not config.flag("_remove_final_layer_norm",
                                                                                       False)}
