"""LoRA's relatives: counts, what they compute, the peft package's own beside them, saving, removing, bad input."""

import copy
import json

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small import IDS, MLP, SIZES, gpt2, hf_llama, logits, our_llama, same, state
from torch import nn

from minilora import (
    AdapterBank,
    LoRAConfig,
    inject,
    load_adapter,
    lora_parameters,
    merge,
    peft_methods,
    remove,
    report,
    save_adapter,
)
from minilora.adapter_tools import inspect_adapter
from minilora.injection import adapter_layers
from minilora.llama import Llama, LlamaConfig
from minilora.peft_methods import IA3, BitFit, BottleneckAdapters, PrefixTuning, PromptTuning
from minilora.quant import quantise_model

L, C, FFN, KV, D = 2, 32, 48, 16, 8  # of the small Llama: two key/value heads of 8
N = 5

# method -> the parameters it trains there, by the formulas of the papers
COUNTS = [
    (PromptTuning(N), N * C),
    (PrefixTuning(N), N * L * 2 * KV),
    (PrefixTuning(N, hidden=12), N * KV + (KV + 1) * 12 + (12 + 1) * L * 2 * KV),
    (IA3(), L * (KV + KV + FFN)),
    (BottleneckAdapters(6), 2 * L * (2 * 6 * C + C + 6)),
    (BottleneckAdapters(6, norms=True), 2 * L * (2 * 6 * C + C + 6) + (2 * L + 1) * C),
    (BitFit(add=True), L * (C + 2 * KV + C + 2 * FFN + C)),
    (LoRAConfig(3, 6), L * (3 * (C + C) + 3 * (C + KV))),
]


def count(method) -> int:
    return next(n for m, n in COUNTS if m == method)


def name_of(method) -> str:
    return repr(method).split(", target_modules")[0].replace(", init_ids=()", "")


METHODS = pytest.mark.parametrize("method", [method for method, _ in COUNTS], ids=name_of)


@torch.no_grad()
def shake(model: nn.Module, size: float = 0.3) -> nn.Module:
    for p in lora_parameters(model):
        p.add_(torch.randn_like(p) * size)
    return model


def loss_of(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())


# One interface


@METHODS
def test_trainable_counts_are_the_papers(method):
    model = inject(our_llama(), method)
    assert sum(p.numel() for p in lora_parameters(model)) == report(model).trainable == count(method)


@METHODS
def test_only_the_method_trains_and_the_base_gets_no_gradient(method):
    model = inject(our_llama(), method)
    before = {id(p): p.detach().clone() for p in model.parameters()}
    trained = lora_parameters(model)
    optimizer, losses = torch.optim.Adam(trained, lr=0.03), []
    for _ in range(20):
        loss = loss_of(model)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01
    ours = {id(p) for p in trained}
    for p in model.parameters():
        assert (p.grad is not None) == p.requires_grad == (id(p) in ours)
        assert torch.equal(p, before[id(p)]) != (id(p) in ours)


@METHODS
def test_removing_gives_back_the_very_model(method):
    model = our_llama()
    model.model.norm.weight.requires_grad_(False)
    before = state(model)
    shake(inject(model, method))
    assert not same(before, state(model))
    assert remove(model) is model
    assert same(before, state(model))


@pytest.mark.parametrize("method", [IA3(), BitFit(add=True), LoRAConfig()], ids=name_of)
def test_equal_at_birth_bit_for_bit(method):
    base, model = our_llama(), inject(our_llama(), method)
    assert torch.equal(logits(model), logits(base))
    assert not torch.equal(logits(shake(model)), logits(base))


