"""Wrong answers to the exercises of notebook 02, as learners may write them, and a part of what each must be told."""

import torch


def one_matrix(shapes, rank):
    total = 0
    for d_out, d_in in shapes:
        total += torch.zeros(rank, d_in).numel()
    return total


def multiplied(shapes, rank):
    return sum(d_out * rank * d_in for d_out, d_in in shapes)


def with_the_base(shapes, rank):
    base = sum(d_out * d_in for d_out, d_in in shapes)
    return base + sum(rank * (d_out + d_in) for d_out, d_in in shapes)


def as_if_square(shapes, rank):
    return sum(2 * rank * shape[1] for shape in shapes)


def tall(shapes, rank):
    return sum(shape[0] * rank * 2 for shape in shapes)


def assigned(shapes, rank):
    for d_out, d_in in shapes:
        total = rank * (d_out + d_in)
    return total


def one_too_many(shapes, rank):
    return sum(rank * (d_out + d_in + 1) for d_out, d_in in shapes)


def returns_early(shapes, rank):
    for d_out, d_in in shapes:
        return rank * (d_out + d_in)


def a_share(shapes, rank):
    return sum(rank * (o + i) for o, i in shapes) / sum(o * i for o, i in shapes)


def as_in_the_lesson(W0, A, B, alpha):
    return W0 + B @ A


def loud(W0, A, B, alpha):
    return W0 + alpha * torch.einsum("or,ri->oi", B, A)


def rank_from_the_wrong_axis(W0, A, B, alpha):
    rank = A.shape[1]
    return W0 + (alpha / rank) * B @ A


def swapped(W0, A, B, alpha):
    rank = A.shape[0]
    return W0 + (alpha / rank) * A @ B


def adds_in_place(W0, A, B, alpha):
    W0 += alpha / B.shape[1] * B @ A
    return W0


def minus(W0, A, B, alpha):
    return W0 - alpha / B.shape[1] * B @ A


def squared(delta, rank):
    S = torch.linalg.svdvals(delta)
    return 1 - (S[:rank]**2).sum() / (S**2).sum()


def adds_lengths(delta, rank):
    _, S, _ = torch.linalg.svd(delta)
    return S[rank:].sum() / S.sum()


def complement(delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    kept = U[:, :rank] * S[:rank] @ Vh[:rank]
    return 1 - kept.norm() / delta.norm()


def not_relative(delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return (delta - U[:, :rank] * S[:rank] @ Vh[:rank]).norm()


def counts_from_one(delta, rank):
    S = torch.linalg.svdvals(delta)
    return sum(float(s)**2 for s in S[rank + 1:])**0.5 / float(S.square().sum())**0.5


def whole_spectrum(delta, rank):
    S = torch.linalg.svdvals(delta)
    return S[rank:] / S.norm()


def scaled_once(x, G, A, alpha, lr):
    B = -lr * G.T @ (x @ A.T)
    return alpha / A.shape[0] * B @ A


def uphill(x, G, A, alpha, lr):
    scaling = alpha / A.shape[0]
    return lr * scaling**2 * (G.T @ x) @ (A.T @ A)


def full_fine_tuning(x, G, A, alpha, lr):
    return -lr * torch.einsum("no,ni->oi", G, x)


def stops_at_B(x, G, A, alpha, lr):
    return -lr * alpha / A.shape[0] * G.T @ x @ A.T


def mean_again(x, G, A, alpha, lr):
    scaling = alpha / A.shape[0]
    return -lr * scaling**2 * (G.T @ (x @ A.T) / x.shape[0]) @ A


def stuck(x, G, A, alpha, lr):
    return torch.zeros(G.shape[1], A.shape[0], dtype=x.dtype) @ A


WRONG = {
    "count_parameters": [
        (one_matrix, "A is counted, B is not"), (multiplied, "they do not multiply"),
        (with_the_base, "the frozen weights are counted too"), (as_if_square, "only a square matrix"),
        (tall, "A has r x d_in"), (assigned, "+= in place of ="), (one_too_many, "count_parameters([("),
        (returns_early, "only the first matrix is counted"), (a_share, "the question is how many")],
    "merged_weight": [
        (as_in_the_lesson, "the scaling alpha / r is missing"), (loud, "scaled by alpha, expected alpha / r"),
        (rank_from_the_wrong_axis, "this divides alpha by d_in"), (swapped, "B comes first"),
        (adds_in_place, "adds to W0 in place"), (minus, "added to W0, not taken away")],
    "best_rank_r_error": [
        (squared, "the root is missing"), (adds_lengths, "it is their squares that add"),
        (complement, "short sides of a right triangle"), (not_relative, "divide by the length of delta"),
        (counts_from_one, "S[r] is the first that does not fit"), (whole_spectrum, "(Tensor), expected 0.")],
    "first_update": [
        (scaled_once, "the scaling counts twice"), (uphill, "gradient descent subtracts"),
        (full_fine_tuning, "the step of full fine-tuning"), (stops_at_B, "the step of B"),
        (mean_again, "divided by N once too often"), (stuck, "B leaves zero at the first step")],
}
