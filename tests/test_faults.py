"""Notebook 07's instruments: what `examine` notes, the faults it is given, the record, the symptom grid."""

import torch
from small import our_llama

from minilora import LoRAConfig, inject, load_adapter, plots, save_adapter
from minilora.experiments import FAULTS, examine, forget_alpha, measured, unfreeze, zero_A
from minilora.insert import lora_layers


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


def test_the_symptom_grid_says_whether_its_rows_can_be_told_apart():
    cells = {"well": {"loss": ("0.1", False), "exact": ("99%", False)},
             "ill": {"loss": ("0.1", False), "exact": ("2%", True)}}
    fig, sentence = plots.symptom_grid(cells, title="t")
    assert "well: 0 of 2; ill: 1 of 2" in sentence and sentence.endswith("other cells: True.")
    assert [t.get_text() for t in fig.axes[0].texts] == ["0.1", "99%", "0.1", "2%"]
    assert plots.symptom_grid({**cells, "also": cells["ill"]}, title="t")[1].endswith("other cells: False.")
