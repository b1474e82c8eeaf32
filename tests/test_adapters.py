"""Adapter files: the whole table against PEFT, both ways; refusals; fingerprints; atomic saves."""

import json
import os
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import small
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import MLP, Conv1D, logits, same, shake, state
from torch import nn

from minilora import (
    LoRAConfig,
    adapters,
    checkpoints,
    fingerprint,
    inject,
    load_adapter,
    lora_parameters,
    merge,
    pair,
    remove,
    save_adapter,
    unmerge,
)
from minilora.adapters import read_adapter, read_config, write_adapter
from minilora.fingerprints import marks
from minilora.injection import lora_layers
from minilora.peft_format import config_of, peft_config

MODELS = {"llama": small.hf_llama, "gpt2": small.gpt2, "bert": small.bert, "ours": small.our_llama}
# attention, MLP and embedding targets, and one module for a pattern
NAMES = {
    "llama": (["q_proj", "v_proj"], ["gate_proj", "down_proj"], "embed_tokens", "layers.1.self_attn.q_proj"),
    "gpt2": (["c_attn"], ["mlp.c_fc", "mlp.c_proj"], "wte", "h.1.attn.c_attn"),
    "bert": (["query", "value"], ["intermediate.dense"], "word_embeddings", "layer.1.attention.self.value"),
    "ours": (["q_proj", "v_proj"], ["gate_proj", "down_proj"], "embed_tokens", "layers.1.self_attn.q_proj"),
}


def variant(family: str, name: str) -> dict:
    """Settings under PEFT's names."""
    attention, mlp, embedding, one = NAMES[family]
    words = name.split("+")
    targets = ([embedding] if "embedding" in words else []) + ([] if words[0] == "embedding" else attention + mlp)
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": targets,
        "use_rslora": "rslora" in words,
        "use_dora": "dora" in words,
    }
    if "patterns" in words:
        key = one if words[0] != "embedding" else embedding
        settings |= {"rank_pattern": {key: 2}, "alpha_pattern": {f".*{key.split('.')[-1]}": 3}}
    if "regex" in words:
        settings["target_modules"] = rf".*\.({'|'.join(t.replace('.', '[.]') for t in targets)})"
    if "one" in words:
        settings["target_modules"] = [one]
    return settings


VARIANTS = [
    "lora",
    "rslora",
    "dora",
    "patterns",
    "regex",
    "one",
    "rslora+dora",
    "rslora+patterns",
    "dora+patterns",
    "rslora+dora+patterns",
    "embedding",
    "embedding+rslora",
    "embedding+dora",
    "embedding+patterns",
    "lora+embedding",
    "rslora+embedding+patterns",
    "dora+embedding",
    "regex+embedding",
]


def ours(settings: dict) -> LoRAConfig:
    return LoRAConfig(
        settings["r"],
        settings["lora_alpha"],
        settings["target_modules"],
        use_rslora=settings["use_rslora"],
        use_dora=settings["use_dora"],
        rank_pattern=settings.get("rank_pattern", {}),
        alpha_pattern=settings.get("alpha_pattern", {}),
    )


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# The table: {variants} x {families} x {both directions}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("family", MODELS)
def test_saved_by_us_opened_by_peft(family, name, tmp_path):
    from peft import PeftModel

    model = MODELS[family]()
    base = logits(model)
    inject(model, ours(variant(family, name)))
    shake(model)
    expected = logits(model)
    assert far(expected, base) > 1e-3
    save_adapter(model, tmp_path / "a")
    theirs = PeftModel.from_pretrained(MODELS[family](), tmp_path / "a").eval()
    assert far(logits(theirs), expected) <= 1e-5
    back = load_adapter(MODELS[family](), tmp_path / "a")
    assert torch.equal(logits(back), expected)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("family", MODELS)
def test_saved_by_peft_opened_by_us(family, name, tmp_path):
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(MODELS[family](), LoraConfig(**variant(family, name))).eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lora_" in key:
                p.add_(torch.randn_like(p) * 0.1)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path)
    model = MODELS[family]()
    assert far(expected, logits(model)) > 1e-3
    load_adapter(model, tmp_path)
    assert far(logits(model), expected) <= 1e-5
    parameters = sum(p.numel() for k, p in theirs.named_parameters() if "lora_" in k)
    assert sum(p.numel() for p in lora_parameters(model)) == parameters


