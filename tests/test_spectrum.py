"""The spectrum against dense fp64 algebra, closed forms over many seeds, and what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilora.spectrum import (
    amplification,
    effective_rank,
    energy,
    extract_lora,
    intruder_dimensions,
    principal_angles,
    product_norm,
    product_row_norms,
    product_svd,
    product_svdvals,
    rank_for_energy,
    stable_rank,
    subspace_similarity,
    truncate,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def factors(out: int, rank: int, inp: int, dtype=torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(out, rank, dtype=torch.float64, generator=g).to(dtype),
            torch.randn(rank, inp, dtype=torch.float64, generator=g).to(dtype))


def basis(d: int, r: int, seed: int) -> Tensor:
    """Orthonormal columns of a random subspace, (d, r)."""
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, r, dtype=torch.float64, generator=g))[0]


def far(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


# product_svd


def deficient(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    B, A = B.clone(), A.clone()
    B[:, 3], B[:, 5], A[2] = B[:, 1], 0, 0
    return B, A


WIDE = torch.logspace(-15, 15, 8, dtype=torch.float64)
LOUD_FIRST = torch.tensor([1e25] + [1e-25] * 7, dtype=torch.float64)[:, None]
CASES = {
    "square": lambda B, A: (B, A, 1.0),
    "scaled": lambda B, A: (B, A, -2.5),
    "scale of zero": lambda B, A: (B, A, 0.0),
    "tiny B": lambda B, A: (B * 1e-20, A, 1.0),
    "huge A": lambda B, A: (B, A * 1e20, 1.0),
    "tiny B, huge A": lambda B, A: (B * 1e-20, A * 1e20, 1.0),
    "huge B, tiny A": lambda B, A: (B * 1e20, A * 1e-20, 3.0),
    "huge both, tiny scale": lambda B, A: (B * 1e20, A * 1e20, 1e-25),
    "opposite scales": lambda B, A: (B * WIDE.to(B), A / WIDE.to(A)[:, None], 1.0),
    "scales that add up": lambda B, A: (B * WIDE.to(B), A * WIDE.to(A)[:, None], 1.0),
    "a zero beside tiny ones": lambda B, A: (B * 1e-25 * (torch.arange(8) > 0), A * LOUD_FIRST.to(A), 1e40),
    "rank-deficient": lambda B, A: (*deficient(B, A), 1.0),
    "rank one, eight times": lambda B, A: (B[:, :1].expand(-1, 8), A[:1].expand(8, -1), 1.0),
    "cancelling": lambda B, A: (torch.cat((B[:, :4], -B[:, :4]), 1), torch.cat((A[:4], A[:4])), 1.0),
    "zero B": lambda B, A: (B * 0, A, 1.0),
    "zero both": lambda B, A: (B * 0, A * 0, 1.0),
}
SHAPES = {"square": (40, 40), "tall": (300, 9), "flat": (8, 200), "below the rank": (5, 60), "a column": (50, 1)}


def check(B: Tensor, A: Tensor, scale: float) -> None:
    """Singular values, product and orthonormality against dense fp64, relative to the largest value and to the sum of
    the products' sizes, which is what rounding is relative to where they cancel."""
    U, S, Vh = product_svd(B, A, scale)
    product = scale * B.double() @ A.double()
    size = abs(scale) * float(B.double().norm(dim=0) @ A.double().norm(dim=1))
    k, tolerance = min(B.shape[1], B.shape[0], A.shape[1]), TOLERANCE[S.dtype]
    assert S.dtype == U.dtype == Vh.dtype == B.dtype and len(S) == k == U.shape[1] == Vh.shape[0]
    assert (S >= 0).all() and (S[1:] <= S[:-1]).all()
    assert far(S, torch.linalg.svdvals(product)[:k]) <= tolerance * size
    assert float(((U.double() * S.double()) @ Vh.double() - product).norm()) <= tolerance * size
    eye = torch.eye(k)
    assert far(U.T @ U, eye) <= tolerance and far(Vh @ Vh.T, eye) <= tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_product_svd_is_the_dense_one(case, shape, dtype):
    out, inp = SHAPES[shape]
    check(*CASES[case](*factors(out, 8, inp, dtype)))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", [c for c in CASES if c not in ("cancelling", "zero B", "zero both", "scale of zero")])
