"""What a config asks for beside A and B around layers: modules, rows of an embedding or stacked experts that train."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from .bases import adapter_options, kind_of
from .config import LoRAConfig, entry_matches, require
from .layers import AdapterLayer
from .naming import bare, plain_modules, suggest
from .parameters import TOKENS_KEY, StackedLoRA, TrainedRows, stacked_keys, stacked_shapes
from .tables import quoted
from .trained_copy import TrainedCopy, state_of


@dataclass(frozen=True)
class Beside:
    """One of them.

    Attributes:
        kind: "whole", "rows" or "experts".
        make: its adapter, from the module.
        shapes: those of its tensors in a file, by the end of their keys.
        parameters, bytes: how much of it trains.
        of: the parameters it adapts, by their whole names, where it leaves the rest of the module alone.
    """

    name: str
    module: nn.Module
    kind: str
    make: Callable[[nn.Module], AdapterLayer]
    shapes: dict[str, tuple[int, ...]]
    parameters: int
    bytes: int
    of: tuple[str, ...] = ()

    def covers(self, name: str) -> bool:
        """Whether it leaves no room for LoRA around the module called `name`."""
        return name == self.name or self.kind == "whole" and name.startswith(f"{self.name}.")


def beside(model: nn.Module, config: LoRAConfig) -> list[Beside]:
    """What the config asks for beside its targets.

    Raises:
        ValueError: a name that matches nothing (near misses are listed), or a module named twice.
    """
    if not (config.modules_to_save or config.trainable_tokens or config.target_parameters):
        return []
    if config.trainable_tokens or config.target_parameters:
        require(config.variant in ("lora", "dora"), "trainable_tokens and target_parameters go with plain LoRA and "
                "DoRA", config.variant)
    modules = dict(plain_modules(model, seen=set()))
    found = [*whole(modules, config), *token_rows(model, modules, config), *experts(modules, config)]
    names = [other.name for other in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is named twice among modules_to_save, trainable_tokens and target_parameters")
    return found


def around(found: list[Beside]) -> dict[nn.Module, AdapterLayer]:
    """The adapters, by module."""
    return {other.module: other.make(other.module) for other in found}


def meant(setting: str, entries, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that entries of a setting mean; every entry must mean one."""
    for entry in entries:
        if not any(entry_matches(entry, name) for name in modules):
            raise ValueError(f"{setting}: {quoted(entry)} matches no module; {suggest(entry, modules)}")
    return {name: m for name, m in modules.items() if any(entry_matches(entry, name) for entry in entries)}


def whole(modules: dict[str, nn.Module], config: LoRAConfig) -> list[Beside]:
    """The outermost modules that `modules_to_save` names."""
    found = meant("modules_to_save", config.modules_to_save, modules)
    outer = {name: m for name, m in found.items() if not any(name.startswith(f"{other}.") for other in found)}
    return [Beside(name, m, "whole", TrainedCopy, {end: tuple(t.shape) for end, t in state_of(m).items()},
                   sum(p.numel() for p in m.parameters()), sum(p.nbytes for p in m.parameters()))
            for name, m in outer.items()]


def token_rows(model: nn.Module, modules: dict[str, nn.Module], config: LoRAConfig) -> list[Beside]:
    """The embeddings that `trainable_tokens` names, and the heads that are tied to them."""
    model, found = bare(model), []
    for entry, tokens in config.trainable_tokens.items():
        usual = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        if usual is not None and entry == "embed_tokens" and not any(entry_matches(entry, name) for name in modules):
            named = {name: m for name, m in modules.items() if m is usual}  # PEFT's word for whatever embeds the tokens
        else:
            named = meant("trainable_tokens", [entry], modules)
        for name, m in named.items():
            weight = m._parameters.get("weight")
            if weight is None or kind_of(m) not in ("embedding", "linear"):
                raise ValueError(f"trainable_tokens: {quoted(entry)} matches {name}, a {type(m).__name__}, expected an "
                                 "Embedding, or a Linear over the vocabulary")
            require(max(tokens) < len(weight), f"trainable_tokens: {name} has {len(weight)} rows", max(tokens))
            count, width = len(tokens), weight.shape[1]
            first = Shared(tokens)
            found.append(Beside(name, m, "rows", first, {TOKENS_KEY: (count, width)}, count * width,
                                count * width * adapter_options(m)["dtype"].itemsize, (f"{name}.weight",)))
            found += [Beside(other, twin, "rows", first, {}, 0, 0, (f"{other}.weight",))
                      for other, twin in modules.items() if twin is not m and twin._parameters.get("weight") is weight]
    return found


class Shared:
    """Makes the rows of an embedding once, and of what is tied to it from the same."""

    def __init__(self, tokens: tuple[int, ...]):
        self.tokens, self.first = tokens, None

    def __call__(self, module: nn.Module) -> TrainedRows:
        layer = TrainedRows(module, self.tokens, self.first)
        self.first = self.first or layer
        return layer


def experts(modules: dict[str, nn.Module], config: LoRAConfig) -> list[Beside]:
    """The modules whose parameters `target_parameters` names."""
    found, unseen = [], dict.fromkeys(config.target_parameters)
    for name, m in modules.items():
        own = {key: f"{name}.{key}" for key, p in m._parameters.items() if p is not None and name}
        chosen = {key: full for key, full in own.items()
                  if any(entry_matches(entry, full) for entry in config.target_parameters)}
        for full in chosen.values():
            for entry in [entry for entry in unseen if entry_matches(entry, full)]:
                del unseen[entry]
        if not chosen:
            continue
        for key, full in chosen.items():
            require(m._parameters[key].dim() in (2, 3), f"target_parameters: {full} must have 2 or 3 dimensions",
                    tuple(m._parameters[key].shape))
        require(not config.dropout and not config.use_dora,
                "target_parameters know no dropout and no DoRA: there is no input to drop from", config)
        ranks = {key: config.rank_of(full) for key, full in chosen.items()}
        alphas = {key: config.alpha_of(full) for key, full in chosen.items()}
        sizes = {key: stacked_shapes(m, key, rank) for key, rank in ranks.items()}
        shapes = {end: sizes[key][which] for (which, key), end in stacked_keys(ranks).items()}
        count = sum(math.prod(shape) for shape in shapes.values())
        make = partial(StackedLoRA, ranks=ranks, alphas=alphas, use_rslora=config.use_rslora)
        found.append(Beside(name, m, "experts", make, shapes, count,
                            count * adapter_options(m)["dtype"].itemsize, tuple(chosen.values())))
    if unseen:
        names = [f"{n}.{key}" for n, m in modules.items() for key in m._parameters]
        raise ValueError(f"target_parameters: {quoted(next(iter(unseen)))} matches no parameter; "
                         f"{suggest(next(iter(unseen)), names)}")
    return found
