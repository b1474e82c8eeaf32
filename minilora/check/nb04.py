"""Notebook 04, rank and alpha: two choices and four exercises."""

import math
import random
import statistics
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from . import Exercise, Prediction

more_rank = Prediction("c", {
    "a": "Sixteen times the parameters are not sixteen times the strength: the scaling is alpha / r, so each of the "
         "new directions is as much quieter as there are more of them.",
    "b": "The update is shorter, but length is not learning. What became shorter is the part that has nothing to do "
         "with the gradient: r random directions at right angles, each 1/r as loud.",
    "c": "Along the gradient r directions pull together, each 1/r as loud: that part does not depend on r, and it "
         "is the part that learns. The rest of the update is chance, and it averages out as r grows.",
    "d": "It is true of the loss, but not of the update: its length is mostly chance, and that adds at right "
         "angles, as the root of r, while alpha / r takes away a whole r.",
})

double_alpha = Prediction("a", {
    "a": "alpha and the learning rate of B are one knob: double the one and halve the other, and not one bit of the "
         "run changes. So leave alpha alone, and tune the learning rate.",
    "b": "Adam does divide by the size of the gradient, so a louder alpha does not lengthen the steps of B. But "
         "alpha multiplies what these steps do to the output.",
    "c": "The learning rate of A need not move: A starts at its size and is not scaled by alpha. Only B, which "
         "starts at zero, is. (Halve both, and A must start at half its size and alpha must be four times as "
         "large.)",
    "d": "Nothing has to be searched again. One formula says where the old optimum went.",
})


def loudnesses(seed: int) -> tuple:
    return ((16, 8, 32, False), (16, 8, 32, True), (32, 64, 4, False), (12, 3, 48, True))[seed % 4]


def draw_loudness(number: int) -> tuple:
    return random.randint(1, 64), random.randint(1, 64), random.randint(1, 64), random.random() < 0.5


def found_by_scaling(alpha: float, rank: int, new_rank: int, use_rslora: bool) -> float:
    power = 0.5 if use_rslora else 1.0
    return alpha * math.exp(power * (math.log(new_rank) - math.log(rank)))


alpha_for = Exercise(
    "alpha_for", found_by_scaling, loudnesses,
    [(lambda alpha, rank, new_rank, use_rslora: float(alpha),
      "alpha is as before, so the scaling changes with the rank: that is the default, and not what is asked for here"),
     (lambda alpha, rank, new_rank, use_rslora: alpha * new_rank / rank,
      "right for alpha / r; with use_rslora the scaling is alpha / sqrt(r)"),
     (lambda alpha, rank, new_rank, use_rslora: alpha * math.sqrt(new_rank / rank),
      "right for alpha / sqrt(r); without use_rslora the scaling is alpha / r"),
     (lambda alpha, rank, new_rank, use_rslora: alpha * (rank / new_rank) ** (0.5 if use_rslora else 1),
      "the wrong way round: a larger rank divides by more, so alpha must grow with it"),
     (lambda alpha, rank, new_rank, use_rslora: alpha / (math.sqrt(rank) if use_rslora else rank),
      "that is the scaling; the question is which alpha gives it at the new rank"),
     (lambda alpha, rank, new_rank, use_rslora: alpha * (new_rank / rank) ** (1 if use_rslora else 0.5),
      "the two cases are exchanged: use_rslora is the one with the root"),
     (lambda alpha, rank, new_rank, use_rslora: alpha // rank * new_rank if not use_rslora else
      alpha * math.sqrt(new_rank / rank), "alpha // rank cuts the scaling down to a whole number: use /"),
     (lambda alpha, rank, new_rank, use_rslora: alpha * ((new_rank / rank) ** 2 if use_rslora else new_rank / rank),
      "rsLoRA divides by the root of r, so the ratio gets a root, not a square"),
     (lambda alpha, rank, new_rank, use_rslora: alpha * (math.sqrt(new_rank) / rank if use_rslora else new_rank / rank),
      "with use_rslora both ranks stand under the root"),
     (lambda alpha, rank, new_rank, use_rslora: float(round(found_by_scaling(alpha, rank, new_rank, use_rslora))),
      "alpha need not be a whole number: do not round it"),
     (lambda alpha, rank, new_rank, use_rslora: (new_rank / rank) ** (0.5 if use_rslora else 1),
      "that is the factor by which alpha must grow; multiply alpha by it")],
    draw=draw_loudness,
    situations=[(lambda alpha, rank, new_rank, use_rslora: use_rslora, "use_rslora is True"),
                (lambda alpha, rank, new_rank, use_rslora: not use_rslora, "use_rslora is False"),
                (lambda alpha, rank, new_rank, use_rslora: new_rank < rank, "the new rank is the smaller one"),
                (lambda alpha, rank, new_rank, use_rslora: new_rank > rank, "the new rank is the larger one")])


