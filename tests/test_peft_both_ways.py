"""What PEFT's files can say beyond A and B around a linear: written here and opened there, and the other way round."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import save_file
from small import IDS, MLP, hf_llama, logits, same, shake, state
from torch import nn

from minilora import (
    AdapterBank,
    LoRAConfig,
    fingerprint,
    inject,
    load_adapter,
    lora_parameters,
    merge,
    plan,
    remove,
    report,
    save_adapter,
    unmerge,
)
from minilora.adapter_tools import inspect_adapter
from minilora.adapters import CONFIG
from minilora.extract import truncate_adapter
from minilora.injection import lora_layers
from minilora.parameters import StackedLoRA, TrainedRows
from minilora.single_file import load_single_file


def moved(model: nn.Module) -> nn.Module:
    """PEFT's adapters away from their start."""
    torch.manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@torch.no_grad()
def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def both_ways(make, config: LoRAConfig, theirs: peft.LoraConfig, x: torch.Tensor, folder, atol: float = 1e-5) -> None:
    """Birth, gradients, saving, both readers, PEFT's own file, merging and leaving."""
    plain = output(make(), x)
    model = make()
    before, mark = state(model), fingerprint(model)
    planned = plan(model, config).parameters
    inject(model, config)
    assert torch.equal(output(model, x), plain) and planned == report(model).trainable
    out = model(x)
    (out if isinstance(out, torch.Tensor) else out.logits).float().square().mean().backward()
    assert all(p.grad is not None for p in lora_parameters(model))
    shake(model)
    trained = output(model, x)
    assert (trained - plain).abs().max() > 1e-3
    save_adapter(model, folder / "ours")
    for other in (load_adapter(make(), folder / "ours"), peft.PeftModel.from_pretrained(make(), folder / "ours")):
        assert torch.allclose(output(other, x), trained, atol=atol)
    assert fingerprint(model) == mark
    merge(model)
    assert torch.allclose(output(model, x), trained, atol=atol) and fingerprint(model) == mark
    assert set(model.state_dict()) == set(make().state_dict())
    unmerge(model)
    assert torch.equal(output(model, x), trained) and same(before, state(remove(model)))
    model = load_adapter(make(), folder / "ours")
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        merge(model, permanent=True)
        assert torch.allclose(output(model, x), trained, atol=atol) and set(model.state_dict()) == set(make().state_dict())
    made_there = moved(peft.get_peft_model(make(), theirs))
    made_there.save_pretrained(folder / "theirs")
    here = load_adapter(make(), folder / "theirs")
    assert torch.allclose(output(here, x), output(made_there, x), atol=atol)
    assert (output(here, x) - plain).abs().max() > 1e-3
    save_adapter(here, folder / "again")
    again = peft.PeftModel.from_pretrained(make(), folder / "again")
    assert torch.allclose(output(again, x), output(here, x), atol=atol)


# Convolutions


class Convolutions(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, **options), nn.Conv2d(8, 5, 1, bias=False)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("options", [{"kernel_size": 3}, {"kernel_size": (3, 1), "stride": 2, "padding": 1},
                                     {"kernel_size": 2, "padding": "same"}], ids=["3x3", "3x1, stride", "same"])
def test_convolutions(options, tmp_path):
    both_ways(lambda: Convolutions(**options), LoRAConfig(3, 6, ("first", "second")),
              peft.LoraConfig(r=3, lora_alpha=6, target_modules=["first", "second"]), torch.randn(2, 3, 9, 9), tmp_path)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": 1, "padding_mode": "circular"}], ids=str)
def test_a_convolution_of_another_geometry_merges_into_what_it_computes(options):
    """PEFT leaves dilation and the padding's mode out of its A."""
    model, x = inject(Convolutions(kernel_size=3, **options), LoRAConfig(3, 6, ("first",))), torch.randn(2, 3, 9, 9)
    shake(model)
    trained = output(model, x)
    merge(model)
    assert torch.allclose(output(model, x), trained, atol=1e-5)


