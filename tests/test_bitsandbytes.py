"""Adapters on bitsandbytes' layers. Not in the usual environment, where it makes PEFT write to stderr:
``pip install bitsandbytes`` into one of its own and run this file alone."""

import copy

import peft
import pytest
import torch
from small import IDS, logits, shake
from torch import nn

from minilora import LoRAConfig, inject, load_adapter, lora_parameters, merge, remove, report, save_adapter
from minilora.bases import dense_weight, kind_of
from minilora.injection import replace

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes has an environment of its own: see this file's head")
KINDS = ["nf4", "fp4", "8-bit"]


def in_codes(linear: nn.Linear, kind: str) -> nn.Module:
    out, inp = linear.weight.shape
    if kind == "8-bit":
        layer = bnb.nn.Linear8bitLt(inp, out, linear.bias is not None, has_fp16_weights=False, threshold=0.0)
        layer.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(inp, out, linear.bias is not None, compute_dtype=torch.float32, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type=kind, module=layer)
    layer.bias = linear.bias
    return layer.to("cpu")


def llama(kind: str) -> nn.Module:
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2)).eval()
    linears = [m for name, m in model.named_modules() if type(m) is nn.Linear and name != "lm_head"]
    replace(model, {m: in_codes(m, kind) for m in linears})
    return model.requires_grad_(False)


def dense(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for name, m in list(twin.named_modules()):
        if type(m).__name__ in ("Linear4bit", "Linear8bitLt"):
            linear = nn.Linear(m.in_features, m.out_features, bias=False)
            linear.weight.data = dense_weight(m).detach().float()
            replace(twin, {m: linear})
    return twin


@pytest.mark.parametrize("kind", KINDS)
def test_equal_at_birth_and_gradients_of_the_dense_model(kind):
    model = llama(kind)
    plain, twin = logits(model), dense(model)
    config = LoRAConfig(4, 8, "all-linear")
    torch.manual_seed(1)
    inject(model, config)
    assert torch.equal(logits(model), plain)
    assert {kind_of(m.base_layer) for m in model.modules() if hasattr(m, "lora_A")} == {"linear"}
    torch.manual_seed(1)
    inject(twin, config)
    for seed, m in ((1, model), (1, twin)):
        torch.manual_seed(seed)
        shake(m)
    grads = []
    for m in (model, twin):
        out = m(IDS).logits
        grads.append(torch.autograd.grad(out.log_softmax(-1)[..., 3].mean(), lora_parameters(m)))
    tolerance = 1e-6 if kind != "8-bit" else 2e-3  # LLM.int8 rounds the activations as well
    assert all((a - b).abs().max() <= tolerance for a, b in zip(*grads, strict=True))
    assert report(model).trainable == report(twin).trainable and report(model).total == report(twin).total
    with pytest.raises(ValueError, match="cannot merge into a quantised weight"):
        merge(model)
    assert torch.equal(logits(remove(model)), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_opens_in_peft_on_the_same_base(kind, tmp_path):
    model = inject(llama(kind), LoRAConfig(4, 8, ("q_proj", "down_proj")))
    shake(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(kind), tmp_path)
    # a difference of 1e-7 may turn an 8-bit activation to the next step of 1/127 of its row's largest
    assert torch.allclose(logits(theirs), logits(model), atol=5e-3 if kind == "8-bit" else 1e-5)
    assert torch.allclose(logits(load_adapter(llama(kind), tmp_path)), logits(model), atol=1e-6)


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"init": "pissa"}])
def test_variants_read_the_codes(variant):
    model = llama("nf4")
    plain = logits(model)
    inject(model, LoRAConfig(4, 8, "all-linear", **variant))
    assert torch.allclose(logits(model), plain, atol=1e-5)
    shake(model)
    model(IDS).logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in lora_parameters(model))
