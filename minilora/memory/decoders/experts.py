"""Layers of several experts as transformers 5 has them: all of a layer in two stacked parameters, and a token through
some of them by grouped products (`integrations/moe.py`, `grouped_mm_experts_forward`).

A token's row is there once for each expert that it goes through. Which experts those are changes no byte.

In the shape comments N is batch x tokens, k the experts a token goes through, S = N k, E all experts, C the hidden
size, F an expert's width.
"""

from dataclasses import replace
from typing import Any

from ..families import Bare, Linear, NotPriced
from ..ledger import Tensor
from ..linears import BareParameter
from ..models import Fields, ModelSpec
from .decoder import Matrices
from .llama import Llama, LlamaDecoder

DENSE, SPARSE = "one MLP", "experts"  # kinds of layers
UP, DOWN, ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"


class ExpertsDecoder(LlamaDecoder):
    """A decoder whose MLP is a router and experts. A family says how its router chooses (`routed`)."""

    def mlp(self, x: Tensor, m: Matrices, residual: Tensor | None = None) -> Tensor:
        if not any(isinstance(matrix, BareParameter) for matrix in m.values()):
            return super().mlp(x, m)
        rows = self.ops.view(x)  # N C
        logits, shares, chosen = self.routed(rows, m)
        y = self.ops.view(self.experts(rows, m, shares, chosen))
        gate, up, down = self.spec.layout.shared
        if down not in m:
            return y
        shared = m[down](self.ops.mul(self.activate(m[gate](x)), m[up](x)))
        return self.ops.add(y, shared, "sum with the shared expert")

    def routed(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        """The router's logits (N E), held while the experts run; of each token's experts the shares and numbers (S)."""
        raise NotImplementedError

    def router_logits(self, x: Tensor, router: BareParameter) -> Tensor:
        """N E"""
        factors = router.factors()
        router.checked(factors)
        with self.ops.inside("router"):
            return self.ops.linear(x, router.folded(factors), router.bare.out, router.bias, flat=True)

    def wide_logits(self, x: Tensor, router: BareParameter) -> Tensor:
        """The same of casts to fp32."""
        ops, factors = self.ops, router.factors()
        router.checked(factors)
        with ops.inside("router"):
            return ops.linear(ops.cast(x, 4), ops.cast(router.folded(factors), 4), router.bare.out, flat=True)

    def shares_of_one(self, shares: Tensor) -> Tensor:
        """A token's shares, divided in place by their sum."""
        total = self.ops.unary(shares, "sum of shares", count=shares.count // self.spec.experts_a_token, backward=())
        return self.ops.divide_in_place(shares, total)

    def chosen(self, x: Tensor) -> int:
        """S of rows N C."""
        return x.count // self.spec.hidden * self.spec.experts_a_token

    def experts(self, x: Tensor, m: Matrices, shares: Tensor, chosen: Tensor) -> Tensor:
        """N C -> N C"""
        ops, spec, count, hidden = self.ops, self.spec, chosen.count, self.spec.hidden
        up, down = (m[name] for name in self.spec.layout.stacked)
        down_factors = down.factors()  # the wrapper around the other
        down.checked(down_factors)
        up_factors = up.factors()
        up.checked(up_factors)
        with ops.inside("experts"):
            numbers, order = ops.new(count, 8, "experts in order"), ops.new(count, 8, "order", also=True)
            rows = ops.index(x, ops.new(count, 8, "tokens in order"), count * hidden)  # S C
            shares = ops.index(shares, order, count, "shares in order")  # S
            held = [ops.new(count, 4, "experts to count"), ops.new(spec.experts, 4, "rows of each expert")]
            begins = ops.new(spec.experts, 4, "where experts begin")
            biases = self.biases(up, numbers)
            h = self.projected(rows, up, up_factors, begins, biases)  # S 2F
            h = self.gated(h)  # S F
            biases = self.biases(down, numbers)
            h = self.projected(h, down, down_factors, begins, biases)  # S C
            weighted = ops.mul(h, shares, "weighted rows")  # S C
            back = ops.new(count, 8, "order back")
            ascending = ops.new(count, 8, "ascending")
            del ascending
            weighted = ops.index(weighted, back, count * hidden, "rows of each token")
            y = ops.sum(ops.view(weighted, copy_back=True), x.count, "sum over experts")
            del held
            return ops.cast(y, x.width)

    def biases(self, stack: BareParameter, numbers: Tensor) -> Tensor | None:
        """Of each row's expert, if experts have them."""
        if stack.bias is None:
            return None
        return self.ops.index(stack.bias, numbers, numbers.count * stack.bare.out, "biases in order")

    def projected(self, x: Tensor, stack: BareParameter, factors: tuple[Tensor, ...], begins: Tensor,
                  biases: Tensor | None) -> Tensor:
        """Rows in the order of their experts, each by its expert's matrix."""
        inp, out, name = stack.bare.inp, stack.bare.out, stack.bare.name.rpartition(".")[2]
        y = self.ops.grouped(x, stack.folded(factors), begins, inp, out, name, self.run.attention == "efficient")
        return y if biases is None else self.ops.add_in_place(y, biases)

    def gated(self, h: Tensor) -> Tensor:
        """S 2F -> S F"""
        gate, up = self.ops.split(h, [h.count // 2] * 2)
        return self.ops.mul(self.activate(gate), up)


class OfExperts(Llama):
    """What families of such layers share: where their stacks are, and what of their step is not priced."""

    own_decoder = None
    experts = True
    stacked, router = (UP, DOWN), ROUTER
    router_first = True  # as the module has them
    shared = ("", "", "")  # gate, up and down of the MLP that every token goes through beside its experts
    was = ("gate_proj", "up_proj", "down_proj", "gate")  # their linears in transformers 4, as PEFT knows them
    spread = "products are grouped, so which of them the tokens take changes no byte"
    attention_bias_field, mlp_bias_field = "attention_bias", ""
    targets = ("q_proj", "v_proj")

    def mlp_linears(self, spec: ModelSpec) -> tuple[Linear, ...]:
        if not spec.experts:
            return super().mlp_linears(spec)
        width, ffn, bias = spec.hidden, spec.shared_ffn, spec.mlp_bias
        shapes = ((ffn, width), (ffn, width), (width, ffn)) if ffn else ()
        return tuple(Linear(name, *shape, bias) for name, shape in zip(self.shared, shapes))

    def matrices(self, spec: ModelSpec) -> tuple[Linear | Bare, ...]:
        return (*self.attention_linears(spec), *self.bare(spec), *self.mlp_linears(spec))

    def bare(self, spec: ModelSpec) -> tuple[Bare, ...]:
        if not spec.experts:
            return ()
        gate, up, down, router = ((name,) if name else () for name in self.was or ("",) * 4)
        width, ffn, count = spec.hidden, spec.expert_ffn, spec.experts
        chooses = (Bare(self.router, 1, count, width, router),)
        both = (Bare(self.stacked[0], count, 2 * ffn, width, gate + up, 2 if self.was else 1),
                Bare(self.stacked[1], count, width, ffn, down))
        return chooses + both if self.router_first else both + chooses

    def at(self, spec: ModelSpec, layer: int) -> ModelSpec:
        return replace(spec, experts=0) if spec.pattern and spec.pattern[layer] == DENSE else spec

    def read(self, config: Fields) -> dict[str, Any]:
        if config.flag("output_router_logits", False):
            raise NotPriced(f"{config.name}: output_router_logits is true: the loss of routers is not priced in closed "
                            "form")
        return super().read(config)

    def remarks(self, spec: ModelSpec, run: Any) -> list[str]:
        said = [f"{spec.experts} experts a layer, {spec.experts_a_token} a token: {self.spread}"]
        if not run.adapts:
            return said
        if any(isinstance(m, Bare) and m.count > 1 for m in run.targets(spec)):
            return [*said, "adapters reach the experts too: PEFT makes a layer's experts anew with their update in "
                    "each forward, as large as they are, and backward makes a gradient as large"]
        four_bit = ", nor does 4 bits make them smaller" if run.method == "qlora" else ""
        return [*said, "the experts stay frozen: they are stacked in parameters that are no linears, which these "
                f"targets do not reach{four_bit}"]

    def check(self, run: Any) -> None:
        wrong = [(name, value) for name, value, refused in (
            ("base", run.base, run.streamed), ("kernels", run.kernels, run.kernels != "torch"),
            ("quantisation", run.quantisation, run.method == "qlora" and run.quantisation != "nf4"),
            ("stack", run.stack, run.software.shift == "logits")) if refused]
        if wrong:
            raise ValueError(f"layers of several experts ({self.model_type}) are priced as transformers 5 has them, "
                             f"all of a layer in one parameter; {wrong[0][0]} {wrong[0][1]} is not priced for them")
