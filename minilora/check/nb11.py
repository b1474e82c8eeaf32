"""Notebook 11, 175B on a consumer GPU: a choice, an estimate, and four exercises from the count to the verdict."""

import random

import torch

from ..grading.models import Residual
from . import Estimate, Exercise, Prediction

enough = Prediction("d", {
    "a": "LoRA freezes the weights, and frozen weights still stand in memory: 325 GiB of them in 16 bits.",
    "b": "Four bits and their scales are little more than a quarter of sixteen, and that of 325 GiB is still 84.",
    "c": "Checkpointing and a short row shrink the activations, which are the smaller part here. The weights alone are "
         "over three cards' worth.",
    "d": "As long as all weights stand on the card, no way of storing or training them brings 175 billion under 24 "
         "GiB. They have to stand somewhere else.",
})

bus_seconds = Estimate([
    (0.5, "The base passes once in forward. Backward needs every layer again."),
    (1.5, "Are the weights written back? They are frozen: nothing returns."),
    (1.96, "That is the base in 16 bits, passing once."),
    (3.92, "That is the base in 16 bits; in NF4 it is about a quarter of that."),
], within=1.2)


def draw_decoder(seed: int) -> tuple[int, int, int, int]:
    return 2 + 3 * seed, 16 * (seed + 1), 1000 + 7 * seed, 128 + 32 * seed


def draw_any_decoder(number: int) -> tuple[int, int, int, int]:
    return random.randint(1, 12), 8 * random.randint(1, 12), random.randint(300, 3000), random.randint(60, 500)


