"""Notebook 06, a fair race: two choices and three exercises."""

import math
import random
import statistics
from collections import defaultdict

from . import Exercise, Prediction

best_lr = Prediction("d", {
    "a": "Few parameters are not delicate ones. B starts at zero and has a way to go, and near by LoRA's best rate "
         "is several times as high.",
    "b": "So it is on the far task, but only because full fine-tuning wants a higher rate there. Near by the two "
         "differ by a factor of several, and with one rate for both, one of them runs far from its own best.",
    "c": "That is the published factor, for long runs of large models. Here it is several near by, and about one on "
         "the far task: a rule of thumb to start from, not a law.",
    "d": "Full fine-tuning's best rate moves with the task: to get far in 60 steps it takes long ones. LoRA's "
         "hardly moves, because a little above it training falls apart. So the factor is no constant.",
})

far_task = Prediction("b", {
    "a": "So it was near by. But the far task asks for a new answer to every word, and that is more than a thin "
         "matrix beside each weight can bring in the same time.",
    "b": "How far LoRA gets depends on how far the task is. Near by it gets nearly all of what full fine-tuning "
         "gets, far off a part.",
    "c": "Less is not nothing: the loss fell a long way. LoRA is slower there, not stuck.",
    "d": "Eight times the rank got no farther in the same steps: it is not the rank that ran out.",
})


def sweep_rows(seed: int) -> tuple[list[dict]]:
    """Rows in which the right choice, the best single run and the best test loss are at different learning rates."""
    tables = {  # lr: (validation, test) of three seeds
        0: {1e-3: [(0.30, 0.50), (0.32, 0.52), (0.34, 0.48)], 3e-3: [(0.20, 0.41), (0.22, 0.43), (0.21, 0.40)],
            1e-2: [(0.24, 0.31), (0.26, 0.33), (0.25, 0.32)], 3e-2: [(0.10, 0.90), (0.80, 0.95), (0.90, 0.20)]},
        1: {3e-4: [(2.4, 2.0), (2.6, 2.1), (2.5, 2.3)], 1e-3: [(1.0, 2.6), (1.2, 2.4), (1.1, 2.9)],
            3e-3: [(0.9, 1.2), (1.5, 1.1), (1.8, 1.6)]}}
    factor = 1 + seed // 2
    return ([{"lr": lr, "seed": s, "validation": v * factor, "loss": t * factor}
             for lr, scores in tables[seed % 2].items() for s, (v, t) in enumerate(scores)],)


def draw_rows(number: int) -> tuple[list[dict]]:
    """In any order; a rate may have fewer seeds than another, and other ones, but for seed 0."""
    rates = random.sample((1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), random.randint(3, 5))
    rows = [{"lr": lr, "seed": s, "validation": random.uniform(0.1, 3), "loss": random.uniform(0.1, 3)}
            for lr in rates for s in [0, *random.sample(range(1, 5), random.randint(1, 3))]]
    return (random.sample(rows, len(rows)),)


def fair(rows: list[dict]) -> tuple[float, float]:
    """By sorting (mean validation, lr, mean test) of each learning rate."""
    table = defaultdict(list)
    for row in rows:
        table[row["lr"]].append((row["validation"], row["loss"]))
    means = [(statistics.fmean(v for v, _ in scores), lr, statistics.fmean(loss for _, loss in scores))
             for lr, scores in table.items()]
    return sorted(means)[0][1:]


def pick_by(choose: str, report: str, over=statistics.fmean):
    """A choice by one column that reports another, each over the seeds."""
    def pick(rows):
        rates = {row["lr"] for row in rows}
        score = {lr: over([row[choose] for row in rows if row["lr"] == lr]) for lr in rates}
        lr = min(rates, key=score.get)
        return lr, statistics.fmean([row[report] for row in rows if row["lr"] == lr])
    return pick


def of_one_run(rows):
    best = min(rows, key=lambda row: row["validation"])
    return best["lr"], best["loss"]


def middle(rows):
    lr, _ = fair(rows)
    return lr, statistics.median(row["loss"] for row in rows if row["lr"] == lr)


def best_seed(rows):
    lr, _ = fair(rows)
    return lr, min(row["loss"] for row in rows if row["lr"] == lr)


