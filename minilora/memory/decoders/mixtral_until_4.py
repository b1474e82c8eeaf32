"""Mixtral as transformers had it until version 4: each expert three linears, one expert after the other.

No config.json calls itself so; `published` prices runs of that time by it.
"""

from typing import Any

from ..ledger import Tensor
from ..models import Fields, Linear, ModelSpec, register
from .hugging_face import Matrices
from .llama import LlamaDecoder
from .mistral import Mistral


class MixtralDecoder(LlamaDecoder):
    """`MixtralForCausalLM`. Tokens are taken to spread evenly over the experts."""

    def mlp(self, x: Tensor, m: Matrices, residual: Tensor | None = None) -> Tensor:
        ops, spec = self.ops, self.spec
        tokens, chosen = x.count // spec.hidden, x.count // spec.hidden * spec.experts_a_token
        width = x.width
        with ops.inside("router"):
            weights = ops.unary(ops.cast(m[GATE](x), 4), "softmax", "output")
            weights = ops.unary(ops.unary(weights, "top", count=chosen), "shares", "output")
            weights = ops.cast(weights, width)
            mask = ops.new(chosen * spec.experts, 8, "mask of experts")
        total = ops.new(tokens * spec.hidden, width, "sum over experts")
        rows = chosen // spec.experts
        for expert in range(spec.experts):
            w1, w2, w3 = (m[f"{EXPERTS}.{expert}.w{i}"] for i in (1, 2, 3))
            h = ops.unary(x, "rows of an expert", count=rows * spec.hidden)
            h = w2(ops.mul(self.activate(w1(h)), w3(h)))
            share = ops.unary(weights, "their shares", count=rows)
            total = self.added(total, ops.cast(ops.mul(h, share, "weighted rows"), width))
            del h, share
        del mask
        return total

    def added(self, total: Tensor, rows: Tensor) -> Tensor:
        """`index_add_`, in place."""
        ops, count, width = self.ops, rows.count, rows.width
        node = ops.node("added rows", [total, rows], [], lambda s, g, n: [
            g[0] if n[0] else None, ops.new(count, width, "gradient of an expert's rows") if n[1] else None])
        return Tensor(total.count, total.width, total.storage, node)


GATE, EXPERTS = "block_sparse_moe.gate", "block_sparse_moe.experts"


@register
class MixtralUntil4(Mistral):
    model_type = "mixtral_until_4"
    decoder, own_decoder = MixtralDecoder, None
    experts = True

    def linears(self, spec: ModelSpec) -> tuple[Linear, ...]:
        attention, width, ffn = super().linears(spec)[:4], spec.hidden, spec.ffn
        experts = [Linear(f"{EXPERTS}.{expert}.{name}", *shape, False) for expert in range(spec.experts)
                   for name, shape in (("w1", (ffn, width)), ("w2", (width, ffn)), ("w3", (ffn, width)))]
        return (*attention, Linear(GATE, spec.experts, width, False), *experts)

    def read(self, config: Fields) -> dict[str, Any]:
        return super().read(config) | {"experts": config.size("num_local_experts"),
                                       "experts_a_token": config.size("num_experts_per_tok")}
