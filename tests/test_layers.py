"""One LoRA layer: the autograd function against the plain form, precision, memory, variants, merging."""

import copy
import math

import pytest
import torch
from small import Codes, Conv1D, lora_layer
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from minilora import LoRALayer, layers
from minilora.bases import dense_weight, kind_of, shape_of
from minilora.layers import LoRAFunction, keep_mask

BASES = {
    "linear": lambda: nn.Linear(12, 7),
    "no bias": lambda: nn.Linear(12, 7, bias=False),
    "conv1d": lambda: Conv1D(7, 12),
}
VARIANTS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "pissa": {"init": "pissa"}}


def layer_on(base: nn.Module, shake: bool = True, **options) -> LoRALayer:
    layer = lora_layer(base.requires_grad_(False), **({"rank": 3, "alpha": 6} | options))
    if shake:
        with torch.no_grad():
            for p in layer.parameters(recurse=False):
                p.add_(torch.randn_like(p) * 0.3)
    return layer


def run(f, layer, x, seed=1) -> list[torch.Tensor]:
    """Output, and the gradients of A, B and x."""
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    y = f(x)
    layer.zero_grad()
    (y.double() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone(), x.grad]


def fused(layer: LoRALayer, monkeypatch) -> list:
    """Counts the calls of the autograd function."""
    calls, apply = [], LoRAFunction.apply
    monkeypatch.setattr(LoRAFunction, "apply", lambda *a: calls.append(1) or apply(*a))
    return calls


# The function against the plain form


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12), (2, 1, 3, 12), (0, 12), (2, 0, 12)])
def test_function_equals_plain_form_for_every_rank_of_input(base, shape, monkeypatch):
    layer = layer_on(BASES[base]().double())
    x = torch.randn(shape, dtype=torch.float64)
    calls = fused(layer, monkeypatch)
    got = run(layer, layer, x)
    assert len(calls) == 1
    for a, b in zip(got, run(layer.plain, layer, x), strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("view", ["transposed", "expanded", "strided"])
def test_inputs_that_are_not_contiguous(view):
    layer = layer_on(nn.Linear(12, 7).double())
    x = {
        "transposed": torch.randn(5, 2, 12).transpose(0, 1),
        "expanded": torch.randn(1, 5, 12).expand(2, 5, 12),
        "strided": torch.randn(2, 5, 24)[..., ::2],
    }[view].double()
    assert torch.allclose(layer(x), layer.plain(x), rtol=1e-12)
    a, b = (torch.autograd.grad(f(x).sum(), layer.lora_A)[0] for f in (layer, layer.plain))
    assert torch.allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(base, dropout):
    layer = layer_on(BASES[base]().double(), dropout=dropout)

    def f(x, A, B):
        torch.manual_seed(5)
        return LoRAFunction.apply(x, A, B, layer.base_layer, layer.scaling, dropout)

    x = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x, layer.lora_A, layer.lora_B), nondet_tol=1e-13)  # a rounding of fp64


@pytest.mark.parametrize("asks", [(False, True, True), (True, False, True), (True, True, False), (True, False, False)])
def test_only_the_gradients_that_are_asked_for(asks):
    layer = layer_on(nn.Linear(12, 7).double())
    tensors = [torch.randn(4, 12, dtype=torch.float64), layer.lora_A, layer.lora_B]
    for t, ask in zip(tensors, asks, strict=True):
        t.requires_grad_(ask)
    layer(tensors[0]).square().sum().backward()
    got = [t.grad for t in tensors]
    assert [g is not None for g in got] == list(asks)
    for t in tensors:
        t.grad = None
    layer.plain(tensors[0]).square().sum().backward()
    assert all(g is None or torch.allclose(g, t.grad, rtol=1e-12) for g, t in zip(got, tensors, strict=True))