fair_score = Exercise(
    "fair_score", fair, sweep_rows,
    [(pick_by("loss", "loss"),
      "chosen by the test loss, the learning rate makes the test file a part of training: use the validation loss"),
     (pick_by("validation", "validation"),
      "the validation loss chose the learning rate, so it flatters; report the test loss"),
     (of_one_run, "that is the luckiest single run: choose by the mean over the seeds"),
     (pick_by("validation", "loss", min), "that chooses by the luckiest seed of each learning rate: take the mean"),
     (best_seed, "the right learning rate, but the score is that of its best seed: report the mean over seeds"),
     (lambda rows: fair(rows)[0], "return two values: the learning rate and the test loss"),
     (lambda rows: fair(rows)[::-1], "the right two values in the wrong order: first the learning rate"),
     (lambda rows: pick_by("validation", "loss")([r | {"validation": -r["validation"]} for r in rows]),
      "the largest loss is chosen: the smallest is the best"),
     (lambda rows: pick_by("validation", "loss")([r for r in rows if r["seed"] == min(x["seed"] for x in rows)]),
      "only the runs of one seed are looked at: take the mean over all seeds"),
     (pick_by("validation", "loss", statistics.median),
      "the rate is chosen by the median over the seeds: the mean is asked for"),
     (middle, "the score is the median over the seeds: report the mean"),
     (pick_by("validation", "loss", sum), "a sum over the seeds grows with their number: take the mean"),
     (pick_by("validation", "loss", max), "that chooses by the worst seed of each learning rate: take the mean"),
     (lambda rows: (fair(rows)[0], sum(r["loss"] for r in rows if r["lr"] == fair(rows)[0])),
      "the score is the sum over the seeds: divide by their number"),
     (lambda rows: (fair(rows)[0], statistics.fmean(r["loss"] for r in rows)),
      "the score is the mean over all rates: take the rows of the chosen rate alone")],
    draw=draw_rows,
    situations=[(lambda rows: len({sum(r["lr"] == lr for r in rows) for lr in {r["lr"] for r in rows}}) > 1,
                 "the learning rates have different numbers of seeds")])


def u_curve(seed: int) -> tuple[list[float], list[float]]:
    rates = ([1e-3, 3e-3, 1e-2], [3e-4, 1e-3, 3e-3], [2e-3, 4e-3, 1e-2], [1e-3, 3e-3, 1e-2])[seed % 4]
    bottom, width = rates[1] * (1.3, 0.8, 1.1, 0.7)[seed % 4], (0.3, 0.5, 0.9, 0.15)[seed % 4]
    return rates, [0.02 * (1 + seed) * math.exp(width * math.log(rate / bottom) ** 2) for rate in rates]


def draw_curve(number: int) -> tuple[list[float], list[float]]:
    middle, left, right = 10 ** random.uniform(-4, -2), random.uniform(2, 4), random.uniform(2, 4)
    rates = [middle / left, middle, middle * right]
    bottom, width, least = middle * random.uniform(0.7, 1.4), random.uniform(0.2, 0.9), random.uniform(0.01, 0.2)
    return rates, [least * math.exp(width * math.log(rate / bottom) ** 2) for rate in rates]


def vertex(rates, losses, log_x=True, log_y=True) -> float:
    """Of the parabola through three points, from its divided differences."""
    x = [math.log(r) if log_x else r for r in rates]
    y = [math.log(v) if log_y else v for v in losses]
    first, second = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (second - first) / (x[2] - x[0])
    at = (x[0] + x[1]) / 2 - first / (2 * bend)
    return math.exp(at) if log_x else at


