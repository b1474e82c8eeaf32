"""Set-ups beside the plain step: a reference model (DPO), Muon, DoRA. Closed form and trace say the same."""

import pytest
from test_memory_families import SIZES
from transformers import AutoConfig

from minilora.__main__ import main
from minilora.memory import ModelSpec, Training, estimate
from minilora.memory.traced_bill import traced

LORA = {"target_modules": "all-linear"}
LLAMA = ModelSpec.preset("llama-3.2-1b")


def both(family: str = "llama", more: dict | None = None, **options) -> tuple[int, int]:
    config = AutoConfig.for_model(family, **SIZES | (more or {}))
    run = Training(**{"rank": 4, "stack": "trl", "batch": 2, "seq": 60, "loss": "chunked"} | options)
    return estimate(ModelSpec.from_config(config.to_dict()), run).peak, traced(config, run)[0].peak


@pytest.mark.parametrize("options", [
    LORA | {"checkpointing": True, "autocast": True}, LORA | {"rows": "padded"}, {"method": "full"},
    {"method": "full", "checkpointing": True, "dtype": "float32", "autocast": True}])
def test_a_reference_model_is_priced_as_it_is_traced(options):
    by_form, by_trace = both(reference_model=True, **options)
    assert by_form == by_trace


def test_the_reference_of_experts_is_without_their_adapters():
    by_form, by_trace = both("mixtral", {"num_local_experts": 4}, reference_model=True, checkpointing=True, **LORA)
    assert by_form == by_trace


def test_a_reference_is_the_same_base_or_a_second_one():
    """TRL's `DPOTrainer`: with adapters the base without them; else a copy that is frozen."""
    def parts(method, reference):
        run = Training.of_stack("trl", method=method, target_modules="all-linear", seq=64, reference_model=reference)
        return estimate(LLAMA, run).parts
    assert parts("lora", True)["frozen weights"] == parts("lora", False)["frozen weights"]
    full = parts("full", True)
    assert full["frozen weights"] == full["trainable weights"] == 2 * LLAMA.parameters


@pytest.mark.parametrize("options", [{}, {"adapter_dtype": "bfloat16"}, {"batch": 1, "seq": 2}])
def test_muon_is_priced_as_it_is_traced(options):
    by_form, by_trace = both(**{"optimizer": "muon", "seq": 4} | LORA | options)
    assert by_form == by_trace


def test_muon_keeps_one_number_a_weight():
    adamw, muon = (estimate(LLAMA, Training.of_stack("trl", target_modules="all-linear", seq=64, optimizer=name))
                   .parts["optimizer"] for name in ("adamw", "muon"))
    assert adamw == 2 * muon == 8 * LLAMA.lora_parameters(16, "all-linear")


# so that the peak falls where a layer makes the norms, or where it holds what backward needs
@pytest.mark.parametrize("options", [
    {"seq": 8}, {"dtype": "float32"}, {"dtype": "float32", "autocast": True}, {"autocast": True, "checkpointing": True},
    {"autocast": True, "adapter_dtype": "bfloat16", "seq": 8}, {"stack": "trl", "loss": "chunked"}])
def test_dora_is_priced_as_it_is_traced(options):
    by_form, by_trace = both(more={"vocab_size": 40, "attention_bias": True},
                             **LORA | {"dora": True, "loss": "whole", "stack": "transformers"} | options)
    assert by_form == by_trace


def test_dora_makes_the_whole_weight():
    """The largest matrix of Llama-3.2-1B is 8192 x 2048: in fp32 with B A, its identity and their sum."""
    run = Training.of_stack("trl", target_modules=("down_proj",), seq=16)
    plain, dora = (estimate(LLAMA, Training.of_stack("trl", target_modules=("down_proj",), seq=16, dora=on))
                   for on in (False, True))
    assert dora.peak - plain.peak > 3 * 4 * 8192 * 2048
    assert dora.parts["adapters"] - plain.parts["adapters"] == LLAMA.layers * 4 * LLAMA.hidden
    assert "DoRA" in estimate(LLAMA, run).run.assumptions() + dora.run.assumptions()


@pytest.mark.parametrize("options, words", [
    ("--dora --method qlora", "DoRA is priced as PEFT has it, on a base of 16 or 32 bits"),
    ("--dora --cards 2", "one card, no dropout"),
    ("--model mixtral-8x7b --dora --targets all-linear", "PEFT adapts mlp.gate.weight of mixtral-8x7b, which is no linear"),
    ("--method full --optimizer muon", "torch's Muon takes matrices alone"),
    ("--reference-model --loss whole", "priced as TRL's DPOTrainer has it: stack trl, loss chunked"),
    ("--reference-model --stack unsloth", "priced as TRL's DPOTrainer has it")])
def test_what_is_no_such_set_up_is_refused(options, words, capsys):
    model = [] if "--model" in options else ["--model", "llama-3.2-1b"]
    assert main(["memory", *model, *options.split()]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_the_first_line_names_the_reference(capsys):
    assert main("memory --model llama-3.2-1b --reference-model --seq 64 --batch 2".split()) == 0
    assert "a reference model" in capsys.readouterr().out.replace("\n", " ").partition("peak")[0]
