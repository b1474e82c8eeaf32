"""Stacks: what their releases set, what the command takes for granted and says, what a setting is worth."""

import json
from dataclasses import replace

import pytest

from minilora.__main__ import main
from minilora.memory import ModelSpec, Training, estimate
from minilora.memory.stacks import STACKS

LLAMA = ModelSpec.preset("llama-3-8b")
ALL = "all-linear"


def peak(**run) -> int:
    return estimate(LLAMA, Training.of_stack(**{"stack": "trl", "target_modules": ALL, "seq": 4096} | run)).peak


def test_in_python_a_run_is_ours_and_on_the_command_line_trl_s(capsys):
    assert Training().stack == "minilora" and not Training().checkpointing
    assert main(["memory", "--model", "llama-3-8b", "--seq", "64"]) == 0
    first = capsys.readouterr().out.partition("\n\n")[0].replace("\n", " ")
    assert first == ("stack trl (trl 1.16, transformers 5.23, peft 0.21): bfloat16 weights, autocast, float32 "
                     "adapters, loss in chunks, optimizer adamw_fused, fused attention, checkpointing")


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_every_stack_answers_and_says_what_it_took(stack, method):
    run = Training.of_stack(stack, method=method, target_modules=ALL, seq=256)
    bill = estimate(LLAMA, run)
    assert bill.peak == sum(bill.parts.values()) > 0
    assert run.assumptions().startswith(f"stack {stack} ({STACKS[stack].versions})")


@pytest.mark.parametrize("given, overrides", [({"checkpointing": False}, "checkpointing"), ({"loss": "whole"}, "loss")])
def test_what_is_said_goes_before_what_a_stack_sets(given, overrides):
    assert getattr(Training.of_stack("trl", **given), overrides) == given[overrides]


def test_no_such_stack():
    with pytest.raises(ValueError, match="no stack 'tlr'; near it: trl"):
        Training.of_stack("tlr")


def test_a_loss_in_chunks_holds_no_logits():
    """At 4,096 tokens and 128,256 words all logits are 10 bytes each in forward, 12 in backward; a tile is 256 MiB."""
    tokens, words = 4096, LLAMA.vocab
    whole, chunked = peak(loss="whole"), peak()
    assert whole - chunked > 8 * tokens * words
    fused = peak(loss="fused")
    assert chunked * 0.9 < fused < whole


def test_fused_adamw_has_no_temporary():
    foreach, fused = (peak(method="full", stack="transformers", seq=16, optimizer=name) for name in
                      ("adamw", "adamw_fused"))
    assert foreach - fused == pytest.approx(2 * LLAMA.parameters, rel=1e-3)


def test_paged_states_leave_the_device():
    run = Training.of_stack("trl", method="full", optimizer="paged_adamw", seq=16)
    states = estimate(LLAMA, run).parts["optimizer"]
    assert states == 65 * 2 * LLAMA.hidden * 4  # the norms' weights alone are too small to be paged
    eight = estimate(LLAMA, replace(run, optimizer="paged_adamw8bit")).parts["optimizer"]
    assert states < eight < LLAMA.parameters / 10


@pytest.mark.parametrize("upcast, width", [("all", 4), ("norms", 2), ("none", 2)])
def test_what_preparing_a_four_bit_base_makes_fp32(upcast, width):
    run = Training.of_stack("transformers", method="qlora", target_modules=ALL, seq=64, upcast=upcast)
    rows = {row.name: row.bytes for row in estimate(LLAMA, run).rows}
    assert rows["embed_tokens"] == LLAMA.vocab * LLAMA.hidden * width
    assert rows["norm"] == 65 * LLAMA.hidden * (2 if upcast == "none" else 4)


def test_adapters_in_bf16_are_half():
    parts = [estimate(LLAMA, Training.of_stack("trl", target_modules=ALL, seq=64, adapter_dtype=dtype)).parts
             for dtype in ("float32", "bfloat16")]
    assert parts[0]["adapters"] == 2 * parts[1]["adapters"]