def every_tensor(layers: int, d: int, vocab: int, context: int) -> int:
    attention = [(d, d), (d,)] * 4
    mlp = [(4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    norm = [(d,), (d,)]
    return sum(torch.Size(shape).numel() for shape in
               [(vocab, d), (context, d), *layers * (attention + mlp + 2 * norm), *norm])


gpt_parameters = Exercise("gpt_parameters", every_tensor, draw_decoder, [
    (lambda n, d, v, c: every_tensor(n, d, v, c) + v * d,
     "the head is counted beside the embedding: tied, they are one"),
    (lambda n, d, v, c: every_tensor(n, d, v, c) - c * d, "the positions are missing: one vector of width d for each"),
    (lambda n, d, v, c: every_tensor(n, d, v, c) - 2 * d, "the last norm is missing: it stands after the layers"),
    (lambda n, d, v, c: 12 * d * d * n + (v + c) * d, "these are the matrices alone: biases and norms are missing"),
    (lambda n, d, v, c: every_tensor(n, d, v, c) - 8 * d * d * n,
     "the MLP's two matrices have 4 d times d weights each"),
    (lambda n, d, v, c: every_tensor(n, d, v, c) - 4 * d * n - 2 * d,
     "the norms are missing: two a layer and one at the end, each a weight and a bias"),
    (lambda n, d, v, c: every_tensor(n, d, v, c) - 9 * d * n,
     "the biases of the linears are missing: 4 d in attention, 4 d + d in the MLP"),
    (lambda n, d, v, c: every_tensor(n, d, v, c) - 2 * d * d * n,
     "attention has four matrices: q, k, v and the output"),
    (lambda n, d, v, c: every_tensor(n, d, v, c) - v * d, "the token table is missing"),
    (lambda n, d, v, c: every_tensor(n, d, v, c) - 2 * d * n, "a layer has two norms, each with 2 d numbers"),
    (lambda n, d, v, c: every_tensor(n, d, v, c) - 2 * d * n - d, "a norm has a bias as well as a weight, 2 d in all"),
    (lambda n, d, v, c: every_tensor(n, d, v, c) - 3 * d * n, "the MLP's first bias has 4 d numbers, not d"),
    (lambda n, d, v, c: every_tensor(1, d, v, c), "this is one layer; there are many"),
    (lambda n, d, v, c: n * every_tensor(1, d, v, c),
     "the tables and the last norm stand there once, not in every layer"),
    (lambda n, d, v, c: every_tensor(n, d, v, c) - 4 * d * n,
     "attention's four biases are missing, d for each of q, k, v and the output"),
    (lambda n, d, v, c: every_tensor(n, d, v, c) - 5 * d * n, "the MLP's biases are missing: 4 d and d")],
    draw=draw_any_decoder, situations=[(lambda n, d, v, c: n == 1, "there is one layer"),
                                       (lambda n, d, v, c: n > 1, "there are several layers")])


# (need, usable): fits, not, overlapping, exactly at the edge, inside, fits by a hair, not by a hair, the other edge
RANGES = (((8, 11), (22, 23)), ((30, 41), (22, 23)), ((19, 24), (20, 23)), ((18, 22), (22, 23)),
          ((21, 22), (20, 23)), ((18, 22), (22.1, 24)), ((23.1, 29), (22, 23)), ((23, 29), (22, 23)))


def draw_ranges(number: int) -> tuple[tuple, tuple]:
    low, card = random.randint(5, 40), random.randint(10, 40)
    need, usable = (low, low + random.randint(0, 12)), (card, card + random.randint(0, 6))
    edge = random.choice((None, None, (need[0], need[1] + usable[0] - need[1]), (usable[1], usable[1] + 3)))
    return (need if edge is None or edge[0] > edge[1] else edge), usable


def judged(need, usable):
    if need[1] <= usable[0]:
        return "fits"
    return "does not fit" if need[0] > usable[1] else "too close to call"


def by(fits, not_at_all):
    def wrong(need, usable):
        return "fits" if fits(need, usable) else "does not fit" if not_at_all(need, usable) else "too close to call"
    return wrong


verdict = Exercise("verdict", judged, RANGES.__getitem__, [
    (by(lambda n, u: n[0] <= u[0], lambda n, u: n[0] > u[1]),
     "it fits for sure only if the most that it may need fits: compare need[1]"),
    (by(lambda n, u: n[1] <= u[1], lambda n, u: n[0] > u[1]),
     "it fits for sure only into the least that the card may have: compare with usable[0]"),
    (by(lambda n, u: n[1] <= u[0], lambda n, u: n[1] > u[1]),
     "it cannot fit only if even the least that it may need is too much: compare need[0]"),
    (by(lambda n, u: n[1] <= u[0], lambda n, u: n[0] > u[0]),
     "it cannot fit only if it is above the most that the card may have: compare with usable[1]"),
    (by(lambda n, u: n[1] < u[0], lambda n, u: n[0] >= u[1]), "exactly as much as there is does fit: <=, not <"),
    (lambda n, u: "fits" if n[0] + n[1] <= u[0] + u[1] else "does not fit",
     "the middles of two ranges settle nothing: where the ranges overlap it is too close to call"),
    (by(lambda n, u: n[1] <= u[0], lambda n, u: True),
     "between the two sure cases there is a third: too close to call"),
    (by(lambda n, u: n[0] > u[1], lambda n, u: n[1] <= u[0]), "the wrong way round: what is small fits"),
    (by(lambda n, u: n[1] < u[0], lambda n, u: n[0] > u[1]),
     "exactly as much as there is does fit: where need[1] equals usable[0] it is certain"),
    (by(lambda n, u: n[1] <= u[0], lambda n, u: n[0] >= u[1]),
     "exactly as much as there is may fit: where need[0] equals usable[1] it is too close to call"),
    (by(lambda n, u: n[1] <= u[1], lambda n, u: n[1] > u[1]), "the least of both ranges is not looked at"),
    (by(lambda n, u: n[0] <= u[0], lambda n, u: n[0] > u[0]), "the most of both ranges is not looked at"),
    (by(lambda n, u: sum(n) <= sum(u), lambda n, u: n[0] > u[1]),
     "the middles of two ranges settle nothing: it fits for sure only if need[1] <= usable[0]"),
    (by(lambda n, u: n[1] <= u[0], lambda n, u: sum(n) > sum(u)),
     "the middles of two ranges settle nothing: it cannot fit only if need[0] > usable[1]"),
    (by(lambda n, u: n[1] - n[0] <= u[1] - u[0], lambda n, u: n[0] > u[1]),
     "how wide the ranges are says nothing about what fits")],
    rounds=len(RANGES), draw=draw_ranges,
    situations=[(lambda n, u: n[1] == u[0], "the most that is needed is exactly the least that there is: it fits"),
                (lambda n, u: n[0] == u[1], "the least that is needed is exactly the most that there may be: "
                                            "too close to call"),
                (lambda n, u: n[1] <= u[0], "it fits for sure"), (lambda n, u: n[0] > u[1], "it cannot fit"),
                (lambda n, u: n[1] > u[0] and n[0] <= u[1], "the ranges overlap")])


def draw_layer(seed: int) -> tuple:
    d, rank = 4 + seed, 2
    layer = Residual(torch.randn(d, d))
    A, B = torch.randn(rank, d, requires_grad=True), torch.randn(d, rank, requires_grad=True)
    return layer, (torch.randn(3, d), A, B), torch.randn(3, d)  # x as from a frozen embedding


def by_hand(layer, inputs, grad):
    """Through torch.func, which needs no recording by the caller."""
    return torch.func.vjp(layer, *inputs)[1](grad)


def run_again(grad_of, detach=True, record=True):
    def wrong(layer, inputs, grad):
        with torch.set_grad_enabled(record):
            fresh = [t.detach().requires_grad_() for t in inputs] if detach else list(inputs)
            return grad_of(layer(*fresh), fresh, grad)
    return wrong


revisit = Exercise("revisit", by_hand, draw_layer, [
    (run_again(torch.autograd.grad, record=False),
     "nothing was recorded: inside backward autograd is off, so run the layer again under torch.enable_grad()"),
    (run_again(torch.autograd.grad, detach=False),
     "x does not require a gradient as it came: make fresh inputs, t.detach().requires_grad_()"),
    (run_again(lambda y, fresh, grad: torch.autograd.grad(y.sum(), fresh)),
     "grad is left out: what comes from above weighs every output; hand it to torch.autograd.grad as grad_outputs"),
    (run_again(lambda y, fresh, grad: torch.autograd.grad(y, fresh)),
     "y is no scalar: torch.autograd.grad also wants grad, what comes from above, as grad_outputs"),
    (run_again(lambda y, fresh, grad: torch.autograd.grad(y, fresh[:1], grad)),
     "the gradient of x alone: the adapter's A and B want theirs too"),
    (run_again(lambda y, fresh, grad: torch.autograd.grad(y, fresh[1:], grad)),
     "the gradient of x is missing: without it nothing reaches the layers below"),
    (run_again(lambda y, fresh, grad: y), "that is the layer's output once more; its gradients are wanted"),
    (run_again(lambda y, fresh, grad: torch.autograd.grad(y, fresh, grad)[::-1]),
     "the gradients stand in the reverse order: x, A, B"),
    (run_again(lambda y, fresh, grad: torch.autograd.grad(y, fresh, y)),
     "the output stands where grad belongs: what comes from above weighs every output"),
    (run_again(lambda y, fresh, grad: torch.autograd.grad((y - grad).square().sum(), fresh)),
     "grad is no target: it is the gradient of y already, and weighs every output"),
    (run_again(lambda y, fresh, grad: [g / len(grad) for g in torch.autograd.grad(y, fresh, grad)]),
     "divided by the rows: a mean is in grad already"),
    (run_again(lambda y, fresh, grad: [g.detach() for g in fresh]),
     "these are the inputs; their gradients are wanted")],
    recorded=False)


def draw_store(seed: int) -> tuple[int, int, int]:
    return (900, 40, 7000, 120)[seed % 4], (96, 12, 3, 33)[seed % 4], (1200, 30, 900, 121)[seed % 4]


def draw_any_store(number: int) -> tuple[int, int, int]:
    return random.randint(10, 5000), random.choice((3, random.randint(4, 100))), random.randint(10, 9000)


def played(layer: int, layers: int, head: int) -> tuple[int, int]:
    """Plays two steps with two slots, the second of them counted: shard i visits slot i % 2, the head is the last."""
    size, slots, held = [layer] * layers + [head], [None, None], 0
    for _ in range(2):
        moved = 0
        for now, ahead in [(i, i + 1) for i in range(layers)] + [(i, i - 1) for i in range(layers, 0, -1)] + [(0, 1)]:
            for i in (now, ahead):
                if slots[i % 2] != i:
                    slots[i % 2], moved = i, moved + size[i]
            held = max(held, sum(size[i] for i in slots))
    return held, moved


def turning(less):
    return lambda w, n, h: (w + max(w, h), (2 * n - less) * w + h)


streamed = Exercise("streamed", played, draw_store, [
    (lambda w, n, h: (n * w + h, (2 * n - 3) * w + h),
     "only two are on the card at once: the one that computes and the next"),
    (lambda w, n, h: (w, (2 * n - 3) * w + h), "while one computes, the next is on its way already: two are held"),
    (lambda w, n, h: (2 * w, (2 * n - 3) * w + h),
     "the head visits too, beside the last layer: it may be larger than a layer"),
    (lambda w, n, h: (w + h, (2 * n - 3) * w + h),
     "the head may be smaller than a layer: then two layers are the most"),
    (turning(0), "not every layer is fetched twice: the last is still there when backward begins, and the first two "
                 "when the next step begins"),
    (turning(1), "the last layer is still there when backward begins; and the first two, when the next step begins"),
    (turning(2), "one of three is missing: the last layer is there at the turn, and the first two are at the start"),
    (lambda w, n, h: (w + max(w, h), n * w + h), "backward visits the layers once more"),
    (lambda w, n, h: (w + max(w, h), 3 * n * w + h), "nothing is written back: a frozen weight only ever comes"),
    (lambda w, n, h: (w + max(w, h), (2 * n - 3) * w), "the head passes over the bus too, once"),
    (lambda w, n, h: (w + max(w, h), (2 * n - 3) * w + 2 * h),
     "the head comes once: it is the last forward and the first backward"),
    (lambda w, n, h: (w + max(w, h), 2 * (n * w + h)),
     "not everything is fetched twice: the head and the last layer are there at the turn, the first two at the start"),
    (lambda w, n, h: ((2 * n - 3) * w + h, w + max(w, h)), "first what is held at once, then what is moved"),
    (lambda w, n, h: (2 * w + h, (2 * n - 3) * w + h), "there are two slots, not three"),
    (lambda w, n, h: (max(w, h), (2 * n - 3) * w + h), "while one computes, the next is on its way: two are held")],
    draw=draw_any_store, situations=[(lambda w, n, h: h > w, "the head is larger than a layer"),
                                     (lambda w, n, h: h <= w, "the head is no larger than a layer"),
                                     (lambda w, n, h: n == 3, "there are three layers")])
