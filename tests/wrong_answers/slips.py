"""Further wrong answers, over all notebooks: the ones that once passed a checker or were told something misleading, and
slips that no table foresees. Each with a part of what it must be told."""

import math
import statistics

import torch

from . import unusual as right

# ---------------------------------------------------------------- what a wrong answer is made of


def spoils(answer, argument, spoil):
    """The right answer, but an argument is changed on the way."""
    def wrong(*arguments):
        result = answer(*arguments)
        spoil(arguments[argument])
        return result
    return wrong


def after(answer, change):
    """Something done to the right answer."""
    return lambda *arguments: change(answer(*arguments))


def only_where(condition, answer, other):
    """The right answer where the condition on the arguments holds, else another."""
    return lambda *arguments: answer(*arguments) if condition(*arguments) else other(*arguments)


R = {key: answers[0] for key, answers in right.RIGHT.items()}


def median_score(rows):
    rates = {row["lr"] for row in rows}
    best = min(rates, key=lambda lr: statistics.median(r["validation"] for r in rows if r["lr"] == lr))
    return best, statistics.fmean(r["loss"] for r in rows if r["lr"] == best)


def seed_zero(rows):
    rows = [row for row in rows if row["seed"] == 0] or rows
    best = min(rows, key=lambda row: row["validation"])
    return best["lr"], best["loss"]


def bars(high, low=0.9):
    def diagnose(report):
        if report["grad_A"] == report["grad_B"] == 0:
            return "zeros"
        if report["base_changed"]:
            return "unfrozen"
        if report["exact"] >= high:
            return "healthy" if report["served"] >= high else "scale"
        if report["base_exact"] < low:
            return "base"
        return "modules" if report["modules"] < report["planned"] else "rank"
    return diagnose


def start_by(zero):
    def start(A, B):
        if not zero(B @ A):
            return "not the base"
        return "never moves" if zero(A) and zero(B) else "healthy"
    return start


def rounded_twice(W, delta):
    arrived = (W + delta.to(W.dtype)).float() - W.float()
    return ((arrived - delta).norm() / delta.norm()).item()


def pops(options, file_budget, usable):
    best = 0
    while options:
        rank, size, need = options.pop()
        if size <= file_budget and need[1] <= usable[0]:
            best = max(best, rank)
    return best


def sorts(options, file_budget, usable):
    options.sort(reverse=True)
    return next((r for r, size, need in options if size <= file_budget and need[1] <= usable[0]), 0)


def empties(traffic, base, adapter, memory):
    plan = R["nb13.merged_copies"](traffic, base, adapter, memory)
    for name in plan:
        traffic.pop(name)
    return plan


def without_control(scores, control, margin):
    bar = scores.pop(control)["validation"] + margin
    passed = [name for name in scores if scores[name]["validation"] >= bar]
    return max(passed, key=lambda name: scores[name]["validation"], default=None)


def whole_and_identity(parts):
    delta = sum(w * s * B @ A for w, s, A, B in parts)
    return torch.eye(delta.shape[1]), delta


def all_left_vectors(W0, W, k, epsilon):
    U0, U = torch.linalg.svd(W0).U, torch.linalg.svd(W).U
    return int(((U0.T @ U[:, :k]).abs().max(0).values < epsilon).sum())


def twice_as_far(W0, W, k, epsilon):
    U0, U = torch.linalg.svd(W0).U[:, :2 * k], torch.linalg.svd(W).U[:, :k]
    return int(((U0.T @ U).abs().max(0).values < epsilon).sum())


def four_that_train(model):
    return sum(1 for p in model.parameters() if p.requires_grad) == 4


def in_place_blocks(weight, levels, block):
    blocks = weight.view(-1, block)
    top = blocks.abs().amax(1)
    blocks /= top[:, None]
    return (blocks[..., None] - levels).abs().argmin(-1).flatten(), top


def any_dot(names, targets):
    import re
    return [n for n in names if any(re.search("(^|[.])" + t + "$", n) for t in targets)]


