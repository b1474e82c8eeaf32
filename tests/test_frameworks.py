"""The LoRA layer where other code meets it: in-place neighbours, wrappers, tied and offloaded weights, state dicts."""

import copy
import json
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small import IDS, MLP, Conv1D, hf_llama, logits, same, shake, state
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

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
from minilora.adapters import WEIGHTS
from minilora.injection import lora_layers
from minilora.layers import LoRALayer
from minilora.quant import Linear4bit
from minilora.train import train

ALL = LoRAConfig(2, 4, "all-linear")


# An in-place operation right behind a layer


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("base", ["linear", "no bias", "conv1d", "4-bit"])
@pytest.mark.parametrize("after", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)], ids=["relu", "dropout"])
def test_an_operation_in_place_may_follow(base, dropout, after):
    make = {"linear": lambda: nn.Linear(8, 8), "no bias": lambda: nn.Linear(8, 8, bias=False),
            "conv1d": lambda: Conv1D(8, 8),
            "4-bit": lambda: Linear4bit.from_linear(nn.Linear(8, 8))}[base]
    model = inject(nn.Sequential(make(), after), LoRAConfig(2, 4, ("0",), dropout=dropout))
    shake(model)
    x, grads = torch.randn(2, 3, 8), []
    for f in (model[0], model[0].plain):
        torch.manual_seed(1)
        y = model[1](f(x)) if f is model[0] else model[1](f(x).clone())
        grads.append(torch.autograd.grad(y.square().sum(), lora_parameters(model)))
    if not dropout:  # the two forms draw other masks
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))
    assert all(g.abs().sum() > 0 for g in grads[0])


def test_an_operation_in_place_may_follow_a_bare_4_bit_linear():
    x = torch.randn(2, 3, 8, requires_grad=True)
    F.relu_(Linear4bit.from_linear(nn.Linear(8, 8))(x)).sum().backward()
    assert x.grad.abs().sum() > 0


# Adapters that nothing calls


class Reader(nn.Module):
    """Reads a layer's weight and never calls the layer, as a fused kernel does."""

    def __init__(self):
        super().__init__()
        self.used, self.read = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return F.linear(self.used(x), self.read.weight)


