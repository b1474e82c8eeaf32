"""The bank: load, switch, unload, list, combine, route."""

import json

import pytest
import small
import torch
from small import IDS, MLP, Codes, Conv1D, logits, same, shake, state
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora import (
    AdapterBank,
    LoRAConfig,
    fingerprint,
    inject,
    load_adapter,
    lora_parameters,
    merge,
    remove,
    report,
    save_adapter,
    unmerge,
)
from minilora.bank import RoutedLayer
from minilora.injection import lora_layers

MODELS = {"ours": small.our_llama, "llama": small.hf_llama, "gpt2": small.gpt2, "bert": small.bert}
# adapters that differ in rank, targets and variant; "wte" and the like are embeddings
CONFIGS = {
    "llama": {
        "a": LoRAConfig(2, 4, ("q_proj", "v_proj")),
        "b": LoRAConfig(5, 3, ("q_proj", "down_proj"), rank_pattern={"layers.1.mlp.down_proj": 3}, dropout=0.5),
        "c": LoRAConfig(3, 6, ("v_proj", "embed_tokens"), use_rslora=True),
        "d": LoRAConfig(2, 4, ("q_proj", "up_proj", "embed_tokens"), use_dora=True),
    },
    "gpt2": {
        "a": LoRAConfig(2, 4, ("c_attn",)),
        "b": LoRAConfig(5, 3, ("c_attn", "mlp.c_proj"), rank_pattern={"h.1.mlp.c_proj": 3}),
        "c": LoRAConfig(3, 6, ("mlp.c_proj", "wte", "wpe"), use_rslora=True),
        "d": LoRAConfig(2, 4, ("c_attn", "wte"), use_dora=True),
    },
    "bert": {
        "a": LoRAConfig(2, 4, ("query", "value")),
        "b": LoRAConfig(5, 3, ("query", "intermediate.dense")),
        "c": LoRAConfig(3, 6, ("value", "word_embeddings", "position_embeddings"), use_rslora=True),
        "d": LoRAConfig(2, 4, ("query", "word_embeddings"), use_dora=True),
    },
}
CONFIGS["ours"] = CONFIGS["llama"]


def saved(make, configs: dict[str, LoRAConfig], folder, size: float = 0.1) -> dict[str, nn.Module]:
    """Adapters of these configs, shaken and saved under their names; the models that hold them, by name."""
    models = {}
    for name, config in configs.items():
        models[name] = inject(make(), config)
        shake(models[name], size)
        save_adapter(models[name], folder / name)
    return models


def bank_of(make, folder, *names: str) -> AdapterBank:
    bank = AdapterBank(make())
    for name in names:
        bank.load(name, folder / name)
    return bank


class Watch(TorchDispatchMode):
    """Counts operations, and the entries of the largest tensor that they make."""

    operations = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.operations, self.largest = self.operations + 1, max([self.largest, *sizes])
        return out


# Load, use, unload


@pytest.mark.parametrize("family", MODELS)
def test_switching_gives_each_adapter_and_the_base_back(family, tmp_path):
    models = saved(MODELS[family], CONFIGS[family], tmp_path)
    model = MODELS[family]()
    next(model.parameters()).requires_grad_(False)  # a flag of the user's own
    before, base = state(model), logits(model)
    bank = AdapterBank(model)
    for name in models:
        bank.load(name, tmp_path / name)
        assert same(state(model), before) and bank.in_use is None  # loading does not use
    for name in ("a", "b", "a", "c", "d", None, "d", "a"):
        bank.use(name)
        assert bank.in_use == name and torch.equal(logits(model), logits(models[name]) if name else base)
        if name:
            trains = {id(p) for p in model.parameters() if p.requires_grad}
            assert trains == {id(p) for p in lora_parameters(model)}
    bank.use(None)
    assert same(state(model), before)


