"""Layers of several experts: the closed form is the trace to the byte, the totals transformers' own, and what PEFT adapts
in them is what is priced."""

import itertools
from dataclasses import replace

import pytest
from test_memory_estimate import MODES
from test_memory_families import SIZES
from test_memory_models import on_meta
from transformers import AutoConfig

from minilora.__main__ import main
from minilora.memory import ModelSpec, Serving, Training, estimate
from minilora.memory.bill import two_depths
from minilora.memory.traced_bill import traced

LATENT = {"num_experts_per_tok": 2, "n_routed_experts": 8, "moe_intermediate_size": 32, "num_hidden_layers": 3,
          "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16,
          "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 8}
GROUPS = {"n_group": 2, "topk_group": 1}
EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
                  "num_hidden_layers": 3, "mlp_only_layers": [0]},
    "qwen3_moe of shares": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "deepseek_v3": LATENT | GROUPS,
    "deepseek_v2": LATENT | {"n_shared_experts": 2},
    "deepseek_v2 of groups": LATENT | GROUPS | {"topk_method": "group_limited_greedy", "q_lora_rank": None,
                                                "n_shared_experts": 1},
    "llama4_text": {"num_local_experts": 4, "num_hidden_layers": 4, "intermediate_size_mlp": 80,
                    "interleave_moe_layer_step": 2, "attention_chunk_size": 16}}
ALL = "all-linear"
METHODS = {"full": {"method": "full"}, "LoRA": {"target_modules": ALL}, "LoRA o": {"target_modules": ("o_proj",)}}
ROWS = {"few": {"batch": 1, "seq": 8}, "many": {"batch": 2, "seq": 60}}
THE_REST = {"trl": {"autocast": True}}  # weights in 16 bits under autocast
CELLS = [cell for i, cell in enumerate(itertools.product(EXPERTS, MODES | THE_REST, METHODS, ROWS, (False, True)))
         if i % 7 == 3]


def config_of(family: str):
    return AutoConfig.for_model(family.split()[0], **SIZES | EXPERTS[family])


def spec_of(family: str) -> ModelSpec:
    return ModelSpec.from_config(config_of(family).to_dict())


@pytest.mark.parametrize("family", EXPERTS)
def test_total(family):
    assert spec_of(family).parameters == sum(p.numel() for p in on_meta(config_of(family)).parameters())


@pytest.mark.parametrize("family, mode, method, rows, checkpointing", CELLS)
def test_closed_form_is_the_trace(family, mode, method, rows, checkpointing):
    if family == "llama4_text" and method == "LoRA":
        method = "LoRA o"  # its router cannot be adapted
    run = Training(rank=4, stack="transformers", checkpointing=checkpointing, **(MODES | THE_REST)[mode],
                   **METHODS[method], **ROWS[rows])
    assert estimate(spec_of(family), run).peak == traced(config_of(family), run)[0].peak


@pytest.mark.parametrize("family, options", [
    ("mixtral", {"attention": "efficient"}), ("qwen3_moe", {"attention": "efficient", "target_modules": ALL}),
    ("mixtral", {"optimizer": "adafactor", "method": "full", "batch": 1, "seq": 8}), ("gpt_oss", {"loss": "chunked"}),
    ("deepseek_v3", {"loss": "chunked"}), ("deepseek_v2", {"attention": "eager"}),
    ("qwen3_moe", {"rows": "padded"})])
def test_other_settings_too(family, options):
    """Cards without grouped products, other optimizers and losses, masks."""
    run = Training(**{"rank": 4, "stack": "trl", "batch": 2, "seq": 60, "target_modules": ("o_proj",)} | options)
    assert estimate(spec_of(family), run).peak == traced(config_of(family), run)[0].peak


