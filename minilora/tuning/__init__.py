"""Your own model, your own data: ``minilora tune`` and what comes after it.

The walk of a run, `tune(model, data, out)`:

1. `data` reads a file of one of five forms, strictly. `templates` makes tokens of each row and marks those that the
   model must learn to write; `batches` puts them together.
2. `plan` asks the calculator what the run needs on this device, and refuses what does not fit with what would.
3. `model` loads transformers' decoder; `inject` puts our layers in. `WithLoss` makes logits only where they count.
4. `run` trains in stretches through `train`, with its checkpoint, and a validation after each; `card` says what was
   done. The adapter is in PEFT's format.

The model is transformers' (the extra ``hf``), so this room is imported only when it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that a type checker sees what these names are
    from .data import read_rows as read_rows
    from .model import load_model as load_model
    from .model import load_tokenizer as load_tokenizer
    from .run import Result as Result
    from .run import tune as tune
    from .templates import Chat as Chat

_HOME = {"read_rows": "data", "load_model": "model", "load_tokenizer": "model", "Result": "run", "tune": "run",
         "Chat": "templates"}
__all__ = ["Chat", "Result", "load_model", "load_tokenizer", "read_rows", "tune"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'minilora.tuning' has no attribute {name!r}")
    return getattr(import_module(f"minilora.tuning.{_HOME[name]}"), name)


def __dir__():
    return __all__
