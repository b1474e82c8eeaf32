"""LoRA over a whole model: plan it, insert it, look at what trains, merge it, take it out again."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from .bases import adapter_options, execution_device, kind_of, quantised, shape_of, why_not, words
from .config import ALL_LINEAR, LoRAConfig, entry_matches, scaling, variants
from .layers import AdapterLayer, LoRALayer
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


@dataclass(frozen=True)
class Report:
    """What trains in a model. `rows`: (module, trainable, all) for every module that trains a parameter of its own.

    `no_gradient`: after a backward pass, the adapters that it did not reach.
    """

    rows: tuple[tuple[str, int, int], ...]
    trainable: int
    total: int
    no_gradient: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        return self.trainable / self.total if self.total else 0.0

    def __str__(self):
        body = table(("module", "trainable", "all"), self.rows) + "\n" if self.rows else ""
        dead = f"\nno gradient reached: {', '.join(self.no_gradient)}" if self.no_gradient else ""
        return body + f"trainable {self.trainable:,} / all {self.total:,} = {self.share:.4%}{dead}"


def plan(model: nn.Module, config: LoRAConfig) -> Plan:
    """What `inject(model, config)` would adapt, at which rank, for how many parameters. Nothing is changed.

    Raises:
        ValueError: a target or a pattern's key that matches nothing (near misses are listed), a target that cannot be
            adapted, a rank larger than its matrix, or a model that has adapters already.
    """
    notes = {}
    made = Plan(row for row, _ in planned(model, config, notes=notes))
    made.notes = notes
    return made


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
    for name, layer in adapter_layers(model).items():
        layer.__dict__["name"] = name  # for what it may have to say
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
    need_whole(model)
    put_back(model, [layer for layer in layers.values() if isinstance(layer, LoRALayer)])
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
    need_whole(model)
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
        bare(model).__dict__.pop("trained_before_lora", None)
    return lost


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every base weight is the very tensor it was."""
    put_back(model, lora_layers(model).values())


def put_back(model: nn.Module, layers: Iterable[LoRALayer]) -> None:
    """Unmerge these layers, also where something else has been tied to a merged weight since."""
    before = {layer.base_layer.weight: layer.unmerged[0] for layer in layers if layer.merged}
    for layer in layers:
        layer.unmerge()
    for module in model.modules() if before else ():
        for name, p in module._parameters.items():
            if p in before:
                module._parameters[name] = before[p]


def report(model: nn.Module) -> Report:
    """How many parameters train, of how many, and in which modules; works with and without adapters."""
    rows = []
    for name, module in plain_modules(model, seen=set()):
        own = list(module.parameters(recurse=False))
        if trainable := sum(p.numel() for p in own if p.requires_grad):
            inside = sum(p.numel() for p in own)
            if isinstance(module, LoRALayer):
                inside = sum(p.numel() for p in module.parameters()) + weights_in_codes(module)
            rows.append((name or "(model)", trainable, inside))
    every = list(model.parameters())  # a tied weight counts once
    total = sum(p.numel() for p in every) + weights_in_codes(model)
    return Report(tuple(rows), sum(p.numel() for p in every if p.requires_grad), total, without_gradient(model))


def without_gradient(model: nn.Module) -> tuple[str, ...]:
    """The adapters that train and that the last backward pass did not reach: nothing that they are for calls them, or
    (an expert) nothing was sent to them. Empty where no parameter has a gradient."""
    if all(p.grad is None for p in model.parameters()):
        return ()
    own = {name: [p for p in m.own().values() if p.requires_grad] for name, m in plain_modules(model, seen=set())
           if isinstance(m, AdapterLayer)}
    return tuple(name for name, params in own.items() if params and all(p.grad is None for p in params))


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
    found = {name: m for name, m in plain_modules(model, seen=set()) if isinstance(m, AdapterLayer)}
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
    if any(type(m).__module__.startswith("peft.tuners") for m in model.modules()):
        raise ValueError("PEFT has adapted this model already: take its base (merge_and_unload() or unload()) first")


