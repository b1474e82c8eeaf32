"""LoRA over a whole model: insert it, look at what trains, merge it, take it out again (planning.py plans it)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard, cast

from torch import nn

from .bases import quantised, shape_of
from .beside import around, beside
from .config import LoRAConfig, variants
from .distributed import flat
from .layers import AdapterLayer, LoRALayer, Wrapper
from .naming import bare, plain_modules
from .parameters import ParameterAdapter
from .planning import need_plain, plan, planned, tied
from .tables import table
from .trained_copy import TrainedCopy

if TYPE_CHECKING:
    from torch._dynamo import OptimizedModule

__all__ = ["inject", "lora_parameters", "loraplus_groups", "merge", "plan", "remove", "report", "unmerge"]


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


Mergeable = LoRALayer | ParameterAdapter | TrainedCopy  # the adapters with merge(), unmerge() and merged
METHODS: dict[type, Callable] = {}  # type of a config -> f(model, config, any_rank) -> {module: its adapter}


def inject(model: nn.Module, config, any_rank: bool = False) -> nn.Module:
    """Put adapters around what `config` names, in place, and freeze everything else. Returns `model`.

    `config` is a `LoRAConfig`, or that of a relative of LoRA (peft_methods.py). With LoRA the outputs stay as they are,
    bit for bit, until training moves the adapters. All or nothing: after an error the model is as it was. With
    `any_rank`, ranks may exceed their matrix's: wasteful, but adapter files have them.

    Raises:
        ValueError: no such method, a model that has adapters already or lacks what the method needs; as `plan` does.
    """
    method = next((METHODS[kind] for kind in type(config).__mro__ if kind in METHODS), None)
    if method is None:
        others = ", ".join(kind.__name__ for kind in METHODS if kind is not LoRAConfig)
        raise ValueError(f"expected a LoRAConfig or one of {others or 'those in peft_methods'}, got {config!r}")
    need_plain(model)
    layers = method(model, config, any_rank)
    for module, layer in layers.items():
        layer.train(module.training).config = config
    wrap(model, layers)
    for name, layer in adapter_layers(model).items():
        layer.__dict__["name"] = name  # for what it may have to say
    return model


def lora_around(model: nn.Module, config: LoRAConfig, any_rank: bool) -> dict[nn.Module, AdapterLayer]:
    """A LoRA layer for every module of the plan, and what the config asks for beside them."""
    rows, layer = planned(model, config, any_rank), variants()[config.variant]
    shared = layer.shared([row.shape for row, _ in rows], config)
    return {module: layer(module, row.rank, row.alpha, config.dropout, config.use_rslora, **shared)
            for row, module in rows} | around(beside(model, config))


METHODS[LoRAConfig] = lora_around


def remove(model: nn.Module) -> nn.Module:
    """The model as it was before `inject`: its own modules, weights and trainable flags. Returns `model`.

    Raises ValueError if it has no adapters, as all that follows does.
    """
    layers = adapter_layers(model)
    need_whole(model)
    put_back(model, layers.values())
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
    layers = mergeable_layers(model)
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
        replace(model, {layer: layer.plain_module() for layer in layers.values()})
        bare(model).__dict__.pop("trained_before_lora", None)
    return lost


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every base weight is the very tensor it was."""
    put_back(model, mergeable_layers(model).values())


def put_back(model: nn.Module, layers: Iterable[AdapterLayer]) -> None:
    """Unmerge those of these layers that can be merged, also where something else has been tied to a merged weight
    since."""
    able = [layer for layer in layers if can_merge(layer)]
    before = {new: own for layer in able for new, own in layer.replaced().items()}
    for layer in able:
        layer.unmerge()
    for module in model.modules() if before else ():
        for name, p in module._parameters.items():
            if p is not None and p in before:
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


def without_gradient(model: nn.Module, after_backward: bool = False) -> tuple[str, ...]:
    """The adapters that train and that the last backward pass did not reach: nothing that they are for calls them, or
    (an expert) nothing was sent to them. Where no parameter has a gradient, none: there may have been no backward pass,
    unless the caller knows better."""
    if not after_backward and all(p.grad is None for p in model.parameters()):
        return ()
    own = {name: [p for p in m.own().values() if p.requires_grad] for name, m in plain_modules(model, seen=set())
           if isinstance(m, AdapterLayer)}
    return tuple(name for name, params in own.items() if params and all(p.grad is None for p in params))


def weights_in_codes(model: nn.Module) -> int:
    """How many weights quantised linears hold: no parameters, but weights all the same."""
    layers = [m for m in model.modules() if not isinstance(m, AdapterLayer) and quantised(m)]
    packed = sum(p.numel() for m in layers if (p := m._parameters.get("weight")) is not None)  # bitsandbytes' codes
    return sum(math.prod(shape_of(m)) for m in layers) - packed


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all adapters, LoRA's or a relative's: what an optimizer should be given."""
    return list(dict.fromkeys(p for layer in adapter_layers(model).values() for p in layer.own().values()))


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


def mergeable_layers(model: nn.Module) -> dict[str, Mergeable]:
    """The adapters that can be merged, by name; a ValueError if there is none, or a relative of LoRA."""
    found = {}
    for name, layer in adapter_layers(model).items():
        if not can_merge(layer):
            raise ValueError(f"the adapter at {name} is no LoRA: this works on LoRA layers alone, got {layer.config!r}")
        found[name] = layer
    return found


def can_merge(layer: AdapterLayer) -> TypeGuard[Mergeable]:
    return layer.mergeable


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Every LoRA layer by the name its base had in the plain model; a ValueError if there is none."""
    return {name: layer for name, layer in mergeable_layers(model).items() if isinstance(layer, LoRALayer)}


def need_whole(model: nn.Module) -> None:
    if flat(model) or any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise ValueError("the model is shared out over several processes (fsdp), and no process has its weights whole: "
                         "save_adapter(model, folder), then load that into a model of one process")


def wrap(model: nn.Module, layers: dict[nn.Module, nn.Module]) -> None:
    """Freeze the model and put ``layers[base]`` in the place of each base; `take` undoes both."""
    bare(model).__dict__["trained_before_lora"] = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    replace(model, layers)


def unwrap(model: nn.Module, layers: Iterable[AdapterLayer | Wrapper]) -> None:
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
                    cast("OptimizedModule", parent)._initialize()
