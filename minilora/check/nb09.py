"""Notebook 09, many adapters: a mixed batch, an exact sum, fingerprints compared, a gate before release; two choices,
on another version of the base and on adding up factors."""

import random

import torch
from torch import Tensor

from . import Exercise, Prediction

Adapter = tuple[Tensor, Tensor, float]  # A (r, d_in), B (d_out, r), scaling


def draw_adapter(rank: int, d_in: int, d_out: int, scaling: float) -> Adapter:
    return torch.randn(rank, d_in), torch.randn(d_out, rank), scaling


def draw_batch(seed: int) -> tuple[Tensor, Tensor, dict[str, Adapter], list[str | None]]:
    d_in, d_out = 9 + seed, 14 - seed
    adapters = {"acme": draw_adapter(2, d_in, d_out, 2.0), "zen": draw_adapter(3, d_in, d_out, 0.5)}
    names = (["zen", None, "acme", "zen"], ["acme", "zen", "acme"], [None, "zen"],
             ["zen", "zen", None, "acme", None], [None, None, None])[seed]
    if random.random() < 0.5:
        adapters["bolt"] = draw_adapter(1, d_in, d_out, 3.0)
        names = [random.choice(("acme", "zen", "bolt", None)) for _ in range(2 + seed)]
    return torch.randn(len(names), 3 + seed, d_in), torch.randn(d_out, d_in), adapters, names


def routed(x: Tensor, W: Tensor, adapters: dict[str, Adapter], names: list[str | None]) -> Tensor:
    """Row by row, each through one whole weight of its own."""
    weights = {None: W} | {name: W + s * B @ A for name, (A, B, s) in adapters.items()}
    return torch.stack([row @ weights[name].T for row, name in zip(x, names)])


def by_row(update):
    """The mistake that adds `update(row, name, adapters, names)`."""
    return lambda x, W, adapters, names: x @ W.T + torch.stack([
        update(row, name, adapters, names) if name is not None else torch.zeros(x.shape[1], len(W))
        for row, name in zip(x, names)])


def of(row: Tensor, adapter: Adapter) -> Tensor:
    A, B, scaling = adapter
    return scaling * row @ A.T @ B.T


route = Exercise("route", routed, draw_batch, [
    (lambda x, W, adapters, names: x @ W.T, "these are the base's outputs: no adapter is in them"),
    (by_row(lambda row, name, adapters, names: of(row, adapters[name][:2] + (1.0,))),
     "the scaling is missing: each adapter has its own"),
    (by_row(lambda row, name, adapters, names: of(row, adapters[next(n for n in names if n)])),
     "one adapter serves all rows: row i belongs to names[i]"),
    (lambda x, W, adapters, names: x @ W.T + sum(of(x, adapter) for adapter in adapters.values()),
     "every adapter is added to every row: row i goes through names[i] alone"),
    (lambda x, W, adapters, names: x @ W.T + torch.stack([
        of(row, adapters[name or next(iter(adapters))]) for row, name in zip(x, names)]),
     "None means the base alone: such a row gets no update"),
    (lambda x, W, adapters, names: torch.stack([
        of(row, adapters[name]) if name else row @ W.T for row, name in zip(x, names)]),
     "a row with an adapter goes through the base too: the update comes on top of W x"),
    (lambda x, W, adapters, names: x @ W.T + torch.stack([of(row, adapters[name]) for row, name in zip(x, names)]),
     "None is no key of the adapters: a row of that name goes through the base alone"),
    (by_row(lambda row, name, adapters, names: of(row, list(adapters.values())[names.index(name) % len(adapters)])),
     "the adapter is taken by its place: row i belongs to the adapter called names[i]"),
    (lambda x, W, adapters, names: routed(x, W, {k: (A, B, s / len(A)) for k, (A, B, s) in adapters.items()}, names),
     "scaling is alpha / r already: do not divide by r once more"),
    (by_row(lambda row, name, adapters, names: -of(row, adapters[name])), "the update is added, not taken away"),
    (lambda x, W, adapters, names: routed(x, W, adapters, names)[:, -1:],
     "only the last token is left: the result is (batch, T, d_out)"),
    (by_row(lambda row, name, adapters, names: names.count(name) * of(row, adapters[name])),
     "an adapter with two rows is added twice: once a row, to its own row alone"),
    (lambda x, W, adapters, names: routed(x, W, adapters, [n if names.index(n) == i else None
                                                           for i, n in enumerate(names)]),
     "the second row of the same adapter goes without it"),
    (by_row(lambda row, name, adapters, names: of(row, adapters[name])[:1].expand(len(row), -1)),
     "the first token's update is given to all tokens of the row"),
], rounds=5, tolerance=1e-4,
    situations=[(lambda x, W, adapters, names: None in names, "a row has no adapter (None)"),
                (lambda x, W, adapters, names: set(names) == {None}, "no row has an adapter"),
                (lambda x, W, adapters, names: len(set(names)) < len(names), "two rows have the same adapter"),
                (lambda x, W, adapters, names: len(set(names) - {None}) > 1, "the rows have different adapters")])


