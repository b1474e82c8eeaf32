"""Architectures whose modules transformers has renamed or fused: extract, and adapters that were made before."""

import json
import warnings

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from small import shake
from torch import nn

from minilora import LoRAConfig, inject, load_adapter, save_adapter
from minilora import hub_names as names_of_the_hub
from minilora.adapters import CONFIG, WEIGHTS
from minilora.extract import extract_adapter


def tuned(name: str, folder, only=lambda path: True) -> tuple:
    """A base's checkpoint, that of the same model with rank-2 changes to its linears, and the latter's outputs."""
    model = zoo.make(name, torch.float32)
    model.save_pretrained(folder / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for path, m in model.named_modules():
            if isinstance(m, nn.Linear) and "lm_head" not in path and only(path):
                m.weight += 0.1 * torch.randn(len(m.weight), 2) @ torch.randn(2, m.weight.shape[1])
        model.save_pretrained(folder / "tuned")
        return type(model), zoo.outputs(model, name)


@pytest.mark.parametrize("name", ["vit", "falcon", "mixtral", "gpt_oss", "llama"])
def test_what_extract_writes_opens_on_the_same_checkpoint(name, tmp_path):
    kind, expected = tuned(name, tmp_path)
    written = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=2)
    model = kind.from_pretrained(tmp_path / "base").eval()
    assert set(written.modules) <= {path for path, _ in model.named_modules()} and written.note == ""
    with torch.no_grad():
        assert zoo.far(zoo.outputs(model, name), expected) > 1e-3
        left = set(written.left_out) - {"classifier.weight"}
        assert not left
        load_adapter(model, tmp_path / "a")
        assert zoo.far(zoo.outputs(model, name), expected) < 2e-5


def test_targets_may_be_called_as_on_disk_or_as_in_memory(tmp_path):
    tuned("vit", tmp_path)
    ways = [extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / target, rank=2, targets=[target])
            for target in ("query", "q_proj")]
    assert ways[0].modules.keys() == ways[1].modules.keys() == {
        f"vit.layers.{i}.attention.q_proj" for i in range(2)}


def test_weights_that_are_fused_in_memory_are_refused_by_name(tmp_path):
    model = zoo.make("mixtral", torch.float32)
    model.save_pretrained(tmp_path / "base")
    model.model.layers[0].mlp.experts.down_proj.data[1] += 0.1
    model.model.layers[0].self_attn.q_proj.weight.data += torch.ones(1, 32)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"experts.1.w2.weight differs, and is no module of its own"):
        extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=2)
    assert not (tmp_path / "a").exists()
    some = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=1, targets=["q_proj"])
    assert list(some.modules) == ["model.layers.0.self_attn.q_proj"]
    assert some.left_out == ("model.layers.0.block_sparse_moe.experts.1.w2.weight",)


def test_without_transformers_names_are_those_on_disk_and_that_is_said(tmp_path, monkeypatch):
    tuned("vit", tmp_path)
    monkeypatch.setattr(names_of_the_hub, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    written = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=2)
    assert "vit.encoder.layer.0.attention.attention.query" in written.modules
    assert "no transformers is installed that knows ['ViTForImageClassification']" in str(written)


# Adapters that were made before a rename


OLD = {"vit.layers": "vit.encoder.layer", "attention.q_proj": "attention.attention.query",
       "attention.v_proj": "attention.attention.value", "mlp.fc1": "intermediate.dense"}


def old(text: str) -> str:
    for new, before in OLD.items():
        text = text.replace(new, before)
    return text


def test_an_adapter_made_before_a_rename_finds_its_modules(tmp_path):
    targets = ("q_proj", "v_proj", "fc1")
    model = inject(zoo.make("vit", torch.float32), LoRAConfig(2, 4, targets, rank_pattern={"layers.0.mlp.fc1": 3}))
    assert {path.rpartition(".")[2] for path, _ in model.named_modules()} >= set(targets)
    shake(model)
    save_adapter(model, tmp_path)
    save_file({old(key): t for key, t in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
    config = json.loads((tmp_path / CONFIG).read_text())
    config |= {"target_modules": ["query", "value", "intermediate.dense"],
               "rank_pattern": {r"encoder\.layer\.0\.intermediate\.dense": 3}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="names its modules vit.encoder.layer.0.attention.attention.query, say; taken "
                                         "for vit.layers.0.attention.q_proj of this model"):
        again = load_adapter(zoo.make("vit", torch.float32), tmp_path)
    with torch.no_grad():
        assert zoo.far(zoo.outputs(again, "vit"), zoo.outputs(model, "vit")) < 1e-6
    save_adapter(again, tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(zoo.make("vit", torch.float32), tmp_path / "new")


def test_an_adapter_on_modules_that_are_fused_now_is_refused_by_name(tmp_path):
    save_adapter(inject(zoo.make("mixtral", torch.float32), LoRAConfig(2, 4, ("q_proj",))), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    path = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1"
    save_file(tensors | {f"{path}.lora_A.weight": torch.ones(2, 32), f"{path}.lora_B.weight": torch.ones(48, 2)},
              tmp_path / WEIGHTS)
    config = json.loads((tmp_path / CONFIG).read_text()) | {"target_modules": ["q_proj", "w1"]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    model = zoo.make("mixtral", torch.float32)
    with pytest.raises(ValueError, match=r"experts.1.w1, which this version of MixtralForCausalLM fuses with others"):
        load_adapter(model, tmp_path)
    assert not any("lora" in name for name, _ in model.named_parameters())
