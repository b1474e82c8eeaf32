"""Notebook 07: a healthy start, a frozen base, a diagnosis; predictions about symptoms; six patients."""

import random
from dataclasses import dataclass

import torch
from torch import nn

from ..grading.models import Layer
from . import Exercise, Prediction

# ---------------------------------------------------------------- healthy_start


def factors(seed: int, way: int | None = None) -> tuple:
    """A (r, d_in) and B (d_out, r), in turn: as LoRA starts, both zero, neither, as an embedding starts, both random
    with a product of zero; then starts that a sum, a mean, a maximum or a tolerance takes for another."""
    rank, d_in, d_out = 2 + seed % 3, 5 + seed, 4 + seed
    A, B = torch.randn(rank, d_in), torch.randn(d_out, rank)
    way = seed if way is None else way
    if way == 4:
        A[0], B[:, 1:] = 0, 0
    even = torch.zeros_like(A)
    even[0] = torch.arange(d_in) - (d_in - 1) / 2  # adds up to zero, exactly
    if way == 5:
        A, B = even, torch.randint(1, 4, B.shape).float()
    if way == 6:  # nothing above zero in the product
        A, B = A.abs(), -B.abs()
    if way == 7:  # small, but no zero
        A, B = 1e-6 * A, 1e-6 * B
    if way in (8, 9):  # one entry alone is not zero, in the product or in A
        A, B = torch.zeros_like(A), torch.zeros_like(B) if way == 9 else B
        A[0, 1] = -1.0
    if way == 10:
        A, B = even, torch.zeros_like(B)
    return A * (way not in (1, 3)), B * (way not in (0, 1))


def started_by(nonzero):
    """The mistake that asks each matrix for zeros in another way."""
    return lambda A, B: ("not the base" if nonzero(B @ A) else "healthy" if nonzero(A) or nonzero(B) else "never moves")


def started(A, B):
    if torch.count_nonzero(torch.einsum("or,ri->oi", B, A)):
        return "not the base"
    # the gradient of A is B^T (...) and that of B is (...) A^T: one nonzero factor keeps the other one alive
    return "healthy" if A.abs().sum() + B.abs().sum() > 0 else "never moves"


healthy_start = Exercise(
    "healthy_start", started, factors,
    [(lambda A, B: "healthy" if not (B @ A).any() else "not the base",
      "a product of zero is not enough: with A and B both zero neither has a gradient, and the adapter never moves"),
     (lambda A, B: "healthy" if not B.any() else "not the base",
      "B of zeros says nothing about A: if both are zero, neither has a gradient"),
     (lambda A, B: "never moves" if not A.any() and not B.any() else "healthy" if not B.any() else "not the base",
      "it need not be B that is zero: LoRA on an embedding starts from A = 0. What counts is the product B A"),
     (lambda A, B: "never moves" if not A.any() or not B.any() else "not the base",
      "one zero factor is the healthy start: its gradient is made by the other factor, which is not zero"),
     (lambda A, B: "never moves" if not (A.any() or B.any()) else "not the base" if A.any() and B.any() else "healthy",
      "two nonzero factors may still have a product of zero: form B @ A and look"),
     (lambda A, B: "healthy" if not A.any() and not B.any() else "not the base" if (B @ A).any() else "never moves",
      "the wrong way round: both zero never moves, one zero is healthy"),
     (lambda A, B: "healthy" if (B @ A).any() else "never moves",
      "a product that is not zero changes the model before the first step: not the base"),
     (lambda A, B: started(A, B) == "healthy", "return one of the three words, not True or False"),
     *((started_by(nonzero), words) for nonzero, words in (
         (lambda M: M.sum() != 0, "a sum may be zero where no entry is: ask whether any entry is not zero"),
         (lambda M: M.abs().mean() > 1e-5, "a small matrix is no zero: ask whether any entry is not zero"),
         (lambda M: M.max() > 0, "the largest entry may be below zero: ask whether any entry is not zero"),
         (lambda M: bool(M.all()), "all asks whether no entry is zero; any, whether one entry is not zero"),
         (lambda M: not torch.allclose(M, torch.zeros_like(M)),
          "allclose takes small numbers for zero; exactly zero is meant: any")))],
    rounds=11, draw=lambda number: factors(number, random.randrange(11)),
    situations=[(lambda A, B: not A.any() and not B.any(), "both are zero"),
                (lambda A, B: not B.any() and A.any(), "B is zero and A is not"),
                (lambda A, B: not A.any() and B.any(), "A is zero and B is not"),
                (lambda A, B: A.any() and B.any() and not (B @ A).any(), "neither is zero, but their product is"),
                (lambda A, B: (B @ A).any() and (B @ A).abs().max() < 1e-9, "the product is small, but not zero"),
                (lambda A, B: (B @ A).any(), "the product is not zero")])