def draw_parts(seed: int) -> list[tuple[float, float, Tensor, Tensor]]:
    d_in, d_out, rank = 12 + seed, 10 + 2 * seed, 2 + seed % 2
    weights = [(1.0, 0.5), (0.3, 0.7, -0.4), (2.0, 1.0), (0.5, 0.25, 0.8)][seed]
    return [(weight, (2.0, 0.5, 3.0)[i], torch.randn(rank, d_in), torch.randn(d_out, rank))
            for i, weight in enumerate(weights)],


def summed(parts):
    """The sum itself, and its halves by SVD, as far as they are needed."""
    U, S, Vh = torch.linalg.svd(sum(w * s * (B.double() @ A.double()) for w, s, A, B in parts), full_matrices=False)
    R = sum(len(A) for w, s, A, B in parts)
    return Vh[:R].float(), (U * S)[:, :R].float()


def stacked(A_weight, B_weight):
    """The mistake that weighs the blocks of A and B so."""
    return lambda parts: (torch.cat([A_weight(w, s) * A for w, s, A, B in parts]),
                          torch.cat([B_weight(w, s) * B for w, s, A, B in parts], 1))


def product(result, parts):
    """What the two make, and whether they are no larger than all parts together."""
    A, B = result
    return {"the product B @ A": B @ A,
            "the statement that R is at most the sum of the ranks": len(A) <= sum(len(A) for w, s, A, B in parts)}


