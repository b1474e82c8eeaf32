"""The layers of a base that can be adapted: which they are, how their weight is read, where and in what they compute.

One orientation everywhere: a weight is seen as (out, in), as `dense_weight` returns it. An embedding is a linear on
one-hot rows: in = rows, out = width. A convolution is a linear on patches: in = channels x kernel height x width.
"""

import sys
import warnings
from functools import partial

import torch
from torch import Tensor, nn


def kind_of(module: nn.Module) -> str | None:
    """"linear", "conv1d" (GPT-2's: a linear that stores W transposed), "embedding", "conv2d" (torch's, in one group),
    or None: cannot be adapted.

    A layer that does something else with its weight does not count: a subclass with a forward of its own, a weight that
    is computed (weight norm, parametrisation), an embedding that rescales its rows in forward (max_norm).
    """
    if quantised(module):
        return "linear"
    weight, forward = module._parameters.get("weight"), type(module).forward
    if weight is None or not torch.compiler.is_compiling() and foreign(weight):
        return None
    if forward is nn.Linear.forward or type(module).__name__ == "FalconLinear":  # a forward of its own, the same sum
        return "linear"
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        scaled = "ScaledWordEmbedding" in type(module).__name__ and hasattr(module, "embed_scale")
        return "embedding" if forward is nn.Embedding.forward or scaled else None
    if forward is nn.Conv2d.forward and module.groups == 1:
        return "conv2d"
    if type(module).__name__ == "Conv1D" and getattr(module, "nf", None) == weight.shape[-1]:
        return "conv1d"
    return None


def foreign(weight: Tensor) -> bool:
    """float8 and torchao's formats: only kernels of their own can read them, and those give no gradient here."""
    return weight.dtype.itemsize < 2 or type(weight).__module__.startswith("torchao")


def why_not(module: nn.Module) -> str:
    """Why `kind_of` is None, as the end of an error message."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and isinstance(weight, Tensor) and type(module).forward is nn.Linear.forward:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}: load the base in a 16-bit or 32-bit dtype"
    if getattr(module, "groups", 1) != 1:
        return f"its {module.groups} groups have a weight each"
    return "expected Linear, Conv1D, Embedding or Conv2d"


def words(kinds: tuple[str, ...]) -> str:
    """Kinds of layers, as the end of an error message: "Linear, Conv1D or Embedding"."""
    names = {"linear": "Linear", "conv1d": "Conv1D", "embedding": "Embedding", "conv2d": "Conv2d"}
    *first, last = [names[kind] for kind in kinds]
    return f"{', '.join(first)} or {last}" if first else last


def quantised(module: nn.Module) -> bool:
    """A linear that keeps its weight in codes: ``dequantize()`` gives it as (out, in), or it is bitsandbytes'."""
    if type(module).__name__ in BITSANDBYTES and type(module).__module__.startswith("bitsandbytes"):
        return True
    return hasattr(module, "dequantize") and hasattr(module, "in_features") and hasattr(module, "out_features")


def dense_4bit(layer: nn.Module) -> Tensor:
    """bitsandbytes' Linear4bit, (out, in)."""
    from bitsandbytes.functional import dequantize_4bit

    if layer.weight.quant_state is None:
        raise ValueError("a Linear4bit of bitsandbytes is not quantised before .to(device)")
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        raise ValueError("a Linear4bit of bitsandbytes that has run in eval mode on this CPU keeps its codes in "
                         "another order, which cannot be read: call model.train() before its first forward")
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def dense_8bit(layer: nn.Module) -> Tensor:
    """bitsandbytes' Linear8bitLt, (out, in): codes times a scale a row; the first forward moves both to `state`."""
    place = layer.state if layer.state.CB is not None else layer.weight
    if place.SCB is None:
        raise ValueError("a Linear8bitLt of bitsandbytes is not quantised before .to(device)")
    codes = layer.weight.data if place.CB is None else place.CB
    return codes.float() * place.SCB.float()[:, None] / 127


BITSANDBYTES = {"Linear4bit": dense_4bit, "Linear8bitLt": dense_8bit}