@pytest.mark.parametrize("asked", [False, True])
def test_input_gradient_is_computed_only_when_asked_for(asked, monkeypatch):
    layer = layer_on(Codes(nn.Linear(12, 7)))
    uses, dequantize = [], Codes.dequantize
    monkeypatch.setattr(Codes, "dequantize", lambda self: uses.append(1) or dequantize(self))
    loss = layer(torch.randn(4, 12, requires_grad=asked)).sum()
    uses.clear()
    loss.backward()
    assert len(uses) == asked  # the weight is needed for the input's gradient and for nothing else


def test_a_layer_used_twice_adds_up():
    layer = layer_on(nn.Linear(12, 12).double())
    x = torch.randn(4, 12, dtype=torch.float64)
    for a, b in zip(
        run(lambda x: layer(layer(x).tanh()), layer, x),
        run(lambda x: layer.plain(layer.plain(x).tanh()), layer, x),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-11)


def test_a_base_that_trains_gets_its_gradient():
    layer = layer_on(nn.Linear(12, 7))
    layer.base_layer.requires_grad_(True)
    layer(torch.randn(4, 12)).sum().backward()
    assert layer.base_layer.weight.grad.abs().sum() > 0


# Dropout


@pytest.mark.parametrize("base", BASES)
def test_dropout_is_the_plain_form_with_the_mask_drawn_again(base):
    layer = layer_on(BASES[base]().double(), dropout=0.3)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    got = run(layer, layer, x, seed=7)
    torch.manual_seed(7)
    mask = keep_mask(x.view(-1, 12), 0.3, int(torch.randint(2**62, ()))).view(x.shape)
    assert 0.1 < (mask == 0).double().mean() < 0.5 and set(mask.unique().tolist()) == {0.0, 1 / 0.7}
    expected = run(
        lambda x: layer.base_layer(x) + layer.scaling * (x * mask) @ layer.lora_A.T @ layer.lora_B.T, layer, x
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 0.5, 0.9, 0.999])
def test_the_mask_drops_its_share_at_random(share):
    like = torch.empty(1001, 999)
    mask = keep_mask(like, share, 3)
    dropped = (mask == 0).double()
    deviation = (share * (1 - share) / mask.numel()) ** 0.5
    assert abs(dropped.mean() - share) < 4 * deviation
    assert mask.max().item() == pytest.approx(1 / (1 - share), rel=1e-6)
    for dim in (0, 1):  # no row or column is favoured, and neighbours know nothing of each other
        lines, n = dropped.mean(dim), mask.shape[dim]
        assert (lines - share).square().mean() == pytest.approx(share * (1 - share) / n, rel=0.2)
        both = (dropped.narrow(dim, 0, n - 1) * dropped.narrow(dim, 1, n - 1)).mean()
        assert abs(both - share**2) < 6 * share * deviation + 1e-5
    assert torch.equal(mask, keep_mask(like, share, 3)) and not torch.equal(mask, keep_mask(like, share, 4))


