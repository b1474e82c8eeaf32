"""Notebook 13, ship an adapter: two choices, and three exercises: the budget, the serving plan, the acceptance rule."""

import random

from . import Exercise, Prediction

equals = Prediction("c", {
    "a": "200 messages sound like many. But only some ten replies are wrong, and by chance a few more or a few fewer.",
    "b": "So it is for a gap of about 8 replies. A gap of 3 is less than what chance does most of the time.",
    "c": "Chance alone does it more often than not. So 3 replies say nothing about which of two candidates is better: "
         "the cheaper one wins.",
    "d": "Equal models are equal on average. On the same 200 messages each makes its own mistakes.",
})

ceiling = Prediction("b", {
    "a": "Each trained number costs its value, its gradient and two of Adam's, and still one rank more is little "
         "beside 16 GB of frozen weights: the card carries on for longer than the file.",
    "b": "The customer's allowance for the file ends it first, the card one doubling later. Both are ceilings, not "
         "advice: what rank is needed, the validation file says.",
    "c": "The card and the file are unrelated limits: one holds the whole base beside the adapter, the other holds the "
         "adapter alone.",
    "d": "Every rank costs. At rank 256 the adapter's file alone is a sixth of the checkpoint.",
})


# options in any order, the allowance for the file, the card: the file decides, the card decides, both exactly at the
# edge, nothing, a need that only may fit, a card that only may be large enough, the largest is not the last
OFFERS = (
    ([(4, 40, (10, 12)), (8, 80, (10, 13)), (16, 160, (11, 14)), (32, 320, (12, 15))], 100, (20, 22)),
    ([(32, 320, (22, 28)), (2, 20, (10, 13)), (8, 80, (16, 19)), (4, 40, (14, 17))], 1000, (18, 21)),
    ([(1, 10, (5, 6)), (2, 20, (6, 7)), (3, 30, (7, 8))], 20, (7, 9)),
    ([(1, 10, (30, 33)), (2, 20, (40, 44))], 50, (20, 22)),
    ([(16, 64, (17, 22)), (32, 60, (20, 29)), (8, 32, (16, 20)), (4, 16, (15, 18))], 64, (19, 30)),
    ([(1, 1, (2, 3)), (8, 8, (7, 11)), (9, 9, (10, 13)), (4, 4, (4, 9))], 9, (9, 12)),
    ([(6, 60, (9, 9)), (5, 50, (8, 8)), (12, 70, (9, 10))], 65, (11, 11)),
)


def draw_offers(number: int) -> tuple:
    options = []
    for rank in random.sample(range(1, 65), random.randint(2, 6)):
        low = random.randint(5, 30)
        options.append((rank, random.randint(1, 12) * 10, (low, low + random.randint(0, 8))))
    card = random.choice((random.randint(10, 35), options[0][2][1]))
    return options, random.choice((random.randint(10, 130), options[-1][1])), (card, card + random.randint(0, 6))


def largest_within(options, file_budget, usable):
    ranks = [0]
    for rank, size, (_, most) in options:
        if size <= file_budget and most <= usable[0]:
            ranks.append(rank)
    return max(ranks)


def where(affordable, pick=lambda ranks: max(ranks, default=0)):
    """An answer that takes an option for affordable by (size, budget, need, usable)."""
    return lambda options, budget, usable: pick([r for r, size, need in options
                                                 if affordable(size, budget, need, usable)])


def sound(size, budget, need, usable):
    return size <= budget and need[1] <= usable[0]