SLIPS = {
    "nb01.state_bytes": [
        (lambda p, t: 4.0 * (p + 3 * t), "a decimal number"), (lambda p, t: 8 * p + 8 * t, "frozen weight has no gradient"),
        (lambda p, t: 4 * (p + 3 * t) + 8, "8 more than what is expected"),
        (lambda p, t: print(p + 3 * t), "returns None; is the return missing?")],
    "nb01.kept_floats": [
        (lambda w, t: sum(n for i, n in enumerate(w[:-1]) if t[i] and i > 0), "the first layer is left out"),
        (lambda w, t: sum({n for n, train in zip(w, t) if train}), "a set counts a width once"),
        (lambda w, t: len([n for n, train in zip(w, t) if train]), "this counts layers"),
        (lambda w, t: w[0] + sum(n for n, train in zip(w[1:], t[1:]) if train), "")],
    "nb01.ring_bytes": [(lambda t, n: 4 * t * 2 * n / (n + 1), ""), (lambda t, n: 4.0 * t * (2 * n - 1) / n, "one round")],
    "nb02.count_parameters": [
        (lambda shapes, r: sum(r * (o + i) for o, i in set(shapes)), "a set counts the shape once"),
        (lambda shapes, r: sum(2 * r * min(s) for s in shapes), "twice the smaller side")],
    "nb02.merged_weight": [(after(R["nb02.merged_weight"], lambda W: W.float().double() + 0 * W.double()), "of dtype")],
    "nb02.best_rank_r_error": [
        (after(R["nb02.best_rank_r_error"], lambda e: 100 * e), "100 times what is expected"),
        (after(R["nb02.best_rank_r_error"], lambda e: 1 - e), "1 minus what is expected")],
    "nb02.first_update": [
        (spoils(R["nb02.first_update"], 2, torch.Tensor.zero_), "changes its argument A in place"),
        (after(R["nb02.first_update"], lambda d: 2 * d), "2 times what is expected")],
    "nb03.find_targets": [
        (lambda names, targets: [n for n in names for t in targets if n == t or n.endswith("." + t)], "is listed twice"),
        (any_dot, "a dot stands for any character"),
        (lambda names, targets: sorted(right.found_by_regex(names, targets)), "the right names in another order"),
        (spoils(right.found_by_regex, 1, list.clear), "changes its argument targets in place")],
    "nb03.largest_rank": [
        (lambda shapes, budget: min(budget // sum(map(sum, shapes)), min(o for o, i in shapes)), "at d_out alone"),
        (lambda shapes, budget: min(budget // sum(map(sum, shapes)), min(i for o, i in shapes)), "at d_in alone"),
        (spoils(right.rank_by_trial, 0, list.clear), "changes its argument shapes in place")],
    "nb03.wrap": [
        (lambda model, target, layer: right.wrap_by_names(model, target, lambda child: layer(layer(child))), "")],
    "nb04.alpha_for": [
        (lambda alpha, r, n, rs: alpha * max(1.0, (n / r) ** (0.5 if rs else 1)), "wrong where the new rank is the smaller"),
        (lambda alpha, r, n, rs: round(alpha * (n / r) ** (0.5 if rs else 1)), "do not round it")],
    "nb04.slope": [(after(right.slope_by_regression, lambda k: round(k, 1)), ""),
                   (after(right.slope_by_regression, lambda k: k + 1), "1 more than what is expected")],
    "nb04.first_adam_update": [(after(R["nb04.first_adam_update"], lambda d: d.T), "has shape")],
    "nb04.twin": [(after(R["nb04.twin"], lambda t: t[:3]), "has 3 entries, expected 4"),
                  (lambda alpha, A0, lr_A, lr_B, p, q: (alpha / p, p * A0, p * lr_A, q * lr_B), "by p alone")],
    "nb05.rank_for_energy": [
        (lambda delta, share: int(right.energy_in_a_loop(delta, share)) + 1, "one too many"),
        (lambda delta, share: float(right.energy_in_a_loop(delta, share)), "a decimal number")],
    "nb05.similarity": [(after(R["nb05.similarity"], math.sqrt), "the root of what is expected"),
                        (lambda A1, A2, i, j: R["nb05.similarity"](A1, A2, min(i, j), min(i, j)), "cut to the smaller")],
    "nb05.amplification_factor": [(after(right.amplification_by_numpy, lambda f: 1 / f), "upside down"),
                                  (after(right.amplification_by_numpy, math.log), "the logarithm of")],
    "nb05.intruders": [(all_left_vectors, "full_matrices=False"), (twice_as_far, "first 2k directions"),
                       (lambda W0, W, k, e: R["nb05.intruders"](W0, W, k, e**0.5), "")],
    "nb06.fair_score": [
        (median_score, "by the median"), (seed_zero, "one seed"),
        (after(R["nb06.fair_score"], lambda pair: (pair[0], round(pair[1], 2))), "the result[1] is"),
        (spoils(R["nb06.fair_score"], 0, lambda rows: rows.sort(key=lambda r: r["lr"])), "changes its argument rows")],
    "nb06.bottom": [(after(right.bottom_by_polyfit, lambda r: 2 * r), "2 times what is expected")],
    "nb06.benefit": [
        (lambda base, lora, full: abs(base - lora) / abs(base - full), "abs hides a loss that rose"),
        (lambda base, lora, full: max(0, (base - lora) / (base - full)), "cut it off at 0"),
        (lambda base, lora, full: max(0, min(1, (base - lora) / (base - full))), "do not cut it off"),
        (lambda base, lora, full: (base - lora) / (base - full) if lora > full else 1.0, "")],
    "nb07.healthy_start": [
        (start_by(lambda M: M.sum() == 0), "a sum may be zero"), (start_by(lambda M: M.mean() == 0), "a sum may be zero"),
        (start_by(lambda M: M.max() == 0), ""), (start_by(lambda M: not M.all()), "all asks whether"),
        (start_by(lambda M: torch.allclose(M, torch.zeros(1))), "allclose takes small numbers"),
        (start_by(lambda M: bool((M.abs() < 1e-8).all())), "takes small numbers for zero"),
        (after(R["nb07.healthy_start"], str.title), "none of the answers that are asked for")],
    "nb07.is_frozen": [(four_that_train, "a count does not say which"),
                       (after(R["nb07.is_frozen"], int), ""),
                       (after(R["nb07.is_frozen"], str), "(str), expected")],
    "nb07.diagnose": [
        (bars(0.5), ""), (bars(0.8), ""), (bars(0.95), ""), (bars(0.9, 0.5), ""),
        (bars(0.9, 0.95), ""), (bars(0.9 + 1e-9), "exactly 0.9"),
        (after(R["nb07.diagnose"], lambda word: word.upper()), ""),
        (spoils(R["nb07.diagnose"], 0, dict.clear), "changes its argument report in place")],
    "nb08.merged_once": [(spoils(R["nb08.merged_once"], 1, torch.Tensor.zero_), "changes its argument A"),
                         (after(R["nb08.merged_once"], lambda W: W.float()), "dtype")],
    "nb08.gap": [
        (lambda w, bits: 2.0 ** (math.ceil(math.log2(abs(w))) - 1 - bits), "a power of two is itself"),
        (lambda w, bits: math.copysign(right.gap_by_frexp(w, bits), w), "a distance has no sign"),
        (lambda w, bits: right.gap_by_frexp(w, bits) if abs(w) >= 1 else 2.0**-bits, "wrong where w is smaller than 1")],
    "nb08.swallowed": [(rounded_twice, "rounds twice"),
                       (after(right.swallowed_by_hand, lambda s: 100 * s), "percent")],
    "nb08.serve": [(lambda layer, updates, x: right.serves_a_state(layer, updates, x)[0], ""),
                   (spoils(right.serves_a_state, 1, list.clear), "the updates afterwards")],
    "nb09.route": [(spoils(right.routed_by_rows, 0, torch.Tensor.zero_), "changes its argument x"),
                   (spoils(right.routed_by_rows, 2, dict.clear), "changes its argument adapters"),
                   (lambda x, W, adapters, names: right.routed_by_rows(x, W, adapters, names[::-1]), "")],
    "nb09.combine": [(whole_and_identity, "one of the two is the whole sum"),
                     (spoils(right.combined_in_A, 0, list.clear), "")],
    "nb09.compare_bases": [
        (lambda adapter, model: "same" if adapter == model else "other weights" if adapter else "not said",
         "the part before the dash"),
        (lambda adapter, model: R["nb09.compare_bases"](adapter, model).capitalize(), "none of the answers")],
    "nb09.may_ship": [
        (lambda scores, base, home, floor: [a for a, t in home.items() if scores.get((base, a, t), 0) >= 0.9],
         "the bar is floor"),
        (lambda scores, base, home, floor: set(R["nb09.may_ship"](scores, base, home, floor)), "(set)"),
        (lambda scores, base, home, floor: R["nb09.may_ship"](scores, base, home, floor)[:1], "wrong where several pass")],
    "nb10.quantise": [
        (lambda w, levels, b: (right.quantised_by_norm(w, levels, b)[0], right.quantised_by_norm(w, levels, b)[1][:, None]), "keepdim"),
        (lambda w, levels, b: (right.quantised_by_norm(w, levels, b)[0].view(-1, b), right.quantised_by_norm(w, levels, b)[1]), "flat"),
        (in_place_blocks, "changes its argument weight in place")],
    "nb10.pack": [(after(R["nb10.pack"], lambda b: b.flip(0)), ""), (after(R["nb10.pack"], torch.Tensor.tolist), "(list)")],
    "nb10.bits_a_weight": [(after(R["nb10.bits_a_weight"], lambda b: b - 4), ""),
                           (after(R["nb10.bits_a_weight"], math.ceil), "rounded up to a whole number")],
    "nb11.gpt_parameters": [(lambda n, d, v, c: 12 * n * d * d, ""),
                            (after(R["nb11.gpt_parameters"], float), "a decimal number")],
    "nb11.verdict": [(after(R["nb11.verdict"], lambda word: word == "fits"), "(bool), expected"),
                     (after(R["nb11.verdict"], lambda word: word.replace("does not", "doesn't")), "none of the answers"),
                     (lambda n, u: R["nb11.verdict"](n, (u[0], math.inf)), "it cannot fit")],
    "nb11.revisit": [(after(R["nb11.revisit"], lambda g: (g[0], g[2], g[1])), "has shape"),
                     (after(R["nb11.revisit"], lambda g: [2 * t for t in g]), "2 times what is expected")],
    "nb11.streamed": [(after(R["nb11.streamed"], lambda pair: pair[0]), "(int), expected"),
                      (lambda w, n, h: (w + max(w, h), (2 * n - 3) * w + h + (h > w)), "the head is larger")],
    "nb12.prepend": [(after(R["nb12.prepend"], lambda y: y.double()), "of dtype"),
                     (lambda prompt, text: torch.cat((prompt[None], text), 1), "the batch has several texts")],
    "nb12.bottleneck": [(after(R["nb12.bottleneck"], lambda y: y.detach() * 1.01), "1.01 times what is expected")],
    "nb12.fold": [(spoils(right.folded_by_columns, 1, torch.Tensor.zero_), "changes its argument scale"),
                  (lambda W, scale, at_input: W * scale if at_input else W, "wrong where at_input is False")],
    "nb13.affordable_rank": [(sorts, "changes its argument options"), (pops, "changes its argument options"),
                             (lambda *a: R["nb13.affordable_rank"](*a) or None, "the answer is 0, not None")],
    "nb13.merged_copies": [(empties, "changes its argument traffic"),
                           (lambda t, b, a, m: R["nb13.merged_copies"](t, b, a, m) or None, "no copy fits")],
    "nb13.accepted": [(without_control, "changes its argument right"),
                      (lambda r, c, m: R["nb13.accepted"](r, c, m) or "nobody", "nobody passes")],
    "nb14.mean_pool": [(after(R["nb14.mean_pool"], lambda y: y[:, None]), "keepdim"),
                       (after(R["nb14.mean_pool"], lambda y: y.numpy()), "(ndarray), expected a tensor")],
    "nb14.effective_share": [(after(R["nb14.effective_share"], lambda s: 100 * s), "100 times what is expected")],
    "nb14.peft_keys": [(after(R["nb14.peft_keys"], set), "(set)"),
                       (after(R["nb14.peft_keys"], lambda keys: keys * 2), "2 times")],
}
