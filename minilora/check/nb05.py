"""Notebook 05: energy, the SVD of a product, subspaces, amplification, intruders; two predictions."""

import random

import torch
from torch import Tensor

from . import Exercise, Prediction


def matrix(seed: int, d_out: int, d_in: int, fall: float) -> Tensor:
    """A matrix whose singular values fall by about `fall` from one to the next."""
    k = min(d_out, d_in)
    U, V = (torch.linalg.qr(torch.randn(d, k, dtype=torch.float64)).Q for d in (d_out, d_in))
    return U * (3 + seed) * fall ** torch.arange(k) @ V.T


def draw_share(seed: int) -> tuple[Tensor, float]:
    # sizes and falls at which every mistake gives another count somewhere; the last holds its share exactly
    if seed == 4:
        return torch.diag(torch.tensor([2.0, 2, 2, 2, 0, 0], dtype=torch.float64))[:, :5], 0.5
    return matrix(seed, 18 + seed, 26 - seed, (0.9, 0.85, 0.93, 0.95)[seed]), (0.9, 0.7, 0.95, 0.5)[seed]


def draw_any_share(number: int) -> tuple[Tensor, float]:
    sizes = random.randint(14, 30), random.randint(14, 30)
    return matrix(number, *sizes, random.uniform(0.75, 0.97)), random.uniform(0.3, 0.97)


def counted(delta: Tensor, share: float) -> int:
    """Takes the largest direction away from the energy until little enough is left."""
    left = torch.linalg.eigvalsh(delta @ delta.T).clamp_min(0).tolist()  # the squared singular values, smallest first
    whole, count = sum(left), 0
    while whole - sum(left) < share * whole:
        left.pop()
        count += 1
    return count


def of_spectrum(count):
    """The mistake that makes `count` of the singular values and the share."""
    return lambda delta, share: int(count(torch.linalg.svdvals(delta), share))


def below(shares: Tensor, share: float) -> Tensor:
    return (shares < share).sum()


def energy(S: Tensor) -> Tensor:
    return S.square().cumsum(0) / S.square().sum()


rank_for_energy = Exercise("rank_for_energy", counted, draw_share, [
    (of_spectrum(lambda S, share: below(S.cumsum(0) / S.sum(), share) + 1),
     "the singular values are added; the energy is the sum of their squares"),
    (of_spectrum(lambda S, share: below(energy(S).sqrt(), share) + 1),
     "this takes the root of the energy; the share is one of the squared length"),
    (of_spectrum(lambda S, share: below(energy(S), share)),
     "one too few: these directions do not yet hold the share, the next one completes it"),
    (of_spectrum(lambda S, share: below(S.flip(0).square().cumsum(0) / S.square().sum(), share) + 1),
     "this starts with the smallest directions; svdvals gives the largest first, and so it should stay"),
    (of_spectrum(lambda S, share: (S.square() / S.square().sum() < share).sum() + 1),
     "add the energies up (cumsum): no single direction has to hold the share"),
    (of_spectrum(lambda S, share: (S >= (1 - share) * S[0]).sum()),
     "this compares each singular value with the largest; the question is what the first few hold together"),
    (of_spectrum(lambda S, share: round(share * len(S))),
     "this is the share of the directions, not of the energy they hold"),
    (lambda delta, share: int(torch.linalg.matrix_rank(delta)),
     "this is the rank itself, which counts a direction however small it is"),
    (of_spectrum(lambda S, share: (energy(S) <= share).sum() + 1),
     "directions that hold exactly the share are enough: at least, >=, not >"),
    (of_spectrum(lambda S, share: below(energy(S), share) + 2),
     "one too many: count how many hold too little, and add one"),
    (of_spectrum(lambda S, share: below(energy(S), 1 - share) + 1),
     "this is how many hold 1 - share; the question is how many hold the share"),
    (of_spectrum(lambda S, share: below(S.square().cumsum(0) / S.sum(), share) + 1),
     "the sum of the squares is divided by the sum of the values: divide by the sum of all squares"),
], rounds=5, draw=draw_any_share,
    situations=[(lambda delta, share: delta.shape[0] > delta.shape[1], "delta is taller than wide"),
                (lambda delta, share: delta.shape[0] < delta.shape[1], "delta is wider than tall"),
                (lambda delta, share: share < 0.6, "the share is small"),
                (lambda delta, share: share >= 0.6, "the share is large")])


