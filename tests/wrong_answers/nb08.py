"""Wrong answers to the exercises of notebook 08, as learners may write them, and a part of what each must be told."""

import math

import torch


def stays_in_fp32(W, A, B, scaling):
    return torch.addmm(W.float(), B, A, alpha=scaling)


def rounds_the_update_first(W, A, B, scaling):
    delta = (scaling * B @ A).to(W.dtype)
    return W + delta


def casts_the_factors(W, A, B, scaling):
    return W + scaling * B.to(W.dtype) @ A.to(W.dtype)


def no_scaling(W, A, B, scaling):
    return (W.double() + B.double() @ A.double()).to(W.dtype)


def in_place(W, A, B, scaling):
    W += scaling * B @ A
    return W


def update_alone(W, A, B, scaling):
    return (scaling * B @ A).to(W.dtype)


def half_a_gap(w, bits):
    return 2 ** math.floor(math.log2(abs(w))) / 2 ** (bits + 1)


def gap_at_one(w, bits):
    return 1 / 2 ** bits


def in_proportion(w, bits):
    return abs(w) / 2 ** bits


def power_above(w, bits):
    _, exponent = math.frexp(w)
    return math.ldexp(1, exponent - bits)


def sign_forgotten(w, bits):
    return 2 ** (math.floor(math.log2(w)) - bits)


def decimal(w, bits):
    return 10 ** math.floor(math.log10(abs(w))) * 10.0 ** -bits


def no_root(W, delta):
    arrived = (W.float() + delta).to(W.dtype).float() - W.float()
    return (((arrived - delta) ** 2).sum() / (delta ** 2).sum()).item()


def of_the_weight(W, delta):
    merged = (W.double() + delta).to(W.dtype).double()
    return float((merged - W.double() - delta).norm() / W.double().norm())


def lengths_only(W, delta):
    arrived = (W.float() + delta).to(W.dtype).float() - W.float()
    return 1 - (arrived.norm() / delta.norm()).item()


def counts_the_still(W, delta):
    merged = (W.float() + delta).to(W.dtype)
    return (merged == W).sum().item() / W.numel()


def never_rounds(W, delta):
    arrived = (W.double() + delta.double()) - W.double()
    return float((arrived - delta).norm() / delta.norm())


def rounds_the_update(W, delta):
    return ((delta - delta.to(W.dtype).float()).norm() / delta.norm()).item()


@torch.no_grad()
def adds_and_subtracts(layer, updates, x):
    outputs = []
    for update in updates:
        layer.weight.add_(update)
        outputs.append(layer(x))
        layer.weight.sub_(update)
    return outputs


@torch.no_grad()
def keeps_an_alias(layer, updates, x):
    kept, outputs = layer.weight.data, []
    for update in updates:
        layer.weight += update
        outputs.append(layer(x))
        layer.weight.copy_(kept)
    return outputs


@torch.no_grad()
def restores_at_the_end(layer, updates, x):
    kept, outputs = layer.weight.clone(), []
    for update in updates:
        layer.weight += update
        outputs.append(layer(x))
    layer.weight.copy_(kept)
    return outputs


@torch.no_grad()
def never_restores(layer, updates, x):
    kept, outputs = layer.weight.clone(), []
    for update in updates:
        layer.weight.copy_(kept + update)
        outputs.append(layer(x))
    return outputs


def base_alone(layer, updates, x):
    return [layer(x) for update in updates]


WRONG = {
    "merged_once": [
        (stays_in_fp32, "left in fp32"), (rounds_the_update_first, "rounds twice"),
        (casts_the_factors, "A and B are rounded"), (no_scaling, "scaling is missing"), (in_place, "in place"),
        (update_alone, "update alone")],
    "gap": [
        (half_a_gap, "half the gap"), (gap_at_one, "grows with the number"), (in_proportion, "power of two below |w|"),
        (power_above, "power of two above"), (sign_forgotten, "may be negative"), (decimal, "not of 10")],
    "swallowed": [
        (no_root, "root is missing"), (of_the_weight, "share of W"), (lengths_only, "the same length can differ"),
        (counts_the_still, "counts the weights"), (never_rounds, "nothing here is rounded"),
        (rounds_the_update, "rounds the update alone")],
    "serve": [
        (adds_and_subtracts, "keep the weight"), (keeps_an_alias, "clone() it"),
        (restores_at_the_end, "on top of the first"), (never_restores, "last update is still"),
        (base_alone, "the base's outputs")],
}
