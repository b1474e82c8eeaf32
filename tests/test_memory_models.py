"""Shapes and totals to the last digit, against published figures and against transformers and peft themselves."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.__main__ import main
from minilora.memory import Card, ModelSpec
from minilora.memory.models import FAMILIES, PRESETS
from minilora.memory.presets import CONFIGS

TOTALS = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_604_259_328, "opt-6.7b": 6_658_473_984, "opt-175b": 174_604_468_224,
    "bloom-176b": 176_247_271_424, "llama-7b": 6_738_415_616, "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "qwen2.5-72b": 72_706_203_648, "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320, "phi-3-mini": 3_821_079_552,
    "opt-125m": 125_239_296, "opt-1.3b": 1_315_758_080, "opt-13b": 12_853_473_280, "bloom-560m": 559_214_592,
    "bloom-7b1": 7_069_016_064, "santacoder": 1_124_886_528, "starcoderbase-1b": 1_137_207_296,
    "starcoderbase-15b": 15_517_456_384, "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496,
    "llama-3.3-70b": 70_553_706_496, "tinyllama-1.1b": 1_100_048_384, "codellama-7b": 6_738_546_688,
    "codellama-34b": 33_743_970_304, "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384, "smollm3-3b": 3_075_098_624, "yi-6b": 6_061_035_520, "yi-1.5-9b": 8_829_407_232,
    "yi-34b": 34_388_917_248, "deepseek-llm-7b": 6_910_365_696, "deepseek-coder-1.3b": 1_346_471_936,
    "deepseek-coder-6.7b": 6_740_512_768, "mistral-nemo-12b": 12_247_782_400, "mistral-small-24b": 23_572_403_200,
    "codestral-22b": 22_247_282_688, "mistral-large-123b": 122_610_069_504, "qwen2-0.5b": 494_032_768,
    "qwen2-7b": 7_615_616_512, "r1-qwen-1.5b": 1_777_088_000, "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952, "gemma-3-4b-text": 3_880_263_168, "gemma-3-12b-text": 11_766_034_176,
    "gemma-3-27b-text": 27_009_346_304, "phi-3-medium": 13_960_238_080, "phi-3.5-mini": 3_821_079_552,
    "phi-4": 14_659_507_200, "phi-4-mini": 3_836_021_760, "olmo-2-1b": 1_484_916_736, "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400, "olmo-2-32b": 32_234_279_936, "olmo-3-7b": 7_298_011_136,
    "olmo-3-32b": 32_233_522_176, "granite-3.1-2b": 2_533_531_648, "granite-3.1-8b": 8_170_848_256,
    "glm-4-9b": 9_400_279_040, "command-r": 34_980_831_232, "command-r-plus": 103_810_674_688,
    "aya-23-8b": 8_028_033_024, "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_630_071_296,
    "qwen3-30b-a3b": 30_532_122_624, "qwen3-235b-a22b": 235_093_634_560, "qwen3-coder-480b-a35b": 480_154_875_392,
    "gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672, "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880, "deepseek-v3": 671_026_404_352, "llama-4-scout-text": 107_769_861_120,
}

# (model, rank, targets): what PEFT prints
PRINTED = {
    ("llama-7b", 8, ("q_proj", "v_proj")): (4_194_304, 6_742_609_920),
    ("llama-2-7b", 64, "all-linear"): (159_907_840, 6_898_323_456),
    ("llama-3-8b", 16, "all-linear"): (41_943_040, 8_072_204_288),
    ("qwen2.5-0.5b", 16, "all-linear"): (8_798_208, 502_830_976),
    ("opt-6.7b", 16, ("q_proj", "v_proj")): (8_388_608, 6_666_862_592),
    ("gpt2", 8, ("c_attn",)): (294_912, 124_734_720),
}


def transformers_config(spec: ModelSpec):
    """The same shape in the words of the family's own config class."""
    from transformers import AutoConfig

    if spec.family in ("gpt2", "gpt_bigcode"):
        sizes = {"n_embd": spec.hidden, "n_layer": spec.layers, "n_head": spec.heads, "n_positions": spec.context}
    elif spec.family == "bloom":
        sizes = {"hidden_size": spec.hidden, "n_layer": spec.layers, "n_head": spec.heads}
    else:
        sizes = {"hidden_size": spec.hidden, "num_hidden_layers": spec.layers, "num_attention_heads": spec.heads,
                 "max_position_embeddings": spec.context, "intermediate_size": spec.ffn, "ffn_dim": spec.ffn,
                 "num_key_value_heads": spec.kv_heads, "head_dim": spec.head_dim,
                 "word_embed_proj_dim": spec.embedding, "pad_token_id": 0}
        sizes |= {"glm4": {"attention_bias": spec.qkv_bias}, "cohere": {"use_qk_norm": spec.qk_norm}}.get(spec.family, {})
    return AutoConfig.for_model(spec.family, vocab_size=spec.vocab, tie_word_embeddings=spec.tied, **sizes)


