"""LoRA over a whole model: plan it, insert it, look at what trains, merge it, take it out again."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from .config import ALL_LINEAR, LoRAConfig, entry_matches, pattern_matches, variants
from .layers import AdapterLayer, LoRALayer, adapter_options, kind_of, quantised, shape_of, words
from .tables import table


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
    """What `inject` would do: `PlannedModule`s; printing gives a table."""

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
        return table(head, rows) + f"\n{len(self)} modules, {self.parameters:,} parameters, {self.bytes:,} bytes"


@dataclass(frozen=True)
class Report:
    """What trains in a model. `rows`: (module, trainable, all) for every module that trains a parameter of its own."""

    rows: tuple[tuple[str, int, int], ...]
    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / self.total if self.total else 0.0

    def __str__(self):
        body = table(("module", "trainable", "all"), self.rows) + "\n" if self.rows else ""
        return body + f"trainable {self.trainable:,} / all {self.total:,} = {self.share:.4%}"


def plan(model: nn.Module, config: LoRAConfig) -> Plan:
    """What `inject(model, config)` would adapt, at which rank, for how many parameters. Nothing is changed.

    Raises:
        ValueError: a target or a pattern's key that matches nothing (near misses are listed), a target that cannot be
            adapted, a rank larger than its matrix, or a model that has adapters already.
    """
    return Plan(row for row, _ in planned(model, config))


METHODS: dict[type, Callable] = {}  # type of a config -> f(model, config, any_rank) -> {module: its adapter}


def inject(model: nn.Module, config, any_rank: bool = False) -> nn.Module:
    """Put adapters around what `config` names, in place, and freeze everything else. Returns `model`.

    `config` is a `LoRAConfig`, or that of a relative of LoRA (peft_methods.py). With LoRA the outputs stay as they are,
    bit for bit, until training moves the adapters. All or nothing: after an error the model is as it was. With
    `any_rank`, ranks may exceed their matrix's: wasteful, but adapter files have them.

    Raises:
        ValueError: no such method, a model that has adapters already or lacks what the method needs; as `plan` does.
    """
    around = next((METHODS[kind] for kind in type(config).__mro__ if kind in METHODS), None)
    if around is None:
        others = ", ".join(method.__name__ for method in METHODS if method is not LoRAConfig)
        raise ValueError(f"expected a LoRAConfig or one of {others or 'those in peft_methods'}, got {config!r}")
    need_plain(model)
    layers = around(model, config, any_rank)
    for module, layer in layers.items():
        layer.train(module.training).config = config
    wrap(model, layers)
    return model


def lora_around(model: nn.Module, config: LoRAConfig, any_rank: bool) -> dict[nn.Module, LoRALayer]:
    """A LoRA layer for every module of the plan."""
    rows, layer = planned(model, config, any_rank), variants()[config.variant]
    shared = layer.shared([row.shape for row, _ in rows], config)
    return {module: layer(module, row.rank, row.alpha, config.dropout, config.use_rslora, **shared)
            for row, module in rows}


METHODS[LoRAConfig] = lora_around


def remove(model: nn.Module) -> nn.Module:
    """The model as it was before `inject`: its own modules, weights and trainable flags. Returns `model`.

    Raises ValueError if it has no adapters, as all that follows does.
    """
    layers = adapter_layers(model)
    for layer in layers.values():
        if isinstance(layer, LoRALayer):
            layer.unmerge()
    unwrap(model, layers.values())
    return model


def merge(model: nn.Module, permanent: bool = False) -> dict[str, float]:
    """Add every update into its weight, rounded once, so that the adapter costs nothing at inference.

    Until `unmerge` the base's own weights are kept too; with `permanent` they go, and plain modules are left.

    Returns:
        Per module, the share of the update that the weight's precision swallowed: ||rounding|| / ||update||.

    Raises:
        ValueError: a quantised base, a sum that overflows its dtype, or, with `permanent`, a weight that is tied to
            another module's. The model is then as before.
    """
    layers = lora_layers(model)
    if permanent:
        for name, others in tied(model).items():
            if name in layers and others:
                raise ValueError(f"cannot merge {name} for good: its weight is tied to {min(others)}, and a checkpoint "
                                 "keeps one of the two. Untie them (give one a copy), or merge for inference only")
    fresh, lost = [layer for layer in layers.values() if not layer.merged], {}
    try:
        for name, layer in layers.items():
            lost[name] = layer.merge()
    except Exception as e:
        for layer in fresh:
            layer.unmerge()
        if isinstance(e, ValueError):
            raise ValueError(f"{name}: {e}") from None
        raise
    if permanent:
        replace(model, {layer: layer.base_layer for layer in layers.values()})
        model.__dict__.pop("trained_before_lora", None)
    return lost


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every base weight is the very tensor it was."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def report(model: nn.Module) -> Report:
    """How many parameters train, of how many, and in which modules; works with and without adapters."""
    rows = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if trainable := sum(p.numel() for p in own if p.requires_grad):
            inside = sum(p.numel() for p in own)
            if isinstance(module, LoRALayer):
                inside = sum(p.numel() for p in module.parameters()) + weights_in_codes(module)
            rows.append((plain_name(name) or "(model)", trainable, inside))
    every = list(model.parameters())  # a tied weight counts once
    total = sum(p.numel() for p in every) + weights_in_codes(model)
    return Report(tuple(rows), sum(p.numel() for p in every if p.requires_grad), total)


def weights_in_codes(model: nn.Module) -> int:
    """How many weights quantised linears hold: no parameters, but weights all the same."""
    return sum(m.in_features * m.out_features for m in model.modules()
               if not isinstance(m, AdapterLayer) and quantised(m))


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all adapters, LoRA's or a relative's: what an optimizer should be given."""
    return [p for layer in adapter_layers(model).values() for p in layer.own().values()]