@pytest.mark.parametrize("family", MODELS)
def test_pissa_is_saved_as_a_plain_adapter_of_twice_the_rank(family, tmp_path):
    from peft import PeftModel

    attention, mlp, embedding, one = NAMES[family]
    for rslora in (False, True):
        model = MODELS[family]()
        inject(
            model,
            LoRAConfig(3, 6, attention + mlp + [embedding], init="pissa", use_rslora=rslora, rank_pattern={one: 2}),
        )
        shake(model, 0.02)
        expected = logits(model)
        save_adapter(model, tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["r"] == 6 and list(config["rank_pattern"].values()) == [4] and config["init_lora_weights"] is True
        assert far(logits(PeftModel.from_pretrained(MODELS[family](), tmp_path).eval()), expected) <= 1e-5
        assert far(logits(load_adapter(MODELS[family](), tmp_path)), expected) <= 1e-5


def test_a_pissa_adapter_that_peft_converted_opens(tmp_path):
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(
        small.hf_llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    ).eval()
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's guide says, to keep the start
    theirs.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lora_" in key:
                p.add_(torch.randn_like(p) * 0.05)
    expected = logits(theirs)
    theirs.peft_config["default"].init_lora_weights = "pissa"
    theirs.save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match="was initialised by 'pissa', which changes the base's weights: convert it"):
        load_adapter(small.hf_llama(), tmp_path / "raw")
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert far(logits(load_adapter(small.hf_llama(), tmp_path / "plain")), expected) <= 1e-5


