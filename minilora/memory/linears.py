"""A linear of a layer, dense or in 4 bits, with or without an adapter: ours and PEFT's, line by line on the ledger.

In the shape comments N is batch x tokens, r the rank; sizes are element counts.
"""

from .families import Bare, Linear
from .ledger import WIDTH, Tensor, as_view
from .ops import Ops
from .run import Run


class OurLinear:
    """A matrix: its weight, dense or as `quant.Linear4bit` has it, and our adapter if it is a target."""

    levels = False  # a 4-bit weight comes with tables of levels of its own
    transposed = True  # the gradient of lora_B is laid out anew
    off = False  # its adapter is passed over

    def __init__(self, ops: Ops, linear: Linear, run: Run, adapted: bool):
        self.ops, self.linear, self.run, self.width = ops, linear, run, WIDTH[run.dtype]
        self.weight = self.codes = self.bias = self.A = self.B = None
        size = linear.out * linear.inp
        if run.method == "qlora":
            rest = "buffers" if run.software.fsdp1 else "frozen weights"  # no parameters, so not shared out
            self.codes = (ops.gptq(linear.out, linear.inp, linear.name, run.group, rest) if run.quantisation == "gptq"
                          else ops.four_bit(size, linear.name, run.double_quant, self.levels, rest))
        else:
            self.weight = ops.weight(size, self.width, linear.name, run.method == "full", linear.out)
        if linear.bias:
            self.bias = ops.weight(linear.out, self.width, f"{linear.name} bias", run.method == "full")
        if adapted:
            width = WIDTH[run.adapter_dtype]
            self.A = ops.state(run.rank * linear.inp, width, "adapters", f"{linear.name} lora_A", True, run.rank)
            self.B = ops.state(run.rank * linear.out, width, "adapters", f"{linear.name} lora_B", True, linear.out)
            self.B.node.copies = self.transposed
            if run.dora:
                self.magnitude = ops.state(linear.out, width, "adapters", f"{linear.name} magnitude", True)

    def __call__(self, x: Tensor) -> Tensor:
        with self.ops.inside(self.linear.name):
            return self.base(x) if self.A is None or self.off else self.adapted(x)

    def base(self, x: Tensor) -> Tensor:
        if self.codes:
            return self.four_bit_base(x)
        return self.ops.linear(x, self.weight, self.linear.out, self.bias, flat=self.linear.flat)

    def four_bit_base(self, x: Tensor) -> Tensor:
        """`quant.Linear4bitFunction`: keeps nothing, makes the dense weight in forward and again in backward."""
        ops, inp, out, rows, x_width = self.ops, self.linear.inp, self.linear.out, x.count // self.linear.inp, x.width

        def backward(saved, grads, needs):
            w = self.dequantise(grads[0].width)
            dx = ops.new(rows * inp, grads[0].width, "input gradient")
            del w
            return [ops.cast(dx, x_width)]

        node = ops.node("linear in 4 bits", [x], [], backward)
        with ops.unrecorded():
            x = ops.amp(x)
            y = ops.linear(x, self.dequantise(x.width), out)
        y.node = node
        return y

    def dequantise(self, width: int) -> Tensor:
        """`quant.dequantise`: piece by piece of 2^24 weights, through the table of all pairs of levels."""
        ops, blocks = self.ops, -(-self.linear.out * self.linear.inp // 64)
        levels = ops.new(16, 4, "levels")
        table = ops.new(512, 4, "pairs of levels")  # on a real device it is kept from one call to the next
        del levels
        absmax = None
        if self.run.double_quant:
            absmax = ops.new(blocks, 4, "absmax")
            if blocks % 256:
                absmax = ops.new(-(-blocks // 256) * 256, 4, "absmax")
        w = ops.new(blocks * 64, width, "dense weight")
        for start in range(0, blocks, 2**18):
            here = min(2**18, blocks - start)
            numbers = ops.new(here * 32, 4, "codes as numbers")
            pairs = ops.new(here * 32, 8, "pairs of levels")
            del numbers
        w.count = self.linear.out * self.linear.inp  # the last block may be longer than the weight
        return w

    def adapted(self, x: Tensor) -> Tensor:
        """`layers.LoRAFunction`: the adapter's part is added in place, and x, A and B are all that is kept."""
        ops, inp, out, rank = self.ops, self.linear.inp, self.linear.out, self.run.rank
        rows = x.count // inp
        with ops.unrecorded():
            seen = self.dropped(x)[0]  # N in
            a = ops.cast(self.A, x.width)
            a, thin = (ops.cast(t, ops.amp_width(t)) for t in (a, seen))
            inner = ops.new(rows * rank, thin.width, "x A^T")
            del a, thin
            y = self.base(x)  # N out
            b = ops.cast(self.B, y.width)
            del b, inner, seen

        def backward(saved, grads, needs):
            x, A, B, W = saved
            width = grads[0].width
            seen, mask = self.dropped(x)
            seen, a, b = ops.cast(seen, width), ops.cast(A, width), ops.cast(B, width)
            inner = ops.new(rows * rank, width, "gradient of x A^T")
            dA = ops.cast(ops.new(rank * inp, width, "gradient of lora_A"), A.width)
            again = ops.new(rows * rank, width, "x A^T again")
            dB = ops.new(rank * out, width, "gradient of lora_B")
            del again
            dB, dx = ops.cast(dB, B.width), None
            if needs[0]:
                W = self.dequantise(self.width) if W is None else W
                w = ops.cast(W, width)
                dx = ops.new(rows * inp, width, "input gradient")
                del w
                if mask:
                    through_adapter = ops.new(rows * inp, width, "input gradient of the adapter")
                    mask = ops.cast(mask, width)
                    del through_adapter, mask
                dx = ops.cast(as_view(dx), x.width)
            return dx, dA, dB

        node = ops.node("lora", [x, self.A, self.B], [], backward, late=True)
        ops.keep(node, [x, self.A, self.B, self.weight])
        y.node = node
        return y

    def dropped(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input that the adapter sees, and dropout's mask, drawn anew from its seed."""
        if not self.run.dropout:
            return rows, None
        draws = self.ops.new(-(-rows.count // 4), 8, "random numbers")  # 16 bits an entry
        mask = self.ops.new(rows.count, rows.width, "mask")
        del draws
        return self.ops.new(rows.count, rows.width, "x after dropout"), mask


class PeftLinear(OurLinear):
    """`peft.tuners.lora.Linear`: x is copied to the adapter's fp32, and the sum is made in fp32 and cast back; on a
    4-bit base `Linear4bit`, which works on a copy of the base's output."""

    levels = True
    transposed = False

    def adapted(self, x: Tensor) -> Tensor:
        ops, rank, out = self.ops, self.run.rank, self.linear.out
        result = self.base(x)
        if self.codes:
            result = ops.copy(result)
        width = result.width
        if not (self.codes and ops.autocast):
            x = ops.cast(x, self.A.width)
        if self.run.dora:
            return ops.cast(ops.add(result, self.dora(x, result), "sum with DoRA's part"), width)
        inner = ops.linear(ops.dropout(x, self.run.dropout), self.A, rank, what="x A^T", flat=self.linear.flat)
        update = ops.linear(inner, self.B, out, what="x A^T B^T", flat=self.linear.flat)
        del inner
        update = ops.unary(update, "scaled update")
        if self.codes and not ops.autocast:
            update = ops.cast(update, width)
        result = ops.add(result, update, "sum with the update")
        del update
        return result if self.codes else ops.cast(result, width)

    def dora(self, x: Tensor, base: Tensor) -> Tensor:
        """`lora.dora.DoraLinearLayer`: the norms of the whole weight, which get no gradient, and what they scale."""
        ops, rank, out = self.ops, self.run.rank, self.linear.out
        held, norms = self.norms(x.width)
        scale = ops.divide(self.magnitude, norms)
        update = ops.linear(ops.linear(x, self.A, rank, what="x A^T"), self.B, out, what="x A^T B^T")
        if self.bias is not None:
            base = ops.subtract(base, self.bias)
        left = ops.mul(ops.unary(scale, "scale less 1", backward=()), base, "scaled base")
        right = ops.unary(ops.mul(scale, update, "scaled update"), "update times the scaling")
        y = ops.add(left, right, "DoRA's part")
        del held
        return y

    def norms(self, width: int) -> tuple[list[Tensor], Tensor]:
        """What lives on while the layer runs, B A by way of the identity and the weight in x's dtype; and the norms."""
        ops, inp, out = self.ops, self.linear.inp, self.linear.out
        eye = ops.new(inp * inp, self.A.width, "identity")
        a = ops.amp(self.A)  # autocast's casts are those of the adapter, and remembered
        with ops.unrecorded():
            seen = ops.amp(eye)
            inner = ops.linear(seen, a, self.run.rank, what="identity A^T")
        b = ops.amp(self.B)
        with ops.unrecorded():
            update = ops.linear(inner, b, out, what="B A")
            del eye
            update = ops.cast(update, width)
            dense = ops.cast(self.weight, width)
            scaled = ops.unary(update, "scaled B A")
            total = ops.add(dense, scaled, "weight and update")
            del scaled
            norms = ops.new(out, 4 if ops.autocast else width, "norms")
            return [seen, inner, update, dense], ops.cast(norms, width)

    def four_bit_base(self, x: Tensor) -> Tensor:
        """bitsandbytes' `Linear4bit` (0.50): x is cast to the compute dtype, the output back to x's."""
        if self.run.quantisation == "gptq":
            return super().four_bit_base(x)
        x_width = x.width
        return self.ops.cast(super().four_bit_base(self.ops.cast(x, self.width)), x_width)

    def dequantise(self, width: int) -> Tensor:
        """Its kernel makes the dense weight at once."""
        size = self.linear.out * self.linear.inp
        if self.run.quantisation == "gptq":
            return self.ops.new(size, 2, "dense weight")
        absmax = self.ops.new(-(-size // 64), 4, "absmax") if self.run.double_quant else None
        return self.ops.new(size, width, "dense weight")


class BareParameter:
    """A parameter that is no linear's, and PEFT's adapter on it (peft 0.21, `lora.ParamWrapper`): the sum of weight and
    update is made anew in each forward, as large as the parameter."""

    off = False

    def __init__(self, ops: Ops, stack: Bare, run: Run, adapted: bool):
        self.ops, self.bare, self.run, self.A, self.B = ops, stack, run, None, None
        trains, width, rank = run.method == "full", WIDTH[run.outer_dtype], run.rank * stack.fused * stack.count
        size, rows = stack.count * stack.out, stack.count * (stack.inp if stack.transposed else stack.out)
        self.weight = ops.weight(size * stack.inp, width, stack.name, trains, rows if stack.inp > 1 else 0)
        self.bias = ops.weight(size, width, f"{stack.name} bias", trains,
                               stack.count if stack.count > 1 else 0) if stack.bias else None
        if trains:
            ops.stacks[self.weight] = stack.count
        if adapted:
            width = WIDTH[run.adapter_dtype]
            self.A = ops.state(rank * stack.inp, width, "adapters", f"{stack.name} lora_A", True, rank)
            self.B = ops.state(rank * stack.out, width, "adapters", f"{stack.name} lora_B", True, stack.out)

    def factors(self) -> tuple[Tensor, ...]:
        """What the sum will be made of: in the weight's dtype B and A of each matrix, or for one matrix their
        product."""
        if self.A is None or self.off:
            return ()
        ops, stack = self.ops, self.bare
        with ops.inside(stack.name):
            if stack.count == 1:
                update = ops.bmm(self.B, self.A, self.weight.count, "update")
                return (ops.cast(ops.unary(update, "scaled update"), self.weight.width),)
            b = ops.view(self.B, copy_back=True)
            a = ops.view(self.A)
            return ops.cast(b, self.weight.width), ops.cast(a, self.weight.width)

    def checked(self, factors: tuple[Tensor, ...]) -> None:
        """torch makes the sum once more when it is registered (`ParametrizationList`)."""
        if factors:
            with self.ops.unrecorded():
                self.folded(factors)

    def folded(self, factors: tuple[Tensor, ...]) -> Tensor:
        """The weight as the product sees it."""
        if not factors:
            return self.weight
        ops, weight = self.ops, self.weight
        with ops.inside(self.bare.name):
            if len(factors) == 1:
                return ops.add(weight, factors[0], "weight with its update")
            b, a = factors
            sizes = [(t.count, t.width) for t in (b, a)]

            def backward(saved, grads, needs):
                made = []
                for count, width in sizes:
                    plain = ops.new(count, width, "gradient")
                    made.append(ops.new(count, width, "scaled gradient"))
                    del plain
                return [None, *made]

            node = ops.node("weight with its update", [weight, b, a], [a, b], backward)
            return ops.new(weight.count, weight.width, "weight with its update", node=node)


def adapted_together(ops: Ops, x: Tensor, linears: list[OurLinear]) -> list[Tensor]:
    """unsloth's `LoRA_QKV` and `LoRA_W` (kernels/fast_lora.py) on 4-bit bases: one function over adapters that share an
    input. It keeps the input and, with dropout, what each adapter saw of it."""
    inp, width = linears[0].linear.inp, x.width
    rows, adapters = x.count // inp, [t for linear in linears for t in (linear.A, linear.B)]
    sizes = [(t.count, t.width) for t in adapters]
    made = [fused_forward(ops, x, linear) for linear in linears]

    def backward(saved, grads, needs):
        outs = [ops.new(*size, "adapter gradient") for size in sizes]
        dx = as_view(saved[0]) if len(linears) > 1 else None  # in the place of the input
        for linear in linears:
            weight = linear.dequantise(width)
            part = ops.new(rows * inp, width, "input gradient")
            dx = part if dx is None else dx
            del weight, part
            steps = [ops.new(rows * inp, 1, "where not dropped"), ops.new(rows * inp, width, "through the adapter"),
                     ops.new(rows * inp, width, "of what was kept")]
            del steps
        return [as_view(dx), *outs]

    node = ops.node("adapters", [x, *adapters], [], backward, late=True)
    ops.keep(node, [x, *adapters, *(seen for _, seen in made)])
    for slot, (y, _) in enumerate(made):
        y.node, y.slot = node, slot
    return [y for y, _ in made]


def fused_forward(ops: Ops, x: Tensor, linear: OurLinear) -> tuple[Tensor, Tensor]:
    """The output, and the input as the adapter saw it."""
    rows, seen = x.count // linear.linear.inp, x
    with ops.unrecorded(), ops.inside(linear.linear.name):
        weight = linear.dequantise(x.width)
        y = ops.new(rows * linear.linear.out, x.width, "output")
        del weight
        if linear.run.dropout:
            seen, mask = ops.new(x.count, x.width, "x after dropout"), ops.new(x.count, 1, "mask", also=True)
            del mask
        inner = ops.new(rows * linear.run.rank, x.width, "x A^T")
        update = ops.new(rows * linear.linear.out, x.width, "x A^T B^T")
        del inner, update
    return y, seen


LINEARS: dict[str, type[OurLinear]] = {"minilora": OurLinear, "peft": PeftLinear}
