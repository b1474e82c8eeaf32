"""Wrong answers to the exercises of notebook 06, as learners may write them, and a part of what each must be told."""

import math
from collections import defaultdict

import numpy as np


def means(rows, column):
    table = defaultdict(list)
    for row in rows:
        table[row["lr"]].append(row[column])
    return {lr: sum(values) / len(values) for lr, values in table.items()}


def by_the_test(rows):
    test = means(rows, "loss")
    lr = min(test, key=test.get)
    return lr, test[lr]


def flattered(rows):
    validation = means(rows, "validation")
    lr = min(validation, key=validation.get)
    return lr, validation[lr]


def luckiest_run(rows):
    row = sorted(rows, key=lambda r: r["validation"])[0]
    return row["lr"], row["loss"]


def luckiest_seed(rows):
    validation = means(rows, "validation")
    lr = min(validation, key=validation.get)
    return lr, min(r["loss"] for r in rows if r["lr"] == lr)


def the_rate_alone(rows):
    validation = means(rows, "validation")
    return min(validation, key=validation.get)


def worst(rows):
    validation = means(rows, "validation")
    lr = max(validation, key=validation.get)
    return lr, means(rows, "loss")[lr]


def grid_point(rates, losses):
    return rates[int(np.argmin(losses))]


def linear_rates(rates, losses):
    a, b, _ = np.polyfit(rates, np.log(losses), 2)
    return -b / (2 * a)


def linear_losses(rates, losses):
    a, b, _ = np.polyfit(np.log(rates), losses, 2)
    return np.exp(-b / (2 * a))


def no_logarithm(rates, losses):
    a, b, _ = np.polyfit(rates, losses, 2)
    return -b / (2 * a)


def not_back(rates, losses):
    a, b, _ = np.polyfit(np.log(rates), np.log(losses), 2)
    return -b / (2 * a)


def plus(rates, losses):
    a, b, _ = np.polyfit(np.log(rates), np.log(losses), 2)
    return np.exp(b / (2 * a))


def without_the_two(rates, losses):
    a, b, _ = np.polyfit(np.log(rates), np.log(losses), 2)
    return np.exp(-b / a)


def ratio(base, lora, full):
    return full / lora


def own_fall(base, lora, full):
    return 1 - lora / base


def upside_down(base, lora, full):
    return (full - base) / (lora - base)


def lost(base, lora, full):
    return (full - lora) / (full - base)


def negative(base, lora, full):
    return (lora - base) / (base - full)


def capped(base, lora, full):
    share = (base - lora) / (base - full)
    return share if share < 1 else 1.0


def ten_to_the(rates, losses):
    a, b, _ = np.polyfit(np.log(rates), np.log(losses), 2)
    return 10 ** (-b / (2 * a))


def mean_of_rates(rates, losses):
    return math.sqrt(rates[0] * rates[2])


WRONG = {
    "fair_score": [
        (by_the_test, "use the validation loss"), (flattered, "so it flatters"), (luckiest_run, "luckiest single run"),
        (luckiest_seed, "of its best seed"), (the_rate_alone, "return two values"),
        (worst, "the largest loss is chosen")],
    "bottom": [
        (grid_point, "the best of the three points"), (linear_rates, "spaced by factors"),
        (linear_losses, "the logarithm of the losses too"), (no_logarithm, "both of the rates and of the losses"),
        (not_back, "exp brings it back"), (plus, "the sign is lost"), (without_the_two, "the 2 is lost"),
        (ten_to_the, "one of each"), (mean_of_rates, "the middle of the outer rates")],
    "benefit": [
        (ratio, "where both began"), (own_fall, "LoRA's own fall"), (upside_down, "upside down"),
        (lost, "that is lost"), (negative, "the sign is wrong"), (capped, "do not cap it")],
}