@METHODS
def test_saved_and_loaded_it_computes_the_same(method, tmp_path):
    model = shake(inject(our_llama(), method))
    save_adapter(model, tmp_path / "it")
    again = load_adapter(our_llama(), tmp_path / "it")
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(again), logits(our_llama()))
    save_adapter(again, tmp_path / "twice")
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("it", "twice"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@METHODS
def test_generation_with_the_cache_equals_generation_without(method):
    model = shake(inject(our_llama(), method))
    ids = IDS
    for _ in range(6):
        ids = torch.cat((ids, logits(model, ids)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(IDS, 6), ids[:, IDS.shape[1]:])


@METHODS
def test_checkpointing_changes_no_gradient(method):
    model, grads = shake(inject(our_llama(), method)), []
    for on in (False, True):
        model.model.checkpointing = on
        model.zero_grad()
        loss_of(model).backward()
        grads.append([p.grad.clone() for p in lora_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    remove(model)
    assert model.model.checkpointing is True


@METHODS
def test_a_copy_is_a_model_of_its_own(method):
    model = inject(our_llama(), method)
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    shake(twin)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    assert torch.equal(logits(remove(twin)), logits(our_llama()))


@METHODS
def test_on_bfloat16_what_trains_is_fp32(method):
    model = inject(our_llama().bfloat16(), method)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    loss_of(model).backward()
    assert all(p.grad.isfinite().all() for p in lora_parameters(model))
    reference = logits(inject(our_llama(), BitFit(add=True)))
    assert (logits(inject(our_llama().bfloat16(), BitFit(add=True))) - reference).abs().max() < 0.02
    assert model.generate(IDS, 2).shape == (3, 2)


@METHODS
def test_on_a_base_in_four_bits(method):
    model = inject(quantise_model(our_llama()), method)
    loss_of(model).backward()
    assert all(p.grad is not None for p in lora_parameters(model))
    assert torch.equal(logits(remove(model)), logits(quantise_model(our_llama())))


# Each what its paper says


@pytest.mark.parametrize("method", [PromptTuning, PrefixTuning])
def test_virtual_tokens_that_start_as_words_act_as_those_words(method):
    words = [7, 3, 60, 3]
    model = inject(our_llama(), method(init_ids=words))
    with_words = torch.cat((torch.tensor(words).expand(3, -1), IDS), dim=1)
    expected = logits(our_llama(), with_words)[:, 4:]
    assert torch.allclose(logits(model), expected, atol=1e-6)
    assert not torch.allclose(logits(model), logits(our_llama()), atol=1e-3)
    assert torch.equal(model.generate(IDS, 5), our_llama().generate(with_words, 5))


def test_a_prefix_reaches_every_layer_and_a_prompt_only_the_first():
    prefixed, prompted = (inject(our_llama(), m(N)) for m in (PrefixTuning, PromptTuning))
    loss_of(prefixed).backward()
    grad = lora_parameters(prefixed)[0].grad
    assert grad.shape == (L, 2, KV // D, N, D) and (grad.flatten(2).norm(dim=2) > 0).all()
    assert lora_parameters(prompted)[0].shape == (N, C)


def test_the_mlp_of_a_prefix_makes_it_and_is_not_saved(tmp_path):
    model = shake(inject(our_llama(), PrefixTuning(N, hidden=12)))
    save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: tuple(t.shape) for k, t in stored.items()} == {"model.prefix": (L, 2, KV // D, N, D)}
    mlp, start = model.model.mlp, model.model.prefix
    made = mlp[2](torch.tanh(mlp[0](start)))  # (N, L 2 K D)
    assert torch.allclose(made.view(N, L, 2, KV // D, D)[3, 1, 0], stored["model.prefix"][1, 0, :, 3])
    assert sum(p.numel() for p in lora_parameters(load_adapter(our_llama(), tmp_path))) == count(PrefixTuning(N))


def test_ia3_scales_keys_values_and_the_inside_of_the_mlp():
    model, plain = inject(our_llama(), IA3()), our_llama()
    shake(model)
    with torch.no_grad():
        for ours, base in zip(model.model.layers, plain.model.layers):
            base.self_attn.k_proj.weight.mul_(ours.self_attn.k_proj.scale[:, None])
            base.self_attn.v_proj.weight.mul_(ours.self_attn.v_proj.scale[:, None])
            base.mlp.down_proj.weight.mul_(ours.mlp.down_proj.scale)  # scaled inputs are scaled columns
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)


def test_bottlenecks_stand_behind_attention_and_mlp_and_start_near_zero():
    model = inject(our_llama(), BottleneckAdapters(6))
    found = {n: m for n, m in model.named_modules() if isinstance(m, peft_methods.Bottleneck)}
    assert sorted(n.rsplit(".", 1)[1] for n in found) == ["down_proj", "down_proj", "o_proj", "o_proj"]
    for m in found.values():
        assert m.down.weight.abs().max() <= 0.02 and 0.005 < m.down.weight.std() < 0.01
        assert m.up.weight.abs().max() <= 0.02 and not m.up.bias.any() and not m.down.bias.any()
    start = logits(our_llama())
    assert 0 < (logits(model) - start).abs().max() < 1e-2
    layer, x = found["model.layers.1.mlp.down_proj"], torch.randn(3, FFN)
    shake(model)
    h = layer.base_layer(x)
    assert torch.allclose(layer(x), h + layer.up(F.gelu(layer.down(h))), atol=1e-6)


def test_bitfit_trains_every_bias_there_is():
    model = Llama(LlamaConfig(num_key_value_heads=2, attention_bias=True, **SIZES), seed=0)
    inject(model, BitFit())
    assert sum(p.numel() for p in lora_parameters(model)) == L * (C + 2 * KV)  # q, k and v
    shake(model)
    plain = Llama(model.config, seed=0)
    with torch.no_grad():
        for ours, base in zip(model.model.layers, plain.model.layers):
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(base.self_attn, name).bias.add_(getattr(ours.self_attn, name).change)
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)


def test_bitfit_on_a_model_of_another_kind():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), MLP(6, 5, 3))
    inject(model, BitFit())
    assert [p.numel() for p in lora_parameters(model)] == [6, 6, 5, 3]


# Beside the peft package


@pytest.fixture
def twins(tmp_path):
    """transformers' Llama and ours, with the same weights."""
    theirs = hf_llama()
    theirs.save_pretrained(tmp_path / "base")
    ours = Llama.from_pretrained(tmp_path / "base").eval()
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    return ours, theirs


def trainable_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_prompt_tuning_equals_pefts(twins):
    ours, theirs = inject(twins[0], PromptTuning(N)), peft.get_peft_model(
        twins[1], peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N))
    assert trainable_count(theirs) == count(PromptTuning(N)) == trainable_count(ours)
    ours.model.prompt.data.copy_(theirs.prompt_encoder["default"].embedding.weight)
    assert torch.allclose(logits(ours), logits(theirs)[:, N:], atol=1e-5)


@pytest.mark.parametrize("hidden", [0, 12])
def test_prefix_tuning_equals_pefts(twins, hidden):
    config = {"prefix_projection": True, "encoder_hidden_size": hidden} if hidden else {}
    method = PrefixTuning(N, hidden=hidden)
    ours, theirs = inject(twins[0], method), peft.get_peft_model(
        twins[1], peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, **config))
    assert trainable_count(theirs) == count(method) == trainable_count(ours)
    encoder = theirs.prompt_encoder["default"]
    if hidden:
        ours.model.prefix.data.copy_(encoder.embedding.weight)
        ours.model.mlp.load_state_dict(encoder.transform.state_dict())
    else:  # theirs is one row a token: (n, L 2 K D)
        ours.model.prefix.data.copy_(encoder.embedding.weight.view(N, L, 2, KV // D, D).permute(1, 2, 3, 0, 4))
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    for model in (ours, theirs):
        out = model(IDS)
        F.cross_entropy((out if model is ours else out.logits).flatten(0, 1), IDS.flatten()).backward()
    a, b = ours.model.prefix.grad, encoder.embedding.weight.grad
    b = b if hidden else b.view(N, L, 2, KV // D, D).permute(1, 2, 3, 0, 4)
    assert a.norm() > 1e-4 and torch.allclose(a, b, atol=1e-6)


def test_ia3_equals_pefts(twins):
    ours, theirs = inject(twins[0], IA3()), peft.get_peft_model(twins[1], peft.IA3Config(task_type="CAUSAL_LM"))
    assert trainable_count(theirs) == count(IA3()) == trainable_count(ours)
    shake(ours)
    for name, wrapper in adapter_layers(ours).items():
        place = theirs.base_model.model.get_submodule(name).ia3_l["default"]
        place.data.copy_(wrapper.scale.view(place.shape))
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)


def test_ia3_and_bottlenecks_go_onto_transformers_llama_too():
    for method in (IA3(), BottleneckAdapters(6), BottleneckAdapters(6, norms=True)):
        model = inject(hf_llama(), method)
        assert trainable_count(model) == count(method)
        assert torch.allclose(logits(model), logits(hf_llama()), atol=1e-2)


# Bad input


@pytest.mark.parametrize("make, message", [
    (lambda: PromptTuning(0), "tokens must be a positive integer, got 0"),
    (lambda: PrefixTuning(2.5), "tokens must be a positive integer, got 2.5"),
    (lambda: PromptTuning(init_ids=[3, -1]), r"init_ids must be token ids, got \(3, -1\)"),
    (lambda: PrefixTuning(3, hidden=-1), "hidden must be 0 or a positive integer"),
    (lambda: PrefixTuning(init_ids=[1], hidden=8), "an MLP cannot start from words"),
    (lambda: BottleneckAdapters(0), "size must be a positive integer, got 0"),
    (lambda: BottleneckAdapters(4, norms=1), "norms must be True or False"),
    (lambda: BitFit(add="yes"), "add must be True or False, got 'yes'"),
])
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make, method, message", [
    (our_llama, "lora", "expected a LoRAConfig or one of PromptTuning, PrefixTuning"),
    (our_llama, BitFit(), r"no bias to train; BitFit\(add=True\)"),
    (our_llama, PromptTuning(init_ids=[3, 64]), "below the vocabulary's size of 64, got 64"),
    (our_llama, PrefixTuning(2048), "2048 virtual tokens leave no room for text in a context of 2048"),
    (hf_llama, PromptTuning(4), "need our own decoder, minilora.llama.Llama, got a LlamaForCausalLM"),
    (lambda: MLP(), PrefixTuning(4), "need our own decoder, minilora.llama.Llama, got a MLP"),
    (gpt2, IA3(), "no linear called k_proj"),
    (lambda: MLP(), BottleneckAdapters(4), "no linear called o_proj"),
    (our_llama, BottleneckAdapters(32), "size must be below the width 32, got 32"),
    (lambda: nn.Sequential(nn.Conv1d(2, 3, 1)), BitFit(), "a bias must be a linear's or a LayerNorm's"),
    (lambda: inject(our_llama(), IA3()), PromptTuning(4), "has adapters already"),
    (lambda: inject(our_llama(), LoRAConfig()), IA3(), "has adapters already"),
    (lambda: inject(our_llama(), IA3()), LoRAConfig(), "has adapters already"),
    (our_llama, LoRAConfig(target_modules=("q",)), "matches no module"),
])
def test_after_an_error_a_model_is_as_it_was(make, method, message):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        inject(model, method)
    assert same(before, state(model))


@pytest.mark.parametrize("call", [remove, lora_parameters, lambda m: save_adapter(m, "nowhere")])
def test_a_plain_model_has_nothing_to_remove_or_save(call):
    with pytest.raises(ValueError, match="has no adapters"):
        call(our_llama())


def test_more_text_than_the_virtual_tokens_leave_room_for():
    model = inject(Llama(LlamaConfig(max_position_embeddings=16, **SIZES), seed=0), PromptTuning(9))
    with pytest.raises(ValueError, match="17 tokens are more than the context of 16"):
        model(IDS)


def edit(folder, change) -> None:
    tensors, path = load_file(folder / "adapter_model.safetensors"), folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    path.write_text(json.dumps(config))


K0 = "model.layers.0.self_attn.k_proj.scale"


@pytest.mark.parametrize("change, message", [
    (lambda t, c: c.update(method="Magic"), "no method known here"),
    (lambda t, c: c.pop("method"), "no method known here"),
    (lambda t, c: c.update(settings={"size": 3}), "no method known here"),
    (lambda t, c: c.update(settings=None), "no method known here"),
    (lambda t, c: c.update(method="BottleneckAdapters", settings={"size": -1}), "size must be a positive integer"),
    (lambda t, c: c.update(method="BottleneckAdapters", settings={"size": 10**15}), "size must be below the width 32"),
    (lambda t, c: c.update(method="PrefixTuning", settings={"hidden": 10**15}), "model.prefix is missing"),
    (lambda t, c: c.update(peft_type="LOHA"), "peft_type 'LOHA'; only 'LORA' or .*'MINILORA' can be loaded"),
    (lambda t, c: t.pop(K0), f"{K0} is missing"),
    (lambda t, c: t.update(more=torch.ones(2)), "'more' has no place in the model"),
    (lambda t, c: t.update({K0: torch.ones(3)}), r"k_proj.scale has shape \(3,\), the model needs \(16,\)"),
    (lambda t, c: t.update({K0: torch.full((16,), torch.nan)}), "not all finite"),
])
def test_a_damaged_folder_is_refused_and_changes_nothing(change, message, tmp_path):
    save_adapter(inject(our_llama(), IA3()), tmp_path)
    edit(tmp_path, change)
    model = our_llama()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert same(before, state(model))


def test_another_base_is_refused(tmp_path):
    save_adapter(inject(our_llama(), IA3()), tmp_path)
    other = Llama(our_llama().config, seed=1)
    with pytest.raises(ValueError, match="trained on another base: other weights"):
        load_adapter(other, tmp_path)
    assert trainable_count(load_adapter(other, tmp_path, any_base=True)) == count(IA3())


def test_what_takes_lora_alone_refuses_a_relative_by_name(tmp_path):
    save_adapter(inject(our_llama(), IA3()), tmp_path)
    bank = AdapterBank(our_llama())
    for call in (lambda: bank.load("a", tmp_path), lambda: inspect_adapter(tmp_path)):
        with pytest.raises(ValueError, match="peft_type 'MINILORA'; only 'LORA'.* can be loaded here"):
            call()
    assert torch.equal(logits(bank.model), logits(our_llama()))


def test_what_only_lora_can_do_is_refused_by_name():
    model = inject(our_llama(), IA3())
    with pytest.raises(ValueError, match=r"the adapter at .*k_proj is no LoRA.*got IA3\(\)"):
        merge(model)


def test_what_diverged_is_not_saved(tmp_path):
    model = inject(our_llama(), PromptTuning(4))
    model.model.prompt.data[1, 2] = torch.inf
    with pytest.raises(ValueError, match="model.prompt holds NaN or infinite values"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
