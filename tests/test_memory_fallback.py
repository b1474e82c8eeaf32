"""An architecture without a closed form is answered by the trace of two depths, and the answer says so."""

import json

import pytest
from transformers import AutoConfig

from minilora.__main__ import main
from minilora.memory import ModelSpec, Training, estimate
from minilora.memory.bill import two_depths
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
    trace, parameters = traced(AutoConfig.from_pretrained(tmp_path), run)
    assert (bill.peak, bill.parameters) == (trace.peak, parameters)


def test_the_command_says_so(tmp_path, capsys):
    assert main(["memory", "--config", str(folder(tmp_path, "helium")), "--seq", "16", "--rank", "4", "--targets",
                 "q_proj", "--card", "t4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("stack trl") and "t4: fits" in out
    assert "helium has no closed form here: this is by the trace of 4 and 5 layers, extended to 9" in out


@pytest.mark.parametrize("family, options, words", [
    ("helium", "--stack unsloth", "the trace has kernels torch alone, got unsloth"),
    ("helium", "--cards 2", "the trace has cards 1 alone"),
    ("whisper", "--stack transformers", "whisper is none of the kinds that are priced: language models"),
    ("mamba", "--stack transformers", "mamba scans its tokens one after the other"),
    ("nothing", "--stack transformers", "is of model_type 'nothing', which transformers")])
def test_what_no_trace_runs_is_refused(tmp_path, capsys, family, options, words):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert main(["memory", "--config", str(tmp_path), "--targets", "q_proj", *options.split()]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_depths_repeat_the_pattern():
    kinds = lambda pattern: AutoConfig.for_model("gemma3_text", **SIZES | {"num_hidden_layers": len(pattern),
                                                                          "layer_types": pattern})
    assert depths_of(kinds(["full_attention", "sliding_attention", "sliding_attention"] * 10)) == (6, 9)
    assert depths_of(kinds(["full_attention"] * 4)) == (4,)
    assert two_depths([0] * 61) == (4, 5) and two_depths([0, 0, 0, 1] * 5) == (8, 12)


@pytest.mark.parametrize("family, sizes, says", [
    ("bert", {}, "bert has no closed form here"),
    ("t5", {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 6, "num_heads": 4}, "extended to 6"),
    ("vit", {"image_size": 32, "patch_size": 8}, "vit has no closed form here")])
def test_encoders_and_pictures_are_traced_by_the_class_of_their_config(tmp_path, capsys, family, sizes, says):
    AutoConfig.for_model(family, **SIZES | {"num_hidden_layers": 6} | sizes).save_pretrained(tmp_path)
    assert main(["memory", "--config", str(tmp_path), "--seq", "16", "--rank", "4", "--targets", "all-linear"]) == 0
    out = capsys.readouterr().out
    assert says in out and "its loss is that of " in out  # TRL's chunks are for models that write on
