"""What the installed transformers calls, in memory, what stands under another name on disk or in an older adapter.

transformers 5 renamed and fused the modules of many architectures (ViT's ``attention.attention.query`` is
``attention.q_proj`` now, Mixtral's experts are two stacked parameters) and converts a checkpoint as it reads it. Only
its own table can tell. transformers is imported only where a model or a checkpoint is one of its own.
"""

from collections.abc import Iterable
from contextlib import redirect_stderr
from importlib import import_module
from io import StringIO

import torch
from torch import nn


def is_hub_model(model: nn.Module) -> bool:
    """Whether a model is one of transformers' own classes."""
    return type(model).__module__.startswith("transformers.models.")


def empty_model(config: dict) -> nn.Module | None:
    """The model of a ``config.json``, without memory (on the meta device); None where no transformers is installed, or
    it does not know the architecture."""
    name = next(iter(config.get("architectures") or ()), None)
    if not isinstance(name, str) or "model_type" not in config:
        return None
    try:
        transformers = import_module("transformers")
        kind = getattr(transformers, name)
        with torch.device("meta"), redirect_stderr(StringIO()):
            return kind(transformers.AutoConfig.for_model(**config))
    except Exception:  # transformers': not there, other code than its own, a config that it refuses
        return None


def names_here(model: nn.Module, names: Iterable[str]) -> dict[str, str | None]:
    """What the modules called `names` on disk are called in a model of transformers; None: fused with others there."""
    names = list(names)
    try:
        rename = import_module("transformers.core_model_loading").rename_source_key
        mapping = import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    except (ImportError, AttributeError):  # before 5 a name on disk was a name in memory
        return {name: name for name in names}
    fusing = [t for t in mapping if hasattr(t, "operations")]
    renaming = [t for t in mapping if not hasattr(t, "operations")]
    here, found = model.state_dict(), {}
    for name in names:
        key, fused = rename(f"{name}.weight", renaming, fusing, model.base_model_prefix, here)
        found[name] = None if fused else key.removesuffix(".weight")
    return found