def output_scale(base: nn.Module) -> Tensor | float:
    """What transformers' scaled embeddings (Gemma 3, BART) multiply their rows by on the way out; else 1."""
    return getattr(base, "embed_scale", 1) if isinstance(base, nn.Embedding) else 1


def dense_weight(base: nn.Module) -> Tensor:
    """The layer's weight as (out, in): a view, or for a quantised layer a fresh tensor. A ValueError if it is away, or
    in a format that cannot be read."""
    if execution_device(base) is not None and any(p.is_meta for p in base.parameters()):
        raise ValueError("the weight is offloaded and only visits the device: it cannot be read here")
    if quantised(base):
        return base.dequantize() if hasattr(base, "dequantize") else BITSANDBYTES[type(base).__name__](base)
    kind = kind_of(base)
    if kind is None:  # quantised since it was injected, say
        raise ValueError(f"the weight of a {type(base).__name__} cannot be read: {why_not(base)}")
    return base.weight if kind == "linear" else base.weight.flatten(1) if kind == "conv2d" else base.weight.T


def as_stored(W: Tensor, base: nn.Module) -> Tensor:
    """A weight (out, in) in the shape in which this layer keeps its own: the inverse of `dense_weight`."""
    return W.view(base.weight.shape) if kind_of(base) in ("linear", "conv2d") else W.T.contiguous()


def shape_of(base: nn.Module) -> tuple[int, int]:
    """(out, in)"""
    kind = kind_of(base)
    if kind == "linear":
        return base.out_features, base.in_features
    return tuple((base.weight.flatten(1) if kind == "conv2d" else base.weight.T).shape)


def on_disk(base: nn.Module, own: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a layer's tensor in a file: PEFT writes a convolution's A as a kernel, its B as one of 1 x 1."""
    if kind_of(base) != "conv2d":
        return tuple(shape)
    return (shape[0], *base.weight.shape[1:]) if own == "lora_A" else (*shape, 1, 1)


def adapter_options(base: nn.Module) -> dict:
    """Device and dtype of an adapter on this layer: the base's, but at least fp32, where small steps are not lost.

    A streamed layer (stream.py) rests on one device and computes on another, which it calls `compute_device`.
    """
    tensors = [*base.parameters(), *base.buffers()]
    floats = [t.dtype for t in tensors if t.is_floating_point()] or [torch.float32]
    device = execution_device(base)
    return {"device": getattr(base, "compute_device", tensors[0].device) if device is None else device,
            "dtype": torch.promote_types(floats[0], torch.float32)}


def execution_device(base: nn.Module) -> torch.device | int | str | None:
    """Where accelerate brings the weights of an offloaded layer when it computes; None if it does not look after it."""
    hook = base.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", [hook]):  # a loop: torch.compile of 2.6 knows no next() with a default
        device = getattr(one, "execution_device", None)
        if device is not None:
            return device
    return None


def widest(t: Tensor) -> torch.dtype:
    """fp64, or fp32 where the device has no fp64."""
    return torch.float32 if t.device.type == "mps" else torch.float64


def weight_read(layer: nn.Module) -> None:
    """A forward reads an adapted layer's weight. If by the end of the model's next forward nothing has called the layer
    after such a read, say so once, by name: what is computed with that weight knows nothing of the adapter."""
    frame, model = sys._getframe(2), None
    caller = frame.f_code.co_qualname
    while frame is not None:
        if frame.f_code.co_name == "_call_impl":
            model = frame.f_locals.get("self")  # in the end the outermost
        frame = frame.f_back
    if model is None:
        return  # not in a forward: who only looks may look
    layer.__dict__["read_and_not_called"] = True
    if "watched" not in layer.__dict__:
        layer.__dict__["watched"] = True
        handles = []
        handles.append(model.register_forward_hook(partial(say_if_not_called, layer, caller, handles)))


def say_if_not_called(layer: nn.Module, caller: str, handles: list, *_) -> None:
    handles.pop().remove()
    if layer.__dict__.get("read_and_not_called") and not layer.merged:
        warnings.warn(f"{layer.__dict__.get('name', 'a LoRA layer')}: {caller} reads its weight and does not call "
                      "it, so its adapter does nothing there. Leave it out of target_modules, or merge", stacklevel=2)