def draw_factors(seed: int) -> tuple[Tensor, Tensor, float]:
    """Factors of which neither has orthogonal columns; the rank is below both sides."""
    d_out, d_in, rank = 11 + seed, 14 - seed, 2 + seed
    B, A = torch.randn(d_out, rank, dtype=torch.float64), torch.randn(rank, d_in, dtype=torch.float64)
    return B * torch.arange(1, rank + 1), A + A[:1], random.choice((2.0, 0.5, 4.0))


def decomposed(B: Tensor, A: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """From the whole product, of which all but the first r directions are zero."""
    U, S, Vh = torch.linalg.svd(scale * B @ A, full_matrices=False)
    r = B.shape[1]
    return U[:, :r], S[:r], Vh[:r]


def what_an_svd_must_be(result, B: Tensor, A: Tensor, scale: float) -> dict:
    """Signs are arbitrary, so the factors are looked at together, and each for being orthonormal."""
    U, S, Vh = (torch.as_tensor(part) for part in result)
    return {"the sizes of U, S and Vh": [list(part.shape) for part in (U, S, Vh)], "S": S,
            "U diag(S) Vh": U * S @ Vh, "U.T @ U": U.T @ U, "Vh @ Vh.T": Vh @ Vh.T}


def by_qr(core=lambda R_B, R_A, scale: scale * R_B @ R_A.T, put=lambda Q_B, U, S, Vh, Q_A: (Q_B @ U, S, Vh @ Q_A.T)):
    """The two QRs, with another matrix in the middle or put together in another way."""
    def svd(B, A, scale):
        Q_B, R_B = torch.linalg.qr(B)
        Q_A, R_A = torch.linalg.qr(A.T)
        return put(Q_B, *torch.linalg.svd(core(R_B, R_A, scale)), Q_A)
    return svd


def by_qr_of_A(B, A, scale):
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A)
    U, S, Vh = torch.linalg.svd(scale * R_B @ R_A, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A


product_svd = Exercise("product_svd", decomposed, draw_factors, [
    (by_qr(lambda R_B, R_A, scale: R_B @ R_A.T), "the scale is missing: the product is scale * B @ A"),
    (by_qr(lambda R_B, R_A, scale: scale**2 * R_B @ R_A.T), "the scale counts once"),
    (by_qr(lambda R_B, R_A, scale: R_B @ R_A.T / scale), "divided by the scale: multiply"),
    (by_qr(lambda R_B, R_A, scale: scale * R_B @ R_A),
     "the matrix in the middle is R_B times the transpose of R_A: A.T = Q_A R_A, so A = R_A.T Q_A.T"),
    (by_qr_of_A, "that is the QR of A: it is A's rows that have to become orthonormal, so take the QR of A.T"),
    (by_qr(lambda R_B, R_A, scale: scale * R_A @ R_B.T), "the matrix in the middle is turned round: R_B comes first"),
    (by_qr(lambda R_B, R_A, scale: scale * R_B), "A's half of the middle is missing: R_B times the transpose of R_A"),
    (by_qr(put=lambda Q_B, U, S, Vh, Q_A: (U, S, Vh)),
     "this is the SVD of the r x r matrix in the middle: put Q_B in front of its U, and the transpose of Q_A after Vh"),
    (by_qr(put=lambda Q_B, U, S, Vh, Q_A: (Q_B, S, Q_A.T)),
     "Q_B and Q_A are orthonormal, but not the singular directions: turn them by U and Vh of the middle"),
    (by_qr(put=lambda Q_B, U, S, Vh, Q_A: (Q_B @ U, S, (Vh @ Q_A.T).T)),
     "V is returned, expected Vh: its directions stand in rows, (r, d_in)"),
    (by_qr(put=lambda Q_B, U, S, Vh, Q_A: (Q_B @ U, S, Vh.T @ Q_A.T)),
     "Vh of the middle is transposed: torch.linalg.svd gives Vh, so Vh @ Q_A.T"),
    (by_qr(put=lambda Q_B, U, S, Vh, Q_A: (Q_B @ U, S**2, Vh @ Q_A.T)), "the singular values are squared"),
    (by_qr(put=lambda Q_B, U, S, Vh, Q_A: (Q_B @ U, torch.diag(S), Vh @ Q_A.T)),
     "S is a matrix, expected the singular values alone, (r,)"),
    (by_qr(put=lambda Q_B, U, S, Vh, Q_A: (Q_B @ U * S, S, Vh @ Q_A.T)),
     "the singular values are in U as well: U has columns of length 1"),
    (lambda B, A, scale: torch.linalg.svd(scale * B @ A, full_matrices=False),
     "this decomposes the whole product: it has more than r directions, of which all but r are zero; take the SVD of "
     "the r x r matrix in the middle"),
], tolerance=1e-4, observe=what_an_svd_must_be)


def draw_adapters(seed: int) -> tuple[Tensor, Tensor, int, int]:
    # rows that are neither orthogonal nor in order of importance, as training leaves them
    d_in, r1, r2 = 13 + seed, 3 + seed, 6
    A1, A2 = (torch.randn(r, r, dtype=torch.float64) @ torch.randn(r, d_in, dtype=torch.float64) for r in (r1, r2))
    A2[:2] += 3 * A1[:2]
    i, j = ((2, 4), (3, 2), (1, 3), (4, 1))[seed]
    return (A1, A2, i, j) if random.random() < 0.5 else (A2, A1, random.randint(1, r2), random.randint(1, r1))


def projected(A1: Tensor, A2: Tensor, i: int, j: int) -> float:
    """The trace of one projector times the other, which is the squared norm of U1^T U2."""
    def projector(A, n):
        values, vectors = torch.linalg.eigh(A.T @ A)  # ascending
        return vectors[:, -n:] @ vectors[:, -n:].T
    return ((projector(A1, i) * projector(A2, j)).sum() / min(i, j)).item()


def overlap(A1: Tensor, A2: Tensor, i: int, j: int) -> Tensor:
    V1, V2 = (torch.linalg.svd(A, full_matrices=False)[2] for A in (A1, A2))
    return V1[:i] @ V2[:j].T


similarity = Exercise("similarity", projected, draw_adapters, [
    (lambda A1, A2, i, j: ((A1[:i] @ A2[:j].T).square().sum() / min(i, j)).item(),
     "the rows of A are not orthonormal, and not in order: take the right-singular vectors, Vh of the SVD"),
    (lambda A1, A2, i, j: ((torch.linalg.qr(A1.T).Q[:, :i].T @ torch.linalg.qr(A2.T).Q[:, :j]).square().sum()
                           / min(i, j)).item(),
     "a QR gives orthonormal columns, but in the order of the rows: the SVD puts the most important first"),
    (lambda A1, A2, i, j: (overlap(A1, A2, i, j).square().sum() / max(i, j)).item(),
     "divide by the smaller of i and j: a line inside a plane must come out as 1"),
    (lambda A1, A2, i, j: (overlap(A1, A2, i, j).norm() / min(i, j)).item(),
     "the norm is squared: without the square a subspace is not similar to itself by 1"),
    (lambda A1, A2, i, j: overlap(A1, A2, i, j).square().sum().item(),
     "divide by min(i, j), or a larger subspace always looks more similar"),
    (lambda A1, A2, i, j: (overlap(A1, A2, j, i).square().sum() / min(i, j)).item(),
     "i belongs to the first adapter and j to the second; here they are swapped"),
    (lambda A1, A2, i, j: (overlap(A1, A2, i, j).abs().sum() / min(i, j)).item(),
     "these are the absolute values; it is the squares that are added"),
    (lambda A1, A2, i, j: (overlap(A1, A2, len(A1), len(A2)).square().sum() / min(len(A1), len(A2))).item(),
     "this compares the whole subspaces: take the first i and the first j directions"),
    (lambda A1, A2, i, j: (overlap(A1, A2, i, j).square().sum() / (i * j)).item(),
     "this is the mean over all pairs: divide by min(i, j), not by i j"),
    (lambda A1, A2, i, j: (overlap(A1, A2, i, j).square().sum() / i).item(),
     "divided by i: it is the smaller of i and j that bounds the sum"),
    (lambda A1, A2, i, j: (overlap(A1, A2, i, j).square().sum() / j).item(),
     "divided by j: it is the smaller of i and j that bounds the sum"),
    (lambda A1, A2, i, j: (overlap(A1, A2, min(i, j), min(i, j)).square().sum() / min(i, j)).item(),
     "both are cut to the smaller number: the first i directions of one, the first j of the other"),
    (lambda A1, A2, i, j: (overlap(A1, A2, i, j).diagonal().square().sum() / min(i, j)).item(),
     "this compares place by place; every direction of one is compared with every direction of the other"),
    (lambda A1, A2, i, j: torch.linalg.svdvals(overlap(A1, A2, i, j))[0].item(),
     "this is the cosine of the smallest angle; the squares of all of them are added"),
], situations=[(lambda A1, A2, i, j: i > j, "i is larger than j"), (lambda A1, A2, i, j: i < j, "j is larger than i"),
               (lambda A1, A2, i, j: i != j, "i and j differ"),
               (lambda A1, A2, i, j: len(A1) != len(A2), "the ranks differ")])


def draw_weight_and_update(seed: int) -> tuple[Tensor, Tensor, int]:
    d_out, d_in = 8 + 2 * seed, 12 - seed
    return matrix(seed, d_out, d_in, 0.8), 0.3 * matrix(seed, d_out, d_in, 0.6), 2 + seed % 3


def amplified(W: Tensor, delta: Tensor, rank: int) -> float:
    """Measures W by the pairs of directions of delta, one number each."""
    U, S, Vh = torch.linalg.svd(delta)
    parts = [(U[:, i] @ W @ Vh[j]).item() for i in range(rank) for j in range(rank)]
    return (sum(s * s for s in S.tolist()) / sum(p * p for p in parts))**0.5


def by_directions(factor):
    """The mistake that makes `factor` of W, delta, and the leading singular parts of delta."""
    def mistake(W, delta, rank):
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        return factor(W, delta, U[:, :rank], S[:rank], Vh[:rank]).item()
    return mistake


amplification_factor = Exercise("amplification_factor", amplified, draw_weight_and_update, [
    (lambda W, delta, rank: (delta.norm() / W.norm()).item(),
     "this compares with all of W; the question is how much of W lies along the directions of delta"),
    (lambda W, delta, rank: amplified(delta, W, rank), "W and delta are swapped: the directions are those of delta"),
    (by_directions(lambda W, delta, U, S, Vh: S.norm() / (U.T @ W @ Vh.T).norm()),
     "this counts delta's first directions alone; the paper divides the norm of all of delta"),
    (by_directions(lambda W, delta, U, S, Vh: (U.T @ W @ Vh.T).norm() / delta.norm()),
     "upside down: delta's norm is divided by W's, not the other way round"),
    (by_directions(lambda W, delta, U, S, Vh: delta.norm() / (U.T @ W @ Vh.T).diagonal().norm()),
     "this takes the diagonal of U^T W V alone; its norm is over all entries"),
    (by_directions(lambda W, delta, U, S, Vh: delta.norm() / (U.T @ W).norm()),
     "this projects on the left only: put V on the right as well, U^T W V"),
    (by_directions(lambda W, delta, U, S, Vh: delta.norm() / (W @ Vh.T).norm()),
     "this projects on the right only: put U^T on the left as well, U^T W V"),
    (lambda W, delta, rank: (delta.norm() / torch.linalg.svdvals(W)[:rank].norm()).item(),
     "this looks along W's own top directions; the question is about those of delta"),
    (lambda W, delta, rank: amplified(W, delta, min(W.shape)),
     "along all directions of delta lies nearly all of W: take the first `rank` only"),
    (lambda W, delta, rank: amplified(W, delta, rank)**2, "the norms are squared; a norm has a root"),
    (by_directions(lambda W, delta, U, S, Vh: S[0] / torch.linalg.matrix_norm(U.T @ W @ Vh.T, 2)),
     "this is the spectral norm, the largest stretch; the paper takes the Frobenius norm, over all entries"),
    (by_directions(lambda W, delta, U, S, Vh: delta.norm() / torch.linalg.matrix_norm(U.T @ W @ Vh.T, 2)),
     "W's part is measured by its spectral norm and delta by Frobenius: take Frobenius for both"),
    (by_directions(lambda W, delta, U, S, Vh: delta.norm() / (U.T @ (W + delta) @ Vh.T).norm()),
     "the update is in W already here: measure the base alone along the directions of delta"),
    (lambda W, delta, rank: (delta.norm() / W[:rank, :rank].norm()).item(),
     "this is a corner of W; project W on the directions of delta, U^T W V"),
], situations=[(lambda W, delta, rank: W.shape[0] > W.shape[1], "the matrices are taller than wide"),
               (lambda W, delta, rank: W.shape[0] < W.shape[1], "the matrices are wider than tall")])


def draw_before_and_after(seed: int) -> tuple[Tensor, Tensor, int, float]:
    # Two new directions come in, a loud and a quiet one; an old one comes up from far below; the first stays the first.
    # Then two by themselves: in a tall matrix the new direction is the one that W0 does not reach at all; an old one
    # comes up from beyond place 2k.
    if seed > 3:
        W0 = matrix(seed, 21, 20, 0.9)
        U, S, Vh = torch.linalg.svd(W0)
        place = 20 if seed == 4 else 13
        return W0, W0 + 1.5 * S[0] * torch.outer(U[:, place], Vh[13]), 3, 0.6
    d_out, d_in, k = 24 + 2 * seed, 20 + 5 * seed, 5 + seed
    W0 = matrix(seed, d_out, d_in, 0.9)
    U, S, Vh = torch.linalg.svd(W0)
    u, v = (torch.nn.functional.normalize(torch.randn(d, 2, dtype=torch.float64), dim=0) for d in (d_out, d_in))
    change = u * torch.tensor([1.5, 0.8]) @ v.T + U[:, [0, k + 4]] * torch.tensor([1.5, 1.2]) @ Vh[[0, k + 4]]
    return W0, W0 + S[0] * change, k, 0.6


def draw_any_change(number: int) -> tuple[Tensor, Tensor, int, float]:
    """Some loud new directions, some old ones that come up, and no cosine so near epsilon that rounding decides."""
    while True:
        d_out, d_in, k = random.randint(20, 28), random.randint(20, 32), random.randint(4, 9)
        news, olds = random.randint(0, 4), random.sample(range(14), random.randint(1, 3))
        W0, epsilon = matrix(number, d_out, d_in, 0.9), random.uniform(0.4, 0.7)
        U, S, Vh = torch.linalg.svd(W0)
        u, v = (torch.linalg.qr(torch.randn(d, 5, dtype=torch.float64)).Q[:, :news] for d in (d_out, d_in))
        rises = [torch.rand(n, dtype=torch.float64) * 1.5 + 0.8 for n in (news, len(olds))]
        W = W0 + S[0] * (u * rises[0] @ v.T + U[:, olds] * rises[1] @ Vh[olds])
        new, values, _ = torch.linalg.svd(W)
        nearest = (U[:, :min(d_out, d_in)].T @ new[:, :k]).abs().amax(0)
        if (nearest - epsilon).abs().min() > 1e-4 and (values[:k] - values[1:k + 1]).min() > 1e-3 * values[0]:
            return W0, W, k, epsilon


def by_cosines(count):
    """The mistake that makes `count` of the |cosines| (old, new) of the left singular vectors, and of k and epsilon."""
    def mistake(W0, W, k, epsilon):
        U0, U = (torch.linalg.svd(M, full_matrices=False)[0] for M in (W0, W))
        return int(count(U0.T @ U, k, epsilon))
    return mistake


def full_cosines(W0: Tensor, W: Tensor, k: int, epsilon: float) -> int:
    U0, U = (torch.linalg.svd(M).U for M in (W0, W))
    return int(((U0.T @ U[:, :k]).abs().amax(0) < epsilon).sum())


def intruding(W0: Tensor, W: Tensor, k: int, epsilon: float) -> int:
    """Asks for each of the top directions, one at a time, whether an old one is near."""
    old = torch.linalg.eigh(W0 @ W0.T).eigenvectors[:, -min(W0.shape):]  # those of zero left out
    new = torch.linalg.eigh(W @ W.T).eigenvectors.flip(1)[:, :k]
    return sum(all(abs(torch.dot(u, o).item()) < epsilon for o in old.T) for u in new.T)


intruders = Exercise("intruders", intruding, draw_before_and_after, [
    (by_cosines(lambda C, k, e: (C[:, :k].amax(0) < e).sum()),
     "a singular vector's sign is arbitrary: take the absolute value of the cosine"),
    (by_cosines(lambda C, k, e: (C.abs()[:k, :k].amax(0) < e).sum()),
     "this compares with the base's first k directions only; an old direction may have come up from below"),
    (by_cosines(lambda C, k, e: (C.abs().diagonal()[:k] < e).sum()),
     "this compares place by place; a direction that only changed its place is no intruder"),
    (by_cosines(lambda C, k, e: (C.abs().amax(0) < e).sum()), "this looks at all directions of W; take its first k"),
    (by_cosines(lambda C, k, e: (C.abs()[:, :k].amax(0) >= e).sum()),
     "these are the directions that are not new: an intruder's largest cosine is below epsilon"),
    (by_cosines(lambda C, k, e: (C.abs()[:, :k].amin(0) < e).sum()),
     "nearly every direction is far from some old one: it is the nearest that counts, the largest cosine"),
    (by_cosines(lambda C, k, e: (C.abs()[:, :k] < e).sum()),
     "this counts pairs of directions; count a new direction once, if all its cosines are below epsilon"),
    (by_cosines(lambda C, k, e: (C.abs()[:k].amax(1) < e).sum()),
     "this counts old directions that are gone: ask for each of the new W's directions whether an old one is near"),
    (lambda W0, W, k, epsilon: by_cosines(lambda C, k, e: (C.abs()[:, :k].amax(0) < e).sum())(W0.T, W.T, k, epsilon),
     "these are the right singular vectors; the definition takes the left ones, U"),
    (full_cosines, "with full_matrices=True a tall W0 has left vectors that it does not reach, which are no directions "
                   "of its own: full_matrices=False"),
    (by_cosines(lambda C, k, e: (C.abs()[:2 * k, :k].amax(0) < e).sum()),
     "this compares with the base's first 2k directions; compare with all of them"),
    (by_cosines(lambda C, k, e: (C[:, :k].square().amax(0) < e).sum()),
     "the cosine is squared: compare its absolute value with epsilon"),
    (by_cosines(lambda C, k, e: (C[:, :k].norm(dim=0) < e).sum()),
     "this is the length of a direction's part in the old space; it is the nearest single old direction that counts"),
    (by_cosines(lambda C, k, e: (C.abs()[:, :k].amax(0) > 1 - e).sum()),
     "a direction is an intruder if its largest cosine is below epsilon"),
], rounds=6, draw=draw_any_change,
    situations=[(lambda W0, W, k, e: W0.shape[0] > W0.shape[1], "W0 is taller than wide"),
                (lambda W0, W, k, e: W0.shape[0] < W0.shape[1], "W0 is wider than tall"),
                (lambda W0, W, k, e: intruding(W0, W, k, e) == 0, "there is no intruder"),
                (lambda W0, W, k, e: intruding(W0, W, k, e) > 0, "there is an intruder")])


how_many_directions = Prediction("b", {
    "a": "That is what the task needs, as the next measurement shows. What full fine-tuning does is another matter: it "
         "moves every weight, asked or not, and its length is spread over more directions.",
    "b": "Far from chance, and far from the rank of an adapter.",
    "c": "That would be an update without any structure, as the control is. The gradients of one task have structure: "
         "they push the same few directions again and again.",
    "d": "All of them are used, which is why the matrix has full rank. But most are very short: rank counts them all "
         "alike, energy does not.",
})

half_the_energy = Prediction("a", {
    "a": "The work is in the few directions that all examples push, and the tail only adds length.",
    "b": "The answers do not follow the energy: what was cut away held nearly half of it, and alone it gets no reply "
         "right.",
    "c": "Energy is squared length, and length is not work. The leading directions are those that the gradients agree "
         "on; the rest is long only because there is so much of it.",
    "d": "It does matter which: random directions of the same lengths, and the other half itself, both fail.",
})
