"""A tensor library that knows only sizes: a training step is played on it, and each storage's birth and death noted.

It is torch without numbers: an operator allocates its result, keeps for backward what its derivative needs, and the
engine hands gradients back along the graph. CPython itself frees a storage when nobody holds it, as in torch, so
a decoder written here (`blocks.py`) holds what the same lines hold in torch. What each operator keeps is from torch's
derivatives.yaml; which kernels run is as on CUDA: fused attention, fused RMSNorm in fp32, autocast's lists.

In the shape comments a tensor is (count, width): how many elements, and bytes of each (2: 16 bits, 4: fp32).
"""

import heapq
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

WIDTH = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(eq=False, slots=True)
class Item:
    """One storage. It is there at every moment t with born <= t < freed."""

    part: str
    name: str
    bytes: int
    born: int
    freed: int | None = None


class Storage:
    """What a tensor's bytes are held by: freed when the last holder lets go."""

    __slots__ = ("tape", "item")

    def __init__(self, tape: "Tape", item: Item):
        self.tape, self.item = tape, item

    def __del__(self):
        self.item.freed = len(self.tape.moments)


class Tensor:
    """`count` elements of `width` bytes in a storage, made by a node of the graph (or by none)."""

    __slots__ = ("count", "width", "storage", "node", "slot", "is_view", "grad")

    def __init__(self, count: int, width: int, storage: Storage, node: "Node | None" = None, slot: int = 0,
                 is_view: bool = True):
        self.count, self.width, self.storage, self.node, self.slot = count, width, storage, node, slot
        self.is_view, self.grad = is_view, None  # grad: of a leaf

    @property
    def needs(self) -> bool:
        return self.node is not None


class Node:
    """One step of backward.

    place: phase, layer and module that made it. leaf: of a leaf's node, the tensor whose gradient it takes.
    edges: per input the (node, slot) that made it, its count and width; None where no gradient is asked for.
    """

    __slots__ = ("order", "place", "name", "edges", "saved", "backward", "leaf", "copies")

    def __init__(self, order: float, place: tuple, name: str, edges: list, backward: Callable | None):
        self.order, self.place, self.name, self.edges, self.backward = order, place, name, edges, backward
        self.saved: list | None = []
        self.leaf: Tensor | None = None
        self.copies = False  # a leaf whose gradient comes transposed, so that it must be laid out anew


class Frame:
    """A checkpointed block: its input, and what the run again of it kept."""

    def __init__(self, run: Callable, x: Tensor, place: tuple):
        self.run, self.x, self.place, self.kept, self.count = run, x, place, None, 0

    def leave(self) -> None:
        """Send the input to the host."""
        self.away, self.x = (self.x.count, self.x.width, self.x.node, self.x.slot), None


class Kept:
    """In the place of a tensor that a checkpointed block did not keep."""

    def __init__(self, frame: Frame):
        self.frame, self.index = frame, frame.count
        frame.count += 1


def held_elsewhere(t: Tensor) -> bool:
    """Whether anyone but the buffer it lies in holds this gradient's storage: another tensor, or what it is a view of.

    torch then adds another gradient to it out of place (input_buffer.cpp); three references and two are those of here.
    """
    return t.is_view or sys.getrefcount(t) > 3 or sys.getrefcount(t.storage) > 2


def as_view(t: Tensor) -> Tensor:
    return Tensor(t.count, t.width, t.storage)


class Enough(Exception):
    """Ends the run again of a block: all that backward needs is there (torch's early stop)."""