def test_what_a_convolution_cannot_be_is_refused():
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    with pytest.raises(ValueError, match="matches 0, a Conv2d, which cannot be adapted: its 2 groups"):
        inject(grouped, LoRAConfig(2, 4, ("0",)))
    for variant in ({"use_dora": True}, {"init": "pissa"}, {"init": "vera"}, {"init": "lora_fa"}):
        with pytest.raises(ValueError, match="first, a Conv2d, cannot be adapted by"):
            inject(Convolutions(kernel_size=3), LoRAConfig(2, target_modules=("first",), **variant))
    mixed = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "linear": nn.Linear(3, 4)})
    assert [row.name for row in plan(mixed, LoRAConfig(2, target_modules="all-linear"))] == ["linear"]


def test_a_convolution_is_not_routed(tmp_path):
    save_adapter(inject(Convolutions(kernel_size=3), LoRAConfig(2, 4, ("first",))), tmp_path)
    bank = AdapterBank(Convolutions(kernel_size=3))
    bank.load("a", tmp_path)
    with pytest.raises(ValueError, match="first is a Conv2d: a route goes through Linear"):
        with bank.route(["a", None]):
            pass
    assert type(bank.model.first) is nn.Conv2d


def test_a_convolutions_adapter_is_inspected_and_truncated(tmp_path):
    shake(model := inject(Convolutions(kernel_size=3), LoRAConfig(3, 6, ("first", "second"))))
    save_adapter(model, tmp_path / "a")
    found = {m.name: m for m in inspect_adapter(tmp_path / "a").modules}
    dense = lora_layers(model)["first"].dense_update(torch.float64).detach()
    assert found["first"].shape == (8, 27) and found["first"].norm == pytest.approx(float(dense.norm()), rel=1e-5)
    truncate_adapter(tmp_path / "a", tmp_path / "cut", rank=2)
    cut = lora_layers(load_adapter(Convolutions(kernel_size=3), tmp_path / "cut"))["first"]
    left = (cut.dense_update(torch.float64) - dense).norm() / torch.linalg.svdvals(dense)[2]
    assert cut.rank == 2 and float(left) == pytest.approx(1, rel=1e-4)


# Rows of an embedding


def tied_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, tie_word_embeddings=True)).eval()


@pytest.mark.parametrize("make", [hf_llama, tied_llama])
@pytest.mark.parametrize("listed", [True, False], ids=["list", "dict"])
def test_rows_of_an_embedding(make, listed, tmp_path):
    tokens = [7, 14, 3]
    both_ways(make, LoRAConfig(2, 4, ("q_proj",), trainable_tokens={"embed_tokens": tokens}),
              peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False,
                              trainable_token_indices=tokens if listed else {"embed_tokens": tokens}), IDS, tmp_path)


def test_only_the_rows_asked_for_train_also_in_a_tied_head():
    model = inject(tied_llama(), LoRAConfig(2, 4, ("q_proj",), trainable_tokens={"embed_tokens": (7, 14)}))
    rows = [m for m in model.modules() if isinstance(m, TrainedRows)]
    assert len(rows) == 2 and rows[0].rows is rows[1].rows and len(lora_parameters(model)) == 5
    with torch.no_grad():
        rows[0].rows.add_(1.0)
    changed = (logits(model) - logits(tied_llama())).abs().amax((0, 1)) > 1e-3
    assert changed[[7, 14]].all()
    merge(model)
    difference = (model.model.embed_tokens.weight - tied_llama().model.embed_tokens.weight).abs().amax(1) > 0
    assert difference.nonzero().flatten().tolist() == [7, 14]


def test_tokens_that_are_not_there_are_refused():
    for tokens, said in (({"embed_tokens": (64,)}, "model.embed_tokens has 64 rows, got 64"),
                         ({"embed_tokns": (1,)}, "'embed_tokns' matches no module; near it: embed_tokens"),
                         ({"norm": (1,)}, "'norm' matches model.norm, a LlamaRMSNorm, expected an Embedding")):
        with pytest.raises(ValueError, match=said):
            inject(hf_llama(), LoRAConfig(2, 4, ("q_proj",), trainable_tokens=tokens))
    for wrong in ({"embed_tokens": ()}, {"embed_tokens": (-1,)}, {"embed_tokens": (1.0,)}, [1]):
        with pytest.raises(ValueError, match="trainable_tokens must map names to lists of tokens"):
            LoRAConfig(trainable_tokens=wrong)