def test_an_adapter_in_use_is_trained_and_saved_and_comes_back(tmp_path):
    saved(small.our_llama, CONFIGS["ours"], tmp_path)
    bank = bank_of(small.our_llama, tmp_path, "a", "b")
    versions = {a.name: a.version for a in bank.list()}
    bank.use("a")
    opt = torch.optim.AdamW(lora_parameters(bank.model), lr=1e-2)
    for _ in range(2):
        bank.model(IDS).square().mean().backward()
        opt.step()
        opt.zero_grad()
    trained = logits(bank.model)
    bank.use("b")
    after = {a.name: a.version for a in bank.list()}
    assert after["a"] != versions["a"] and after["b"] == versions["b"]
    bank.use("a")
    assert torch.equal(logits(bank.model), trained)
    save_adapter(bank.model, tmp_path / "trained")
    assert torch.equal(logits(load_adapter(small.our_llama(), tmp_path / "trained")), trained)
    bank.load("again", tmp_path / "trained")
    assert {a.name: a.version for a in bank.list()}["again"] == after["a"]  # what computes the same is one version


def test_the_mode_of_the_model_is_the_adapters(tmp_path):
    saved(small.our_llama, {"a": LoRAConfig(2, 4, dropout=0.5), "b": LoRAConfig(2, 4, dropout=0.5)}, tmp_path)
    bank = bank_of(small.our_llama, tmp_path, "a", "b")
    bank.use("a")
    bank.model.train()
    bank.use("b")
    assert all(layer.training for layer in lora_layers(bank.model).values())
    bank.model.eval()
    bank.use("a")
    assert not any(m.training for m in bank.model.modules())


def test_an_adapter_follows_its_base_to_another_device(tmp_path):
    saved(MLP, {"a": LoRAConfig(2, 4, ("up",)), "b": LoRAConfig(2, 4, ("up",))}, tmp_path)
    bank = AdapterBank(MLP())
    for name in "ab":
        bank.load(name, tmp_path / name, any_base=True)
    bank.use("a")
    bank.model.to("meta")
    bank.use("b")
    assert {p.device.type for p in bank.model.parameters()} == {"meta"}


def test_a_merged_adapter_is_taken_out_and_left_merged_by_what_only_looks(tmp_path):
    models = saved(small.our_llama, CONFIGS["ours"], tmp_path)
    bank = bank_of(small.our_llama, tmp_path, "a", "b")
    base = state(bank.model)
    bank.use("a")
    merge(bank.model)
    merged = logits(bank.model)
    bank.load("d", tmp_path / "d")
    with bank.route(["d", None, "a"]):
        routed = logits(bank.model)
    bank.combine("ab", {"a": 1, "b": 1})
    assert all(layer.merged for layer in lora_layers(bank.model).values()) and torch.equal(logits(bank.model), merged)
    for i, expected in enumerate((models["d"], small.our_llama(), models["a"])):
        assert torch.allclose(routed[i], logits(expected)[i], atol=1e-5)
    bank.use("b")
    assert torch.equal(logits(bank.model), logits(models["b"]))
    bank.use(None)
    assert same(state(bank.model), base)


def test_list_and_unload(tmp_path):
    saved(MLP, {"a": LoRAConfig(2, 4, ("up", "down"), rank_pattern={"down": 3})}, tmp_path)
    torch.manual_seed(1)
    bank = AdapterBank(MLP())
    assert bank.list() == () and str(bank.list()).startswith("name")
    bank.load("one", tmp_path / "a", any_base=True)
    bank.load("two", tmp_path / "a", any_base=True)
    bank.use("two")
    one, two = bank.list()
    base = json.dumps(one.base)
    assert one.version == two.version and len(one.version) == 12 and one.base == two.base and "-" in base
    assert one.base != fingerprint(bank.model)  # another seed: the list says whose base it was
    assert (one.ranks, one.modules, one.parameters, one.in_use, two.in_use) == ((2, 3), 2, 2 * 32 + 3 * 26, False, True)
    assert [line.split()[:2] for line in str(bank.list()).splitlines()] == [
        ["name", "version"],
        ["one", one.version],
        ["two", two.version],
    ]
    with pytest.raises(ValueError, match="an adapter in use cannot be unloaded: use.None. .* got 'two'"):
        bank.unload("two")
    bank.unload("one")
    assert [a.name for a in bank.list()] == ["two"]
    with pytest.raises(ValueError, match="no adapter 'one' in the bank; it has two"):
        bank.use("one")


