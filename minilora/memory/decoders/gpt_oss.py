"""gpt-oss (2508.10925): experts in each layer, a window in every other one, and attention with sinks.

A sink is a number a head that the softmax sees as one token more. No fused kernel of torch's has that, so all scores
are in memory.
"""

from typing import Any

from ..families import Bare, Linear
from ..ledger import Tensor
from ..models import Fields, ModelSpec, register
from ..ops import Ops
from ..run import Run
from .decoder import Layer, Matrices
from .experts import ExpertsDecoder, OfExperts
from .olmo2 import Olmo2Decoder
from .several_kinds import SeveralKinds, read_pattern

SINKS, ROUTER = "self_attn.sinks", "mlp.router.weight"


class GptOssDecoder(SeveralKinds, ExpertsDecoder):
    """`GptOssForCausalLM`."""

    always_eager = True
    own_tables = False

    def __init__(self, ops: Ops, spec: ModelSpec, run: Run, layers: int):
        super().__init__(ops, spec, run, layers)
        self.sinks = self.layers[0][0][SINKS].weight

    norm = Olmo2Decoder.norm

    def block(self, x: Tensor, layer: Layer, tables: list) -> Tensor:
        self.sinks = layer[0][SINKS].weight
        return super().block(x, layer, tables)

    def position_tables(self, x: Tensor) -> list[Tensor]:
        """(T, D / 2) each."""
        size = self.run.seq * self.spec.head_dim // 2
        return [self.ops.new(size, x.width, "rotary table", part="activations") for _ in range(2)]

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ops = self.ops
        first, second = ops.split(x, [x.count // 2] * 2)
        left = ops.subtract(ops.mul(first, cos), ops.mul(second, sin))
        right = ops.add(ops.mul(second, cos), ops.mul(first, sin))
        return ops.cat(left, right)

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.ops.view(m[name](x), copy_back=True) for name in self.spec.layout.qkv)
        return q, k, v

    def eager_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        ops, spec, run = self.ops, self.spec, self.run
        rows, scores = run.batch * spec.heads * run.seq, run.batch * spec.heads * run.seq**2
        if spec.heads != spec.kv_heads:
            k, v = (ops.unary(t, "repeated", count=q.count) for t in (k, v))
        w = ops.unary(ops.bmm(q, k, scores, "scores"), "scaled scores")
        w = ops.add(w, mask, "masked scores")
        w = ops.cat(w, ops.expand(self.sinks, rows))
        most, places = ops.topk(w, rows)
        w = ops.subtract(w, most, "scores less the largest")
        w = ops.unary(w, "softmax", "output")
        w = ops.cast(ops.slice(w, scores), v.width)
        y = ops.bmm(w, v, q.count, "output")
        return ops.copy(y, back=True), w

    def routed(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        ops = self.ops
        logits = self.router_logits(x, m[ROUTER])
        with ops.inside("router"):
            top, places = ops.topk(logits, self.chosen(x))
            return logits, ops.unary(top, "softmax", "output"), places

    def gated(self, h: Tensor) -> Tensor:
        """(clamped up + 1) times clamped gate times its sigmoid; the two take turns in a row."""
        ops, half = self.ops, h.count // 2
        gate, up = ops.slice(h, half), ops.slice(h, half)
        gate, up = ops.clamp(gate, 1, "clamped gate"), ops.clamp(up, 2, "clamped up")
        swish = ops.mul(gate, ops.unary(ops.unary(gate, "scaled gate"), "sigmoid", "output"))
        return ops.mul(ops.unary(up, "up + 1", backward=()), swish)


@register
class GptOss(OfExperts):
    model_type = "gpt_oss"
    decoder = GptOssDecoder
    router = ROUTER
    was = ()
    biased = True
    window = 128

    def bare(self, spec: ModelSpec) -> tuple[Bare, ...]:
        router, *both = super().bare(spec)
        named = [Bare(s.name, s.count, s.out, s.inp, bias=True, transposed=s is not router) for s in (router, *both)]
        return (Bare(SINKS, 1, spec.heads, 1), *named)

    def matrices(self, spec: ModelSpec) -> tuple[Linear | Bare, ...]:
        sinks, *rest = self.bare(spec)
        return (sinks, *self.linears(spec), *rest)

    def read(self, config: Fields) -> dict[str, Any]:
        sizes = super().read(config)
        return sizes | {"head_dim": config.size("head_dim", 64), "expert_ffn": sizes["ffn"],
                        "experts": config.either("num_local_experts", "num_experts", 128),
                        "experts_a_token": config.size("num_experts_per_tok", 4),
                        "pattern": read_pattern(config, sizes["layers"], 2)}
