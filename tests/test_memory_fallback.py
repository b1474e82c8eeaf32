"""An architecture without a closed form is answered by the trace of two depths, and the answer says so."""

import json
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from minilora.__main__ import main
from minilora.memory import ModelSpec, Training, estimate
from minilora.memory.traced_bill import depths_of, estimate_by_trace, traced

SIZES = {"num_hidden_layers": 9, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "intermediate_size": 96, "vocab_size": 512, "max_position_embeddings": 64, "pad_token_id": 0}


def folder(tmp_path, family: str, **more):
    AutoConfig.for_model(family, **SIZES | more).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("options", [{"loss": "whole"}, {"checkpointing": False, "autocast": False}])
def test_where_both_know_they_say_the_same(tmp_path, options):
    run = Training.of_stack("trl", target_modules="all-linear", batch=2, seq=40, rank=4, **options)
    by_trace = estimate_by_trace(folder(tmp_path, "llama"), run)
    assert by_trace.peak == estimate(ModelSpec.from_config(tmp_path), run).peak
    assert by_trace.depths == (4, 5) and abs(sum(by_trace.parts.values()) - by_trace.peak) <= len(by_trace.parts)


def test_two_depths_are_the_whole(tmp_path):
    """Every fourth layer of SmolLM3 has no rotary positions: a pattern of four."""
    run = Training.of_stack("transformers", target_modules=("q_proj", "v_proj"), seq=40, rank=4)
    bill = estimate_by_trace(folder(tmp_path, "smollm3", num_hidden_layers=16), run)
    assert bill.depths == (8, 12)
    assert bill.peak == traced(AutoConfig.from_pretrained(tmp_path), run).peak


def test_the_command_says_so(tmp_path, capsys):
    assert main(["memory", "--config", str(folder(tmp_path, "glm4")), "--seq", "16", "--rank", "4", "--targets",
                 "q_proj", "--card", "t4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("stack trl") and "t4: fits" in out
    assert "glm4 has no closed form here: this is by the trace of 4 and 5 layers, extended to 9" in out


@pytest.mark.parametrize("family, options, words", [
    ("glm4", "--stack unsloth", "the trace has kernels torch alone, got unsloth"),
    ("glm4", "--cards 2", "the trace has cards 1 alone"),
    ("vit", "--stack transformers", "vit is no causal language model")])
def test_what_no_trace_runs_is_refused(tmp_path, capsys, family, options, words):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert main(["memory", "--config", str(tmp_path), "--targets", "q_proj", *options.split()]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_depths_repeat_the_pattern():
    assert depths_of(SimpleNamespace(kinds=["a", "b", "b"] * 10), 30) == (6, 9)
    assert depths_of(SimpleNamespace(first_k_dense_replace=3), 61) == (4, 5)
    assert depths_of(SimpleNamespace(), 4) == (4,)