def test_a_version_is_what_an_adapter_computes(tmp_path):
    def version(change=lambda layer: None, alpha=4) -> str:
        torch.manual_seed(0)
        model = inject(MLP(), LoRAConfig(2, alpha, ("up", "down"), use_dora=True))
        change(model.up)
        save_adapter(model, tmp_path / "a")
        bank = AdapterBank(MLP())
        bank.load("a", tmp_path / "a", any_base=True)
        return bank.list()[0].version

    def nudge(name: str):
        return lambda layer: getattr(layer, name).data.view(-1)[-1:].add_(1e-6)

    changes = [version(nudge(name)) for name in ("lora_A", "lora_B", "lora_magnitude")]
    assert version() == version() and len({version(), version(alpha=5), *changes}) == 5


def test_pefts_adapter_says_no_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(MLP(), LoraConfig(r=2, target_modules=["up"])).save_pretrained(tmp_path)
    bank = AdapterBank(MLP())
    bank.load("theirs", tmp_path)
    assert bank.list()[0].base is None and "not said" in str(bank.list())


# Refusals


def test_refusals_change_nothing(tmp_path):
    saved(small.our_llama, CONFIGS["ours"], tmp_path)
    saved(MLP, {"other": LoRAConfig(2, 4, ("up",))}, tmp_path)
    bank = bank_of(small.our_llama, tmp_path, "a", "b", "d")
    bank.use("a")
    before, listed = state(bank.model), bank.list()
    for says, call in {
        "no adapter 'acme' in the bank; it has a, b, d": lambda: bank.use("acme"),
        "name must be a string, got 3": lambda: bank.use(3),
        "name must be a string, got ''": lambda: bank.load("", tmp_path / "a"),
        "name must be a string, got None": lambda: bank.combine(None, {"a": 1}),
        "has an adapter of this name: unload it first": lambda: bank.load("a", tmp_path / "a"),
        "is no adapter folder": lambda: bank.load("new", tmp_path / "nowhere"),
        "does not fit this model": lambda: bank.load("new", tmp_path / "other"),
        "no adapter 'zen'": lambda: bank.unload("zen"),
        "of this name": lambda: bank.combine("a", {"b": 1}),
        "must map names": lambda: bank.combine("new", {}),
        "must map names of": lambda: bank.combine("new", ["a", "b"]),
        "weight of 'a' must be a finite number, got nan": lambda: bank.combine("new", {"a": float("nan")}),
        "weight of 'b' must be a finite number, got '1'": lambda: bank.combine("new", {"a": 1, "b": "1"}),
        "q_proj overflows: the weights are too large, got {'a': 1e+300}": lambda: bank.combine("new", {"a": 1e300}),
        "rank must be a positive integer or None, got 0": lambda: bank.combine("new", {"a": 1}, rank=0),
        "rank must be a positive integer or None, got 2.0": lambda: bank.combine("new", {"a": 1}, rank=2.0),
        "no adapter 'x'": lambda: bank.combine("new", {"a": 1, "x": 1}),
        "DoRA's lengths are no part of a sum": lambda: bank.combine("new", {"a": 1, "d": 1}),
        "one per row, got 'aab'": lambda: bank.route("aab").__enter__(),
        "one per row, got 3": lambda: bank.route(3).__enter__(),
        "one per row, got []": lambda: bank.route([]).__enter__(),
        "no adapter 'q'": lambda: bank.route(["a", "q"]).__enter__(),
    }.items():
        with pytest.raises(ValueError) as e:
            call()
        assert says in str(e.value) and "\n" not in str(e.value)
        assert same(state(bank.model), before) and bank.list() == listed, says
    with pytest.raises(ValueError, match="the model has adapters already"):
        AdapterBank(bank.model)


