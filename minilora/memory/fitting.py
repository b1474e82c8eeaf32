"""Does it fit? On which cards, with how large a batch or sequence, on how many, and what to change first.

Between what a bill says and what a card must have there is a gap that no sum closes: the allocator cannot use every gap
between blocks, kernels take scratch, CUDA takes some for itself. So a need is a range, a card's memory is one too
(`Card.usable`), and where the two overlap the answer is "too close to call".
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from ..tables import bytes_text, table
from .bill import Bill, estimate
from .cards import CARDS, Card
from .costs import flops, preparation
from .ledger import WIDTH
from .models import ModelSpec
from .run import Serving, Training

# reserved / allocated at the peak: 1.01 to 1.24 in traced steps (tests/bench/fragmentation.py, and GPT-2 XL whole)
FRAGMENTATION = 1.25
WORKSPACE = 32 * 2**20  # cuBLAS's, from the same allocator, on Hopper; 8 MiB elsewhere
FITS, CLOSE, NOT = "fits", "too close to call", "does not fit"
MOST_CARDS = 1024
LARGEST = 2**20  # rows or tokens that a search looks at


@dataclass(frozen=True)
class Verdict:
    """One run on one card: need and usable memory are (least, most), in bytes.

    bus_seconds, compute_seconds: what a streamed step takes at least: its bytes' way over the card's bus, and its
        products at the card's best. The two go on side by side. 0 for a base on the device.
    taken: what was priced otherwise than asked, as this card cannot do it.
    """

    card: Card
    need: tuple[int, int]
    usable: tuple[int, int]
    bus_seconds: float = 0.0
    compute_seconds: float = 0.0
    taken: str = ""

    @property
    def answer(self) -> str:
        return FITS if self.margin >= 0 else NOT if self.need[0] > self.usable[1] else CLOSE

    @property
    def margin(self) -> int:
        """What is left over in the worst case; negative: what may be missing."""
        return self.usable[0] - self.need[1]

    def to_dict(self) -> dict:
        return {"card": self.card.name, "answer": self.answer, "margin": self.margin, "need_low": self.need[0],
                "need_high": self.need[1], "usable_low": self.usable[0], "usable_high": self.usable[1],
                "bus_seconds": self.bus_seconds, "compute_seconds": self.compute_seconds, "taken": self.taken}

    def __str__(self):
        return (f"{self.card.name}: {self.answer}; needs {bytes_text(self.need[0])} to {bytes_text(self.need[1])} of "
                f"{bytes_text(self.usable[0])} to {bytes_text(self.usable[1])}, margin {bytes_text(self.margin)}"
                + f"; a step takes at least {self.bus_seconds:.2f} s on the bus and {self.compute_seconds:.2f} s of "
                  "computing beside it" * bool(self.bus_seconds)) + f"; {self.taken}" * bool(self.taken)


@dataclass(frozen=True)
class Change:
    """A change of the run by itself: what it saves, and whether the run then fits."""

    what: str
    saves: int
    answer: str


@dataclass(frozen=True)
class Fit:
    """What `fit` found.

    Attributes:
        bill: of the run. verdicts: one a card.
        batch, seq: the largest that fit the card for sure, 0: none does; None where no card was asked for.
        cards: how many it takes at least with ZeRO-3, per card; None: not even many.
        changes: what makes the peak smaller, the most first.
    """

    bill: Bill
    verdicts: tuple[Verdict, ...]
    batch: int | None
    seq: int | None
    cards: dict[str, int | None]
    changes: tuple[Change, ...]

    def to_dict(self) -> dict:
        return {"peak": self.bill.peak, "moment": self.bill.moment, "cards": [v.to_dict() for v in self.verdicts],
                "largest_batch": self.batch, "largest_seq": self.seq, "zero3_cards": self.cards,
                "changes": [asdict(change) for change in self.changes]}

    def __str__(self):
        rows = [(v.card.name, v.answer, f"{bytes_text(v.usable[0])} to {bytes_text(v.usable[1])}", bytes_text(v.margin),
                 self.cards[v.card.name] or f"over {MOST_CARDS}") for v in self.verdicts]
        need = self.verdicts[0].need
        parts = [f"peak {bytes_text(self.bill.peak)} at: {self.bill.moment}\nwith fragmentation and scratch: "
                 f"{bytes_text(need[0])} to {bytes_text(need[1])}",
                 table(("card", "", "usable", "margin", "cards with ZeRO-3"),
                       [tuple(str(cell) for cell in row) for row in rows])]
        if self.batch is not None:
            whole = " (the model's context)" * (self.seq == self.bill.spec.context)
            parts.append(f"the largest batch at this length: {self.batch or 'none'}\n"
                         f"the longest sequence at this batch: {self.seq or 'none'}{whole}")
        if self.changes:
            parts.append(table(("change", "saves", "then"), [(c.what, bytes_text(c.saves), c.answer)
                                                             for c in self.changes]))
        return "\n\n".join(parts)


def fit(spec: ModelSpec, run: Training, card: str | None = None) -> Fit:
    """Whether `run` fits one card, or, without `card`, which of all it fits.

    Raises:
        ValueError: no such card, or as `estimate`.
    """
    wanted = [Card.of(card)] if card is not None else list(CARDS.values())
    bill = priced(spec, run)
    verdicts = tuple(judge(bill, c) for c in wanted)
    target = wanted[0] if card else max(wanted, key=lambda c: c.usable[0])
    answer = lambda changed: judge(priced(spec, changed), target).answer
    batch = seq = None
    if card:
        batch = largest(lambda n: answer(replace(run, batch=n)) == FITS, LARGEST)
        seq = largest(lambda n: answer(replace(run, seq=n)) == FITS, spec.context or LARGEST)
    return Fit(bill, verdicts, batch, seq, {c.name: fewest_cards(spec, run, c) for c in wanted},
               ranked_changes(spec, run, answer))


def judge(bill: Bill, card: Card | str) -> Verdict:
    """One bill against one card. What the card cannot do is priced as torch does it there."""
    card = Card.of(card) if isinstance(card, str) else card
    changed, taken = as_on(bill.run, card)
    bill = priced(bill.spec, replace(bill.run, **changed)) if changed else bill
    seconds = (0.0, 0.0)
    if isinstance(bill.run, Training) and bill.run.streamed:
        seconds = sum(bill.moved.values()) / card.bus, flops(bill.spec, bill.run) / card.flops
    return Verdict(card, need(bill), card.usable, *seconds, taken)


def as_on(run: Training | Serving, card: Card) -> tuple[dict[str, Any], str]:
    """What of a run this card does otherwise, and a line that says so."""
    changed = {}
    if card.attention != "fused" and run.attention in ("fused", "flash"):
        changed["attention"] = card.attention
    if not card.bf16 and run.dtype == "bfloat16":
        changed["dtype"] = "float16"
    said = {"attention": f"{card.attention} attention, as it has no flash attention",
            "dtype": "float16, as it does not multiply bfloat16"}
    return changed, "priced with " + " and ".join(said[name] for name in changed) if changed else ""


# settings that are often other than they are taken to be, and what else they may be
OFTEN_OTHERWISE: dict[str, Callable[[Training], dict]] = {
    "without checkpointing": lambda r: {"checkpointing": False} if r.checkpointing else {},
    "with checkpointing": lambda r: {"checkpointing": True} if not r.checkpointing else {},
    "with the loss of all logits at once": lambda r: {"loss": "whole"} if r.loss != "whole" else {},
    "with the loss in chunks": lambda r: {"loss": "chunked"} if r.loss == "whole" and r.software.peft else {},
    "with eager attention": lambda r: {"attention": "eager"} if r.attention != "eager" and r.software.peft else {},
    "with padded or packed rows": lambda r: {"rows": "padded"} if r.rows == "equal" and r.software.peft else {},
    "without autocast": lambda r: {"autocast": False} if r.autocast else {},
    "with autocast": lambda r: {"autocast": True} if not r.autocast else {},
    "with embedding, norms and head in fp32 (prepare_model_for_kbit_training)":
        lambda r: {"upcast": "all"} if r.upcasts and r.upcast != "all" else {},
    "with nothing made fp32": lambda r: {"upcast": "none"} if r.upcasts and r.upcast != "none" else {},
}


def turning_points(bill: Bill, card: Card | str) -> list[str]:
    """The settings that by themselves change the verdict, and to what."""
    now, found = judge(bill, card).answer, []
    for what, change in OFTEN_OTHERWISE.items():
        if changed := change(bill.run):  # pyright: ignore[reportArgumentType]
            then = judge(priced(bill.spec, replace(bill.run, **changed)), card)
            if then.answer != now:
                found.append(f"{what}: {then.answer} ({bytes_text(then.need[0])} to {bytes_text(then.need[1])})")
    return ["what would change that: " + "; ".join(found)] if found else []


def need(bill: Bill) -> tuple[int, int]:
    """The least and the most that tensors, their allocator and the kernels may ask for."""
    before = preparation(bill.spec, bill.run)
    return max(bill.peak, before), max(int(bill.peak * FRAGMENTATION) + WORKSPACE + scratch(bill), before)


def scratch(bill: Bill) -> int:
    """What the backward of flash attention takes and gives back: the gradient of q in fp32, and with grouped heads
    those of k and v for every query head."""
    run, spec = bill.run, bill.spec
    if run.attention in ("flash", "plain", "eager"):
        return 0  # it is in the bill, or there is none
    elements = run.batch * run.seq * spec.heads * spec.head_dim
    return elements * (4 + 2 * WIDTH["bfloat16"] * (spec.heads != spec.kv_heads))


@lru_cache(maxsize=4096)
def priced(spec: ModelSpec, run: Training | Serving) -> Bill:
    return estimate(spec, run)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n up to `most` that fits, 0 if none does; if n fits, so does every smaller one."""
    if not fits(1):
        return 0
    low, high = 1, 2  # low fits
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fewest_cards(spec: ModelSpec, run: Training, card: Card) -> int | None:
    """How many cards the run takes at least when all share everything out (ZeRO-3), each with the run's batch."""
    if run.streamed:
        return 1 if judge(priced(spec, run), card).answer == FITS else None
    fits = lambda n: judge(priced(spec, replace(run, cards=n, zero=3 if n > 1 else 0)), card).answer == FITS
    if fits(1):
        return 1
    too_few = largest(lambda n: not fits(n), MOST_CARDS)
    return too_few + 1 if too_few < MOST_CARDS else None