def test_a_weight_that_is_read_past_its_layer_is_said_once_by_name():
    model, x = inject(nn.ModuleDict({"block": Reader()}), ALL), torch.randn(2, 6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(4):
            model["block"](x)
    assert len(said) == 1 and "block.read: Reader.forward reads its weight and does not call it" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(model)
        for _ in range(3):
            model["block"](x)


def test_who_only_looks_at_a_weight_or_asks_for_its_dtype_hears_nothing():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(6, 6)

        def forward(self, x):
            same = x.dtype == self.up.weight.dtype != self.up.weight.new_zeros(1, dtype=torch.int8).dtype  # as T5 does
            return self.up(x if same else x.to(self.up.weight.dtype))

    model = inject(Careful(), ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(torch.randn(2, 6))
            assert model.up.weight.norm() > 0 and model.up.weight.shape == (6, 6)


def test_the_report_names_adapters_that_no_gradient_reaches():
    model = inject(nn.ModuleDict({"block": Reader()}), ALL)
    assert report(model).no_gradient == ()
    model["block"](torch.randn(2, 6)).sum().backward()
    assert report(model).no_gradient == ("block.read",) and "no gradient reached: block.read" in str(report(model))


class Model(nn.Module):
    """Ids in, logits out; `head` is read, not called."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(64, 6), nn.Linear(6, 6), nn.Linear(6, 64, bias=False)

    def forward(self, ids):
        return self.up(self.embed(ids)) @ self.head.weight.T


def test_train_names_adapters_that_no_gradient_reaches():
    model = inject(Model(), ALL)
    with pytest.warns(UserWarning, match="no gradient reaches the adapters at head: they will stay as they started"):
        train(model, lambda step: (IDS, IDS), steps=2, lr=1e-2, progress=False)


# Wrappers around a model or a part of it


def wrapped(how: str, model: nn.Module) -> nn.Module:
    if how == "compile":
        return torch.compile(model, backend="eager")
    if how == "compile a block":
        model.down = torch.compile(model.down, backend="eager")
    elif how == "data parallel":
        return nn.DataParallel(model)
    elif how == "checkpoint a block":
        model.up = checkpoint_wrapper(model.up)
    return model


@pytest.mark.parametrize("before", [True, False], ids=["wrapped then injected", "injected then wrapped"])
@pytest.mark.parametrize("how", ["compile", "compile a block", "data parallel", "checkpoint a block"])
def test_names_on_disk_are_those_of_the_bare_model(how, before, tmp_path):
    bare = MLP()
    plain = copy.deepcopy(bare)
    model = inject(wrapped(how, bare), ALL) if before else wrapped(how, inject(bare, ALL))
    shake(model)
    assert fingerprint(model) == fingerprint(plain) and [row[0] for row in report(model).rows] == ["up", "down"]
    save_adapter(model, tmp_path)
    assert sorted(load_file(tmp_path / WEIGHTS)) == [
        f"base_model.model.{name}.lora_{which}.weight" for name in ("down", "up") for which in "AB"]
    again = load_adapter(wrapped(how, copy.deepcopy(plain)), tmp_path)
    x = torch.randn(3, 12)
    assert torch.allclose(model(x), again(x), atol=1e-6) and not torch.allclose(model(x), plain(x), atol=1e-3)
    merge(model)
    assert torch.allclose(model(x), again(x), atol=1e-5)
    unmerge(model)
    assert torch.equal(remove(model)(x), plain(x))


# Tied weights


def tied_llama() -> nn.Module:
    model = hf_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("when", ["merged", "unmerged"])
def test_tying_again_under_an_adapter_leaves_the_base_whole(target, when):
    model = tied_llama()
    before, weights = state(model), model.lm_head.weight
    inject(model, LoRAConfig(2, 4, (target,)))
    shake(model)
    if when == "merged":
        merge(model)
        merged = logits(model)
    model.tie_weights()
    if when == "merged" and target == "lm_head":
        assert torch.equal(logits(model), merged)
    unmerge(model)
    remove(model)
    assert same(before, state(model)) and model.lm_head.weight is weights and model.model.embed_tokens.weight is weights


# Weights that are not there


def test_a_base_partly_on_meta_is_refused_by_name():
    model = MLP()
    model.down = nn.Linear(20, 6, device="meta")
    with pytest.raises(ValueError, match="down has no weights .it is on the meta device. while other modules have"):
        inject(model, ALL)
    assert isinstance(model.up, nn.Linear)


def test_on_an_offloaded_base_the_adapters_are_where_it_computes(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="the layer is met here under accelerate's hooks")
    plain = MLP()
    model = accelerate.cpu_offload(copy.deepcopy(plain), execution_device="cpu")
    x = torch.randn(3, 12, requires_grad=True)
    inject(model, ALL)
    assert {p.device.type for p in lora_parameters(model)} == {"cpu"}
    assert torch.equal(model(x), plain(x))
    shake(model)
    other = inject(copy.deepcopy(plain), ALL)
    for a, b in zip(lora_parameters(other), lora_parameters(model), strict=True):
        a.data.copy_(b)
    grads = [torch.autograd.grad(m(x).square().sum(), [x, *lora_parameters(m)]) for m in (model, other)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))
    with pytest.raises(ValueError, match="offloaded"):
        merge(model)
    with pytest.raises(ValueError, match="offloaded"):
        inject(remove(model), LoRAConfig(2, 4, "all-linear", use_dora=True))


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"init": "pissa"}, {"init": "vera"}, {"init": "lora_fa"}])
def test_made_on_meta_it_starts_right_once_it_has_memory(variant):
    config = LoRAConfig(2, target_modules="all-linear", **variant)
    plain = MLP()
    with torch.device("meta"):
        model = MLP()
    inject(model, config)
    model.to_empty(device="cpu")
    for p in (*model.parameters(), *model.buffers()):
        p.data.fill_(torch.nan)
    for name in ("up", "down"):
        getattr(model, name).base_layer.load_state_dict(getattr(plain, name).state_dict())
    for module in model.modules():
        wrapper = "base_layer" in module.__dict__
        if hasattr(module, "reset_parameters") and not wrapper and type(module) is not nn.Linear:
            module.reset_parameters()
    x = torch.randn(3, 12)
    assert torch.equal(model(x), plain(x))
    model(x).sum().backward()
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in lora_parameters(model))


# Copies of a base in 16 bits


@pytest.mark.parametrize("saved, loaded", [(torch.float32, torch.float16), (torch.float16, torch.float32),
                                           (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_a_copy_in_16_bits_is_the_same_base(saved, loaded, tmp_path):
    """A copy of the fp32 base; or (the last) the bfloat16 base itself, cast to float16."""
    base = hf_llama().to(saved if saved == torch.bfloat16 else torch.float32)
    model = inject(copy.deepcopy(base).to(saved), LoRAConfig(2, 4))
    shake(model)
    save_adapter(model, tmp_path)
    again = load_adapter(copy.deepcopy(base).to(loaded), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(lora_parameters(again), lora_parameters(model), strict=True))
    torch.manual_seed(1)
    other = type(base)(base.config).to(loaded)
    with pytest.raises(ValueError, match="trained on another base: other weights"):
        load_adapter(other, tmp_path)


# Weights in formats that only their own kernels read


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_float8_weight_is_refused_with_the_reason(dtype):
    model = MLP()
    model.up.weight = nn.Parameter(model.up.weight.to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match="'up' matches up, a Linear, which cannot be adapted: its weight is a "
                                         f"Parameter of {dtype}: load the base in a 16-bit"):
        inject(model, LoRAConfig(2, 4, ("up",)))
    made = plan(model, ALL)
    assert [row.name for row in made] == ["down"] and str(dtype) in made.notes["up"]


class Packed(torch.Tensor):
    """A stand-in for a weight of torchao's: a tensor subclass from its package, which only its kernels can read."""

    __module__ = "torchao.dtypes"


@pytest.mark.parametrize("targets", [("up",), "all-linear"])
def test_a_weight_of_torchaos_is_refused_with_the_reason(targets):
    model = MLP()
    model.up.weight = nn.Parameter(model.up.weight.detach().as_subclass(Packed), requires_grad=False)
    before = state(model)
    if targets == "all-linear":
        made = plan(model, ALL)
        assert [row.name for row in made] == ["down"] and "up: left out, a Linear: its weight is a" in str(made)
        assert type(inject(model, ALL).up) is nn.Linear
        remove(model)
    else:
        with pytest.raises(ValueError, match="up, a Linear, which cannot be adapted: its weight is a .* of torch.float32"):
            inject(model, LoRAConfig(2, 4, targets))
    assert same(before, state(model))


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_a_base_of_torchaos_own_is_refused_before_and_after_injection(kind, tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model, late = MLP(64, 64, 64), inject(MLP(64, 64, 64), ALL)
    torchao.quantize_(model, getattr(torchao, kind)())
    with pytest.raises(ValueError, match="up, a Linear, which cannot be adapted: its weight is a (Int8|Float8)Tensor"):
        inject(model, LoRAConfig(2, 4, ("up",)))
    torchao.quantize_(late, getattr(torchao, kind)())
    x = torch.randn(3, 64)
    for call in (lambda: late(x), lambda: merge(late)):
        with pytest.raises(ValueError, match="the weight of a Linear cannot be read: its weight is a (Int8|Float8)Tensor"):
            call()
    save_adapter(late, tmp_path)
    load_adapter(MLP(64, 64, 64), tmp_path, any_base=True)


# State dicts


def test_a_merged_models_state_is_a_plain_one(tmp_path):
    model = hf_llama()
    names = set(model.state_dict())
    inject(model, LoRAConfig(2, 4, ("q_proj", "down_proj")))
    shake(model)
    merge(model)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(again), logits(hf_llama()))
    other = inject(hf_llama(), LoRAConfig(2, 4, ("q_proj", "down_proj")))
    merge(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_a_merged_models_state_does_not_go_into_an_unmerged_one():
    model, other = (inject(MLP(), ALL) for _ in range(2))
    merge(model)
    with pytest.raises(RuntimeError, match="Missing key.*up.lora_A"):
        other.load_state_dict(model.state_dict())


# Loops and tracers


def test_train_takes_a_model_that_returns_an_output_object():
    model = inject(hf_llama(), LoRAConfig(2, 4))
    log = train(model, lambda step: (IDS, IDS), steps=4, lr=1e-2, progress=False, warmup=1)
    assert log.loss[-1] < log.loss[0]


def test_jit_trace_takes_the_plain_form():
    model, x = inject(MLP(), ALL), torch.randn(3, 12)
    shake(model)
    traced = torch.jit.trace(model, x)
    assert torch.allclose(traced(x), model(x), atol=1e-6)


# What was misread or left unsaid


def test_a_model_that_peft_adapted_is_refused():
    model = peft.get_peft_model(hf_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    for call in (lambda: inject(model, ALL), lambda: plan(model, ALL)):
        with pytest.raises(ValueError, match="PEFT has adapted this model already"):
            call()


def test_all_linear_leaves_a_classifiers_head_and_clips_where_it_must():
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                                     intermediate_size=64, vocab_size=50, num_labels=2))
    names = [row.name for row in plan(model, LoRAConfig(16, target_modules="all-linear"))]
    assert "classifier" not in names and len(names) == 7
    model = nn.ModuleDict({"gate": nn.Linear(12, 2), "up": nn.Linear(12, 20)})
    made = plan(model, LoRAConfig(8, 16, "all-linear"))
    assert [(row.name, row.rank, row.scaling) for row in made] == [("gate", 2, 8), ("up", 8, 2)]
    assert made.notes == {"gate": "rank 2 in place of 8, the most that its weight of 2 x 12 allows"}
    assert inject(model, LoRAConfig(8, 16, "all-linear"))["gate"].rank == 2
    with pytest.raises(ValueError, match="rank 8 is larger than gate allows"):
        plan(remove(model), LoRAConfig(8, 16, ("gate", "up")))


def test_what_a_regular_expression_matches_and_cannot_adapt_is_said_in_the_plan():
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "conv": nn.Conv1d(4, 4, 1)})
    made = plan(model, LoRAConfig(2, target_modules=".*"))
    assert [row.name for row in made] == ["up"] and list(made.notes) == ["norm", "conv"]
    assert "norm: left out, a LayerNorm: expected Linear, Conv1D, Embedding or Conv2d" in str(made)
    with pytest.raises(ValueError, match="'norm' matches norm, a LayerNorm, which cannot be adapted"):
        plan(model, LoRAConfig(2, target_modules=("norm",)))