@pytest.mark.parametrize("targets", ["all-linear", "head", "head+embedding"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_all_linears_and_the_head_both_ways(family, targets, tmp_path):
    """The head of GPT-2 and BERT is tied to the embedding, which PEFT may then write into the file."""
    from peft import LoraConfig, PeftModel, get_peft_model

    head = {"llama": "lm_head", "gpt2": "lm_head", "bert": "decoder"}[family]
    names = {"all-linear": targets, "head": [head], "head+embedding": [head, NAMES[family][2]]}[targets]
    model = inject(MODELS[family](), LoRAConfig(4, 8, names))
    shake(model)
    save_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(MODELS[family](), tmp_path / "ours").eval()
    assert far(logits(theirs), logits(model)) <= 1e-5
    theirs = get_peft_model(MODELS[family](), LoraConfig(r=4, lora_alpha=8, target_modules=names)).eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lora_" in key:
                p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_adapter(MODELS[family](), tmp_path / "theirs")
    assert far(logits(back), logits(theirs)) <= 1e-5 and far(logits(back), logits(MODELS[family]())) > 1e-3
    assert lora_layers(back).keys() == lora_layers(model).keys()


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_file_may_have_a_rank_above_its_matrixs(init, tmp_path):
    """PEFT allows it (a router of 8 rows with rank 16), and PiSSA of rank 5 on 6 rows is saved with rank 10."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if init == "pissa":
        model = inject(base_mlp(), LoRAConfig(5, 6, ("down",), init="pissa"))
        shake(model)
        save_adapter(model, tmp_path)
        theirs = PeftModel.from_pretrained(base_mlp(), tmp_path).eval()
    else:
        theirs = get_peft_model(base_mlp(), LoraConfig(r=16, target_modules=["down"], init_lora_weights=False)).eval()
        theirs.save_pretrained(tmp_path)
    model, x = load_adapter(base_mlp(), tmp_path), torch.randn(4, 12)
    assert model.down.rank == {"pissa": 10, "kaiming": 16}[init] and far(model(x), theirs(x)) <= 1e-5
    assert far(model(x), base_mlp()(x)) > 1e-3


def test_fp32_adapters_of_a_bf16_base(tmp_path):
    from peft import PeftModel

    model = inject(small.hf_llama().bfloat16(), LoRAConfig(4, 8))
    shake(model)
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    back = load_adapter(small.hf_llama().bfloat16(), tmp_path)
    assert torch.equal(logits(back), logits(model))
    wide = load_adapter(small.hf_llama(), tmp_path)  # the fingerprint knows a base from its bfloat16 copy
    theirs = PeftModel.from_pretrained(small.hf_llama(), tmp_path).eval()
    assert far(logits(theirs), logits(wide)) <= 1e-5


def test_a_merged_model_saves_its_adapter(tmp_path):
    model = inject(small.our_llama(), LoRAConfig(4, 8))
    shake(model)
    expected = logits(model)
    merge(model)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(small.our_llama(), tmp_path)), expected)
    unmerge(model)
    assert torch.equal(logits(model), expected)


# The files


def test_the_format(tmp_path):
    model = inject(small.gpt2(), LoRAConfig(4, 8, ("c_attn", "wte"), dropout=0.1, use_dora=True))
    save_adapter(model, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert os.listdir(tmp_path / "new") == ["folder"]
    with safe_open(folder / "adapter_model.safetensors", "pt") as f:
        shapes = {k: tuple(f.get_slice(k).get_shape()) for k in f.keys() if ".h.0." in k or "wte" in k}
        assert f.metadata() == {"format": "pt", "minilora.base": fingerprint(model),
                                "minilora.base.float16": marks(model)[2]}
    stem = "base_model.model.transformer."
    assert shapes == {
        stem + "wte.lora_embedding_A": (4, 64),
        stem + "wte.lora_embedding_B": (32, 4),
        stem + "wte.lora_magnitude_vector": (32,),
        stem + "h.0.attn.c_attn.lora_A.weight": (4, 32),
        stem + "h.0.attn.c_attn.lora_B.weight": (96, 4),
        stem + "h.0.attn.c_attn.lora_magnitude_vector": (96,),
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["c_attn", "wte"] and config["fan_in_fan_out"] is False
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_dora"]) == (4, 8, 0.1, True)
    assert config["peft_type"] == "LORA" and config["bias"] == "none" and config["modules_to_save"] is None


def test_the_config_round_trip(tmp_path):
    config = LoRAConfig(4, 8.5, ("a", "b"), 0.25, True, True, rank_pattern={"a": 2}, alpha_pattern={"b": 3})
    write_adapter(tmp_path / "x", {"k": torch.ones(1)}, peft_config(config))
    assert read_config(tmp_path / "x") == config


def test_missing_rank_and_alpha_are_eight(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q"], "lora_alpha": null}')
    config = read_config(tmp_path)
    assert (config.rank, config.alpha, config.dropout) == (8, 8, 0.0)


def test_config_of_names_targets_shortly_where_it_can():
    model = nn.ModuleDict({"one": MLP(), "two": MLP()})
    inject(model, LoRAConfig(2, 4, ("one.up", "down"), rank_pattern={"one.down": 3}, alpha_pattern={"two.down": 5}))
    config = config_of(model)
    assert config.target_modules == ("down", "one.up") and (config.rank, config.alpha) == (2, 4)
    assert config.rank_pattern == {r"^one\.down": 3} and config.alpha_pattern == {r"^two\.down": 5}
    assert [config.rank_of(n) for n in ("one.down", "two.down", "x.one.down", "one_down")] == [3, 2, 2, 2]
    model["two"].down.dropout = 0.5
    with pytest.raises(ValueError, match="differ in use_rslora, variant or dropout"):
        config_of(model)


def test_diverged_adapters_are_not_saved(tmp_path):
    model = inject(MLP(), LoRAConfig(2, 4, ("up",)))
    save_adapter(model, tmp_path / "a")
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    for bad in (float("nan"), float("inf")):
        with torch.no_grad():
            model.up.lora_A[0, 0] = bad
        with pytest.raises(ValueError, match="up.lora_A.weight holds NaN or infinite values"):
            save_adapter(model, tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before


# The base


def test_fingerprint_is_the_same_with_adapters_and_merged():
    for make, targets in ((small.our_llama, ("q_proj", "embed_tokens")), (small.gpt2, ("wte", "lm_head", "c_attn"))):
        model = make()
        mark = fingerprint(model)
        inject(model, LoRAConfig(2, 4, targets))
        shake(model)
        assert fingerprint(model) == mark
        merge(model)
        assert fingerprint(model) == mark
        remove(model)
        assert fingerprint(model) == mark == fingerprint(make().bfloat16())


def test_fingerprint_tells_bases_apart():
    marks = [fingerprint(small.our_llama())]
    for change in (lambda m: m.lm_head.weight.data.mul_(1.01), lambda m: m.model.norm.weight.data[5].add_(1)):
        change(model := small.our_llama())
        marks.append(fingerprint(model))
    assert len({m.split("-")[0] for m in marks}) == 1 and len({m.split("-")[1] for m in marks}) == 3
    assert fingerprint(MLP()).split("-")[0] != fingerprint(MLP(hidden=21)).split("-")[0]
    assert fingerprint(small.our_llama()) == fingerprint(small.our_llama())


def test_our_llama_and_hugging_faces_are_one_base(tmp_path):
    theirs = small.hf_llama()
    ours_too = small.our_llama()
    ours_too.load_state_dict(theirs.state_dict())
    assert fingerprint(ours_too) == fingerprint(theirs)
    inject(ours_too, LoRAConfig(4, 8))
    shake(ours_too)
    save_adapter(ours_too, tmp_path)
    assert far(logits(load_adapter(theirs, tmp_path)), logits(ours_too)) <= 1e-5


def test_the_wrong_base_is_refused_by_name(tmp_path):
    model = inject(small.our_llama(), LoRAConfig(2, 4))
    shake(model)
    save_adapter(model, tmp_path)
    other = small.our_llama()
    other.model.norm.weight.data.add_(0.5)
    before = state(other)
    with pytest.raises(ValueError, match="trained on another base: other weights .*any_base=True"):
        load_adapter(other, tmp_path)
    assert same(state(other), before)
    load_adapter(other, tmp_path, any_base=True)
    assert all(torch.equal(a, b) for a, b in zip(lora_parameters(other), lora_parameters(model), strict=True))
    other = small.our_llama()
    other.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="trained on another base: other architecture"):
        load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match="does not fit this model: target_modules: 'q_proj' matches no module"):
        load_adapter(small.bert(), tmp_path)


# Mismatches and refusals, each by name


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter for the MLP, and the keys of its tensors."""
    torch.manual_seed(0)
    model = inject(MLP(), LoRAConfig(2, 4, ("up", "down")))
    shake(model)
    save_adapter(model, tmp_path / "a")
    return tmp_path / "a"


def base_mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP()


def rewrite(folder: Path, change=None, **settings) -> None:
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    if change:
        change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))


