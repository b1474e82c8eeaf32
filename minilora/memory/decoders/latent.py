"""DeepSeek's latent attention (2405.04434), on which V2 and V3 build: q, and k and v together, come through a narrow
width; a part of each head turns, and of k this part is one for all heads.

In the shape comments N is batch x tokens, H heads, R the part of a head that turns, P the rest of it, V a head of v.
"""

from typing import Any

from ..families import Linear
from ..ledger import Tensor
from ..models import Fields, ModelSpec
from ..ops import Ops
from ..run import Run
from .decoder import Matrices
from .experts import DENSE, SPARSE, ExpertsDecoder, OfExperts

Q, Q_DOWN, Q_UP, KV_DOWN, KV_UP = (f"self_attn.{name}" for name in (
    "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"))
Q_NORM, KV_NORM = "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"


class LatentDecoder(ExpertsDecoder):
    """What the two have in common."""

    def __init__(self, ops: Ops, spec: ModelSpec, run: Run, layers: int):
        super().__init__(ops, spec, run, layers)
        self.frequencies = [ops.state(spec.rope_dim // 2, 4, "buffers", "rotary frequencies") for _ in range(2)]

    def attention(self, x: Tensor, m: Matrices, tables: list[Tensor], residual: Tensor | None = None,
                  ) -> tuple[Tensor, Tensor | None]:
        ops, spec = self.ops, self.spec
        rows = x.count // spec.hidden  # N
        q = ops.view(m[Q_UP](m[Q_NORM](m[Q_DOWN](x))) if spec.q_rank else m[Q](x), copy_back=True)
        plain, turning = ops.split(q, [rows * spec.heads * n for n in (spec.head_dim - spec.rope_dim, spec.rope_dim)])
        latent, k_turning = ops.split(m[KV_DOWN](x), [rows * spec.kv_rank, rows * spec.rope_dim])
        latent, k_turning = ops.view(m[KV_NORM](latent)), ops.view(k_turning)
        with ops.inside("attention"):
            turning, k_turning = self.turned(turning, k_turning, tables)
            latent, k_turning = self.cached(latent, k_turning)
            q = ops.cat(plain, turning)
        k, v = self.keys_values(latent, k_turning, m)
        with ops.inside("attention"):
            y, weights = (self.eager_attention(q, k, v, tables[-1]) if self.eager
                          else (self.fused_attention(q, k, v, tables[-1]), None))
        return self.attended(ops.view(y), m), weights

    def keys_values(self, latent: Tensor, turning: Tensor, m: Matrices) -> tuple[Tensor, Tensor]:
        """k (N H (P + R)), its two parts copied into one, and v (N H V)."""
        ops, spec = self.ops, self.spec
        kv = ops.view(m[KV_UP](latent), copy_back=True)
        with ops.inside("attention"):
            rows = spec.heads * kv.count // (spec.heads * (spec.head_dim - spec.rope_dim + spec.value_dim))
            plain, v = ops.split(kv, [rows * (spec.head_dim - spec.rope_dim), rows * spec.value_dim])
            turning = ops.expand(turning, rows * spec.rope_dim)
            k = ops.new(rows * spec.head_dim, kv.width, "k")
            return ops.copy_into(ops.copy_into(k, plain), turning), v

    def cached(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """It is the latents that are kept."""
        if self.cache is None:
            return k, v
        spec, rows = self.spec, self.run.batch * self.run.tokens
        room = [self.ops.new(rows * size, k.width, name, part="KV cache")
                for name, size in (("latents", spec.kv_rank), ("turned keys", spec.rope_dim))]
        self.cache += room
        return tuple(Tensor(t.count, t.width, r.storage) for t, r in zip((k, v), room))


class OfLatents(OfExperts):
    """A family with such attention, whose first layers have one MLP."""

    shared = tuple(f"mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
    router_first = False
    targets = ("kv_b_proj", "o_proj")  # PEFT has no rule
    dense_first = 0

    def attention_linears(self, spec: ModelSpec) -> tuple[Linear, ...]:
        q, v, bias = spec.heads * spec.head_dim, spec.heads * spec.value_dim, spec.qkv_bias
        both = q - spec.heads * spec.rope_dim + v
        queries = ((Linear(Q_DOWN, spec.q_rank, spec.hidden, bias), Linear(Q_UP, q, spec.q_rank, False)) if spec.q_rank
                   else (Linear(Q, q, spec.hidden, False),))
        return (*queries, Linear(KV_DOWN, spec.kv_rank + spec.rope_dim, spec.hidden, bias),
                Linear(KV_UP, both, spec.kv_rank, False), Linear(self.out, spec.hidden, v, bias))

    def extra_norms(self, spec: ModelSpec) -> dict[str, int]:
        return {Q_NORM: spec.q_rank, KV_NORM: spec.kv_rank} if spec.q_rank else {KV_NORM: spec.kv_rank}

    def read(self, config: Fields) -> dict[str, Any]:
        sizes = super().read(Fields({**config.config, "head_dim": None}, config.name, config.family, config.names))
        turning = config.size("qk_rope_head_dim", 64)
        dense, layers = config.size("first_k_dense_replace", self.dense_first, 0), sizes["layers"]
        ffn = config.size("moe_intermediate_size", None)
        silent = config.config.get("q_lora_rank", "") is None
        pattern = (DENSE,) * min(dense, layers) + (SPARSE,) * (layers - dense)
        return sizes | {
            "kv_heads": sizes["heads"], "head_dim": config.size("qk_nope_head_dim", 128) + turning, "rope_dim": turning,
            "value_dim": config.size("v_head_dim", 128), "kv_rank": config.size("kv_lora_rank", 512),
            "q_rank": 0 if silent else config.size("q_lora_rank", 1536), "expert_ffn": ffn,
            "experts": config.either("n_routed_experts", "num_local_experts", None),
            "experts_a_token": config.size("num_experts_per_tok"), "pattern": pattern if dense else (),
            "shared_ffn": ffn * config.size("n_shared_experts", 1)}
