"""Wrong answers to the exercises of notebook 03, as learners may write them, and a part of what each must be told."""

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


def a_fraction(shapes, budget):
    return min(budget / sum(o + i for o, i in shapes), min(min(s) for s in shapes))


WRONG = {
    "find_targets": [
        (substring, "inside a name is not enough"), (no_dot, "must be a dot"), (exact, "whole names only"),
        (last_part, "dots of its own"), (by_target, "in the model's order"), (a_set, "set")],
    "wrap": [
        (not_frozen, "the base still trains"), (frozen_last, "nothing trains"), (top_level_only, "below the top"),
        (every_linear, "every linear is wrapped"), (stops_early, "only the first match")],
    "largest_rank": [
        (by_the_weights, "not r * d_out * d_in"), (no_limit, "larger than a matrix allows"),
        (at_least_one, "the answer is 0"), (strictly_below, "used up exactly"), (a_fraction, "a whole number")],
}