UP, DOWN = "base_model.model.up.", "base_model.model.down."


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop(UP + "lora_A.weight"), f"{UP}lora_A.weight is missing"),
        (lambda t: [t.pop(k) for k in list(t)[:3]], f"{UP}lora_A.weight is missing"),
        (lambda t: t.update({"surplus": torch.ones(1)}), "'surplus' has no place in the model"),
        (lambda t: t.update({DOWN + "lora_A.x.weight": t.pop(DOWN + "lora_A.weight")}),
         "lora_A.x.weight' has no place"),
        (lambda t: t.update({UP + "lora_A.weight": torch.ones(2, 13)}), "has shape (2, 13), the model needs (2, 12)"),
        (lambda t: t.update({UP + "lora_B.weight": torch.ones(20, 3)}), "has shape (20, 3), the model needs (20, 2)"),
        (lambda t: t.update({UP + "lora_B.weight": torch.ones(40)}), "has shape (40,), the model needs (20, 2)"),
        (lambda t: t.update({f"{i}": torch.ones(1) for i in range(9)}), "; and 5 more"),
        (lambda t: t[UP + "lora_A.weight"].fill_(float("nan")), "not all finite"),
        (lambda t: t.update({UP + "lora_A.weight": torch.full((2, 12), 1e300, dtype=torch.float64)}), "not all finite"),
        (lambda t: t.update({UP + "lora_A.weight": torch.ones(2, 12, dtype=torch.int32)}), "holds torch.int32 values"),
        (
            lambda t: t.update({UP + "base_layer.weight": torch.ones(20, 12)}),
            "base_layer.weight' has no place in the model",
        ),
        (lambda t: t.clear(), "is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, change, says):
    rewrite(saved, change)
    model = base_mlp()
    before = state(model)
    with pytest.raises(ValueError) as e:
        load_adapter(model, saved)
    assert says in str(e.value) and "\n" not in str(e.value) and same(state(model), before)


def test_a_copy_of_the_bases_own_weight_is_accepted(saved):
    rewrite(saved, lambda t: t.update({UP + "base_layer.weight": base_mlp().up.weight.detach().clone()}))
    assert len(lora_layers(load_adapter(base_mlp(), saved))) == 2


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"peft_type": "LOHA"}, "is of peft_type 'LOHA'; only 'LORA' or '"),
        ({"peft_type": None}, "is of peft_type None"),
        ({"trainable_token_indices": [1]}, "trainable_tokens: 'embed_tokens' matches no module"),
        ({"trainable_token_indices": {"up": 1}}, "trainable_tokens must map names to lists of tokens"),
        ({"target_parameters": ["up.wight"]}, "target_parameters: 'up.wight' matches no parameter; near it: up.weight"),
        (
            {"layer_replication": [[0, 1]]},
            "sets layer_replication, which is not supported: an adapter here is A and B on whole layers",
        ),
        ({"alora_invocation_tokens": [1, 2]}, "sets alora_invocation_tokens"),
        ({"lora_bias": True}, "sets lora_bias"),
        ({"use_qalora": True}, "sets use_qalora"),
        ({"bias": "all"}, "sets bias='all', which is not supported: it retrains the base's biases"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "was initialised by 'pissa_niter_4', which changes the base's weights",
        ),
        ({"init_lora_weights": "olora"}, "initialised by 'olora'"),
        ({"init_lora_weights": "corda"}, "initialised by 'corda'"),
        ({"init_lora_weights": "loftq"}, "initialised by 'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "initialised by 'lora_ga'"),
        ({"target_modules": None}, "target_modules must name modules, got ()"),
        ({"target_modules": []}, "target_modules must name modules"),
        ({"target_modules": 5}, "target_modules must be names or a regular expression, got 5"),
        ({"target_modules": ["up", 3]}, "target_modules must name modules"),
        ({"target_modules": ["up"]}, "has no place in the model"),
        ({"target_modules": ["up", "dwon"]}, "'dwon' matches no module; near it: down"),
        ({"target_modules": "(up"}, "is not a regular expression"),
        ({"r": 0}, "rank must be a positive integer, got 0"),
        ({"r": 2.0}, "rank must be a positive integer, got 2.0"),
        ({"r": 3}, "the model needs (3, 12)"),
        ({"r": 10**9}, "the model needs (1000000000, 12)"),
        ({"r": 10**300}, "rank must be a positive integer"),
        ({"lora_alpha": 10**400}, "alpha must be a finite number"),
        ({"lora_alpha": float("nan")}, "alpha must be a finite number other than 0, got nan"),
        ({"lora_alpha": "16"}, "got '16'"),
        ({"lora_dropout": 1.5}, "dropout must be in [0, 1), got 1.5"),
        ({"rank_pattern": ["up"]}, "must map names to values"),
        ({"rank_pattern": {"up": 3}}, "the model needs (3, 12)"),
        ({"alpha_pattern": {"up": None}}, "alpha_pattern['up'] must be a finite number"),
        ({"use_dora": "yes"}, "use_dora must be True or False, got 'yes'"),
        ({"use_dora": True}, f"{UP}lora_magnitude_vector is missing"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused_with_the_reason(saved, settings, says):
    rewrite(saved, **settings)
    model = base_mlp()
    before = state(model)
    with pytest.raises(ValueError) as e:
        load_adapter(model, saved)
    assert says in str(e.value) and "\n" not in str(e.value) and same(state(model), before)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone_are_accepted(saved, start):
    rewrite(saved, init_lora_weights=start)
    assert len(lora_layers(load_adapter(base_mlp(), saved))) == 2


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda f: shutil.rmtree(f), "is no adapter folder: it holds no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").unlink(), "it holds no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "is damaged or not a JSON file"),
        (lambda f: (f / "adapter_config.json").write_text("[1, 2]"), "must hold an object"),
        (lambda f: (f / "adapter_config.json").write_text("null"), "must hold an object"),
        (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "is damaged or not a JSON file"),
        (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe{}"), "is damaged or not a JSON file"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            "adapter_model.bin may be a pickle, which can run",
        ),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "is damaged or not a safetensors file"),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x80\x04" + b"x" * 500),
            "is damaged or not a safetensors file",
        ),
    ],
)
def test_damaged_folders(saved, damage, says):
    damage(saved)
    with pytest.raises(ValueError) as e:
        load_adapter(base_mlp(), saved)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_loading_leaves_the_random_state_alone(saved):
    torch.manual_seed(7)
    expected = torch.rand(5)
    model = base_mlp()
    torch.manual_seed(7)
    load_adapter(model, saved)
    assert torch.equal(torch.rand(5), expected)