# Stacked experts


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)).eval()


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                          num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
                                          head_dim=8, num_experts_per_tok=2)).eval()


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("parameters", [("experts.down_proj",), ("experts.gate_up_proj", "experts.down_proj")], ids=len)
@pytest.mark.parametrize("targets", [(), ("q_proj",)], ids=["alone", "with q_proj"])
def test_stacked_experts(make, parameters, targets, tmp_path):
    config = LoRAConfig(2, 4, targets, target_parameters=parameters, rank_pattern={"experts.down_proj": 3})
    both_ways(make, config, peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False,
                                            target_parameters=list(parameters), rank_pattern={"experts.down_proj": 3}),
              IDS, tmp_path)


def test_experts_compute_what_each_ones_sum_says():
    model = inject(mixtral(), LoRAConfig(2, 4, (), target_parameters=("experts.down_proj",)))
    shake(model)
    layer, other = next(m for m in model.modules() if isinstance(m, StackedLoRA)), mixtral()
    for m, stacked in zip((m for m in other.modules() if hasattr(m, "down_proj")),
                          (m for m in model.modules() if isinstance(m, StackedLoRA)), strict=True):
        for e in range(4):
            A, B = stacked.lora_A_down_proj[2 * e:2 * e + 2], stacked.lora_B_down_proj[:, e::4]
            m.down_proj.data[e] += 2 * B @ A
    assert layer.lora_A_down_proj.shape == (8, 48) and layer.lora_B_down_proj.shape == (32, 8)
    assert torch.allclose(logits(model), logits(other), atol=1e-5)


def test_what_stacked_experts_cannot_do_is_refused():
    for options, said in (({"dropout": 0.1}, "know no dropout and no DoRA"), ({"init": "vera"}, "go with plain LoRA"),
                          ({"target_parameters": ("experts.dwn_proj",)}, "'experts.dwn_proj' matches no parameter")):
        with pytest.raises(ValueError, match=said):
            inject(mixtral(), LoRAConfig(2, target_modules=("q_proj",),
                                         **{"target_parameters": ("experts.down_proj",)} | options))


def test_files_with_stacked_experts_and_rows_are_inspected_and_kept_in_a_bank(tmp_path):
    config = LoRAConfig(2, 4, ("q_proj",), target_parameters=("experts.down_proj",),
                        trainable_tokens={"embed_tokens": (3, 7)})
    shake(model := inject(mixtral(), config))
    save_adapter(model, tmp_path)
    spectrum = inspect_adapter(tmp_path)
    assert {m.name.rpartition(".")[2] for m in spectrum.modules} == {"q_proj"}
    assert sum("experts" in key for key in spectrum.others) == 4 and spectrum.unused == ()
    with pytest.raises(ValueError, match="adapts stacked experts .* cannot be truncated"):
        truncate_adapter(tmp_path, tmp_path / "cut", rank=1)
    bank = AdapterBank(mixtral())
    bank.load("a", tmp_path)
    bank.use("a")
    assert torch.allclose(logits(bank.model), logits(model), atol=1e-6)
    bank.use(None)
    assert torch.equal(logits(bank.model), logits(mixtral()))
    with pytest.raises(ValueError, match="trains model.embed_tokens row by row .trainable_tokens., which can be used"):
        with bank.route(["a", None, None]):
            pass


# The tokenizer beside the adapter