@pytest.mark.parametrize("change", [remove, lambda m: merge(m, permanent=True)])
def test_a_model_changed_past_the_bank_is_noticed(change, tmp_path):
    saved(small.our_llama, CONFIGS["ours"], tmp_path)
    bank = bank_of(small.our_llama, tmp_path, "a", "b")
    bank.use("a")
    change(bank.model)
    before = state(bank.model)
    for call in (lambda: bank.use("b"), lambda: bank.use(None), lambda: bank.load("c", tmp_path / "c")):
        with pytest.raises(ValueError, match="not those that the bank put there.*Make a new AdapterBank"):
            call()
        assert same(state(bank.model), before)


def test_the_wrong_base_is_refused(tmp_path):
    saved(small.our_llama, {"a": LoRAConfig(2, 4)}, tmp_path)
    other = small.our_llama()
    other.model.norm.weight.data.add_(0.5)
    bank = AdapterBank(other)
    with pytest.raises(ValueError, match="trained on another base: other weights"):
        bank.load("a", tmp_path / "a")
    bank.load("a", tmp_path / "a", any_base=True)
    assert bank.list()[0].base == fingerprint(small.our_llama())


# Combine


def delta(layer) -> torch.Tensor:
    return layer.scaling * layer.lora_B.double() @ layer.lora_A.double()


def three_plain(folder, make=small.our_llama) -> tuple[AdapterBank, dict]:
    models = saved(make, {k: CONFIGS["ours"][k] for k in "abc"}, folder)
    return bank_of(make, folder, "a", "b", "c"), {k: lora_layers(m) for k, m in models.items()}


@torch.no_grad()
def test_an_uncut_combination_is_the_exact_sum(tmp_path):
    bank, parts = three_plain(tmp_path)
    weights = {"a": 1, "b": -0.5, "c": 2.0}
    lost = bank.combine("abc", weights)
    bank.use("abc")
    layers = lora_layers(bank.model)
    assert layers.keys() == {m for ls in parts.values() for m in ls} == lost.keys() and set(lost.values()) == {0.0}
    for module, layer in layers.items():
        exact = sum(w * delta(parts[k][module]) for k, w in weights.items() if module in parts[k])
        assert torch.allclose(delta(layer), exact, atol=1e-6)
    save_adapter(bank.model, tmp_path / "abc")
    assert torch.equal(logits(load_adapter(small.our_llama(), tmp_path / "abc")), logits(bank.model))
    assert bank.list()[-1].base == fingerprint(bank.model) and bank.list()[-1].source == "1 a + -0.5 b + 2 c"


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 3, 6, 100])
def test_a_cut_combination_is_the_best_of_its_rank_and_says_what_it_lost(rank, tmp_path):
    bank, parts = three_plain(tmp_path)
    lost = bank.combine("ab", {"a": 1, "b": 0.7}, rank=rank)
    bank.use("ab")
    for module, layer in lora_layers(bank.model).items():
        exact = sum(w * delta(parts[k][module]) for k, w in (("a", 1), ("b", 0.7)) if module in parts[k])
        U, S, Vh = torch.linalg.svd(exact)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank] if rank < len(S) else exact
        assert layer.rank == min(rank, sum(parts[k][module].rank for k in "ab" if module in parts[k]))
        assert torch.allclose(delta(layer), best, atol=1e-6)
        assert lost[module] == pytest.approx(((exact - best).norm() / exact.norm()).item(), abs=1e-7)
    assert (max(lost.values()) > 0.01) == (rank < 2 + 5)  # q_proj has ranks 2 and 5


@torch.no_grad()
def test_no_cross_terms_which_adding_the_factors_would_bring(tmp_path):
    configs = {k: LoRAConfig(3, 6, ("up", "down")) for k in "ab"}
    torch.manual_seed(0)
    base = MLP().state_dict()

    def make():
        model = MLP()
        model.load_state_dict(base)
        return model

    models, x = saved(make, configs, tmp_path), torch.randn(5, 12)
    bank = bank_of(make, tmp_path, "a", "b")
    bank.combine("half", {"a": 0.5, "b": 0.5})
    bank.use("half")
    layers = [m.up for m in (models["a"], models["b"], bank.model)]
    exact = 0.5 * delta(layers[0]) + 0.5 * delta(layers[1])
    factors = layers[0].scaling * sum(0.5 * m.lora_B for m in layers[:2]) @ sum(0.5 * m.lora_A for m in layers[:2])
    assert (delta(layers[2]) - exact).norm() < 1e-6 * exact.norm() < 0.1 * (factors.double() - exact).norm()
    expected = base["up.weight"].double() + exact
    assert torch.allclose(bank.model.up(x).double(), x.double() @ expected.T + base["up.bias"], atol=1e-5)


