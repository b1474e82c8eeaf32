"""Qwen3-MoE (2505.09388): Qwen3 with experts in the place of its MLP."""

from typing import Any

from ..ledger import Tensor
from ..models import Fields, ModelSpec, register
from .decoder import Matrices
from .experts import DENSE, ROUTER, SPARSE, ExpertsDecoder, OfExperts
from .qwen3 import HEAD_NORMS, Qwen3Decoder


class Qwen3MoeDecoder(ExpertsDecoder, Qwen3Decoder):
    """`Qwen3MoeForCausalLM`."""

    def routed(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        ops, count = self.ops, self.chosen(x)
        logits = self.router_logits(x, m[ROUTER])
        with ops.inside("router"):
            shares, places = ops.topk(ops.unary(ops.cast(logits, 4), "softmax", "output"), count)
            shares = self.shares_of_one(shares) if self.spec.norm_shares else shares
            return logits, ops.cast(shares, logits.width), places


@register
class Qwen3Moe(OfExperts):
    model_type = "qwen3_moe"
    decoder = Qwen3MoeDecoder
    router_first = False

    def extra_norms(self, spec: ModelSpec) -> dict[str, int]:
        return dict.fromkeys(HEAD_NORMS, spec.head_dim)

    def read(self, config: Fields) -> dict[str, Any]:
        sizes = super().read(config)
        every, layers = config.size("decoder_sparse_step", 1), sizes["layers"]
        dense = config.numbers("mlp_only_layers", layers)
        pattern = tuple(DENSE if i in dense or (i + 1) % every else SPARSE for i in range(layers))
        window = config.window(4096) if config.flag("use_sliding_window", False) else 0
        return sizes | {"experts": config.either("num_experts", "num_local_experts", 128), "window": window,
                        "expert_ffn": config.size("moe_intermediate_size", 768),
                        "experts_a_token": config.size("num_experts_per_tok", 8),
                        "norm_shares": config.flag("norm_topk_prob", False),
                        "pattern": pattern if DENSE in pattern else ()}
