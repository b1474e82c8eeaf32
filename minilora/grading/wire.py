"""Values as plain data. What a student's process sends is JSON and bytes, and reading it runs nothing of the sender's:
no pickle, no class but those of the table below, no size beyond the bounds.

A number, a string, True, False and None stand for themselves. All else is a list that begins with its kind:
["tensor", "float32", [2, 3], base64 of its bytes], ["tuple", [...]], ["dict", [[key, value], ...]], ["module", ...],
["same", i] for the i-th argument itself, and ["other", its type, its repr, ...] for what cannot be sent.
"""

import base64
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn

from .calls import Call, Failure, short
from .models import Layer, Pair, Speaker, Tuned

DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool)}
MODULES = {c.__name__: c for c in (nn.Sequential, nn.Linear, nn.LayerNorm, nn.ModuleDict, Pair, Tuned, Layer,
                                   Speaker)}
NUMBERS, SIDE, DIMENSIONS = 20_000, 4096, 8  # the largest answer of an exercise has some 2,000 numbers


class Unreadable(ValueError):
    """What came is not plain data within the bounds."""


class Other:
    """Stands for a value that cannot be sent: a function, a generator, an object of an unknown class."""

    def __init__(self, type_name: str, text: str):
        self.type_name, self.text = type_name, text

    def __repr__(self) -> str:
        return self.text


class OtherIterator(Other):
    """A generator, or what map and filter give."""

    def __iter__(self):
        return self

    def __next__(self):
        raise TypeError("a generator cannot be sent")


class OtherModule(nn.Module):
    """A module of a class that is not in the table."""

    def __init__(self, type_name: str):
        super().__init__()
        self.type_name = type_name


# ---------------------------------------------------------------- in the student's process


def encode(value: Any, arguments: tuple = ()) -> Any:
    """`value` as plain data; one of `arguments` is named by its place."""
    place = next((i for i, a in enumerate(arguments) if a is value and not is_scalar(value)), None)
    if place is not None:
        return ["same", place]
    if value is None or isinstance(value, (bool, str)):
        return value if type(value) in (bool, str, type(None)) else str(value)
    if isinstance(value, int) and value.bit_length() > 4096:  # more digits than Python would write
        return ["other", "int", f"a whole number of {value.bit_length()} bits"]
    if isinstance(value, (int, float, Fraction)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, (np.number, np.bool_)):
        return value.item()
    if isinstance(value, torch.Tensor) and name_of(value) in DTYPES and value.layout == torch.strided:
        flat = value.detach().cpu().contiguous().reshape(-1)
        return ["tensor", name_of(value), list(value.shape), packed(flat.view(torch.uint8).numpy())]
    if isinstance(value, np.ndarray) and str(value.dtype) in DTYPES:
        return ["array", str(value.dtype), list(value.shape), packed(value)]
    if type(value) in MODULES.values():
        return encode_module(value)
    if isinstance(value, nn.Module):
        return ["module", type(value).__name__, [], [], []]
    if isinstance(value, (list, tuple)):
        return ["list" if isinstance(value, list) else "tuple", [encode(v, arguments) for v in value]]
    if isinstance(value, Mapping):
        return ["dict", [[encode(k), encode(v, arguments)] for k, v in value.items()]]
    kind = "iterator" if isinstance(value, Iterator) else "ellipsis" if value is ... else "other"
    return [kind, type(value).__name__, short(repr(value), 200)]


def encode_module(module: nn.Module) -> list:
    parameters = [[name, encode(p), p.requires_grad] for name, p in module.named_parameters(recurse=False)]
    buffers = [[name, encode(b)] for name, b in module.named_buffers(recurse=False)]
    return ["module", type(module).__name__, parameters, buffers,
            [[name, encode(child)] for name, child in module.named_children()]]


def encode_call(done: Call, arguments: tuple) -> dict:
    """`done` as plain data: `arguments` are the objects that the function was given."""
    return {"value": encode(done.value, arguments), "failure": done.failure and list(done.failure),
            "after": [encode(a) for a in done.after], "printed": done.printed}


def is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def packed(data: np.ndarray) -> str:
    return base64.b64encode(data.tobytes()).decode()


