"""Families of decoders: the closed form is the trace to the byte, the total transformers' own to the last weight."""

import itertools

import pytest
from test_memory_estimate import MODES
from test_memory_models import on_meta
from transformers import AutoConfig

from minilora.memory import ModelSpec, Training, estimate
from minilora.memory.traced_bill import traced

SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "intermediate_size": 96, "vocab_size": 512, "max_position_embeddings": 64, "pad_token_id": 0}
FAMILIES = {"qwen3": {}, "olmo2": {}, "granite": {"embedding_multiplier": 2.0, "logits_scaling": 3.0}}
METHODS = {"full": {"method": "full"}, "LoRA": {"target_modules": "all-linear"},
           "LoRA q v": {"target_modules": ("q_proj", "v_proj")}}
# so that the peak falls at different moments
ROWS = {"few tokens": {"batch": 1, "seq": 8}, "many": {"batch": 2, "seq": 60}}


# of several kinds of layer, or with what the first three have not; the window is shorter than the longer rows
LATER = {"mistral": {"sliding_window": 16}, "phi3": {"sliding_window": 16}, "phi3 of parts": {
             "sliding_window": None, "partial_rotary_factor": 0.75},
         "gemma3_text": {"sliding_window": 16, "num_hidden_layers": 8}, "olmo3": {
             "sliding_window": 16, "num_hidden_layers": 6}, "glm4": {}, "smollm3": {"num_hidden_layers": 5},
         "cohere": {"use_qk_norm": True}, "cohere without": {}, "gpt_bigcode": {"n_inner": 96}}
LATER_CELLS = [("bf16", "full", "many", False), ("autocast", "LoRA", "few tokens", False), ("fp32", "LoRA", "many", True)]


def config_of(family: str):
    return AutoConfig.for_model(family.split()[0], **SIZES | (FAMILIES | LATER)[family])


@pytest.mark.parametrize("family", [*FAMILIES, *LATER])
def test_total(family):
    config = config_of(family)
    assert ModelSpec.from_config(config.to_dict()).parameters == sum(p.numel() for p in on_meta(config).parameters())


@pytest.mark.parametrize("family, mode, method, rows, checkpointing", [
    cell for i, cell in enumerate(itertools.product(FAMILIES, MODES, METHODS, ROWS, (False, True))) if i % 3 == 0])
def test_closed_form_is_the_trace(family, mode, method, rows, checkpointing):
    config = config_of(family)
    run = Training(rank=4, stack="transformers", checkpointing=checkpointing, **MODES[mode], **METHODS[method],
                   **ROWS[rows])
    assert estimate(ModelSpec.from_config(config.to_dict()), run).peak == traced(config, run)[0].peak


@pytest.mark.parametrize("family", LATER)
@pytest.mark.parametrize("mode, method, rows, checkpointing", LATER_CELLS)
def test_later_families_too(family, mode, method, rows, checkpointing):
    test_closed_form_is_the_trace(family, mode, method, rows, checkpointing)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("options", [
    {"attention": "efficient"}, {"attention": "efficient", "method": "full"}, {"attention": "plain"},
    {"attention": "efficient", "dtype": "float32", "autocast": True, "checkpointing": True}, {"rows": "padded"},
    {"rows": "padded", "attention": "efficient", "checkpointing": True}, {"rows": "packed", "method": "full"},
    {"attention": "eager"}])
def test_attention_without_flash_is_the_trace_of_it(kv_heads, options):
    """Cards before sm80 have none, and a mask leaves it: kernels that keep more, or all scores."""
    config = AutoConfig.for_model("llama", **SIZES | {"num_key_value_heads": kv_heads})
    run = Training(**{"rank": 4, "stack": "transformers", "target_modules": "all-linear", "batch": 2, "seq": 60} | options)
    assert estimate(ModelSpec.from_config(config.to_dict()), run).peak == traced(config, run)[0].peak


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["full", "LoRA"])
@pytest.mark.parametrize("seq, checkpointing", [(60, True), (8, False)])
def test_trl_s_loss_is_the_trace_of_it(mode, method, seq, checkpointing):
    """With tiles that outweigh the rest, and with layers that do; adapters in bf16 beside a bf16 base."""
    sizes = SIZES | ({"vocab_size": 40_000} if seq == 60 else {"hidden_size": 1024, "intermediate_size": 8192,
                                                               "vocab_size": 40})
    config = AutoConfig.for_model("llama", **sizes)
    run = Training(rank=4, stack="trl", loss="chunked", checkpointing=checkpointing, batch=2, seq=seq,
                   optimizer="adamw_fused", adapter_dtype="bfloat16" if mode == "bf16" else "float32",
                   **MODES[mode], **METHODS[method])
    assert estimate(ModelSpec.from_config(config.to_dict()), run).peak == traced(config, run)[0].peak