class Tape:
    """Plays operators and notes storages.

    Attributes:
        items: every storage there was. moments: one (phase, layer, what) per operator that allocated.
        leaves: what trains, with its number of rows. layers: the layer of each.
        align: storages are rounded up to a multiple of it, as CUDA's allocator does.
        shares: part -> of how many cards this one keeps its share of the part; 0: it keeps nothing of it.
        offload: checkpointed blocks' inputs wait on the host.
    """

    def __init__(self, align: int = 512, autocast: bool = False, shares: dict[str, int] | None = None,
                 offload: bool = False):
        self.items: list[Item] = []
        self.moments: list[tuple[str, int | None, str]] = [("start", None, "")]
        self.align, self.autocast, self.shares, self.offload = align, autocast, shares or {}, offload
        self.place: tuple[str, int | None] = ("start", None)  # phase and layer
        self.module, self.part, self.order = "", "temporaries", 0
        self.recording = True  # inside a no_grad, or an operator's own code, nothing is recorded
        self.frame: Frame | None = None
        self.replaying = False
        self.casts: dict[Tensor, Tensor] = {}
        self.leaves: list[tuple[Tensor, int]] = []
        self.layers: dict[Tensor, int | None] = {}

    # Storages

    def new(self, count: int, width: int, what: str, also: bool = False, node: Node | None = None, slot: int = 0,
            part: str = "") -> Tensor:
        """A tensor of its own. `also`: by the same operator as the last one, so no moment lies between them."""
        if not also:
            self.moments.append((*self.place, f"{self.module} {what}".strip()))
        part = part or self.part
        share = self.shares.get(part, 1)
        size = -(-count // share) * width if share else 0
        size = -(-size // self.align) * self.align
        item = Item(part, f"{self.module} {what}".strip(), size, len(self.moments) - 1)
        self.items.append(item)
        return Tensor(count, width, Storage(self, item), node, slot, is_view=False)

    def state(self, count: int, width: int, part: str, name: str, trains: bool = False, rows: int = 0) -> Tensor:
        """What is there before the step: a weight (of so many rows, 0 for a vector), a buffer, an optimizer's state."""
        module, self.module = self.module, ""
        t = self.new(count, width, name, also=True, part=part)
        self.module = module
        if trains:
            self.require_grad(t)
            t.node.name = name
            self.leaves.append((t, rows))
            self.layers[t] = self.place[1]
        return t

    def four_bit(self, count: int, name: str, double: bool, levels: bool) -> list[Tensor]:
        """A weight as `quant.Linear4bit` keeps it: codes, absmax of each block of 64, and their scales and mean; with
        `levels` as bitsandbytes does: with a table of its own for the codes, and for the codes of absmax."""
        blocks = -(-count // 64)
        sizes = [(blocks * 32, 1), (blocks, 1 if double else 4), *[(-(-blocks // 256), 4), (1, 4)] * double]
        sizes += [(16, 4), *[(256, 4)] * double] * levels
        return [self.state(*size, "frozen weights", f"{name} in 4 bits") for size in sizes]

    def weight(self, count: int, width: int, name: str, trains: bool, rows: int = 0) -> Tensor:
        return self.state(count, width, "trainable weights" if trains else "frozen weights", name, trains, rows)

    def require_grad(self, t: Tensor) -> None:
        """Make t a leaf that asks for a gradient."""
        t.node = Node(float("inf"), ("", None), "input of the first layer", [], None)
        t.node.leaf = t

    # The graph

    def node(self, name: str, inputs: Iterable[Tensor | None], saved: Iterable[Tensor | None], backward: Callable,
             late: bool = False) -> Node | None:
        """The node of an operator, None if no input asks for a gradient.

        `backward(saved, grads, needs)` gives one gradient or None per input. With `late`, `keep` follows the result.
        """
        if not self.recording or not any(t is not None and t.needs for t in inputs):
            return None
        self.order += 1
        edges = [((t.node, t.slot), t.count, t.width) if t is not None and t.needs else None for t in inputs]
        node = Node(self.order, (*self.place, self.module), name, edges, backward)
        if not late:
            self.keep(node, saved)
        return node

    def keep(self, node: Node | None, saved: Iterable[Tensor | None]) -> None:
        """Hold tensors for backward; in a checkpointed block only remember that they were asked for."""
        if node is None:
            return
        for t in saved:
            if t is None:
                node.saved.append(None)
            elif self.replaying:
                self.frame.kept.append(t)
                if len(self.frame.kept) == self.frame.count:
                    raise Enough
            elif self.frame:
                node.saved.append(Kept(self.frame))
            else:
                if t.storage.item.part == "temporaries":
                    t.storage.item.part = "activations"
                node.saved.append(t)

    def checkpoint(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run a block, keeping its input alone; backward runs it again (torch's non-reentrant checkpoint)."""
        x.storage.item.part, x.storage.item.name = "activations", "input of a checkpointed layer"
        self.frame = Frame(block, x, self.place)
        y = block(x)
        if self.offload:
            self.frame.leave()
        self.frame = None
        return y

    def recompute(self, frame: Frame) -> None:
        before = self.place, self.module, self.casts
        self.place, self.casts, self.part = ("recompute", frame.place[1]), {}, "recomputed activations"
        self.frame, self.replaying, frame.kept = frame, True, []
        x = frame.x
        if x is None:
            count, width, node, slot = frame.away
            x = self.new(count, width, "input, back from the host", node=node, slot=slot)
        try:
            frame.run(x)
        except Enough:
            pass
        self.place, self.module, self.casts = before
        self.frame, self.replaying, self.part = None, False, "temporaries"

    def backward(self, loss: Tensor) -> None:
        """Run the graph from the scalar `loss` back; leaves get their gradients."""
        waiting, seen, stack = {}, {loss.node}, [loss.node]  # node -> how many gradients are still to come
        while stack:
            for edge in stack.pop().edges:
                if edge:
                    child = edge[0][0]
                    waiting[child] = waiting.get(child, 0) + 1
                    if child not in seen:
                        seen.add(child)
                        stack.append(child)
        self.place, self.module = ("backward", None), "loss"
        root = self.new(1, loss.width, "gradient")
        buffers, ready, ties = {loss.node: {0: root}}, [(-loss.node.order, 0, loss.node)], 0
        while ready:
            node = heapq.heappop(ready)[2]
            if node.place[0]:
                self.place, self.module = ("backward", node.place[1]), node.place[2]
            outs = self.apply(node, buffers.pop(node, {}))
            for i, edge in enumerate(node.edges):
                if edge is None:
                    continue
                (child, slot), grad, outs[i] = edge[0], outs[i], None
                if grad is not None:
                    here = buffers.setdefault(child, {})
                    if slot not in here:
                        here[slot] = grad
                    elif held_elsewhere(here[slot]):
                        here[slot] = self.new(grad.count, grad.width, "sum of gradients")
                    grad = here = None
                waiting[child] -= 1
                if not waiting[child]:
                    ties += 1
                    heapq.heappush(ready, (-child.order, ties, child))

    def apply(self, node: Node, grads: dict[int, Tensor]) -> list[Tensor | None]:
        """The gradients of a node's inputs, in the inputs' sizes; what the node kept is let go."""
        if node.leaf is not None:
            self.accumulate(node, grads[0])
            return []
        saved = []
        for t in node.saved:
            if isinstance(t, Kept):
                if t.frame.kept is None:
                    self.recompute(t.frame)
                saved.append(t.frame.kept[t.index])
                t.frame.kept[t.index] = None
            else:
                saved.append(t)
        t = None
        needs = [edge is not None for edge in node.edges]
        outs = list(node.backward(saved, grads, needs))
        del saved
        for i, edge in enumerate(node.edges):
            outs[i] = self.fitted(outs[i], edge[1], edge[2]) if edge and outs[i] is not None else None
        node.saved, node.backward = None, None
        return outs

    def accumulate(self, node: Node, grad: Tensor) -> None:
        """Make `grad` the leaf's gradient, or add it to the one that is there, in place."""
        if node.leaf.grad is not None:
            return
        if node.copies or self.shares.get("gradients", 1) > 1:
            grad = self.new(grad.count, grad.width, "", part="gradients")
        grad.storage.item.part, grad.storage.item.name = "gradients", node.name
        node.leaf.grad = grad

    def fitted(self, grad: Tensor, count: int, width: int) -> Tensor:
        """A gradient in its input's size: summed over what was broadcast, cast to its width."""
        if grad.count != count:
            grad = self.new(count, grad.width, "summed gradient")
        return grad if grad.width == width else self.new(count, width, "cast gradient")

    # Operators. Each allocates its result and says what backward keeps and allocates.

    def cast(self, x: Tensor, width: int) -> Tensor:
        if x.width == width:
            return x
        size = x.count, x.width
        node = self.node("cast", [x], [], lambda s, g, n: [self.new(*size, "cast gradient")])
        return self.new(x.count, width, "cast", node=node)

    def amp_width(self, x: Tensor) -> int:
        return 2 if self.autocast else x.width

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

    def view(self, x: Tensor, copy_back: bool = False) -> Tensor:
        """x in another shape; a node of its own, which may have to lay the gradient out anew."""
        count, width = x.count, x.width
        node = self.node("view", [x], [], lambda s, g, n: [
            self.new(count, width, "gradient, laid out") if copy_back else as_view(g[0])])
        return Tensor(x.count, x.width, x.storage, node)

    def linear(self, x: Tensor, w: Tensor, out: int, bias: Tensor | None = None, what: str = "output",
               flat: bool = False) -> Tensor:
        """x (N in, .) -> (N out, .) by w (out in, .). `flat`: x has two dimensions, so that no view is needed."""
        inp = w.count // out
        rows = x.count // inp
        given = bias, w, x  # whoever calls a kernel holds what it gives until the result is there
        bias, w, x = (self.amp(t) for t in given)
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

    def fused_attention(self, q: Tensor, k: Tensor, v: Tensor, stats: int) -> Tensor:
        """One kernel; keeps q, k, v, the result, the log-sum-exp of every row (`stats` of them, fp32), a seed."""
        v, k, q = self.amp(v), self.amp(k), self.amp(q)
        sizes = [(t.count, t.width) for t in (q, k, v)]

        def back(saved, grads, needs):
            return [self.new(*size, f"gradient of {'qkv'[i]}", also=i > 0) for i, size in enumerate(sizes)]

        node = self.node("attention", [q, k, v], [q, k, v], back)
        out = self.new(q.count, q.width, "output", node=node)
        rest = [self.new(*size, also=True) for size in ((stats, 4, "log-sum-exp"), (2, 8, "seed"), (1, 8, "seed"))]
        self.keep(node, [out, *rest])
        return out

    def plain_attention(self, q: Tensor, k: Tensor, v: Tensor, batch: int, seq: int, heads: int, width: int) -> Tensor:
        """torch's fallback, with all scores in memory: for grouped heads in fp32, where CUDA has no fused kernel."""
        out, scores = q.count, batch * heads * seq * seq
        q = self.unary(q, "scaled q")
        if seq > 1:
            ones = self.new(seq * seq, 1, "ones")
            lower = self.new(seq * seq, 1, "causal mask")
            del ones
            numbers = [self.new(1, width, "0 and -inf") for _ in range(2)]
            mask = self.new(seq * seq, width, "causal mask")
            del lower, numbers
        k, v = (self.unary(t, "repeated", count=out) for t in (k, v))
        scaled = self.unary(k, "scaled k")
        w = self.bmm(self.copy(q), scaled, scores, "scores")
        del scaled
        w = self.unary(w, "softmax", "output")
        return self.bmm(w, v, out, "output")

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss: log-softmax (kept), then the mean of the targets' entries."""
        vocab = logits.count // targets.count
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

    # Helpers

    @contextmanager
    def inside(self, module: str) -> Iterator[None]:
        """Name what is made in here."""
        before, self.module = self.module, module
        yield
        self.module = before

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """An operator's own code: nothing of it enters the graph."""
        before, self.recording = self.recording, False
        yield
        self.recording = before