def name_of(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


# ---------------------------------------------------------------- in the grader's process


class Reader:
    """Reads one value, or one call; counts the numbers in it."""

    def __init__(self):
        self.numbers = 0

    def value(self, data: Any, arguments: tuple = ()) -> Any:
        """The value that `data` stands for.

        Raises:
            Unreadable: it stands for none, or for one too large.
        """
        self.count(1)
        if is_scalar(data):
            return data
        match data:
            case ["tensor" | "array" as kind, str(dtype), list(shape), str(text)] if dtype in DTYPES:
                tensor = self.tensor(DTYPES[dtype], shape, text)
                return tensor if kind == "tensor" else tensor.numpy()
            case ["list", list(items)]:
                return [self.value(item, arguments) for item in items]
            case ["tuple", list(items)]:
                return tuple(self.value(item, arguments) for item in items)
            case ["dict", list(items)]:
                try:
                    return {self.value(key): self.value(item, arguments) for key, item in items}
                except TypeError:
                    raise Unreadable("a key that is no key") from None
            case ["module", str(name), list(parameters), list(buffers), list(children)]:
                return self.module(name, parameters, buffers, children)
            case ["same", int(place)] if 0 <= place < len(arguments):
                return arguments[place]
            case ["ellipsis", *_]:
                return ...
            case ["iterator" | "other" as kind, str(name), str(text)]:
                return (OtherIterator if kind == "iterator" else Other)(short(name, 80), short(text, 200))
        raise Unreadable("no value of a known kind")

    def count(self, numbers: int) -> None:
        self.numbers += numbers
        if self.numbers > NUMBERS:
            raise Unreadable(f"more than {NUMBERS:,} numbers")

    def tensor(self, dtype: torch.dtype, shape: list, text: str) -> torch.Tensor:
        if len(shape) > DIMENSIONS or not all(type(side) is int and 0 <= side <= SIDE for side in shape):
            raise Unreadable(f"a tensor of shape {short(shape)}")
        numbers = int(np.prod(shape, dtype=object))
        self.count(numbers)
        raw = bytearray(base64.b64decode(text, validate=True))
        if len(raw) != numbers * dtype.itemsize:
            raise Unreadable(f"{len(raw)} bytes for a tensor of {numbers} numbers")
        if not raw:
            return torch.empty(shape, dtype=dtype)
        data = torch.frombuffer(raw, dtype=torch.uint8)
        return (data != 0 if dtype == torch.bool else data.view(dtype)).reshape(shape)

    def module(self, name: str, parameters: list, buffers: list, children: list) -> nn.Module:
        """Built again from its tensors: no constructor runs, and no code but that of the classes in the table."""
        if name not in MODULES:
            return OtherModule(short(name, 80))
        module = MODULES[name].__new__(MODULES[name])
        nn.Module.__init__(module)
        for key, data, trains in parameters:
            tensor = self.value(data)
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                raise Unreadable("a parameter that is no tensor of numbers")
            module.register_parameter(key, nn.Parameter(tensor, bool(trains)))
        for key, data in buffers:
            module.register_buffer(key, self.value(data))
        for key, data in children:
            module.add_module(key, self.value(data))
        if isinstance(module, nn.Linear):
            module.register_parameter("bias", module._parameters.get("bias"))
            module.out_features, module.in_features = module.weight.shape
        return module

    def call(self, data: Any, before: tuple) -> Call:
        after = tuple(self.value(a) for a in data["after"])
        after = tuple(b if isinstance(a, Other) else a for a, b in zip(after, before))  # a function stays what it is
        problem = None
        if data["failure"] is not None:
            kind, parents, text, line = data["failure"]
            problem = Failure(short(kind, 80), tuple(short(p, 80) for p in parents[:20]), short(text, 500),
                              short(line, 200))
        return Call(self.value(data["value"], after), problem, after, short(data["printed"], 200))


def decode(data: Any) -> Any:
    return Reader().value(data)


def decode_call(data: Any, before: tuple) -> Call:
    """The call that `data`, parsed JSON of an untrusted sender, stands for; `before` are the arguments it was given.

    Raises:
        Unreadable: it stands for none.
    """
    try:
        return Reader().call(data, before)
    except Unreadable:
        raise
    except Exception as error:  # whatever the sender made up, of whatever shape
        raise Unreadable(f"{type(error).__name__}: {short(error)}") from None