def pefts(folder, **settings):
    """An adapter that PEFT made, with values of its own, in a folder; and PEFT's model."""
    torch.manual_seed(4)
    model = peft.get_peft_model(hf_llama(), peft.LoraConfig(r=4, lora_alpha=8, **settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("settings, modules", [
    ({"layers_to_transform": 0}, 2), ({"layers_to_transform": [1], "layers_pattern": "layers"}, 2),
    ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, 3), ({"exclude_modules": r".*layers\.1.*"}, 2),
    ({"rank_pattern": {"no_such_module": 3, "v_proj": 2}, "alpha_pattern": {"nor_this": 1}}, 4),
], ids=["0", "pattern", "list", "regex", "unused keys"])
def test_settings_that_choose_among_layers_open_as_in_peft(settings, modules, tmp_path):
    theirs = pefts(tmp_path, target_modules=["q_proj", "v_proj"], **settings)
    ours = load_adapter(hf_llama(), tmp_path)
    assert len(lora_layers(ours)) == modules and torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    save_adapter(ours, tmp_path / "again")
    back = peft.PeftModel.from_pretrained(hf_llama(), tmp_path / "again")
    assert torch.allclose(logits(back), logits(theirs), atol=1e-5)


def rewrite(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({new: t for key, t in tensors.items() if (new := change(key))}, folder / WEIGHTS)


def test_the_adapters_name_in_keys_is_no_matter(tmp_path):
    theirs = pefts(tmp_path, target_modules=["q_proj"])
    rewrite(tmp_path, lambda key: key.replace(".weight", ".default.weight"))
    assert torch.allclose(logits(load_adapter(hf_llama(), tmp_path)), logits(theirs), atol=1e-5)


@pytest.mark.parametrize("lost", ["layers.0.self_attn.v_proj", "v_proj", "layers.1.self_attn.v_proj.lora_A"])
def test_a_target_of_which_the_file_has_no_tensor_is_missing_where_it_has_others(lost, tmp_path):
    """Its own list says that it was adapted, and the tensors say that this part of the model was there."""
    pefts(tmp_path, target_modules=["q_proj", "v_proj"])
    rewrite(tmp_path, lambda key: "" if lost in key else key)
    with pytest.raises(ValueError, match=r"does not fit this model: .*v_proj.lora_A.weight is missing"):
        load_adapter(hf_llama(), tmp_path)


class Tower2(nn.Module):
    """A language model and, maybe, a vision tower with modules of the same names."""

    def __init__(self, vision: bool):
        super().__init__()
        torch.manual_seed(0)
        self.language = nn.Module()
        self.language.layers = nn.ModuleList([MLP(12, 12, 12), MLP(12, 12, 12)])
        if vision:
            self.vision = nn.Module()
            self.vision.layers = nn.ModuleList([MLP(12, 12, 12)])

    def forward(self, x):
        for layer in (*self.language.layers, *(self.vision.layers if hasattr(self, "vision") else ())):
            x = layer(x)
        return x


def test_a_part_of_the_model_of_which_the_file_has_nothing_is_left_out_by_name(tmp_path):
    """The tensors disprove the list: the model that it was trained on had no such part, or left it alone."""
    model = inject(Tower2(vision=False), LoRAConfig(2, 4, ("up", "down")))
    shake(model)
    save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="has no tensors for vision.layers.0.up, vision.layers.0.down, which its "
                                         "targets mean too: left as they are"):
        other = load_adapter(Tower2(vision=True), tmp_path, any_base=True)
    assert len(lora_layers(other)) == 4 and type(other.vision.layers[0].up) is nn.Linear
    x = torch.randn(3, 12)
    assert torch.allclose(other(x), other.vision.layers[0](model(x)), atol=1e-6)


def test_a_null_start_is_no_start_at_all(tmp_path):
    save_adapter(inject(hf_llama(), LoRAConfig(2, 4)), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": None}))
    assert len(lora_layers(load_adapter(hf_llama(), tmp_path))) == 4


def test_a_module_that_takes_time_first_is_not_routed():
    model = nn.ModuleDict({"block": TimeFirst()})
    bank = AdapterBank(model)
    bank.entries["a"] = bank_entry(model, bank)
    with pytest.raises(ValueError, match="block is a TimeFirst with batch_first=False"):
        with bank.route(["a", None]):
            pass


class TimeFirst(nn.Module):
    batch_first = False

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 6)


def bank_entry(model, bank):
    from minilora.bank import Entry

    layers = lora_layers(inject(model, ALL))
    remove(model)
    return Entry(layers, None, "made here")


# Modules that train whole


def bert_classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64,
        num_labels=3)).eval()


