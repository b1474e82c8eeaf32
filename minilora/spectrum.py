"""What a low-rank update is made of: singular values and directions, on plain tensors, on any device.

A weight is (out, in) and an update is ``scale * B @ A`` with B (out, r) and A (r, in), as everywhere in this package.
The product is never formed. Everything is computed and returned in the dtype given, 16-bit tensors in fp32.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


@torch.no_grad()
def product_svd(B: Tensor, A: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of ``scale * B @ A`` from a QR of each factor: O((out + in) r^2), not O(d^3).

    With B = Q_B R_B and A^T = Q_A R_A the product is Q_B (R_B R_A^T) Q_A^T, and the (r, r) core in the middle has its
    singular values: the R-SVD of Chan (1982), from both sides.

    Args:
        B: (out, r). A: (r, in).

    Returns:
        U (out, k), S (k,) largest first, Vh (k, in) with k = min(r, out, in), so that ``U @ diag(S) @ Vh`` is the
        product. U and Vh are orthonormal even where S is zero; signs are arbitrary.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite values, or singular values that overflow the dtype.
    """
    B, A, weights, exponent = balanced(B, A, scale)
    Q_B, R_B = torch.linalg.qr(B)  # (out, r), (r, r); narrower where r > out
    Q_A, R_A = torch.linalg.qr(A.T)  # (in, r), (r, r)
    U, S, Vh = torch.linalg.svd((R_B * weights) @ R_A.T, full_matrices=False)
    return Q_B @ U, unscaled(S, exponent), Vh @ Q_A.T


@torch.no_grad()
def product_svdvals(B: Tensor, A: Tensor, scale: float = 1.0) -> Tensor:
    """The singular values alone, (min(r, out, in),), in a third of the time. Raises as `product_svd`.

    Takes many updates of one shape at once too: B (..., out, r) and A (..., r, in) give (..., min(r, out, in)).
    """
    B, A, weights, exponent = balanced(B, A, scale)
    R_B, R_A = torch.linalg.qr(B, mode="r")[1], torch.linalg.qr(A.mT, mode="r")[1]  # (..., r, r) each
    return unscaled(torch.linalg.svdvals((R_B * weights[..., None, :]) @ R_A.mT), exponent)


def product_norm(B: Tensor, A: Tensor, scale: float = 1.0) -> float:
    """``||scale * B @ A||_F``. Raises as `product_svd`."""
    return float(frobenius(product_svdvals(B, A, scale)))


@torch.no_grad()
def product_row_norms(B: Tensor, A: Tensor, scale: float = 1.0) -> Tensor:
    """The length of each row of ``scale * B @ A``, (out,): that of B R_A^T, for A^T = Q_A R_A. Raises as `product_svd`.

    The Gram form ||b A||^2 = b (A A^T) b^T costs less, but squares the error: half the digits of a row that cancels.
    """
    B, A, weights, exponent = balanced(B, A, scale)
    R_A = torch.linalg.qr(A.T, mode="r")[1]  # (r, r)
    return unscaled(((B * weights) @ R_A.T).norm(dim=1), exponent)


