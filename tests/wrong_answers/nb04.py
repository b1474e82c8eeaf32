"""Wrong answers to the exercises of notebook 04, as learners may write them, and a part of what each must be told."""

import math

import numpy as np
import torch


def unchanged(alpha, rank, new_rank, use_rslora):
    return 1.0 * alpha


def forgets_rslora(alpha, rank, new_rank, use_rslora):
    scaling = alpha / rank
    return scaling * new_rank


def always_the_root(alpha, rank, new_rank, use_rslora):
    return alpha / rank**0.5 * new_rank**0.5


def upside_down(alpha, rank, new_rank, use_rslora):
    return alpha / math.sqrt(new_rank / rank) if use_rslora else alpha / (new_rank / rank)


def the_scaling(alpha, rank, new_rank, use_rslora):
    if use_rslora:
        return alpha * rank**-0.5
    return alpha * rank**-1


def flag_exchanged(alpha, rank, new_rank, use_rslora):
    return alpha * new_rank / rank if use_rslora else alpha * (new_rank / rank) ** 0.5


def plain_line(x, y):
    return np.polyfit(x, y, 1)[0]


def semi_log(x, y):
    return np.polyfit(x, np.log(y), 1)[0]


def other_semi_log(x, y):
    return np.polyfit(np.log(x), y, 1)[0]


def intercept(x, y):
    return np.polyfit(np.log(x), np.log(y), 1)[1]


def ends(x, y):
    return math.log(y[-1] / y[0]) / math.log(x[-1] / x[0])


def exchanged(x, y):
    return np.polyfit(np.log(y), np.log(x), 1)[0]


def both(x, y):
    return np.polyfit(np.log(x), np.log(y), 1)


def gradient_descent(x, G, A, alpha, lr):
    s = alpha / A.shape[0]
    B = -lr * s * G.T @ x @ A.T
    return s * B @ A


def scaled_twice(x, G, A, alpha, lr):
    s = alpha / A.shape[0]
    B = -lr * s * torch.sign(G.T @ x @ A.T)
    return s * B @ A


def unscaled(x, G, A, alpha, lr):
    return -lr * torch.sign(G.T @ x @ A.T) @ A


def uphill(x, G, A, alpha, lr):
    return alpha / A.shape[0] * lr * torch.sign(G.T @ x @ A.T) @ A


def whole(x, G, A, alpha, lr):
    return -lr * torch.sign(G.T @ x)


def of_b(x, G, A, alpha, lr):
    return -lr * torch.sign(G.T @ x @ A.T)


def sign_last(x, G, A, alpha, lr):
    return -lr * alpha / A.shape[0] * torch.sign(G.T @ x @ A.T @ A)


def louder(alpha, A0, lr_A, lr_B, p, q):
    return alpha * p * q, A0 * p, lr_A * p, lr_B * q


def same_start(alpha, A0, lr_A, lr_B, p, q):
    return alpha / p / q, A0, lr_A * p, lr_B * q


def slower(alpha, A0, lr_A, lr_B, p, q):
    return alpha / p / q, A0 * p, lr_A / p, lr_B / q


def same_rates(alpha, A0, lr_A, lr_B, p, q):
    return alpha / p / q, A0 * p, lr_A, lr_B


def squared(alpha, A0, lr_A, lr_B, p, q):
    return alpha / p / q, A0 * p, lr_A * p * p, lr_B * q * q


def crossed(alpha, A0, lr_A, lr_B, p, q):
    return alpha / p / q, A0 * p, lr_A * q, lr_B * p


def in_place(alpha, A0, lr_A, lr_B, p, q):
    A0 *= p
    return alpha / p / q, A0, lr_A * p, lr_B * q


def same_alpha(alpha, A0, lr_A, lr_B, p, q):
    return alpha, A0 * p, lr_A * p, lr_B * q


WRONG = {
    "alpha_for": [
        (unchanged, "the scaling changes with the rank"), (forgets_rslora, "with use_rslora the scaling"),
        (always_the_root, "without use_rslora"), (upside_down, "the wrong way round"),
        (the_scaling, "that is the scaling"), (flag_exchanged, "the two cases are exchanged")],
    "slope": [
        (plain_line, "straight in the logarithms"), (semi_log, "that of x too"), (other_semi_log, "that of y too"),
        (intercept, "not its slope"), (ends, "joins the first point to the last"), (exchanged, "x and y are exchanged"),
        (both, "(float)")],
    "first_adam_update": [
        (gradient_descent, "plain gradient descent"), (scaled_twice, "counts once"), (unscaled, "scaling is missing"),
        (uphill, "goes uphill"), (whole, "full fine-tuning"), (of_b, "the step of B; the effective"),
        (sign_last, "before A is multiplied on")],
    "twin": [
        (louder, "must be divided by p q"), (same_start, "A0 is as before"), (slower, "steps p times as long"),
        (same_rates, "the learning rates are as before"), (squared, "plain gradient descent"),
        (crossed, "p belongs to A"), (in_place, "changes its argument A0"), (same_alpha, "alpha is as before")],
}
