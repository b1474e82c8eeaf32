"""Modules that train whole beside the adapters (PEFT's `modules_to_save`): a classifier's head, embeddings, a norm."""

import copy

from torch import Tensor, nn

from .layers import AdapterLayer


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """What a file holds of a module that trains whole."""
    return {name: t for name, t in (*module.named_parameters(), *module.named_buffers()) if t.is_floating_point()}


class TrainedCopy(AdapterLayer):
    """A module of the base and its trained copy, which computes in its place; it starts equal, in the same dtype.

    The base's own stays as it was, so that `remove` gives it back and several adapters can share it.
    """

    peft_type, mergeable = "LORA", True
    how = "whole (modules_to_save)"

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.copy = copy.deepcopy(base_layer).requires_grad_(True)
        self.merged = False

    def forward(self, *args, **kwargs):
        return self.copy(*args, **kwargs)

    def __getattr__(self, name: str):
        """Code that asks it for a weight finds the one that computes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "copy") or name.startswith("_"):
                raise
            return getattr(super().__getattr__("copy"), name)

    def saved(self) -> dict[str, Tensor]:
        return state_of(self.copy)

    def plain_module(self) -> nn.Module:
        return self.copy.requires_grad_(False)

    def merge(self) -> float:
        """As with a LoRA layer; there is nothing to add, so nothing is lost: from now on its state is the copy's."""
        self.merged = True
        return 0.0

    def unmerge(self) -> None:
        self.merged = False

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        inner = self.copy if self.merged else super()
        return inner.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for key in [key for key in state_dict if key.startswith(prefix)] if self.merged else ():
            state_dict[f"{prefix}copy.{key[len(prefix):]}"] = t = state_dict.pop(key)
            state_dict[f"{prefix}base_layer.{key[len(prefix):]}"] = t
        super()._load_from_state_dict(state_dict, prefix, *args)
