"""Notebook 08, merging: rounding once, the gap between numbers, what precision swallows, giving a weight back; two
choices, on latency and on drift."""

import math
import random

import torch
from torch import Tensor, nn

from . import Exercise, Prediction, is_number

HALF = (torch.bfloat16, torch.float16)


def draw_factors(seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Fractions of few digits: products and sums are exact in fp32, so every order of summing gives the same bits."""
    d_out, d_in, rank = 9 + seed, 14 - seed, 2 + seed % 2
    A, B, W = (torch.randint(-300, 301, shape) / 128 for shape in ((rank, d_in), (d_out, rank), (d_out, d_in)))
    return W.to(HALF[seed % 2]), A, B, (2.0, 0.5, 4.0, 0.25)[seed % 4]


def merged_reference(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Entry by entry, in Python's fp64; only the finished sum meets W's dtype."""
    rank, (d_out, d_in) = len(A), W.shape
    W64, A64, B64 = W.tolist(), A.tolist(), B.tolist()
    return torch.tensor([[W64[o][i] + scaling * sum(B64[o][r] * A64[r][i] for r in range(rank)) for i in range(d_in)]
                         for o in range(d_out)], dtype=torch.float64).to(W.dtype)


merged_once = Exercise("merged_once", merged_reference, draw_factors, [
    (lambda W, A, B, s: W + s * (B @ A),
     "the merged weight is left in fp32: it must take W's dtype, or the model doubles in size"),
    (lambda W, A, B, s: W + (s * (B @ A)).to(W.dtype),
     "this rounds twice: the update comes down to W's dtype before the sum. Add in fp32, and round the sum"),
    (lambda W, A, B, s: W + s * (B.to(W.dtype) @ A.to(W.dtype)),
     "A and B are rounded to W's dtype before they are multiplied: bring W up to fp32, not the update down"),
    (lambda W, A, B, s: (W + B @ A).to(W.dtype), "the scaling is missing: W + BA is another layer"),
    (lambda W, A, B, s: (W - s * (B @ A)).to(W.dtype), "the update is added to W, not taken away"),
    (lambda W, A, B, s: (s * (W + B @ A)).to(W.dtype), "W is scaled too; the scaling belongs to BA alone"),
    (lambda W, A, B, s: (s * (B @ A)).to(W.dtype), "this is the update alone; the merged weight holds W too"),
    (lambda W, A, B, s: W.add_(s * (B @ A)),
     "this changes W in place; W is the base's, and unmerging needs it"),
    (lambda W, A, B, s: (W.float() + s * s * (B @ A)).to(W.dtype), "the scaling counts once"),
    (lambda W, A, B, s: (W.float() + s / len(A) * (B @ A)).to(W.dtype),
     "scaling is alpha / r already: do not divide by r once more"),
    (lambda W, A, B, s: (W.float() + s * (B @ A)).to(torch.bfloat16),
     "the result takes W's dtype, which need not be bf16: .to(W.dtype)"),
    (lambda W, A, B, s: (W.float() + s * (B @ A)).half(), "the result takes W's dtype, which need not be fp16"),
], tolerance=0, situations=[(lambda W, A, B, s: W.dtype == torch.bfloat16, "W is in bf16"),
                            (lambda W, A, B, s: W.dtype == torch.float16, "W is in fp16")])


def gap_reference(w: float, bits: int) -> float:
    """frexp gives w = m 2^e with m from 1/2 on, so that the digit before the point stands at 2^(e - 1)."""
    return math.ldexp(1.0, math.frexp(w)[1] - 1 - bits)


def draw_weight(number: int) -> tuple[float, int]:
    """Every other one is a power of two."""
    power = random.uniform(-12, 12) if number % 2 else random.randint(-12, 12)
    return random.choice((-1, 1)) * 2.0 ** power, random.choice((7, 10, 23, 3, 52))


def floor_log(w: float) -> int:
    return math.floor(math.log2(abs(w)))


gap = Exercise("gap", gap_reference, lambda seed: ((0.8, -3.0, 1.3, 0.01, 1.0, -4.0)[seed],
                                                   (7, 10, 23, 7, 10, 7)[seed]), [
    (lambda w, bits: 2.0 ** (floor_log(w) - bits - 1),
     "this is half the gap: the most that rounding can be off. `bits` counts the stored digits; the first is extra"),
    (lambda w, bits: 2.0 ** -bits, "the gap grows with the number: 2^-bits is the one between 1 and 2 alone"),
    (lambda w, bits: abs(w) * 2.0 ** -bits,
     "the gap is the same from one power of two to the next: take the power of two below |w|, not |w| itself"),
    (lambda w, bits: w * 2.0 ** -bits,
     "the gap is the same from one power of two to the next: take the power of two below |w|, not w itself"),
    (lambda w, bits: 2.0 ** (math.ceil(math.log2(abs(w))) - bits),
     "this takes the power of two above |w|: it is the one below that counts, floor in place of ceil"),
    (lambda w, bits: 2.0 ** (round(math.log2(abs(w))) - bits),
     "this takes the nearest power of two: it is the one below |w| that counts, floor in place of round"),
    (lambda w, bits: 2.0 ** (int(math.log2(abs(w))) - bits),
     "int rounds towards zero, which for a number below 1 is up: math.floor takes the power of two below"),
    (lambda w, bits: 2.0 ** (math.floor(math.log2(w)) - bits), "a weight may be negative: take the size of w first"),
    (lambda w, bits: 10.0 ** (math.floor(math.log10(abs(w))) - bits), "the digits are binary: powers of 2, not of 10"),
    (lambda w, bits: 2.0 ** floor_log(w), "this is the power of two below |w|; its last digit is 2^bits times finer"),
    (lambda w, bits: 2.0 ** (floor_log(w) - bits + 1),
     "this is twice the gap: it takes the power of two above |w| (math.frexp gives that one), not the one below"),
    (lambda w, bits: 2.0 ** (math.ceil(math.log2(abs(w))) - 1 - bits),
     "a power of two is itself the power of two below: ceil - 1 is one too low there, floor is right"),
    (lambda w, bits: 2.0 ** (math.floor(math.log(abs(w))) - bits), "math.log has the base e; the digits are binary: "
                                                                   "math.log2"),
    (lambda w, bits: math.ulp(w), "math.ulp is the gap of Python's own numbers, with 52 digits after the first"),
    (lambda w, bits: math.copysign(2.0 ** (floor_log(w) - bits), w), "a distance has no sign"),
], rounds=6, draw=draw_weight,
    situations=[(lambda w, bits: w < 0, "w is negative"), (lambda w, bits: math.frexp(abs(w))[0] == 0.5,
                                                           "w is a power of two: there the gap above counts"),
                (lambda w, bits: abs(w) < 1, "w is smaller than 1"), (lambda w, bits: abs(w) >= 1, "w is 1 or more"),
                (lambda w, bits: bits != 52, "the format is coarser than Python's own numbers")])


def draw_update(seed: int) -> tuple[Tensor, Tensor]:
    """The last two: a sum that is half a gap only if the update is rounded before it."""
    if seed > 3:
        digits = (7, 10)[seed % 2]  # of the dtype, after the first
        half_a_gap = 2.0 ** (torch.randint(-2, 3, (6, 5)) - digits - 1)  # of W below
        return (half_a_gap * 2 ** (digits + 1)).to(HALF[seed % 2]), half_a_gap * (1 + 2.0 ** (-digits - 2))
    W = torch.randn(11 + seed, 13).to(HALF[seed % 2])
    return W, torch.randn(11 + seed, 13) * (0.003, 0.0005, 0.05, 0.002)[seed]


def swallowed_reference(W: Tensor, delta: Tensor) -> float:
    """One weight after another, with Python's numbers."""
    sums = (W.double() + delta.double()).to(W.dtype)
    lost = [(m - w - d)**2 for m, w, d in zip(*(t.flatten().tolist() for t in (sums, W, delta)))]
    return math.sqrt(math.fsum(lost)) / math.sqrt(math.fsum(d * d for d in delta.flatten().tolist()))


def by_arrival(share):
    """The mistake that makes `share` of the update that arrived, the one that was meant, and W."""
    return lambda W, delta: share((W.float() + delta).to(W.dtype).float() - W.float(), delta, W.float()).item()


swallowed = Exercise("swallowed", swallowed_reference, draw_update, [
    (by_arrival(lambda arrived, delta, W: (arrived - delta).square().sum() / delta.square().sum()),
     "this is the squared share; the root is missing"),
    (by_arrival(lambda arrived, delta, W: (arrived - delta).norm() / W.norm()),
     "this is a share of W; the question is which share of the update is lost"),
    (by_arrival(lambda arrived, delta, W: (arrived - delta).norm() / (W + delta).norm()),
     "this is a share of the merged weight; the question is which share of the update is lost"),
    (by_arrival(lambda arrived, delta, W: (arrived - delta).norm()),
     "this is the length of what is lost; divide by the length of the update"),
    (by_arrival(lambda arrived, delta, W: (arrived - delta).norm() / arrived.norm()),
     "divided by what arrived; the share is of the update as it was meant"),
    (by_arrival(lambda arrived, delta, W: 1 - arrived.norm() / delta.norm()),
     "two updates of the same length can differ all the same: take the length of the difference"),
    (by_arrival(lambda arrived, delta, W: arrived.norm() / delta.norm()),
     "this is the length of what arrived; the question is what is lost, the difference from the update"),
    (by_arrival(lambda arrived, delta, W: (arrived == 0).float().mean()),
     "this counts the weights that did not move; those that moved too far or not far enough lose something too"),
    (lambda W, delta: ((W.float() + delta - W.float() - delta).norm() / delta.norm()).item(),
     "nothing here is rounded to W's dtype: bring the sum down to it, then see what arrived"),
    (lambda W, delta: ((delta.to(W.dtype).float() - delta).norm() / delta.norm()).item(),
     "this rounds the update alone; it is the sum, far larger, that has to fit W's dtype"),
    (lambda W, delta: (((W + delta.to(W.dtype)).float() - W.float() - delta).norm() / delta.norm()).item(),
     "this rounds twice: the update comes down to W's dtype before the sum. Add in fp32, and round the sum"),
    (by_arrival(lambda arrived, delta, W: (arrived - delta).abs().sum() / delta.abs().sum()),
     "this adds absolute values; the length is the root of the sum of the squares: norm()"),
    (by_arrival(lambda arrived, delta, W: ((arrived - delta) / delta).abs().mean()),
     "this is the mean of the shares, weight by weight; the question is one length over the other"),
    (by_arrival(lambda arrived, delta, W: (arrived - delta).abs().max() / delta.abs().max()),
     "this takes the largest entries; the length counts all of them: norm()"),
    (by_arrival(lambda arrived, delta, W: 100 * (arrived - delta).norm() / delta.norm()),
     "that is in percent; the share is from 0 on"),
], rounds=6, situations=[(lambda W, delta: W.dtype == torch.bfloat16, "W is in bf16"),
                         (lambda W, delta: W.dtype == torch.float16, "W is in fp16")],
   tolerance=1e-4, observe=lambda share, W, delta: 0.0 if is_number(share) and share < 1e-3 else share)


def draw_visits(seed: int) -> tuple[nn.Linear, list[Tensor], Tensor]:
    d_in, d_out = 12 + seed, 15 - seed
    return (nn.Linear(d_in, d_out, bias=seed % 2 == 1), [0.5 * torch.randn(d_out, d_in) for _ in range(3)],
            torch.randn(2 + seed, d_in))


def through(layer, weight, x):
    return x @ weight.T + (0 if layer.bias is None else layer.bias.detach())


def served(layer, updates, x):
    return [through(layer, layer.weight.detach() + update, x) for update in updates]


@torch.no_grad()
def subtracts(layer, updates, x):
    outputs = []
    for update in updates:
        layer.weight += update
        outputs.append(layer(x))
        layer.weight -= update
    return outputs


def piles_up(restores: bool):
    """Each update on top of the one before; the weight brought back at the end or never."""
    def serve(layer, updates, x):
        sums = [layer.weight.detach() + sum(updates[:n + 1]) for n in range(len(updates))]
        if not restores:
            layer.weight.data = layer.weight.detach() + updates[0] + updates[1] + updates[2]
        return [through(layer, W, x) for W in sums]
    return serve


def leaves_the_last(layer, updates, x):
    outputs = served(layer, updates, x)
    layer.weight.data = layer.weight.detach() + updates[-1]
    return outputs


def changes_updates(layer, updates, x):
    outputs = served(layer, updates, x)
    for update in updates:
        update += layer.weight.detach()
    return outputs


def served_state(outputs, layer, updates, x):
    kept = [layer.weight.detach(), *(() if layer.bias is None else (layer.bias.detach(),))]
    return {"the outputs": list(outputs) if isinstance(outputs, (list, tuple)) else outputs,
            "the bits of the weight": kept[0].view(torch.int32), "the bias": kept[1:],
            "the updates afterwards": updates, "x afterwards": x}


serve = Exercise("serve", served, draw_visits, [
    (subtracts, "subtracting does not bring the last bits back: keep the weight, and put that one back"),
    (piles_up(restores=False),
     "every update comes on top of the one before, and stays. If you kept the weight, is it a copy? An in-place sum "
     "changes every name of the same tensor: clone() it"),
    (piles_up(restores=True), "the second update comes on top of the first: go back to the weight you kept in between"),
    (leaves_the_last, "the last update is still in the weight: put back what you kept at the end too"),
    (lambda layer, updates, x: [layer(x) for _ in updates], "these are the base's outputs: no update is in the weight"),
    (lambda layer, updates, x: [x @ update.T for update in updates],
     "these are the outputs of the updates alone: the weight belongs to the sum"),
    (lambda layer, updates, x: [through(layer, update, x) for update in updates],
     "the update has taken the weight's place: it is added to the weight"),
    (lambda layer, updates, x: [x @ (layer.weight.detach() + update).T for update in updates],
     "the layer's bias is left out: call the layer itself"),
    (lambda layer, updates, x: served(layer, updates, x)[-1],
     "this is the last output alone: collect one for each update"),
    (lambda layer, updates, x: served(layer, [sum(updates)], x) * len(updates),
     "all updates are in the weight at once: each customer has one of them"),
    (lambda layer, updates, x: [through(layer, layer.weight.detach() - update, x) for update in updates],
     "the update is added to the weight, not taken away"),
    (lambda layer, updates, x: served(layer, updates, x)[::-1], "the outputs stand in the reverse order"),
    (changes_updates, "the updates are changed in place: they belong to the customers, who come again"),
], in_place=True, observe=served_state, situations=[
    (lambda layer, updates, x: layer.bias is not None, "the layer has a bias"),
    (lambda layer, updates, x: layer.bias is None, "the layer has no bias")])


latency = Prediction("c", {
    "a": "They do not run side by side: the base's product, then two thin ones and a sum, one after the other.",
    "b": "That is how much more arithmetic it is. But the clock counts operators too, each with a cost of its own, "
         "however small its matrices; on a single token that is most of the time.",
    "c": "There are more than half as many operators again, each with a cost of its own, and on a single token the "
         "thin products cost nearly as much as the thick ones.",
    "d": "Two thin products and a sum to every linear are more work, but attention, norms and the head have none.",
})

thousand = Prediction("d", {
    "a": "The sum is rounded, and what rounding took the subtraction cannot know. Only a weight and an update that "
         "need no more digits than there are come back.",
    "b": "So it would be if every cycle made the same new error. But after the first the weight has moved to where the "
         "sum is rounded to the same number again, and that one is hit for ever.",
    "c": "So it would be if every cycle rolled dice. Rounding does not: the same weight and the same update give the "
         "same sum.",
    "d": "The first cycle moves a weight to a place from where adding and subtracting this update leads back to it. "
         "Every later cycle goes round the same ring.",
})
