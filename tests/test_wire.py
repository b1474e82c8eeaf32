"""Values as plain data: what goes out comes back, and nothing that a stranger makes up gets further than an error."""

import base64
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minilora.check.compare import difference
from minilora.grading.calls import Call, Failure
from minilora.grading.models import Layer, Pair, Tuned
from minilora.grading.wire import DTYPES, Other, Unreadable, decode, decode_call, encode, encode_call

VALUES = [None, True, 3, -2.5, float("inf"), "a\n\u202e", [1, (2.0, "x")], {"a": [1], ("v1", 2): None}, (), [], {},
          torch.arange(6).view(2, 3), torch.randn(2, 0, 3), torch.tensor(2.5, requires_grad=True),
          torch.tensor([True, False]), np.arange(3.0), *(torch.ones(2, 2).to(d) for d in DTYPES.values())]


def travelled(value):
    return decode(json.loads(json.dumps(encode(value))))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(encode(value))[:20])
def test_a_value_comes_back_as_it_was(value):
    back = travelled(value)
    assert difference(back, value, 0) is None and type(back) is type(value)
    if isinstance(value, torch.Tensor):
        assert back.dtype == value.dtype and back.shape == value.shape


@pytest.mark.parametrize("module", [
    nn.Linear(3, 2), nn.Linear(2, 3, bias=False), nn.LayerNorm(3), Layer(), nn.ModuleDict({"a": Layer()}),
    nn.Sequential(Pair(3), Tuned(nn.Linear(3, 3)).requires_grad_(False))], ids=lambda module: type(module).__name__)
def test_a_module_comes_back_with_its_values_its_flags_and_its_forward(module):
    back = travelled(module)
    assert difference(back, module, 0) is None and type(back) is type(module)
    assert [n for n, p in back.named_parameters() if p.requires_grad] == [
        n for n, p in module.named_parameters() if p.requires_grad]
    if isinstance(module, nn.Sequential):
        x = torch.randn(2, 3)
        assert torch.equal(back(x), module(x)) and back[0].up.in_features == 3


def test_what_cannot_be_sent_keeps_its_name_and_an_argument_its_place():
    class Mine(nn.Linear):
        pass

    sent = [travelled(v) for v in (len, {1}, iter([]), Mine(2, 2), 10**5000)]
    assert [v.type_name for v in sent] == ["builtin_function_or_method", "set", "list_iterator", "Mine", "int"]
    assert isinstance(sent[0], Other) and not isinstance(sent[3], nn.Linear) and travelled(...) is ...
    x, y = torch.ones(2), nn.Linear(1, 1)
    done = decode_call(encode_call(Call([y, x], None, (x, y)), (x, y)), (x, y))
    assert done.value == [done.after[1], done.after[0]] and isinstance(done.after[1], nn.Linear)
    failed = Call(None, Failure("KeyError", ("KeyError", "LookupError"), "'a'", "return {}['a']"), (), "hm")
    assert decode_call(json.loads(json.dumps(encode_call(failed, ()))), ())[1] == failed.failure


def test_a_subclass_travels_as_what_it_holds():
    class Near(torch.Tensor):
        def __eq__(self, other):
            return True

        __hash__ = torch.Tensor.__hash__

    class Word(str):
        __eq__ = Near.__eq__
        __hash__ = str.__hash__

    assert type(travelled(torch.zeros(2).as_subclass(Near))) is torch.Tensor
    assert type(travelled(Word("a"))) is str and travelled(Word("a")) != "b"


ZERO = base64.b64encode(bytes(4)).decode()
HOSTILE = [
    ["tensor", "float32", [10**9], ZERO], ["tensor", "float32", [-1, -1], ZERO], ["tensor", "float32", [1] * 9, ZERO],
    ["tensor", "float32", [0, 10**9], ""], ["tensor", "float32", [True], ZERO], ["tensor", "float32", [1.0], ZERO],
    ["tensor", "float32", [2], ZERO], ["tensor", "float32", [1], "%%%"], ["tensor", "float32", [1], None],
    ["tensor", "object", [1], ZERO], ["tensor", "float32"], ["pickle", base64.b64encode(pickle.dumps(len)).decode()],
    ["list", 3], ["list", {}], ["dict", [[["list", []], 1]]], ["dict", [[1]]], ["dict", [1]], ["same", 0], ["same", -1],
    ["same", True], {}, {"a": 1}, [], [[]], ["module"], ["module", "Linear", [], [], []],
    ["module", "Linear", [["weight", ["tensor", "float32", [1], ZERO], True]], [], []],
    ["module", "Linear", [["weight", "x", True]], [], []], ["module", "Pair", [["forward", encode(torch.ones(1)), 1]],
                                                             [], []],
    ["module", "Sequential", [], [], [["a", 3]]], ["module", "Sequential", [], [], [["_modules", encode(Layer())]]],
    ["list", [0] * 30_000], ["list", [["tensor", "float32", [100, 100], base64.b64encode(bytes(40000)).decode()]] * 3]]


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_value_is_unreadable(data):
    with pytest.raises(Unreadable):
        decode_call({"value": data, "failure": None, "after": [], "printed": ""}, ())


JSON = st.recursive(st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats() | st.text(max_size=5)
                    | st.sampled_from(["tensor", "float32", "module", "Linear", "weight", "dict", "same", ZERO]),
                    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                    max_leaves=25)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(JSON, st.fixed_dictionaries({"value": JSON, "failure": JSON, "after": JSON, "printed": JSON})))
def test_nothing_made_up_is_anything_but_a_call_or_unreadable(data):
    try:
        assert isinstance(decode_call(data, ()), Call)
    except Unreadable:
        pass
