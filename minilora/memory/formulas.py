"""Where a bill's bytes come from: every item as a product of the model's and the run's sizes.

The same estimate is made with sizes that remember how they were computed (`Size`), so a formula cannot say anything
else than the bill: it is what the code did. Sums come out as polynomials, `layers × (2 × batch × seq × hidden)`.
"""

import copy
from collections import Counter
from fractions import Fraction
from math import gcd, lcm

from .bill import estimate
from .models import ModelSpec
from .run import Serving, Training

OF_MODEL = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "positions", "embedding", "experts",
            "experts_a_token")
OF_RUN = ("batch", "seq", "rank", "prompt", "new", "adapters")
Polynomial = dict[tuple[str, ...], Fraction]  # product of symbols, sorted -> its factor


class Size(int):
    """An integer that knows itself as a sum of products of symbols.

    It is worked out at once, not kept as a tree of what it was made from: a tensor's size goes back through every
    operator before it, and a browser's stack is too short for such a tree, to read it or to let it go.
    """

    def __new__(cls, value: int, terms: Polynomial):
        self = super().__new__(cls, value)
        self.terms = terms
        return self

    @classmethod
    def named(cls, value: int, symbol: str) -> "Size":
        return cls(value, {(symbol,): Fraction(1)})

    def __add__(self, other):
        few, many = sorted((polynomial(self), polynomial(other)), key=len)
        total = dict(many)
        for product, factor in few.items():
            total[product] = total.get(product, 0) + factor
            if not total[product]:
                del total[product]
        return Size(int(self) + int(other), total)

    def __mul__(self, other):
        if not isinstance(other, int):
            return NotImplemented
        total: Polynomial = {}
        for left, times in self.terms.items():
            for right, factor in polynomial(other).items():
                product = tuple(sorted(left + right)) if right else left
                total[product] = total.get(product, 0) + times * factor
        return Size(int(self) * int(other), {product: factor for product, factor in total.items() if factor})

    def __floordiv__(self, other):
        return quotient(self, other)

    def __rfloordiv__(self, other):
        return quotient(other, self)

    def __sub__(self, other):
        return self + -other

    def __rsub__(self, other):
        return -self + other

    def __neg__(self):
        return Size(-int(self), {product: -factor for product, factor in self.terms.items()})

    __radd__, __rmul__ = __add__, __mul__


def polynomial(size: int) -> Polynomial:
    """A size as a sum of products."""
    return size.terms if isinstance(size, Size) else {(): Fraction(size)} if size else {}


def quotient(whole: int, by: int) -> Size:
    """whole // by, if it comes out even; else a symbol that says it is rounded, up where -whole was rounded down."""
    value, a, b = int(whole) // int(by), polynomial(whole), polynomial(by)
    exact = value * int(by) == int(whole)
    if exact and b.keys() == {()}:
        return Size(value, {product: factor / b[()] for product, factor in a.items()})
    if exact and (found := divided(a, b)) is not None:
        return Size(value, found)
    up = not exact and all(factor < 0 for factor in a.values())
    inside = f"{written({p: -f for p, f in a.items()} if up else a)} / {written(b)}"
    shown = f"({inside})" if exact else f"⌈{inside}⌉" if up else f"⌊{inside}⌋"
    return Size(value, {(shown,): Fraction(-1 if up else 1)})


def divided(a: Polynomial, b: Polynomial) -> Polynomial | None:
    """a / b as a polynomial, leading product by leading product; None if it is none."""
    symbols = sorted({symbol for product in (*a, *b) for symbol in product})
    order = lambda product: tuple(product.count(symbol) for symbol in symbols)
    lead, rest, found = max(b, key=order), dict(a), {}
    while rest:
        top = max(rest, key=order)
        left = Counter(top) - Counter(lead)
        if left.total() != len(top) - len(lead):
            return None
        part, factor = tuple(sorted(left.elements())), rest[top] / b[lead]
        found[part] = factor
        for product, times in b.items():
            here = tuple(sorted(part + product))
            rest[here] = rest.get(here, Fraction(0)) - factor * times
            if not rest[here]:
                del rest[here]
    return found


def written(terms: Polynomial) -> str:
    """A polynomial for people, with what all its products share in front."""
    if not terms:
        return "0"
    shared = None
    for product in terms:
        shared = Counter(product) if shared is None else shared & Counter(product)
    if len(terms) == 1:
        (product, factor), = terms.items()
        return one(factor, product)
    scale = Fraction(gcd(*(f.numerator for f in terms.values())), lcm(*(f.denominator for f in terms.values())))
    rest = [(factor / scale, tuple((Counter(product) - shared).elements())) for product, factor in terms.items()]
    rest.sort(key=lambda term: (-len(term[1]), term[1]))
    inside = " + ".join(one(*term) for term in rest).replace("+ -", "− ")
    front = one(scale, tuple(shared.elements()))
    return inside if front == "1" else f"{front} × ({inside})"


def one(factor: Fraction, product: tuple[str, ...]) -> str:
    """A product with its factor: (1/2, ("ffn", "hidden")) -> "ffn × hidden / 2"."""
    order = sorted(Counter(product).items(), key=lambda each: (rank_of(each[0]), each[0]))
    words = [symbol if times == 1 else f"{symbol}^{times}" for symbol, times in order]
    above, below = abs(factor.numerator), factor.denominator
    words = [f"{above:,}"] * (above != 1 or not words) + words
    return "-" * (factor < 0) + " × ".join(words) + (f" / {below:,}" if below != 1 else "")


def rank_of(symbol: str) -> int:
    order = ("layers", "batch", "seq", *OF_RUN, *OF_MODEL)
    return order.index(symbol) if symbol in order else len(order)


def formulas(spec: ModelSpec, run: Training | Serving) -> dict[tuple[str, str], str]:
    """(part, name) of every row of the bill -> its bytes as a formula of `OF_MODEL` and `OF_RUN`."""
    return {(row.part, row.name): written(polynomial(row.bytes)) for row in remembered(spec, run)}


def remembered(spec: ModelSpec, run: Training | Serving) -> tuple:
    """The bill's rows, their bytes as sizes that remember."""
    named = copy.copy(spec), copy.copy(run)
    for thing, names in zip(named, (OF_MODEL, OF_RUN)):
        for name in names:
            if value := vars(thing).get(name):
                symbol = "hidden" if name == "embedding" and value == spec.hidden else name
                object.__setattr__(thing, name, Size.named(value, symbol))  # frozen, and checked when it was made
    return estimate(*named).rows
