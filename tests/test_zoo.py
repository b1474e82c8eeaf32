"""A few animals of the zoo in every run of the tests; `python tests/zoo.py` visits all."""

import pytest
import torch
import zoo


@pytest.mark.parametrize("targets", ["usual", "all-linear"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "vit", "bert"])
def test_an_architecture_is_right_from_birth_to_the_merged_checkpoint(name, targets):
    words, dead = zoo.result(name, targets, torch.float32)
    assert words == "right" and not dead, words


def test_dead_adapters_are_named_in_wavlm():
    words, dead = zoo.result("wavlm", "usual", torch.float32)
    assert words.startswith("right; all adapters dead, and named") and len(dead) == 4, words


@pytest.mark.skipif("unet" not in zoo.ZOO, reason="needs diffusers")
@pytest.mark.parametrize("targets", ["usual", "all-linear"])
def test_a_unet_of_diffusers_with_its_convolutions(targets):
    words, dead = zoo.result("unet", targets, torch.float32)
    assert words == "right" and not dead, words