@torch.no_grad()
def test_an_adapter_less_itself_is_nothing_and_loses_nothing(tmp_path):
    bank, _ = three_plain(tmp_path)
    bank.load("twin", tmp_path / "a")
    lost = bank.combine("zero", {"a": 1, "twin": -1}, rank=2)
    base = logits(bank.model)
    bank.use("zero")
    assert torch.allclose(logits(bank.model), base, atol=1e-5) and all(0 <= v <= 1 for v in lost.values())
    assert bank.combine("none", {"a": 0}) == dict.fromkeys(lost, 0.0)


@torch.no_grad()
def test_combining_forms_nothing_of_the_size_of_the_weight(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3000, 3000, bias=False))

    saved(make, {k: LoRAConfig(4, 8, ("0",)) for k in "ab"}, tmp_path)
    bank = bank_of(make, tmp_path, "a", "b")
    with Watch() as watch:
        bank.combine("ab", {"a": 1, "b": 1}, rank=4)
    assert 3000 * 4 <= watch.largest <= 3000 * 16


# Route


@pytest.mark.parametrize("family", MODELS)
def test_each_row_goes_through_its_own_adapter(family, tmp_path):
    models = saved(MODELS[family], CONFIGS[family], tmp_path) | {None: MODELS[family]()}
    bank = bank_of(MODELS[family], tmp_path, "a", "b", "c", "d")
    ids = torch.randint(0, 64, (7, 6))
    names = ["a", None, "d", "b", "c", "b", "a"]
    bank.use("b")
    before, base = state(bank.model), logits(models[None], ids)
    with bank.route(names) as model:
        assert model is bank.model and bank.in_use is None
        assert not any(p.requires_grad for p in model.parameters())
        got = logits(model, ids)
    assert same(state(bank.model), before) and bank.in_use == "b"
    for i, name in enumerate(names):
        alone = logits(models[name], ids[i : i + 1])[0]
        assert torch.allclose(got[i], alone, atol=1e-5)
        assert name is None or not torch.allclose(alone, base[i], atol=1e-3)
    with bank.route([None] * 7):
        assert torch.equal(logits(bank.model, ids), base)
    with bank.route(name for name in names):  # any iterable, and as often as one likes
        for _ in range(2):
            assert torch.equal(logits(bank.model, ids), got)