def balanced(B: Tensor, A: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``scale * B @ A``, one or many, as 2^exponent (B' * weights) @ A', where the largest entry of each column of B'
    and of each row of A' is 1 and the largest weight is about 1. On these no step overflows, and a direction whose
    factors are 1e-20 and 1e20 keeps all its digits.

    Returns:
        B' (..., out, r), A' (..., r, in), weights (..., r), exponent (..., 1) of whole value.
    """
    if B.dim() < 2 or A.shape[:-2] != B.shape[:-2] or A.shape[-2] != B.shape[-1] or not B.numel() or not A.numel():
        swapped = B.dim() == A.dim() == 2 and A.shape[1] == B.shape[0]
        raise ValueError(f"expected B (out, r) and A (r, in), got {tuple(B.shape)} and {tuple(A.shape)}"
                         + "; the other way round they fit" * swapped)
    B, A = (matrix(name, X.flatten(0, -2)).view_as(X) for name, X in (("B", B), ("A", A)))
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    dtype = torch.promote_types(B.dtype, A.dtype)
    B, A = B.to(dtype), A.to(dtype)
    b, a = B.abs().amax(-2), A.abs().amax(-1)  # (..., r)
    (mb, eb), (ma, ea), (ms, es) = torch.frexp(b), torch.frexp(a), math.frexp(scale)
    weights = mb * ma * ms
    exponents = (eb + ea + es).masked_fill(weights == 0, -(2**14))  # below all others: a zero sets no scale
    exponent = exponents.amax(-1, keepdim=True)
    weights *= (exponents - exponent).to(dtype).exp2()
    return B / b.masked_fill(b == 0, 1)[..., None, :], A / a.masked_fill(a == 0, 1)[..., None], weights, exponent


def unscaled(x: Tensor, exponent: Tensor) -> Tensor:
    """x 2^exponent, in two steps that overflow only if the result does."""
    half = exponent // 2
    x = x * half.to(x.dtype).exp2() * (exponent - half).to(x.dtype).exp2()
    if not x.isfinite().all():
        raise ValueError(f"the product overflows {x.dtype}: pass wider factors or a smaller scale")
    return x


def matrix(name: str, W: Tensor) -> Tensor:
    """W, at least fp32, or a ValueError that says why it is no finite matrix."""
    if W.dim() != 2 or not W.is_floating_point() or not W.numel():
        raise ValueError(f"{name} must be a matrix of floating-point numbers, got {tuple(W.shape)} of {W.dtype}")
    if not all(map(torch.isfinite, W.aminmax())):  # one pass, and NaN comes through
        raise ValueError(f"{name} holds NaN or infinite values")
    return W.detach().to(torch.promote_types(W.dtype, torch.float32))


# How many directions a spectrum has


def energy(S: Tensor, stacked: bool = False) -> Tensor:
    """The share of ||dW||_F^2 in the first 1, 2, ... directions, (k,); ones for a zero update.

    Args:
        S: (k,) singular values, largest first; here and in the functions below.
        stacked: S is (n, k), n spectra at once, and the result has a leading n too: a tensor (n,) for a number.

    Raises:
        ValueError: S is no such list.
    """
    e = relative(S, stacked).square().cumsum(-1)  # (..., k)
    return torch.where(e[..., -1:] > 0, e / e[..., -1:], 1.0)


def rank_for_energy(S: Tensor, share: float = 0.9, stacked: bool = False) -> int | Tensor:
    """The fewest directions that hold `share`, in (0, 1], of the energy; 0 for a zero update. Raises as `energy`."""
    if not 0 < share <= 1:
        raise ValueError(f"a share of the energy must be in (0, 1], got {share}")
    counts = ((energy(S, stacked) < share).sum(-1) + 1) * (S[..., 0] > 0)
    return counts if stacked else int(counts)


def stable_rank(S: Tensor, stacked: bool = False) -> float | Tensor:
    """||dW||_F^2 / ||dW||_2^2 (Rudelson and Vershynin 2007): 1 to k, 0 for a zero update. Raises as `energy`."""
    return number(relative(S, stacked).square().sum(-1))


def effective_rank(S: Tensor, stacked: bool = False) -> float | Tensor:
    """exp of the entropy of the singular values' shares of their sum (Roy and Vetterli 2007): 1 to k, 0 for a zero
    update. Raises as `energy`."""
    p = relative(S, stacked)
    p = p / p.sum(-1, keepdim=True).clamp_min(1)  # the largest is 1, or all are zero
    return number(torch.special.entr(p).sum(-1).exp() * (p[..., 0] > 0))


def frobenius(S: Tensor, stacked: bool = False) -> float | Tensor:
    """||dW||_F. Raises as `energy`."""
    return number(S[..., 0].double() * relative(S, stacked).norm(dim=-1).double())


def relative(S: Tensor, stacked: bool = False) -> Tensor:
    """S / S[0], so that no square overflows; zeros stay zeros."""
    if S.dim() != 1 + stacked or not S.numel() or not S.is_floating_point():
        raise ValueError(f"expected singular values (k,), got {tuple(S.shape)} of {S.dtype}; for a matrix take "
                         "torch.linalg.svdvals, for factors product_svd")
    if not (S.isfinite() & (S >= 0)).all() or (S[..., 1:] > S[..., :-1]).any():
        raise ValueError(f"singular values must be finite, not negative, and largest first, got {S[:4].tolist()} ...")
    return S / torch.where(S[..., :1] > 0, S[..., :1], 1.0)


def number(x: Tensor) -> int | float | Tensor:
    """A scalar as Python's own; many stay a tensor."""
    return x if x.dim() else x.item()


# Which directions


def subspace_similarity(U1: Tensor, U2: Tensor) -> Tensor:
    """phi(i, j) = ||U1_i^T U2_j||_F^2 / min(i, j), in [0, 1], for all i and j at once (LoRA, section 7.2, eq. 4).

    U_i holds the first i columns. The paper takes the right-singular vectors of A: ``Vh.T`` of its SVD. Two random
    subspaces of R^d have E[phi] = max(i, j) / d, which is the control.

    Args:
        U1, U2: (d, r1) and (d, r2), orthonormal columns, the most important first.

    Returns:
        (r1, r2), where phi(i, j) stands in row i - 1 and column j - 1.

    Raises:
        ValueError: lengths that differ, or columns that are not orthonormal.
    """
    U1, U2 = orthonormal(U1, U2)
    overlap = (U1.T @ U2).square().cumsum(0).cumsum(1)  # (r1, r2)
    i, j = (torch.arange(1, n + 1, device=overlap.device) for n in overlap.shape)
    return overlap / torch.minimum(i[:, None], j)


def principal_angles(U1: Tensor, U2: Tensor) -> Tensor:
    """The angles between two subspaces in radians, (min(r1, r2),), smallest first (Bjorck and Golub 1973).

    From cosine and sine both: near 0 a cosine alone loses half the digits. Arguments and errors are those of
    `subspace_similarity`.
    """
    U1, U2 = orthonormal(U1, U2)
    if U1.shape[1] < U2.shape[1]:
        U1, U2 = U2, U1
    overlap = U1.T @ U2  # (r1, r2), r1 >= r2
    cosines, sines = torch.linalg.svdvals(overlap), torch.linalg.svdvals(U2 - U1 @ overlap).flip(0)
    return torch.atan2(sines, cosines)


def orthonormal(*bases: Tensor) -> list[Tensor]:
    """The bases in their common dtype, or a ValueError."""
    found = [matrix(f"basis {i}", U) for i, U in enumerate(bases, 1)]
    if len({len(U) for U in found}) > 1:
        raise ValueError("the bases must be columns of one length, got shapes "
                         + " and ".join(str(tuple(U.shape)) for U in found))
    for i, U in enumerate(found, 1):
        off = (U.T @ U - torch.eye(U.shape[1], dtype=U.dtype, device=U.device)).abs().max()
        if off > 1e-3:
            raise ValueError(f"basis {i} of shape {tuple(U.shape)} must have orthonormal columns, and is off by "
                             f"{off:.2g}: take U or Vh.T of an SVD, or torch.linalg.qr")
    return [U.to(torch.promote_types(found[0].dtype, found[-1].dtype)) for U in found]


class Amplification(NamedTuple):
    """A column of the paper's Table 7: norms of the update, and of W along r directions."""

    update: float  # ||dW||_F
    along_update: float  # ||U^T W V||_F on the top r singular vectors of dW
    along_own: float  # ... of W itself: the most there is
    random: float  # ... of random subspaces: the root mean square, exactly
    factor: float  # update / along_update


def amplification(W: Tensor, U: Tensor, S: Tensor, Vh: Tensor, rank: int | None = None) -> Amplification:
    """How much of what the update says W said already (LoRA, section 7.3, Table 7).

    A factor far above 1 means that the update amplifies directions that W has but does not emphasise.

    Args:
        W: (out, in), the frozen weight.
        U, S, Vh: (out, k), (k,), (k, in), the update's singular value decomposition: `product_svd` of a LoRA update,
            ``torch.linalg.svd(dW, full_matrices=False)`` of a dense one.
        rank: r, how many of its directions to look along; all by default.

    Returns:
        Norms and their ratio. `random` is the closed form r / sqrt(out in) ||W||_F, for a square W the paper's r / d.

    Raises:
        ValueError: shapes that do not fit, a rank above k, singular vectors not orthonormal, or an update of zero.
    """
    W, (U,), (V,) = matrix("W", W), orthonormal(U), orthonormal(Vh.T)
    rank = len(S) if rank is None else rank
    if W.shape != (len(U), len(V)) or not len(S) == U.shape[1] == V.shape[1]:
        raise ValueError(f"an update of shapes {tuple(U.shape)}, {tuple(S.shape)}, {tuple(Vh.shape)} does not fit W of "
                         f"shape {tuple(W.shape)}")
    possible(rank, len(S))
    if not S[0] > 0:
        raise ValueError("the update is zero: it has no directions to look along")
    square = W.T @ W if W.shape[0] > W.shape[1] else W @ W.T
    own = torch.linalg.eigvalsh(square)[-rank:].sum().sqrt()  # their sum is all that is asked: no need of an SVD
    update, along = S.norm(), (U[:, :rank].to(W.dtype).T @ W @ V[:, :rank].to(W.dtype)).norm()
    random = rank / math.sqrt(W.numel()) * W.norm()
    return Amplification(*map(float, (update, along, own, random, update / along)))


class Intruders(NamedTuple):
    """The new directions of a tuned weight, and how a random one would look."""

    count: int  # of `cosines` below epsilon
    cosines: Tensor  # (k,) the largest |cosine| of each top direction of the tuned W with any of W0's
    control: Tensor  # (k,) the same for random directions


def intruder_dimensions(W0: Tensor, W: Tensor, k: int = 10, epsilon: float = 0.5, seed: int = 0) -> Intruders:
    """Top directions of the tuned weight that resemble none of the base's (Shuttleworth et al. 2024, 2410.21228,
    algorithm 1).

    Of the k leading left singular vectors of W those whose |cosine| with every left singular vector of W0 is below
    `epsilon`. A random direction nearly always is one; W0 must have no two equal singular values, whose vectors could
    be any.

    Args:
        W0, W: (out, in), before and after.

    Raises:
        ValueError: shapes that differ, NaN or infinite values, or k above min(out, in).
    """
    W0, W = matrix("W0", W0), matrix("W", W)
    if W0.shape != W.shape:
        raise ValueError(f"W0 and W must have one shape, got {tuple(W0.shape)} and {tuple(W.shape)}")
    possible(k, min(W.shape), "k")
    U0, U = (torch.linalg.svd(M, full_matrices=False)[0] for M in (W0, W.to(W0.dtype)))  # (out, min(out, in))
    random = torch.randn(len(U), k, generator=torch.Generator().manual_seed(seed)).to(U0)
    cosines, control = ((U0.T @ (x / x.norm(dim=0))).abs().amax(0) for x in (U[:, :k], random))  # (k,)
    return Intruders(int((cosines < epsilon).sum()), cosines, control)


# The best update of a lower rank


class LowRank(NamedTuple):
    """Factors of the nearest matrix of a rank, and how far it is."""

    B: Tensor  # (out, rank)
    A: Tensor  # (rank, in); each takes the root of the singular values
    norm: float  # ||whole||_F
    error: float  # ||rest||_F / ||whole||_F; its square is the share of the energy that is lost


def truncate(B: Tensor, A: Tensor, scale: float = 1.0, *, rank: int | None = None,
             energy: float | None = None) -> LowRank:
    """The nearest update of a lower rank to ``scale * B @ A``, which no other of that rank betters (Eckart and Young
    1936). The scale goes into the factors: theirs is 1.

    Args:
        rank: of the result. energy: or the share of it to keep, in (0, 1]. Exactly one of the two.

    Raises:
        ValueError: as `product_svd`; a rank above the factors'; none or both of rank and energy.
    """
    return nearest(*product_svd(B, A, scale), rank, energy)


@torch.no_grad()
def extract_lora(delta: Tensor, *, rank: int | None = None, energy: float | None = None) -> LowRank:
    """The LoRA factors nearest to a dense update, (out, in): the leading singular part (Eckart and Young 1936).

    Takes a dense SVD, O(out in min(out, in)). Arguments are those of `truncate`.

    Raises:
        ValueError: no finite matrix; a rank above min(out, in); none or both of rank and energy.
    """
    return nearest(*torch.linalg.svd(matrix("delta", delta), full_matrices=False), rank=rank, energy=energy)


def nearest(U: Tensor, S: Tensor, Vh: Tensor, rank: int | None, energy: float | None) -> LowRank:
    if rank is None and energy is not None:
        rank = max(1, int(rank_for_energy(S, energy)))
    elif rank is None or energy is not None:
        raise ValueError(f"expected either a rank or a share of the energy, got rank={rank} and energy={energy}")
    possible(rank, len(S))
    root, parts = S[:rank].sqrt(), relative(S)  # (rank,), (k,)
    error = float(parts[rank:].norm() / parts.norm()) if S[0] > 0 else 0.0
    return LowRank(U[:, :rank] * root, root[:, None] * Vh[:rank], float(frobenius(S)), error)


def possible(rank: int, most: int, name: str = "rank") -> None:
    if type(rank) is not int or not 0 < rank <= most:
        raise ValueError(f"{name} must be an integer from 1 to {most} here, got {rank!r}")
