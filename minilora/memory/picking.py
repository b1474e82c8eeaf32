"""Operators on a ledger that pick, place and turn, as layers of experts and complex rotary positions use them.

What holds in `ops` holds here: which builds on this.
"""

from .ledger import Ledger, Tensor, as_view


class Picking(Ledger):
    """The first half of `ops.Ops`."""

    def cast(self, x: Tensor, width: int) -> Tensor:
        if x.width == width:
            return x
        size = x.count, x.width
        node = self.node("cast", [x], [], lambda s, g, n: [self.new(*size, "cast gradient")])
        return self.new(x.count, width, "cast", node=node)

    def view(self, x: Tensor, copy_back: bool = False) -> Tensor:
        """x in another shape; a node of its own, which may have to lay the gradient out anew."""
        count, width = x.count, x.width
        node = self.node("view", [x], [], lambda s, g, n: [
            self.new(count, width, "gradient, laid out") if copy_back else as_view(g[0])])
        return Tensor(x.count, x.width, x.storage, node)

    def index(self, x: Tensor, places: Tensor, count: int, what: str = "rows") -> Tensor:
        """Rows of x by their numbers, of `count` elements in all; backward adds into a tensor of zeros."""
        size = x.count, x.width
        node = self.node(what, [x], [places], lambda s, g, n: [self.new(*size, "gradient of all rows")])
        return self.new(count, x.width, what, node=node)

    def topk(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The largest of each row and their places, `count` of each in all."""
        size = x.count, x.width
        node = self.node("top", [x], [], lambda s, g, n: [self.new(*size, "gradient")], late=True)
        values, places = self.new(count, x.width, "top", node=node), self.new(count, 8, "places of the top", also=True)
        self.keep(node, [places])
        return values, places

    def divide(self, x: Tensor, by: Tensor) -> Tensor:
        """By what asks for no gradient."""
        size = x.count, max(x.width, by.width)
        node = self.node("quotient", [x], [by], lambda s, g, n: [self.new(*size, "gradient")])
        return self.new(*size, "quotient", node=node)

    def divide_in_place(self, x: Tensor, by: Tensor) -> Tensor:
        """x /= by, as many rows as `by` has; keeps what x was."""
        before = self.new(x.count, x.width, "before the division") if by.needs else None
        count, width = x.count, x.width

        def back(saved, grads, needs):
            dx = self.new(count, width, "gradient") if needs[0] else None
            parts = [self.new(count, width, f"part {i} of the divisor's gradient") for i in range(3)]
            return [dx, parts[-1]]

        node = self.node("quotient", [x, by], [by, before], back)
        return Tensor(count, width, x.storage, node)

    def gather(self, x: Tensor, places: Tensor) -> Tensor:
        """Of each row of x what stands at its places; backward adds into a tensor of zeros."""
        return self.index(x, places, places.count, "gathered")

    def scatter(self, x: Tensor, places: Tensor, count: int) -> Tensor:
        """What is at these places of a larger tensor, which has the same number everywhere else."""
        size, width = x.count, x.width
        node = self.node("scattered", [x], [places], lambda s, g, n: [self.new(size, width, "gradient")])
        return self.new(count, width, "scattered", node=node)

    def masked(self, x: Tensor) -> Tensor:
        """Filled where a mask says so; it is kept."""
        count, width = x.count, x.width
        mask = self.new(count, 1, "mask")
        node = self.node("masked", [x], [mask], lambda s, g, n: [self.new(count, width, "gradient")])
        return self.new(count, width, "masked", node=node)

    def turn_complex(self, q: Tensor, k: Tensor, table: Tensor, heads: tuple[int, int]) -> list[Tensor]:
        """Pairs of q and of k as complex numbers in fp32, each times one of the table's; `heads`: of q, and of k."""
        width, wide = q.width, [self.cast(t, 4) for t in (q, k)]
        return [self.cast(self.view(self.times(t, table), copy_back=several > 1), width)
                for t, several in zip(wide, heads)]

    def times(self, x: Tensor, table: Tensor) -> Tensor:
        """x times complex numbers that do not train; backward conjugates them first."""
        count, size = x.count, (table.count, table.width)

        def back(saved, grads, needs):
            conjugate = self.new(*size, "conjugate")
            grad = self.new(count, 4, "gradient")
            del conjugate
            return [grad]

        node = self.node("turned", [x], [table], back)
        return self.new(count, 4, "turned", node=node)

    def copy_into(self, whole: Tensor, part: Tensor) -> Tensor:
        """A part of `whole` overwritten in place (torch's `CopySlices`)."""
        count, width, size = whole.count, whole.width, part.count

        def back(saved, grads, needs):
            rest = self.new(count, width, "gradient of what was there")
            dpart = self.new(size, width, "gradient of what was copied")
            zeros = self.new(size, width, "zeros in its place") if needs[0] else None
            del zeros
            return [rest if needs[0] else None, dpart if needs[1] else None]

        node = self.node("copied", [whole, part], [], back)
        return Tensor(count, width, whole.storage, node)

    def clamp(self, x: Tensor, sides: int, what: str) -> Tensor:
        """Kept within bounds on one side or both; backward makes a mask of each."""
        count, width = x.count, x.width

        def back(saved, grads, needs):
            masks = [self.new(1, width, "0"), *(self.new(count, 1, "where within") for _ in range(sides))]
            del masks[2:]
            return [self.new(count, width, "gradient")]

        node = self.node(what, [x], [x], back)
        return self.new(count, width, what, node=node)

    def expand(self, x: Tensor, count: int) -> Tensor:
        """A view in which x is there several times; backward sums over them."""
        return Tensor(count, x.width, x.storage, self.node("expand", [x], [], lambda s, g, n: [g[0]]))

    def sum(self, x: Tensor, count: int, what: str) -> Tensor:
        """Over what is there several times, in fp32 under autocast; its gradient is a view."""
        size, width = x.count, 4 if self.autocast else x.width
        node = self.node(what, [x], [], lambda s, g, n: [Tensor(size, g[0].width, g[0].storage)])
        return self.new(count, width, what, node=node)

    def add_in_place(self, a: Tensor, b: Tensor) -> Tensor:
        """a += b"""
        node = self.node("sum", [a, b], [], lambda s, g, n: [g[0] if n[0] else None, g[0] if n[1] else None])
        return Tensor(a.count, a.width, a.storage, node)

    def subtract(self, a: Tensor, b: Tensor, what: str = "difference") -> Tensor:
        count, width = b.count, b.width
        node = self.node(what, [a, b], [], lambda s, g, n: [
            g[0] if n[0] else None, self.new(max(count, g[0].count), g[0].width, "negated gradient") if n[1] else None])
        return self.new(max(a.count, b.count), max(a.width, b.width), what, node=node)

    def grouped(self, x: Tensor, w: Tensor, begins: Tensor, inp: int, out: int, what: str,
                apart: bool = False) -> Tensor:
        """`grouped_mm`: rows of x (S inp), in the order of their matrices, each by its matrix of w (E out inp);
        `begins` says where each one's rows begin. It is of w's dtype, whatever autocast says. Its bytes do not depend
        on how the rows spread over the matrices. apart: matrix by matrix, as cards before sm80 have it; then both
        gradients are made, wanted or not (`transformers::grouped_mm_fallback`)."""
        x = self.cast(x, w.width)
        rows, width, size = x.count // inp, w.width, w.count

        def back(saved, grads, needs):
            if apart:
                dx, dw = self.new(rows * inp, width, "input gradient"), self.new(size, width, "weight gradient")
                return [dx if needs[0] else None, as_view(dw) if needs[1] else None]
            dw = self.new(size, width, "weight gradient") if needs[1] else None
            dx = self.new(rows * inp, width, "input gradient") if needs[0] else None
            return [dx, dw and as_view(dw)]

        saved = [x if w.needs or apart else None, w if x.needs or apart else None, begins]
        node = self.node("grouped product", [x, w], saved, back)
        return self.new(rows * out, width, what, node=node)
