"""Notebook 02, two thin matrices: an estimate, two choices and four exercises."""

import random

import torch
from torch import Tensor

from . import Estimate, Exercise, Prediction

gpt3_parameters = Estimate([
    (1 / 192, "That is one adapted matrix. There are two in each of the 96 layers."),
    (1 / 96, "That is one layer. There are 96."),
    (1 / 8, "That is rank 1. Each matrix has 8 rows (A) or 8 columns (B)."),
    (0.5, "Half is missing: A and B both train, and both q and v are adapted."),
    (2, "That is q, k, v and o. The question adapts q and v alone."),
    (768, "These are q and v themselves. LoRA leaves them frozen and trains the thin matrices beside them."),
], within=1.1)

first_step = Prediction("b", {
    "a": "A is the random one, but that does not make it move. Its gradient has B as a factor, and B is zero.",
    "b": "The gradient of A has the factor B, which is zero. The gradient of B has the factor A, which is not.",
    "c": "Both can move later. At step 0 the gradient of A has B as a factor, and B is zero.",
    "d": "The product BA is zero, but it can have a slope. Only if A were zero too would nothing ever move.",
})

half_the_rank = Prediction("d", {
    "a": "Training cannot make rank 2 out of rank 4: two of the four directions have nowhere to go.",
    "b": "That is the share of the squared length, 5 of 30. The length itself is its root.",
    "c": "That adds the singular values, 3 of 10. The directions stand at right angles, so it is squares that add.",
    "d": "The two largest directions are found, 2 and 1 are left: the root of (4 + 1) / (16 + 9 + 4 + 1).",
    "e": "Half the rank is not half the update: the directions that are found are the largest.",
    "f": "A rank below the true one is no failure. It finds what it has room for.",
})


def draw_shapes(seed: int) -> tuple[list[tuple[int, int]], int]:
    """Tall and wide matrices, one of them twice; now and then a single one."""
    shapes = [(8 * random.randint(20, 60), 8 * random.randint(61, 99)) for _ in range(1 + seed)]
    shapes = [shape if random.random() < 0.6 else shape[::-1] for shape in shapes]
    return shapes + shapes[:seed], (3, 8, 16, 5)[seed % 4]


def count_reference(shapes: list[tuple[int, int]], rank: int) -> int:
    """Makes the matrices, on the device that has shapes and no memory, and counts their entries."""
    sizes = [size for d_out, d_in in shapes for size in ((rank, d_in), (d_out, rank))]
    return sum(torch.empty(size, device="meta").numel() for size in sizes)


count_parameters = Exercise("count_parameters", count_reference, draw_shapes, [
    (lambda shapes, r: sum(r * i for o, i in shapes), "A is counted, B is not: it has d_out x r entries"),
    (lambda shapes, r: sum(r * o for o, i in shapes), "B is counted, A is not: it has r x d_in entries"),
    (lambda shapes, r: sum(r * o * i for o, i in shapes),
     "the sizes of A and B add, r d_in + d_out r; they do not multiply"),
    (lambda shapes, r: sum(o * i for o, i in shapes), "these are the frozen weights; count A and B, which train"),
    (lambda shapes, r: sum(o * i + r * (o + i) for o, i in shapes),
     "the frozen weights are counted too; they do not train"),
    (lambda shapes, r: sum(2 * r * i for o, i in shapes),
     "only a square matrix has r x d_in entries twice: B has d_out x r"),
    (lambda shapes, r: sum(2 * r * o for o, i in shapes),
     "only a square matrix has d_out x r entries twice: A has r x d_in"),
    (lambda shapes, r: sum(o + i for o, i in shapes), "this is rank 1; each unit of rank costs as much again"),
    (lambda shapes, r: r * (shapes[0][0] + shapes[0][1]), "only the first matrix is counted"),
    (lambda shapes, r: r * (shapes[-1][0] + shapes[-1][1]), "only the last matrix is counted: += in place of ="),
    (lambda shapes, r: sum(r * (o + i) for o, i in shapes) / sum(o * i for o, i in shapes),
     "this is the share of the frozen weights; the question is how many numbers"),
    (lambda shapes, r: sum(r * (o + i) for o, i in set(shapes)),
     "two matrices of one shape have an A and a B each: a set counts the shape once"),
    (lambda shapes, r: sum(2 * r * min(o, i) for o, i in shapes),
     "twice the smaller side is right for a square alone: A has r x d_in entries, B has d_out x r"),
    (lambda shapes, r: sum(2 * r * max(o, i) for o, i in shapes),
     "twice the larger side is right for a square alone: A has r x d_in entries, B has d_out x r"),
    (lambda shapes, r: sum(r * (o + i) + r * r for o, i in shapes),
     "there is no r x r matrix between A and B: two matrices, r d_in and d_out r"),
], situations=[(lambda shapes, r: len(shapes) == 1, "there is one matrix"),
               (lambda shapes, r: len(shapes) > 1, "there are several matrices"),
               (lambda shapes, r: any(o > i for o, i in shapes), "a matrix is taller than wide")])


