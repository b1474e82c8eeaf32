"""Mixtral (2401.04088): Mistral with eight experts a layer, of which a token goes through two."""

from typing import Any

from ..families import NotPriced
from ..ledger import Tensor
from ..models import Fields, register
from .decoder import Matrices
from .experts import ROUTER, ExpertsDecoder, OfExperts


class MixtralDecoder(ExpertsDecoder):
    """`MixtralForCausalLM`."""

    def routed(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        ops, count = self.ops, self.chosen(x)
        logits = self.router_logits(x, m[ROUTER])
        with ops.inside("router"):
            shares = ops.unary(ops.cast(logits, 4), "softmax", "output")  # N E
            shares, places = ops.topk(shares, count)
            return logits, self.shares_of_one(shares), places


@register
class Mixtral(OfExperts):
    model_type = "mixtral"
    decoder = MixtralDecoder
    window = 0
    attention_bias_field = ""
    was = ("w1", "w3", "w2", "gate")

    def read(self, config: Fields) -> dict[str, Any]:
        if config.share("router_jitter_noise", 0.0):
            raise NotPriced(f"{config.name}: router_jitter_noise is not 0, which is not priced in closed form")
        sizes = super().read(config)
        return sizes | {"experts": config.size("num_local_experts", 8), "expert_ffn": sizes["ffn"],
                        "experts_a_token": config.size("num_experts_per_tok", 2)}
