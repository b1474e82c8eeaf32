"""Plan, inject, remove, merge and report over whole models."""

import copy

import pytest
import small
import torch
from small import IDS, MLP, Codes, Conv1D, logits, same, shake, state
from torch import nn

from minilora import (
    LoRAConfig,
    LoRALayer,
    fingerprint,
    inject,
    injection,
    lora_parameters,
    merge,
    plan,
    remove,
    report,
    unmerge,
)
from minilora.injection import lora_layers, loraplus_groups
from minilora.naming import suggest
from minilora.tables import table

MODELS = {"ours": small.our_llama, "llama": small.hf_llama, "gpt2": small.gpt2, "bert": small.bert}
TARGETS = {
    "ours": ("q_proj", "down_proj", "embed_tokens"),
    "llama": ("q_proj", "down_proj", "embed_tokens"),
    "gpt2": ("c_attn", "mlp.c_proj", "wte"),
    "bert": ("query", "output.dense", "word_embeddings"),
}
VARIANTS = {"lora": {}, "dora": {"use_dora": True}, "pissa": {"init": "pissa"}, "rslora": {"use_rslora": True}}
TINY = LoRAConfig(2, 4, ("up", "down"))


# Equal at birth, and the model back


@pytest.mark.parametrize("targets", ["named", "all-linear"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", MODELS)
def test_equal_at_birth_and_removed_without_a_trace(family, variant, targets):
    model = MODELS[family]()
    frozen = next(model.parameters()).requires_grad_(False)  # a flag of the user's own
    before, base = logits(model), state(model)
    inject(model, LoRAConfig(3, 6, TARGETS[family] if targets == "named" else targets, **VARIANTS[variant]))
    assert torch.equal(logits(model), before)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in lora_parameters(model)}
    shake(model)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    remove(model)
    assert same(state(model), base) and not frozen.requires_grad
    assert torch.equal(logits(model), before)


def test_a_users_mlp_trains_only_its_adapters():
    model, x = MLP(), torch.randn(4, 12)
    before = model(x)
    assert inject(model, TINY) is model and torch.equal(model(x), before)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" not in name}
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    assert len(base) == 4 and all(torch.equal(p, model.get_parameter(name)) for name, p in base.items())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert not torch.allclose(model(x), before, atol=1e-4)


def test_training_mode_follows_the_module():
    model = MLP()
    model.up.eval()
    inject(model, TINY)
    assert not model.up.training and model.down.training


def test_inject_again_after_remove():
    model = MLP()
    for rank in (1, 2):
        inject(model, LoRAConfig(rank, 4, ("up",)))
        assert model.up.rank == rank
        remove(model)
    assert type(model.up) is nn.Linear


# The plan


def test_the_plan_says_what_inject_does():
    model = small.gpt2()
    config = LoRAConfig(
        4, 8, ("c_attn", "wte"), use_dora=True, rank_pattern={"h.1.attn.c_attn": 2}, alpha_pattern={"wte": 1}
    )
    before, rows = state(model), plan(model, config)
    assert same(state(model), before)
    assert [(m.name, m.kind, m.shape, m.rank, m.alpha, m.scaling) for m in rows] == [
        ("transformer.wte", "embedding", (32, 64), 4, 1, 0.25),
        ("transformer.h.0.attn.c_attn", "conv1d", (96, 32), 4, 8, 2.0),
        ("transformer.h.1.attn.c_attn", "conv1d", (96, 32), 2, 8, 4.0),
    ]
    assert [m.tied_to for m in rows] == ["lm_head", None, None]
    inject(model, config)
    assert rows.parameters == sum(p.numel() for p in lora_parameters(model)) == report(model).trainable
    assert rows.bytes == 4 * rows.parameters
    assert [m.scaling for m in rows] == [layer.scaling for layer in lora_layers(model).values()]
    text = str(rows)
    assert (
        "transformer.wte" in text
        and "tied to lm_head" in text
        and text.endswith(f"3 modules, {rows.parameters:,} parameters, {rows.bytes:,} bytes")
    )


@pytest.mark.parametrize("dtype, size", [(torch.bfloat16, 4), (torch.float32, 4), (torch.float64, 8)])
def test_planned_bytes_are_the_adapters_own(dtype, size):
    model = MLP().to(dtype)
    rows = plan(model, TINY)
    inject(model, TINY)
    assert rows.bytes == sum(p.nbytes for p in lora_parameters(model)) == rows.parameters * size


@pytest.mark.parametrize("family, count", [("ours", 14), ("llama", 14), ("gpt2", 8), ("bert", 13)])
def test_all_linear_leaves_the_head(family, count):
    names = [m.name for m in plan(MODELS[family](), LoRAConfig(2, target_modules="all-linear"))]
    assert len(names) == count and not any(n.endswith(("lm_head", "decoder", "wte")) for n in names)


# Strictness


@pytest.mark.parametrize(
    "config, says",
    [
        ({"target_modules": ("q_porj",)}, "target_modules: 'q_porj' matches no module; near it: q_proj"),
        ({"target_modules": ("q_proj", "lm_haed")}, "'lm_haed' matches no module; near it: lm_head"),
        ({"target_modules": ("Q_PROJ",)}, "near it: q_proj"),
        ({"target_modules": ("zzzzzz",)}, "there are: embed_tokens, q_proj"),
        (
            {"target_modules": ("mlp",)},
            "'mlp' matches model.layers.0.mlp, a MLP, which cannot be adapted: expected Linear",
        ),
        ({"target_modules": ("input_layernorm",)}, "a RMSNorm, which cannot be adapted"),
        ({"target_modules": "q_proj"}, "the regular expression 'q_proj' matches no whole name"),
        ({"target_modules": r".*\.q_prj"}, "near it: "),
        (
            {"rank_pattern": {"k_proj": 2}},
            "rank_pattern key 'k_proj' matches none of the targets; near it: v_proj, q_proj",
        ),
        (
            {"alpha_pattern": {"layers.7.q_proj": 2}},
            "alpha_pattern key 'layers.7.q_proj' matches none of the targets; near it: ",
        ),
        (
            {"rank": 33},
            "rank 33 is larger than model.layers.0.self_attn.q_proj allows: its weight is 32 x 32, so at most 32",
        ),
        (
            {"rank": 20},
            "rank 20 is larger than model.layers.0.self_attn.v_proj allows: its weight is 16 x 32, so at most 16",
        ),
        ({"rank_pattern": {"layers.1.self_attn.v_proj": 17}}, "rank 17 is larger than model.layers.1.self_attn.v_proj"),
    ],
)
def test_refusals_name_the_fault_and_change_nothing(config, says):
    model = small.our_llama()
    before = state(model)
    for call in (plan, inject):
        with pytest.raises(ValueError) as e:
            call(model, LoRAConfig(**config))
        assert says in str(e.value) and "\n" not in str(e.value)
    assert same(state(model), before)


def test_a_model_with_adapters_is_not_given_more():
    model = inject(MLP(), TINY)
    before = state(model)
    with pytest.raises(ValueError, match="has adapters already"):
        inject(model, TINY)
    assert same(state(model), before)


@pytest.mark.parametrize("call", [remove, merge, unmerge, lora_parameters, lambda m: loraplus_groups(m, 1e-3)])
def test_a_model_without_adapters_is_told_so(call):
    with pytest.raises(ValueError, match="the model has no adapters; inject"):
        call(MLP())


@pytest.mark.parametrize("targets", ["all-linear", ".*", ("weight",)])
def test_a_bare_layer_has_no_place_for_an_adapter(targets):
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="a bare Linear.*Wrap it"):
        inject(model, LoRAConfig(2, target_modules=targets))
    assert model.weight.requires_grad