def test_singular_values_are_right_relative_to_the_largest(case, dtype):
    for seed in range(10):
        B, A, scale = CASES[case](*factors(30, 8, 50, dtype, seed))
        dense = torch.linalg.svdvals(scale * B.double() @ A.double())[:8]
        assert far(product_svd(B, A, scale)[1] / dense[0], dense / dense[0]) <= TOLERANCE[dtype]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 30), st.integers(0, 9999),
       st.sampled_from(list(TOLERANCE)), st.lists(st.integers(-20, 20), min_size=24, max_size=24))
def test_product_svd_of_any_shape_and_scale(out, rank, inp, seed, dtype, exponents):
    B, A = factors(out, rank, inp, torch.float64, seed)
    powers = 10.0 ** torch.tensor(exponents, dtype=torch.float64)
    B, A = B * powers[:rank], A * powers[12 : 12 + rank, None]
    while (B.norm(dim=0) @ A.norm(dim=1)) > 1e36:  # fp32 ends at 3e38
        B = B / 1e10
    check(B.to(dtype), A.to(dtype), 1.0)


def test_a_direction_survives_beside_one_1e20_times_as_loud_in_each_factor():
    # b1 a1 and b2 a2 weigh the same in the product, though their columns differ by 1e20 in B and in A
    B, A = factors(30, 2, 30, torch.float32)
    c = torch.tensor([1e-20, 1e20])
    assert far(product_svd(B * c, A / c[:, None])[1], torch.linalg.svdvals(B.double() @ A.double())[:2]) < 1e-4


def test_the_product_is_never_formed():
    d = 400_000  # 640 GB as a matrix
    B, A = torch.ones(d, 1), torch.ones(1, d)
    U, S, Vh = product_svd(B, A, 0.5)
    assert far(S, torch.tensor([0.5 * d])) <= 1e-5 * d and U.shape == (d, 1) and Vh.shape == (1, d)
    assert product_norm(B, A, 0.5) == pytest.approx(0.5 * d, rel=1e-5)
    assert far(product_row_norms(B, A)[:3], torch.full((3,), math.sqrt(d))) < 1e-2


def test_between_overflow_and_underflow():
    huge = torch.full((3, 1), 1e300, dtype=torch.float64)
    assert far(product_svd(huge, huge.T, 1e-300)[1] / 3e300, torch.ones(1)) < 1e-12  # 1e600 would be infinite
    large = torch.tensor([[1.5e19]])  # 2.25e38 is in fp32's range, 2^128 is not
    assert far(product_svd(large, large)[1] / 2.25e38, torch.ones(1)) < 1e-5
    tiny = torch.full((3, 1), 1e-44)  # denormal in fp32
    assert far(product_svd(tiny, torch.full((1, 2), 1e38))[1] * 1e6, tiny[:1, 0].double() * 1e44 * math.sqrt(6)) < 1e-4
    assert product_svd(tiny, tiny.T)[1].tolist() == [0.0]  # 1e-88: below what fp32 can say
    square = 6 * float(tiny[0]) ** 2 * 1e20  # fp32 squares would be zero
    assert product_norm(tiny, torch.full((1, 2), 1e10)) == pytest.approx(math.sqrt(square), rel=1e-5)
    with pytest.raises(ValueError, match="overflows torch.float64.*smaller scale"):
        product_svd(huge, huge.T)


def test_dtypes_and_gradients():
    B, A = factors(12, 3, 10)
    half = product_svd(B.bfloat16(), A.half())
    assert {t.dtype for t in half} == {torch.float32}
    assert far(half[1], torch.linalg.svdvals(B.bfloat16().double() @ A.half().double())[:3]) < 1e-4
    assert product_svd(B.float(), A)[1].dtype == torch.float64
    for p in product_svd(torch.nn.Parameter(B), torch.nn.Parameter(A)):
        assert not p.requires_grad


