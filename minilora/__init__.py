"""LoRA from scratch, in pure PyTorch: ``from minilora import LoRAConfig, inject, merge, save_adapter``.

Names are looked up when first used, so that the memory calculator (``minilora.memory``) never waits for torch. No room
may bear the name of a function that is looked up here: importing it would put the module in the function's place.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that a type checker sees what these names are
    from .adapters import fingerprint as fingerprint
    from .adapters import load_adapter as load_adapter
    from .adapters import save_adapter as save_adapter
    from .bank import AdapterBank as AdapterBank
    from .config import LoRAConfig as LoRAConfig
    from .injection import inject as inject
    from .injection import lora_parameters as lora_parameters
    from .injection import merge as merge
    from .injection import plan as plan
    from .injection import remove as remove
    from .injection import report as report
    from .injection import unmerge as unmerge
    from .layers import LoRALayer as LoRALayer

__version__ = "0.1.0"  # pyproject.toml reads it here

_HOME = {
    "config": ("LoRAConfig",),
    "layers": ("LoRALayer",),
    "injection": ("plan", "inject", "remove", "merge", "unmerge", "report", "lora_parameters"),
    "adapters": ("save_adapter", "load_adapter", "fingerprint"),
    "bank": ("AdapterBank",),
}
_ROOM = {name: room for room, names in _HOME.items() for name in names}
# written out, since a type checker does not reckon: the names of _ROOM
__all__ = ["AdapterBank", "LoRAConfig", "LoRALayer", "fingerprint", "inject", "load_adapter", "lora_parameters",
           "merge", "plan", "remove", "report", "save_adapter", "unmerge"]


def __getattr__(name: str):
    if name not in _ROOM:
        raise AttributeError(f"module 'minilora' has no attribute {name!r}")
    return getattr(import_module(f"minilora.{_ROOM[name]}"), name)


def __dir__():
    return __all__
