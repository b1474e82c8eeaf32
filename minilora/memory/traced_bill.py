"""The bill of an architecture that has no closed form here: by the trace of two depths, extended affinely.

A decoder's layers are alike, or come in a pattern that repeats, so every moment's sum of live bytes is affine in the
number of layers, as in the closed form (`bill`). Two steps of a few layers are traced (`tracer`), and the line through
each moment is followed to the real number. Only the files called ``traced_...`` need torch, transformers and PEFT.
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..tables import bytes_text, table
from .bill import ALONE, two_depths
from .run import Training
from .traced_models import (
    as_config,
    class_of,
    default_targets,
    depth,
    in_one_line,
    per_layer,
    read_architecture,
    with_layers,
    writes_on,
)
from .traced_step import training_step
from .tracer import Trace, fake, trace

LAYER = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class TracedBill:
    """What a step holds at its peak, as far as a trace says.

    Attributes:
        name: of the architecture. layers: of the model; depths: those that were traced.
        parameters: of the whole model, without adapters.
        peak: bytes. moment: when. parts: bytes by kind; they sum to the peak, up to rounding.
        scratch: what flash attention's backward takes and gives back unseen.
        note: what was traced otherwise than asked, or "".
    """

    name: str
    run: Training
    layers: int
    depths: tuple[int, ...]
    parameters: int
    peak: int
    moment: str
    parts: dict[str, int]
    scratch: int
    note: str = ""

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self):
        how = (f"by the trace of {' and '.join(map(str, self.depths))} layers, extended to {self.layers}"
               if len(self.depths) > 1 else "by the trace of all its layers")
        rows = [(part, size, bytes_text(size), f"{size / self.peak:.1%}") for part, size in self.parts.items()]
        return "\n\n".join((f"{self.name} has no closed form here: this is {how} ({self.parameters:,} parameters)"
                            + f"\n{self.note}" * bool(self.note),
                            f"peak {bytes_text(self.peak)} ({self.peak:,} bytes) at: {self.moment}",
                            table(("part", "bytes", "", ""), rows)))


def estimate_by_trace(source: str | Path | Mapping[str, Any], run: Training) -> TracedBill:
    """The bill of `run` on the architecture in a folder's config.json, or in its contents.

    Raises:
        ValueError: no such file, a kind of model that is not priced, or a setting that the trace does not have.
    """
    check(run)
    config = as_config(source, "config") if isinstance(source, Mapping) else read_architecture(source)
    with in_one_line(config.model_type):
        return extended(config, run)


def extended(config: Any, run: Training) -> TracedBill:
    """The bill by the line through two depths."""
    kind, _ = class_of(config)
    own_loss = run.loss == "chunked" and not writes_on(kind, config)
    layers, depths = depth(config), depths_of(config)
    traces, sizes = zip(*(traced(with_layers(config, n) if n != layers else config, run) for n in depths))
    keyed = [keyed_moments(t, alone(config)) for t in traces]
    few, many = keyed[0], keyed[-1]
    more = (layers - depths[0]) // (depths[-1] - depths[0]) if len(depths) > 1 else 0
    live = lambda which, key: traces[which].timeline[keyed[which][key]].allocated
    total = lambda key: live(0, key) + more * (live(-1, key) - live(0, key))
    peak = max((key for key in few if key in many), key=total)
    parts = [held_by_kind(t, keys[peak]) for t, keys in zip(traces, keyed)]
    by_kind = {kind: parts[0][kind] + more * (parts[-1][kind] - parts[0][kind])
               for kind in parts[0].keys() | parts[-1].keys()}
    return TracedBill(config.model_type, run, layers, depths, sizes[0] + more * (sizes[-1] - sizes[0]), total(peak),
                      f"{peak[0]}, {peak[1] or 'outside the model'}, {peak[2]}",
                      dict(sorted(by_kind.items(), key=lambda item: -item[1])), scratch(config, run),
                      f"its loss is that of {kind.__name__}, not in chunks" if own_loss else "")


def scratch(config: Any, run: Training) -> int:
    """As `fitting.scratch`, from transformers' config."""
    part = config.get_text_config()
    heads, hidden = (getattr(part, name, None) for name in ("num_attention_heads", "hidden_size"))
    size = getattr(part, "head_dim", None) or (hidden // heads if heads and hidden else 0)
    grouped = getattr(part, "num_key_value_heads", None) not in (None, heads)
    return run.batch * run.seq * (heads or 0) * size * (4 + 4 * grouped) if run.attention == "fused" else 0


def check(run: Training) -> None:
    """Refuse what no trace of ours runs."""
    wrong = [(name, getattr(run, name), only) for name, only in (
        ("cards", 1), ("base", "device"), ("kernels", "torch"), ("quantisation", "nf4")) if getattr(run, name) != only]
    if run.software.reentrant or run.software.offloads or not run.software.peft:
        wrong.append(("stack", run.stack, "transformers or trl"))
    if run.loss == "fused" or run.upcast == "norms":
        wrong.append(("loss and upcast", f"{run.loss} and {run.upcast}", "whole or chunked, all or none"))
    if run.attention == "flash":
        wrong.append(("attention", run.attention, "fused, efficient, plain or eager"))
    if not run.double_quant:
        wrong.append(("double_quant", run.double_quant, True))
    if wrong:
        name, value, only = wrong[0]
        raise ValueError(f"an architecture without a closed form is traced, and the trace has {name} {only} alone, "
                         f"got {value}")


def depths_of(config: Any) -> tuple[int, ...]:
    """As `two_depths`, from what the config says of each layer."""
    said = [value for _, value in per_layer(config)]
    kinds = [[str(value[i]) for value in said] for i in range(depth(config))]
    return two_depths(kinds, alone(config))


def alone(config: Any) -> int:
    """How many layers at the start may be of a kind of their own."""
    dense = getattr(config.get_text_config(), "first_k_dense_replace", 0)
    return max(ALONE, dense if isinstance(dense, int) else 0)


def traced(config: Any, run: Training) -> tuple[Trace, int]:
    """One step of all the layers of `config`, and the number of its parameters.

    Raises:
        ValueError: what transformers or PEFT say against it, in one line.
    """
    counted = []
    with in_one_line(config.model_type), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model without weights
        with fake():
            targets = run.target_modules or default_targets(config)
            step = training_step(config, run.method, run.rank, targets, run.batch, run.seq, run.optimizer,
                                 run.dtype, run.autocast, run.checkpointing, run.dropout, loss=run.loss,
                                 adapter_dtype=run.adapter_dtype, upcast=run.upcast,
                                 attention=run.attention, rows=run.rows, accumulation=run.accumulation,
                                 reference=run.reference_model, dora=run.dora,
                                 counted=counted.append)
        with trace() as t:
            step()
    return t, counted[0]


def keyed_moments(t: Trace, start: int) -> dict[tuple, int]:
    """Every moment by phase, module (layers but for `start` of them counted from the end), operator and number within
    these."""
    numbers = [int(found[1]) for m in t.timeline if (found := LAYER.search(m.module))]
    layers, seen, keys = max(numbers, default=0) + 1, Counter(), {}
    for i, moment in enumerate(t.timeline):
        module = LAYER.sub(lambda found: f".{int(found[1]) if int(found[1]) < start else int(found[1]) - layers}",
                           moment.module, 1)
        place = moment.phase, module, moment.op
        keys[(*place, seen[place])] = i
        seen[place] += 1
    return keys


def held_by_kind(t: Trace, at: int) -> Counter:
    """Allocated bytes at a moment, by kind."""
    sums = Counter()
    for block in t.before + [block for block, sign, *_ in t.events if sign > 0]:
        if block.born <= at and (block.died is None or block.died > at):
            sums[block.kind] += block.allocated
    return sums
