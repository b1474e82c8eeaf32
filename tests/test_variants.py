"""A variant of the LoRA layer is one small class: those that are there, against PEFT's, and one made here."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import IDS, gpt2, hf_llama, logits, our_llama, same, shake, state
from torch import nn

import minilora.variants
from minilora import (
    AdapterBank,
    LoRAConfig,
    inject,
    load_adapter,
    lora_parameters,
    merge,
    plan,
    remove,
    report,
    save_adapter,
    unmerge,
)
from minilora.config import variants
from minilora.injection import lora_layers
from minilora.layers import LoRALayer

LINEARS = ("q_proj", "v_proj", "up_proj", "down_proj")
MADE_FOR_IT = "signed"  # the variant that this file defines


class Signed(LoRALayer):
    """``W + s diag(sign) B A``, with a trained vector beside A and B: made by nothing but this class."""

    variant = MADE_FOR_IT
    keys = LoRALayer.keys | {"sign": "lora_sign"}
    settings = LoRALayer.settings
    peft_type = "SIGNED"

    @staticmethod
    def shapes(out, inp, rank):
        return LoRALayer.shapes(out, inp, rank) | {"sign": (out,)}

    def start(self):
        super().start()
        nn.init.ones_(self.sign)

    def factors(self):
        return self.lora_A, self.sign[:, None] * self.lora_B


def config(name: str) -> LoRAConfig:
    options = {"use_dora": True} if name == "dora" else {} if name == "lora" else {"init": name}
    return LoRAConfig(4, 16, LINEARS, **options)


EVERY = pytest.mark.parametrize("name", sorted(variants()))


def test_variants_are_found_by_their_files():
    files = {path.stem for path in Path(minilora.variants.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(variants()) - {"lora", MADE_FOR_IT} == files >= {"dora", "pissa", "lora_fa", "vera"}


@EVERY
def test_it_trains_saves_loads_merges_and_goes(name, tmp_path):
    model, plain = our_llama(), our_llama()
    before = state(model)
    planned = plan(model, config(name)).parameters
    inject(model, config(name))
    assert {type(layer) for layer in lora_layers(model).values()} == {variants()[name]}
    assert torch.equal(logits(model), logits(plain))
    assert planned == report(model).trainable == sum(p.numel() for p in lora_parameters(model))
    model(IDS).square().mean().backward()
    assert all(p.grad is not None for p in lora_parameters(model))
    shake(model)
    trained = logits(model)
    assert (trained - logits(plain)).abs().max() > 1e-3
    save_adapter(model, tmp_path / "a")
    again = load_adapter(our_llama(), tmp_path / "a")
    assert torch.allclose(logits(again), trained, atol=1e-6)
    merge(model)
    assert torch.allclose(logits(model), trained, atol=2e-6)
    unmerge(model)
    assert torch.equal(logits(model), trained)
    bank = AdapterBank(our_llama())
    bank.load("a", tmp_path / "a")
    with torch.no_grad(), bank.route(["a", None, "a"]):
        routed = bank.model(IDS)
    assert torch.allclose(routed[::2], trained[::2], atol=1e-5)
    assert torch.allclose(routed[1], logits(plain)[1], atol=1e-6)
    assert same(before, state(remove(model)))


# LoRA-FA


def test_lora_fa_trains_b_alone_and_keeps_less_for_backward():
    model = inject(our_llama(), config("lora_fa"))
    layer = lora_layers(model)["model.layers.0.mlp.up_proj"]
    assert [name for name, _ in layer.named_parameters(recurse=False)] == ["lora_B"]
    assert plan(our_llama(), config("lora_fa")).parameters < plan(our_llama(), config("lora")).parameters
    x, kept = torch.randn(50, 32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert not any(t.numel() == x.numel() and t.data_ptr() == x.data_ptr() for t in kept)


@pytest.mark.parametrize("name", ["lora_fa", "vera"])
def test_an_embedding_is_refused_by_name(name):
    said = "model.embed_tokens, a Embedding, cannot be adapted by .*: expected Linear or Conv1D"
    with pytest.raises(ValueError, match=said):
        inject(our_llama(), LoRAConfig(2, target_modules=("embed_tokens",), init=name))


def test_lora_fa_opens_in_peft_as_plain_lora(tmp_path):
    shake(model := inject(hf_llama(), config("lora_fa")))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(hf_llama(), tmp_path)
    assert torch.allclose(logits(theirs), logits(model), atol=1e-5)
    assert {type(layer) for layer in lora_layers(load_adapter(hf_llama(), tmp_path)).values()} == {LoRALayer}


# VeRA


@pytest.mark.parametrize("base", [hf_llama, gpt2], ids=["llama", "gpt2"])
def test_vera_opens_in_peft(base, tmp_path):
    targets = ("q_proj", "v_proj", "down_proj") if base is hf_llama else ("c_attn", "c_proj")
    shake(model := inject(base(), LoRAConfig(6, target_modules=targets, init="vera", seed=3)))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.allclose(logits(theirs), logits(model), atol=1e-5)
    with_seed = peft.get_peft_model(base(), peft.VeraConfig(r=6, target_modules=list(targets), projection_prng_key=3))
    ours = next(iter(lora_layers(model).values())).projection
    assert torch.equal(with_seed.base_model.vera_A["default"], ours.vera_A)
    assert torch.equal(with_seed.base_model.vera_B["default"], ours.vera_B)


@pytest.mark.parametrize("projection", [True, False])
def test_pefts_vera_opens_here(projection, tmp_path):
    settings = peft.VeraConfig(r=5, target_modules=["q_proj", "up_proj"], projection_prng_key=9,
                               save_projection=projection)
    theirs = peft.get_peft_model(hf_llama(), settings)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lambda" in name:
                p.add_(torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(hf_llama(), tmp_path)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert (logits(ours) - logits(hf_llama())).abs().max() > 1e-3


def test_veras_matrices_are_one_for_all_layers_also_after_a_move():
    model = inject(our_llama(), config("vera"))
    layers = list(lora_layers(model).values())
    assert sum(p.numel() for p in lora_parameters(model)) == sum(4 + layer.out_features for layer in layers)
    model.double()
    assert len({id(layer.projection) for layer in layers}) == 1 and layers[0].projection.vera_A.dtype == torch.float64


def test_a_damaged_projection_is_refused(tmp_path):
    save_adapter(inject(our_llama(), config("vera")), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.vera_A": torch.ones(3, 3)}, path)
    with pytest.raises(ValueError, match=r"base_model.vera_A has shape \(3, 3\), the model needs"):
        load_adapter(our_llama(), tmp_path)


def test_what_a_file_of_ours_says(tmp_path):
    save_adapter(inject(our_llama(), LoRAConfig(4, target_modules=LINEARS, init="vera", seed=2)), tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    said = (stored["peft_type"], stored["r"], stored["projection_prng_key"], stored["save_projection"])
    assert said == ("VERA", 4, 2, True)
    assert "lora_alpha" not in stored and "use_dora" not in stored
