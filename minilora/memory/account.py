"""The bill of a training step: every byte at the moment at which most are held, by name, from the shapes alone.

The step is played on a tape of sizes (`tape.py`) with the decoder's own lines (`blocks.py`). A decoder's layers are
alike, so every sum of live bytes is affine in their number: four layers and five are played, and the line through the
two is followed to the real number. That takes milliseconds for any size.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

from ..config import ALL_LINEAR
from ..tables import bytes_text, table
from .models import ModelSpec, near
from .play import OPTIMIZERS, play
from .tape import WIDTH, Tape

METHODS = ("full", "lora", "qlora")
IMPLEMENTATIONS = ("minilora", "transformers")
ATTENTION = ("fused", "eager")
PARTS = ("frozen weights", "trainable weights", "adapters", "optimizer", "gradients", "activations",
         "recomputed activations", "temporaries", "buffers", "inputs")


@dataclass(frozen=True)
class Training:
    """A training step.

    Args:
        method: "full" (every weight trains), "lora", "qlora" (LoRA on a base whose linears, but for the head, are NF4).
        double_quant: quantise the blocks' absmax too (QLoRA, section 3).
        rank, target_modules, dropout: LoRA's, as in `LoRAConfig`; targets None: what PEFT adapts in this family.
        batch, seq: rows, and tokens in each.
        optimizer: "adamw", "sgd", "momentum", "adafactor", "lion", "adamw8bit".
        dtype: of the weights ("bfloat16", "float16", "float32"). Our adapters are fp32 whatever the base is.
        autocast: run the forward under 16-bit autocast (mixed precision: with fp32 weights).
        implementation: "minilora" (our decoder, or where we have none transformers' with our adapters), or
            "transformers" (with PEFT's adapters).
        attention: "fused", or "eager" with transformers: all scores in memory. Gemma-2 and BLOOM have only that.
        checkpointing: recompute each layer in backward instead of keeping its activations.

    Raises:
        ValueError: an unknown name (near ones are listed), or a size that makes no sense.
    """

    method: str = "lora"
    rank: int = 16
    target_modules: str | tuple[str, ...] | None = None
    batch: int = 1
    seq: int = 512
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    autocast: bool = False
    checkpointing: bool = False
    dropout: float = 0.0
    double_quant: bool = True
    implementation: str = "minilora"
    attention: str = "fused"

    def __post_init__(self):
        if isinstance(self.target_modules, Iterable) and not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for what, value, known in (("method", self.method, METHODS), ("optimizer", self.optimizer, OPTIMIZERS),
                                   ("dtype", self.dtype, WIDTH), ("attention", self.attention, ATTENTION),
                                   ("implementation", self.implementation, IMPLEMENTATIONS)):
            if value not in known:
                raise ValueError(f"no {what} {value!r}; {near(str(value), known)}")
        for what in ("rank", "batch", "seq"):
            if type(value := getattr(self, what)) is not int or value < 1:
                raise ValueError(f"{what} must be a positive integer, got {value!r}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")

    def check(self, spec: ModelSpec) -> None:
        """Refuse what this model cannot do."""
        if spec.context and self.seq > spec.context:
            raise ValueError(f"seq {self.seq} is longer than the context of {spec.name}, {spec.context}")
        if self.method != "full":
            for m in spec.targets(self.target_modules):
                if self.rank > min(m.out, m.inp):
                    raise ValueError(f"rank {self.rank} is larger than {m.name} allows: its weight is {m.out} x {m.inp}, "
                                     f"so at most {min(m.out, m.inp)}")


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
        peak: bytes. moment: when. rows: every item held then; their bytes sum to the peak.
    """

    spec: ModelSpec
    run: Training
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

    def to_dict(self) -> dict:
        return {"model": asdict(self.spec), "run": asdict(self.run), "peak": self.peak, "moment": self.moment,
                "parts": self.parts, "items": [asdict(row) for row in self.rows]}

    def __str__(self):
        rows = [(part, size, bytes_text(size), f"{size / self.peak:.1%}") for part, size in self.parts.items()]
        items = [(row.part, row.name, row.count, row.bytes, bytes_text(row.bytes))
                 for row in sorted(self.rows, key=lambda row: -row.bytes)[:12]]
        return "\n\n".join((
            f"peak {bytes_text(self.peak)} ({self.peak:,} bytes) at: {self.moment}",
            table(("part", "bytes", "", ""), [*rows, ("sum", self.peak, bytes_text(self.peak), "100.0%")]),
            table(("the largest items", "", "count", "bytes", ""), items)))


def estimate(spec: ModelSpec, run: Training) -> Bill:
    """The bill of `run` on a model of shape `spec`, for one step from the second on.

    Raises:
        ValueError: what this model cannot do: a target it lacks, a rank or sequence too large.
    """
    run.check(spec)
    return at_peak(spec, run, lambda layers: play(spec, run, layers))


def at_peak(spec, run, played) -> Bill:
    """The bill at the moment at which most is live; `played(n)` is the tape of n layers."""
    if spec.layers <= 5:
        tapes, more = (played(spec.layers),), 0
    else:
        tapes, more = (played(4), played(5)), spec.layers - 4
    moments = [keyed_moments(tape) for tape in tapes]
    live = [live_bytes(tape) for tape in tapes]
    few, many = moments[0], moments[-1]
    if more and few.keys() - many.keys():
        raise AssertionError("layers are not alike")

    def total(key) -> int:
        here = live[0][few[key]]
        return here + more * (live[-1][many[key]] - here)

    peak = max(few, key=total)
    rows = held(tapes[0], few[peak])
    if more:
        five = held(tapes[1], many[peak])
        rows = {key: tuple(a + more * (b - a) for a, b in zip(rows.get(key, (0, 0)), five.get(key, (0, 0))))
                for key in rows.keys() | five.keys()}
    phase, layer, what = peak[0], peak[1], tapes[0].moments[few[peak]][2]
    where = f"{phase}, " + (f"layer {layer % spec.layers}, " if layer is not None else "")
    return Bill(spec, run, total(peak), where + what,
                tuple(Row(part, name, *sizes) for (part, name), sizes in sorted(rows.items()) if any(sizes)))


def keyed_moments(tape: Tape) -> dict[tuple, int]:
    """Every moment by phase, layer (counted from the end from the third on) and number within the two."""
    layers = max((layer for _, layer, _ in tape.moments if layer is not None), default=0) + 1
    seen, keys = Counter(), {}
    for t, (phase, layer, _) in enumerate(tape.moments):
        place = phase, layer if layer is None or layer < 2 else layer - layers
        keys[(*place, seen[place])] = t
        seen[place] += 1
    return keys


def live_bytes(tape: Tape) -> list[int]:
    """The bytes live at every moment."""
    change = [0] * (len(tape.moments) + 1)
    for item in tape.items:
        change[item.born] += item.bytes
        if item.freed is not None:
            change[item.freed] -= item.bytes
    live = 0
    return [live := live + c for c in change[:-1]]


def held(tape: Tape, t: int) -> dict[tuple[str, str], tuple[int, int]]:
    """What is live at moment t: (part, name) -> (count, bytes)."""
    rows = {}
    for item in tape.items:
        if item.born <= t and (item.freed is None or item.freed > t):
            count, size = rows.get((item.part, item.name), (0, 0))
            rows[item.part, item.name] = count + 1, size + item.bytes
    return rows


# ---------------------------------------------------------------- the command line


def memory_command(parser, arguments: list[str]) -> None:
    add_run_options(parser)
    options = parser.parse_args(arguments)
    bill = estimate(spec_of(options), run_of(options))
    print(json.dumps(bill.to_dict(), indent=2) if options.json else bill)


def add_run_options(parser) -> None:
    """A model and a training step, as options."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="a known one: `models` lists them")
    which.add_argument("--config", help="a folder with a Hugging Face config.json")
    parser.add_argument("--targets", help="names with commas between, a regular expression, or all-linear")
    for field in fields(Training):
        if field.name == "target_modules":
            continue
        if isinstance(field.default, bool):
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--json", action="store_true", help="for programs")


def spec_of(options) -> ModelSpec:
    return ModelSpec.preset(options.model) if options.model else ModelSpec.from_config(options.config)


def run_of(options) -> Training:
    targets, values = options.targets, {f.name: getattr(options, f.name, None) for f in fields(Training)}
    if targets and all(name.replace("_", "").replace(".", "").isalnum() for name in targets.split(",")):
        targets = tuple(targets.split(",")) if targets != ALL_LINEAR else targets
    return Training(**{**values, "target_modules": targets})