@pytest.mark.parametrize("base", ["linear", "no bias", "conv1d", "embedding", "codes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3)])
def test_every_kind_of_layer_dtype_and_input(base, dtype, shape, tmp_path):
    make = {
        "linear": lambda: nn.Linear(12, 7),
        "no bias": lambda: nn.Linear(12, 7, bias=False),
        "conv1d": lambda: Conv1D(7, 12),
        "embedding": lambda: nn.Embedding(12, 7),
        "codes": lambda: Codes(nn.Linear(12, 7, bias=False)),
    }[base]
    torch.manual_seed(0)
    layer = make().to(dtype)

    def model():
        return nn.Sequential(layer)

    variants = {"a": {}, "b": {"use_rslora": True}, "c": {"use_dora": True}}
    models = saved(model, {k: LoRAConfig(r, 4, ("0",), **variants[k]) for k, r in zip("abc", (1, 4, 3))}, tmp_path, 0.5)
    bank = bank_of(model, tmp_path, *"abc")
    x = torch.randint(0, 12, shape) if base == "embedding" else torch.randn(*shape, 12).to(dtype)
    with bank.route(["c", "a", None, "b"]), torch.no_grad():
        got = bank.model(x)
    expected = torch.cat([m(x[i : i + 1]) for i, m in enumerate((models["c"], models["a"], layer, models["b"]))])
    assert got.dtype == expected.dtype and got.shape == expected.shape
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]


def test_routing_under_autocast(tmp_path):
    models = saved(small.our_llama, CONFIGS["ours"], tmp_path)
    bank = bank_of(small.our_llama, tmp_path, "a", "c")
    with torch.autocast("cpu", torch.bfloat16), bank.route(["a", "c", None]):
        got = logits(bank.model)
    for i, model in enumerate((models["a"], models["c"], small.our_llama())):
        assert (got[i].float() - logits(model)[i]).abs().max() < 0.05


def test_the_forward_calls_the_same_operations_for_any_number_of_adapters(tmp_path):
    """No loop over adapters: 2 or 16 of them are as many operations."""
    configs = {f"n{i}": LoRAConfig(1 + i % 5, 4, ("up", "down")) for i in range(16)}
    torch.manual_seed(0)
    weights = MLP().state_dict()

    def make():
        model = MLP()
        model.load_state_dict(weights)
        return model

    models, x, counts = saved(make, configs, tmp_path), torch.randn(16, 12), []
    bank = bank_of(make, tmp_path, *configs)
    for many in (2, 16):
        names = [f"n{i % many}" for i in range(16)]
        with bank.route(names), torch.no_grad():
            with Watch() as watch:
                got = bank.model(x)
        counts.append(watch.operations)
        expected = torch.stack([models[name](x[i]) for i, name in enumerate(names)])
        assert torch.allclose(got, expected, atol=1e-5)
    assert counts[0] == counts[1] > 10


def test_gradient_reaches_the_input_and_no_adapter(tmp_path):
    base = nn.Linear(6, 6)
    configs = {"a": LoRAConfig(2, 4, ("0",)), "b": LoRAConfig(2, 4, ("0",), use_dora=True)}
    models = saved(lambda: nn.Sequential(base), configs, tmp_path)
    bank = bank_of(lambda: nn.Sequential(base), tmp_path, "a", "b")
    x = torch.randn(2, 3, 6, requires_grad=True)
    with bank.route(["a", "b"]):
        bank.model(x).square().sum().backward()
    got, x.grad = x.grad, None
    for i, name in enumerate("ab"):
        models[name](x[i]).square().sum().backward()
    assert torch.allclose(got, x.grad, atol=1e-5)
    bank.use("a")
    assert all(p.grad is None for p in lora_parameters(bank.model))


def test_a_batch_of_another_size_is_told(tmp_path):
    saved(small.our_llama, CONFIGS["ours"], tmp_path)
    bank = bank_of(small.our_llama, tmp_path, "a")
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: the route names 2 rows, the input has 3 .*8, 32"):
        with bank.route(["a", None]):
            logits(bank.model)
    assert not any(isinstance(m, RoutedLayer) for m in bank.model.modules())  # and the model is plain again
    assert torch.equal(logits(bank.model), logits(small.our_llama()))


def test_routes_may_nest_and_end_by_an_error(tmp_path):
    models = saved(small.our_llama, CONFIGS["ours"], tmp_path)
    bank = bank_of(small.our_llama, tmp_path, "a", "b")
    bank.use("a")
    with pytest.raises(ZeroDivisionError):
        with bank.route(["b", "b", None]):
            outer = logits(bank.model)
            with bank.route([None, "a", "b"]):
                assert torch.allclose(logits(bank.model)[2], logits(models["b"])[2], atol=1e-5)
            assert torch.equal(logits(bank.model), outer)
            raise ZeroDivisionError
    assert bank.in_use == "a" and torch.equal(logits(bank.model), logits(models["a"]))


def test_a_route_in_a_model_that_trains_leaves_its_flags(tmp_path):
    saved(small.our_llama, CONFIGS["ours"], tmp_path)
    bank = bank_of(small.our_llama, tmp_path, "a")
    before = report(bank.model)
    assert before.share == 1.0
    with bank.route(["a"] * 3):
        assert report(bank.model).trainable == 0
    assert report(bank.model) == before
    bank.use("a")
    unmerge(bank.model)
    assert 0 < report(bank.model).share < 1