def loraplus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict]:
    """Optimizer groups of LoRA+ (Hayou et al. 2024, 2402.12354, section 4): B learns `ratio` times as fast as A.

    It is the factor that starts at zero that gets the larger rate: B, but in an embedding A.

    Raises:
        ValueError: a ratio that is not positive.
    """
    if not ratio > 0:
        raise ValueError(f"ratio must be above 0, got {ratio!r}")
    fast = [layer.lora_A if layer.kind == "embedding" else layer.lora_B for layer in lora_layers(model).values()]
    slow = [p for p in lora_parameters(model) if all(p is not f for f in fast)]
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Every adapter, of whatever method, by the name its base had in the plain model; a ValueError if there is none."""
    found = {plain_name(name): m for name, m in model.named_modules() if isinstance(m, AdapterLayer)}
    if not found:
        raise ValueError("the model has no adapters; inject(model, config) or load_adapter(model, folder) first")
    return found


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Every LoRA layer by the name its base had in the plain model; a ValueError if there is none."""
    for name, layer in (found := adapter_layers(model)).items():
        if not isinstance(layer, LoRALayer):
            raise ValueError(f"the adapter at {name} is no LoRA: this works on LoRA layers alone, got {layer.config!r}")
    return found


def need_plain(model: nn.Module) -> None:
    if any(isinstance(m, AdapterLayer) for m in model.modules()):
        raise ValueError("the model has adapters already; remove(model) first, or load several with AdapterBank")


# How a plan is made


def planned(model: nn.Module, config: LoRAConfig, any_rank: bool = False) -> list[tuple[PlannedModule, nn.Module]]:
    """The rows of a plan, each with its module."""
    need_plain(model)
    modules = dict(model.named_modules())
    if len(modules) == 1:
        raise ValueError(f"the model is a bare {type(model).__name__}: nothing holds it, so nothing could hold a LoRA "
                         "layer in its place. Wrap it: nn.Sequential(model)")
    kinds = {name: kind for name, module in modules.items()
             if name and not inside_torch(modules, name) and (kind := kind_of(module))}
    targets = choose(model, modules, kinds, config)
    for what, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in patterns:
            if not any(pattern_matches(key, name) for name in targets):
                raise ValueError(f"{what} key {key!r} matches none of the targets; {suggest(key, targets)}")
    ties, rows, layer = tied(model), [], variants()[config.variant]
    for name in targets:
        module, rank, (out, inp) = modules[name], config.rank_of(name), shape_of(modules[name])
        if rank > min(out, inp) and not any_rank:
            raise ValueError(f"rank {rank} is larger than {name} allows: its weight is {out} x {inp}, so at most "
                             f"{min(out, inp)}")
        if kinds[name] not in layer.kinds:
            raise ValueError(f"{name}, a {type(module).__name__}, cannot be adapted by {layer.__name__}: expected "
                             f"{words(layer.kinds)}")
        count = sum(math.prod(shape) for own, shape in layer.shapes(out, inp, rank).items() if own not in layer.frozen)
        size = count * adapter_options(module)["dtype"].itemsize
        row = PlannedModule(name, kinds[name], (out, inp), rank, config.alpha_of(name), config.scaling_of(name),
                            count, size, min(ties[name], default=None))
        rows.append((row, module))
    return rows