@pytest.mark.parametrize("case", CASES)
def test_norms_and_values_alone(case):
    B, A, scale = CASES[case](*factors(40, 8, 30))
    product, S = scale * B @ A, product_svd(B, A, scale)[1]
    size = abs(scale) * float(B.norm(dim=0) @ A.norm(dim=1)) * 1e-13
    assert far(product_svdvals(B, A, scale), S) <= size
    assert abs(product_norm(B, A, scale) - float(product.norm())) <= size
    assert far(product_row_norms(B, A, scale), product.norm(dim=1)) <= size


def test_row_norms_keep_the_digits_that_the_gram_form_loses():
    a = torch.randn(1, 200, dtype=torch.float64)
    A, B = torch.cat((a, a * (1 + 1e-9))), torch.tensor([[1.0, -1.0]], dtype=torch.float64)  # 1e-9 is left of a
    true = float((B @ A).norm())
    assert product_row_norms(B, A).item() == pytest.approx(true, rel=1e-5)
    gram = ((B @ (A @ A.T)) * B).sum().clamp_min(0).sqrt().item()
    assert abs(gram / true - 1) > 0.1  # the control: with it the test above would fail


# How many directions


def test_a_flat_spectrum_has_all_its_directions():
    for k in (1, 2, 7, 64):
        S = torch.full((k,), 3e-30)  # squares that fp32 cannot hold
        assert far(energy(S), torch.arange(1, k + 1) / k) < 1e-6
        assert stable_rank(S) == pytest.approx(k, rel=1e-5) and effective_rank(S) == pytest.approx(k, rel=1e-5)
        assert rank_for_energy(S, 0.45) == math.ceil(0.45 * k) and rank_for_energy(S, 1) == k


def test_a_single_direction_counts_once():
    S = torch.tensor([5.0, 0, 0])
    assert (stable_rank(S), effective_rank(S), rank_for_energy(S), rank_for_energy(S, 1)) == (1, 1, 1, 1)


def test_figures_of_a_known_spectrum():
    S = torch.tensor([4.0, 2, 2, 1], dtype=torch.float64)  # squares 16 4 4 1 of 25, shares of the sum 4 2 2 1 of 9
    assert far(energy(S), torch.tensor([16, 20, 24, 25]) / 25) < 1e-7
    assert stable_rank(S) == pytest.approx(25 / 16)
    assert effective_rank(S) == pytest.approx(math.exp(-sum(p / 9 * math.log(p / 9) for p in (4, 2, 2, 1))))
    assert [rank_for_energy(S, share) for share in (0.5, 0.64, 0.65, 0.8, 0.9, 0.97, 1)] == [1, 1, 2, 2, 3, 4, 4]


def test_a_zero_update_has_no_directions():
    S = torch.zeros(3)
    assert energy(S).tolist() == [1, 1, 1]
    assert (stable_rank(S), effective_rank(S), rank_for_energy(S)) == (0, 0, 0)


# Which directions


def test_subspace_similarity_is_the_papers_formula():
    U1, U2 = basis(20, 5, 1), basis(20, 7, 2)
    phi = subspace_similarity(U1, U2)
    for i in range(1, 6):
        for j in range(1, 8):
            paper = (U1[:, :i].T @ U2[:, :j]).norm() ** 2 / min(i, j)
            assert phi[i - 1, j - 1].item() == pytest.approx(paper.item(), abs=1e-12)
    assert far(subspace_similarity(U1, U1).diagonal(), torch.ones(5)) < 1e-12
    whole = basis(20, 20, 3)
    assert far(subspace_similarity(U1, whole)[:, -1], torch.ones(5)) < 1e-12
    assert far(subspace_similarity(whole[:, :5], whole[:, 5:]), torch.zeros(5, 15)) < 1e-12


def test_random_subspaces_have_the_closed_form():
    """E[phi(i, j)] = max(i, j) / d: every cell's mean over the seeds within 4 standard errors."""
    d, seeds = 32, 400
    phi = torch.stack([subspace_similarity(basis(d, 6, 2 * s), basis(d, 9, 2 * s + 1)) for s in range(seeds)])
    i, j = torch.arange(1, 7)[:, None], torch.arange(1, 10)
    error = (phi.mean(0) - torch.maximum(i, j) / d) / (phi.std(0) / math.sqrt(seeds))
    assert error.abs().max() < 4
    wrong = (phi.mean(0) - torch.minimum(i, j) / d) / (phi.std(0) / math.sqrt(seeds))
    assert wrong.abs().max() > 40  # the control: the test tells the forms apart


