"""DeepSeek-V3 and R1 (2412.19437): latent attention, one shared expert, and routed ones chosen within groups."""

from typing import Any

from ..ledger import Tensor
from ..models import Fields, ModelSpec, register
from ..ops import Ops
from ..run import Run
from .decoder import Matrices
from .experts import ROUTER
from .latent import LatentDecoder, OfLatents


class DeepseekV3Decoder(LatentDecoder):
    """`DeepseekV3ForCausalLM`."""

    def __init__(self, ops: Ops, spec: ModelSpec, run: Run, layers: int):
        super().__init__(ops, spec, run, layers)
        self.corrections = [ops.state(spec.experts, 4, "buffers", "correction of scores")
                            for i in range(layers) if spec.at(i).experts]

    def position_tables(self, x: Tensor) -> list[Tensor]:
        size = self.run.seq * self.spec.rope_dim
        return [self.ops.new(size, x.width, "rotary table", part="activations") for _ in range(2)]

    def turned(self, q: Tensor, k: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Pairs turn that stand side by side."""
        ops, (cos, sin) = self.ops, tables[:2]
        pairs = [(ops.slice(t, t.count // 2), ops.slice(t, t.count // 2)) for t in (q, k)]
        q, k = (ops.cat(ops.subtract(ops.mul(one, cos), ops.mul(other, sin)),
                        ops.add(ops.mul(other, cos), ops.mul(one, sin))) for one, other in pairs)
        return q, k

    def routed(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        """In fp32. The choice itself leaves nothing behind but the places."""
        ops, spec, count = self.ops, self.spec, self.chosen(x)
        logits = self.wide_logits(x, m[ROUTER])
        with ops.inside("router"):
            scores = ops.unary(logits, "sigmoid", "output")
            masked = ops.new(scores.count, 4, "scores of the groups chosen")
            places = ops.new(count, 8, "places of the top")
            del masked
            shares = ops.gather(scores, places)
            if spec.norm_shares:
                total = ops.unary(shares, "sum of shares", count=count // spec.experts_a_token, backward=())
                shares = ops.divide_in_place(shares, ops.unary(total, "sum and a little", backward=()))
            return logits, ops.unary(shares, "scaled shares"), places


@register
class DeepseekV3(OfLatents):
    model_type = "deepseek_v3"
    decoder = DeepseekV3Decoder
    dense_first = 3

    def read(self, config: Fields) -> dict[str, Any]:
        return super().read(config) | {"groups": config.size("n_group", 8),
                                       "norm_shares": config.flag("norm_topk_prob", True)}