# ---------------------------------------------------------------- is_frozen


def frozen_or_not(seed: int) -> tuple:
    """In turn: as it should be; a base's bias trains; a norm trains; a module with an adapter's name trains; an adapter
    is frozen; as it should be, before the first backward pass; one leaks and one is frozen, so that the count is right.
    """
    model = nn.ModuleDict({"q_proj": Layer(), "norm": nn.LayerNorm(3), "lora_Annex": nn.Linear(3, 3),
                           "v_proj": Layer()})
    model.requires_grad_(False)
    for name in ("q_proj", "v_proj"):
        model[name].lora_A.requires_grad_(True)
        model[name].lora_B.requires_grad_(True)
    leaks = {1: model["v_proj"].base_layer.bias, 2: model["norm"].weight, 3: model["lora_Annex"].weight,
             6: model["q_proj"].base_layer.weight}
    if seed in leaks:
        leaks[seed].requires_grad_(True)
    model["v_proj"].lora_B.requires_grad_(seed not in (4, 6))
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad and seed != 5 else None
    return (model,)


def draw_freezing(number: int) -> tuple:
    """Names at random; half the time all is as it should be, else one parameter trains that should not, or does not
    and should."""
    names = random.sample(("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"), random.randint(2, 5))
    others = random.sample(("norm", "lora_Annex", "embed", "head", "my_lora_B"), random.randint(1, 4))
    kinds = [(name, Layer()) for name in names] + [(name, random.choice((nn.LayerNorm(3), nn.Linear(3, 3))))
                                                   for name in others]
    model = nn.ModuleDict(random.sample(kinds, len(kinds)))
    for name, p in model.named_parameters():
        p.requires_grad_(own(name))
    if random.random() < 0.5:
        for flipped in random.sample([*model.parameters()], random.choice((1, 1, 2))):
            flipped.requires_grad_(not flipped.requires_grad)
    has_run = random.random() < 0.7
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad and has_run else None
    return (model,)


def trains_just_adapters(model):
    wanted = {f"{name}.{part}" for name, module in model.named_modules() if hasattr(module, "base_layer")
              for part in ("lora_A", "lora_B")}
    return {name for name, p in model.named_parameters() if p.requires_grad} == wanted


def own(name):
    return name.split(".")[-1] in ("lora_A", "lora_B")


def judged(looked_at, mine=own):
    """An answer that looks at some names only."""
    return lambda model: all(p.requires_grad == mine(name) for name, p in model.named_parameters() if looked_at(name))


is_frozen = Exercise(
    "is_frozen", trains_just_adapters, frozen_or_not,
    [(judged(lambda name: True, lambda name: "lora_" in name),
      "lora_ somewhere in a name is not enough: lora_Annex.weight belongs to the base. Look at the name's last part"),
     (judged(lambda name: not own(name)),
      "an adapter that does not train is a fault too: every lora_A and lora_B must train"),
     (judged(own), "every adapter trains, but so may the base: nothing else may have requires_grad"),
     (lambda model: any(not p.requires_grad for name, p in model.named_parameters() if not own(name)),
      "one frozen weight is not a frozen base: all of them, not any"),
     (lambda model: all((p.grad is not None) == own(name) for name, p in model.named_parameters()),
      "grad says what a backward pass has left, and before the first it is None everywhere: ask requires_grad"),
     (judged(lambda name: name.endswith("weight") or own(name)),
      "a base has more than weights: a bias that trains is a leak too"),
     (judged(lambda name: "base_layer" in name or own(name)),
      "not only the base_layer inside an adapter can leak: norms, embeddings and other modules must be frozen too"),
     (lambda model: sum(p.requires_grad for p in model.parameters()) ==
      sum(own(name) for name, _ in model.named_parameters()),
      "the count may be right by chance, where one leaks and another is frozen: look at every name"),
     (lambda model: sum(p.requires_grad for p in model.parameters()) == 4,
      "a model need not have two adapters, and a count does not say which ones train: look at every name"),
     (lambda model: not trains_just_adapters(model), "the wrong way round: True if all is as it should be"),
     (judged(lambda name: "lora_" in name or "base" in name),
      "norms, embeddings and other modules are not looked at: every parameter counts")],
    rounds=7, draw=draw_freezing,
    situations=[(lambda model: trains_just_adapters(model), "all is as it should be: the answer is True"),
                (lambda model: any(own(n) and not p.requires_grad for n, p in model.named_parameters()),
                 "a lora_A or lora_B is frozen: the answer is False"),
                (lambda model: any(not own(n) and p.requires_grad for n, p in model.named_parameters()),
                 "a parameter of the base trains: the answer is False")])


# ---------------------------------------------------------------- diagnose

