"""Torch's operators on a ledger: each enters its result, and says what backward keeps and allocates.

What an operator keeps is from torch's derivatives.yaml; which kernels run is as on CUDA: fused attention, fused RMSNorm
in fp32, autocast's lists. An operator that is missing here is one more method.

In the shape comments a tensor is (count, width): how many elements, and bytes of each (2: 16 bits, 4: fp32).
"""

from typing import overload

from .ledger import Tensor, as_view
from .picking import Picking


class Ops(Picking):
    """A ledger on which a decoder, a loss or an optimizer is played."""

    def amp_width(self, x: Tensor) -> int:
        return 2 if self.autocast else x.width

    @overload
    def amp(self, x: Tensor) -> Tensor: ...
    @overload
    def amp(self, x: None) -> None: ...

    def amp(self, x: Tensor | None) -> Tensor | None:
        """Autocast's cast down before a matrix product; of trainable weights it is made once a step."""
        if x is None or not self.autocast or x.width == 2:
            return x
        if x.node is None or x.node.leaf is None:
            return self.cast(x, 2)
        if x not in self.casts:
            self.casts[x] = self.cast(x, 2)
        return self.casts[x]

    def unary(self, x: Tensor, what: str, saves: str = "", backward: tuple[str, ...] = ("gradient",), count: int = 0,
              ) -> Tensor:
        """An operator on one tensor.

        saves: "input", "output" or "". backward: the tensors that the derivative allocates, in turn, the last of them
        the gradient; () hands the gradient on as it is. count: of the result, if it is not x's.
        """
        size, width = x.count, x.width

        def back(saved, grads, needs):
            made = [self.new(size if name == "gradient" else count or size, width, name) for name in backward]
            return [made[-1] if made else grads[0]]

        node = self.node(what, [x], [x] if saves == "input" else [], back, late=saves == "output")
        out = self.new(count or size, width, what, node=node)
        if saves == "output":
            self.keep(node, [out])
        return out

    def add(self, a: Tensor, b: Tensor, what: str = "sum") -> Tensor:
        node = self.node(what, [a, b], [], lambda s, g, n: [g[0] if n[0] else None, g[0] if n[1] else None])
        return self.new(max(a.count, b.count), max(a.width, b.width), what, node=node)

    def mul(self, a: Tensor, b: Tensor, what: str = "product") -> Tensor:
        def back(saved, grads, needs):
            return [self.new(grads[0].count, max(grads[0].width, other.width), "gradient") if other else None
                    for other in saved]

        node = self.node(what, [a, b], [b if a.needs else None, a if b.needs else None], back)
        return self.new(max(a.count, b.count), max(a.width, b.width), what, node=node)

    def cat(self, a: Tensor, b: Tensor) -> Tensor:
        """Two tensors beside each other; backward hands out views."""
        left, right = a.count, b.count

        def back(saved, grads, needs):
            return [Tensor(left, grads[0].width, grads[0].storage), Tensor(right, grads[0].width, grads[0].storage)]

        node = self.node("cat", [a, b], [], back)
        return self.new(left + right, a.width, "cat", node=node)

    def split(self, x: Tensor, sizes: list[int]) -> list[Tensor]:
        """Views of x's parts; backward puts their gradients together."""
        count, width = x.count, x.width
        node = self.node("split", [x], [], lambda s, g, n: [self.new(count, width, "gradient")])
        return [Tensor(size, width, x.storage, node, i) for i, size in enumerate(sizes)]

    def slice(self, x: Tensor, size: int) -> Tensor:
        """A view of a part of x; backward makes a gradient of x's size."""
        count, width = x.count, x.width
        node = self.node("slice", [x], [], lambda s, g, n: [self.new(count, width, "gradient of a slice")])
        return Tensor(size, width, x.storage, node)

    def copy(self, x: Tensor, back: bool = False) -> Tensor:
        """x laid out anew; with `back` its gradient too."""
        return self.unary(x, "copy", backward=("gradient",) if back else ())

    def linear(self, x: Tensor, w: Tensor, out: int, bias: Tensor | None = None, what: str = "output",
               flat: bool = False) -> Tensor:
        """x (N in, .) -> (N out, .) by w (out in, .). `flat`: x has two dimensions, so that no view is needed."""
        inp = w.count // out
        rows = x.count // inp
        given = bias, w, x  # whoever calls a kernel holds what it gives until the result is there
        bias, w, x = self.amp(given[0]), self.amp(given[1]), self.amp(given[2])
        width, biased = x.width, bias is not None

        def back(saved, grads, needs):
            dw = self.new(out * inp, width, "weight gradient") if needs[1] and not biased else None
            dx = self.new(rows * inp, width, "input gradient") if needs[0] else None
            dx = as_view(dx) if dx and not flat else dx
            if needs[1] and biased:  # with a bias it comes second
                dw = self.new(out * inp, width, "weight gradient")
            db = self.new(out, width, "bias gradient") if needs[2] else None
            dw = dw and as_view(dw)
            return [dx, dw, db]

        node = self.node("linear", [x, w, bias], [w if x.needs else None, x if w.needs else None], back)
        return self.new(rows * out, width, what, node=node)

    def bmm(self, a: Tensor, b: Tensor, count: int, what: str) -> Tensor:
        """Batched matrix product; keeps both."""
        a, b = self.amp(a), self.amp(b)
        sizes = [(t.count, t.width) for t in (a, b)]
        node = self.node(what, [a, b], [a if b.needs else None, b if a.needs else None], lambda s, g, n: [
            self.new(*size, "gradient") if need else None for size, need in zip(sizes[::-1], n[::-1])][::-1])
        return self.new(count, a.width, what, node=node)

    def dropout(self, x: Tensor, share: float) -> Tensor:
        """Keeps a mask of one byte an element."""
        if not share:
            return x
        count, width = x.count, x.width
        node = self.node("dropout", [x], [], lambda s, g, n: [self.new(count, width, "gradient")], late=True)
        y, mask = self.new(count, width, "after dropout", node=node), self.new(count, 1, "dropout mask", also=True)
        self.keep(node, [mask])
        return y

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Keeps x, and mean and 1 / std of every row in fp32, frozen or not. Autocast takes it in fp32."""
        if self.autocast:
            x, weight, bias = self.cast(x, 4), self.cast(weight, 4), self.cast(bias, 4)
        count, width, size = x.count, x.width, weight.count

        def back(saved, grads, needs):
            return [self.new(n, width, "gradient", also=i > 0) if need else None
                    for i, (n, need) in enumerate(zip((count, size, size), needs))]

        node = self.node("norm", [x, weight, bias], [x, weight, bias], back)
        y = self.new(count, width, "output", node=node)
        stats = [self.new(count // size, 4, name, also=True) for name in ("mean", "1 / std")]
        self.keep(node, stats)
        return y

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """One kernel; keeps x, the weight, and 1 / rms of every row in fp32."""
        count, width, size = x.count, x.width, weight.count

        def back(saved, grads, needs):
            dx = self.new(count, width, "input gradient") if needs[0] else None
            return [dx, self.new(size, width, "weight gradient") if needs[1] else None]

        node = self.node("norm", [x, weight], [], back, late=True)
        rms = self.new(count // size, 4, "1 / rms")
        y = self.new(count, width, "output", node=node)
        self.keep(node, [x, weight, rms])
        return y

    def embedding(self, ids: Tensor, table: Tensor, width: int) -> Tensor:
        """ids (N, 8) -> (N width, .)"""
        count, size = table.count, table.width
        node = self.node("embedding", [table], [ids], lambda s, g, n: [self.new(count, size, "weight gradient")])
        return self.new(ids.count * width, size, "output", node=node)

    def fused_attention(self, q: Tensor, k: Tensor, v: Tensor, stats: int, mask: tuple[int, int] | None = None,
                        out: int = 0) -> Tensor:
        """One kernel; keeps q, k, v, the result, the log-sum-exp of every row (`stats` of them, fp32), a seed, and of
        a mask over (batch, tokens, tokens), if there is one, what is added to the scores. out: elements of the result,
        if they are not as many as q's."""
        v, k, q = self.amp(v), self.amp(k), self.amp(q)
        sizes = [(t.count, t.width) for t in (q, k, v)]
        bias = self.added_mask(*mask, q.width) if mask else None

        def back(saved, grads, needs):
            return [self.new(*size, f"gradient of {'qkv'[i]}", also=i > 0) for i, size in enumerate(sizes)]

        node = self.node("attention", [q, k, v], [q, k, v, bias], back)
        y = self.new(out or q.count, q.width, "output", node=node)
        rest = [self.new(*size, also=True) for size in ((stats, 4, "log-sum-exp"), (2, 8, "seed"), (1, 8, "seed"))]
        self.keep(node, [y, *rest])
        return y

    def added_mask(self, batch: int, seq: int, width: int) -> Tensor:
        """A mask of truth values as what is added to the scores: 0 and -inf, rows of a multiple of 8 (torch's
        attention.cpp, `convert_boolean_attn_mask` and `pad_bias`)."""
        numbers = [self.new(1, width, "0 and -inf") for _ in range(2)]
        bias = self.new(batch * seq * seq, width, "mask to add")
        del numbers
        return self.new(batch * seq * (seq + -seq % 8), width, "mask to add, padded") if seq % 8 else bias

    def flash_attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int, seq: int, head_dim: int) -> Tensor:
        """The package flash-attn (2.7, flash_attn_interface.py and csrc/flash_attn/flash_api.cpp): what torch's own
        kernel takes and gives back unseen, this one takes from torch's allocator. `heads`: of all rows."""
        q, k, v = self.amp(q), self.amp(k), self.amp(v)
        sizes = [(t.count, t.width) for t in (q, k, v)]
        rows = -(-seq // 128) * 128

        def back(saved, grads, needs):
            scratch = [self.new(heads * rows, 4, "row sums"), self.new(heads * rows * head_dim, 4, "dq in fp32")]
            if sizes[0] != sizes[1]:
                scratch += [self.new(*sizes[0], f"d{name} for every query head") for name in "kv"]
            return [self.new(*size, f"gradient of {'qkv'[i]}") for i, size in enumerate(sizes)]

        node = self.node("attention", [q, k, v], [q, k, v], back, late=True)
        out = self.new(q.count, q.width, "output", node=node)
        rest = [self.new(*size, also=True) for size in ((heads * seq, 4, "log-sum-exp"), (2, 8, "seed"))]
        self.keep(node, [q, k, v, out, *rest])
        return out

    def fast_rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """unsloth's kernel: it keeps x as it is, writes its gradient over the one that comes, and gives the weight
        none."""
        count, width, size = x.count, x.width, weight.count
        node = self.node("norm", [x], [], lambda s, g, n: [as_view(g[0])], late=True)
        y = self.new(count, width, "output", node=node)
        self.keep(node, [x, weight, self.new(count // size, 4, "1 / rms")])
        return y

    def plain_attention(self, q: Tensor, k: Tensor, v: Tensor, batch: int, seq: int, heads: int) -> Tensor:
        """torch's fallback where no fused kernel will do (attention.cpp, `_scaled_dot_product_attention_math`): all
        scores are in memory, in fp32 whatever q is."""
        given = q, k, v  # held by the caller
        narrow = tuple(self.amp(t) for t in given)
        before, self.autocast = self.autocast, False  # it is off inside the operator
        out, scores, width = q.count, batch * heads * seq * seq, narrow[0].width
        wide = tuple(self.cast(t, 4) for t in narrow)
        q = self.unary(wide[0], "scaled q")
        if seq > 1:
            ones = self.new(seq * seq, 1, "ones")
            lower = self.new(seq * seq, 1, "causal mask")
            del ones
            numbers = [self.new(1, 4, "0 and -inf") for _ in range(2)]
            mask = self.new(seq * seq, 4, "causal mask")
            del lower, numbers
        k, v = (self.unary(t, "repeated", count=out) if t.count != out else t for t in wide[1:])
        scaled = self.unary(k, "scaled k")
        w = self.bmm(self.copy(q), scaled, scores, "scores")
        del scaled
        w = self.unary(w, "softmax", "output")
        y = self.bmm(w, v, out, "output")
        if width != 4:
            y = self.cast(y, width), self.new(scores, width, "scores")
            y = y[0]
        self.autocast = before
        return y

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss: log-softmax (kept), then the mean of the targets' entries."""
        log_p = self.unary(logits, "log-softmax", "output", ("gradient of the logits",))
        if self.autocast:
            log_p = self.cast(log_p, 4)
        count, width = log_p.count, log_p.width

        def back(saved, grads, needs):
            return [self.new(count, width, "gradient of the log-softmax")]

        node = self.node("nll", [log_p], [log_p, targets], back, late=True)
        loss = self.new(1, width, "loss", node=node)
        total = self.new(1, width, "number of targets", also=True)
        self.keep(node, [log_p, targets, total])
        return loss
