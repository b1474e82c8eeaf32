"""The programs of examples/ do what they say, with fewer steps."""

from pathlib import Path

import pytest

from minilora import LoRALayer

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["ten_lines.py", "tune.py"])
def test_an_example_trains_and_saves(name, tmp_path, monkeypatch, capsys):
    source = (FOLDER / name).read_text(encoding="utf-8")
    assert source.count("steps=150") == 1
    monkeypatch.chdir(tmp_path)
    ran = {}
    exec(compile(source.replace("steps=150", "steps=2"), name, "exec"), ran)
    assert {path.name for path in (tmp_path / "my_adapter").iterdir()} >= {"adapter_config.json",
                                                                          "adapter_model.safetensors"}
    layers = [layer for layer in ran["model"].modules() if isinstance(layer, LoRALayer)]
    assert layers and all(layer.lora_B.any() for layer in layers)  # two steps have moved every one
    if name == "ten_lines.py":
        assert "20,480" in capsys.readouterr().out
        assert (tmp_path / "my_adapter" / "adapter_model.safetensors").stat().st_size < 100_000
        assert all(layer.merged for layer in layers)


def test_every_example_is_tried():
    assert {path.name for path in FOLDER.glob("*.py")} == {"ten_lines.py", "tune.py"}
