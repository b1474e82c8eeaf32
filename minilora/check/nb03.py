"""Notebook 03: wrapping modules, a training loop, matching names, spending a budget; a prediction about places."""

import copy
import math
import random
import re

import torch
import torch.nn.functional as F
from torch import nn

from ..grading.models import Pair, Speaker, Tuned
from . import Exercise, Prediction

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj",
         "model.layers.10.mlp.up_proj", "vision.my_q_proj", "q_proj", "q_proj.norm", "lm_head", "model.up_proj_2",
         "model.layers.1.mlp_up_proj", "model.Q_proj", "model.layers.11.mlp.up_proj")
WANTED = (["q_proj"], ["up_proj", "lm_head"], ["layers.1.mlp.up_proj"], ["lm_head", "self_attn.q_proj"],
          ["mlp.up_proj", "up_proj", "q_proj", "self_attn.q_proj"])


def matched(names, targets):
    return [name for name in names if any(("." + name)[-len(target) - 1:] == "." + target for target in targets)]


def draw_names(number: int) -> tuple[list[str], list[str]]:
    """Names in which the targets stand whole, inside another word, and with dots of their own; some names match two of
    the targets, and in some an underscore stands where a target has a dot."""
    words = random.sample(("query", "value", "gate", "lift", "squeeze", "mixer", "router", "halt"), 4)
    parents = [f"{random.choice(('net', 'body', 'trunk'))}.{random.randint(0, 30)}" for _ in range(5)]
    names = [random.choice((f"{p}.{w}", w, f"{p}.{w}.norm", f"{p}.old_{w}", f"{p}.{w}_2", f"{p}.sub.{w}", f"my_{w}",
                            f"{p}.sub_{w}"))
             for p in parents for w in words]
    names = list(dict.fromkeys(names))  # every module has a name of its own
    places = [*words[:3], f"sub.{words[0]}", f"sub.{words[3]}", f"{parents[0]}.{words[3]}"]
    return names, random.sample(places, random.randint(1, 4))


find_targets = Exercise(
    "find_targets", matched, lambda seed: (list(NAMES), list(WANTED[seed])),
    [(lambda names, targets: [n for n in names if any(t in n for t in targets)],
      "a target inside a name is not enough: the name must be the target, or end in a dot and the target"),
     (lambda names, targets: [n for n in names if any(n.endswith(t) for t in targets)],
      "my_q_proj ends in q_proj too: what stands before the target must be a dot"),
     (lambda names, targets: [n for n in names if n in targets],
      "whole names only: model.layers.0.self_attn.q_proj must match q_proj too"),
     (lambda names, targets: [n for n in names if any(n.endswith("." + t) for t in targets)],
      "a name that is the target, with nothing before it, must match as well"),
     (lambda names, targets: [n for n in names if n.split(".")[-1] in targets],
      "a target may have dots of its own: layers.1.mlp.up_proj names one module"),
     (lambda names, targets: [n for t in targets for n in names if ("." + n).endswith("." + t)],
      "the names must stay in the model's order: go through the names, not through the targets"),
     (lambda names, targets: list(targets), "these are the targets: return the names that they match"),
     (lambda names, targets: [n for n in names if all(("." + n).endswith("." + t) for t in targets)],
      "one target that matches is enough: any, not all"),
     (lambda names, targets: [n for n in names for t in targets if ("." + n).endswith("." + t)],
      "a name that matches two targets is listed twice: ask whether any target matches"),
     (lambda names, targets: [n for n in names if any(re.search(rf"(^|\.){t}$", n) for t in targets)],
      "in a regular expression a dot stands for any character: re.escape(target), or endswith"),
     (lambda names, targets: [n for n in names if n in targets or n.split(".")[-1] in targets],
      "a target may have several parts: layers.1.mlp.up_proj is more than a name's last part"),
     (lambda names, targets: [n for n in names if any(("." + n + ".").find("." + t + ".") >= 0 for t in targets)],
      "the name must end with the target: q_proj.norm is a child of q_proj, another module"),
     (lambda names, targets: [n for n in names if any(("." + n).lower().endswith("." + t.lower()) for t in targets)],
      "upper and lower case are different names")],
    rounds=len(WANTED), draw=draw_names,
    situations=[(lambda names, targets: any(n in targets for n in names), "a name is itself a target"),
                (lambda names, targets: any(sum(("." + n).endswith("." + t) for t in targets) > 1 for n in names),
                 "a name matches two targets"),
                (lambda names, targets: any("." in t for t in targets), "a target has dots of its own"),
                (lambda names, targets: len(targets) > 1, "there are several targets"),
                (lambda names, targets: not matched(names, targets), "no name matches")])