def draw_matrices(seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    d_out, d_in, rank = 7 + seed, 15 - seed, 2 + seed
    if random.random() < 0.3:
        d_out, d_in = d_in, d_out
    dtype = random.choice((torch.float64, torch.float32))
    W0, A, B = (torch.randn(*shape, dtype=dtype) for shape in ((d_out, d_in), (rank, d_in), (d_out, rank)))
    return W0, A, B, (6.0, 16.0, 10.0, 32.0)[seed % 4]


def merged_reference(W0: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """What the layer makes of each unit vector is a column of its weight."""
    columns = [W0 @ e + alpha / B.shape[1] * (B @ (A @ e)) for e in torch.eye(W0.shape[1], dtype=W0.dtype)]
    return torch.stack(columns, dim=1)


merged_weight = Exercise("merged_weight", merged_reference, draw_matrices, [
    (lambda W, A, B, alpha: W + B @ A, "the scaling alpha / r is missing: W + BA is another layer"),
    (lambda W, A, B, alpha: W + alpha * (B @ A), "scaled by alpha, expected alpha / r"),
    (lambda W, A, B, alpha: W + alpha / A.shape[1] * (B @ A),
     "this divides alpha by d_in; r is the inner size, the rows of A"),
    (lambda W, A, B, alpha: W + alpha / B.shape[0] * (B @ A),
     "this divides alpha by d_out; r is the inner size, the columns of B"),
    (lambda W, A, B, alpha: W + alpha / len(A)**0.5 * (B @ A),
     "this is rsLoRA's alpha / sqrt(r); here it is alpha / r"),
    (lambda W, A, B, alpha: W - alpha / len(A) * (B @ A), "the update is added to W0, not taken away"),
    (lambda W, A, B, alpha: alpha / len(A) * (B @ A), "this is the update alone; the merged weight holds W0 too"),
    (lambda W, A, B, alpha: alpha / len(A) * (W + B @ A), "W0 is scaled too; alpha / r belongs to BA alone"),
    (lambda W, A, B, alpha: W + alpha / len(A) * (A @ B), "B comes first: (d_out, r) times (r, d_in)"),
    (lambda W, A, B, alpha: W.add_(alpha / len(A) * (B @ A)),
     "this adds to W0 in place; W0 is frozen, and unmerging needs it"),
    (lambda W, A, B, alpha: W + len(A) / alpha * (B @ A), "upside down: the scaling is alpha / r, not r / alpha"),
    (lambda W, A, B, alpha: W + (alpha / len(A))**2 * (B @ A), "the scaling counts once: alpha / r, not its square"),
    (lambda W, A, B, alpha: W + alpha // len(A) * (B @ A), "alpha // r cuts the scaling down to a whole number: use /"),
])


def draw_update(seed: int) -> tuple[Tensor, int]:
    d_out, d_in = 9 + seed, 14 - seed
    if random.random() < 0.4:
        d_out, d_in = d_in, d_out
    return torch.randn(d_out, d_in, dtype=torch.float64) * torch.arange(1, d_in + 1), random.choice((1, 2 + seed))


def best_error_reference(delta: Tensor, rank: int) -> float:
    """Builds the nearest matrix of this rank and measures how far away it is."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    nearest = sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in range(rank))
    return ((delta - nearest).norm() / delta.norm()).item()


def by_spectrum(error):
    """The mistake that makes `error` of the singular values and the rank."""
    return lambda delta, rank: error(torch.linalg.svdvals(delta), rank).item()


best_rank_r_error = Exercise("best_rank_r_error", best_error_reference, draw_update, [
    (by_spectrum(lambda S, r: S[r:].square().sum() / S.square().sum()),
     "this is the squared error; the root is missing"),
    (by_spectrum(lambda S, r: S[r:].sum() / S.sum()), "the singular values are added; it is their squares that add"),
    (by_spectrum(lambda S, r: S[:r].norm() / S.norm()),
     "this is what the first r directions hold; the error is the rest"),
    (by_spectrum(lambda S, r: 1 - S[:r].norm() / S.norm()),
     "kept and left are the two short sides of a right triangle: their squares add to 1, not they"),
    (by_spectrum(lambda S, r: S[r:].norm()), "this is the length of the error; divide by the length of delta"),
    (by_spectrum(lambda S, r: S[r + 1:].norm() / S.norm()),
     "one too few is left: S[0] is the first singular value, so S[r] is the first that does not fit"),
    (by_spectrum(lambda S, r: S[r - 1:].norm() / S.norm()), "one too many is left: rank r holds S[0] to S[r - 1]"),
    (by_spectrum(lambda S, r: S[r] / S[0]),
     "this is the error in the spectral norm, the largest stretch; the length counts all directions"),
    (by_spectrum(lambda S, r: S.flip(0)[r:].norm() / S.norm()),
     "this keeps the smallest directions; svdvals gives the largest first"),
    (by_spectrum(lambda S, r: S[r:].norm() / S[:r].norm()),
     "divided by what is kept; the share is one of all of delta"),
    (lambda delta, rank: (delta[rank:].norm() / delta.norm()).item(),
     "these are rows of delta; take its singular values, torch.linalg.svdvals(delta)"),
], situations=[(lambda delta, rank: rank == 1, "the rank is 1"), (lambda delta, rank: rank > 1, "the rank is above 1"),
               (lambda delta, rank: delta.shape[0] > delta.shape[1], "delta is taller than wide"),
               (lambda delta, rank: delta.shape[0] < delta.shape[1], "delta is wider than tall")])


def draw_step(seed: int) -> tuple[Tensor, Tensor, Tensor, float, float]:
    N, d_in, d_out, rank = 5 + seed, 13 - seed, 6 + 2 * seed, 2 + seed
    x, G, A = (torch.randn(*shape, dtype=torch.float64) for shape in ((N, d_in), (N, d_out), (rank, d_in)))
    return x, G, A, (6.0, 16.0, 10.0, 32.0)[seed % 4], (0.1, 0.03, 0.2, 0.05)[seed % 4]


def first_update_reference(x: Tensor, G: Tensor, A: Tensor, alpha: float, lr: float) -> Tensor:
    """Asks autograd for both gradients, moves both matrices, and looks at the product."""
    B, scaling = torch.zeros(G.shape[1], A.shape[0], dtype=A.dtype, requires_grad=True), alpha / A.shape[0]
    A = A.clone().requires_grad_(True)
    h = scaling * torch.einsum("ni,ri,or->no", x, A, B)
    dA, dB = torch.autograd.grad(h, (A, B), G)
    return (scaling * (B - lr * dB) @ (A - lr * dA)).detach()


def step_without(x: Tensor, G: Tensor, A: Tensor, lr: float) -> Tensor:
    return -lr * G.T @ x @ A.T @ A


first_update = Exercise("first_update", first_update_reference, draw_step, [
    (lambda x, G, A, alpha, lr: alpha / len(A) * step_without(x, G, A, lr),
     "the scaling counts twice: once in the gradient of B, once more when B enters the weight"),
    (lambda x, G, A, alpha, lr: step_without(x, G, A, lr), "the scaling alpha / r is missing, and it counts twice"),
    (lambda x, G, A, alpha, lr: alpha**2 * step_without(x, G, A, lr), "scaled by alpha, expected alpha / r"),
    (lambda x, G, A, alpha, lr: -(alpha / len(A))**2 * step_without(x, G, A, lr),
     "the sign: gradient descent subtracts the gradient"),
    (lambda x, G, A, alpha, lr: (alpha / len(A))**2 * step_without(x, G, A, 1.0), "the learning rate is missing"),
    (lambda x, G, A, alpha, lr: (alpha / len(A))**2 * step_without(x, G, A, lr) / len(x),
     "divided by N once too often: G is the gradient of the loss, so a mean is in it already"),
    (lambda x, G, A, alpha, lr: -lr * G.T @ x,
     "this is the step of full fine-tuning; LoRA moves B, and the weight moves by what A makes of it"),
    (lambda x, G, A, alpha, lr: -lr * alpha / len(A) * G.T @ (x @ A.T),
     "this is the step of B, (d_out, r); the weight moves by scaling times B A, (d_out, d_in)"),
    (lambda x, G, A, alpha, lr: (alpha / len(A))**2 * step_without(x, G, A, lr).T,
     "transposed: the weight is (d_out, d_in)"),
    (lambda x, G, A, alpha, lr: torch.zeros(G.shape[1], x.shape[1], dtype=x.dtype),
     "the weight does move: B leaves zero at the first step, though A stands still"),
    (lambda x, G, A, alpha, lr: (alpha / A.shape[1])**2 * step_without(x, G, A, lr),
     "this divides alpha by d_in; r is the number of A's rows"),
    (lambda x, G, A, alpha, lr: alpha / len(A)**2 * step_without(x, G, A, lr),
     "the scaling is squared whole: (alpha / r)^2, not alpha / r^2"),
    (lambda x, G, A, alpha, lr: (alpha / len(A))**2 * step_without(x, G, A, lr**2),
     "the learning rate counts once: one step was taken"),
    (lambda x, G, A, alpha, lr: alpha**2 / len(A) * step_without(x, G, A, lr),
     "the scaling is squared whole: (alpha / r)^2, not alpha^2 / r"),
])