PLANNED = 28  # modules of the base that the config was meant to reach
EDGES = (("healthy", {"exact": 0.9}), ("healthy", {"served": 0.9}), ("scale", {"served": 0.899}),
         ("scale", {"exact": 0.9}), ("rank", {"base_exact": 0.9}), ("rank", {"exact": 0.899, "served": 0.899}),
         ("base", {"base_exact": 0.899}), ("modules", {"modules": PLANNED - 1, "base_exact": 0.9}),
         ("healthy", {"grad_A": 0.0}), ("healthy", {"exact": 0.9, "served": 0.9}))
WAYS = ("healthy", "rank", "modules", "base", "zeros", "unfrozen", "scale", "unfrozen", "rank", "modules", "base")


def reports(seed: int) -> tuple:
    """A report like those of `experiments.examine`; the second of a fault is a case that a short cut gets wrong; then
    those in which a number stands at its threshold."""
    if seed >= len(WAYS):
        way, edge = EDGES[seed - len(WAYS)]
        return (report_of(way, False) | edge,)
    return (report_of(WAYS[seed], seed >= 7),)


def report_of(way: str, again: bool) -> dict:
    vary = torch.rand(6).mul(0.2).add(0.9).tolist()
    seen = {"modules": PLANNED, "planned": PLANNED, "grad_A": 0.4 * vary[0], "grad_B": 0.5 * vary[1],
            "update": 0.12 * vary[2], "base_changed": False, "base_exact": 0.955, "exact": 0.99, "served": 0.99}
    seen |= {
        "healthy": {},
        "rank": {"exact": 0.25 + 0.5 * (not again), "served": 0.25 + 0.5 * (not again)},
        "modules": {"modules": 4, "exact": 0.2, "served": 0.2} if not again else
                   {"modules": 14, "exact": 0.6, "served": 0.6},
        "base": {"base_exact": 0.0, "exact": 0.1, "served": 0.1} if not again else
                {"base_exact": 0.3, "exact": 0.4, "served": 0.4, "grad_A": 2.5, "grad_B": 3.0},
        "zeros": {"grad_A": 0.0, "grad_B": 0.0, "update": 0.0, "exact": 0.0, "served": 0.0},
        "unfrozen": {"base_changed": True, "exact": 0.98, "served": 0.0} if not again else
                    {"base_changed": True, "exact": 0.05, "served": 0.0},
        "scale": {"served": 0.3},
    }[way]
    return seen


def draw_report(number: int) -> tuple:
    """Other numbers each time, on the same side of every threshold, often at it; now and then A is a frozen one."""
    way = (7 * number + random.randrange(4)) % len(WAYS)
    seen = report_of(WAYS[way], way >= 7)
    for key in ("base_exact", "exact", "served"):
        seen[key] = (random.choice((0.9, 0.9, random.uniform(0.9, 0.93), random.uniform(0.93, 1.0))) if seen[key] >= 0.9
                     else random.choice((0.899, 0.85, seen[key] * random.uniform(0.4, 1.1))))
    if WAYS[way] in ("healthy", "rank", "scale") and random.random() < 0.3:
        seen["grad_A"] = 0.0
    if WAYS[way] in ("rank", "modules", "base"):
        seen["served"] = seen["exact"]
    planned, reached = random.randint(20, 60), seen["modules"] / PLANNED
    few = random.choice((random.randint(1, planned - 1), planned - 1))
    return (seen | {"planned": planned, "modules": planned if reached == 1 else few},)


def named(report):
    rules = {
        "zeros": max(report["grad_A"], report["grad_B"]) == 0,
        "unfrozen": report["base_changed"],
        "scale": report["exact"] >= 0.9 > report["served"],
        "healthy": min(report["exact"], report["served"]) >= 0.9,
        "base": report["base_exact"] < 0.9,
        "modules": report["modules"] != report["planned"],
    }
    return next((fault for fault, holds in rules.items() if holds), "rank")


def told_apart_without(**forced):
    """A diagnosis that does not look at some entries: it takes them as given here."""
    return lambda report: named(report | forced)


def with_bars(**higher):
    """A diagnosis whose bar for some entries is not at 0.9 but so much higher: at 0.9 itself they are not good."""
    return lambda report: named(report | {
        key: 1.0 if report[key] >= 0.9 + more else min(report[key], 0.89) for key, more in higher.items()})