bottom = Exercise(
    "bottom", vertex, u_curve,
    [(lambda rates, losses: rates[losses.index(min(losses))],
      "that is the best of the three points; the bottom of the parabola lies between them"),
     (lambda rates, losses: vertex(rates, losses, False, True),
      "the rates are spaced by factors: take their logarithms too"),
     (lambda rates, losses: vertex(rates, losses, True, False),
      "take the logarithm of the losses too: the U is one of factors"),
     (lambda rates, losses: vertex(rates, losses, False, False),
      "fit in the logarithms, both of the rates and of the losses"),
     (lambda rates, losses: math.log(vertex(rates, losses)), "that is the logarithm of the rate: exp brings it back"),
     (lambda rates, losses: 1 / vertex(rates, losses),
      "the sign is lost: the vertex of a x^2 + b x + c lies at -b / 2a"),
     (lambda rates, losses: vertex(rates, losses) ** 2, "the 2 is lost: the vertex of a x^2 + b x + c lies at -b / 2a"),
     (lambda rates, losses: min(losses), "that is a loss; the question is at which rate it is least"),
     (lambda rates, losses: statistics.fmean(rates),
      "that is the mean of the rates; the losses say where the bottom is"),
     (lambda rates, losses: math.sqrt(rates[0] * rates[2]),
      "that is the middle of the outer rates; the losses say where the bottom is"),
     (lambda rates, losses: math.log10(vertex(rates, losses)), "that is the logarithm of the rate: 10 to that power"),
     (lambda rates, losses: 10 ** math.log(vertex(rates, losses)),
      "log goes with exp, log10 with 10 ** x: one of each"),
     (lambda rates, losses: math.exp(math.log10(vertex(rates, losses))),
      "log10 goes with 10 ** x, log with exp: one of each")],
    tolerance=1e-4, draw=draw_curve)


def three_losses(seed: int) -> tuple[float, float, float]:
    return ((4.0, 0.5, 0.25), (2.0, 1.5, 0.5), (3.0, 0.3, 0.6), (1.0, 0.9, 0.2))[seed % 4]


def draw_losses(number: int) -> tuple[float, float, float]:
    """Now and then LoRA ends above the base, or below full fine-tuning."""
    base = random.uniform(2, 6)
    full = random.uniform(0.1, 1.5)
    return base, (random.uniform(0.1, 1.5), base * random.uniform(1.05, 1.5), full * 0.7, base)[number % 4], full


benefit = Exercise(
    "benefit", lambda base, lora, full: 1 - (lora - full) / (base - full), three_losses,
    [(lambda base, lora, full: full / lora,
      "a ratio of losses forgets where both began: compare how far each has come"),
     (lambda base, lora, full: lora / full, "a ratio of losses forgets where both began: divide the two ways come"),
     (lambda base, lora, full: (base - lora) / base,
      "that is LoRA's own fall; the measure is the fall that full fine-tuning achieves"),
     (lambda base, lora, full: (base - full) / (base - lora), "upside down: LoRA's fall over that of full fine-tuning"),
     (lambda base, lora, full: (lora - full) / (base - full),
      "that is the share that is lost; the rest is the benefit"),
     (lambda base, lora, full: (lora - base) / (base - full),
      "the sign is wrong: a loss below the base's is a benefit"),
     (lambda base, lora, full: min(1.0, (base - lora) / (base - full)),
      "do not cap it: LoRA may get more than full fine-tuning, and then the share is above 1"),
     (lambda base, lora, full: max(0.0, (base - lora) / (base - full)),
      "do not cut it off at 0: LoRA may end above the base, and then the benefit is negative"),
     (lambda base, lora, full: min(1.0, max(0.0, (base - lora) / (base - full))),
      "do not cut it off: below 0 LoRA did harm, above 1 it got more than full fine-tuning"),
     (lambda base, lora, full: abs(base - lora) / abs(base - full),
      "abs hides a loss that rose: LoRA may end above the base, and then the benefit is negative"),
     (lambda base, lora, full: 100 * (base - lora) / (base - full), "that is in percent; the share is from 0 to 1"),
     (lambda base, lora, full: base - lora, "that is LoRA's fall; divide it by the fall of full fine-tuning"),
     (lambda base, lora, full: (base - lora) / full,
      "divide by the fall of full fine-tuning, base - full, not by full"),
     (lambda base, lora, full: round((base - lora) / (base - full), 2), "do not round: give the share as it is")],
    draw=draw_losses,
    situations=[(lambda base, lora, full: lora > base, "LoRA ends above the base: the benefit is negative"),
                (lambda base, lora, full: lora < full, "LoRA ends below full fine-tuning: the benefit is above 1"),
                (lambda base, lora, full: lora == base, "LoRA stays at the base's loss")])