def shapes(seed: int) -> list[tuple[int, int]]:
    return [(40 + 8 * seed, 24), (20, 56 + seed), (16, 16), (72, 32 + 2 * seed)][: 2 + seed % 3]


def counted(shapes, rank):
    return sum(rank * out + rank * inp for out, inp in shapes)


def spent(shapes, budget):
    rank = 0
    while counted(shapes, rank + 1) <= budget and rank < min(min(shape) for shape in shapes):
        rank += 1
    return rank


def budgets(seed: int) -> tuple:
    # in turn: not a whole multiple, an exact one, too little for rank 1, more than the smallest matrix allows
    places = shapes(seed)
    one = counted(places, 1)
    return places, (5 * one + one // 2 + 7, 4 * one, one - 1, 1000 * one)[seed % 4]


def draw_budget(number: int) -> tuple:
    places = [(random.randint(8, 90), random.randint(8, 90)) for _ in range(random.randint(1, 4))]
    one = counted(places, 1)
    ranks = (random.random(), random.randint(1, 8), random.uniform(1, 8), random.randint(80, 900))[number % 4]
    return places, int(one * ranks)


def unlimited(shapes, budget):
    return budget // sum(out + inp for out, inp in shapes)


largest_rank = Exercise(
    "largest_rank", spent, budgets,
    [(lambda shapes, budget: min(budget / counted(shapes, 1), min(map(min, shapes))),
      "a rank is a whole number: // in place of /"),
     (lambda shapes, budget: budget / counted(shapes, 1),
      "a rank is a whole number: // in place of /; and it can be at most min(d_out, d_in) of the smallest matrix"),
     (lambda shapes, budget: min(budget // counted(shapes, 1), max(map(min, shapes))),
      "the cap is the smallest side of all matrices, not the largest of the smallest sides"),
     (unlimited, "the rank is larger than a matrix allows: it can be at most min(d_out, d_in) of the smallest one"),
     (lambda shapes, budget: max(1, spent(shapes, budget)),
      "the budget is overspent: when it does not pay for rank 1, the answer is 0"),
     (lambda shapes, budget: min(math.ceil(budget / counted(shapes, 1)), min(map(min, shapes))),
      "rounded up, so the budget is overspent: round down"),
     (lambda shapes, budget: min((budget - 1) // counted(shapes, 1), min(map(min, shapes))),
      "one too small at times: a budget that is used up exactly is not overspent"),
     (lambda shapes, budget: min(budget // sum(out * inp for out, inp in shapes), min(map(min, shapes))),
      "rank r costs r * (d_out + d_in) a module, not r * d_out * d_in"),
     (lambda shapes, budget: min(budget // sum(shapes[0]), min(map(min, shapes))),
      "that spends the budget on the first module alone: it must pay for all of them"),
     (lambda shapes, budget: min(unlimited(shapes, budget), min(out for out, inp in shapes)),
      "the cap looks at d_out alone: no rank may exceed d_in either"),
     (lambda shapes, budget: min(unlimited(shapes, budget), min(inp for out, inp in shapes)),
      "the cap looks at d_in alone: no rank may exceed d_out either"),
     (lambda shapes, budget: min(unlimited(shapes, budget), min(shapes[0])),
      "the cap looks at the first matrix alone: it is the smallest side of all of them"),
     (lambda shapes, budget: min(budget // sum(2 * out for out, inp in shapes), min(map(min, shapes))),
      "a module of rank r costs r * (d_out + d_in); 2 * d_out is right for a square alone"),
     (lambda shapes, budget: min(budget // sum(2 * inp for out, inp in shapes), min(map(min, shapes))),
      "a module of rank r costs r * (d_out + d_in); 2 * d_in is right for a square alone"),
     (lambda shapes, budget: min(round(budget / counted(shapes, 1)), min(map(min, shapes))),
      "rounded to the nearest, the budget is overspent at times: round down"),
     (lambda shapes, budget: min(unlimited(shapes, budget), min(map(min, shapes)) - 1),
      "a rank may be as large as the smallest side: the cap is one too small")],
    draw=draw_budget,
    situations=[(lambda shapes, budget: budget < counted(shapes, 1), "the budget does not pay for rank 1"),
                (lambda shapes, budget: unlimited(shapes, budget) > min(map(min, shapes)),
                 "the budget would pay for more than the smallest side of a matrix"),
                (lambda shapes, budget: budget % counted(shapes, 1) == 0, "the budget is used up exactly"),
                (lambda shapes, budget: len(shapes) > 1, "there are several modules")])


def wrapped(model, target, layer):
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last == target:
            setattr(model.get_submodule(parent), last, layer(module))
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, layer):
            for p in module.parameters(recurse=False):
                p.requires_grad_(True)
    return model


def forgetful(model, target, layer):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name == target:
                setattr(parent, name, layer(child))
    return model


def late(model, target, layer):
    forgetful(model, target, layer)
    return model.requires_grad_(False)


def first_only(model, target, layer):
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name == target:
                setattr(parent, name, layer(child))
                return model


def top_only(model, target, layer):
    model.requires_grad_(False)
    for name, child in list(model.named_children()):
        if name == target:
            setattr(model, name, layer(child))
    return model


def every_linear(passes):
    """The mistake that wraps every linear whose name passes(name, target)."""
    def wrap(model, target, layer):
        model.requires_grad_(False)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and passes(name, target):
                    setattr(parent, name, layer(child))
        return model
    return wrap


class Other(Tuned):
    """Stands for any layer but the one that was handed over."""


def model_and_target(seed: int) -> tuple:
    """In turn: matches at two depths; the model itself holds the match; three of them in a row; one far below."""
    width = 3 + seed % 3
    deep = nn.Sequential(nn.Sequential(nn.Sequential(Pair(width)), nn.Linear(width, width)))
    model = (nn.Sequential(Pair(width), nn.Sequential(Pair(width), nn.Linear(width, width))), Pair(width),
             nn.Sequential(Pair(width), Pair(width), Pair(width)), deep)[(0, 0, 1, 2, 3, 1)[seed % 6]]
    return model, ("up", "down")[seed % 2], Tuned


def outputs_and_flags(result, model, target, layer):
    # each of these is told before whatever else is wrong
    if result is not model:
        return "a copy" if type(result) is type(model) else "not the model"
    if any(type(m) not in (nn.Sequential, nn.Linear, Pair, layer) for m in model.modules()):
        return "another layer"
    width = next(m for m in model.modules() if isinstance(m, nn.Linear)).in_features
    x = torch.linspace(-1, 1, width)[None]
    trains = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    return {"the output of the model": model(x), "the list of what trains": trains}


wrap = Exercise(
    "wrap", wrapped, model_and_target,
    [(lambda model, target, layer: model.requires_grad_(False),
      "nothing is wrapped: walk through model.modules(), the matches lie below the top level, and put the new layer in "
      "with setattr(parent, name, layer(child))"),
     (lambda model, target, layer: model,
      "nothing is wrapped and nothing is frozen: the model that you return is as it came"),
     (lambda model, target, layer: None,
      "wrap must return the model that it was given: the next cell uses what it returns"),
     (lambda model, target, layer: wrapped(copy.deepcopy(model), target, layer),
      "change the model that you were given, not a copy of it"),
     (lambda model, target, layer: wrapped(model, target, Other),
      "use layer(child), the argument: it need not be LoRA"),
     (top_only, "only the model's own children are looked at; the matches lie below the top level too: walk through "
                "model.modules()"),
     (forgetful, "the base still trains: freeze the model first (requires_grad_(False)), then put the layers in"),
     (late, "nothing trains: freeze before the new layers come in, not after"),
     (first_only, "only the first match is wrapped: go on to the others"),
     (every_linear(lambda name, target: True), "every linear is wrapped: compare the child's name with the target"),
     (every_linear(lambda name, target: target in name),
      "a child whose name only holds the target is wrapped too: compare whole names, name == target")],
    rounds=6, situations=[(lambda model, target, layer: hasattr(model, target),
                           "the match is a child of the model itself"),
                          (lambda model, target, layer: not hasattr(model, target), "the match lies deeper down")],
    in_place=True, observe=outputs_and_flags)


def model_and_rows(seed: int) -> tuple:
    """Rows of which each begins with a prompt of its own length; the rest is the reply, and padding after it."""
    words, width, batch, tokens = 9 + seed, 4 + seed, (3, 2, 4, 1)[seed % 4], 7 + seed
    model, ids = Speaker(words, width), torch.randint(words, (batch, tokens))
    places = torch.arange(tokens)
    prompts, ends = torch.randint(2, 5, (batch, 1)), torch.randint(6, tokens + 1, (batch, 1))
    return model, ids, (places >= prompts) & (places < ends), (0.5, 1.0, 0.3, 0.8)[seed % 4], 3


def fitted(model, ids, reply, lr, steps):
    """Asks autograd for the trained parameters alone, and adds up one token at a time."""
    trained, losses = [p for p in model.parameters() if p.requires_grad], []
    for _ in range(steps):
        shares = model(ids).log_softmax(-1)
        terms = [-shares[row, t - 1, ids[row, t]] for row, t in reply.nonzero().tolist()]
        loss = sum(terms) / len(terms)
        with torch.no_grad():
            for p, gradient in zip(trained, torch.autograd.grad(loss, trained)):
                p -= lr * gradient
        losses.append(loss.item())
    return losses


def loop(loss_of=None, counted=lambda reply: reply[:, 1:], clears=True, sign=1, told=lambda losses: losses, late=False,
         moves=True, thaws=False, reduction="mean"):
    """The loop with one thing changed."""
    def shifted(model, ids, reply):
        here = counted(reply)
        return F.cross_entropy(model(ids)[:, :-1][here], ids[:, 1:][here], reduction=reduction)

    def fit(model, ids, reply, lr, steps):
        losses, of = [], loss_of or shifted
        if thaws:
            model.requires_grad_(True)
        for _ in range(steps):
            if clears:
                model.zero_grad()
            loss = of(model, ids, reply)
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad and moves:
                        p -= sign * lr * p.grad
                losses.append((of(model, ids, reply) if late else loss).item())
        return told(losses)
    return fit


def losses_and_weights(result, model, *_):
    losses = "nothing was returned" if result is None else [float(loss) for loss in result]
    return {"the list of losses": losses, "the weights after the run": dict(model.state_dict())}


fit = Exercise(
    "fit", fitted, model_and_rows,
    [(loop(counted=lambda reply: torch.ones_like(reply[:, 1:])),
      "the prompt and the padding are counted too: of the next tokens only those of the reply, reply[:, 1:]"),
     (loop(counted=lambda reply: ~reply[:, 1:]), "the mask is turned round: the reply counts, the prompt does not"),
     (loop(counted=lambda reply: reply[:, :-1]),
      "the mask is one place off: what counts is whether the NEXT token belongs to the reply, reply[:, 1:]"),
     (loop(lambda model, ids, reply: F.cross_entropy(model(ids)[reply], ids[reply])),
      "not shifted: at place t the model predicts token t + 1, so logits[:, :-1] goes with ids[:, 1:]"),
     (loop(lambda model, ids, reply: F.cross_entropy(model(ids)[:, 1:][reply[:, :-1]], ids[:, :-1][reply[:, :-1]])),
      "shifted the wrong way: logits[:, :-1] goes with ids[:, 1:]"),
     (loop(clears=False), "the gradients of the steps add up: clear them before each backward, model.zero_grad()"),
     (loop(sign=-1), "uphill: a step goes against the gradient, p -= lr * p.grad"),
     (loop(moves=False), "no step is taken: move every parameter that trains by -lr times its gradient"),
     (loop(thaws=True), "the frozen weights moved: leave requires_grad as it is"),
     (loop(reduction="sum"), "the losses of the tokens are added up, expected their mean"),
     (loop(lambda model, ids, reply: (F.cross_entropy(model(ids)[:, :-1].mT, ids[:, 1:], reduction="none")
                                      * reply[:, 1:]).mean()),
      "divided by all places: the mean is over the reply's tokens alone, so divide by reply[:, 1:].sum()"),
     (loop(lambda model, ids, reply: ((F.cross_entropy(model(ids)[:, :-1].mT, ids[:, 1:], reduction="none")
                                       * reply[:, 1:]).sum(1) / reply[:, 1:].sum(1)).mean()),
      "a mean for each row, then a mean of these: one mean over all of the replies' tokens, a long reply counts more"),
     (loop(late=True), "the losses are those after each step: note the loss that the step was made from"),
     (loop(told=lambda losses: losses[-1]), "only the last loss is returned: return the list, one a step"),
     (loop(told=lambda losses: None), "the losses are not returned"),
     (lambda model, ids, reply, lr, steps: loop()(model, ids, reply, lr, 1), "one step only: take `steps` of them"),
     (lambda model, ids, reply, lr, steps: loop()(model, ids, reply, 1.0, steps), "lr is not used"),
     (lambda model, ids, reply, lr, steps: loop()(copy.deepcopy(model), ids, reply, lr, steps),
      "the run is right, but on a copy: train the model that you were given")],
    rounds=4, tolerance=1e-4, in_place=True, observe=losses_and_weights)


where_to_spend = Prediction("a", {
    "a": "A query or a key can only move attention, which in this task looked in the right places already. What "
         "changes is what is said, so it pays to adapt what carries it: o, the MLP, or several kinds together. o alone "
         "does as well as most ways to spread.",
    "b": "A parameter is not a parameter: at one budget the bars differ widely. A key can only change where attention "
         "looks, never what is said there.",
    "c": "Attention does decide where to look, but the base looks in the right places already. What changes is what is "
         "said: the values, the output projections and the MLP carry that.",
    "d": "The frozen weights do most of the work, so a small correction is enough: LoRA's best bars come close to that "
         "of full fine-tuning.",
})
