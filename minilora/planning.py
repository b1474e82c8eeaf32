"""What `inject` would adapt: the modules that a config's targets mean, at which rank; which are left out, and why."""

import math
from collections import defaultdict
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .bases import adapter_options, execution_device, kind_of, shape_of, why_not, words
from .beside import beside
from .config import ALL_LINEAR, LoRAConfig, entry_matches, scaling, variants
from .layers import AdapterLayer
from .naming import bare, plain_modules, suggest
from .tables import quoted, table


@dataclass(frozen=True)
class PlannedModule:
    """One module that `inject` would adapt; `shape` is (out, in), `bytes` those of its adapter."""

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    scaling: float
    parameters: int
    bytes: int
    tied_to: str | None = None


class Plan(tuple):
    """What `inject` would do: `PlannedModule`s; printing gives a table.

    Attributes:
        notes: modules that the targets mean and that stay as they are, or get a smaller rank; each with the reason.
    """

    notes: dict[str, str] = {}

    @property
    def parameters(self) -> int:
        return sum(m.parameters for m in self)

    @property
    def bytes(self) -> int:
        return sum(m.bytes for m in self)

    def __str__(self):
        rows = [(m.name, m.kind, f"{m.shape[0]} x {m.shape[1]}", m.rank, f"{m.alpha:g}", f"{m.scaling:.4g}",
                 m.parameters, m.bytes, f"tied to {m.tied_to}" if m.tied_to else "") for m in self]
        head = ("module", "kind", "out x in", "rank", "alpha", "scaling", "parameters", "bytes", "")
        rest = "".join(f"\n{name}: {note}" for name, note in self.notes.items())
        return table(head, rows) + f"\n{len(self)} modules, {self.parameters:,} parameters, {self.bytes:,} bytes" + rest


def plan(model: nn.Module, config: LoRAConfig) -> Plan:
    """What `inject(model, config)` would adapt, at which rank, for how many parameters. Nothing is changed.

    Raises:
        ValueError: a target or a pattern's key that matches nothing (near misses are listed), a target that cannot be
            adapted, a rank larger than its matrix, or a model that has adapters already.
    """
    notes = {}
    rows = [row for row, _ in planned(model, config, notes=notes)]
    rows += [PlannedModule(o.name, o.kind, (o.parameters, 1), 0, 0, 1, o.parameters, o.bytes)
             for o in beside(model, config) if o.parameters]
    made = Plan(rows)
    made.notes = notes
    return made


def planned(model: nn.Module, config: LoRAConfig, any_rank: bool = False,
            notes: dict[str, str] | None = None) -> list[tuple[PlannedModule, nn.Module]]:
    """The rows of a plan, each with its module; into `notes` come a `Plan`'s."""
    notes = {} if notes is None else notes
    need_plain(model)
    modules = dict(plain_modules(model, seen=set()))
    if len(modules) == 1:
        raise ValueError(f"the model is a bare {type(model).__name__}: nothing holds it, so nothing could hold a LoRA "
                         "layer in its place. Wrap it: nn.Sequential(model)")
    kinds = {name: kind for name, module in modules.items()
             if name and not inside_torch(modules, name) and (kind := kind_of(module))}
    others = beside(model, config)
    kinds = {name: kind for name, kind in kinds.items() if not any(other.covers(name) for other in others)}
    targets = choose(model, modules, kinds, config, notes) if config.target_modules else []
    for name in (name for other in others for name in other.of):
        notes.pop(name, None)
    for what, patterns in (("rank_pattern", config.rank_table), ("alpha_pattern", config.alpha_table)):
        for key in patterns.unused([*targets, *(name for other in others for name in other.of)]):
            raise ValueError(f"{what} key {quoted(key)} matches none of the targets; {suggest(key, targets)}")
    ties, rows, layer = tied(model), [], variants()[config.variant]
    away = [name for name in targets if any(p.is_meta for p in modules[name].parameters())
            and execution_device(modules[name]) is None]
    if away and not all(p.is_meta for p in model.parameters()):
        raise ValueError(f"{away[0]} has no weights (it is on the meta device) while other modules have theirs: load "
                         "the model whole, or let accelerate's dispatch_model bring its weights in")
    for name in targets:
        module, rank, (out, inp) = modules[name], config.rank_of(name), shape_of(modules[name])
        if rank > min(out, inp) and config.target_modules == ALL_LINEAR and rank == config.rank and not any_rank:
            rank = min(out, inp)
            notes[name] = f"rank {rank} in place of {config.rank}, the most that its weight of {out} x {inp} allows"
        if rank > min(out, inp) and not any_rank:
            raise ValueError(f"rank {rank} is larger than {name} allows: its weight is {out} x {inp}, so at most "
                             f"{min(out, inp)}")
        if kinds[name] not in layer.kinds:
            raise ValueError(f"{name}, a {type(module).__name__}, cannot be adapted by {layer.__name__}: expected "
                             f"{words(layer.kinds)}")
        count = sum(math.prod(shape) for own, shape in layer.shapes(out, inp, rank).items() if own not in layer.frozen)
        size = count * adapter_options(module)["dtype"].itemsize
        row = PlannedModule(name, kinds[name], (out, inp), rank, config.alpha_of(name),
                            scaling(rank, config.alpha_of(name), config.use_rslora),
                            count, size, min(ties[name], default=None))
        rows.append((row, module))
    return rows


