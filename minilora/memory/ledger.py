"""The ledger of a training step played on sizes: each storage's birth and death, and the graph that backward follows.

It is torch without numbers: an operator (`ops.py`) enters the storage of its result and keeps for backward what its
derivative needs, and the engine hands gradients back along the graph. CPython itself frees a storage when nobody holds
it, as in torch, so a decoder written here (`decoders/`) holds what the same lines hold in torch. So a variable that is
still in scope counts, and a `del` is meant.

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

    __slots__ = ("item", "ledger")

    def __init__(self, ledger: "Ledger", item: Item):
        self.ledger, self.item = ledger, item

    def __del__(self):
        self.item.freed = len(self.ledger.moments)


class Tensor:
    """`count` elements of `width` bytes in a storage, made by a node of the graph (or by none)."""

    __slots__ = ("count", "grad", "is_view", "node", "slot", "storage", "width")

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

    __slots__ = ("backward", "copies", "edges", "leaf", "name", "order", "place", "saved")

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


class Ledger:
    """Notes storages, and runs the graph back. `ops.Ops` adds the operators.

    Attributes:
        items: every storage there was. moments: one (phase, layer, what) per operator that allocated.
        leaves: what trains, with its number of rows. layers: the layer of each. stacks: of those that are several
            matrices, how many.
        align: storages are rounded up to a multiple of it, as CUDA's allocator does.
        shares: part -> of how many cards this one keeps its share of the part; 0: it keeps nothing of it.
        stored: part -> bytes of an element as it is kept, where that is not as it is computed with.
        offload: checkpointed blocks' inputs wait on the host.
        reentrant: a checkpointed block is one node of the graph, with a backward of its own inside (torch's older
            checkpoint, ``use_reentrant=True``); else only what its nodes keep is made again.
        gathering: what fetches a layer's shares from the other cards while it computes (`fsdp.Gathering`), if any does.
    """

    def __init__(self, align: int = 512, autocast: bool = False, shares: dict[str, int] | None = None,
                 offload: bool = False, reentrant: bool = False, stored: dict[str, int] | None = None):
        self.items: list[Item] = []
        self.moments: list[tuple[str, int | None, str]] = [("start", None, "")]
        self.align, self.autocast, self.shares, self.offload = align, autocast, shares or {}, offload
        self.reentrant, self.stored, self.gathering = reentrant, stored or {}, None
        self.place: tuple[str, int | None] = ("start", None)  # phase and layer
        self.module, self.part, self.order = "", "temporaries", 0
        self.recording = True  # inside a no_grad, or an operator's own code, nothing is recorded
        self.frame: Frame | None = None
        self.replaying = False
        self.casts: dict[Tensor, Tensor] = {}
        self.leaves: list[tuple[Tensor, int]] = []
        self.layers: dict[Tensor, int | None] = {}
        self.stacks: dict[Tensor, int] = {}

    # Storages

    def new(self, count: int, width: int, what: str, also: bool = False, node: Node | None = None, slot: int = 0,
            part: str = "") -> Tensor:
        """A tensor of its own. `also`: by the same operator as the last one, so no moment lies between them."""
        name = f"{self.module} {what}" if self.module and what else self.module or what
        if not also:
            self.moments.append((*self.place, name))
        part = part or self.part
        share = self.shares.get(part, 1)
        size = -(-count // share) * self.stored.get(part, width) if share else 0
        size = -(-size // self.align) * self.align
        item = Item(part, name, size, len(self.moments) - 1)
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

    def four_bit(self, count: int, name: str, double: bool, levels: bool, rest: str = "frozen weights") -> list[Tensor]:
        """A weight as `quant.Linear4bit` keeps it: codes, absmax of each block of 64, and their scales and mean; with
        `levels` as bitsandbytes does: with a table of its own for the codes, and for the codes of absmax. `rest`: the
        part of all but the codes."""
        blocks = -(-count // 64)
        sizes = [(blocks * 32, 1), (blocks, 1 if double else 4), *[(-(-blocks // 256), 4), (1, 4)] * double]
        sizes += [(16, 4), *[(256, 4)] * double] * levels
        return [self.state(*size, rest if i else "frozen weights", f"{name} in 4 bits") for i, size in enumerate(sizes)]

    def gptq(self, out: int, inp: int, name: str, group: int, rest: str = "frozen weights") -> list[Tensor]:
        """A weight as GPTQ's `QuantLinear` keeps it: eight codes an int32, a zero point and a 16-bit scale of each
        group of a column, and the group of each row."""
        groups = -(-inp // (group or inp))
        sizes = [(out * inp // 8, 4, "frozen weights"), (groups * out // 8, 4, "frozen weights"),
                 (groups * out, 2, rest), (inp, 4, rest)]
        return [self.state(count, width, part, f"{name} in 4 bits") for count, width, part in sizes]

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
        if self.reentrant:
            return self.checkpoint_as_one_node(block, x)
        self.frame = Frame(block, x, self.place)
        y = block(x)
        if self.offload:
            self.frame.leave()
        self.frame = None
        return y

    def checkpoint_as_one_node(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`CheckpointFunction`: no graph in forward; in backward the whole block runs again, then a backward of its own
        from its output, during which that output and the gradient that came are held."""
        layer, gathering = self.place[1], self.gathering

        def backward(saved, grads, needs):
            before = self.place, self.module, self.casts
            self.place, self.casts, self.part = ("recompute", layer), {}, "recomputed activations"
            leaf = as_view(saved[0])
            leaf.node = Node(float("inf"), ("", None), "input of a block", [], None)
            leaf.node.leaf = leaf
            if gathering:
                gathering.enter(layer)
            y = block(leaf)
            self.casts, self.part = {}, "temporaries"
            if gathering:
                gathering.leave(layer)
                gathering.enter(layer)
            self.run_back(y.node, grads[0])
            dx, leaf.grad, leaf.node = leaf.grad, None, None
            if gathering:
                gathering.after_backward(layer, leaf, dx)
            self.place, self.module, self.casts = before
            return [dx]

        node = self.node("checkpoint", [x], [x], backward)
        if gathering:
            gathering.enter(layer)
        with self.unrecorded():
            y = block(x)
        if gathering:
            gathering.leave(layer)
        y.node = node
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
        self.place, self.module = ("backward", None), "loss"
        self.run_back(loss.node, self.new(1, loss.width, "gradient"))

    def run_back(self, first: Node, root: Tensor) -> None:
        """The engine: from a node and the gradient of what it made."""
        waiting, seen, stack = {}, {first}, [first]  # node -> how many gradients are still to come
        while stack:
            for edge in stack.pop().edges:
                if edge:
                    child = edge[0][0]
                    waiting[child] = waiting.get(child, 0) + 1
                    if child not in seen:
                        seen.add(child)
                        stack.append(child)
        buffers, ready, ties = {first: {0: root}}, [(-first.order, 0, first)], 0
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
        if node.name == "input of a block" or self.gathering and self.gathering.collects(node.leaf, grad):
            node.leaf.grad = grad
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

    # Where we are

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
