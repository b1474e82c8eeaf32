"""The bill of a training step: every byte at the moment at which most are held, by name, from the shapes alone.

The step is played on a tape of sizes (`tape.py`) with the decoder's own lines (`blocks.py`, `hf.py`). A decoder's
layers are alike, so every sum of live bytes is affine in their number: four layers and five are played, and the line
through the two is followed to the real number. That takes milliseconds for any size.
"""

import json
import sys
from argparse import SUPPRESS, BooleanOptionalAction
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields

from ..config import ALL_LINEAR, is_number
from ..tables import bytes_text, table
from .models import Linear, ModelSpec, suggest
from .play import OPTIMIZERS, OURS, play, play_prefill
from .tape import WIDTH, Tape

METHODS = ("full", "lora", "qlora")
IMPLEMENTATIONS = ("minilora", "transformers")
ATTENTION = ("fused", "eager")
BASES = ("device", "host", "disk")
PARTS = ("frozen weights", "trainable weights", "visiting weights", "adapters", "optimizer", "gradients", "buckets",
         "KV cache", "activations", "recomputed activations", "temporaries", "optimizer temporaries", "buffers",
         "inputs")


class Run:
    """What a training step and serving have in common: a model's weights and adapters. `Training`, `Serving`."""

    def __post_init__(self):
        if isinstance(self.target_modules, Iterable) and not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for field in fields(self):
            value, least = getattr(self, field.name), LEAST.get(field.name)
            if known := KNOWN.get(field.name):
                if value not in known:
                    raise ValueError(f"no {field.name} {value!r}; {suggest(str(value), map(str, known))}")
            elif least is not None and (type(value) is not int or not least <= value < 2**31):
                raise ValueError(f"{field.name} must be an integer from {least} on, got {value!r}")
            elif isinstance(field.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be True or False, got {value!r}")

    def check(self, spec: ModelSpec) -> None:
        """Refuse what this model cannot do."""
        if spec.context and self.tokens > spec.context:
            raise ValueError(f"{self.tokens} tokens are more than the context of {spec.name}, {spec.context}")
        for m in self.targets(spec):
            if self.rank > min(m.out, m.inp):
                raise ValueError(f"rank {self.rank} is larger than {m.name} allows: its weight is {m.out} x {m.inp}, "
                                 f"so at most {min(m.out, m.inp)}")
        if self.attention == "eager" and self.implementation == "minilora" and spec.family in OURS:
            raise ValueError("our decoder has fused attention alone; eager attention is of implementation transformers")

    @property
    def outer_dtype(self) -> str:
        """Of what is no matrix of a layer: PEFT's `prepare_model_for_kbit_training` makes all of it fp32."""
        return "float32" if self.method == "qlora" and self.implementation == "transformers" else self.dtype

    def weight_bytes(self, spec: ModelSpec) -> tuple[int, int]:
        """The model's weights as stored, without adapters: of a layer, and of what stands outside the layers."""
        width = WIDTH[self.outer_dtype]
        matrices = spec.linears()
        if self.method != "qlora":
            return spec.layer_parameters * width, spec.outer_parameters * width
        biases, norms = sum(m.out * m.bias for m in matrices), spec.layout.norms * spec.norm_parameters
        four_bit = sum(four_bit_bytes(m.out * m.inp, self.double_quant) for m in matrices)
        return four_bit + biases * WIDTH[self.dtype] + norms * width, spec.outer_parameters * width


@dataclass(frozen=True)
class Training(Run):
    """A training step.

    Args:
        method: "full" (every weight trains), "lora", "qlora" (LoRA on a base whose linears, but for the head, are NF4).
        rank, target_modules, dropout: LoRA's, as in `LoRAConfig`; targets None: what PEFT adapts in this family.
        batch, seq: rows of one forward, and tokens in each.
        accumulation: forwards whose gradients are summed before the optimizer's step.
        optimizer: "adamw", "sgd", "momentum", "adafactor", "lion", or "adamw8bit" (bitsandbytes).
        dtype: of the weights ("bfloat16", "float16", "float32"). Adapters are fp32, as ours and PEFT's are.
        autocast: run the forward under 16-bit autocast (mixed precision: with fp32 weights).
        checkpointing: recompute each layer in backward instead of keeping its activations.
        double_quant: qlora's blocks' absmax in 8 bits too (QLoRA, section 3).
        implementation: "minilora" (our decoder, or where we have none transformers', with our adapters), or
            "transformers" (with PEFT's adapters; a 4-bit base by bitsandbytes).
        attention: "fused", or "eager" with transformers: all scores in memory. Gemma-2 and BLOOM have only that.
        cards: on how many the step runs, each with a batch of its own; the bill is of one card.
        zero: what they share out: 0 nothing (DistributedDataParallel), 1 optimizer states, 2 gradients too, 3 weights
            too (ZeRO, 1910.02054; FSDP is stage 3).
        base: where frozen weights live: on the "device"; or in the "host"'s memory or on "disk", from where each layer
            visits the device in forward and again in backward (`stream.py`). Needs a frozen base and checkpointing.
        offload: a streamed run's saved inputs, one a layer, wait for backward in the host's memory too.

    Raises:
        ValueError: an unknown name (near ones are listed), or a size that makes no sense.
    """

    method: str = "lora"
    rank: int = 16
    target_modules: str | tuple[str, ...] | None = None
    batch: int = 1
    seq: int = 512
    accumulation: int = 1
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    autocast: bool = False
    checkpointing: bool = False
    dropout: float = 0.0
    double_quant: bool = True
    implementation: str = "minilora"
    attention: str = "fused"
    cards: int = 1
    zero: int = 0
    base: str = "device"
    offload: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.zero and self.cards == 1:
            raise ValueError(f"zero {self.zero} shares a step out over several cards: cards must be 2 or more, got 1")
        if self.streamed and (self.method == "full" or not self.checkpointing or self.cards > 1):
            raise ValueError(f"a base on the {self.base} visits layer by layer: that needs a frozen base (method lora "
                             "or qlora), checkpointing, and one card")
        if self.offload and not self.streamed:
            raise ValueError("offload is of a streamed run: say base host or disk too")

    @property
    def tokens(self) -> int:
        return self.seq

    @property
    def streamed(self) -> bool:
        return self.base != "device"

    @property
    def shares(self) -> dict[str, int]:
        """Part -> of how many cards each keeps a share. Gradients that accumulate are whole until exchanged."""
        if self.streamed:
            return {"frozen weights": 0}
        sharded = (("optimizer", "optimizer temporaries"), ("gradients",) if self.accumulation == 1 else (),
                   ("frozen weights", "trainable weights", "adapters"))[:self.zero]
        return {part: self.cards for stage in sharded for part in stage}

    def targets(self, spec: ModelSpec) -> tuple[Linear, ...]:
        return spec.targets(self.target_modules) if self.method != "full" else ()

    def visitors(self, spec: ModelSpec) -> list[tuple[str, int]]:
        """Weights that are on the device for a while: of a streamed base, or of one that is sharded, gathered from all
        cards. While a layer computes, the next one is fetched."""
        layer, outer = self.weight_bytes(spec)
        adapters = sum(4 * self.rank * (m.inp + m.out) for m in self.targets(spec))
        if self.streamed:
            return [("a layer", layer), ("the next layer, or the head", max(layer, self.head_bytes(spec)))]
        if self.zero == 3 and self.cards > 1:
            return [("a layer", layer + adapters), ("the next layer", layer + adapters), ("what is no layer", outer)]
        return []

    def head_bytes(self, spec: ModelSpec) -> int:
        return spec.vocab * spec.embedding * WIDTH[self.outer_dtype]

    def moved(self, spec: ModelSpec) -> dict[str, int]:
        """Bytes that go over the wire to other cards (each sends as many), or over the bus from the host, in a step.

        By a ring (Patarasuk & Yuan 2009). As `train` under torchrun, counted: what is no layer stays from forward to
        backward, and gradients travel once, after the last forward and backward that add to them.
        """
        layer, outer = self.weight_bytes(spec)
        weights = spec.layers * layer + outer
        trained = (weights if self.method == "full" else 4 * spec.lora_parameters(self.rank, self.target_modules))
        if self.streamed:
            rows = self.batch * self.seq * spec.embedding * WIDTH[self.dtype]
            # two layers stay where the pass turns round: the last one at the head, the first two between steps
            once = {"layers, forward and backward": max(2 * spec.layers - 3, 0) * layer,
                    "head": self.head_bytes(spec) * (spec.layers > 1), "rows of the embedding": rows,
                    "saved inputs, away and back": 2 * self.offload * spec.layers * rows}
            return {what: size * self.accumulation for what, size in once.items() if size}
        if self.cards == 1:
            return {}
        others = lambda size: size * (self.cards - 1) // self.cards
        if self.zero < 3:
            return {"gradients, summed": others(trained), "gradients or weights, handed round": others(trained)}
        every = weights + (trained if self.method != "full" else 0)
        return {"weights, gathered in forward": others(every) * self.accumulation,
                "layers, gathered in backward": others(every - outer) * self.accumulation,
                "gradients, summed": others(trained)}

    def flops(self, spec: ModelSpec) -> int:
        """Floating-point operations of a step's matrix products and attention, those of adapters left out: two a
        multiply-and-add. Forward, again if recomputed, the inputs' gradients, and if they train the weights'."""
        full = self.method == "full"
        passes, tokens = 2 + self.checkpointing + full, self.batch * self.seq
        layer = 2 * sum(m.out * m.inp for m in spec.linears())
        # scores and their product with the values, half of them masked; backward makes five products of two
        attention = 2 * self.seq * spec.heads * spec.head_dim * (1 + self.checkpointing + 2.5)
        head = 2 * spec.vocab * spec.embedding * (2 + full)
        return int(tokens * (spec.layers * (layer * passes + attention) + head)) * self.accumulation


@dataclass(frozen=True)
class Serving(Run):
    """Answering `batch` prompts at once.

    Args:
        batch, prompt, new: rows, tokens in each prompt, and tokens to come: the cache has room for all.
        adapters: how many are resident, each of `rank` on `target_modules`; 0: the base alone.
        four_bit: the base's linears are NF4.
        dtype, double_quant, implementation, attention: as in `Training`.
    """

    batch: int = 1
    prompt: int = 512
    new: int = 512
    adapters: int = 0
    rank: int = 16
    target_modules: str | tuple[str, ...] | None = None
    four_bit: bool = False
    dtype: str = "bfloat16"
    double_quant: bool = True
    implementation: str = "minilora"
    attention: str = "fused"

    # what a decoder on the tape asks of a training step
    autocast = checkpointing = streamed = offload = False
    dropout = 0.0

    @property
    def method(self) -> str:
        return "qlora" if self.four_bit else "lora"

    @property
    def seq(self) -> int:
        return self.prompt

    @property
    def tokens(self) -> int:
        return self.prompt + self.new

    def targets(self, spec: ModelSpec) -> tuple[Linear, ...]:
        return spec.targets(self.target_modules) if self.adapters else ()


KNOWN = {"method": METHODS, "optimizer": OPTIMIZERS, "dtype": WIDTH, "implementation": IMPLEMENTATIONS,
         "attention": ATTENTION, "base": BASES, "zero": (0, 1, 2, 3)}
LEAST = {"rank": 1, "batch": 1, "seq": 1, "accumulation": 1, "cards": 1, "prompt": 1, "new": 0, "adapters": 0}


def four_bit_bytes(count: int, double: bool) -> int:
    """A weight of so many elements as `quant.Linear4bit` stores it: 4.126953125 bits each, and 4 bytes (QLoRA, 3)."""
    blocks = -(-count // 64)
    return blocks * 32 + (blocks + -(-blocks // 256) * 4 + 4 if double else blocks * 4)


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
        return self.run.moved(self.spec) if isinstance(self.run, Training) else {}

    @property
    def host(self) -> int:
        return self.elsewhere("host")

    @property
    def disk(self) -> int:
        return self.elsewhere("disk")

    def elsewhere(self, place: str) -> int:
        layer, outer = self.run.weight_bytes(self.spec)
        base = self.spec.layers * layer + outer if getattr(self.run, "base", "") == place else 0
        inputs = self.moved.get("saved inputs, away and back", 0) // 2 // getattr(self.run, "accumulation", 1)
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
        rest = [f"{what}: {bytes_text(size)} a step" for what, size in self.moved.items()]
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
    tape = play if isinstance(run, Training) else play_prefill
    return at_peak(spec, run, lambda layers: tape(spec, run, layers))


def at_peak(spec: ModelSpec, run: Training | Serving, played: Callable[[int], Tape]) -> Bill:
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
                tuple(Row(part, name, *sizes) for (part, name), sizes in sorted(rows.items()) if sizes[1]))


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


def timeline(spec: ModelSpec, run: Training) -> list[tuple[int, str]]:
    """The live bytes and the phase of every moment of a step, all layers played: seconds for the largest models."""
    run.check(spec)
    tape = play(spec, run, spec.layers)
    return [(size, phase) for size, (phase, _, _) in zip(live_bytes(tape), tape.moments)]


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
    parser.add_argument("--card", help="also say whether it fits this card: `cards` lists them")
    parser.add_argument("--serve", action="store_true", help="answer prompts instead of training")
    serving = parser.add_argument_group("with --serve, in the place of --seq and of all that trains")
    for field in fields(Serving):
        if field.name not in Training.__dataclass_fields__:
            add_option(serving, field)
    options = parser.parse_args(arguments)
    run = run_of(options, Serving if options.serve else Training)
    bill = estimate(spec_of(options), run)
    verdict = None
    if options.card:
        from .fit import judge

        verdict = judge(bill, options.card)
    if options.json:
        print(json.dumps(bill.to_dict() | ({"card": verdict.to_dict()} if verdict else {}), indent=2))
    else:
        print(bill.text(bars=sys.stdout.isatty()), *([verdict] if verdict else []), sep="\n\n")


def add_run_options(parser) -> None:
    """A model and a training step, as options."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="a known one: `models` lists them")
    which.add_argument("--config", help="a folder with a Hugging Face config.json")
    parser.add_argument("--family", help="read that config as this model_type, whatever it says of itself")
    parser.add_argument("--targets", help="names with commas between, a regular expression, or all-linear")
    for field in fields(Training):
        if field.name != "target_modules":
            add_option(parser, field)
    parser.add_argument("--json", action="store_true", help="for programs")


def add_option(parser, field) -> None:
    name, default = "--" + field.name.replace("_", "-"), field.default
    if isinstance(default, bool):
        parser.add_argument(name, action=BooleanOptionalAction, default=SUPPRESS, help=f"default {default}")
    else:
        known = "".join(f"{value}, " for value in KNOWN.get(field.name, ()))
        parser.add_argument(name, type=type(default), default=SUPPRESS, metavar=field.name.upper(),
                            help=f"{known}default {default}")


def spec_of(options) -> ModelSpec:
    if options.family and options.model:
        raise ValueError("--family goes with --config: the family of a known model is known")
    return ModelSpec.preset(options.model) if options.model else ModelSpec.from_config(options.config, options.family)


def run_of(options, kind: type = Training) -> Training | Serving:
    targets = options.targets
    if targets and targets != ALL_LINEAR and not set(targets) & set("*+?|()[]{}\\^$"):
        targets = tuple(target.strip() for target in targets.split(","))
    given = {"target_modules": targets} | {f.name: getattr(options, f.name) for f in fields(Training) + fields(Serving)
                                           if hasattr(options, f.name)}
    if stray := [name for name in given if name not in kind.__dataclass_fields__]:
        raise ValueError(f"--{stray[0].replace('_', '-')} goes " + ("with --serve" if kind is Training else
                         "with training, not with --serve"))
    return kind(**given)
