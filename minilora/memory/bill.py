"""The bill of a training step: every byte at the moment at which most are held, by name, from the shapes alone.

The step is played on a ledger of sizes (`simulate.py`) with the decoder's own lines (`decoders/`). A decoder's layers
are alike, or of kinds that take turns, so every sum of live bytes is affine in their number: four layers and five are
played (or as many more as a turn has), and the line through the two is followed to the real number. That takes
milliseconds for any size.
"""

import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

from ..tables import bytes_text, table
from .costs import all_layers_bytes, moved, weight_bytes
from .ledger import Ledger
from .models import ModelSpec
from .run import BASES, Serving, Training
from .simulate import simulate_prefill, simulate_step

PARTS = ("frozen weights", "trainable weights", "visiting weights", "adapters", "optimizer", "gradients", "buckets",
         "KV cache", "activations", "recomputed activations", "temporaries", "optimizer temporaries", "buffers",
         "inputs")


@dataclass(frozen=True)
class Row:
    """What is held at the peak under one name: `count` storages of `bytes` in all."""

    part: str
    name: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Bill:
    """What a step holds at its peak.

    Attributes:
        peak: bytes, each storage rounded up to 512 as CUDA's allocator does. moment: when.
        rows: every item held then; their bytes sum to the peak.
        moved: bytes over the wire (several cards) or the bus (a streamed base) in a step, by what they are.
        host, disk: bytes there, of the base and of saved inputs.
    """

    spec: ModelSpec
    run: Training | Serving
    peak: int
    moment: str
    rows: tuple[Row, ...]

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by component; they sum to the peak."""
        parts = Counter()
        for row in self.rows:
            parts[row.part] += row.bytes
        return {part: parts[part] for part in sorted(parts, key=PARTS.index)}

    @property
    def moved(self) -> dict[str, int]:
        return moved(self.spec, self.run)

    @property
    def host(self) -> int:
        return self.elsewhere("host")

    @property
    def disk(self) -> int:
        return self.elsewhere("disk")

    def elsewhere(self, place: str) -> int:
        base = 0
        if self.run.base == place:
            base = all_layers_bytes(self.spec, self.run) + weight_bytes(self.spec, self.run)[1]
        inputs = self.moved.get("saved inputs, away and back", 0) // 2 // self.run.accumulation
        return base + inputs * (place == "host")

    def to_dict(self) -> dict:
        return {"model": asdict(self.spec), "run": asdict(self.run), "peak": self.peak, "moment": self.moment,
                "parts": self.parts, "items": [asdict(row) for row in self.rows], "moved": self.moved,
                "host": self.host, "disk": self.disk}

    def __str__(self):
        return self.text()

    def text(self, bars: bool = False) -> str:
        """The bill as tables, with bars if asked for."""
        rows = [(part, size, bytes_text(size), f"{size / self.peak:.1%}", "#" * round(40 * size / self.peak) * bars)
                for part, size in self.parts.items()]
        items = [(row.part, row.name, row.count, row.bytes, bytes_text(row.bytes))
                 for row in sorted(self.rows, key=lambda row: -row.bytes)[:12]]
        rest = [textwrap.fill(line, 98) for line in self.spec.layout.remarks(self.spec, self.run)]
        rest += [f"{what}: {bytes_text(size)} a step" for what, size in self.moved.items()]
        rest += [f"on the {place}: {bytes_text(size)}" for place in BASES[1:] if (size := self.elsewhere(place))]
        return "\n\n".join((
            f"peak {bytes_text(self.peak)} ({self.peak:,} bytes) at: {self.moment}",
            table(("part", "bytes", "", "", ""), [*rows, ("sum", self.peak, bytes_text(self.peak), "100.0%", "")]),
            table(("the largest items", "", "count", "bytes", ""), items), *rest))


def estimate(spec: ModelSpec, run: Training | Serving) -> Bill:
    """The bill of `run` on a model of shape `spec`: one training step, from the second on, or the answer to prompts.

    Raises:
        ValueError: what this model cannot do: a target it lacks, a rank or sequence too large.
    """
    run.check(spec)
    if isinstance(run, Training):
        return at_peak(spec, run, lambda layers: simulate_step(spec, run, layers))
    return at_peak(spec, run, lambda layers: simulate_prefill(spec, run, layers))


def at_peak(spec: ModelSpec, run: Training | Serving, played: Callable[[int], Ledger]) -> Bill:
    """The bill at the moment at which most is live; `played(n)` is the ledger of n layers."""
    kinds = [spec.layout.kind(spec, i) for i in range(spec.layers)]
    first, *second = two_depths(kinds)
    ledgers, more = (played(first), *map(played, second)), 0
    if second:
        more = (spec.layers - first) // (second[0] - first)
    moments = [keyed_moments(ledger, ALONE if len(set(kinds)) > 1 else 2) for ledger in ledgers]
    live = [live_bytes(ledger) for ledger in ledgers]
    few, many = moments[0], moments[-1]
    if more and few.keys() - many.keys():
        raise AssertionError("layers are not alike")

    def total(key) -> int:
        here = live[0][few[key]]
        return here + more * (live[-1][many[key]] - here)

    peak = max(few, key=total)
    rows = held(ledgers[0], few[peak])
    if more:
        five = held(ledgers[-1], many[peak])
        rows = {key: tuple(a + more * (b - a) for a, b in zip(rows.get(key, (0, 0)), five.get(key, (0, 0))))
                for key in rows.keys() | five.keys()}
    phase, layer, what = peak[0], peak[1], ledgers[0].moments[few[peak]][2]
    where = f"{phase}, " + (f"layer {layer % spec.layers}, " if layer is not None else "")
    return Bill(spec, run, total(peak), where + what,
                tuple(Row(part, name, *sizes) for (part, name), sizes in sorted(rows.items()) if sizes[1]))


ALONE = 3  # layers at the start that may differ from all others
LONGEST_TURN = 12  # layers


def two_depths(kinds: list, alone: int = ALONE) -> tuple[int, ...]:
    """Two numbers of layers, a turn of kinds apart, both ending as the whole does; or the whole.

    Args:
        kinds: of each layer. alone: how many at the start need not take turns.
    """
    layers = len(kinds)
    turn = next((n for n in range(1, LONGEST_TURN + 1) if kinds[alone:-n] == kinds[alone + n:]), layers)
    first = alone + turn
    first += (layers - first) % turn
    return (first, first + turn) if first + turn < layers else (layers,)


def keyed_moments(ledger: Ledger, start: int) -> dict[tuple, int]:
    """Every moment by phase, layer (but for `start` of them counted from the end) and number within the two."""
    layers = max((layer for _, layer, _ in ledger.moments if layer is not None), default=0) + 1
    seen, keys = Counter(), {}
    for t, (phase, layer, _) in enumerate(ledger.moments):
        place = phase, layer if layer is None or layer < start else layer - layers
        keys[(*place, seen[place])] = t
        seen[place] += 1
    return keys


def live_bytes(ledger: Ledger) -> list[int]:
    """The bytes live at every moment."""
    change = [0] * (len(ledger.moments) + 1)
    for item in ledger.items:
        change[item.born] += item.bytes
        if item.freed is not None:
            change[item.freed] -= item.bytes
    live = 0
    return [live := live + c for c in change[:-1]]


def timeline(spec: ModelSpec, run: Training) -> list[tuple[int, str]]:
    """The live bytes and the phase of every moment of a step, all layers played: seconds for the largest models."""
    run.check(spec)
    ledger = simulate_step(spec, run, spec.layers)
    return [(size, phase) for size, (phase, _, _) in zip(live_bytes(ledger), ledger.moments)]


def held(ledger: Ledger, t: int) -> dict[tuple[str, str], tuple[int, int]]:
    """What is live at moment t: (part, name) -> (count, bytes)."""
    rows = {}
    for item in ledger.items:
        if item.born <= t and (item.freed is None or item.freed > t):
            count, size = rows.get((item.part, item.name), (0, 0))
            rows[item.part, item.name] = count + 1, size + item.bytes
    return rows