def test_offloaded_inputs_do_not_grow_with_the_layers():
    """unsloth sends a layer's input to the host: per layer and token nothing stays."""
    def a_layer(stack):
        run = Training.of_stack(stack, target_modules=ALL, seq=8192)
        return (estimate(replace(LLAMA, layers=40), run).parts["activations"]
                - estimate(LLAMA, run).parts["activations"]) / 8 / 8192
    assert a_layer("unsloth") == 0 and a_layer("trl") == 2 * LLAMA.hidden


def test_gptq_stores_what_it_says():
    run = Training.of_stack("trl", method="qlora", quantisation="gptq", target_modules=ALL, seq=64)
    parts = estimate(LLAMA, run).parts["frozen weights"]
    weights = sum(m.parameters for m in LLAMA.linears()) * 32
    per_weight = (parts - 2 * LLAMA.outer_parameters) / weights * 8
    assert per_weight == pytest.approx(4 + 16 / 128 + 4 / 128, rel=2e-3)  # codes, scales, zero points


def test_what_would_change_the_verdict_is_named(capsys):
    command = "memory --model llama-3-8b --method qlora --targets all-linear --seq 8192 --card rtx-4090"
    assert main(command.split()) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "rtx-4090: fits" in out and "without checkpointing: does not fit" in out
    assert main(f"{command} --no-checkpointing".split()) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "rtx-4090: does not fit" in out and "with checkpointing: fits" in out


def quantised(**how) -> dict:
    return {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4,
            "intermediate_size": 512, "vocab_size": 1000, "quantization_config": how}


@pytest.mark.parametrize("how, stored", [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("nf4", 0)), ({"load_in_4bit": True}, ("nf4", 0)),
    ({"quant_method": "gptq", "bits": 4, "group_size": 64}, ("gptq", 64)),
    ({"quant_method": "gptq", "bits": 4, "group_size": -1}, ("gptq", 0))])
def test_a_base_stored_in_four_bits_is_priced_as_stored(how, stored, tmp_path, capsys):
    spec = ModelSpec.from_config(quantised(**how))
    assert (spec.quantised, spec.group) == stored
    with pytest.raises(ValueError, match=f"is stored in 4 bits \\({stored[0]}\\): that is method qlora"):
        estimate(spec, Training.of_stack("trl"))
    (tmp_path / "config.json").write_text(json.dumps(quantised(**how)))
    assert main(["memory", "--config", str(tmp_path), "--seq", "32", "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["run"]
    assert run["method"] == "qlora" and run["quantisation"] == stored[0]


@pytest.mark.parametrize("how, words", [
    ({"quant_method": "awq", "bits": 4}, "stored as awq in 4 bits, which is not priced"),
    ({"quant_method": "fp8"}, "stored as fp8"), ({"quant_method": "mxfp4"}, "stored as mxfp4"),
    ({"quant_method": "gptq", "bits": 8}, "stored as gptq in 8 bits"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "stored as bitsandbytes in 8 bits"),
    ({"quant_method": "gptq", "bits": 4, "group_size": "x"}, "group_size must be")])
def test_a_base_stored_otherwise_is_refused_by_name(how, words):
    with pytest.raises(ValueError, match=words):
        ModelSpec.from_config(quantised(**how))


def test_what_is_said_of_quantisation_must_be_an_object():
    with pytest.raises(ValueError, match="quantization_config must be an object"):
        ModelSpec.from_config(quantised() | {"quantization_config": 4})


@pytest.mark.parametrize("option", ["--tensor-parallel", "--rank-pattern=q_proj:4", "--offload-optimizer", "--load-in-8bit", "--rslora"])
@pytest.mark.parametrize("command", ["memory", "fit"])
def test_what_is_not_priced_is_refused_with_the_reason(command, option, capsys):
    assert main([command, "--model", "llama-3-8b", option]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"minilora {command}: {option.partition('=')[0]}: ") and err.count("\n") == 1
    assert "not priced" in err or "no byte" in err
