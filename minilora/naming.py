"""What a module is called in the bare model: the names on disk and in messages, whatever stands around modules now."""

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from torch import Tensor, nn

from .layers import AdapterLayer

# class of a wrapper -> the attribute that holds what it wraps: torch.compile, DDP and the like, checkpointing, FSDP 1
WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module",
            "CheckpointWrapper": "_checkpoint_wrapped_module", "OffloadWrapper": "_checkpoint_wrapped_module",
            "FullyShardedDataParallel": "_fsdp_wrapped_module"}


def wrapped_at(module: nn.Module) -> tuple[str, ...]:
    """Under which names a module holds what it only stands around; none for one that is part of the model."""
    if isinstance(module, AdapterLayer):
        return "base_layer", "copy"
    name = WRAPPERS.get(type(module).__name__) if type(module).__module__.startswith("torch.") else None
    return (name,) if name else ()


def bare(model: nn.Module) -> nn.Module:
    """The model without the wrappers around the whole of it."""
    while (names := wrapped_at(model)) and not isinstance(model, AdapterLayer):
        model = model.get_submodule(names[0])
    return model


def plain_modules(module: nn.Module, name: str = "", seen: set | None = None) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules`, by the names of the bare model: a wrapper is called as what it wraps, and comes before it.

    With `seen` (a set, at first empty) a module that stands in several places comes once.
    """
    if seen is not None and module in seen:
        return
    if seen is not None:
        seen.add(module)
    yield name, module
    inner = wrapped_at(module)
    for key, child in module._modules.items():
        if child is not None:
            yield from plain_modules(child, name if key in inner else f"{name}.{key}" if name else key, seen)


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters`, by the names of the bare model; a tied one under each of its names."""
    for name, module in plain_modules(model):
        for key, p in module._parameters.items():
            if p is not None:
                yield f"{name}.{key}" if name else key, p


def starts(name: str) -> list[str]:
    """The names of all that holds a module, from the whole model, "", down to itself."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def part_of(name: str) -> str:
    """The part of the model that a module belongs to: the stack of layers (its name up to the first number), or else
    what holds it."""
    return re.split(r"\.?\b\d+\b", name)[0] if re.search(r"\b\d+\b", name) else name.rpartition(".")[0]


def suggest(wanted: str, names: Iterable[str]) -> str:
    """The names a mistyped one may have meant, as the end of an error message."""
    if not names:
        return "the model has no module that can be adapted"
    wanted = wanted[:100]  # comparing takes the square of the length
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    close = get_close_matches(wanted, [*last, *names], cutoff=0.5) or get_close_matches(wanted.lower(), last, 3, 0.3)
    return f"near it: {', '.join(close)}" if close else f"there are: {', '.join(last[:12])}"