def power_laws(seed: int) -> tuple[list[float], list[float]]:
    x = [1.0, 4.0, 16.0, 64.0, 256.0][: 3 + seed % 3]
    if random.random() < 0.5:  # neither evenly spaced nor sorted
        x = [random.uniform(0.5, 200) for _ in range(4 + seed)]
    noise = torch.randn(len(x), dtype=torch.float64) * 0.2
    exponent = (-0.5 - 0.25 * seed) * random.choice((1, 1, -1))
    return x, [(3 + seed) * v ** exponent * math.exp(e) for v, e in zip(x, noise.tolist())]


def fitted(x: list[float], y: list[float], log_x: bool = True, log_y: bool = True) -> Tensor:
    """Least squares as a matrix division: slope, intercept."""
    u = torch.tensor([math.log(v) if log_x else v for v in x], dtype=torch.float64)
    w = torch.tensor([math.log(v) if log_y else v for v in y], dtype=torch.float64)
    return torch.linalg.lstsq(torch.stack([u, torch.ones_like(u)], 1), w[:, None]).solution[:, 0]


slope = Exercise(
    "slope", lambda x, y: fitted(x, y)[0].item(), power_laws,
    [(lambda x, y: fitted(x, y, False, False)[0].item(),
      "a power law is straight in the logarithms of x and of y"),
     (lambda x, y: fitted(x, y, False, True)[0].item(),
      "the logarithm of y alone finds an exponential: take that of x too"),
     (lambda x, y: fitted(x, y, True, False)[0].item(), "the logarithm of x alone will not do; take that of y too"),
     (lambda x, y: fitted(x, y)[1].item(), "that is the height of the line at x = 1, not its slope"),
     (lambda x, y: (math.log(y[-1]) - math.log(y[0])) / (math.log(x[-1]) - math.log(x[0])),
      "that joins the first point to the last; the best line takes those between into account"),
     (lambda x, y: fitted(y, x)[0].item(), "x and y are exchanged: y is the one that is explained"),
     (lambda x, y: -fitted(x, y)[0].item(), "the sign is wrong: a y that falls as x grows has a negative slope"),
     (lambda x, y: math.exp(fitted(x, y)[0].item()), "the slope of the line is itself the exponent: no exp"),
     (lambda x, y: sum(math.log(a) * math.log(b) for a, b in zip(x, y)) / sum(math.log(a)**2 for a in x),
      "this line goes through the origin, so c is 1: take the means away first, or fit a height as well"),
     (lambda x, y: statistics.fmean(math.log(y[i + 1] / y[i]) / math.log(x[i + 1] / x[i]) for i in range(len(x) - 1)),
      "that is the mean of the slopes from point to point; least squares weighs all points at once"),
     (lambda x, y: fitted(x, y)[0].abs().item(), "a y that falls as x grows has a negative slope: no abs")],
    tolerance=1e-4)


def one_layer(seed: int) -> tuple:
    N, d_in, d_out, r = 9 + seed, 6 + seed, 4 + 2 * seed, (2, 3, 1, 5)[seed % 4]
    options = {"dtype": torch.float64}
    return (torch.randn(N, d_in, **options), torch.randn(N, d_out, **options), torch.randn(r, d_in, **options),
            (8, 5, 3, 16)[seed % 4], (0.1, 0.02, 0.3, 0.01)[seed % 4])


def asked_of_adam(x: Tensor, G: Tensor, A: Tensor, alpha: float, lr: float) -> Tensor:
    """Lets torch's Adam take the step."""
    B = torch.zeros(G.shape[1], len(A), dtype=A.dtype, requires_grad=True)
    scaling = alpha / len(A)
    (scaling * (x @ A.T @ B.T) * G).sum().backward()
    torch.optim.Adam([B], lr=lr, eps=1e-30).step()
    return scaling * B.detach() @ A


first_adam_update = Exercise(
    "first_adam_update", asked_of_adam, one_layer,
    [(lambda x, G, A, alpha, lr: -lr * (alpha / len(A)) ** 2 * G.T @ (x @ A.T) @ A,
      "that is the step of plain gradient descent: Adam's first is lr in every entry, whatever the gradient's size"),
     (lambda x, G, A, alpha, lr: -lr * (alpha / len(A)) ** 2 * (G.T @ (x @ A.T)).sign() @ A,
      "the scaling counts once here: sign() takes it out of the gradient of B"),
     (lambda x, G, A, alpha, lr: -lr * (G.T @ (x @ A.T)).sign() @ A,
      "the scaling is missing: the effective weight is W + alpha / r * B A"),
     (lambda x, G, A, alpha, lr: -lr * alpha * (G.T @ (x @ A.T)).sign() @ A, "scaled by alpha, expected alpha / r"),
     (lambda x, G, A, alpha, lr: lr * alpha / len(A) * (G.T @ (x @ A.T)).sign() @ A,
      "that goes uphill: a step is taken against the gradient"),
     (lambda x, G, A, alpha, lr: -lr * (G.T @ x).sign(),
      "that is the step of full fine-tuning; here B alone moves, and A passes on what it sees"),
     (lambda x, G, A, alpha, lr: -lr * (G.T @ (x @ A.T)).sign(),
      "that is the step of B; the effective weight moves by alpha / r times that, times A"),
     (lambda x, G, A, alpha, lr: -lr * alpha / len(A) * (G.T @ (x @ A.T) @ A).sign(),
      "sign() belongs to the step of B, before A is multiplied on"),
     (lambda x, G, A, alpha, lr: -lr * alpha / A.shape[1] * (G.T @ (x @ A.T)).sign() @ A,
      "this divides alpha by d_in; r is the number of A's rows"),
     (lambda x, G, A, alpha, lr: -alpha / len(A) * (G.T @ (x @ A.T)).sign() @ A, "the learning rate is missing"),
     (lambda x, G, A, alpha, lr: -lr * alpha / math.sqrt(len(A)) * (G.T @ (x @ A.T)).sign() @ A,
      "this is rsLoRA's alpha / sqrt(r); here it is alpha / r"),
     (lambda x, G, A, alpha, lr: -lr * alpha / len(A) * (G.T @ (x @ A.T)) / (G.T @ (x @ A.T)).norm() @ A,
      "Adam divides every entry by its own size, not the matrix by its length: the sign of each entry is left")])