def choose(model: nn.Module, modules: dict, kinds: dict, config: LoRAConfig) -> list[str]:
    """The names that the config's targets mean, in the model's order; `kinds` has the modules that can be adapted."""
    wanted = config.target_modules
    if wanted == ALL_LINEAR:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found = [name for name, kind in kinds.items()
                 if kind != "embedding" and modules[name] is not head and not entry_matches("lm_head", name)]
        if not found:
            raise ValueError("target_modules 'all-linear': the model has no linear layer besides its head")
        return found
    found = [name for name in kinds if config.matches(name)]
    if isinstance(wanted, str):
        if not found:
            raise ValueError(f"target_modules: the regular expression {wanted!r} matches no whole name of a module "
                             f"that can be adapted; {suggest(wanted, kinds)}")
        return found
    for entry in wanted:
        hits = [name for name in modules if entry_matches(entry, name)]
        if not hits:
            raise ValueError(f"target_modules: {entry!r} matches no module; {suggest(entry, kinds)}")
        for name in hits:
            if name not in kinds:
                why = ("the torch module around it reads its weight and never calls it" if inside_torch(modules, name)
                       else "expected Linear, Conv1D or Embedding")
                raise ValueError(f"target_modules: {entry!r} matches {name}, a {type(modules[name]).__name__}, which "
                                 f"cannot be adapted: {why}")
    return found


def inside_torch(modules: dict, name: str) -> bool:
    """torch's own attention, and in its fast path its encoder layer, read weights past the forward of the modules that
    hold them: an adapter there would do nothing, in silence."""
    parent = modules.get(name.rpartition(".")[0])
    return isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer))


def suggest(wanted: str, names: Iterable[str]) -> str:
    """The names a mistyped one may have meant, as the end of an error message."""
    if not names:
        return "the model has no module that can be adapted"
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    close = get_close_matches(wanted, [*last, *names], cutoff=0.5) or get_close_matches(wanted.lower(), last, 3, 0.3)
    return f"near it: {', '.join(close)}" if close else f"there are: {', '.join(last[:12])}"


def tied(model: nn.Module) -> dict[str, set[str]]:
    """Module -> the other modules that have a parameter in the same place of the same storage."""
    users, others = defaultdict(set), defaultdict(set)
    for name, module in model.named_modules():
        kept = module.unmerged[:1] if isinstance(module, LoRALayer) else ()
        for p in (*module.parameters(recurse=False), *kept):
            users[p.untyped_storage()._cdata, p.storage_offset()].add(plain_name(name))
    for group in users.values():
        for name in group:
            others[name] |= group - {name}
    return others


def wrap(model: nn.Module, layers: dict[nn.Module, nn.Module]) -> None:
    """Freeze the model and put ``layers[base]`` in the place of each base; `take` undoes both."""
    model.trained_before_lora = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    replace(model, layers)


def unwrap(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    replace(model, {layer: layer.base_layer for layer in layers})
    for p in model.__dict__.pop("trained_before_lora", ()):
        p.requires_grad_(True)


def replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put new[child] wherever a child stands, also where one module stands in several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]


def plain_name(name: str) -> str:
    """A parameter's or module's name as it was before `inject`."""
    return re.sub(r"(^|\.)base_layer(\.|$)", lambda m: m[1] and m[2], name)