def test_a_model_without_linears():
    with pytest.raises(ValueError, match="no linear layer besides its head"):
        inject(nn.Sequential(nn.LayerNorm(3)), LoRAConfig(2, target_modules="all-linear"))


@pytest.mark.parametrize(
    "model, targets",
    [
        (nn.MultiheadAttention(8, 2), ("out_proj",)),
        (nn.Sequential(nn.MultiheadAttention(8, 2)), ("out_proj",)),
        (nn.TransformerEncoderLayer(8, 2, 16), ("linear1",)),
    ],
)
def test_weights_that_torch_reads_past_the_module_are_refused(model, targets):
    with pytest.raises(ValueError, match="cannot be adapted: the torch module around it reads its weight"):
        inject(model, LoRAConfig(2, target_modules=targets))
    with pytest.raises(ValueError, match="no linear layer"):
        inject(model, LoRAConfig(2, target_modules="all-linear"))


def test_all_or_nothing_when_something_fails_midway(monkeypatch):
    model, built = small.our_llama(), []
    before, start = state(model), LoRALayer.__init__

    def failing(self, *args, **kwargs):
        built.append(1)
        if len(built) == 3:
            raise MemoryError("no room")
        start(self, *args, **kwargs)

    monkeypatch.setattr(LoRALayer, "__init__", failing)
    with pytest.raises(MemoryError):
        inject(model, LoRAConfig())
    assert len(built) == 3 and same(state(model), before)


