"""Notebook 00, LoRA in thirty minutes: a choice, the layer itself, and what a shelf of customers costs."""

import random

import torch
from torch import Tensor

from . import Exercise, Prediction

how_close = Prediction("b", {
    "a": "A base that knows its job has only to be told how to say it. A few thousand numbers a matrix are enough for "
         "that.",
    "b": "The base can do the job already, so a small correction is enough. The two curves end close together.",
    "c": "The base is frozen, but it is in every output. What trains is added to it, and starts at exactly nothing.",
})


def draw_layer(number: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """x (N, d_in), W (d_out, d_in), A (r, d_in), B (d_out, r), alpha; all sizes differ."""
    d_in, d_out, rank = 9 + number, 16 - number, 2 + number
    shapes = (4 + number, d_in), (d_out, d_in), (rank, d_in), (d_out, rank)
    return (*(torch.randn(shape, dtype=torch.float64) for shape in shapes), random.choice((4.0, 10.0, 16.0, 3.0)))


def by_examples(x: Tensor, W: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """One example after another, each through the one merged matrix."""
    merged = W + alpha / len(A) * torch.einsum("or,ri->oi", B, A)
    return torch.stack([torch.mv(merged, row) for row in x])


def added(update):
    """The mistake that adds `update(x, A, B, alpha)` to the base's output."""
    return lambda x, W, A, B, alpha: x @ W.T + update(x, A, B, alpha)


lora_output = Exercise("lora_output", by_examples, draw_layer, [
    (added(lambda x, A, B, alpha: 0), "these are the base's outputs: the second path, through A and B, is missing"),
    (added(lambda x, A, B, alpha: x @ A.T @ B.T), "the scaling alpha / r is missing"),
    (added(lambda x, A, B, alpha: alpha * x @ A.T @ B.T), "scaled by alpha, expected alpha / r"),
    (added(lambda x, A, B, alpha: alpha / A.shape[1] * x @ A.T @ B.T),
     "this divides alpha by d_in; r is the number of A's rows"),
    (added(lambda x, A, B, alpha: alpha / len(B) * x @ A.T @ B.T),
     "this divides alpha by d_out; r is the number of B's columns"),
    (added(lambda x, A, B, alpha: alpha / len(A) ** 0.5 * x @ A.T @ B.T),
     "this is rsLoRA's alpha / sqrt(r); here it is alpha / r"),
    (added(lambda x, A, B, alpha: -alpha / len(A) * x @ A.T @ B.T), "the second path is added, not taken away"),
    (lambda x, W, A, B, alpha: alpha / len(A) * x @ A.T @ B.T, "the base is missing: x goes through W as well"),
    (lambda x, W, A, B, alpha: alpha / len(A) * (x @ W.T + x @ A.T @ B.T),
     "the base is scaled too: alpha / r belongs to the second path alone"),
    (lambda x, W, A, B, alpha: by_examples(x, W, A, B, alpha).T, "transposed: one row an example, (N, d_out)"),
    (lambda x, W, A, B, alpha: x @ W + alpha / len(A) * x @ A @ B,
     "inputs are rows here, so every matrix is transposed: x @ W.T"),
])


def draw_shelf(number: int) -> tuple[int, int, int, int, int]:
    d_out, d_in = random.randint(50, 400), random.randint(50, 400)
    return random.randint(2, 60), random.randint(1, 200), d_out, d_in, random.randint(1, 16)


def on_the_shelf(customers: int, matrices: int, d_out: int, d_in: int, rank: int) -> tuple[int, int]:
    whole = sum(torch.Size((d_out, d_in)).numel() for _ in range(matrices))
    thin = sum(torch.Size(shape).numel() for shape in matrices * [(rank, d_in), (d_out, rank)])
    return sum(4 * whole for _ in range(customers)), 4 * whole + sum(4 * thin for _ in range(customers))


shelf_bytes = Exercise("shelf_bytes", on_the_shelf, draw_shelf, [
    (lambda n, m, o, i, r: (4 * n * m * o * i, 4 * n * m * r * (o + i)),
     "the adapters need their base: one copy of it, for all customers together"),
    (lambda n, m, o, i, r: (4 * n * m * o * i, 4 * n * m * (o * i + r * (o + i))),
     "the base stands there once, not once a customer: it is frozen, so all can share it"),
    (lambda n, m, o, i, r: (4 * m * o * i, 4 * m * o * i + 4 * n * m * r * (o + i)),
     "with full fine-tuning every customer has a model of its own"),
    (lambda n, m, o, i, r: (n * m * o * i, m * o * i + n * m * r * (o + i)),
     "these are numbers; in fp32 each takes 4 bytes"),
    (lambda n, m, o, i, r: (4 * n * m * o * i, 4 * m * o * i + 4 * n * m * r * o * i),
     "A and B have r (d_in + d_out) numbers together, not r d_in d_out"),
    (lambda n, m, o, i, r: (4 * n * m * o * i, 4 * m * o * i + 4 * m * r * (o + i)),
     "that is one adapter; every customer has its own"),
    (lambda n, m, o, i, r: (4 * n * o * i, 4 * o * i + 4 * n * r * (o + i)),
     "that is one matrix; the model has several, and each gets an A and a B"),
    (lambda n, m, o, i, r: on_the_shelf(n, m, o, i, r)[::-1], "first full fine-tuning, then LoRA"),
    (lambda n, m, o, i, r: (4 * n * m * o * i, 4 * m * o * i + 4 * n * m * 2 * r * i),
     "only a square matrix has r x d_in entries twice: B has d_out x r"),
])