@pytest.mark.parametrize("family", [family for family in EXPERTS if family != "llama4_text"])
@pytest.mark.parametrize("targets", [ALL, ("o_proj",), r".*\.(o_proj|gate_proj|up_proj)", ("down_proj", "o_proj")])
def test_adapters_are_those_of_peft(family, targets):
    """PEFT reads the names that experts had in transformers 4: rank times experts, twice for two in one."""
    from peft import LoraConfig, get_peft_model

    spec = spec_of(family)
    if targets == ("down_proj", "o_proj") and family in ("mixtral", "gpt_oss"):
        pytest.skip("its experts had other names")
    if family == "mixtral" and targets != ALL:
        targets = r".*\.(o_proj|w1|w3)" if isinstance(targets, str) else targets
    model = get_peft_model(on_meta(config_of(family)), LoraConfig(
        r=2, target_modules=targets if isinstance(targets, str) else list(targets)))
    trainable, every = model.get_nb_trainable_parameters()
    assert spec.lora_parameters(2, targets) == trainable and spec.parameters + trainable == every


def test_the_names_are_strict():
    spec = spec_of("qwen3_moe")
    with pytest.raises(ValueError, match="PEFT adapts gate_proj and up_proj of .* together or not at all"):
        spec.targets(("gate_proj", "o_proj"))
    with pytest.raises(ValueError, match="target 'w1' matches no linear"):
        spec.targets(("w1",))
    assert [m.name for m in spec.targets(ALL, by_peft=False)] == [f"self_attn.{n}_proj" for n in "qkvo"]
    with pytest.raises(ValueError, match="router of .* gives two tensors, and PEFT's adapter fails on it"):
        estimate(spec_of("llama4_text"), Training.of_stack("trl", target_modules=ALL, seq=8, rank=4))


@pytest.mark.parametrize("options, words", [
    ({"base": "host", "checkpointing": True}, "base host"),
    ({"stack": "unsloth", "kernels": "unsloth"}, "kernels unsloth"),
    ({"stack": "trl", "method": "qlora", "quantisation": "gptq"}, "quantisation gptq"),
    ({"stack": "transformers-4.48", "attention": "flash"}, "stack transformers-4.48")])
def test_what_of_experts_is_not_priced_is_refused(options, words):
    with pytest.raises(ValueError, match=f"are priced as transformers 5 has them, .* {words} is not priced"):
        estimate(spec_of("mixtral"), Training(**{"target_modules": ("q_proj",), "seq": 8, "rank": 4} | options))


def test_four_bits_leave_experts_as_they_are():
    """bitsandbytes makes linears smaller, and experts are none; what `prepare_model_for_kbit_training` makes fp32 they
    are of."""
    spec = spec_of("mixtral")
    experts = spec.layers * sum(s.parameters for s in spec.bare())
    sixteen, four, prepared = (
        estimate(spec, Training.of_stack("trl", target_modules=("q_proj",), seq=8, rank=4, **more)).parts["frozen weights"]
        for more in ({}, {"method": "qlora"}, {"method": "qlora", "upcast": "all"}))
    assert sixteen > four > 2 * experts and prepared - four >= 2 * experts


def test_the_first_layers_may_be_dense():
    spec = replace(spec_of("deepseek_v3"), layers=9, pattern=("one MLP",) * 2 + ("experts",) * 7)
    assert two_depths([spec.layout.kind(spec, i) for i in range(9)]) == (4, 5)
    assert spec.at(0).experts == 0 and spec.at(2).experts == 8 and len(spec.kinds()) == 2
    run = Training(rank=4, stack="transformers", target_modules=ALL, batch=2, seq=60)
    sizes = SIZES | EXPERTS["deepseek_v3"] | {"num_hidden_layers": 9, "first_k_dense_replace": 2}
    assert estimate(spec, run).peak == traced(AutoConfig.for_model("deepseek_v3", **sizes), run)[0].peak


def test_a_cache_of_latents_is_narrow():
    spec = spec_of("deepseek_v3")
    bill = estimate(spec, Serving(batch=1, prompt=32, new=32))
    assert bill.parts["KV cache"] == spec.layers * 64 * (spec.kv_rank + spec.rope_dim) * 2


def test_the_answer_says_what_it_knows_of_experts(capsys):
    assert main("memory --model mixtral-8x7b --targets all-linear --seq 512".split()) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "8 experts a layer, 2 a token" in out and "which of them the tokens take changes no byte" in out
    assert "adapters reach the experts too" in out
    assert main("memory --model mixtral-8x7b --targets q_proj,v_proj --seq 512".split()) == 0
    assert "the experts stay frozen" in capsys.readouterr().out.replace("\n", " ")