def need_whole(model: nn.Module) -> None:
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise ValueError("the model is shared out over several processes (fsdp), and no process has its weights whole: "
                         "save_adapter(model, folder), then load that into a model of one process")


# How a plan is made


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
    targets = choose(model, modules, kinds, config, notes)
    for what, patterns in (("rank_pattern", config.rank_table), ("alpha_pattern", config.alpha_table)):
        for key in patterns.unused(targets):
            raise ValueError(f"{what} key {quoted(key)} matches none of the targets; {suggest(key, targets)}")
    ties, rows, layer = tied(model), [], variants()[config.variant]
    away = [name for name in targets if any(p.is_meta for p in modules[name].parameters())
            and execution_device(modules[name]) is None]
    if away and not all(p.is_meta for p in model.parameters()):
        raise ValueError(f"{away[0]} has no weights (it is on the meta device) while other modules have theirs: load the "
                         "model whole, or let accelerate's dispatch_model bring its weights in")
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
        meant = [name for name, m in modules.items() if isinstance(m, nn.Linear) or kinds.get(name, "embedding") != "embedding"]
        meant = [name for name in meant if not is_head(model, modules, name)]
    elif isinstance(wanted, str):
        meant = [name for name, m in modules.items() if config.matches(name) and (name in kinds or m._parameters)]
    else:
        for entry in dict.fromkeys(wanted):
            if not any(entry_matches(entry, name) for name in modules):
                raise ValueError(f"target_modules: {entry!r} matches no module; {suggest(entry, kinds)}")
        meant = [name for name in modules if config.matches(name)]
    for name in meant:
        if name not in kinds:
            why = ("the torch module around it reads its weight and never calls it" if inside_torch(modules, name)
                   else why_not(modules[name]))
            notes[name] = f"left out, a {type(modules[name]).__name__}: {why}"
            if not isinstance(wanted, str):
                entry = next(entry for entry in wanted if entry_matches(entry, name))
                raise ValueError(f"target_modules: {entry!r} matches {name}, a {type(modules[name]).__name__}, which "
                                 f"cannot be adapted: {why}")
    found, odd = [name for name in meant if name in kinds], next(iter(notes.items()), None)
    if not found:
        what = (f"{wanted!r}: the model has no linear layer besides its head" if wanted == ALL_LINEAR else
                f"the regular expression {wanted!r} matches no whole name of a module that can be adapted; "
                f"{suggest(wanted, kinds)}")
        raise ValueError(f"target_modules{' ' if wanted == ALL_LINEAR else ': '}{what}" + (f" ({': '.join(odd)})" if odd else ""))
    return found


def is_head(model: nn.Module, modules: dict, name: str) -> bool:
    """Whether a linear is the output head: of a language model, or (all that a Hugging Face model has around its
    `base_model`) of a classifier."""
    model = bare(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
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
        kept = module.unmerged[:1] if isinstance(module, LoRALayer) else ()
        for p in (*module.parameters(recurse=False), *kept):
            users[p.untyped_storage()._cdata, p.storage_offset()].add(name)
    for group in users.values():
        for name in group:
            others[name] |= group - {name}
    return others


def wrap(model: nn.Module, layers: dict[nn.Module, nn.Module]) -> None:
    """Freeze the model and put ``layers[base]`` in the place of each base; `take` undoes both."""
    bare(model).trained_before_lora = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    replace(model, layers)


def unwrap(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    replace(model, {layer: layer.base_layer for layer in layers})
    for p in bare(model).__dict__.pop("trained_before_lora", ()):
        p.requires_grad_(True)


def replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put new[child] wherever a child stands, also where one module stands in several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
                if hasattr(parent, "_orig_mod"):  # torch.compile around this very layer has bound its forward
                    parent._initialize()
