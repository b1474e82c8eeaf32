"""What a fine-tune needs: derived from the shapes (`estimate`), searched (`fit`), traced (`trace`), all to the byte.

Only the trace imports torch, and only when it is used.
"""

from importlib import import_module

_ROOM = {"ModelSpec": "models", "Card": "cards", "Training": "account", "estimate": "account", "fit": "fit",
         "trace": "trace"}
__all__ = sorted(_ROOM)


def __getattr__(name: str):
    if name not in _ROOM:
        raise AttributeError(f"module 'minilora.memory' has no attribute {name!r}")
    return getattr(import_module(f"minilora.memory.{_ROOM[name]}"), name)


def __dir__():
    return __all__
