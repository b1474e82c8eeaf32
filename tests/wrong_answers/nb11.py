"""Wrong answers to the exercises of notebook 11, as learners may write them, and a part of what each must be told."""

import torch


def parts(layers, d, vocab, context, attention=4, mlp=8, biases=9, norms=4, last=2, tables=1, positions=True):
    layer = (attention + mlp) * d**2 + (biases + norms) * d
    return layers * layer + tables * vocab * d + positions * context * d + last * d


def two_tables(layers, d, vocab, context):
    return parts(layers, d, vocab, context, tables=2)


def no_positions(layers, d, vocab, context):
    return parts(layers, d, vocab, context, positions=False)


def no_last_norm(layers, d, vocab, context):
    return parts(layers, d, vocab, context, last=0)


def matrices(layers, d, vocab, context):
    return parts(layers, d, vocab, context, biases=0, norms=0, last=0)


def no_mlp(layers, d, vocab, context):
    return parts(layers, d, vocab, context, mlp=0)


def no_norms(layers, d, vocab, context):
    return parts(layers, d, vocab, context, norms=0, last=0)


def no_biases(layers, d, vocab, context):
    return parts(layers, d, vocab, context, biases=0)


def q_and_v(layers, d, vocab, context):
    return parts(layers, d, vocab, context, attention=2)


def hopeful(need, usable):
    if need[0] <= usable[0]:
        return "fits"
    return "too close to call" if need[0] <= usable[1] else "does not fit"


def largest_card(need, usable):
    if need[1] <= usable[1]:
        return "fits"
    return "too close to call" if need[0] <= usable[1] else "does not fit"


def gloomy(need, usable):
    if max(need) <= min(usable):
        return "fits"
    return "does not fit" if max(need) > max(usable) else "too close to call"


def smallest_card(need, usable):
    if max(need) <= min(usable):
        return "fits"
    return "does not fit" if min(need) > min(usable) else "too close to call"


def strict(need, usable):
    if need[1] < usable[0]:
        return "fits"
    return "too close to call" if need[0] < usable[1] else "does not fit"


def middles(need, usable):
    return "fits" if sum(need) / 2 <= sum(usable) / 2 else "does not fit"


def two_answers(need, usable):
    return "fits" if need[1] <= usable[0] else "does not fit"


def not_recorded(layer, inputs, grad):
    fresh = [t.clone().detach().requires_grad_() for t in inputs]
    y = layer(*fresh)
    return torch.autograd.grad(y, fresh, grad)


def as_they_came(layer, inputs, grad):
    with torch.enable_grad():
        y = layer(*inputs)
    return torch.autograd.grad(y, inputs, grad)


def sum_of_outputs(layer, inputs, grad):
    with torch.enable_grad():
        fresh = [t.detach().requires_grad_() for t in inputs]
        layer(*fresh).sum().backward()
    return [t.grad for t in fresh]


def no_grad_outputs(layer, inputs, grad):
    with torch.enable_grad():
        fresh = [t.detach().requires_grad_() for t in inputs]
        y = layer(*fresh)
    return torch.autograd.grad(y, fresh)


def x_alone(layer, inputs, grad):
    with torch.enable_grad():
        fresh = [t.detach().requires_grad_() for t in inputs]
        layer(*fresh).backward(grad)
    return (fresh[0].grad,)


def adapter_alone(layer, inputs, grad):
    with torch.enable_grad():
        fresh = [t.detach().requires_grad_() for t in inputs]
        layer(*fresh).backward(grad)
    return fresh[1].grad, fresh[2].grad


def forward_again(layer, inputs, grad):
    return layer(*inputs)


def crossed(layer, layers, head):
    return head + sum([layer] * (2 * layers - 3))


def all_at_once(layer, layers, head):
    return layer * layers + head, crossed(layer, layers, head)


def one_at_a_time(layer, layers, head):
    return layer, crossed(layer, layers, head)


def two_layers(layer, layers, head):
    return layer + layer, crossed(layer, layers, head)


def always_the_head(layer, layers, head):
    return head + layer, crossed(layer, layers, head)


def every_layer_twice(layer, layers, head):
    return max(2 * layer, layer + head), 2 * layer * layers + head


def last_is_there(layer, layers, head):
    return max(2 * layer, layer + head), layer * (2 * layers - 1) + head


def first_two_are_there(layer, layers, head):
    return max(2 * layer, layer + head), 2 * layer * (layers - 1) + head


def forward_only(layer, layers, head):
    return max(2 * layer, layer + head), layers * layer + head


def written_back(layer, layers, head):
    return max(2 * layer, layer + head), 3 * layers * layer + head


def no_head(layer, layers, head):
    return max(2 * layer, layer + head), crossed(layer, layers, 0)


WRONG = {
    "gpt_parameters": [
        (two_tables, "tied"), (no_positions, "positions are missing"), (no_last_norm, "last norm"),
        (matrices, "matrices alone"), (no_mlp, "MLP's two"), (no_norms, "norms are missing"),
        (no_biases, "biases of the linears"), (q_and_v, "four matrices")],
    "verdict": [
        (hopeful, "need[1]"), (largest_card, "usable[0]"), (gloomy, "need[0]"), (smallest_card, "usable[1]"),
        (strict, "exactly as much"), (middles, "middles"), (two_answers, "there is a third")],
    "revisit": [
        (not_recorded, "nothing was recorded"), (as_they_came, "as it came"), (sum_of_outputs, "grad is left out"),
        (no_grad_outputs, "no scalar"), (x_alone, "x alone"), (adapter_alone, "gradient of x is missing"),
        (forward_again, "output once more")],
    "streamed": [
        (all_at_once, "only two"), (one_at_a_time, "on its way"), (two_layers, "beside the last layer"),
        (always_the_head, "smaller than a layer"), (every_layer_twice, "not every layer"),
        (last_is_there, "and the first two, when"), (first_two_are_there, "one of three"),
        (forward_only, "once more"), (written_back, "written back"), (no_head, "passes over the bus")],
}