WHOLE = LoRAConfig(2, 4, ("query", "value"), modules_to_save=("classifier",))


def train_classifier(model: nn.Module) -> nn.Module:
    inject(model, WHOLE)
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(IDS).logits, torch.tensor([0, 2, 1])).backward()
        optimizer.step()
    return model


def test_a_head_trains_whole_is_saved_and_opens_in_peft(tmp_path):
    plain = bert_classifier()
    born = inject(bert_classifier(), WHOLE)
    assert torch.equal(logits(born), logits(plain))
    assert plan(plain, WHOLE).parameters == report(born).trainable and str(plan(plain, WHOLE)).count("classifier") == 1
    model = bert_classifier()
    before = state(model)
    train_classifier(model)
    assert (model.classifier.weight - plain.classifier.weight).abs().max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
    assert fingerprint(model) == fingerprint(plain)
    trained = logits(model)
    again = load_adapter(bert_classifier(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(bert_classifier(), tmp_path)
    for other in (again, theirs):
        assert torch.allclose(logits(other), trained, atol=1e-6)
    merge(model)
    assert set(model.state_dict()) == set(plain.state_dict()) and torch.allclose(logits(model), trained, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model), trained) and same(before, state(remove(model)))
    merge(again, permanent=True)
    assert type(again.classifier) is nn.Linear and torch.allclose(logits(again), trained, atol=1e-5)
    bank = AdapterBank(bert_classifier())
    bank.load("a", tmp_path)
    bank.use("a")
    assert torch.allclose(logits(bank.model), trained, atol=1e-6)
    bank.use(None)
    assert torch.equal(logits(bank.model), logits(plain))
    with pytest.raises(ValueError, match="adapter 'a' trains classifier whole"):
        with bank.route(["a", None, None]):
            pass


def test_pefts_head_opens_here(tmp_path):
    theirs = peft.get_peft_model(bert_classifier(), peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query"]))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path)
    assert "score" in json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]  # not Bert's
    ours = load_adapter(bert_classifier(), tmp_path)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)


