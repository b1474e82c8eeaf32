"""What a low-rank update is made of: singular values and directions, on plain tensors, on any device.

A weight is (out, in) and an update is ``scale * B @ A`` with B (out, r) and A (r, in), as everywhere in this package.
The product is never formed. Everything is computed and returned in the dtype given, 16-bit tensors in fp32.
"""

import math

import torch
from torch import Tensor


@torch.no_grad()
def product_svd(B: Tensor, A: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of ``scale * B @ A`` from a QR of each factor: O((out + in) r^2), not O(d^3).

    With B = Q_B R_B and A^T = Q_A R_A the product is Q_B (R_B R_A^T) Q_A^T, so the small core holds its singular values
    (Golub and Van Loan, Matrix Computations, 5.4; the QR comes first as in Chan 1982).

    Args:
        B: (out, r). A: (r, in).

    Returns:
        U (out, k), S (k,) largest first, Vh (k, in) with k = min(r, out, in), so that ``U @ diag(S) @ Vh`` is the
        product. U and Vh have orthonormal vectors, also where S is zero; their signs are arbitrary.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite values, or singular values that overflow the dtype.
    """
    B, A, weights, exponent = balanced(B, A, scale)
    Q_B, R_B = torch.linalg.qr(B)  # (out, k), (k, r)
    Q_A, R_A = torch.linalg.qr(A.T)  # (in, k), (k, r)
    U, S, Vh = torch.linalg.svd((R_B * weights) @ R_A.T, full_matrices=False)
    return Q_B @ U, unscaled(S, exponent), Vh @ Q_A.T


def balanced(B: Tensor, A: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """B and A with the largest entry of each column of B and each row of A brought to 1, and what they were: weights
    (r,) and one power of two for all, so that ``scale * B @ A`` = 2^exponent (B' * weights) @ A' and no step between
    overflows, or loses a direction because another one is 10^20 times as large."""
    if B.dim() != 2 or A.dim() != 2 or B.shape[1] != A.shape[0] or 0 in (*B.shape, *A.shape):
        swapped = "; they fit the other way round" if B.dim() == A.dim() == 2 and B.shape[0] == A.shape[1] else ""
        raise ValueError(f"expected B (out, r) and A (r, in), got {tuple(B.shape)} and {tuple(A.shape)}{swapped}")
    dtype = torch.promote_types(torch.promote_types(B.dtype, A.dtype), torch.float32)
    if not dtype.is_floating_point:
        raise ValueError(f"expected real floating-point factors, got {B.dtype} and {A.dtype}")
    B, A = B.to(dtype), A.to(dtype)
    b, a = B.abs().amax(0), A.abs().amax(1)  # (r,), NaN where an entry is
    if not (torch.isfinite(b) & torch.isfinite(a)).all() or not math.isfinite(scale):
        raise ValueError(f"NaN or infinite values in B, A or scale ({scale:g})")
    (mb, eb), (ma, ea), (ms, es) = torch.frexp(b), torch.frexp(a), math.frexp(scale)
    weights = mb * ma * ms
    exponents = (eb + ea + es).masked_fill(weights == 0, -(2**14))  # below every other: a zero sets no scale
    exponent = exponents.amax()
    weights *= (exponents - exponent).to(dtype).exp2()
    return B / b.masked_fill(b == 0, 1), A / a.masked_fill(a == 0, 1)[:, None], weights, exponent


def unscaled(S: Tensor, exponent: Tensor) -> Tensor:
    """S * 2^exponent, in two steps, of which neither overflows unless the result does."""
    half = exponent // 2
    S = S * half.to(S.dtype).exp2() * (exponent - half).to(S.dtype).exp2()
    if not S.isfinite().all():
        raise ValueError(f"the product overflows {S.dtype}: pass factors of a wider dtype, or a smaller scale")
    return S