@pytest.mark.parametrize("angles", [[0.3, 1.0], [1e-9, 0.5], [0.0, math.pi / 2], [1e-12, math.pi / 2 - 1e-12]])
def test_principal_angles_of_a_known_rotation(angles):
    Q = basis(12, 12, 0)
    U1 = Q[:, :2]
    U2 = torch.stack([math.cos(t) * Q[:, i] + math.sin(t) * Q[:, i + 2] for i, t in enumerate(angles)], dim=1)
    turned = U2 @ basis(2, 2, 5)  # the same subspace
    for a, b in ((U1, turned), (turned, U1), (Q[:, [0, 1, 6, 7]], turned), (turned, Q[:, [0, 1, 6, 7]])):
        assert far(principal_angles(a, b), torch.tensor(angles, dtype=torch.float64)) < 1e-14


# Amplification


def test_random_amplification_has_the_closed_form():
    """The root mean square of ||U^T W V||_F over random subspaces is r / sqrt(out in) ||W||_F, for a square W the
    paper's r / d: the mean square over the seeds within 4 standard errors."""
    for out, inp, r in ((24, 24, 4), (16, 40, 4), (24, 24, 24)):
        W = factors(out, 5, inp)[0] @ factors(out, 5, inp)[1]  # far from random: the form holds for any W
        squares = torch.stack([(basis(out, r, 2 * s).T @ W @ basis(inp, r, 2 * s + 1)).norm() ** 2 for s in range(500)])
        closed = amplification(W, *product_svd(*factors(out, r, inp, seed=9))).random
        assert closed == pytest.approx(r / math.sqrt(out * inp) * float(W.norm()))
        error = float(squares.std()) / math.sqrt(500) + 1e-9 * closed**2
        assert abs(float(squares.mean()) - closed**2) < 4 * error
    assert 4 / 12288 * 61.95 == pytest.approx(0.02, abs=5e-4)  # Table 7: layer 48 of GPT-3, r = 4


def test_amplification_along_known_directions():
    U, V = basis(20, 20, 1), basis(30, 20, 2)
    S = torch.arange(20, 0, -1, dtype=torch.float64)
    W = U * S @ V.T
    for take in ([0, 1, 2], [17, 18, 19], [3, 9]):
        got = amplification(W, U[:, take], torch.tensor([6.0, 3, 2][:len(take)], dtype=torch.float64), V[:, take].T)
        assert got.along_update == pytest.approx(float(S[take].norm()))
        assert got.along_own == pytest.approx(float(S[:len(take)].norm()))
        assert got.update == pytest.approx(math.sqrt(sum(x * x for x in [6, 3, 2][:len(take)])))
        assert got.factor == pytest.approx(got.update / got.along_update)
    for shape in ((30, 12), (12, 30)):
        W = torch.randn(shape, dtype=torch.float64)
        B, A = factors(shape[0], 4, shape[1])
        got, two = amplification(W, *product_svd(B, A, 0.5)), amplification(W, *product_svd(B, A, 0.5), rank=2)
        assert got.update == two.update == pytest.approx(product_norm(B, A, 0.5))
        assert two.along_update <= got.along_update <= got.along_own and two.random == pytest.approx(got.random / 2)
        dense = amplification(W, *torch.linalg.svd(0.5 * B @ A, full_matrices=False), rank=4)
        assert dense == pytest.approx(got)


# Intruder dimensions


def test_intruders_are_the_planted_ones():
    for seed in range(5):
        d = 96
        g = torch.Generator().manual_seed(seed)
        W0 = torch.randn(d, d, dtype=torch.float64, generator=g) / math.sqrt(d)  # singular values up to 2
        assert intruder_dimensions(W0, W0).count == 0
        assert far(intruder_dimensions(W0, 3 * W0).cosines, torch.ones(10)) < 1e-6
        spikes = basis(d, 3, seed + 50) * 20 @ basis(d, 3, seed + 90).T
        found = intruder_dimensions(W0, W0 + spikes)
        assert found.count == 3 and (found.cosines[:3] < 0.5).all()
        # louder along a direction that W0 has: none
        U, S, Vh = torch.linalg.svd(W0)
        assert intruder_dimensions(W0, W0 + 20 * U[:, 5:6] @ Vh[5:6], k=1).count == 0