def test_dropout_rests_in_eval_and_differs_from_call_to_call():
    layer = layer_on(nn.Linear(12, 7), dropout=0.5)
    x = torch.randn(4, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and torch.allclose(layer(x), layer.plain(x), atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing_recomputes_the_same_mask(reentrant, dropout):
    first, second = layer_on(nn.Linear(12, 12), dropout=dropout), layer_on(nn.Linear(12, 12), dropout=dropout)

    def block(x):
        return second(first(x).relu())

    x = torch.randn(6, 12)
    for a, b in zip(
        run(block, first, x), run(lambda x: checkpoint(block, x, use_reentrant=reentrant), first, x), strict=True
    ):
        assert torch.equal(a, b)


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", BASES)
def test_fp32_adapters_on_a_16_bit_base(base, dtype):
    layer = layer_on(BASES[base]().to(dtype))
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x = torch.randn(2, 5, 12).to(dtype)
    got = run(layer, layer, x)
    exact = run((wide := copy.deepcopy(layer).double()), wide, x.double())
    assert [t.dtype for t in got] == [dtype, torch.float32, torch.float32, dtype]
    for a, b in zip(got, exact, strict=True):
        assert (a.double() - b).norm() <= 0.02 * b.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_under_autocast(variant):
    layer = layer_on(nn.Linear(12, 7), **VARIANTS[variant])
    x = torch.randn(2, 5, 12)
    exact = run(layer, layer, x)

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == layer.base_layer(x).dtype == torch.bfloat16
            return layer(x)

    got = run(f, layer, x)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    for a, b in zip(got, exact, strict=True):
        assert (a.double() - b.double()).norm() <= 0.03 * b.double().norm()


# What is kept for backward


def saved_bytes(f, x: torch.Tensor, layer: nn.Module) -> int:
    """Bytes of distinct storages that autograd keeps, beyond the input and the parameters."""
    known = {t.untyped_storage()._cdata for t in (x, *layer.parameters(), *layer.buffers())}
    kept = {}

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = f(x)
    assert y.grad_fn is not None and kept
    return sum(s.nbytes() for key, s in kept.items() if key not in known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("ask", [True, False])
def test_nothing_is_saved_beyond_the_input(dtype, dropout, base, ask):
    layer = layer_on(BASES[base]().to(dtype), dropout=dropout)
    x = torch.randn(64, 12, dtype=dtype, requires_grad=ask)
    assert saved_bytes(layer, x, layer) == 0
    assert saved_bytes(layer.plain, x, layer) >= 64 * 3 * dtype.itemsize  # the control: the plain form keeps x A^T


def test_nothing_is_saved_beyond_the_input_under_autocast():
    layer = layer_on(nn.Linear(12, 7))
    x = torch.randn(64, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert saved_bytes(layer, x, layer) == 0


# torch.compile


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_takes_the_plain_form_and_agrees(variant, backend, monkeypatch):
    layer = layer_on(nn.Linear(12, 7), **VARIANTS[variant])
    x = torch.randn(5, 12)
    expected = run(layer.plain, layer, x)
    calls = fused(layer, monkeypatch)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for a, b in zip(run(compiled, layer, x), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert not calls


# Every kind of layer, every variant, equal at birth


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [*BASES, "embedding"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_equal_at_birth_bit_for_bit(variant, dtype, base, dropout):
    base = (BASES | {"embedding": lambda: nn.Embedding(30, 8, padding_idx=0)})[base]().to(dtype)
    x = torch.arange(20).view(4, 5) if kind_of(base) == "embedding" else torch.randn(4, 12, dtype=dtype)
    weight, expected = base.weight.detach().clone(), base(x)
    layer = layer_on(base, shake=False, dropout=dropout, **VARIANTS[variant])  # in training mode, dropout on
    assert torch.equal(layer(x), expected) and layer(x).dtype == dtype
    assert torch.equal(base.weight, weight) and base.weight.dtype == dtype
    assert layer.merge() == 0 and torch.equal(base.weight, weight)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", [*BASES, "embedding"])
def test_output_is_that_of_the_dense_sum(variant, base):
    """The definition written with a dense weight, in fp64: the layer, its merge and this formula are one function."""
    base = (BASES | {"embedding": lambda: nn.Embedding(30, 8)})[base]().double()
    layer = layer_on(base, **VARIANTS[variant])
    W = dense_weight(base) + layer.scaling * layer.lora_B @ layer.lora_A  # (out, in)
    if variant == "pissa":
        W = W - layer.scaling * layer.start_B @ layer.start_A
    if variant == "dora":
        W = layer.lora_magnitude[:, None] * W / W.norm(dim=1, keepdim=True)
    x = torch.arange(30) if layer.kind == "embedding" else torch.randn(9, 12, dtype=torch.float64)
    expected = (
        W.T[x] if layer.kind == "embedding" else x @ W.T + (0 if getattr(base, "bias", None) is None else base.bias)
    )
    assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(layer.merged_weight(), W, rtol=1e-10, atol=1e-12)
    layer.merge()
    assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_scaling_is_alpha_over_rank_or_its_root():
    assert LoRALayer(nn.Linear(9, 9), 4, 8).scaling == 2
    assert LoRALayer(nn.Linear(9, 9), 4, 8, use_rslora=True).scaling == 4


def test_the_start_of_a_linear():
    layer = layer_on(nn.Linear(400, 300), shake=False, rank=64)
    bound = 1 / math.sqrt(400)
    assert torch.count_nonzero(layer.lora_B) == 0
    assert layer.lora_A.abs().max() <= bound and layer.lora_A.abs().max() > 0.99 * bound
    assert abs(layer.lora_A.var() * 3 * 400 - 1) < 0.03 and abs(layer.lora_A.mean()) < 0.01 * bound
    layer(torch.randn(5, 400)).square().sum().backward()
    assert torch.count_nonzero(layer.lora_A.grad) == 0 and layer.lora_B.grad.abs().sum() > 0  # only B moves at step 0


def test_the_start_of_an_embedding_is_the_other_way_round():
    layer = layer_on(nn.Embedding(300, 200), shake=False, rank=64)
    assert torch.count_nonzero(layer.lora_A) == 0
    assert abs(layer.lora_B.var() - 1) < 0.05 and abs(layer.lora_B.mean()) < 0.03


def test_padding_row_of_an_embedding_does_not_train():
    layer = layer_on(nn.Embedding(10, 4, padding_idx=2))
    layer(torch.tensor([1, 2, 3])).sum().backward()
    assert layer.lora_A.grad[:, 2].abs().sum() == 0 and layer.lora_A.grad[:, 1].abs().sum() > 0


def test_rescaled_alpha_starts_and_rates_leave_adams_run_unchanged():
    """alpha / (pq), p A0, q B0, rates p lr and q lr: the same outputs, step after step (LoRA Without Regret, 2025)."""
    base, x, p, q = nn.Linear(12, 7).double(), torch.randn(16, 12).double(), 4.0, 0.5
    torch.manual_seed(3)
    one = layer_on(base, alpha=6)
    two = copy.deepcopy(one)
    two.scaling = one.scaling / (p * q)
    with torch.no_grad():
        two.lora_A.mul_(p), two.lora_B.mul_(q)
    runs = []
    for layer, a, b in ((one, 1, 1), (two, p, q)):
        opt = torch.optim.Adam(
            [{"params": [layer.lora_A], "lr": 1e-2 * a}, {"params": [layer.lora_B], "lr": 1e-2 * b}], eps=0
        )
        for _ in range(10):
            opt.zero_grad()
            loss = (layer(x) - 1).square().mean()
            loss.backward()
            opt.step()
        runs.append(layer(x).detach())
    assert torch.allclose(runs[0], runs[1], rtol=1e-9) and not torch.allclose(runs[0], base(x), atol=0.05)


# DoRA


@pytest.mark.parametrize("base", [*BASES, "embedding"])
def test_dora_norm_without_the_dense_sum(base):
    base = (BASES | {"embedding": lambda: nn.Embedding(30, 8)})[base]()
    layer = layer_on(base, use_dora=True)
    dense = (dense_weight(base) + layer.scaling * layer.lora_B @ layer.lora_A).double().norm(dim=1)
    assert torch.allclose(layer.row_norm().double(), dense, rtol=1e-5)


def test_dora_treats_the_norm_as_constant():
    layer = layer_on(nn.Linear(12, 7).double(), use_dora=True)
    x = torch.randn(4, 12, dtype=torch.float64)
    got = run(layer, layer, x)
    c = (layer.lora_magnitude / layer.row_norm()).detach()  # (out,)
    expected = run(
        lambda x: (
            c * (x @ layer.base_layer.weight.T + layer.scaling * x @ layer.lora_A.T @ layer.lora_B.T)
            + layer.base_layer.bias
        ),
        layer,
        x,
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10)


def test_dora_with_zero_rows_stays_finite():
    base = nn.Linear(12, 7)
    with torch.no_grad():
        base.weight[2:4] = 0
    x, expected = torch.randn(5, 12), base(torch.ones(5, 12))
    layer = layer_on(base, shake=False, use_dora=True)
    assert torch.equal(layer(torch.ones(5, 12)), expected)
    for _ in range(3):
        layer.zero_grad()
        layer(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
        with torch.no_grad():
            for p in layer.parameters(recurse=False):
                p.sub_(0.01 * p.grad)
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("change", ["in place", "swap", "data", "load", "dtype", "new parameter"])
def test_dora_notices_a_new_base_weight(change):
    layer = layer_on(nn.Linear(12, 7), use_dora=True)
    layer.row_norm()  # fills the cache
    base, new = layer.base_layer, torch.randn(7, 12) * 3
    if change == "in place":
        with torch.no_grad():
            base.weight.copy_(new)
    elif change == "data":
        base.weight.data = new
    elif change == "load":
        base.load_state_dict({"weight": new, "bias": torch.zeros(7)})
    elif change == "swap":
        layer.base_layer = nn.Linear(12, 7)
    elif change == "dtype":
        layer.base_layer.to(torch.float16)
    else:
        base.weight = nn.Parameter(new)
    dense = (layer.base_layer.weight.double() + layer.scaling * (layer.lora_B @ layer.lora_A).double()).norm(dim=1)
    assert torch.allclose(layer.row_norm().double(), dense, rtol=1e-5)


def test_dora_takes_the_square_of_the_weight_once(monkeypatch):
    layer = layer_on(nn.Linear(12, 7), use_dora=True)
    x = torch.randn(3, 12)
    layer(x)
    kept = layer._square[1]
    layer(x)
    assert layer._square[1] is kept


# PiSSA


@pytest.mark.parametrize("base", [*BASES, "embedding"])
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_from_the_leading_singular_part(base, rslora):
    base = (BASES | {"embedding": lambda: nn.Embedding(30, 8)})[base]()
    layer = layer_on(base, shake=False, init="pissa", use_rslora=rslora)
    W = dense_weight(base).double()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    top = U[:, :3] * S[:3] @ Vh[:3]
    assert torch.allclose(layer.scaling * (layer.lora_B @ layer.lora_A).double(), top, atol=1e-5)
    assert torch.allclose(layer.lora_A.norm(), layer.lora_B.norm(), rtol=1e-4)  # balanced


def test_pissa_becomes_a_plain_adapter_of_twice_the_rank():
    for rslora in (False, True):
        layer = layer_on(nn.Linear(12, 7).double(), init="pissa", use_rslora=rslora)
        A, B, alpha = layer.plain_form()
        plain = LoRALayer(layer.base_layer, 6, alpha, use_rslora=rslora)
        with torch.no_grad():
            plain.lora_A.copy_(A), plain.lora_B.copy_(B)
        x = torch.randn(4, 12, dtype=torch.float64)
        assert A.shape == (6, 12) and B.shape == (7, 6) and torch.allclose(plain(x), layer(x), rtol=1e-12)


# What can be adapted


def test_kinds_and_shapes():
    assert [kind_of(m) for m in (nn.Linear(3, 2), nn.Embedding(5, 4), Conv1D(2, 3))] == [
        "linear",
        "embedding",
        "conv1d",
    ]
    assert [shape_of(m) for m in (nn.Linear(3, 2), nn.Embedding(5, 4), Conv1D(2, 3))] == [(2, 3), (4, 5), (2, 3)]


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Plain(nn.Linear):
    """A subclass that computes what its parent does."""


class Lookalike(nn.Module):
    nf = 3


Lookalike.__name__ = "Conv1D"


@pytest.mark.parametrize(
    "module",
    [
        Doubling(3, 3),
        nn.LayerNorm(3),
        nn.Conv1d(3, 3, 1),
        nn.Bilinear(2, 2, 2),
        nn.EmbeddingBag(3, 3),
        Lookalike(),
        nn.Embedding(5, 4, max_norm=1.0),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        nn.Identity(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_layers_that_do_something_else_are_refused(module):
    assert kind_of(module) is None
    with pytest.raises(
        ValueError, match=f"a {type(module).__name__} cannot be adapted: expected Linear, Conv1D, Embedding or Conv2d"
    ):
        LoRALayer(module, 1)


def test_a_subclass_with_its_parents_forward_is_adapted():
    assert kind_of(Plain(3, 3)) == "linear"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_quantised_base(variant):
    layer = layer_on(Codes(nn.Linear(12, 7)), **VARIANTS[variant])
    assert layer.lora_A.dtype == torch.float32
    x = torch.randn(4, 12)
    for a, b in zip(run(layer, layer, x), run(layer.plain, layer, x), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert variant in ("dora", "pissa") or saved_bytes(layer, x, layer) == 0
    with pytest.raises(ValueError, match="cannot merge into a quantised weight.*dequantise the base first"):
        layer.merge()
    assert not layer.merged


# Merging one layer


def test_merge_refuses_what_does_not_fit_and_leaves_the_layer():
    layer = layer_on(nn.Linear(12, 7).half())
    with torch.no_grad():
        layer.lora_B.fill_(1e6)
    weight = layer.base_layer.weight
    with pytest.raises(ValueError, match="does not fit torch.float16"):
        layer.merge()
    assert layer.base_layer.weight is weight and not layer.merged


def test_merging_twice_is_merging_once():
    layer = layer_on(nn.Linear(12, 7).bfloat16())
    share = layer.merge()
    once = layer.base_layer.weight
    assert layer.merge() == share > 0 and layer.base_layer.weight is once
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged


@pytest.mark.parametrize("merged", [False, True])
def test_moving_to_another_dtype(merged):
    layer, tied = layer_on(nn.Linear(12, 7)), nn.Module()
    tied.weight = layer.base_layer.weight
    model, x = nn.ModuleList([tied, layer]), torch.randn(3, 12)
    expected = layer(x)
    if merged:
        layer.merge()
    model.double()
    layer.unmerge()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.allclose(layer(x.double()).float(), expected, atol=1e-5)
    assert layer.base_layer.weight is tied.weight  # still tied


# A LoRA layer is a module like any other


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_round_trip(variant):
    one, two = (layer_on(nn.Linear(12, 7), dropout=0.1, **VARIANTS[variant]).eval() for _ in range(2))
    x = torch.randn(3, 12)
    assert not torch.allclose(one(x), two(x))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("merged", [False, True])
def test_deep_copy_stands_alone(variant, merged):
    layer = layer_on(nn.Linear(12, 7), **VARIANTS[variant])
    x = torch.randn(3, 12)
    layer(x)
    if merged:
        layer.merge()
    twin, before = copy.deepcopy(layer), layer(x)
    with torch.no_grad():
        twin.unmerge()
        twin.lora_B.add_(1), twin.base_layer.weight.add_(1)
    assert torch.equal(layer(x), before) and not torch.allclose(twin(x), before)
    layer.unmerge()
    assert torch.allclose(layer(x), before, atol=1e-5)


def test_a_layer_answers_for_its_base():
    layer = LoRALayer(nn.Linear(12, 7))
    assert (layer.in_features, layer.out_features) == (12, 7) and layer.weight is layer.base_layer.weight
    assert "rank=8, scaling=2" in repr(layer)
    with pytest.raises(AttributeError, match="no_such_name"):
        layer.no_such_name()


def test_values_are_checked():
    for bad in ({"rank": 0}, {"alpha": math.nan}, {"dropout": 1.0}):
        with pytest.raises(ValueError):
            LoRALayer(nn.Linear(12, 7), **bad)
    assert layers.scaling(4, 8) == 2
