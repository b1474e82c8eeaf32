"""What a fine-tune needs: derived from the shapes (`estimate`), searched (`fit`), traced (`trace`), all to the byte.

Only the trace imports torch, and only when it is used.
"""

import sys
from importlib import import_module
from types import ModuleType

_HOME = {"models": ("ModelSpec",), "cards": ("Card",), "account": ("Training", "estimate"), "fit": ("fit",),
         "trace": ("trace", "fake", "measure"), "step": ("training_step",)}
_ROOM = {name: room for room, names in _HOME.items() for name in names}
__all__ = sorted(_ROOM)


class _Package(ModuleType):
    """A room may bear the name of its function: importing it leaves that name to the function."""

    def __setattr__(self, name: str, value):
        if not (name in _ROOM and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name not in _ROOM:
        raise AttributeError(f"module 'minilora.memory' has no attribute {name!r}")
    return getattr(import_module(f"minilora.memory.{_ROOM[name]}"), name)


def __dir__():
    return __all__