affordable_rank = Exercise("affordable_rank", largest_within, OFFERS.__getitem__, [
    (where(lambda s, b, n, u: s <= b), "the card has a say too: what the step needs must fit into what is usable"),
    (where(lambda s, b, n, u: n[1] <= u[0]), "the file has a limit too: compare its bytes with the allowance"),
    (where(lambda s, b, n, u: s <= b and n[0] <= u[0]), "it must fit for sure: compare the most that it may need"),
    (where(lambda s, b, n, u: s <= b and n[1] <= u[1]),
     "it must fit for sure: compare with the least that the card may have"),
    (where(lambda s, b, n, u: s <= b and n[0] <= u[1]),
     "only the lucky case is checked: compare the most that is needed with the least that is usable"),
    (where(lambda s, b, n, u: s <= b or n[1] <= u[0]), "one limit kept is not enough: both, so and, not or"),
    (where(lambda s, b, n, u: s < b and n[1] < u[0]), "exactly as much as is allowed is allowed: <=, not <"),
    (where(sound, lambda ranks: ranks[0] if ranks else 0),
     "that is the first affordable one in the list; the largest is wanted, and the options come in any order"),
    (where(sound, lambda ranks: ranks[-1] if ranks else 0),
     "that is the last affordable one in the list; the largest is wanted, and the options come in any order"),
    (where(sound, lambda ranks: min(ranks, default=0)), "that is the smallest affordable rank; the largest is wanted"),
    (where(sound, max), "where no rank is affordable the answer is 0; max of nothing is an error"),
    (where(sound, lambda ranks: max(ranks, default=None)), "where no rank is affordable the answer is 0, not None"),
    (where(sound, lambda ranks: max(ranks, default=1)), "where no rank is affordable the answer is 0, not 1"),
    (where(sound, len), "that is how many ranks are affordable; the largest of them is wanted"),
    (where(sound, lambda ranks: sorted(ranks)), "those are all affordable ranks; the largest of them is wanted"),
    (lambda options, budget, usable: max([size for r, size, need in options if sound(size, budget, need, usable)],
                                         default=0), "that is the size of a file; its rank is wanted"),
    (lambda options, budget, usable: max([o[0] for o in options if sound(o[1], budget, o[2], usable)], default=-1),
     "where no rank is affordable the answer is 0, not -1"),
    (where(lambda s, b, n, u: s < b and n[1] <= u[0]), "a file of exactly the allowance is allowed: <=, not <"),
    (where(lambda s, b, n, u: s <= b and n[1] < u[0]), "exactly as much as the card has does fit: <=, not <"),
    (lambda options, budget, usable: next((r for r, s, n in sorted(options, reverse=True)[:1]
                                           if sound(s, budget, n, usable)), 0),
     "only the largest rank is tried; a smaller one may be affordable")],
    rounds=len(OFFERS), draw=draw_offers,
    situations=[(lambda options, budget, usable: largest_within(options, budget, usable) == 0,
                 "no rank is affordable: the answer is 0"),
                (lambda options, budget, usable: any(s == budget for r, s, n in options), "a file has exactly the "
                                                                                          "allowance"),
                (lambda options, budget, usable: any(n[1] == usable[0] for r, s, n in options),
                 "a step needs at most exactly what the card has for sure"),
                (lambda options, budget, usable: any(n[0] <= usable[0] < n[1] for r, s, n in options),
                 "a step may fit, but not for sure"),
                (lambda options, budget, usable: [*options] != sorted(options), "the ranks are in no order")])


# traffic, a base's bytes, an adapter's, memory: one copy, none (the shared base fills it), all (no shared base needed,
# and one fewer would not fit), exactly full, room to spare, adapters that take the place of a copy, two customers
HOUSES = (
    ({"a": 40, "b": 900, "c": 7, "d": 60}, 100, 3, 250),
    ({"p": 5, "q": 6, "r": 8}, 50, 9, 90),
    ({"u": 10, "v": 30, "w": 20}, 100, 5, 300),
    ({"k": 3, "l": 1, "m": 2, "n": 4}, 10, 1, 32),
    ({"x": 2, "y": 9}, 30, 2, 500),
    ({"a": 1, "b": 4, "c": 3, "d": 2, "e": 5}, 20, 6, 70),
    ({"s": 80, "t": 10, "o": 30}, 10, 4, 31),
    ({"s": 8, "t": 10, "o": 30, "z": 1}, 10, 2, 43),
)


def draw_house(number: int) -> tuple[dict, int, int, int]:
    """Room for a whole number of copies, or a little more or less."""
    names = random.sample("abcdefghijklmnop", random.randint(2, 7))
    traffic = dict(zip(names, random.sample(range(1, 1000), len(names))))
    base, adapter, copies = random.randint(20, 200), random.randint(1, 9), random.randint(0, len(names) + 1)
    room = held(copies, len(names), base, adapter) + random.choice((0, 0, -1, 1, random.randint(0, base)))
    return traffic, base, adapter, max(room, base + adapter * len(names))


def peel(traffic, base, adapter, memory):
    """Gives everyone a copy, then takes the quietest one's away until it fits."""
    merged = sorted(traffic, key=lambda name: -traffic[name])
    routed = []
    while merged and len(merged) * base + (base + len(routed) * adapter if routed else 0) > memory:
        routed.append(merged.pop())
    return merged


def most(held, order=lambda traffic: sorted(traffic, key=traffic.get, reverse=True), fits=lambda h, m: h <= m,
         give=lambda names, k: names[:k]):
    """An answer that takes the largest k of which `held` (k merged, n customers, base, adapter) fits."""
    def wrong(traffic, base, adapter, memory):
        n, names = len(traffic), order(traffic)
        return give(names, max((k for k in range(n + 1) if fits(held(k, n, base, adapter), memory)), default=0))
    return wrong


def held(k, n, base, adapter):
    return k * base + (base + (n - k) * adapter if k < n else 0)


def one_by_one(traffic, base, adapter, memory):
    names, k = sorted(traffic, key=traffic.get, reverse=True), 0
    while k < len(names) and held(k + 1, len(names), base, adapter) <= memory:
        k += 1
    return names[:k]