combine = Exercise("combine", summed, draw_parts, [
    (lambda parts: (sum(A for w, s, A, B in parts), sum(w * s * B for w, s, A, B in parts)),
     "(B1 + B2)(A1 + A2) has B1 A2 and B2 A1 in it, one adapter's B on another's A: stack them, do not add them"),
    (lambda parts: (sum(w * A for w, s, A, B in parts), sum(s * B for w, s, A, B in parts)),
     "adding the A and the B mixes the adapters, B1 A2 and B2 A1 come with it: stack them, do not add them"),
    (lambda parts: (sum(w * A for w, s, A, B in parts), sum(w * s * B for w, s, A, B in parts)),
     "the weights are in both factors, and the adapters are mixed besides: stack the matrices, do not add them"),
    (lambda parts: (sum(A for w, s, A, B in parts), sum(B for w, s, A, B in parts)),
     "weights and scalings are missing, and B1 A2 and B2 A1 come in: stack the matrices, do not add them"),
    (stacked(lambda w, s: w, lambda w, s: w * s), "the weight counts twice: put it into one of A and B"),
    (stacked(lambda w, s: w * s, lambda w, s: w * s), "weight and scaling count twice: put them into one of A and B"),
    (stacked(lambda w, s: s, lambda w, s: w * s), "the scaling counts twice: put it into one of A and B"),
    (stacked(lambda w, s: 1, lambda w, s: w), "the scaling is missing: each adapter has its own"),
    (stacked(lambda w, s: 1, lambda w, s: s), "the weights are missing"),
    (stacked(lambda w, s: 1, lambda w, s: 1), "weights and scalings are missing"),
    (lambda parts: (torch.cat([A for w, s, A, B in parts]), torch.cat([w * s * B for w, s, A, B in parts[::-1]], 1)),
     "the blocks of A and of B stand in different orders: block k of B meets block k of A"),
    (lambda parts: (torch.cat([w * s * B for w, s, A, B in parts], 1), torch.cat([A for w, s, A, B in parts])),
     "A comes first in the result, then B"),
    (lambda parts: sum(w * s * B @ A for w, s, A, B in parts),
     "this is the product; give the two matrices that make it, or nothing is thin any more"),
    (lambda parts: (torch.eye(parts[0][2].shape[1]), sum(w * s * B @ A for w, s, A, B in parts)),
     "one of the two is the whole sum and the other the identity: nothing is thin any more; stack the parts"),
    (lambda parts: (torch.cat([A for w, s, A, B in parts]), torch.cat([s / w * B for w, s, A, B in parts], 1)),
     "divided by the weight: each part is multiplied by its weight"),
    (stacked(lambda w, s: 1, lambda w, s: abs(w) * s), "a weight may be negative: no abs"),
    (lambda parts: stacked(lambda w, s: 1, lambda w, s: w * s / sum(p[0] for p in parts))(parts),
     "the weights need not add up to 1: do not divide by their sum"),
    (lambda parts: stacked(lambda w, s: 1, lambda w, s: w * s)(parts[:1]), "only the first part is in it"),
    (lambda parts: stacked(lambda w, s: 1, lambda w, s: w * s)(parts[:2]), "only the first two parts are in it"),
], situations=[(lambda parts: any(p[0] < 0 for p in parts), "a weight is negative"),
               (lambda parts: len(parts) > 2, "there are more than two parts"),
               (lambda parts: len(parts) == 2, "there are two parts")],
   tolerance=1e-4, observe=product)

HERE = "6d133aa7ec5e-3ba2729cc6db"
FOUND = (HERE, "6d133aa7ec5e-0123456789ab", "0123456789ab-3ba2729cc6db", None)


def draw_fingerprints(number: int) -> tuple[str | None, str]:
    shape, weights, other = (f"{random.getrandbits(48):012x}" for _ in range(3))
    near = shape[:8] + other[8:]  # begins alike
    return (random.choice((f"{shape}-{weights}", f"{shape}-{other}", f"{other}-{weights}", f"{other}-{shape}", None,
                           f"{near}-{weights}", f"{shape}-{weights[:8]}{other[8:]}", f"{weights}-{shape}")),
            f"{shape}-{weights}")


def compared(adapter: str | None, model: str) -> str:
    pairs = zip((adapter or "").split("-"), model.split("-"))
    equal = tuple(a == b for a, b in pairs)
    return {(True, True): "same", (True, False): "other weights", (False,): "not said"}.get(equal, "other architecture")


def answers(same="same", weights="other weights", architecture="other architecture", unsaid="not said"):
    """The mistake that gives these four answers."""
    def compare(adapter, model):
        if adapter is None:
            return unsaid
        shape, values = (a == b for a, b in zip(adapter.split("-"), model.split("-")))
        return same if shape and values else weights if shape else architecture
    return compare


