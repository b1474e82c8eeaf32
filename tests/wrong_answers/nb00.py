"""Wrong answers to the exercises of notebook 00, as learners may write them, and a part of what each must be told."""

import torch


def base_alone(x, W, A, B, alpha):
    return torch.nn.functional.linear(x, W)


def as_in_a_blog(x, W, A, B, alpha):
    return x @ W.T + (x @ A.T) @ B.T


def loud(x, W, A, B, alpha):
    return x @ W.T + alpha * ((x @ A.T) @ B.T)


def rank_of_the_wrong_axis(x, W, A, B, alpha):
    rank = A.shape[1]
    return x @ W.T + alpha / rank * ((x @ A.T) @ B.T)


def update_alone(x, W, A, B, alpha):
    h = x @ A.T
    return h @ B.T * (alpha / A.shape[0])


def scales_all(x, W, A, B, alpha):
    return (alpha / A.shape[0]) * (x @ (W + B @ A).T)


def columns(x, W, A, B, alpha):
    return W @ x.T + alpha / A.shape[0] * B @ (A @ x.T)


def into_W(x, W, A, B, alpha):
    W += alpha / A.shape[0] * B @ A
    return x @ W.T


def no_base(customers, matrices, d_out, d_in, rank):
    return 4 * customers * matrices * d_out * d_in, 4 * customers * matrices * rank * (d_in + d_out)


def base_for_each(customers, matrices, d_out, d_in, rank):
    model = matrices * d_out * d_in
    return 4 * customers * model, 4 * customers * (model + matrices * rank * (d_in + d_out))


def one_model(customers, matrices, d_out, d_in, rank):
    model = 4 * matrices * d_out * d_in
    return model, model + customers * 4 * matrices * rank * (d_in + d_out)


def numbers(customers, matrices, d_out, d_in, rank):
    model = matrices * d_out * d_in
    return customers * model, model + customers * matrices * rank * (d_in + d_out)


def multiplied(customers, matrices, d_out, d_in, rank):
    model = 4 * matrices * d_out * d_in
    return customers * model, model + customers * rank * model


def half_precision(customers, matrices, d_out, d_in, rank):
    model = 2 * matrices * d_out * d_in
    return customers * model, model + customers * 2 * matrices * rank * (d_in + d_out)


def backwards(customers, matrices, d_out, d_in, rank):
    model = 4 * matrices * d_out * d_in
    return model + customers * 4 * matrices * rank * (d_in + d_out), customers * model


WRONG = {
    "lora_output": [
        (base_alone, "the second path"), (as_in_a_blog, "the scaling alpha / r is missing"),
        (loud, "scaled by alpha, expected alpha / r"), (rank_of_the_wrong_axis, "this divides alpha by d_in"),
        (update_alone, "the base is missing"), (scales_all, "the base is scaled too"), (columns, "one row an example"),
        (into_W, "changes its argument W in place")],
    "shelf_bytes": [
        (no_base, "the adapters need their base"), (base_for_each, "once a customer"),
        (one_model, "a model of its own"), (numbers, "each takes 4 bytes"), (multiplied, "not r d_in d_out"),
        (backwards, "first full fine-tuning"), (half_precision, "")],
}