merged_copies = Exercise("merged_copies", peel, HOUSES.__getitem__, [
    (most(lambda k, n, base, adapter: k * base + (n - k) * adapter),
     "who is not merged needs a base to be routed on: one shared base beside the copies"),
    (most(lambda k, n, base, adapter: k * base),
     "the copies are not all: the others need the shared base and their adapters"),
    (most(lambda k, n, base, adapter: (k + 1) * base + (n - k) * adapter),
     "when every customer has a copy, nobody is routed: the shared base need not stay"),
    (one_by_one, "with one more it may fit again: when every customer has a copy, the shared base goes. Try all "
                 "numbers of copies"),
    (most(lambda k, n, base, adapter: k * base + (base if k < n else 0)),
     "the adapters of those who are routed take memory too"),
    (most(lambda k, n, base, adapter: k * base + n * adapter + (base if k < n else 0)),
     "a merged customer's adapter is in its copy: only the routed ones' adapters stand beside the shared base"),
    (most(held, order=list), "the busiest come first, not the first in the dict"),
    (most(held, order=lambda traffic: sorted(traffic, key=traffic.get)),
     "those are the quietest; a copy pays where the traffic is"),
    (most(held, order=sorted), "names sorted by name: sort them by their traffic"),
    (most(held, fits=lambda h, m: h < m), "exactly as much memory as there is does fit: <=, not <"),
    (most(held, give=lambda names, k: names[k:]), "those are the routed ones; who gets a copy?"),
    (most(held, give=lambda names, k: k), "that is how many; give their names, the busiest first"),
    (most(held, give=lambda names, k: names[:k][::-1]), "the quietest of them comes first: the busiest first"),
    (most(held, give=lambda names, k: sorted(names[:k])), "the right customers, but sorted by name: the busiest first"),
    (most(held, give=lambda names, k: names[:k + 1]), "one more than fits: its copy overspends the memory"),
    (most(lambda k, n, base, adapter: k * base + base + (n - k) * adapter - (adapter if k < n else base)),
     "all others' adapters count: one is missing"),
    (most(held, give=lambda names, k: names[:max(k, 1)]), "where no copy fits the list is empty")],
    rounds=len(HOUSES), draw=draw_house,
    situations=[(lambda traffic, b, a, m: peel(traffic, b, a, m) == [], "no copy fits"),
                (lambda traffic, b, a, m: len(peel(traffic, b, a, m)) == len(traffic),
                 "everybody gets a copy, so that no shared base is needed"),
                (lambda traffic, b, a, m: held(len(peel(traffic, b, a, m)), len(traffic), b, a) == m,
                 "the memory is used up exactly"),
                (lambda traffic, b, a, m: 0 < len(peel(traffic, b, a, m)) < len(traffic),
                 "some get a copy and the others share a base")])


# right replies by candidate, the control, the margin: the test disagrees, nobody passes, exactly the margin, the first
# is not the best, the control is the best, only the test passes, the sums
# of both files agree with validation, nobody reaches the margin itself
SCORES = (
    ({"base": {"validation": 90, "test": 88}, "x": {"validation": 110, "test": 112},
      "y": {"validation": 112, "test": 108}}, "base", 10),
    ({"x": {"validation": 95, "test": 120}, "y": {"validation": 97, "test": 90},
      "base": {"validation": 92, "test": 70}}, "base", 8),
    ({"p": {"validation": 30, "test": 29}, "none": {"validation": 25, "test": 20},
      "q": {"validation": 28, "test": 40}}, "none", 5),
    ({"a": {"validation": 160, "test": 165}, "b": {"validation": 170, "test": 150},
      "random": {"validation": 40, "test": 38}, "c": {"validation": 165, "test": 190}}, "random", 12),
    ({"old": {"validation": 150, "test": 120}, "new": {"validation": 149, "test": 150}}, "old", 0),
    ({"r": {"validation": 8, "test": 60}, "s": {"validation": 4, "test": 3},
      "t": {"validation": 20, "test": 5}}, "s", 6),
    ({"base": {"validation": 20, "test": 60}, "m": {"validation": 33, "test": 62},
      "n": {"validation": 29, "test": 90}}, "base", 10),
    ({"d": {"validation": 130, "test": 108}, "base": {"validation": 90, "test": 88},
      "e": {"validation": 110, "test": 112}}, "base", 10),
    ({"base": {"validation": 2, "test": 1}, "g": {"validation": 3, "test": 9},
      "h": {"validation": 4, "test": 2}}, "base", 5),
)


def draw_any_scores(number: int) -> tuple[dict, str, int]:
    """No two candidates have the same validation score, so that one of them is the best."""
    names = random.sample(("base", "x", "y", "old", "new", "random", "p", "q"), random.randint(2, 6))
    validation = random.sample(range(20, 60), len(names))
    right = {name: {"validation": v, "test": random.randint(10, 80)} for name, v in zip(names, validation)}
    control = random.choice(names)
    best = max(validation) - right[control]["validation"]
    return right, control, random.choice((random.randint(0, 12), best, best + 1))


