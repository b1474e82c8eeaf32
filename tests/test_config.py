"""LoRAConfig: ranges, scaling, and how a name matches."""

import math

import pytest

from minilora import LoRAConfig


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": -3}, "got -3"),
        ({"rank": 8.0}, "got 8.0"),
        ({"rank": True}, "got True"),
        ({"rank": "8"}, "got '8'"),
        ({"alpha": math.nan}, "alpha must be a finite number other than 0, got nan"),
        ({"alpha": math.inf}, "got inf"),
        ({"alpha": 10**400}, "alpha must be a finite number"),
        ({"alpha": 0}, "other than 0"),
        ({"alpha": None}, "got None"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ({"dropout": -0.1}, "got -0.1"),
        ({"dropout": math.nan}, "got nan"),
        ({"dropout": "0"}, "got '0'"),
        ({"target_modules": ()}, "target_modules must name modules"),
        ({"target_modules": ""}, "target_modules must name modules"),
        ({"target_modules": ("q", "")}, "target_modules must name modules"),
        ({"target_modules": (1,)}, "target_modules must name modules"),
        ({"target_modules": None}, "got None"),
        ({"target_modules": "(q"}, "'(q' is not a regular expression"),
        ({"target_modules": "a{99999999999999999999}"}, "is not a regular expression"),
        ({"rank_pattern": {"(q": 2}}, "is not a regular expression"),
        ({"alpha_pattern": {"(?i)q": 2}}, "is not a regular expression"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] must be a positive integer, got 0"),
        ({"alpha_pattern": {"q": math.nan}}, "alpha_pattern['q'] must be a finite number"),
        ({"rank_pattern": [("q", 2)]}, "must map names to values"),
        ({"use_rslora": 1}, "use_rslora must be True or False, got 1"),
        ({"use_dora": "yes"}, "use_dora must be True or False, got 'yes'"),
        ({"init": "zeros"}, "init must be 'kaiming' or 'lora_fa'"),
        ({"init": "pissa", "use_dora": True}, "DoRA needs whole"),
        ({"init": "dora"}, "init must be 'kaiming' or"),
        ({"init": "lora_fa", "use_dora": True}, "init='lora_fa' and DoRA are two variants"),
        ({"init": "vera", "alpha_pattern": {"q": 1}}, "init='vera' has one rank and no alpha"),
        ({"seed": -1}, "seed must be an integer of 0 or more, got -1"),
        ({"init": "pissa", "alpha": -1}, "alpha must be above 0"),
        ({"init": "pissa", "alpha_pattern": {"q": -1}}, "alpha must be above 0"),
    ],
)
def test_values_outside_their_range_are_named(bad, says):
    with pytest.raises(ValueError) as e:
        LoRAConfig(**bad)
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "rank, alpha, rslora, expected",
    [(8, 16, False, 2.0), (1, 16, False, 16.0), (64, 16, False, 0.25), (16, 8, True, 2.0), (4, -2, False, -0.5)],
)
def test_scaling(rank, alpha, rslora, expected):
    assert LoRAConfig(rank, alpha, use_rslora=rslora).scaling_of("any") == expected


@pytest.mark.parametrize(
    "targets, name, hit",
    [
        (["q_proj"], "layers.0.q_proj", True),
        (["q_proj"], "q_proj", True),
        (["q_proj"], "layers.0.xq_proj", False),
        (["q_proj"], "q_proj.inner", False),
        (["0.q_proj"], "layers.10.q_proj", False),
        (["layers.0.q_proj"], "model.layers.0.q_proj", True),
        (["q.proj"], "layers.0.q_proj", False),  # a list's dot is a dot
        ("q_proj", "layers.0.q_proj", False),  # a string is for the whole name
        (r".*\.(q|v)_proj", "layers.0.v_proj", True),
        (r".*\.(q|v)_proj", "layers.0.k_proj", False),
    ],
)
def test_targets(targets, name, hit):
    assert LoRAConfig(target_modules=targets).matches(name) is hit


@pytest.mark.parametrize(
    "pattern, name, expected",
    [
        ({"q_proj": 2}, "layers.0.q_proj", 2),
        ({"q_proj": 2}, "layers.0.xq_proj", 8),
        ({"layers.1.q_proj": 2}, "layers.11.q_proj", 8),
        ({"^q_proj": 2}, "layers.0.q_proj", 8),
        ({r"layers\.[01]\..*": 2}, "model.layers.1.mlp.up", 2),
        ({"q_proj": 2, r".*": 4}, "a.q_proj", 2),  # the first that matches wins
        ({r".*": 4, "q_proj": 2}, "a.q_proj", 4),
        ({"a|b": 2}, "x.b", 2),
    ],
)
def test_patterns(pattern, name, expected):
    config = LoRAConfig(8, 8, rank_pattern=pattern, alpha_pattern=pattern)
    assert config.rank_of(name) == config.alpha_of(name) == expected
    assert config.scaling_of(name) == 1.0
    half = LoRAConfig(8, 8, rank_pattern=pattern)
    assert half.scaling_of(name) == 8 / expected  # alpha stays, so the scaling is the module's own


def test_a_generator_of_names_is_kept():
    config = LoRAConfig(target_modules=(n for n in ["a", "b"]))
    assert config.target_modules == ("a", "b") and config.matches("a") and config.matches("x.b")