def ranked_changes(spec: ModelSpec, run: Training, answer: Callable[[Training], str]) -> tuple[Change, ...]:
    """Single changes of the run by the bytes they save, each with the verdict that it would bring about."""
    tried = {}
    for what, change in CHANGES.items():
        try:
            changed = replace(run, **change(run))
            saves = priced(spec, run).peak - priced(spec, changed).peak
        except ValueError:
            continue  # this change does not go with this run
        if saves > 0:
            tried[what] = Change(what, saves, answer(changed))
    return tuple(sorted(tried.values(), key=lambda c: -c.saves))


OURS = {"stack": "minilora", "attention": "fused", "loss": "whole", "kernels": "torch", "adapter_dtype": "float32",
        "upcast": "all"}
STREAMED = OURS | {"base": "host", "checkpointing": True, "cards": 1, "zero": 0}
CHANGES: dict[str, Callable[[Training], dict]] = {
    "train adapters, not every weight (lora)": lambda r: {"method": "lora"} if r.method == "full" else {},
    "keep the base in 4 bits (qlora)": lambda r: {"method": "qlora"},
    "recompute activations (checkpointing)": lambda r: {"checkpointing": True},
    "half the batch, gradients accumulated": lambda r: ({"batch": r.batch // 2, "accumulation": 2 * r.accumulation}
                                                        if r.batch > 1 else {}),
    "half the sequence": lambda r: {"seq": max(r.seq // 2, 1)},
    "half the rank": lambda r: {"rank": max(r.rank // 2, 1)} if r.method != "full" else {},
    "fewer targets (the family's default)": lambda r: {"target_modules": None} if r.method != "full" else {},
    "Adam's state in 8 bits": lambda r: {"optimizer": "adamw8bit"} if r.optimizer == "adamw" else {},
    "Adafactor": lambda r: {"optimizer": "adafactor"},
    "plain SGD": lambda r: {"optimizer": "sgd"},
    "weights in 16 bits": lambda r: {"dtype": "bfloat16", "autocast": False} if r.dtype == "float32" else {},
    "fused attention": lambda r: {"attention": "fused"},
    "the loss in chunks": lambda r: {"loss": "chunked"} if r.loss == "whole" and r.software.peft else {},
    "our decoder and adapters": lambda r: OURS if r.stack != "minilora" else {},
    "share it all out over 2 cards (ZeRO-3)": lambda r: {"cards": 2 * r.cards, "zero": 3},
    "stream the base from the host, layer by layer": lambda r: STREAMED if r.method != "full" else {},
    "stream a 4-bit base from the host": lambda r: STREAMED | {"method": "qlora"} if r.method != "qlora" else {},
}
