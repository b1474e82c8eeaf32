"""Llama 4's text model: each expert sees all tokens, scaled by what the router says; a shared expert; and layers
without rotary positions that see all tokens among ones with such that see a chunk.
"""

from dataclasses import replace
from typing import Any

from ..families import Bare, Linear
from ..ledger import Tensor
from ..models import Fields, ModelSpec, register
from .decoder import INVERSE_ROOT, PLUS_EPS, Layer, Matrices
from .experts import ExpertsDecoder, OfExperts

TURNED, CHUNKED, SPARSE = "rotary", "in chunks", "experts"  # what a layer may have, joined in its kind
INSIDE = "feed_forward."
ROUTER = f"{INSIDE}router"


class Llama4Decoder(ExpertsDecoder):
    """`Llama4ForCausalLM`."""

    windows, masks_apart = ("", "window"), True
    kind, repeats = "", False  # of the layer that runs; whether its keys and values are repeated for fused attention

    def position_tables(self, x: Tensor) -> list[Tensor]:
        """One of complex numbers, (T, D / 2)."""
        return [self.ops.new(self.run.seq * self.spec.head_dim // 2, 8, "rotary table", part="activations")]

    def tables(self, x: Tensor) -> list:
        with self.ops.inside("positions"):
            masks = [self.mask(x, window) for window in self.windows]
            return [*self.position_tables(x), *masks]

    def tables_of(self, tables: list, layer: int) -> list:
        kind = self.spec.pattern[layer]
        return [kind, tables[0], tables[2] if CHUNKED in kind else tables[1]]

    def block(self, x: Tensor, layer: Layer, tables: list) -> Tensor:
        ops, (m, norms) = self.ops, layer
        self.kind, grouped = tables[0], self.spec.heads != self.spec.kv_heads
        self.repeats = grouped and (tables[2] is not None or self.eager)
        residual = x
        h = self.norm(x, norms[0])
        attended, weights = self.attention(h, m, tables[1:])
        h = ops.add(residual, attended, "residual sum")
        residual = h
        h = self.norm(h, norms[1])
        h, logits = self.experts_and_logits(h, m) if SPARSE in self.kind else (super().mlp(h, m), None)
        return ops.add(residual, h, "residual sum")

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        """Repeated heads' gradients lie before the tokens', and must be laid out anew."""
        ops, names = self.ops, self.spec.layout.qkv
        q = ops.view(m[names[0]](x))
        k = ops.view(m[names[1]](x), copy_back=self.repeats and TURNED not in self.kind)
        return q, k, ops.view(m[names[2]](x), copy_back=self.repeats)

    def norm(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        with self.ops.inside("norm"):
            return self.ops.mul(self.ops.cast(self.of_length_one(x, weights[0].count), x.width), weights[0], "output")

    def of_length_one(self, x: Tensor, row: int) -> Tensor:
        """In fp32."""
        ops, wide = self.ops, self.ops.cast(x, 4)
        mean = self.mean_square(wide, row)
        return ops.mul(wide, ops.unary(ops.unary(mean, *PLUS_EPS), *INVERSE_ROOT))

    def turned(self, q: Tensor, k: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
        ops, width = self.ops, q.width
        if TURNED in self.kind:
            q, k = ops.cast(q, 4), ops.cast(k, 4)
            q, k = ops.times(q, tables[0]), ops.view(ops.times(k, tables[0]), copy_back=self.repeats)
            q, k = ops.cast(q, width), ops.cast(k, width)
            if self.spec.qk_norm:
                q, k = (ops.cast(self.of_length_one(t, self.spec.head_dim), width) for t in (q, k))
        elif self.spec.scaled_queries:
            scales = ops.new(self.run.seq, 4, "scales of positions")
            q = ops.cast(ops.mul(q, scales, "scaled queries"), width)
        return q, k

    def experts_and_logits(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor]:
        """N C -> N C, and the router's logits (N E)."""
        ops, spec = self.ops, self.spec
        x = ops.view(x)
        logits = m[ROUTER](x)
        every, count = x.count * spec.experts, logits.count
        with ops.inside("router"):
            top, places = ops.topk(logits, self.chosen(x))
            scores = ops.scatter(top, places, count)
            del top
            scores = ops.cast(ops.unary(ops.cast(scores, 4), "sigmoid", "output"), x.width)  # N E
        with ops.inside("experts"):
            rows = ops.unary(x, "rows for every expert", count=every)  # E N C
            rows = ops.mul(rows, ops.copy(scores), "weighted rows")
            up, down = (m[name].weight for name in spec.layout.stacked)
            out = self.of_experts(rows, up, down)
        y = self.shared_expert(x, m)
        with ops.inside("experts"):
            total = ops.sum(ops.view(out, copy_back=True), x.count, "sum over experts")
            return ops.add_in_place(y, total), logits

    def of_experts(self, rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """E N C -> E N C"""
        ops, spec = self.ops, self.spec
        h = ops.bmm(rows, up, rows.count // spec.hidden * 2 * spec.expert_ffn, "gate and up")
        gate, up = ops.split(h, [h.count // 2] * 2)
        return ops.bmm(ops.mul(up, self.activate(gate)), down, rows.count, "down")

    def shared_expert(self, x: Tensor, m: Matrices) -> Tensor:
        gate, up, down = self.spec.layout.shared
        return m[down](self.ops.mul(self.activate(m[gate](x)), m[up](x)))


@register
class Llama4Text(OfExperts):
    model_type = "llama4_text"
    decoder = Llama4Decoder
    up, down = (f"{INSIDE}gate_proj", f"{INSIDE}up_proj"), f"{INSIDE}down_proj"
    shared = tuple(f"{INSIDE}shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
    stacked = (f"{INSIDE}experts.gate_up_proj", f"{INSIDE}experts.down_proj")
    was = ()
    spread = "in transformers each expert computes every token, scaled by the router, so no byte depends on its choice"
    pairs = (ROUTER,)
    window = 8192

    def mlp_linears(self, spec: ModelSpec) -> tuple[Linear, ...]:
        every = super().mlp_linears(spec)
        if not spec.experts:
            return every
        flat = [Linear(m.name, m.out, m.inp, m.bias, flat=True) for m in every]
        return (Linear(ROUTER, spec.experts, spec.hidden, False, flat=True), *flat)

    def bare(self, spec: ModelSpec) -> tuple[Bare, ...]:
        return tuple(Bare(s.name, s.count, s.out, s.inp, transposed=True) for s in super().bare(spec)[1:])

    def at(self, spec: ModelSpec, layer: int) -> ModelSpec:
        return spec if SPARSE in spec.pattern[layer] else replace(spec, experts=0)

    def read(self, config: Fields) -> dict[str, Any]:
        sizes = super().read(config)
        layers, ffn, step = sizes["layers"], sizes["ffn"], config.size("interleave_moe_layer_step", 1)
        every = config.size("no_rope_layer_interval", 4)
        turned = config.config.get("no_rope_layers") or [(i + 1) % every for i in range(layers)]
        kinds = config.config.get("layer_types") or ["chunked_attention" if t else "full_attention" for t in turned]
        for name, value in (("no_rope_layers", turned), ("layer_types", kinds)):
            if not isinstance(value, (list, tuple)) or len(value) < layers:
                raise ValueError(f"{config.name}: {name} must be a list of {layers} entries, one a layer")
        sparse = config.numbers("moe_layers", layers) if config.config.get("moe_layers") is not None else range(
            step - 1, layers, step)
        pattern = tuple(", ".join([TURNED] * bool(turned[i]) + [CHUNKED] * (kinds[i] == "chunked_attention")
                                  + [SPARSE] * (i in sparse)) for i in range(layers))
        return sizes | {"ffn": config.size("intermediate_size_mlp", 16384), "expert_ffn": ffn, "shared_ffn": ffn,
                        "experts": config.size("num_local_experts", 16), "pattern": pattern,
                        "experts_a_token": config.size("num_experts_per_tok", 1),
                        "head_dim": config.size("head_dim", 128), "qk_norm": config.flag("use_qk_norm", True),
                        "scaled_queries": config.flag("attn_temperature_tuning", True),
                        "window": config.size("attention_chunk_size", 8192)}