def gate(right, control, margin):
    """Sorts out who passes, then sorts them."""
    floor = right[control]["validation"] + margin
    passed = sorted((scores["validation"], name) for name, scores in right.items()
                    if name != control and scores["validation"] >= floor)
    return passed[-1][1] if passed else None


def rule(passes, key=lambda scores: scores["validation"], others=True):
    """An answer that takes the best by `key` of those that pass (scores, the control's scores, margin)."""
    def wrong(right, control, margin):
        passed = [name for name in right if (name != control or not others)
                  and passes(right[name], right[control], margin)]
        return max(passed, key=lambda name: key(right[name]), default=None)
    return wrong


def by_validation(scores, control, margin):
    return scores["validation"] >= control["validation"] + margin


def everyone(right, control, margin):
    return [name for name in right if name != control and by_validation(right[name], right[control], margin)]


accepted = Exercise("accepted", gate, SCORES.__getitem__, [
    (rule(lambda s, c, m: s["test"] >= c["test"] + m, key=lambda s: s["test"]),
     "this decides by the test file, which is opened once, after the decision: use validation"),
    (rule(by_validation, key=lambda s: s["test"]),
     "the margin is checked on validation, but the best is chosen by the test file: choose by validation"),
    (rule(lambda s, c, m: s["test"] >= c["test"] + m),
     "the margin is checked on the test file: compare the validation scores"),
    (rule(lambda s, c, m: s["validation"] >= c["test"] + m),
     "a validation score is compared with the control's test score: both from the same file"),
    (rule(lambda s, c, m: by_validation(s, c, m) and s["test"] >= c["test"] + m),
     "the test file has a veto here: then it takes part in the choice, and its score is no honest estimate any more"),
    (rule(by_validation, key=lambda s: s["validation"] + s["test"]),
     "both files are added up: the test file takes no part in the choice"),
    (rule(lambda s, c, m: s["validation"] > c["validation"]), "the margin is left out: a hair better is chance"),
    (rule(lambda s, c, m: True), "the best is not always good enough: it must beat the control by the margin"),
    (rule(lambda s, c, m: s["validation"] >= m), "the margin is one above the control's score, not a score by itself"),
    (rule(lambda s, c, m: s["validation"] > c["validation"] + m), "exactly the margin is enough: >=, not >"),
    (rule(by_validation, key=lambda s: 0), "that is the first one that passes; the best on validation is wanted"),
    (rule(by_validation, key=lambda s: -s["validation"]), "that is the worst one that passes; the best is wanted"),
    (rule(by_validation, others=False), "the control is there to be beaten: it cannot be accepted itself"),
    (everyone, "those are all that pass; one name is wanted, the best on validation, or None"),
    (lambda right, control, margin: gate(right, control, margin) or control,
     "where nobody passes the answer is None, not the control"),
    (lambda right, control, margin: gate(right, control, margin) or "",
     "where nobody passes the answer is None, not an empty string"),
    (lambda right, control, margin: gate(right, control, margin) and right[gate(right, control, margin)]["validation"],
     "that is its score; the name is wanted"),
    (rule(lambda s, c, m: abs(s["validation"] - c["validation"]) >= m, key=lambda s: -s["validation"]),
     "a score far below the control passes too, and the lowest wins: no abs, and max"),
    (rule(lambda s, c, m: s["validation"] - c["validation"] >= m or s["test"] - c["test"] >= m),
     "the margin on the test file is enough here: validation alone decides"),
    (rule(lambda s, c, m: s["validation"] >= c["validation"] + m, key=lambda s: s["validation"] - s["test"]),
     "the best is the one with the highest validation score, not with the largest gap to the test file"),
    (rule(lambda s, c, m: s["validation"] >= m + max(c.values())),
     "the margin is above the control's validation score, whatever its test score is"),
    (lambda right, control, margin: gate(right, "base" if "base" in right else control, margin),
     "the control is the argument, whatever it is called")],
    rounds=len(SCORES), draw=draw_any_scores,
    situations=[(lambda right, control, margin: gate(right, control, margin) is None,
                 "nobody passes: the answer is None"),
                (lambda right, control, margin: any(s["validation"] == right[control]["validation"] + margin
                                                    for n, s in right.items() if n != control),
                 "a candidate has exactly the margin"),
                (lambda right, control, margin: max(right, key=lambda n: right[n]["validation"]) == control,
                 "the control is the best of all"),
                (lambda right, control, margin: control != "base", "the control is not called base"),
                (lambda right, control, margin: gate(right, control, margin) is not None, "a candidate passes")])