def on_meta(config):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def test_every_total_to_the_last_digit():
    assert {name: spec.parameters for name, spec in PRESETS.items()} == TOTALS


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "gpt3-175b"])
def test_one_layer_and_the_rest_are_those_of_transformers(name):
    """Two layers and three, so that a layer's share and the rest's are both checked, in seconds; of experts, before
    which up to three layers may be dense, four and five."""
    from dataclasses import replace

    from transformers import AutoConfig

    experts = PRESETS[name].experts
    for layers in (4, 5) if experts else (2, 3):
        spec = (ModelSpec.from_config(CONFIGS[name] | {"num_hidden_layers": layers}) if experts
                else replace(PRESETS[name], layers=layers))
        model = on_meta(AutoConfig.for_model(**CONFIGS[name] | {"num_hidden_layers": layers}) if experts
                        else transformers_config(spec))
        assert sum(p.numel() for p in model.parameters()) == spec.parameters
    names = {n for n, _ in model.named_modules()}
    for m in spec.bare():
        shape = (m.inp, m.out) if m.transposed else (m.out, m.inp)
        shape = (m.count, *shape) if m.count > 1 else shape if m.inp > 1 else shape[:1]
        assert tuple(model.get_parameter(f"{spec.layout.layer}{layers - 1}.{m.name}").shape) == shape
    for m in spec.linears():
        full = f"{spec.layout.layer}{layers - 1}.{m.name}"
        assert full in names
        weight = model.get_submodule(full).weight
        assert tuple(weight.shape if spec.family != "gpt2" else weight.T.shape) == (m.out, m.inp)


@pytest.mark.parametrize("name, rank, targets", PRINTED)
def test_what_peft_prints(name, rank, targets):
    spec = ModelSpec.preset(name)
    trainable = spec.lora_parameters(rank, targets)
    assert (trainable, spec.parameters + trainable) == PRINTED[name, rank, targets]


