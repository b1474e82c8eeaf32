"""Wrong answers to the exercises of notebook 13, as learners may write them, and a part of what each must be told."""


def file_alone(options, file_budget, usable):
    return max((rank for rank, size, need in options if size <= file_budget), default=0)


def card_alone(options, file_budget, usable):
    return max([0] + [rank for rank, size, need in options if need[1] <= usable[0]])


def least_need(options, file_budget, usable):
    best = 0
    for rank, size, need in options:
        if size <= file_budget and need[0] <= usable[0]:
            best = max(best, rank)
    return best


def largest_card(options, file_budget, usable):
    best = 0
    for rank, size, need in options:
        if size <= file_budget and need[1] <= usable[1]:
            best = max(best, rank)
    return best


def hopeful(options, file_budget, usable):
    return max((o[0] for o in options if o[1] <= file_budget and min(o[2]) <= max(usable)), default=0)


def either(options, file_budget, usable):
    return max((r for r, size, need in options if size <= file_budget or need[1] <= usable[0]), default=0)


def strict(options, file_budget, usable):
    return max((r for r, size, need in options if size < file_budget and need[1] < usable[0]), default=0)


def first(options, file_budget, usable):
    for rank, size, need in options:
        if size <= file_budget and need[1] <= usable[0]:
            return rank
    return 0


def last(options, file_budget, usable):
    best = 0
    for rank, size, need in options:
        if size <= file_budget and need[1] <= usable[0]:
            best = rank
    return best


def smallest(options, file_budget, usable):
    return min([r for r, size, need in options if size <= file_budget and need[1] <= usable[0]] or [0])


def no_default(options, file_budget, usable):
    return max(r for r, size, need in options if size <= file_budget and need[1] <= usable[0])


def none(options, file_budget, usable):
    found = [r for r, size, need in options if size <= file_budget and need[1] <= usable[0]]
    return max(found) if found else None


def ranked(traffic):
    return [name for name, _ in sorted(traffic.items(), key=lambda item: item[1], reverse=True)]


def count(traffic, memory, needs):
    """The most copies whose `needs(copies, others)` fit."""
    n = len(traffic)
    return max([k for k in range(n + 1) if needs(k, n - k) <= memory] or [0])


def no_shared_base(traffic, base, adapter, memory):
    return ranked(traffic)[:count(traffic, memory, lambda k, others: k * base + others * adapter)]


def copies_alone(traffic, base, adapter, memory):
    return ranked(traffic)[:memory // base]


def shared_base_stays(traffic, base, adapter, memory):
    return ranked(traffic)[:count(traffic, memory, lambda k, others: base + k * base + others * adapter)]


def until_full(traffic, base, adapter, memory):
    chosen = []
    for name in ranked(traffic):
        others = len(traffic) - len(chosen) - 1
        if (len(chosen) + 1) * base + (others > 0) * (base + others * adapter) > memory:
            break
        chosen.append(name)
    return chosen


def no_adapters(traffic, base, adapter, memory):
    return ranked(traffic)[:count(traffic, memory, lambda k, others: (k + (others > 0)) * base)]


def all_adapters(traffic, base, adapter, memory):
    n = len(traffic)
    return ranked(traffic)[:count(traffic, memory, lambda k, others: (k + (others > 0)) * base + n * adapter)]


def size_of(base, adapter):
    return lambda k, others: (k + (others > 0)) * base + others * adapter


def as_listed(traffic, base, adapter, memory):
    return list(traffic)[:count(traffic, memory, size_of(base, adapter))]


def quietest(traffic, base, adapter, memory):
    return ranked(traffic)[::-1][:count(traffic, memory, size_of(base, adapter))]


def by_name(traffic, base, adapter, memory):
    return sorted(traffic)[:count(traffic, memory, size_of(base, adapter))]


def strictly_less(traffic, base, adapter, memory):
    return ranked(traffic)[:count(traffic, memory - 1, size_of(base, adapter))]


def the_others(traffic, base, adapter, memory):
    return ranked(traffic)[count(traffic, memory, size_of(base, adapter)):]


def how_many(traffic, base, adapter, memory):
    return count(traffic, memory, size_of(base, adapter))


def best(right, control, passes, by):
    """The best by `by` of those that pass, the control left out."""
    passed = {name: by(s) for name, s in right.items() if name != control and passes(s, right[control])}
    return max(passed, key=passed.get) if passed else None


def val(scores):
    return scores["validation"]


def test_of(scores):
    return scores["test"]


def by_test(right, control, margin):
    return best(right, control, lambda s, c: s["test"] - c["test"] >= margin, test_of)


def best_on_test(right, control, margin):
    return best(right, control, lambda s, c: val(s) - val(c) >= margin, test_of)


def margin_on_test(right, control, margin):
    return best(right, control, lambda s, c: s["test"] - c["test"] >= margin, val)


def two_files(right, control, margin):
    return best(right, control, lambda s, c: val(s) - c["test"] >= margin, val)


def veto(right, control, margin):
    return best(right, control, lambda s, c: all(s[f] - c[f] >= margin for f in ("validation", "test")), val)


def both_added(right, control, margin):
    return best(right, control, lambda s, c: val(s) - val(c) >= margin, lambda s: sum(s.values()))


def no_margin(right, control, margin):
    return best(right, control, lambda s, c: val(s) > val(c), val)


def always(right, control, margin):
    return max((name for name in right if name != control), key=lambda name: right[name]["validation"])


def floor_alone(right, control, margin):
    return best(right, control, lambda s, c: val(s) >= margin, val)


def more_than_margin(right, control, margin):
    return best(right, control, lambda s, c: val(s) - val(c) > margin, val)


def first_to_pass(right, control, margin):
    for name, scores in right.items():
        if name != control and val(scores) >= val(right[control]) + margin:
            return name
    return None


def worst_to_pass(right, control, margin):
    return best(right, control, lambda s, c: val(s) >= val(c) + margin, lambda s: -val(s))


def control_too(right, control, margin):
    passed = [name for name in right if val(right[name]) >= val(right[control]) + margin]
    return max(passed, key=lambda name: val(right[name])) if passed else None


def all_of_them(right, control, margin):
    return [n for n, s in right.items() if n != control and val(s) - val(right[control]) >= margin]


WRONG = {
    "affordable_rank": [
        (file_alone, "card has a say"), (card_alone, "file has a limit"), (least_need, "the most that it may need"),
        (largest_card, "least that the card"), (hopeful, "lucky case"), (either, "and, not or"), (strict, "<=, not <"),
        (first, "first affordable"), (last, "last affordable"), (smallest, "smallest"), (no_default, "is an error"),
        (none, "not None")],
    "merged_copies": [
        (no_shared_base, "one shared base"), (copies_alone, "copies are not all"), (shared_base_stays, "need not stay"),
        (until_full, "fit again"), (no_adapters, "take memory too"), (all_adapters, "is in its copy"),
        (as_listed, "first in the dict"), (quietest, "quietest"), (by_name, "by their traffic"),
        (strictly_less, "<=, not <"), (the_others, "routed ones"), (how_many, "give their names")],
    "accepted": [
        (by_test, "opened once"), (best_on_test, "chosen by the test"), (margin_on_test, "checked on the test"),
        (two_files, "same file"), (veto, "veto"), (both_added, "added up"), (no_margin, "margin is left out"),
        (always, "good enough"), (floor_alone, "not a score by itself"), (more_than_margin, ">=, not >"),
        (first_to_pass, "first one that passes"), (worst_to_pass, "worst one"), (control_too, "to be beaten"),
        (all_of_them, "one name")],
}