def test_the_tokenizer_goes_with_the_adapter(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    hf_llama().save_pretrained(tmp_path / "base")
    model = inject(type(hf_llama()).from_pretrained(tmp_path / "base"), LoRAConfig(2, 4))
    shake(model)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?")))
    save_adapter(model, tmp_path / "a", tokenizer=words)
    assert AutoTokenizer.from_pretrained(tmp_path / "a").encode("b") == words.encode("b") == [1]
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.allclose(logits(theirs), logits(model), atol=1e-5)


# Single files of the diffusion world


@pytest.mark.parametrize("names", ["kohya", "diffusers", "diffusers of old"])
def test_a_single_file_is_what_peft_computes(names, tmp_path):
    """PEFT's own adapter, written under the names of the others."""
    x, model = torch.randn(2, 3, 9, 9), nn.ModuleDict({"block_1": Convolutions(kernel_size=3), "to_q": nn.Linear(6, 4)})
    theirs = moved(peft.get_peft_model(model, peft.LoraConfig(
        r=3, lora_alpha=6 if names == "kohya" else 3, target_modules=["first", "second", "to_q"])))
    tensors = {}
    for key, t in peft.get_peft_model_state_dict(theirs).items():
        stem, which = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        if names == "kohya":
            flat = f"lora_unet_{stem.replace('.', '_')}"
            tensors |= {f"{flat}.lora_{'down' if which == 'A' else 'up'}.weight": t, f"{flat}.alpha": torch.tensor(6.0)}
        elif names == "diffusers":
            tensors[f"unet.{stem}.lora_{which}.weight"] = t
        else:
            tensors[f"unet.{stem}.lora.{'down' if which == 'A' else 'up'}.weight"] = t
    save_file(tensors | {"lora_te_text_model_x.lora_up.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    plain = nn.ModuleDict({"block_1": Convolutions(kernel_size=3), "to_q": nn.Linear(6, 4)})
    plain.load_state_dict({key.replace("base_layer.", "").removeprefix("base_model.model."): t
                           for key, t in theirs.state_dict().items() if "lora_" not in key})
    with pytest.warns(UserWarning, match="1 more tensors, for other parts .lora_te."):
        ours = load_single_file(plain, tmp_path / "a.safetensors")
    here = theirs.base_model.model
    assert torch.allclose(output(ours["block_1"], x), output(here["block_1"], x), atol=1e-5)
    y = torch.randn(2, 6)
    assert torch.allclose(output(ours["to_q"], y), output(here["to_q"], y), atol=1e-5)


def test_a_single_file_that_is_no_lora_of_this_model_is_refused(tmp_path):
    good = {"lora_unet_up.lora_down.weight": torch.ones(2, 12), "lora_unet_up.lora_up.weight": torch.ones(20, 2)}
    for tensors, said in (
            ({"lora_unet_up.hada_w1_a": torch.ones(2, 2)}, "hada_w1_a' is no LoRA's"),
            ({k.replace("_up.lora", "_sideways.lora"): t for k, t in good.items()}, "has no place in the model"),
            ({k.replace("unet", "te"): t for k, t in good.items()}, "has nothing for 'unet': its keys begin with lora_te"),
            (dict(list(good.items())[:1]), "up lacks its lora_B"),
            (good | {"lora_unet_up.lora_up.weight": torch.ones(21, 2)}, r"has shape \(21, 2\), the model needs")):
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=said):
            load_single_file(MLP(), tmp_path / "a.safetensors")
    save_file(good, tmp_path / "a.safetensors")
    assert load_single_file(MLP(), tmp_path / "a.safetensors").up.rank == 2
    with pytest.raises(ValueError, match="expected a safetensors file"):
        load_single_file(MLP(), tmp_path / "b.safetensors")


# What a file's settings say and its tensors do not


def test_names_that_no_tensor_bears_out_are_said_in_one_warning(tmp_path):
    theirs = moved(peft.get_peft_model(hf_llama(), peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"no_such": 3, "v_proj": 2}, alpha_pattern={"nor": 1})))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["q_proj", "v_proj", "query"]}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = load_adapter(hf_llama(), tmp_path)
    assert [str(w.message) for w in said if "minilora" in w.filename or str(tmp_path) in str(w.message)] == [
        f"{tmp_path}: no tensor of the adapter is meant by rank_pattern 'no_such', alpha_pattern 'nor', "
        "target_modules 'query': left out"]
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert len(lora_layers(ours)) == 4
    spectrum = inspect_adapter(tmp_path)
    assert spectrum.unused == ("rank_pattern 'no_such'", "alpha_pattern 'nor'") == tuple(
        spectrum.to_dict()["unused_settings"])
    assert "keys that match none of its modules: rank_pattern 'no_such', alpha_pattern 'nor'\n" in str(spectrum)


def test_peft_subtracts_a_rounded_update_and_drifts():
    """What notebook 08 says of PEFT: the update is added in fp32 and subtracted in the weight's 16 bits."""
    model = peft.get_peft_model(MLP().bfloat16(), peft.LoraConfig(r=4, target_modules=["up"], init_lora_weights=False))
    layer = model.base_model.model.up
    update, W = layer.get_delta_weight("default"), layer.base_layer.weight.detach().clone()
    start = W.clone()
    assert update.dtype == torch.float32
    for _ in range(100):
        layer.merge()
        layer.unmerge()
        W += update
        W -= update.bfloat16()
        assert torch.equal(layer.base_layer.weight, W)
    assert not torch.equal(W, start)
