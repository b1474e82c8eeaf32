"""The bill of an architecture that has no closed form here: by the trace of two depths, extended affinely.

A decoder's layers are alike, or come in a pattern that repeats, so every moment's sum of live bytes is affine in the
number of layers, as in the closed form (`bill`). Two steps of a few layers are traced (`tracer`), and the line through
each moment is followed to the real number. Only this file of the accountant needs torch, transformers and PEFT.
"""

import copy
import re
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from ..config import ALL_LINEAR
from ..tables import bytes_text, table
from .run import Training
from .traced_step import read_architecture, training_step
from .tracer import Trace, fake, measure

LAYER = re.compile(r"\.(\d+)(?=\.|$)")
LONGEST_PATTERN = 12  # layers


@dataclass(frozen=True)
class TracedBill:
    """What a step holds at its peak, as far as a trace says.

    Attributes:
        name: of the architecture. layers: of the model; depths: those that were traced.
        peak: bytes. moment: when. parts: bytes by kind; they sum to the peak, up to rounding.
        scratch: what flash attention's backward takes and gives back unseen.
    """

    name: str
    run: Training
    layers: int
    depths: tuple[int, ...]
    peak: int
    moment: str
    parts: dict[str, int]
    scratch: int

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self):
        how = (f"by the trace of {' and '.join(map(str, self.depths))} layers, extended to {self.layers}"
               if len(self.depths) > 1 else "by the trace of all its layers")
        rows = [(part, size, bytes_text(size), f"{size / self.peak:.1%}") for part, size in self.parts.items()]
        return "\n\n".join((f"{self.name} has no closed form here: this is {how}",
                            f"peak {bytes_text(self.peak)} ({self.peak:,} bytes) at: {self.moment}",
                            table(("part", "bytes", "", ""), rows)))


def estimate_by_trace(source: str | Path, run: Training) -> TracedBill:
    """The bill of `run` on the architecture in a folder's config.json.

    Raises:
        ValueError: no such file, no causal language model, or a setting that the trace does not have.
    """
    check(run)
    config = read_architecture(source)
    config = causal(config)
    layers = config.num_hidden_layers
    depths = depths_of(config, layers)
    traces = [traced(with_layers(config, n), run) for n in depths]
    keyed = [keyed_moments(t) for t in traces]
    few, many = keyed[0], keyed[-1]
    more = (layers - depths[0]) / (depths[-1] - depths[0]) if len(depths) > 1 else 0
    live = lambda which, key: traces[which].timeline[keyed[which][key]].allocated
    total = lambda key: live(0, key) + more * (live(-1, key) - live(0, key))
    peak = max((key for key in few if key in many), key=total)
    parts = [held_by_kind(t, keys[peak]) for t, keys in zip(traces, keyed)]
    by_kind = {kind: int(parts[0][kind] + more * (parts[-1][kind] - parts[0][kind]))
               for kind in parts[0].keys() | parts[-1].keys()}
    heads = config.num_attention_heads * (getattr(config, "head_dim", None)
                                          or config.hidden_size // config.num_attention_heads)
    grouped = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
    return TracedBill(config.model_type, run, layers, depths, int(total(peak)),
                      f"{peak[0]}, {peak[1] or 'outside the model'}, {peak[2]}",
                      dict(sorted(by_kind.items(), key=lambda item: -item[1])),
                      run.batch * run.seq * heads * (4 + 4 * grouped))


def check(run: Training) -> None:
    """Refuse what no trace of ours runs."""
    wrong = [(name, getattr(run, name), only) for name, only in (
        ("cards", 1), ("base", "device"), ("kernels", "torch"), ("attention", "fused"), ("quantisation", "nf4"),
        ("accumulation", 1)) if getattr(run, name) != only]
    if run.software.reentrant or run.software.offloads or not run.software.peft:
        wrong.append(("stack", run.stack, "transformers or trl"))
    if run.loss == "fused" or run.upcast == "norms":
        wrong.append(("loss and upcast", f"{run.loss} and {run.upcast}", "whole or chunked, all or none"))
    if wrong:
        name, value, only = wrong[0]
        raise ValueError(f"an architecture without a closed form is traced, and the trace has {name} {only} alone, "
                         f"got {value}")


def causal(config):
    """The config of the causal language model in it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    for candidate in (config, config.get_text_config()):
        if type(candidate) in MODEL_FOR_CAUSAL_LM_MAPPING and hasattr(candidate, "num_hidden_layers"):
            return candidate
    raise ValueError(f"{config.model_type} is no causal language model of transformers', and other kinds are not "
                     "priced")


def patterns(config, layers: int) -> list[list]:
    """The fields that say something of every layer."""
    return [value for value in vars(config).values() if isinstance(value, list) and len(value) == layers]


def depths_of(config, layers: int) -> tuple[int, ...]:
    """Two numbers of layers, a period apart, that end as the whole does; or the whole."""
    period = next((p for p in range(1, LONGEST_PATTERN + 1)
                   if all(v[i] == v[i + p] for v in patterns(config, layers) for i in range(3, layers - p))), layers)
    first = max(3, getattr(config, "first_k_dense_replace", 0) or 0) + period
    first += (layers - first) % period
    return (first, first + period) if first + period < layers else (layers,)


def with_layers(config, layers: int):
    """The same model with its first layers alone."""
    whole, config = config.num_hidden_layers, copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == whole:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    return config


def traced(config, run: Training) -> Trace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model without weights
        with fake():
            step = training_step(config, run.method, run.rank, run.target_modules or ALL_LINEAR, run.batch, run.seq,
                                 run.optimizer, run.dtype, run.autocast, run.checkpointing, run.dropout, loss=run.loss,
                                 adapter_dtype=run.adapter_dtype, upcast=run.upcast)
        return measure(step)


def keyed_moments(t: Trace) -> dict[tuple, int]:
    """Every moment by phase, module (layers from the third on counted from the end), operator and number within."""
    numbers = [int(found[1]) for m in t.timeline if (found := LAYER.search(m.module))]
    layers, seen, keys = max(numbers, default=0) + 1, Counter(), {}
    for i, moment in enumerate(t.timeline):
        module = LAYER.sub(lambda found: f".{int(found[1]) if int(found[1]) < 2 else int(found[1]) - layers}",
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