diagnose = Exercise(
    "diagnose", named, reports,
    [(told_apart_without(base_changed=False),
      "a base that changed was not noticed: look at base_changed before you judge what was served"),
     (lambda report: named(report | {"served": report["exact"]}),
      "an adapter that is right in training and wrong when served has lost its scale: compare served with exact"),
     (told_apart_without(base_exact=1.0),
      "a base that cannot do its own job was taken for something else: look at base_exact before the rank"),
     (lambda report: named(report | {"modules": report["planned"]}),
      "fewer modules than planned, and yet not called modules: compare modules with planned"),
     (told_apart_without(grad_A=1.0),
      "two gradients of exactly zero are both matrices zero: nothing else stops both"),
     (lambda report: "unfrozen" if report["base_changed"] and report["exact"] < 0.9 else
      named(report | {"base_changed": False}),
      "an unfrozen base may fit the task very well: base_changed alone says unfrozen, whatever exact says"),
     (lambda report: "healthy" if report["exact"] >= 0.9 else named(report),
      "right in training is not yet healthy: what counts is what is served"),
     (lambda report: named(report) if named(report) in ("zeros", "unfrozen", "scale", "healthy") else "rank",
      "low exact has more causes than the rank: it comes last, when base and modules are in order"),
     (lambda report: {"zeros": "both zero"}.get(named(report), named(report)),
      "return one of the seven words: healthy, rank, modules, base, zeros, unfrozen, scale"),
     (lambda report: "zeros" if 0 in (report["grad_A"], report["grad_B"]) else named(report),
      "one gradient of zero is not both: a frozen A has none, and the adapter learns all the same"),
     (with_bars(exact=1e-9), "exactly 0.9 is good: >=, not >, for exact"),
     (with_bars(served=1e-9), "exactly 0.9 is good: >=, not >, for served"),
     (with_bars(base_exact=1e-9), "exactly 0.9 is good: >=, not >, for base_exact"),
     (with_bars(exact=1e-9, served=1e-9, base_exact=1e-9), "a share of exactly 0.9 is good: >=, not >"),
     *((with_bars(**dict.fromkeys(("exact", "served", "base_exact"), bar - 0.9)),
        f"the bar stands at {bar} here: a share from 0.9 on is good") for bar in (0.5, 0.8, 0.95))],
    rounds=len(WAYS) + len(EDGES), draw=draw_report,
    situations=[*((lambda report, fault=fault: named(report) == fault, f"the answer is {fault!r}")
                  for fault in ("zeros", "unfrozen", "scale", "healthy", "base", "modules", "rank")),
                (lambda report: 0.9 in (report["exact"], report["served"], report["base_exact"]),
                 "a share is exactly 0.9, which is good"),
                (lambda report: any(0.8 < report[key] < 0.9 for key in ("exact", "served", "base_exact")),
                 "a share is a little below 0.9, which is not good")])

# ---------------------------------------------------------------- predictions

same_curve = Prediction("c", {
    "a": "A small rank fits less, and the curve says so from early on: it levels out above the healthy one.",
    "b": "More that trains gives another curve, here a lower one. That is the trap: it looks better than healthy, and "
         "the adapter's file alone is worthless: most of what was learnt stayed in a base that nobody else has.",
    "c": "The training knew the scale, the file does not. Every curve, gradient and score taken in training is the "
         "healthy one to the last digit; only the adapter as it is served, loaded from its file, shows the damage.",
    "d": "Each gradient is made by the other factor. With both at zero there is none, not at step 0 and not ever.",
})

rank_one = Prediction("a", {
    "a": "The base can write in styles already. Choosing one takes very few directions, so here the rank is not the "
         "reason, and raising it would be no cure.",
    "b": "What a small rank costs depends on how much there is to learn: the catalogue has to be stored, a style is "
         "only to be chosen.",
    "c": "A near task asks for a choice among what the base can do: one direction a module is enough for most of it.",
})

SIGNS = {  # what each fault shows
    "rank": "A rank too small keeps everything in order but the size: all modules, both gradients alive, an intact and "
            "able base, and a loss that levels out too high.",
    "modules": "Wrong modules show in the count of modules. The few that were reached push far harder than healthy "
               "ones, to little avail.",
    "base": "A weak base cannot do its own job. No look at the adapter finds that: you have to test the base alone.",
    "zeros": "Two matrices of zero have no gradient at all: nothing moves, and the loss stays where it began.",
    "unfrozen": "An unfrozen base has another fingerprint afterwards. It trains far too many parameters, fits better "
                "than healthy, and its adapter is worth nothing once it is served on a clean base.",
    "scale": "A lost scale shows nowhere in training. The model in memory is right and the file is wrong.",
}


@dataclass(frozen=True)
class Patient(Prediction):
    """A diagnosis: None for a guess tells the right one alone."""

    def reveal(self, guess: str | None) -> None:
        super().reveal(self.right if guess is None else guess)


patients = {letter: Patient(fault, SIGNS) for letter, fault in
            zip("ABCDEF", ("unfrozen", "modules", "scale", "zeros", "base", "rank"))}


def ward(rows: list[dict]) -> dict[str, dict]:
    """letter -> the recorded report of that patient (seed 0), without its name."""
    named = {row["fault"]: row for row in rows if row["seed"] == 0}
    return {letter: {key: value for key, value in named[patient.right].items() if key != "fault"}
            for letter, patient in patients.items()}