# "mixtral_until_4" is how transformers had it before; no config.json calls itself so
@pytest.mark.parametrize("family", [family for family in FAMILIES if not FAMILIES[family].experts])  # test_memory_experts
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_adapters_are_those_of_peft(family, targets, tmp_path):
    """On a small model of each family, read back from the config.json that transformers writes."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as defaults

    heads = 1 if family == "gpt_bigcode" else 4 if family in ("gpt2", "opt", "bloom") else 2
    spec = ModelSpec("small", family, 3, 32, 4, heads, 8, 128 if heads != 2 else 48, 64, 40, FAMILIES[family].tied)
    config = transformers_config(spec)
    config.save_pretrained(tmp_path)
    spec = ModelSpec.from_config(tmp_path)
    model = on_meta(config)
    assert spec.parameters == sum(p.numel() for p in model.parameters())
    known = set(defaults.get(family, FAMILIES[family].targets))  # it has none for some
    assert targets or known == set(FAMILIES[family].targets)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=targets or sorted(known)))
    trainable, every = peft.get_nb_trainable_parameters()
    assert (spec.lora_parameters(4, targets), spec.parameters + spec.lora_parameters(4, targets)) == (trainable, every)


def test_the_paper_s_counts():
    """LoRA's GPT-3 figures (its table 4) and GPT-2 medium's, which the paper prints as 0.35M."""
    gpt3 = ModelSpec.preset("gpt3-175b")
    assert gpt3.lora_parameters(1) == 4_718_592
    assert gpt3.lora_parameters(8, ("q_proj", "v_proj")) == 37_748_736
    assert gpt3.lora_parameters(4, ("q_proj", "k_proj", "v_proj", "out_proj")) == 37_748_736


def test_the_base_of_the_notebooks_and_opt_350m():
    from transformers import OPTConfig

    from minilora.llama import Llama, LlamaConfig

    base = LlamaConfig(724, 160, 448, 4, 5, max_position_embeddings=256, tie_word_embeddings=True)
    with torch.device("meta"):
        total = sum(p.numel() for p in Llama(base).parameters())
    assert ModelSpec.from_config(base.to_hf()).parameters == total == 1_387_040

    config = OPTConfig(num_hidden_layers=24, hidden_size=1024, ffn_dim=4096, num_attention_heads=16,
                       word_embed_proj_dim=512, do_layer_norm_before=False)
    spec = ModelSpec.from_config(config.to_dict())
    assert spec.parameters == sum(p.numel() for p in on_meta(config).parameters()) == 331_196_416


@pytest.mark.parametrize("name, near", [("llama-3-8", "llama-3-8b"), ("LLAMA-2-7B", "llama-2-7b"), ("opt", "opt-6.7b"),
                                        ("zzz", "there are: gpt2")])
def test_an_unknown_model_lists_near_ones(name, near):
    with pytest.raises(ValueError, match="no model") as error:
        ModelSpec.preset(name)
    assert near in str(error.value)


@pytest.mark.parametrize("targets, words", [
    (("q_prj",), "'q_prj' matches no linear of a layer of llama-3-8b; near it: q_proj"),
    (("q_proj", "zzzz"), "there are: q_proj, k_proj"),
    (("layers.3.self_attn.q_proj",), "other matrices in one layer"),
    (".*embed.*", "matches no linear"),
    ("(", "regular expression"),
    ((), "must name modules"),
])
def test_targets_are_strict(targets, words):
    with pytest.raises(ValueError) as error:
        ModelSpec.preset("llama-3-8b").lora_parameters(8, targets) if targets else ModelSpec.preset(
            "llama-3-8b").targets(iter(()))
    assert words in str(error.value)


def test_targets_follow_the_rules_of_the_config():
    spec = ModelSpec.preset("llama-3-8b")
    assert [m.name for m in spec.targets(r".*self_attn\.[qk]_proj")] == ["self_attn.q_proj", "self_attn.k_proj"]
    assert [m.name for m in spec.targets(["mlp.up_proj"])] == ["mlp.up_proj"]
    assert len(spec.targets("all-linear")) == 7


GOOD = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64}


@pytest.mark.parametrize("change, words", [
    ({"hidden_size": None}, "hidden_size must be a positive integer of a sensible size, got None"),
    ({"hidden_size": "32"}, "hidden_size must be a positive integer of a sensible size, got '32'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer of a sensible size, got 0"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a positive integer of a sensible size"),
    ({"vocab_size": True}, "vocab_size"),
    ({"intermediate_size": [48, 48]}, "intermediate_size"),
    ({"num_attention_heads": 5}, "hidden_size 32 is no multiple of num_attention_heads 5"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ({"model_type": "lama"}, "near it: llama"),
    ({"model_type": None}, "no model_type"),
    ({"model_type": "qwen9", "text_config": {}}, "text_config"),
    ({"model_type": "helium"}, "say family llama"),
    ({"model_type": "olmoe", "num_experts": 8}, "layers of several experts are not priced"),
    ({"model_type": "qwen3_moe", "mlp_only_layers": [7]}, "mlp_only_layers must be a list of numbers from 0 to 1"),
    ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise is not 0"),
    ({"model_type": "mixtral", "output_router_logits": True}, "the loss of routers is not priced in closed form"),
    ({"model_type": "deepseek_v3"}, "a deepseek_v3 config lacks moe_intermediate_size"),
    ({"model_type": "mixtral", "num_experts_per_tok": 9}, "a token goes through 9 experts, and there are 8"),
    ({"model_type": "llama4_text", "no_rope_layers": [1]}, "no_rope_layers must be a list of 2 entries"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "is no causal language model"),
    ({"model_type": "mistral", "sliding_window": -1}, "sliding_window must be a positive integer"),
    ({"model_type": "gemma3_text", "layer_types": ["full_attention"]}, "layer_types must be a list of 2 times"),
    ({"model_type": "smollm3", "no_rope_layers": 1}, "no_rope_layers must be a list of 2 numbers"),
    ({"model_type": "glm4", "partial_rotary_factor": 2}, "partial_rotary_factor must be in (0, 1], got 2"),
    ({"num_local_experts": 8}, "num_local_experts is 8; layers of several experts are not priced"),
])
def test_a_broken_config_says_which_field(change, words):
    with pytest.raises(ValueError) as error:
        ModelSpec.from_config({**GOOD, **change})
    assert words in str(error.value)


@pytest.mark.parametrize("field", [k for k in GOOD if k not in ("model_type", "max_position_embeddings")])
def test_a_missing_field_is_named(field):
    with pytest.raises(ValueError, match=f"lacks {field}"):
        ModelSpec.from_config({k: v for k, v in GOOD.items() if k != field})


def test_an_unknown_family_says_what_it_lacks():
    with pytest.raises(ValueError, match="as a llama it lacks num_hidden_layers, vocab_size"):
        ModelSpec.from_config({"model_type": "other", "hidden_size": 1, "num_attention_heads": 1,
                               "intermediate_size": 1})
    assert ModelSpec.from_config({**GOOD, "model_type": "granite"}, family="llama").parameters > 0


@pytest.mark.parametrize("content, words", [(None, "there is no"), ("{", "is no JSON"), ("[]", "holds a list"),
                                            (b"\xff\xfe\x00", "is no JSON"), ("[" * 100_000, "is no JSON")])
def test_a_file_that_is_no_config(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words):
        ModelSpec.from_config(tmp_path)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_config_is_read_or_refused(data):
    """Whatever stands in a field: a shape, or one ValueError."""
    kind = data.draw(st.sampled_from(list(FAMILIES)))
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "ffn_dim": 64}
    fields = [*GOOD, *sizes, "num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "hidden_act",
              "resid_pdrop", "attention_dropout", "word_embed_proj_dim", "do_layer_norm_before", "activation_function",
              "num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
              "n_shared_experts", "n_group", "topk_method", "q_lora_rank", "qk_rope_head_dim", "first_k_dense_replace",
              "mlp_only_layers", "moe_layers", "no_rope_layers", "layer_types", "router_jitter_noise"]
    changes = data.draw(st.dictionaries(st.sampled_from(fields), JSON, min_size=1, max_size=3))
    try:
        experts = {"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2}
        spec = ModelSpec.from_config(
            {**GOOD, **sizes, **(experts if FAMILIES[kind].experts else {}), "model_type": kind, **changes})
    except ValueError:
        return
    assert spec.parameters > 0 and spec.lora_parameters(1, "all-linear") > 0


def test_cards_keep_three_sizes_apart():
    card = Card.of("rtx-4090")
    assert card.nominal == 24 * 2**30 and card.reported == 24564 * 2**20
    low, high = card.usable
    assert low < high < card.reported < card.nominal
    low, high = Card.of("rtx-3090").usable
    assert Card.of("rtx-3090").reported is None and low < 0.93 * 24 * 2**30 < high < 24 * 2**30
    with pytest.raises(ValueError, match="near it: rtx-4090"):
        Card.of("rtx4090")


def test_the_commands(capsys):
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpt3-175b"]["parameters"] == 174_604_259_328
    assert main(["cards"]) == 0 and "rtx-4090" in capsys.readouterr().out
    assert main(["models", "--jsno"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
