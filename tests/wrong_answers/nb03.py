"""Wrong answers to the exercises of notebook 03, as learners may write them, and a part of what each must be told."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn


def substring(names, targets):
    found = []
    for name in names:
        for target in targets:
            if target in name:
                found.append(name)
                break
    return found


def no_dot(names, targets):
    return [name for name in names if name.endswith(tuple(targets))]


def exact(names, targets):
    return [name for name in names if name in set(targets)]


def last_part(names, targets):
    return [name for name in names if name.rpartition(".")[2] in targets]


def by_target(names, targets):
    found = []
    for target in targets:
        found += [name for name in names if name == target or name.endswith("." + target)]
    return found


def a_set(names, targets):
    return {name for name in names if any(name == t or name.endswith("." + t) for t in targets)}


def lazy(names, targets):
    return filter(lambda name: any(("." + name).endswith("." + t) for t in targets), names)


def not_frozen(model, target, layer):
    for name, module in list(model.named_modules()):
        if name.split(".")[-1] == target:
            setattr(model.get_submodule(name.rpartition(".")[0]), target, layer(module))
    return model


def frozen_last(model, target, layer):
    not_frozen(model, target, layer)
    for p in model.parameters():
        p.requires_grad = False
    return model


def top_level_only(model, target, layer):
    model.requires_grad_(False)
    for name, child in model.named_children():
        if name == target:
            setattr(model, name, layer(child))
    return model


def every_linear(model, target, layer):
    for p in model.parameters():
        p.requires_grad = False
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer(module))
    return model


def stops_early(model, target, layer):
    model.requires_grad_(False)
    for parent in model.modules():
        if hasattr(parent, target):
            setattr(parent, target, layer(getattr(parent, target)))
            break
    return model


def walk(passes):
    """The right walk, but for the comparison of the names."""
    def wrap(model, target, layer):
        model.requires_grad_(False)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if passes(name, target):
                    setattr(parent, name, layer(child))
        return model
    return wrap


same = walk(lambda name, target: name == target)


def no_return(model, target, layer):
    same(model, target, layer)


def in_vain(model, target, layer):
    for child in model.children():
        if child == target:
            child = layer(child)
    return model


def on_a_copy(model, target, layer):
    return same(deepcopy(model), target, layer)


class LoRA(nn.Module):
    def __init__(self, base_layer, rank=8):
        super().__init__()
        d_out, d_in = base_layer.weight.shape
        self.base_layer = base_layer
        self.A, self.B = nn.Parameter(torch.randn(rank, d_in)), nn.Parameter(torch.zeros(d_out, rank))

    def forward(self, x):
        return self.base_layer(x) + x @ self.A.T @ self.B.T


def by_its_name(model, target, layer):
    return same(model, target, LoRA)


def by_the_weights(shapes, budget):
    weights = sum(d_out * d_in for d_out, d_in in shapes)
    return min(budget // weights, min(min(s) for s in shapes))


def no_limit(shapes, budget):
    rank = 0
    while sum((rank + 1) * (o + i) for o, i in shapes) <= budget:
        rank += 1
    return rank


def at_least_one(shapes, budget):
    rank = 1
    while sum((rank + 1) * (o + i) for o, i in shapes) <= budget and rank < min(min(s) for s in shapes):
        rank += 1
    return rank


def strictly_below(shapes, budget):
    rank = 0
    while sum((rank + 1) * (o + i) for o, i in shapes) < budget and rank < min(min(s) for s in shapes):
        rank += 1
    return rank


def the_roomiest(shapes, budget):
    return min(budget // sum(o + i for o, i in shapes), max(min(s) for s in shapes))


def a_fraction_without_a_limit(shapes, budget):
    return budget / sum(o + i for o, i in shapes)


def half_a_fraction(shapes, budget):
    rank = budget / sum(o + i for o, i in shapes)
    return 0 if rank < 1 else min(rank, min(min(s) for s in shapes))


def a_fraction(shapes, budget):
    return min(budget / sum(o + i for o, i in shapes), min(min(s) for s in shapes))


def trained_with(loss_of, clear=True):
    """The loop by PyTorch's own optimizer, for a loss of (logits, ids, reply)."""
    def fit(model, ids, reply, lr, steps):
        losses, descent = [], torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
        for _ in range(steps):
            loss = loss_of(model(ids), ids, reply)
            if clear:
                descent.zero_grad()
            loss.backward()
            descent.step()
            losses.append(loss.item())
        return losses
    return fit


