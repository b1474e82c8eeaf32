"""The instruments of notebooks 07 and 12: what `examine` notes, the faults it is given, and what was recorded."""

import torch
from small import our_llama

from minilora import LoRAConfig, inject, load_adapter, save_adapter
from minilora.experiments import FAMILY, FAULTS, examine, forget_alpha, measured, unfreeze, zero_A
from minilora.injection import lora_layers


def test_a_forgotten_alpha_is_read_as_eight(tmp_path):
    model = inject(our_llama(), LoRAConfig(4, 32, ("q_proj", "v_proj")))
    save_adapter(model, tmp_path)
    assert {layer.scaling for layer in lora_layers(load_adapter(our_llama(), tmp_path)).values()} == {8}
    forget_alpha(tmp_path)
    assert {layer.scaling for layer in lora_layers(load_adapter(our_llama(), tmp_path)).values()} == {2}


def test_zero_A_leaves_no_factor_to_learn_from():
    model = inject(our_llama(), LoRAConfig(4, 8, ("q_proj",)))
    zero_A(model)
    model(torch.arange(6)[None]).square().sum().backward()
    assert not any(p.grad.any() for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B))


def test_examine_sees_a_base_that_trains_and_serves_the_fresh_one():
    one = LoRAConfig(1, 2, ("q_proj",))
    seen, frozen = examine("tone", one, prepare=unfreeze, steps=1), examine("tone", one, steps=1)
    assert seen["base_changed"] and not frozen["base_changed"]
    assert seen["trained"] > 100 * frozen["trained"] == 100 * 4 * 320 and seen["modules"] == frozen["modules"] == 4
    assert seen["grad_A"] == frozen["grad_A"] == 0 < frozen["grad_B"]  # one step, and B is zero
    assert abs(seen["grad_B"] - frozen["grad_B"]) < 1e-3 * frozen["grad_B"]
    assert frozen["base_exact"] > 0.9 and frozen["served"] == frozen["exact"]


def test_the_record_holds_every_fault_twice():
    rows = measured("faults")["rows"]
    assert sorted((r["fault"], r["seed"]) for r in rows) == sorted((name, seed) for name in FAULTS for seed in (0, 1))


def test_the_family_was_tried_at_each_of_its_rates_and_taken_to_tone_at_the_best():
    rows = measured("family")["rows"]
    tried = [(r["method"], r["lr"]) for r in rows if r["task"] == "catalogue"]
    assert tried == [(name, lr) for name, (_, rates) in FAMILY.items() for lr in rates]
    for r in rows:
        if r["task"] == "tone":
            others = [x for x in rows if x["task"] == "catalogue" and x["method"] == r["method"]]
            assert r["lr"] == min(others, key=lambda x: x["train"])["lr"]
            assert {x["trained"] for x in others} == {r["trained"]}
    assert {r["method"] for r in measured("family_latency")["rows"]} >= set(FAMILY) - {"full"}
