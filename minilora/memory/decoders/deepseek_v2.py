"""DeepSeek-V2 (2405.04434): latent attention, shared experts beside routed ones."""

from typing import Any

from ..ledger import Tensor
from ..models import Fields, register
from .decoder import Matrices
from .experts import ROUTER
from .latent import LatentDecoder, OfLatents

GREEDY, WITHIN_GROUPS = "greedy", "group_limited_greedy"


class DeepseekV2Decoder(LatentDecoder):
    """`DeepseekV2ForCausalLM`."""

    def position_tables(self, x: Tensor) -> list[Tensor]:
        """One of complex numbers, (T, R / 2)."""
        return [self.ops.new(self.run.seq * self.spec.rope_dim // 2, 8, "rotary table", part="activations")]

    def turned(self, q: Tensor, k: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
        q, k = self.ops.turn_complex(q, k, tables[0], (self.spec.heads, 1))
        return q, k

    def routed(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        ops, spec, count = self.ops, self.spec, self.chosen(x)
        logits = self.wide_logits(x, m[ROUTER])
        with ops.inside("router"):
            scores = ops.unary(ops.cast(logits, 4), "softmax", "output")
            if spec.groups:
                scores = ops.masked(scores)
            shares, places = ops.topk(scores, count)
            return logits, ops.unary(shares, "scaled shares"), places


@register
class DeepseekV2(OfLatents):
    model_type = "deepseek_v2"
    decoder = DeepseekV2Decoder
    mlp_bias_field = "mlp_bias"

    def read(self, config: Fields) -> dict[str, Any]:
        method = config.word("topk_method", GREEDY, (GREEDY, WITHIN_GROUPS))
        return super().read(config) | {"groups": config.size("n_group") if method == WITHIN_GROUPS else 0}