compare_bases = Exercise("compare_bases", compared, lambda seed: (FOUND[seed], HERE), [
    (lambda adapter, model: "same" if adapter == model else answers()(adapter or "-", model),
     "no fingerprint is no difference: an adapter that does not say gets 'not said'"),
    (answers(unsaid="same"), "an adapter that does not say is no match either: it gets 'not said'"),
    (answers(unsaid="other weights"), "no fingerprint is no difference: an adapter that does not say gets 'not said', "
                                      "not 'other weights'"),
    (answers(architecture="other weights"),
     "the part before the dash is the architecture: when it differs the shapes will not even fit"),
    (answers(weights="other architecture"),
     "the part before the dash is the same there, so the architecture is: the weights differ"),
    (answers(weights="other architecture", architecture="other weights"),
     "the parts are mixed up: architecture stands before the dash, weights after it"),
    (answers(weights="same"),
     "the same architecture is not yet the same base: the part after the dash must agree too"),
    (lambda adapter, model: answers()("-".join(adapter.split("-")), model),
     "adapter may be None, which has no parts to split: look for that first"),
    (lambda adapter, model: "not said" if adapter is None else "same" if adapter == model else
     "other weights" if adapter[:8] == model[:8] else "other architecture",
     "the beginning is not the whole part: compare all that stands before the dash"),
    (lambda adapter, model: "not said" if adapter is None else "same" if adapter == model else
     "other weights" if adapter.split("-")[0] in model else "other architecture",
     "the first part must equal the first part: it may stand in the other's second"),
    (lambda adapter, model: "not said" if adapter is None else "same" if set(adapter.split("-")) ==
     set(model.split("-")) else answers()(adapter, model), "the order of the parts counts: architecture comes first"),
    (lambda adapter, model: "not said" if adapter is None else "same" if adapter.split("-")[1] == model.split("-")[1]
     else answers()(adapter, model), "equal weights do not make it the same: the architecture must agree too"),
    (answers(same="other weights"), "both parts agree there: it is the same base"),
], draw=draw_fingerprints,
    situations=[(lambda adapter, model: adapter is None, "the adapter does not say (None)"),
                (lambda adapter, model: adapter == model, "both are the same"),
                (lambda adapter, model: bool(adapter) and adapter.split("-")[0] != model.split("-")[0],
                 "the part before the dash differs: other architecture"),
                (lambda adapter, model: bool(adapter) and adapter != model, "the fingerprints differ")])


def draw_scores(seed: int) -> tuple[dict, str, dict, float]:
    home = {"tone": "tone", "ticket_v2": "ticket", "legal": "policy", "night": "tone"}
    scores = {(base, adapter, task): round(random.random(), 2) for base in ("v1", "v2") for adapter in home
              for task in ("tone", "ticket", "policy")}
    sure = {("v1", "tone", "tone"): 0.95, ("v2", "tone", "tone"): 0.60, ("v1", "ticket_v2", "ticket"): 0.90,
            ("v1", "ticket_v2", "policy"): 0.20, ("v2", "ticket_v2", "ticket"): 0.97, ("v1", "night", "tone"): 0.4,
            ("v1", "night", "ticket"): 0.99, ("v2", "night", "tone"): 0.93, ("v1", "legal", "policy"): 0.99,
            ("v2", "tone", "ticket"): 0.94, ("v1", "tone", "policy"): 0.1, ("v2", "night", "policy"): 0.2,
            ("v2", "ticket_v2", "tone"): 0.3}
    scores |= sure
    del scores["v2", "legal", "policy"]  # nobody has looked
    return scores, ("v1", "v2")[seed % 2], home, 0.9


def draw_any_scores(number: int) -> tuple[dict, str, dict, float]:
    """The scores are in no order."""
    kinds, bases, floor = ("tone", "ticket", "policy", "style"), ("v1", "v2", "v3"), random.choice((0.5, 0.7, 0.9))
    names = random.sample(("tone", "night", "legal", "acme", "zen", "ticket"), random.randint(2, 5))
    home = {name: random.choice(kinds) for name in names}
    scores = {(base, name, kind): random.choice((floor, 0.95, *(round(floor * random.random(), 2) for _ in range(5))))
              for base in bases for name in names for kind in kinds if random.random() < 0.85}
    scores = dict(random.sample([*scores.items()], len(scores)))
    return scores, random.choice(bases), home, floor


def shipped(scores, base, home, floor):
    own = {adapter: score for (b, adapter, task), score in scores.items() if b == base and home[adapter] == task}
    return [adapter for adapter in home if not own.get(adapter, -1.0) < floor]


def gate(passes):
    return lambda scores, base, home, floor: [adapter for adapter in home if passes(scores, base, adapter, home, floor)]


def tasks(home):
    return set(home.values())