@dataclass
class Knobs:
    alpha: float
    A0: Tensor
    lr_A: float
    lr_B: float


def knobs(seed: int) -> tuple:
    p, q = ((2.0, 3.0), (0.5, 5.0), (7.0, 0.25), (1.5, 1.25))[seed % 4]
    return 16.0 + seed, torch.randn(2 + seed, 5, dtype=torch.float64), 0.01 * (seed + 1), 0.03, p, q


def draw_knobs(number: int) -> tuple:
    p, q = random.uniform(0.2, 8), random.uniform(0.2, 8)
    A0 = torch.randn(2 + number, 5, dtype=torch.float64)
    return random.uniform(1, 64), A0, random.uniform(0.01, 0.1), random.uniform(0.01, 0.1), p, q


def scaled(alpha: float, A0: Tensor, lr_A: float, lr_B: float, p: float, q: float) -> tuple:
    twin = Knobs(alpha, A0.clone(), lr_A, lr_B)
    twin.A0 *= p
    twin.lr_A *= p
    twin.lr_B *= q
    twin.alpha /= p
    twin.alpha /= q
    return astuple(twin)


twin = Exercise(
    "twin", scaled, knobs,
    [(lambda alpha, A0, lr_A, lr_B, p, q: (alpha * p * q, p * A0, p * lr_A, q * lr_B),
      "alpha is the wrong way round: B A has become p q times as long, so alpha must be divided by p q"),
     (lambda alpha, A0, lr_A, lr_B, p, q: (alpha / (p * q), A0, p * lr_A, q * lr_B),
      "A0 is as before: A must be p times its old self from the start, not in its steps alone"),
     (lambda alpha, A0, lr_A, lr_B, p, q: (alpha / (p * q), p * A0, lr_A / p, lr_B / q),
      "the learning rates are the wrong way round: an A that is p times as large needs steps p times as long"),
     (lambda alpha, A0, lr_A, lr_B, p, q: (alpha / (p * q), p * A0, lr_A, lr_B),
      "the learning rates are as before: Adam's steps do not grow by themselves with A and B"),
     (lambda alpha, A0, lr_A, lr_B, p, q: (alpha / (p * q), p * A0, p**2 * lr_A, q**2 * lr_B),
      "squares are what plain gradient descent needs; Adam takes the size out of the gradient, so p and q are enough"),
     (lambda alpha, A0, lr_A, lr_B, p, q: (alpha / (p * q), p * A0, q * lr_A, p * lr_B),
      "p and q are exchanged in the learning rates: p belongs to A, q to B"),
     (lambda alpha, A0, lr_A, lr_B, p, q: (alpha / (p + q), p * A0, p * lr_A, q * lr_B),
      "the factors multiply: B A is p q times as long, not p + q times"),
     (lambda alpha, A0, lr_A, lr_B, p, q: (alpha, p * A0, p * lr_A, q * lr_B),
      "alpha is as before, and so the update is p q times as loud"),
     (lambda alpha, A0, lr_A, lr_B, p, q: (alpha / p, p * A0, p * lr_A, q * lr_B),
      "alpha is divided by p alone: B has grown as well, by q"),
     (lambda alpha, A0, lr_A, lr_B, p, q: (alpha / q, p * A0, p * lr_A, q * lr_B),
      "alpha is divided by q alone: A has grown as well, by p"),
     (lambda alpha, A0, lr_A, lr_B, p, q: (alpha / (p * q), A0 / p, p * lr_A, q * lr_B),
      "A0 is the wrong way round: A is p times as large, so p * A0"),
     (lambda alpha, A0, lr_A, lr_B, p, q: (alpha / (p * q), p * A0, p * q * lr_A, p * q * lr_B),
      "each learning rate goes with its own matrix: p with A, q with B"),
     (lambda alpha, A0, lr_A, lr_B, p, q: (alpha / p / q, q * A0, p * lr_A, q * lr_B),
      "A0 is q times itself here: A is the one that is p times as large"),
     (lambda alpha, A0, lr_A, lr_B, p, q: (alpha / p / q, p * A0, q * lr_B, p * lr_A),
      "the learning rate of A comes before that of B")],
    draw=draw_knobs)