def test_random_directions_are_the_control():
    for seed in range(20):
        W0 = torch.randn(200, 120, generator=torch.Generator().manual_seed(seed))
        assert (intruder_dimensions(W0, W0, seed=seed).control < 0.5).all()
    W0 = torch.randn(30, 30)
    first, again, other = (intruder_dimensions(W0, W0, seed=s).control for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


# Lower ranks


def test_truncation_is_eckart_youngs():
    B, A = factors(30, 8, 20)
    product = -0.7 * B @ A
    S = torch.linalg.svdvals(product)
    for rank in range(1, 9):
        cut = truncate(B, A, -0.7, rank=rank)
        assert cut.B.shape == (30, rank) and cut.A.shape == (rank, 20)
        assert cut.error == pytest.approx(float(S[rank:].norm() / S.norm()), abs=1e-12)
        assert float((cut.B @ cut.A - product).norm() / product.norm()) == pytest.approx(cut.error, abs=1e-12)
        assert cut.norm == pytest.approx(float(product.norm()))
        assert far(cut.B.norm(dim=0), cut.A.norm(dim=1)) < 1e-10  # shared evenly
        for seed in range(20):  # no other of that rank is nearer, least squares on a subspace near the best included
            near = cut.A + 0.05 * torch.randn(cut.A.shape, dtype=torch.float64)
            other = torch.linalg.lstsq(near.T, product.T).solution.T @ near
            assert float((other - product).norm() / product.norm()) >= cut.error - 1e-12
    assert truncate(B, A, rank=8).error < 1e-14


def test_truncation_to_a_share_takes_the_fewest_directions():
    B, A = factors(40, 10, 40)
    for share in (0.3, 0.5, 0.9, 0.99, 1.0):
        cut = truncate(B, A, energy=share)
        assert 1 - cut.error**2 >= share - 1e-12
        assert len(cut.A) == 1 or 1 - truncate(B, A, rank=len(cut.A) - 1).error ** 2 < share
    zero = truncate(B * 0, A, energy=0.9)
    assert zero.A.shape == (1, 40) and zero.error == zero.norm == 0 and not (zero.B @ zero.A).any()


def test_extraction_finds_what_was_planted():
    B, A = factors(30, 4, 50)
    delta = B @ A
    got = extract_lora(delta, rank=4)
    assert far(got.B @ got.A, delta) < 1e-12 and got.error < 1e-12
    assert len(extract_lora(delta, energy=1 - 1e-9).A) == 4
    noisy = delta + 0.3 * torch.randn(30, 50, dtype=torch.float64)
    S = torch.linalg.svdvals(noisy)
    for rank in (1, 4, 30):
        got = extract_lora(noisy, rank=rank)
        assert got.error == pytest.approx(float(S[rank:].norm() / S.norm()), abs=1e-12)
        assert float((got.B @ got.A - noisy).norm() / noisy.norm()) == pytest.approx(got.error, abs=1e-12)
    half = extract_lora(noisy.bfloat16(), rank=4)
    assert half.A.dtype == torch.float32
    assert not extract_lora(torch.nn.Parameter(noisy), rank=2).B.requires_grad


# What is refused


def spoilt(value: float) -> Tensor:
    x = torch.ones(4, 3)
    x[1, 2] = value
    return x


ONES, U43 = torch.ones(4, 3), basis(4, 3, 0)
BAD = {
    "inner sizes": (lambda: product_svd(torch.ones(4, 3), torch.ones(2, 5)), r"\(out, r\).*\(4, 3\) and \(2, 5\)"),
    "swapped": (lambda: product_svd(torch.ones(3, 9), torch.ones(5, 3)), "the other way round they fit"),
    "a vector": (lambda: product_svd(torch.ones(4), torch.ones(1, 4)), r"\(4,\) and \(1, 4\)"),
    "rank 0": (lambda: product_svd(torch.ones(4, 0), torch.ones(0, 4)), r"\(4, 0\) and \(0, 4\)"),
    "NaN in B": (lambda: product_svd(spoilt(math.nan), torch.ones(3, 5)), "B holds NaN or infinite"),
    "infinity in A": (lambda: product_svd(torch.ones(5, 4), spoilt(-math.inf)), "A holds NaN or infinite"),
    "NaN in row norms": (lambda: product_row_norms(spoilt(math.nan), torch.ones(3, 5)), "B holds NaN"),
    "NaN in values": (lambda: product_svdvals(spoilt(math.nan), torch.ones(3, 5)), "B holds NaN"),
    "scale": (lambda: product_norm(ONES, ONES.T, math.inf), "scale must be finite, got inf"),
    "integers": (lambda: product_svd(ONES.long(), ONES.T), "B must be a matrix of floating-point numbers.*int64"),
    "complex": (lambda: product_svd(ONES.to(torch.complex64), ONES.T), "floating-point numbers.*complex64"),
    "overflow": (lambda: product_svd(ONES * 1e30, ONES.T * 1e30), "overflows torch.float32"),
    "energy of a matrix": (lambda: energy(ONES), r"singular values \(k,\), got \(4, 3\)"),
    "energy of none": (lambda: rank_for_energy(torch.ones(0)), r"got \(0,\)"),
    "unsorted": (lambda: effective_rank(torch.tensor([1.0, 2.0])), "largest first"),
    "negative": (lambda: stable_rank(torch.tensor([1.0, -2.0])), "not negative"),
    "NaN values": (lambda: stable_rank(torch.tensor([1.0, math.nan])), "finite"),
    "share 0": (lambda: rank_for_energy(torch.ones(3), 0), r"in \(0, 1\], got 0"),
    "share in percent": (lambda: rank_for_energy(torch.ones(3), 90), "got 90"),
    "share NaN": (lambda: rank_for_energy(torch.ones(3), math.nan), "got nan"),
    "not orthonormal": (lambda: subspace_similarity(U43, ONES), "basis 2.*orthonormal columns.*torch.linalg.qr"),
    "rows, not columns": (lambda: subspace_similarity(U43.T, U43.T), r"basis 1 of shape \(3, 4\).*U or Vh.T"),
    "lengths": (lambda: principal_angles(U43, basis(5, 3, 0)), r"one length, got shapes \(4, 3\) and \(5, 3\)"),
    "NaN basis": (lambda: principal_angles(U43, spoilt(math.nan)), "basis 2 holds NaN"),
    "W of another shape": (lambda: amplification(torch.ones(5, 5), *product_svd(ONES, ONES.T)), "does not fit W"),
    "rank above k": (lambda: amplification(ONES @ ONES.T, *product_svd(ONES, ONES.T), rank=4), "from 1 to 3 .*got 4"),
    "zero update": (lambda: amplification(torch.ones(4, 4), *product_svd(ONES * 0, ONES.T)), "update is zero"),
    "W0 and W": (lambda: intruder_dimensions(ONES, ONES.T), r"one shape, got \(4, 3\) and \(3, 4\)"),
    "k": (lambda: intruder_dimensions(ONES, ONES), "k must be an integer from 1 to 3 here, got 10"),
    "truncate up": (lambda: truncate(ONES, ONES.T, rank=4), "from 1 to 3 here, got 4"),
    "rank half": (lambda: truncate(ONES, ONES.T, rank=1.5), "got 1.5"),
    "rank of zero": (lambda: extract_lora(ONES, rank=0), "got 0"),
    "rank above": (lambda: extract_lora(ONES, rank=4), "from 1 to 3 here, got 4"),
    "neither": (lambda: extract_lora(ONES), "either a rank or a share"),
    "both": (lambda: truncate(ONES, ONES.T, rank=1, energy=0.9), "either a rank or a share.*rank=1 and energy=0.9"),
    "infinite delta": (lambda: extract_lora(spoilt(math.inf), rank=1), "delta holds NaN or infinite"),
    "three axes": (lambda: extract_lora(torch.ones(2, 3, 4), rank=1), r"delta must be a matrix.*\(2, 3, 4\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_refusals(what):
    call, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        call()