def every_token(logits, ids, reply):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def same_place(logits, ids, reply):
    return F.cross_entropy(logits.flatten(0, 1), ids.masked_fill(~reply, -100).flatten())


def mask_of_the_input(logits, ids, reply):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].masked_fill(~reply[:, :-1], -100).flatten())


def mask_of_the_prompt(logits, ids, reply):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].masked_fill(reply[:, 1:], -100).flatten())


def masked(logits, ids, reply, reduction="mean"):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].masked_fill(~reply[:, 1:], -100).flatten(),
                           reduction=reduction)


def zeros_count(logits, ids, reply):
    """The mask times the losses, but the mean is over all places."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * reply[:, 1:]).mean()


def a_mean_a_row(logits, ids, reply):
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none") * reply[:, 1:]
    return (losses.sum(1) / reply[:, 1:].sum(1)).mean()


def climbing(model, ids, reply, lr, steps):
    losses = []
    for _ in range(steps):
        loss = masked(model(ids), ids, reply)
        gradients = torch.autograd.grad(loss, list(model.head.parameters()))
        with torch.no_grad():
            for p, gradient in zip(model.head.parameters(), gradients):
                p += lr * gradient
        losses.append(float(loss))
    return losses


def unfreezes(model, ids, reply, lr, steps):
    for p in model.parameters():
        p.requires_grad = True
    return trained_with(masked)(model, ids, reply, lr, steps)


def forgets_the_list(model, ids, reply, lr, steps):
    trained_with(masked)(model, ids, reply, lr, steps)


def a_local_name(model, ids, reply, lr, steps):
    losses = []
    for _ in range(steps):
        loss = masked(model(ids), ids, reply)
        model.zero_grad()
        loss.backward()
        for p in model.parameters():
            if p.requires_grad:
                p = p - lr * p.grad
        losses.append(loss.item())
    return losses


WRONG = {
    "find_targets": [
        (substring, "inside a name is not enough"), (no_dot, "must be a dot"), (exact, "whole names only"),
        (last_part, "dots of its own"), (by_target, "in the model's order"), (a_set, "set"),
        (lazy, "put list(...) around it")],
    "wrap": [
        (not_frozen, "the base still trains"), (frozen_last, "nothing trains"), (top_level_only, "below the top"),
        (every_linear, "every linear is wrapped"), (stops_early, "only the first match"),
        (walk(lambda name, target: target in name), "compare whole names"), (no_return, "wrap must return the model"),
        (in_vain, "nothing is wrapped and nothing is frozen"), (on_a_copy, "not a copy of it"),
        (by_its_name, "use layer(child), the argument")],
    "fit": [
        (trained_with(every_token), "the padding are counted too"), (trained_with(same_place), "not shifted"),
        (trained_with(mask_of_the_input), "one place off"), (trained_with(mask_of_the_prompt), "turned round"),
        (trained_with(masked, clear=False), "add up: clear them"), (unfreezes, "the frozen weights moved"),
        (trained_with(lambda *a: masked(*a, reduction="sum")), "expected their mean"), (climbing, "uphill"),
        (trained_with(zeros_count), "divided by all places"), (trained_with(a_mean_a_row), "a mean for each row"),
        (forgets_the_list, "the losses are not returned"), (a_local_name, "no step is taken")],
    "largest_rank": [
        (by_the_weights, "not r * d_out * d_in"), (no_limit, "larger than a matrix allows"),
        (at_least_one, "the answer is 0"), (strictly_below, "used up exactly"), (a_fraction, "a whole number"),
        (the_roomiest, "not the largest of the smallest sides"),
        (a_fraction_without_a_limit, "// in place of /; and it can be at most"),
        (half_a_fraction, "a rank is a whole number")],
}