def test_a_model_with_adapters_is_refused(saved):
    model = load_adapter(base_mlp(), saved)
    with pytest.raises(ValueError, match="has adapters already"):
        load_adapter(model, saved)


# Saving is atomic


def test_saving_over_another_adapter_keeps_other_files(saved):
    (saved / "README.md").write_text("notes")
    (saved / "checkpoint").mkdir()
    (saved / "checkpoint" / "optimizer.pt").write_text("state")
    model = inject(base_mlp(), LoRAConfig(1, 3, ("up",)))
    save_adapter(model, saved)
    assert sorted(p.name for p in saved.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint",
    ]
    assert (saved / "checkpoint" / "optimizer.pt").read_text() == "state" and (
        saved / "README.md"
    ).read_text() == "notes"
    assert read_adapter(saved).config.rank == 1 and [p.name for p in saved.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("step", ["os.fsync", "os.replace", "json.dumps"])
def test_a_failing_disk_leaves_the_old_adapter(saved, monkeypatch, step):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = inject(base_mlp(), LoRAConfig(1, 3, ("up",)))
    module, name = step.split(".")

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(getattr(checkpoints, module), name, fail)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, saved)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before and [p.name for p in saved.parent.iterdir()] == [
        "a"
    ]


def test_what_an_interrupted_save_left_is_removed(saved):
    left = saved / ".adapter_model.safetensors.0123abcd.tmp"
    left.mkdir()
    (left / "adapter_config.json").write_text("half")
    save_adapter(inject(base_mlp(), LoRAConfig(1, 3, ("up",))), saved)
    assert read_adapter(saved).config.rank == 1
    assert sorted(p.name for p in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_a_living_writer_has_there_stays(saved):
    with checkpoints.staged(saved, "adapter_model.safetensors") as fresh:
        save_adapter(inject(base_mlp(), LoRAConfig(1, 3, ("up",))), saved)
        assert fresh.is_dir()
    assert read_adapter(saved).config.rank == 1 and not fresh.exists()


def test_a_folder_reached_by_a_link(saved):
    link = saved.parent / "link"
    link.symlink_to(saved)
    save_adapter(inject(base_mlp(), LoRAConfig(1, 3, ("up",))), link)
    assert link.is_symlink() and read_adapter(saved).config.rank == 1


@pytest.mark.parametrize("other", [LoRAConfig(1, 3, ("up",)), LoRAConfig(2, 7, ("up", "down")),
                                   LoRAConfig(2, 4, ("up", "down"))], ids=["other shapes", "other alpha", "same config"])
def test_after_every_line_of_a_save_one_adapter_is_whole(saved, tmp_path, other):
    """What a kill at each line would leave: after every line of the save the folder is read, and copied away and read."""

    def now(folder: Path) -> tuple:
        found = read_adapter(folder)
        return found.config, found.base, {key: t.tolist() for key, t in found.tensors.items()}

    def look(frame, event, arg):
        if frame.f_code.co_filename not in watched:
            return None
        sys.settrace(None)
        seen.append(now(saved))
        if event == "line" and frame.f_code.co_filename == pair.__file__:  # what a killed one left is read, saved over
            shutil.copytree(saved, tmp_path / "left")
            save_adapter(third, tmp_path / "left")
            assert now(tmp_path / "left")[0] == LoRAConfig(4, 1, ("down",))
            assert {p.name for p in (tmp_path / "left").iterdir()} <= {adapters.CONFIG, adapters.WEIGHTS}
            shutil.rmtree(tmp_path / "left")
        sys.settrace(look)
        return look

    watched = {module.__file__ for module in (adapters, checkpoints, pair)}
    third = inject(base_mlp(), LoRAConfig(4, 1, ("down",)))
    model, seen, old = inject(base_mlp(), other), [], now(saved)
    sys.settrace(look)
    try:
        save_adapter(model, saved)
    finally:
        sys.settrace(None)
    new, swap = now(saved), seen.index(now(saved))
    assert old != new and seen == [old] * swap + [new] * (len(seen) - swap) and 50 < swap < len(seen) - 1


def test_killed_while_saving():
    bench = runpy.run_path(str(Path(__file__).parent / "bench" / "kill_during_save.py"))
    found = bench["run"](kills=8, writers=2, readers=1)
    assert found["whole"] == 8 and found["broken"] == found["broken reads"] == found["failed saves"] == 0
    assert found["litter"] == 0 and min(found["saves"], found["reads"]) > 8


def test_conv1d_alone_says_fan_in_fan_out(tmp_path):
    model = inject(nn.Sequential(Conv1D(7, 12)), LoRAConfig(2, 4, ("0",)))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
