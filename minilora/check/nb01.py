"""Notebook 01, what a training step keeps in memory: two choices, an estimate and three exercises."""

import random

import torch
from torch.autograd.graph import saved_tensors_hooks

from . import Estimate, Exercise, Prediction

state = Prediction("d", {
    "a": "4 bytes hold the weight alone. That is enough to use the model; to train it, each weight also needs a "
         "gradient and whatever the optimizer remembers.",
    "b": "8 bytes are the weight and its gradient: plain SGD. Adam also remembers something for every weight.",
    "c": "12 bytes leave room for one moment. Adam keeps two: the running mean of the gradient, and of its square.",
    "d": "The weight, its gradient and Adam's two moments: four numbers of 4 bytes.",
})

with_lora = Prediction("c", {
    "a": "That is how far the gradients and Adam's moments fall, and only they. The frozen weights stay in memory, and "
         "backward still passes through every layer.",
    "b": "That is where weights, gradients and moments go together: from 16 bytes a weight to 4. It is the limit for a "
         "model far larger than its batch; here the activations count too, and most of them stay.",
    "c": "Gradients and moments all but vanish. The weights stay, and so do most activations.",
    "d": "The weights do stay, but they are 4 of the 16 bytes a weight. The other 12 belong to weights that train.",
})

gpt3_gigabytes = Estimate([
    (0.001, "Is that in terabytes? The question asks for gigabytes."),
    (0.125, "These are the weights alone, in 16 bits. The paper's 350 GB is this number and nothing else."),
    (0.25, "These are the weights alone. Gradients and Adam's two moments are three times as much again."),
    (0.43, "That is the paper's 1.2 TB. It does not say what is in it, and plain fp32 Adam needs more."),
    (0.5, "These are the weights and the gradients. Adam's two moments are as much again."),
    (0.75, "Adam keeps two moments, and this leaves room for one."),
], within=1.2, far_above="Is that in bytes? The question asks for gigabytes.")

wire = Prediction("c", {
    "a": "That is how far the gradients fall, and with DDP nothing else travels. Here the weights travel too, frozen "
         "ones like the others: a block needs all of them to compute.",
    "b": "That would be so if a frozen block were gathered once. It computes twice, forward and backward, and backward "
         "needs its weights as much: the gradient passes through them.",
    "c": "Of three trips LoRA saves one: the gradients hardly travel. Every block is still gathered in forward and "
         "again in backward.",
    "d": "The adapters do add to what is gathered, but far less than the gradients of the frozen weights took.",
})


