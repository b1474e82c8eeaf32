"""LoRA from scratch, in pure PyTorch: ``from minilora import LoRAConfig, inject, merge, save_adapter``.

Names are looked up when first used, so that the memory calculator (``minilora.memory``) never waits for torch. No room
may bear the name of a function that is looked up here: importing it would put the module in the function's place.
"""

from importlib import import_module

__version__ = "0.1.0"  # pyproject.toml reads it here

_HOME = {
    "config": ("LoRAConfig",),
    "layers": ("LoRALayer",),
    "injection": ("plan", "inject", "remove", "merge", "unmerge", "report", "lora_parameters"),
    "adapters": ("save_adapter", "load_adapter", "fingerprint"),
    "bank": ("AdapterBank",),
}
_ROOM = {name: room for room, names in _HOME.items() for name in names}
__all__ = sorted(_ROOM)


def __getattr__(name: str):
    if name not in _ROOM:
        raise AttributeError(f"module 'minilora' has no attribute {name!r}")
    return getattr(import_module(f"minilora.{_ROOM[name]}"), name)


def __dir__():
    return __all__
