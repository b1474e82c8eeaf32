"""Wrong answers to the exercises of notebook 09, as learners may write them, and a part of what each must be told."""

import torch


def base_only(x, W, adapters, names):
    return torch.einsum("bti,oi->bto", x, W)


def no_scaling(x, W, adapters, names):
    y = x @ W.T
    for i, name in enumerate(names):
        if name is not None:
            A, B, _ = adapters[name]
            y[i] += x[i] @ A.T @ B.T
    return y


def first_for_all(x, W, adapters, names):
    A, B, scaling = adapters[[name for name in names if name][0]]
    y = x @ W.T
    for i, name in enumerate(names):
        if name:
            y[i] += scaling * x[i] @ A.T @ B.T
    return y


def all_for_all(x, W, adapters, names):
    y = x @ W.T
    for A, B, scaling in adapters.values():
        y = y + scaling * x @ A.T @ B.T
    return y


def trips_over_none(x, W, adapters, names):
    y = x @ W.T
    for i, name in enumerate(names):
        A, B, scaling = adapters[name]
        y[i] += scaling * (x[i] @ A.T) @ B.T
    return y


def instead_of_the_base(x, W, adapters, names):
    rows = []
    for row, name in zip(x, names):
        if name is None:
            rows.append(row @ W.T)
        else:
            A, B, scaling = adapters[name]
            rows.append(scaling * (row @ A.T) @ B.T)
    return torch.stack(rows)


def added_factors(parts):
    A = torch.zeros_like(parts[0][2])
    B = torch.zeros_like(parts[0][3])
    for weight, scaling, a, b in parts:
        A += a
        B += weight * scaling * b
    return A, B


def weight_in_both(parts):
    A = torch.cat([weight * A for weight, scaling, A, B in parts], dim=0)
    B = torch.cat([weight * scaling * B for weight, scaling, A, B in parts], dim=1)
    return A, B


def scaling_left_out(parts):
    return torch.cat([weight * A for weight, _, A, _ in parts]), torch.cat([B for *_, B in parts], dim=1)


def weights_left_out(parts):
    return torch.cat([scaling * A for _, scaling, A, _ in parts]), torch.cat([B for *_, B in parts], dim=1)


def other_order(parts):
    A = torch.cat([A for *_, A, _ in reversed(parts)])
    B = torch.cat([weight * scaling * B for weight, scaling, _, B in parts], dim=1)
    return A, B


def none_is_other(adapter, model):
    if adapter == model:
        return "same"
    if adapter is None or adapter.split("-")[0] != model.split("-")[0]:
        return "other architecture"
    return "other weights"


def trusts_silence(adapter, model):
    if adapter is None or adapter == model:
        return "same"
    return "other weights" if adapter[:12] == model[:12] else "other architecture"


def only_the_first_part(adapter, model):
    if adapter is None:
        return "not said"
    return "same" if adapter.split("-")[0] == model.split("-")[0] else "other architecture"


def only_the_whole(adapter, model):
    if adapter is None:
        return "not said"
    return "same" if adapter == model else "other weights"


def parts_mixed_up(adapter, model):
    if adapter is None:
        return "not said"
    a, m = adapter.split("-"), model.split("-")
    return "same" if a == m else "other weights" if a[1] == m[1] else "other architecture"


def splits_none(adapter, model):
    a, m = adapter.split("-"), model.split("-")
    return "same" if a == m else "other weights" if a[0] == m[0] else "other architecture"


def untested_passes(scores, base, home, floor):
    failed = [name for name, task in home.items() if scores.get((base, name, task), floor) < floor]
    return [name for name in home if name not in failed]


def strictly_above(scores, base, home, floor):
    return [name for name, task in home.items() if scores.get((base, name, task), 0) > floor]


def any_base(scores, base, home, floor):
    passed = {adapter for (_, adapter, task), score in scores.items() if home[adapter] == task and score >= floor}
    return [name for name in home if name in passed]


def any_task(scores, base, home, floor):
    passed = {adapter for (b, adapter, _), score in scores.items() if b == base and score >= floor}
    return [name for name in home if name in passed]


def by_its_name(scores, base, home, floor):
    return [name for name in home if scores.get((base, name, name), 0) >= floor]


def must_be_there(scores, base, home, floor):
    return [name for name, task in home.items() if scores[(base, name, task)] >= floor]


WRONG = {
    "route": [
        (base_only, "base's outputs"), (no_scaling, "scaling is missing"), (first_for_all, "one adapter serves all"),
        (all_for_all, "every adapter is added"), (trips_over_none, "None is no key"),
        (instead_of_the_base, "goes through the base too")],
    "combine": [
        (added_factors, "one adapter's B on another's A"), (weight_in_both, "the weight counts twice"),
        (scaling_left_out, "the scaling is missing"), (weights_left_out, "the weights are missing"),
        (other_order, "different orders")],
    "compare_bases": [
        (none_is_other, "no fingerprint is no difference"), (trusts_silence, "no match either"),
        (only_the_first_part, "not yet the same base"), (only_the_whole, "will not even fit"),
        (parts_mixed_up, "mixed up"), (splits_none, "look for that first")],
    "may_ship": [
        (untested_passes, "no score is no pass"), (strictly_above, "equals the floor"), (any_base, "another base"),
        (any_task, "another task"), (by_its_name, "need not be its name"), (must_be_there, "may be missing")],
}
