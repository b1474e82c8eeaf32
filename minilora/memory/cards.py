"""Graphics cards, and the three sizes each has: the one on the box, the one the driver reports, the one a run may use.

They differ by up to a tenth, which decides many a close case, so they are kept apart.
"""

from dataclasses import dataclass

from .config_file import suggest

GIB, MIB = 2**30, 2**20
# what CUDA takes for itself before the first tensor: kernels, streams, libraries (0.15 to 1.4 GB, by card and version)
CONTEXT = (150_000_000, 1_400_000_000)
# the least share of the nominal size that a driver reports: error correction takes a sixteenth (T4 and L4 show 0.937)
LEAST_REPORTED = 0.93
PCIE = {3: 15.75e9, 4: 31.5e9, 5: 63e9}  # bytes a second each way over 16 lanes


@dataclass(frozen=True)
class Card:
    """A card's memory in bytes.

    Attributes:
        nominal: the size in its name. reported: the driver's total, None where we know of none.
        bus: what its connection to the host carries, bytes a second each way, at best.
        flops: of products of dense 16-bit matrices, summed in fp32, a second at best (the makers' data sheets).
    """

    name: str
    nominal: int
    reported: int | None
    bus: float
    flops: float

    @property
    def usable(self) -> tuple[int, int]:
        """The least and the most that tensors may take: what the driver reports, less CUDA's own.

        Where the driver's figure is unknown it lies between `LEAST_REPORTED` of the nominal size and all of it.
        """
        low, high = self.reported or int(self.nominal * LEAST_REPORTED), self.reported or self.nominal
        return low - CONTEXT[1], high - CONTEXT[0]

    @classmethod
    def of(cls, name: str) -> "Card":
        """A card by its name; a ValueError with near names if there is none."""
        if name not in CARDS:
            raise ValueError(f"no card {name!r}; " + suggest(name, CARDS))
        return CARDS[name]

    def to_dict(self) -> dict:
        low, high = self.usable
        return {"nominal": self.nominal, "reported": self.reported, "usable_low": low, "usable_high": high,
                "bus": self.bus, "flops": self.flops}


def card(name: str, nominal_gib: int, reported_mib: int | None, generation: int, teraflops: float) -> Card:
    return Card(name, nominal_gib * GIB, reported_mib and reported_mib * MIB, PCIE[generation], teraflops * 1e12)


CARDS = {c.name: c for c in (
    card("rtx-3060", 12, None, 4, 25.5),
    card("t4", 16, 15360, 3, 65),
    card("v100-16", 16, None, 3, 125),
    card("rtx-4080", 16, None, 4, 97.5),
    card("rtx-5080", 16, None, 5, 112.6),
    card("l4", 24, 23034, 4, 121),
    card("a10", 24, 23028, 4, 125),
    card("rtx-3090", 24, None, 4, 71),
    card("rtx-4090", 24, 24564, 4, 165.2),
    card("v100-32", 32, None, 3, 125),
    card("rtx-5090", 32, 32607, 5, 209.5),
    card("a100-40", 40, 40960, 4, 312),
    card("l40s", 48, 46068, 4, 362),
    card("rtx-a6000", 48, None, 4, 154.8),
    card("a100-80", 80, 81920, 4, 312),
    card("h100", 80, 81559, 5, 989),
    card("h200", 141, 143771, 5, 989),
    card("b200", 192, None, 5, 2250),
    card("mi300x", 192, None, 5, 1307),
)}
