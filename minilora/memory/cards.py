"""Graphics cards, and the three sizes each has: the one on the box, the one the driver reports, the one a run may use.

They differ by up to a tenth, which decides many a close case, so they are kept apart. A card's architecture decides
too which attention torch can take on it.

Sources: nominal sizes, buses and products a second are from the makers' data sheets (NVIDIA's of each card, its white
papers on Volta, Turing, Ampere, Ada, Hopper and Blackwell; AMD's of the Instinct cards; Apple's technical
specifications; NVIDIA's of the DGX Spark), compute capabilities from NVIDIA's table of them, sizes that the driver
reports from what nvidia-smi prints.
"""

from dataclasses import dataclass

from .config_file import suggest

GIB, MIB = 2**30, 2**20
# what CUDA takes for itself before the first tensor: kernels, streams, libraries (0.15 to 1.4 GB, by card and version)
CONTEXT = (150_000_000, 1_400_000_000)
# the least share of the nominal size that a driver reports: error correction takes a sixteenth (T4 and L4 show 0.937)
LEAST_REPORTED = 0.93
# of memory that the system shares: what it leaves to the graphics side, at least (Metal's recommended working set is
# two thirds to three quarters) and at most
SHARED = (0.65, 0.95)
PCIE = {3: 15.75e9, 4: 31.5e9, 5: 63e9}  # bytes a second each way over 16 lanes


@dataclass(frozen=True)
class Card:
    """A card's memory in bytes.

    Attributes:
        nominal: the size in its name. reported: the driver's total, None where we know of none.
        bus: what its connection to the host carries, bytes a second each way, at best.
        flops: of products of dense 16-bit matrices, summed in fp32, a second at best (the makers' data sheets).
        capability: NVIDIA's compute capability (75: Turing), 0: of another maker.
        shared: its memory is the system's too.
    """

    name: str
    nominal: int
    reported: int | None
    bus: float
    flops: float
    capability: int = 0
    shared: bool = False

    @property
    def usable(self) -> tuple[int, int]:
        """The least and the most that tensors may take: what the driver reports, less CUDA's own.

        Where the driver's figure is unknown it lies between `LEAST_REPORTED` of the nominal size and all of it.
        """
        least, most = SHARED if self.shared else (LEAST_REPORTED, 1)
        low, high = self.reported or int(self.nominal * least), self.reported or int(self.nominal * most)
        return low - CONTEXT[1], high - CONTEXT[0]

    @property
    def attention(self) -> str:
        """What torch's own attention is on it: flash attention wants sm80 or newer; on Apple's it is none that
        trains (`run.ATTENTION`)."""
        if self.name.startswith("apple"):
            return "plain"
        return "efficient" if 0 < self.capability < 80 else "fused"

    @property
    def bf16(self) -> bool:
        """Whether it multiplies bfloat16."""
        return self.capability >= 80 or not self.capability

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


def card(name: str, gib: int, reported_mib: int | None, generation: int, teraflops: float, capability: int) -> Card:
    """One on a PCI Express slot of 16 lanes, or (of half as many, one generation later) with a bus as fast."""
    return Card(name, gib * GIB, reported_mib and reported_mib * MIB, PCIE[generation], teraflops * 1e12, capability)


def shared(name: str, gib: int, bandwidth: float, teraflops: float, capability: int = 0) -> Card:
    """One that shares the system's memory, of so many GB a second."""
    return Card(name, gib * GIB, None, bandwidth * 1e9, teraflops * 1e12, capability, shared=True)


CARDS = {c.name: c for c in (
    card("rtx-2080", 8, None, 3, 40.3, 75),
    card("rtx-3060-ti", 8, None, 4, 32.4, 86),
    card("rtx-3070", 8, None, 4, 40.6, 86),
    card("rtx-4060", 8, 8188, 3, 30.2, 89),
    card("rtx-3080", 10, 10240, 4, 59.5, 86),
    card("rtx-2080-ti", 11, 11264, 3, 53.8, 75),
    card("rtx-3060", 12, None, 4, 25.5, 86),
    card("rtx-4070", 12, 12282, 4, 58.3, 89),
    card("rtx-5070", 12, None, 5, 61.7, 120),
    card("t4", 16, 15360, 3, 65, 75),
    card("p100", 16, None, 3, 21.2, 60),
    card("v100-16", 16, None, 3, 125, 70),
    card("rtx-4060-ti-16", 16, 16380, 3, 44.1, 89),
    card("rtx-4080", 16, None, 4, 97.5, 89),
    card("rtx-5060-ti-16", 16, None, 4, 47.4, 120),
    card("rtx-5070-ti", 16, None, 5, 87.9, 120),
    card("rtx-5080", 16, None, 5, 112.6, 120),
    card("rtx-a4000", 16, None, 4, 76.7, 86),
    card("rtx-a4500", 20, None, 4, 94.6, 86),
    card("quadro-rtx-6000", 24, None, 3, 130.5, 75),
    card("l4", 24, 23034, 4, 121, 89),
    card("a10", 24, 23028, 4, 125, 86),
    card("a30", 24, None, 4, 165, 80),
    card("rtx-a5000", 24, None, 4, 111.1, 86),
    card("rtx-3090", 24, None, 4, 71, 86),
    card("rtx-3090-ti", 24, None, 4, 80, 86),
    card("rtx-4090", 24, 24564, 4, 165.2, 89),
    card("v100-32", 32, None, 3, 125, 70),
    card("rtx-5090", 32, 32607, 5, 209.5, 120),
    card("rtx-5000-ada", 32, None, 4, 261.1, 89),
    card("a100-40", 40, 40960, 4, 312, 80),
    card("l40", 48, 46068, 4, 181, 89),
    card("l40s", 48, 46068, 4, 362, 89),
    card("a40", 48, 46068, 4, 149.7, 86),
    card("rtx-a6000", 48, None, 4, 154.8, 86),
    card("rtx-6000-ada", 48, None, 4, 364.2, 89),
    card("a100-80", 80, 81920, 4, 312, 80),
    card("h100", 80, 81559, 5, 989, 90),
    card("h100-nvl", 94, None, 5, 835, 90),
    card("gh200", 96, None, 5, 989, 90),
    card("rtx-pro-6000", 96, None, 5, 503.8, 120),
    card("h200", 141, 143771, 5, 989, 90),
    card("b200", 180, None, 5, 2250, 100),
    card("b300", 288, None, 5, 2250, 103),
    card("mi210", 64, None, 4, 181, 0),
    card("mi250x", 128, None, 4, 383, 0),
    card("mi300x", 192, None, 5, 1307, 0),
    card("mi325x", 256, None, 5, 1307, 0),
    card("mi355x", 288, None, 5, 2500, 0),
    shared("dgx-spark", 128, 273, 125, 121),
    shared("apple-m4-16", 16, 120, 4.6),
    shared("apple-m4-pro-48", 48, 273, 9.2),
    shared("apple-m4-max-128", 128, 546, 18.4),
    shared("apple-m3-ultra-512", 512, 819, 28.2),
)}
