"""Notebook 15: the targets of a conversation, the learning rate's rule, what a run costs; a prediction of how much of a
file counts."""

import random

from . import Exercise, Prediction


def draw_row(seed: int) -> tuple[list[int], list[bool]]:
    n = 6 + 3 * seed
    ids = random.sample(range(10, 700), n)
    trained = [False] * n
    start = random.randint(2, n - 3)
    for i in range(start, min(n, start + random.randint(2, n - start))):
        trained[i] = True
    trained[-1] = seed % 2 == 0
    return ids, trained


def shifted(ids: list[int], trained: list[bool]) -> list[int]:
    """Place by place: the token that comes next, if it counts."""
    return [token if counts else -100 for token, counts in list(zip(ids, trained))[1:]]


next_targets = Exercise("next_targets", shifted, draw_row, [
    (lambda ids, on: [i if t else -100 for i, t in zip(ids, on)],
     "these are the tokens themselves: at each place the target is the token that comes next"),
    (lambda ids, on: [i if t else -100 for i, t in zip(ids, on)][:-1],
     "these are the tokens themselves, one too few at the end: the target at a place is the token after it"),
    (lambda ids, on: [i if t else -100 for i, t in zip(ids[1:], on)],
     "the mark belongs to the token that is to be written: take that of the next token as well"),
    (lambda ids, on: [-100 if t else i for i, t in zip(ids[1:], on[1:])], "this is the other way round"),
    (lambda ids, on: [i if t else 0 for i, t in zip(ids[1:], on[1:])],
     "0 is a token like any other; what does not count is -100"),
    (lambda ids, on: list(ids[1:]), "all of them count here, the customer's words too: mask with -100"),
    (lambda ids, on: [i for i, t in zip(ids[1:], on[1:]) if t],
     "what does not count is gone: then the targets do not stand at their places any more"),
    (lambda ids, on: [i if t else -100 for i, t in zip(ids[1:], on[1:])] + [-100],
     "one too many: after the last token there is nothing to predict, so a row has one place less than tokens"),
])

WIDTH, RATE, POWER = 160, 3e-3, 0.78


def draw_width(seed: int) -> tuple[int, str]:
    return (160, 1024, 4096, 2560)[seed], ("lora", "lora", "full", "full")[seed]


def by_width(width: int, method: str) -> float:
    return RATE * (WIDTH / width) ** POWER * (1 if method == "lora" else 1 / 5)


rate_for = Exercise("rate_for", by_width, draw_width, [
    (lambda w, m: RATE / (1 if m == "lora" else 5), "this is the same at every width: wider models take smaller rates"),
    (lambda w, m: by_width(w, "lora"), "full fine-tuning takes a fifth of this"),
    (lambda w, m: by_width(w, m) * (25 if m == "full" else 1), "five times the wrong way: full takes a fifth, not five "
     "times as much"),
    (lambda w, m: RATE * (w / WIDTH) ** POWER / (1 if m == "lora" else 5),
     "this grows with the width: it is 160 / width that is raised to the power"),
    (lambda w, m: RATE * WIDTH / w / (1 if m == "lora" else 5), "the power is missing: (160 / width) ** 0.78"),
    (lambda w, m: by_width(w, m) / (2 if m == "full" else 1),
     "a tenth goes by the published factor; here it is the five times that notebook 06 measured near by"),
])


def draw_job(seed: int) -> tuple[int, float, float, float, float]:
    return ((10**6, 3, 500.0, 300.0, 0.3), (52_000_000, 1, 2000.0, 450.0, 0.25), (12_345, 2, 60.0, 65.0, 0.4),
            (7_000_000, 4, 3500.0, 700.0, 0.2))[seed]


def by_hours(tokens: int, epochs: float, speed: float, watts: float, price: float) -> tuple[float, float]:
    hours = tokens * epochs / speed / 3600
    return hours, hours * watts / 1000 * price


cost_of = Exercise("cost_of", by_hours, draw_job, [
    (lambda n, e, s, w, p: (n * e / s, n * e / s * w / 1000 * p), "these are seconds: an hour has 3,600"),
    (lambda n, e, s, w, p: (n / s / 3600, n / s / 3600 * w / 1000 * p), "this is one epoch"),
    (lambda n, e, s, w, p: (n * e / s / 3600, n * e / s / 3600 * w * p),
     "watts were taken for kilowatts: divide by 1,000"),
    (lambda n, e, s, w, p: (n * e / s / 60, n * e / s / 60 * w / 1000 * p), "these are minutes"),
    (lambda n, e, s, w, p: (n * e / s / 3600, n * e / s / 3600 * p), "the power is missing: the price is one of a kWh"),
    (lambda n, e, s, w, p: (n * e * s / 3600, n * e * s / 3600 * w / 1000 * p),
     "tokens divided by tokens a second are seconds; this multiplies"),
    (lambda n, e, s, w, p: n * e / s / 3600, "both are wanted: hours, and money"),
])


what_counts = Prediction("c", {
    "a": "So it would be without a mask. The model would learn to write customers' messages too, which nobody asked "
         "it for.",
    "b": "The tickets are long, but the messages are a little longer, and the marks of who speaks count for "
         "nothing.",
    "c": "A ticket is nearly half of its conversation. The rest is read, and costs as much to compute, and teaches "
         "nothing by itself.",
    "d": "The first token of a text has no place before it from which it could be predicted. But a reply begins in the "
         "middle of a conversation, and every token of it counts.",
})