# Shared modules and tied weights


class Shared(nn.Module):
    """One layer in two places, and called twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a
        self.stack = nn.ModuleList([self.a, nn.Linear(6, 6)])

    def forward(self, x):
        return self.stack[1](self.b(self.a(x).tanh()).tanh())


def test_a_module_in_several_places_is_adapted_in_all():
    model, x = Shared(), torch.randn(3, 6)
    before, expected = state(model), model(x)
    inject(model, LoRAConfig(2, target_modules=("a",)))
    assert model.a is model.b is model.stack[0] and isinstance(model.a, LoRALayer)
    assert (
        torch.equal(model(x), expected) and plan(remove(model), LoRAConfig(2, target_modules=("a",)))[0].tied_to is None
    )
    inject(model, LoRAConfig(2, target_modules=("a",)))
    shake(model)
    expected = model(x)
    assert merge(model).keys() == {"a"} and torch.allclose(model(x), expected, atol=1e-6)
    unmerge(model)
    remove(model)
    assert same(state(model), before)
    inject(model, LoRAConfig(2, target_modules=("a",)))
    shake(model)
    expected = model(x)
    merge(model, permanent=True)
    assert type(model.a) is nn.Linear and model.a is model.b is model.stack[0]
    assert torch.allclose(model(x), expected, atol=1e-6)


def tied() -> nn.Module:
    """Our decoder with its head tied to the embedding."""
    model = small.our_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("target, other", [("lm_head", "model.embed_tokens"), ("embed_tokens", "lm_head")])
def test_a_tied_weight(target, other):
    model = tied()
    before = state(model)
    assert plan(model, LoRAConfig(2, target_modules=(target,)))[0].tied_to == other
    inject(model, LoRAConfig(2, target_modules=(target,)))
    shake(model)
    alone, expected, mark = model.get_submodule(other).weight.clone(), logits(model), fingerprint(model)
    for merged in (False, True):  # also when it is merged for inference already
        as_before = state(model)
        with pytest.raises(ValueError, match=f"cannot merge .*{target} for good: its weight is tied to {other}"):
            merge(model, permanent=True)
        assert same(state(model), as_before)
        if not merged:
            merge(model)
    assert torch.equal(model.get_submodule(other).weight, alone)  # its twin saw nothing of the merge
    assert torch.allclose(logits(model), expected, atol=1e-5) and fingerprint(model) == mark
    remove(model)
    assert same(state(model), before) and model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tie_through_a_view_is_seen():
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 4)})
    model["b"].weight = nn.Parameter(model["a"].weight.detach().T)
    assert [m.tied_to for m in plan(model, LoRAConfig(2, target_modules=("a", "b")))] == ["b", "a"]


# Merging


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", MODELS)
def test_merge_and_unmerge(family, variant):
    model = MODELS[family]()
    inject(model, LoRAConfig(3, 6, TARGETS[family], **VARIANTS[variant]))
    shake(model)
    before, apart = state(model), logits(model)
    lost = merge(model)
    assert lost.keys() == lora_layers(model).keys() and max(lost.values()) < 1e-5
    assert torch.allclose(logits(model), apart, atol=1e-4)
    unmerge(model)
    assert same(state(model), before) and torch.equal(logits(model), apart)
    merge(model)
    remove(model)  # removing from a merged model gives the base, too
    assert not any(isinstance(m, LoRALayer) for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_thousand_cycles_change_no_bit(dtype, variant):
    model = nn.Sequential(nn.Linear(12, 8), nn.Embedding(9, 5), Conv1D(7, 8)).to(dtype)
    weights = [m.weight.detach().view(torch.uint8).clone() for m in model]
    inject(model, LoRAConfig(3, 6, ("0", "1", "2"), **VARIANTS[variant]))
    shake(model, 1.0)
    moved = 0
    for _ in range(1000):
        merge(model)
        moved += not torch.equal(model[0].base_layer.weight.view(torch.uint8), weights[0])
        unmerge(model)
    assert moved == 1000
    assert all(torch.equal(m.base_layer.weight.view(torch.uint8), w) for m, w in zip(model, weights, strict=True))


def test_merge_leaves_plain_modules_for_good():
    model = small.our_llama()
    inject(model, LoRAConfig(4, 8, "all-linear"))
    shake(model)
    apart, names = logits(model), [n for n, _ in small.our_llama().named_parameters()]
    merge(model, permanent=True)
    assert [n for n, _ in model.named_parameters()] == names and "trained_before_lora" not in model.__dict__
    assert torch.allclose(logits(model), apart, atol=1e-4)
    with pytest.raises(ValueError, match="no adapters"):
        unmerge(model)


def test_the_swallowed_share():
    share = {}
    for dtype, size in ((torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.bfloat16, 1e-4)):
        model = nn.Sequential(nn.Linear(64, 64)).to(dtype)
        inject(model, LoRAConfig(2, 2, ("0",)))
        with torch.no_grad():
            model[0].lora_B.normal_().mul_(size)
        W, wide = model[0].base_layer.weight.double(), model[0].merged_weight()
        share[dtype, size] = merge(model)["0"]
        arrived = model[0].base_layer.weight.double() - W
        assert share[dtype, size] == pytest.approx(((arrived - (wide - W)).norm() / (wide - W).norm()).item())
    assert share[torch.float32, 1.0] < 1e-6 < share[torch.bfloat16, 1.0] < 0.05 < 0.5 < share[torch.bfloat16, 1e-4]
    model = inject(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(2, target_modules=("0",)))
    assert merge(model) == {"0": 0.0}  # nothing to lose


def test_merge_is_all_or_nothing(monkeypatch):
    model = inject(MLP().half(), TINY)
    shake(model)
    with torch.no_grad():
        model.down.lora_B.fill_(1e6)
    before = state(model)
    with pytest.raises(ValueError, match="down: the merged weight does not fit torch.float16"):
        merge(model)
    assert same(state(model), before) and not model.up.merged

    merge_one = LoRALayer.merge
    monkeypatch.setattr(LoRALayer, "merge", lambda layer: 1 / 0 if layer is model.down else merge_one(layer))
    with pytest.raises(ZeroDivisionError):
        merge(model)
    assert same(state(model), before) and not model.up.merged


def test_merge_into_a_quantised_base_is_refused():
    model = nn.Sequential(nn.Linear(12, 12), Codes(nn.Linear(12, 7)))
    inject(model, LoRAConfig(2, target_modules="all-linear"))
    shake(model)
    before = state(model)
    for permanent in (False, True):
        with pytest.raises(ValueError, match="1: cannot merge into a quantised weight.*Keep the adapter beside it"):
            merge(model, permanent)
        assert same(state(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("size", [1.0, 1e-2])
def test_merge_error_is_never_above_pefts(dtype, variant, size):
    errors = merge_errors(dtype, VARIANTS[variant], size)
    assert 0 < errors["ours"] <= min(errors["plain"], errors["safe"]) * (1 + 1e-9)


def merge_errors(dtype: torch.dtype, options: dict, size: float) -> dict[str, float]:
    """||merged W - exact W|| of one adapter merged by us and by PEFT, plain and safe; the exact one in fp64."""
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(96, 64)).to(dtype)
    ours = inject(copy.deepcopy(base), LoRAConfig(8, 16, ("0",), **options))
    shake(ours, size)
    layer = ours[0]
    exact = base[0].weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    if layer.variant == "dora":
        exact = layer.lora_magnitude.double()[:, None] * exact / exact.norm(dim=1, keepdim=True)
    merge(ours)
    found = {"ours": layer.base_layer.weight}
    for name in ("plain", "safe"):
        theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, lora_alpha=16, target_modules=["0"], **options))
        peft_layer = theirs.base_model.model[0]
        with torch.no_grad():
            peft_layer.lora_A["default"].weight.copy_(layer.lora_A)
            peft_layer.lora_B["default"].weight.copy_(layer.lora_B)
            if layer.variant == "dora":
                peft_layer.lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude)
        found[name] = theirs.merge_and_unload(safe_merge=name == "safe")[0].weight
    return {name: (W.double() - exact).norm().item() for name, W in found.items()}


# What trains


def test_report():
    model = MLP()
    assert (report(model).trainable, report(model).total, report(model).share) == (386, 386, 1.0)
    inject(model, LoRAConfig(2, target_modules=("up",)))
    r = report(model)
    assert r.rows == (("up", 2 * (12 + 20), 2 * (12 + 20) + 260),) and (r.trainable, r.total) == (64, 450)
    assert str(r).endswith("trainable 64 / all 450 = 14.2222%")
    model.down.bias.requires_grad_(True)
    assert report(model).rows[1] == ("down", 6, 126)
    assert report(nn.Module()).share == 0.0


def test_report_counts_a_tied_weight_once():
    model = tied()
    assert report(model).total == sum(p.numel() for p in model.parameters())


def test_loraplus_groups():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    inject(model, LoRAConfig(2, target_modules=("0", "1"), use_dora=True))
    slow, fast = loraplus_groups(model, 1e-3, ratio=8)
    assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)
    assert [id(p) for p in fast["params"]] == [id(model[0].lora_A), id(model[1].lora_B)]  # those that start at zero
    every = [id(p) for g in (slow, fast) for p in g["params"]]
    assert sorted(every) == sorted(id(p) for p in lora_parameters(model))
    torch.optim.AdamW([slow, fast])
    assert loraplus_groups(model, 1e-3)[1]["lr"] == pytest.approx(16e-3)
    for bad in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="ratio must be above 0"):
            loraplus_groups(model, 1e-3, bad)


# A model with adapters is a model like any other


def test_deep_copy_and_moves():
    model = inject(small.our_llama(), LoRAConfig(2, 4))
    shake(model)
    twin, expected = copy.deepcopy(model), logits(model)
    merge(twin)
    remove(twin)
    assert torch.equal(logits(model), expected) and all(p.requires_grad for p in twin.parameters())
    other = inject(small.our_llama(), LoRAConfig(2, 4))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), expected)
    assert torch.allclose(logits(model.double()).float(), expected, atol=1e-5)
    assert torch.allclose(logits(model.bfloat16()).float(), expected, atol=0.1)


def test_gradient_checkpointing_of_a_whole_model():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = inject(small.our_llama(), LoRAConfig(2, 4, dropout=0.3)).train()
        shake(model)
        model.model.checkpointing = checkpointing
        model(IDS).square().mean().backward()
        grads.append([p.grad for p in lora_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_small_parts():
    assert suggest("x", []) == "the model has no module that can be adapted"
    assert table(("name", "n"), [("a", 1000), ("bcd", 2)]) == "name      n\na     1,000\nbcd       2"
    assert injection.plan(MLP(), TINY)[0].name == "up"