def draw_counts(seed: int) -> tuple[int, int]:
    """Some train, now and then all or none."""
    parameters = random.randint(10**6, 10**9)
    return parameters, random.choice((random.randint(1, parameters // 3),) * 4 + (parameters, 0))


def state_reference(parameters: int, trainable: int) -> int:
    return 4 * (parameters + 3 * trainable)


state_bytes = Exercise("state_bytes", state_reference, draw_counts, [
    (lambda p, t: 16 * p, "a frozen weight has no gradient and no moments; only the weight itself stays in memory"),
    (lambda p, t: 16 * t, "the frozen weights are missing: they do not train, but every step passes through them"),
    (lambda p, t: 4 * p, "these are the weights alone; the trainable ones also have a gradient and two moments"),
    (lambda p, t: 4 * p + 4 * t, "the gradients are counted, Adam's two moments are not"),
    (lambda p, t: 4 * p + 8 * t, "one number too few for each trainable weight: it has a gradient and two moments"),
    (lambda p, t: 4 * p + 16 * t, "each trainable weight is counted twice: it is already one of the parameters"),
    (lambda p, t: p + 3 * t, "this counts numbers; in fp32 each takes 4 bytes"),
    (lambda p, t: 8 * p + 8 * t, "a frozen weight has no gradient: gradients belong to the trainable weights alone"),
    (lambda p, t: 2 * (p + 3 * t), "these are 16 bits a number; in fp32 each takes 4 bytes"),
], situations=[(lambda p, t: t == p, "every weight trains"), (lambda p, t: t == 0, "no weight trains")])


def draw_chain(seed: int) -> tuple[list[int], list[bool]]:
    """Widths of a chain of linear layers, some of them alike, and which of the layers train, at least one. In turn: a
    frozen one lies above a trained one; the first trains; the last alone trains; all train."""
    layers = 4 + seed
    some = [random.random() < 0.5 for _ in range(layers - 3)]
    trains = [[False, True, False, *some], [True, False, True, *some], [False] * (layers - 1) + [True],
              [True] * layers][seed % 4]
    widths = random.sample(range(3, 60), layers + 1)
    widths[2], widths[4] = widths[0], widths[1]
    return widths, trains


def kept_reference(widths: list[int], trains: list[bool]) -> int:
    """Asks autograd: runs the chain on one token and counts what is saved, weights apart."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in zip(widths, widths[1:])))
    for layer, train in zip(layers, trains):
        layer.requires_grad_(train)
    saved, weights = {}, {p.untyped_storage().data_ptr() for p in layers.parameters()}
    with saved_tensors_hooks(lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        layers(torch.randn(1, widths[0]))
    return sum(t.numel() for place, t in saved.items() if place not in weights)


kept_floats = Exercise("kept_floats", kept_reference, draw_chain, [
    (lambda w, t: sum(w[:-1]), "a frozen layer keeps no input: to pass the gradient down it needs only its weight"),
    (lambda w, t: sum(w), "the last width is counted too: the network's last output is not an input of any layer"),
    (lambda w, t: sum(w[t.index(True):-1]),
     "above the first layer that trains, gradients do pass through frozen layers, but only a layer that trains needs "
     "its own input for that"),
    (lambda w, t: sum(b for b, train in zip(w[1:], t) if train),
     "these are the outputs; the gradient of a weight needs the input of its layer"),
    (lambda w, t: sum(a * b for a, b, train in zip(w, w[1:], t) if train),
     "these are the weights, which are in memory anyway; count the inputs that must be kept besides"),
    (lambda w, t: sum(a for a, train in zip(w, t) if not train),
     "the wrong way round: these are the inputs of the frozen layers"),
    (lambda w, t: sum(t), "this counts layers; each keeps as many numbers as its input is wide"),
    (lambda w, t: 4 * sum(a for a, train in zip(w, t) if train), "these are bytes; the question is how many numbers"),
    (lambda w, t: sum(a for a, train in zip(w[1:], t[1:]) if train),
     "the first layer is left out: if it trains, its input is kept too, for the gradient of its weight"),
    (lambda w, t: sum({a for a, train in zip(w, t) if train}),
     "two layers of the same width keep two inputs: a set counts a width once"),
    (lambda w, t: sum(a + b for a, b, train in zip(w, w[1:], t) if train),
     "inputs and outputs are counted: the gradient of a weight needs the input of its layer alone"),
    (lambda w, t: max(a for a, train in zip(w, t) if train), "this is the widest input; all of them are kept together"),
], situations=[(lambda w, t: t[0], "the first layer trains"), (lambda w, t: t[-1], "the last layer trains"),
               (lambda w, t: all(t), "every layer trains"),
               (lambda w, t: not all(t), "some layers are frozen")])


def draw_ring(seed: int) -> tuple[int, int]:
    workers = (2, 3, 5, 8)[seed % 4]
    return workers * random.randint(10**5, 10**8), workers


def ring_reference(trainable: int, workers: int) -> float:
    """Plays the ring through: in each round every worker hands one chunk, 1/workers of the gradients, to the next."""
    chunk, sent = 4 * trainable // workers, 0
    holds = [[1] * workers for _ in range(workers)]  # holds[w][c]: how many workers' gradients w has summed in chunk c
    while any(n != workers for held in holds for n in held):
        turn = sent // chunk
        for worker in range(workers):
            c, following = (worker - turn) % workers, holds[(worker + 1) % workers]
            following[c] = workers if holds[worker][c] == workers else holds[worker][c] + 1
        sent += chunk
    return float(sent)


ring_bytes = Exercise("ring_bytes", ring_reference, draw_ring, [
    (lambda t, n: 4.0 * t, "this is the size of the gradients; each worker sends nearly twice that: its chunks travel "
                           "round once to be summed and once more as sums"),
    (lambda t, n: 4.0 * t * (n - 1),
     "this sends all gradients to every other worker; a ring sends chunks of 1/workers"),
    (lambda t, n: 4.0 * t * (n - 1) / n, "this is the first half, the summing; the sums must still travel round"),
    (lambda t, n: 8.0 * t, "nearly: each half takes workers - 1 rounds, not workers"),
    (lambda t, n: 2.0 * t * (n - 1) / n, "this counts numbers; in fp32 each takes 4 bytes"),
    (lambda t, n: 8.0 * t * (n - 1), "this is what all workers send together; the question is one worker's share"),
    (lambda t, n: 8.0 * (n - 1) / n, "this is for a single gradient; there are as many as trainable weights"),
    (lambda t, n: 4.0 * t * (2 * n - 1) / n, "one round too many: workers - 1 to sum and workers - 1 to hand out"),
    (lambda t, n: 4.0 * t / n, "this is one chunk; a worker sends one in each of the 2 (workers - 1) rounds"),
], situations=[(lambda t, n: n == 2, "there are two workers"), (lambda t, n: n > 2, "there are more than two workers")],
   observe=lambda result, *_: float(result))