may_ship = Exercise("may_ship", shipped, draw_scores, [
    (gate(lambda scores, base, a, home, floor: scores.get((base, a, home[a]), 1.0) >= floor),
     "an adapter that nobody has tried on this base passes: no score is no pass"),
    (gate(lambda scores, base, a, home, floor: scores.get((base, a, home[a]), 0.0) > floor),
     "a score that equals the floor is enough: >= in place of >"),
    (gate(lambda scores, base, a, home, floor: max(scores.get((b, a, home[a]), 0.0) for b, *_ in scores) >= floor),
     "a good score on another base does not count: look at this one"),
    (gate(lambda scores, base, a, home, floor: scores.get(("v1", a, home[a]), 0.0) >= floor),
     "the scores are those of v1, whatever base is asked for"),
    (gate(lambda scores, base, a, home, floor: max(scores.get((base, a, t), 0.0) for *_, t in scores) >= floor),
     "a good score on another task does not count: look at the adapter's own, home[adapter]"),
    (gate(lambda scores, base, a, home, floor: min(scores.get((base, a, t), 0.0) for t in tasks(home)) >= floor),
     "no adapter is good at every task: it has to be at its own, home[adapter]"),
    (gate(lambda scores, base, a, home, floor: scores.get((base, a, a), 0.0) >= floor),
     "an adapter's task need not be its name: home[adapter] tells"),
    (gate(lambda scores, base, a, home, floor: scores.get((base, a, home[a]), 0.0) < floor),
     "these are the ones that fail"),
    (gate(lambda scores, base, a, home, floor: scores[base, a, home[a]] >= floor),
     "a score may be missing: scores.get, and no score is no pass"),
    (gate(lambda scores, base, a, home, floor: scores.get((base, a, home[a]), 0.0) >= 0.9),
     "the bar is floor, the argument, which need not be 0.9"),
    (gate(lambda scores, base, a, home, floor: bool(scores.get((base, a, home[a])))),
     "a score above 0 is not enough: it must be at least floor"),
    (lambda scores, base, home, floor: [a for (b, a, t), s in scores.items()
                                        if b == base and home[a] == t and s >= floor],
     "give them in the order of home, not in the order of the scores"),
    (lambda scores, base, home, floor: sorted(shipped(scores, base, home, floor)),
     "give them in the order of home: do not sort the names"),
    (lambda scores, base, home, floor: sorted(shipped(scores, base, home, floor),
                                              key=lambda a: -scores[base, a, home[a]]),
     "give them in the order of home, not the best first"),
    (lambda scores, base, home, floor: {a: home[a] for a in shipped(scores, base, home, floor)},
     "give a list of names, not a dict"),
], rounds=2, draw=draw_any_scores,
    situations=[(lambda scores, base, home, floor: any((base, a, t) not in scores for a, t in home.items()),
                 "nobody has measured an adapter on this base"),
                (lambda scores, base, home, floor: any(scores.get((base, a, t)) == floor for a, t in home.items()),
                 "a score is exactly floor, which is enough"),
                (lambda scores, base, home, floor: floor != 0.9, "floor is not 0.9"),
                (lambda scores, base, home, floor: base != "v1", "the base is not v1"),
                (lambda scores, base, home, floor: shipped(scores, base, home, floor) == [], "no adapter passes"),
                (lambda scores, base, home, floor: len(shipped(scores, base, home, floor)) > 1, "several pass")])


another_version = Prediction("a", {
    "a": "The shapes fit, most answers are right, and some that were are no longer. It takes a test to see it, or a "
         "fingerprint.",
    "b": "Most of what the adapter corrects is still there, but not all of it: some answers that were right are no "
         "longer.",
    "c": "So it is on random weights, the control. This base has gone only a little way, and most of what the adapter "
         "corrects is still there.",
    "d": "The shapes fit, and nothing in A and B says which weights they were made for. Somebody has to write it down "
         "beside them, and somebody to look.",
})

adding_factors = Prediction("c", {
    "a": "A product of sums is not the sum of the products: (B1 + B2)(A1 + A2) holds two more, B1 A2 and B2 A1.",
    "b": "The two products too many are no small correction: they are made of the same matrices as the right ones, and "
         "about as large.",
    "c": "B1 A2 and B2 A1 are about as large as B1 A1 and B2 A2, and nobody trained them.",
    "d": "What was meant is in it, whole. What comes on top is about as large again.",
})