def test_what_trains_beside_the_adapters_and_is_not_saved_is_said(tmp_path):
    model = inject(hf_llama(), LoRAConfig(2, 4))
    model.model.norm.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="model.norm.weight can train too and is not saved"):
        save_adapter(model, tmp_path)


def test_modules_to_save_that_match_nothing_are_refused_with_what_is_near():
    with pytest.raises(ValueError, match="modules_to_save: 'clasifier' matches no module; near it: classifier"):
        inject(bert_classifier(), LoRAConfig(2, 4, ("query",), modules_to_save=("clasifier",)))


def test_a_saved_adapter_names_its_base_and_task(tmp_path):
    from transformers import AutoModelForCausalLM

    hf_llama().save_pretrained(tmp_path / "base")
    model = inject(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoRAConfig(2, 4))
    shake(model)
    save_adapter(model, tmp_path / "a")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.allclose(logits(theirs), logits(model), atol=1e-5)


# Names, scales and shapes of other models


class Tower(nn.Module):
    def __init__(self, inner: str, path: str):
        super().__init__()
        self.add_module(inner, nn.Module())
        getattr(self, inner).add_module(path, MLP())

    def forward(self, x):
        return next(next(self.children()).children())(x)


@pytest.mark.filterwarnings("ignore:.*names its modules")
def test_modules_that_a_version_has_moved_are_found_and_said(tmp_path):
    torch.manual_seed(0)
    old, new = Tower("language_model", "model"), Tower("model", "language_model")
    new.model.language_model.load_state_dict(old.language_model.model.state_dict())
    inject(old, LoRAConfig(2, 4, ("up", "down"), rank_pattern={"up": 3}))
    shake(old)
    save_adapter(old, tmp_path)
    says = "names its modules language_model.model. ...; taken for model.language_model. ..."
    with pytest.warns(UserWarning, match=says):
        load_adapter(new, tmp_path, any_base=True)
    x = torch.randn(3, 12)
    assert torch.allclose(new(x), old(x), atol=1e-6) and new.model.language_model.up.rank == 3
    two = nn.ModuleDict({"a": Tower("b", "c"), "d": Tower("b", "e")})  # two places that it could mean
    with pytest.raises(ValueError, match="does not fit this model"):
        load_adapter(two, tmp_path, any_base=True)
    assert not any(isinstance(m, LoRALayer) for m in two.modules())


def test_scaled_embeddings_are_adapted_as_peft_does(tmp_path):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    def gemma():
        torch.manual_seed(0)
        return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
                                                  num_hidden_layers=2, num_attention_heads=4,
                                                  num_key_value_heads=2, head_dim=8)).eval()

    model = gemma()
    plain = logits(model)
    inject(model, LoRAConfig(2, 4, ("embed_tokens", "q_proj")))
    assert torch.equal(logits(model), plain)
    shake(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(gemma(), tmp_path)
    assert torch.allclose(logits(theirs), logits(model), atol=1e-4)
    assert (logits(model) - plain).abs().max() > 1e-3
    bank = AdapterBank(gemma())
    bank.load("a", tmp_path)
    with torch.no_grad(), bank.route(["a", None, "a"]):
        routed = bank.model(IDS).logits
    assert torch.allclose(routed[::2], logits(model)[::2], atol=1e-4)


def test_the_plan_names_experts_that_stay_frozen():
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                             num_attention_heads=4, num_key_value_heads=2, num_local_experts=4))
    notes = plan(model, ALL).notes
    experts = [name for name, note in notes.items() if "left frozen, a parameter of shape (4," in note]
    assert len(experts) == 2 and all("experts" in name for name in experts)