def choose(model: nn.Module, modules: dict, kinds: dict, config: LoRAConfig, notes: dict | None = None) -> list[str]:
    """The names that the config's targets mean, in the model's order; `kinds` has the modules that can be adapted."""
    wanted, notes = config.target_modules, {} if notes is None else notes
    if wanted == ALL_LINEAR:
        meant = [name for name, m in modules.items()
                 if isinstance(m, nn.Linear) or kinds.get(name) in ("linear", "conv1d")]
        meant = [name for name in meant if not is_head(model, modules, name)]
        for name, m in modules.items():
            for key, p in m._parameters.items() if not isinstance(m, _ConvNd) else ():
                if p is not None and p.dim() == 3 and min(p.shape) > 1:
                    notes[f"{name}.{key}"] = (f"left frozen, a parameter of shape {tuple(p.shape)} (experts "
                                              "stacked?): adapters go around modules")
    elif isinstance(wanted, str):
        meant = [name for name, m in modules.items() if config.matches(name) and (name in kinds or m._parameters)]
    else:
        for entry in dict.fromkeys(wanted):
            if not any(entry_matches(entry, name) for name in modules):
                raise ValueError(f"target_modules: {quoted(entry)} matches no module; {suggest(entry, kinds)}")
        meant = [name for name in modules if config.matches(name)]
    for name in meant:
        if name not in kinds:
            why = ("the torch module around it reads its weight and never calls it" if inside_torch(modules, name)
                   else why_not(modules[name]))
            notes[name] = f"left out, a {type(modules[name]).__name__}: {why}"
            if not isinstance(wanted, str):
                entry = next(entry for entry in wanted if entry_matches(entry, name))
                raise ValueError(f"target_modules: {quoted(entry)} matches {name}, a "
                                 f"{type(modules[name]).__name__}, which cannot be adapted: {why}")
    found, odd = [name for name in meant if name in kinds], next(iter(notes.items()), None)
    if not found:
        what = (f"{quoted(wanted)}: the model has no linear layer besides its head" if wanted == ALL_LINEAR else
                f"the regular expression {quoted(wanted)} matches no whole name of a module that can be adapted; "
                f"{suggest(str(wanted), kinds)}")
        raise ValueError(f"target_modules{' ' if wanted == ALL_LINEAR else ': '}{what}"
                         + (f" ({': '.join(odd)})" if odd else ""))
    return found


def is_head(model: nn.Module, modules: dict, name: str) -> bool:
    """Whether a linear is the output head: of a language model, or (all that a Hugging Face model has around its
    `base_model`) of a classifier."""
    model = bare(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if modules[name] is head or entry_matches("lm_head", name):
        return True
    inner = getattr(model, "base_model", None) if head is None else None
    return isinstance(inner, nn.Module) and inner is not model and all(m is not modules[name] for m in inner.modules())


def inside_torch(modules: dict, name: str) -> bool:
    """torch's own attention, and in its fast path its encoder layer, read weights past the forward of the modules that
    hold them: an adapter there would do nothing, in silence."""
    parent = modules.get(name.rpartition(".")[0])
    return isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer))


def tied(model: nn.Module) -> dict[str, set[str]]:
    """Module -> the other modules that have a parameter in the same place of the same storage."""
    users, others = defaultdict(set), defaultdict(set)
    for name, module in plain_modules(model, seen=set()):
        kept = module.replaced().values() if isinstance(module, AdapterLayer) else ()
        for p in (*module.parameters(recurse=False), *kept):
            users[p.untyped_storage()._cdata, p.storage_offset()].add(name)
    for group in users.values():
        for name in group:
            others[name] |= group - {name}
    return others


def need_plain(model: nn.Module) -> None:
    if any(isinstance(m, AdapterLayer) for m in model.modules()):
        raise ValueError("the model has adapters already; remove(model) first, or load several with AdapterBank")
    if any(type(m).__module__.startswith("peft.tuners") for m in model.modules()):
        raise ValueError("PEFT has adapted this model already: take its base (merge_and_unload() or unload()) first")
