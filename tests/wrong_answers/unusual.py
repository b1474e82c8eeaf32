"""Right answers in unusual form, at least three an exercise: another library, a loop, autograd, a number of another type.
Every one of them must be accepted."""

import bisect
import math
import re
import statistics
from collections import defaultdict
from copy import deepcopy
from fractions import Fraction
from functools import reduce
from itertools import chain, starmap, takewhile

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import nn

# ---------------------------------------------------------------- 00


def output_by_linear(x, W, A, B, alpha):
    return F.linear(x, W) + F.linear(F.linear(x, A), B).mul(alpha / A.shape[0])


def output_by_merging(x, W, A, B, alpha):
    return torch.matmul(x, torch.addmm(W, B, A, alpha=alpha / A.size(0)).mT)


def output_by_einsum(x, W, A, B, alpha):
    return einsum(x, W, "n i, o i -> n o") + alpha * einsum(x, A, B, "n i, r i, o r -> n o") / B.shape[1]


def shelf_by_parts(customers, matrices, d_out, d_in, rank):
    base = matrices * d_out * d_in * 4
    adapter = matrices * (rank * d_in + d_out * rank) * 4
    return [customers * base, base + customers * adapter]


def shelf_by_numpy(customers, matrices, d_out, d_in, rank):
    sizes = 4 * matrices * np.array([d_out * d_in, rank * (d_out + d_in)])
    return sizes[0] * customers, sizes @ np.array([1, customers])


def shelf_in_a_loop(customers, matrices, d_out, d_in, rank):
    full, thin = 0, 4 * matrices * d_out * d_in
    for _ in range(customers):
        full += 4 * matrices * d_out * d_in
        thin += 4 * matrices * rank * (d_out + d_in)
    return full, thin


# ---------------------------------------------------------------- 01


def by_parts(parameters, trainable):
    bill = {"weights": parameters, "gradients": trainable, "mean": trainable, "square": trainable}
    return sum(4 * count for count in bill.values())


def in_numpy(parameters, trainable):
    return np.dot(np.array([4, 12], dtype=np.int64), np.array([parameters, trainable], dtype=np.int64))


def kept_in_a_loop(widths, trains):
    total = 0
    for layer in range(len(trains)):
        if trains[layer] is True:
            total = total + widths[layer]
    return total


def kept_by_autograd(widths, trains):
    sizes = []
    x = torch.ones(1, widths[0])
    for n_in, n_out, train in zip(widths, widths[1:], trains):
        if train:
            sizes.append(x.numel())
        x = torch.ones(1, n_out)
    return torch.tensor(sizes).sum()


def ring_in_rounds(trainable, workers):
    sent, rounds = 0, 0
    while rounds < 2 * (workers - 1):
        sent += 4 * trainable // workers
        rounds += 1
    return sent


# ---------------------------------------------------------------- 02


def count_by_modules(shapes, rank):
    total = 0
    for d_out, d_in in shapes:
        pair = nn.ModuleList([nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)])
        total += sum(p.numel() for p in pair.parameters())
    return total


def merged_by_addmm(W0, A, B, alpha):
    return torch.addmm(W0, B, A, alpha=alpha / len(A))


def merged_by_columns(W0, A, B, alpha):
    merged = W0.clone()
    for k in range(A.shape[0]):
        merged += alpha / A.shape[0] * torch.outer(B[:, k], A[k])
    return merged


def merged_by_the_layer(W0, A, B, alpha):
    x = torch.eye(W0.shape[1], dtype=W0.dtype)
    return (x @ W0.T + x @ A.T @ B.T * alpha / B.shape[1]).T


def error_by_pythagoras(delta, rank):
    S = torch.linalg.svdvals(delta)
    return math.sqrt(1 - float((S[:rank] ** 2).sum() / (S**2).sum()))


def error_by_numpy(delta, rank):
    S = np.linalg.svd(delta.numpy(), compute_uv=False)
    return np.linalg.norm(S[rank:]) / np.linalg.norm(S)


def error_by_the_matrix(delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return torch.dist(delta, (U[:, :rank] * S[:rank]) @ Vh[:rank]) / torch.linalg.matrix_norm(delta)


def update_by_autograd(x, G, A, alpha, lr):
    B = torch.zeros(G.shape[1], len(A), dtype=x.dtype, requires_grad=True)
    (x @ (alpha / len(A) * B @ A).T).backward(G)
    with torch.no_grad():
        B -= lr * B.grad
    return alpha / len(A) * B @ A


def update_in_one_product(x, G, A, alpha, lr):
    return einsum(G, x, A, A, "n o, n i, r i, r j -> o j") * (-lr * (alpha / len(A)) ** 2)


def update_by_rows(x, G, A, alpha, lr):
    s = alpha / A.size(0)
    total = sum(torch.outer(g, A @ row) for g, row in zip(G, x))  # (d_out, r)
    return -(s * s * lr) * total.matmul(A)


# ---------------------------------------------------------------- 03


def found_by_regex(names, targets):
    ends = re.compile("|".join(rf"(?:^|\.){re.escape(t)}$" for t in targets))
    return [name for name in names if ends.search(name)]


def found_by_parts(names, targets):
    parts = [tuple(t.split(".")) for t in targets]
    return tuple(n for n in names if any(tuple(n.split("."))[-len(p):] == p for p in parts))


def found_by_suffixes(names, targets):
    wanted, found = set(targets), []
    for name in names:
        pieces = name.split(".")
        if any(".".join(pieces[i:]) in wanted for i in range(len(pieces))):
            found.append(name)
    return found


def rank_by_bisection(shapes, budget):
    low, high = 0, min(map(min, shapes))
    while low < high:
        middle = (low + high + 1) // 2
        if sum(middle * (a + b) for a, b in shapes) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def rank_by_trial(shapes, budget):
    cap = min(chain.from_iterable(shapes))
    costs = (r * sum(map(sum, shapes)) for r in range(cap + 1))
    return len(list(takewhile(lambda cost: cost <= budget, costs))) - 1


def rank_by_numpy(shapes, budget):
    sides = np.array(shapes)
    return np.minimum(budget // sides.sum(), sides.min())


def wrap_by_names(model, target, layer):
    for p in model.parameters():
        p.requires_grad = False
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == target]
    for name in found:
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, target, layer(getattr(parent, target)))
    return model


def wrap_by_recursion(model, target, layer, top=True):
    if top:
        model.requires_grad_(False)
    for name, child in model.named_children():
        if name == target:
            model._modules[name] = layer(child)
        else:
            wrap_by_recursion(child, target, layer, False)
    return model


def wrap_then_freeze(model, target, layer):
    """The base's parameters are remembered, and frozen afterwards."""
    base = list(model.parameters())
    for parent in [m for m in model.modules() if hasattr(m, target)]:
        parent.add_module(target, layer(getattr(parent, target)))
    for p in base:
        p.requires_grad_(False)
    return model


def fit_by_the_optimizer(model, ids, reply, lr, steps):
    descent, losses = torch.optim.SGD(model.parameters(), lr=lr), []
    targets = ids[:, 1:].masked_fill(~reply[:, 1:], -100)
    while len(losses) < steps:
        descent.zero_grad()
        loss = F.cross_entropy(model(ids)[:, :-1].transpose(1, 2), targets)
        loss.backward()
        descent.step()
        losses.append(loss)
    return losses


def fit_by_autograd(model, ids, reply, lr, steps):
    trained = [p for p in model.parameters() if p.requires_grad]

    def step():
        shares = F.log_softmax(model(ids), -1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        loss = -(shares * reply[:, 1:]).sum() / reply[:, 1:].sum()
        for p, gradient in zip(trained, torch.autograd.grad(loss, trained)):
            p.data.add_(gradient, alpha=-lr)
        return float(loss)
    return [step() for _ in range(steps)]


def fit_token_by_token(model, ids, reply, lr, steps):
    losses = np.zeros(steps)
    for step in range(steps):
        logits = model(ids)
        places = [(b, t) for b in range(len(ids)) for t in range(1, ids.shape[1]) if reply[b, t]]
        loss = torch.stack([F.cross_entropy(logits[b, t - 1], ids[b, t]) for b, t in places]).mean()
        model.zero_grad(set_to_none=False)
        loss.backward()
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.data -= lr * p.grad
        losses[step] = loss.item()
    return losses


# ---------------------------------------------------------------- 04


def alpha_by_the_scaling(alpha, rank, new_rank, use_rslora):
    divisor = math.sqrt if use_rslora else float
    return alpha / divisor(rank) * divisor(new_rank)


def alpha_as_a_fraction(alpha, rank, new_rank, use_rslora):
    if use_rslora:
        return np.sqrt(new_rank) * alpha / np.sqrt(rank)
    exact = Fraction(alpha) * new_rank / rank
    return int(exact) if exact.denominator == 1 else float(exact)


def slope_by_regression(x, y):
    return statistics.linear_regression([math.log2(v) for v in x], [math.log2(v) for v in y]).slope


def slope_in_fp32(x, y):
    u, v = torch.tensor(x).log10(), torch.tensor(y).log10()
    return torch.cov(torch.stack([u, v]))[0, 1] / u.var()


def adam_by_hand(x, G, A, alpha, lr):
    s = alpha / len(A)
    g = s * G.T @ x @ A.T
    m, v = 0.1 * g, 0.001 * g * g
    return s * (-lr * (m / 0.1) / (v / 0.001).sqrt()) @ A


def adam_with_where(x, G, A, alpha, lr):
    g = torch.einsum("no,ni,ri->or", G, x, A)
    step = torch.where(g > 0, -lr, lr).to(A.dtype)
    return torch.mm(step, A).mul(alpha / A.shape[0])


def adam_itself(x, G, A, alpha, lr):
    B = nn.Parameter(torch.zeros(G.shape[1], A.shape[0], dtype=A.dtype))
    optimizer = torch.optim.AdamW([B], lr=lr, weight_decay=0.0)
    (x @ A.T @ B.T * (alpha / A.shape[0])).backward(G)
    optimizer.step()
    return alpha / A.shape[0] * B.detach() @ A


def twin_as_a_list(alpha, A0, lr_A, lr_B, p, q):
    return [alpha / p / q, A0.clone().mul_(p), lr_A * p, lr_B * q]


def twin_by_powers(alpha, A0, lr_A, lr_B, p, q):
    return alpha * (p * q) ** -1, torch.mul(p, A0), torch.tensor(lr_A, dtype=torch.float64) * p, np.float64(lr_B) * q


def twin_on_a_copy(alpha, A0, lr_A, lr_B, p, q):
    A0 = deepcopy(A0)
    A0 *= p
    return (alpha / (q * p), A0, p * lr_A, lr_B * q)


# ---------------------------------------------------------------- 05


def energy_in_a_loop(delta, share):
    S = torch.linalg.svdvals(delta).tolist()
    whole, held = math.fsum(s * s for s in S), 0.0
    for count, s in enumerate(S, 1):
        held += s * s
        if held >= share * whole:
            return count


def energy_by_numpy(delta, share):
    S2 = np.linalg.svd(delta.numpy(), compute_uv=False) ** 2
    return np.argmax(np.cumsum(S2) / S2.sum() >= share) + 1


def energy_by_bisection(delta, share):
    S2 = torch.linalg.svdvals(delta).square()
    return bisect.bisect_left((S2.cumsum(0) / S2.sum()).tolist(), share) + 1


def svd_by_the_whole_product(B, A, scale):
    U, S, V = torch.svd(torch.einsum("or,ri->oi", B, A) * scale)
    return U[:, :B.shape[1]], S[:B.shape[1]], V.T[:B.shape[1]]


def svd_by_numpy(B, A, scale):
    (Q_B, R_B), (Q_A, R_A) = np.linalg.qr(scale * B.numpy()), np.linalg.qr(A.numpy().T)
    U, S, Vh = np.linalg.svd(R_B @ R_A.T)
    return [Q_B @ U, S, Vh @ Q_A.T]


def svd_by_two_svds(B, A, scale):
    U_B, S_B, V_B = torch.linalg.svd(B, full_matrices=False)
    U_A, S_A, V_A = torch.linalg.svd(A, full_matrices=False)
    U, S, V = torch.linalg.svd(S_B[:, None] * (V_B @ U_A) * S_A)
    return U_B @ U, scale * S, V @ V_A


def similarity_by_angles(A1, A2, i, j):
    V1, V2 = (torch.linalg.svd(A.T, full_matrices=False).U for A in (A1, A2))
    cosines = torch.linalg.svdvals(V1[:, :i].T @ V2[:, :j])
    return float((cosines**2).sum()) / min(i, j)


def similarity_by_numpy(A1, A2, i, j):
    V1, V2 = (np.linalg.svd(A.numpy())[2] for A in (A1, A2))
    return np.square(V1[:i] @ V2[:j].T).sum() / (i if i < j else j)


def similarity_by_pairs(A1, A2, i, j):
    _, V1 = torch.linalg.eigh(A1.T @ A1)
    _, V2 = torch.linalg.eigh(A2.T @ A2)
    return sum((V1[:, -a] @ V2[:, -b]) ** 2 for a in range(1, i + 1) for b in range(1, j + 1)) / min(i, j)


def amplification_by_projectors(W, delta, rank):
    U, _, Vh = torch.linalg.svd(delta)
    P, Q = U[:, :rank] @ U[:, :rank].T, Vh[:rank].T @ Vh[:rank]
    return torch.linalg.matrix_norm(delta) / torch.linalg.matrix_norm(P @ W @ Q)


def amplification_by_numpy(W, delta, rank):
    U, S, Vh = np.linalg.svd(delta.numpy(), full_matrices=False)
    return math.sqrt((S**2).sum()) / np.linalg.norm(U.T[:rank] @ W.numpy() @ Vh.T[:, :rank])


def amplification_the_old_way(W, delta, rank):
    U, S, V = torch.svd(delta)
    return (S.norm() / torch.einsum("or,oi,is->rs", U[:, :rank], W, V[:, :rank]).norm()).item()


def intruders_one_by_one(W0, W, k, epsilon):
    old, new = np.linalg.svd(W0.numpy(), full_matrices=False)[0], np.linalg.svd(W.numpy(), full_matrices=False)[0]
    count = 0
    for place in range(k):
        if max(abs(old[:, n] @ new[:, place]) for n in range(old.shape[1])) < epsilon:
            count += 1
    return count


def intruders_in_one_sum(W0, W, k, epsilon):
    U0, U = torch.svd(W0)[0], torch.svd(W)[0]
    return (~((U0.T @ U[:, :k]).abs() >= epsilon).any(0)).sum()


def intruders_by_difference(W0, W, k, epsilon):
    U0 = torch.linalg.svd(W0, full_matrices=False)[0]
    U = torch.linalg.svd(W, full_matrices=False)[0][:, :k]
    return k - len({n for n in range(k) if float((U0.T @ U[:, n]).abs().max()) >= epsilon})


# ---------------------------------------------------------------- 06


def fair_by_groups(rows):
    groups = defaultdict(list)
    for row in rows:
        groups[row["lr"]].append(row)
    best = sorted(groups, key=lambda lr: statistics.fmean(r["validation"] for r in groups[lr]))[0]
    return best, statistics.fmean(r["loss"] for r in groups[best])


def fair_by_numpy(rows):
    table = np.array([(r["lr"], r["validation"], r["loss"]) for r in rows])
    rates = np.unique(table[:, 0])
    means = np.array([table[table[:, 0] == lr, 1:].mean(0) for lr in rates])
    return [rates[means[:, 0].argmin()], means[means[:, 0].argmin(), 1]]


def fair_by_running_sums(rows):
    sums = {}
    for row in rows:
        n, v, t = sums.get(row["lr"], (0, 0, 0))
        sums[row["lr"]] = n + 1, v + row["validation"], t + row["loss"]
    lr, (n, v, t) = min(sums.items(), key=lambda item: item[1][1] / item[1][0])
    return lr, torch.tensor(t / n, dtype=torch.float64)


def bottom_by_polyfit(rates, losses):
    a, b, c = np.polyfit(np.log10(rates), np.log10(losses), 2)
    return 10 ** (-b / a / 2)


def bottom_by_the_derivative(rates, losses):
    parabola = np.polynomial.Polynomial.fit(np.log(rates), np.log(losses), 2)
    return float(np.exp(parabola.deriv().roots()[0]))


def bottom_by_lagrange(rates, losses):
    (x1, x2, x3), (y1, y2, y3) = (list(map(math.log2, v)) for v in (rates, losses))
    above = y1 * (x2**2 - x3**2) + y2 * (x3**2 - x1**2) + y3 * (x1**2 - x2**2)
    return 2 ** (above / (2 * (y1 * (x2 - x3) + y2 * (x3 - x1) + y3 * (x1 - x2))))


# ---------------------------------------------------------------- 07


def start_by_counting(A, B):
    if torch.matmul(B, A).count_nonzero().item() > 0:
        return "not the base"
    return "never moves" if A.count_nonzero() == 0 and B.count_nonzero() == 0 else "healthy"


def start_by_equal(A, B):
    product = B @ A
    if not torch.equal(product, torch.zeros_like(product)):
        return "not the base"
    return ("never moves", "healthy")[int(torch.cat((A.flatten(), B.flatten())).ne(0).any())]


def start_by_the_gradient(A, B):
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    product = B @ A
    if (product != 0).any():
        return "not the base"
    product.sum().backward()
    return "healthy" if A.abs().max() > 0 or B.abs().max() > 0 else "never moves"


def frozen_by_sets(model):
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name, _ in model.named_parameters() if name.endswith((".lora_A", ".lora_B"))}
    return training == adapters


def frozen_in_a_loop(model):
    for name, p in model.named_parameters():
        if re.fullmatch(r"(.*\.)?lora_[AB]", name):
            if not p.requires_grad:
                return False
        elif p.requires_grad:
            return False
    return True


def frozen_by_modules(model):
    right = [p.requires_grad == (name in {"lora_A", "lora_B"}) for module in model.modules()
             for name, p in module.named_parameters(recurse=False)]
    return np.all(right)


def diagnosed_by_match(report):
    good = {key: report[key] >= 0.9 for key in ("exact", "served", "base_exact")}
    match (report["base_changed"], good["exact"], good["served"]):
        case (True, _, _):
            return "unfrozen"
        case (False, True, True):
            return "healthy"
        case (False, True, False):
            return "scale"
    if not (report["grad_A"] or report["grad_B"]):
        return "zeros"
    return "base" if not good["base_exact"] else "rank" if report["modules"] == report["planned"] else "modules"


def diagnosed_by_update(report):
    checks = (("unfrozen", report["base_changed"] is True), ("zeros", report["update"] == 0.0),
              ("healthy", report["exact"] >= 0.9 and report["served"] >= 0.9), ("scale", report["exact"] >= 0.9),
              ("modules", report["modules"] != report["planned"]), ("base", report["base_exact"] < 0.9))
    return next((word for word, holds in checks if holds), "rank")


def diagnosed_backwards(report):
    word = "rank"
    if report["modules"] / report["planned"] < 1:
        word = "modules"
    if not report["base_exact"] >= 0.9:
        word = "base"
    if report["exact"] >= 0.9:
        word = "healthy" if not report["served"] < 0.9 else "scale"
    if abs(report["grad_A"]) + abs(report["grad_B"]) == 0:
        word = "zeros"
    return "unfrozen" if report["base_changed"] else word


# ---------------------------------------------------------------- 08


def merged_in_fp64(W, A, B, scaling):
    return torch.addmm(W.double(), B.double(), A.double(), alpha=scaling).type_as(W)


def merged_by_promotion(W, A, B, scaling):
    return (W + B * scaling @ A).to(dtype=W.dtype)


def merged_into_a_new_one(W, A, B, scaling):
    return W.clone().copy_(scaling * torch.einsum("or,ri->oi", B, A) + W)


def gap_by_frexp(w, bits):
    return math.ldexp(0.5, math.frexp(w)[1] - bits)


def gap_by_spacing(w, bits):
    return np.spacing(np.float64(abs(w))) * 2 ** (52 - bits)


def gap_by_hand(w, bits):
    power, size = 1.0, abs(w)
    while power > size:
        power /= 2
    while 2 * power <= size:
        power *= 2
    return power / 2**bits


def swallowed_in_fp64(W, delta):
    sums = (W.double() + delta.double()).to(W.dtype).double()
    return torch.linalg.vector_norm(sums - W.double() - delta.double()) / torch.linalg.vector_norm(delta.double())


def swallowed_by_dist(W, delta):
    return torch.dist((W.float() + delta).type(W.dtype).float() - W, delta) / delta.pow(2).sum().sqrt()


def swallowed_by_hand(W, delta):
    lost = (torch.add(delta, W).to(W.dtype).float() - (W.float() + delta))
    return math.sqrt(float(lost.square().sum()) / float(delta.square().sum()))


def serves_new_weights(layer, updates, x):
    kept = layer.weight
    outputs = []
    for update in updates:
        layer.weight = nn.Parameter(kept.detach() + update)
        outputs.append(layer(x).detach())
    layer.weight = kept
    return outputs


@torch.no_grad()
def serves_a_state(layer, updates, x):
    state = {name: t.clone() for name, t in layer.state_dict().items()}

    def one(update):
        layer.load_state_dict(state)
        layer.weight.add_(update)
        return layer(x)

    outputs = tuple(map(one, updates))
    layer.load_state_dict(state)
    return outputs


def serves_through_data(layer, updates, x):
    kept = deepcopy(layer.weight.data)
    try:
        for update in updates:
            layer.weight.data = kept + update
            yield layer(x)
    finally:
        layer.weight.data = kept


# ---------------------------------------------------------------- 09


def routed_by_groups(x, W, adapters, names):
    y = torch.einsum("bti,oi->bto", x, W)
    for name in {n for n in names if n is not None}:
        A, B, scaling = adapters[name]
        rows = [i for i, n in enumerate(names) if n == name]
        y[rows] += x[rows] @ A.T @ B.T * scaling
    return y


def routed_by_masks(x, W, adapters, names):
    y = x @ W.T
    for name, (A, B, scaling) in adapters.items():
        mask = torch.tensor([n == name for n in names]).float()[:, None, None]
        y = y + mask * scaling * (x @ A.T) @ B.T
    return y


def routed_by_rows(x, W, adapters, names):
    nothing = (torch.zeros(1, W.shape[1]), torch.zeros(W.shape[0], 1), 0)
    rows = []
    for row, name in zip(x, names):
        A, B, scaling = adapters.get(name, nothing)
        rows.append(F.linear(row, W + scaling * B.mm(A)))
    return torch.stack(rows, 0)


def combined_in_A(parts):
    return torch.vstack([w * s * A for w, s, A, B in parts]), torch.hstack([B for w, s, A, B in parts])


def combined_in_halves(parts):
    A = torch.cat([A * abs(w * s) ** 0.5 for w, s, A, B in parts])
    B = torch.cat([B * math.copysign(abs(w * s) ** 0.5, w * s) for w, s, A, B in parts], -1)
    return [A, B]


def combined_by_svd(parts):
    U, S, Vh = torch.linalg.svd(sum(w * s * B @ A for w, s, A, B in parts), full_matrices=False)
    R = int((S > 1e-5 * S[0]).sum())
    return S[:R, None] * Vh[:R], U[:, :R]


def combined_step_by_step(parts):
    def join(left, right):
        return torch.cat((left[0], right[0])), torch.cat((left[1], right[1]), 1)
    return reduce(join, [(s * A, w * B) for w, s, A, B in reversed(parts)])


def compared_by_partition(adapter, model):
    if not adapter:
        return "not said"
    (mine, _, weights), (theirs, _, others) = adapter.partition("-"), model.partition("-")
    if mine != theirs:
        return "other architecture"
    return "same" if weights == others else "other weights"


def compared_by_table(adapter, model):
    if adapter is None:
        return "not said"
    agree = [a == b for a, b in zip(adapter.split("-"), model.split("-"))]
    return {(1, 1): "same", (1, 0): "other weights"}.get(tuple(map(int, agree)), "other architecture")


def compared_by_prefix(adapter, model):
    match adapter:
        case None:
            return "not said"
        case _ if adapter == model:
            return "same"
    return "other weights" if model.startswith(adapter[:adapter.index("-") + 1]) else "other architecture"


def ships_in_a_loop(scores, base, home, floor):
    names = []
    for adapter in home:
        key = (base, adapter, home[adapter])
        if key in scores and not scores[key] < floor:
            names += [adapter]
    return names


def ships_by_filter(scores, base, home, floor):
    return list(filter(lambda a: scores.get((base, a, home[a]), -math.inf) >= floor, home))


def ships_by_a_table(scores, base, home, floor):
    own = {a: s for (b, a, task), s in scores.items() if b == base and home.get(a) == task}
    return tuple(a for a in home if a in own and own[a] >= floor)


# ---------------------------------------------------------------- 10


def quantised_by_distance(weight, levels, block):
    blocks = rearrange(weight, "(b k) -> b k", k=block)
    top = blocks.abs().max(dim=1).values
    return torch.cdist((blocks / top[:, None]).reshape(-1, 1), levels[:, None]).argmin(1), top


def quantised_by_chunks(weight, levels, block):
    codes, tops = [], []
    for chunk in weight.split(block):
        tops.append(chunk.abs().max())
        codes.append((chunk[:, None] / tops[-1] - levels).abs().min(1).indices)
    return torch.cat(codes).to(torch.uint8), torch.stack(tops)


def quantised_by_norm(weight, levels, block):
    blocks = weight.reshape(len(weight) // block, block)
    top = torch.linalg.vector_norm(blocks, ord=math.inf, dim=1)
    nearest = torch.searchsorted((levels[:-1] + levels[1:]).div(2).contiguous(), blocks / top.unsqueeze(1))
    return [nearest.view(-1).int(), top]


def packed_by_pairs(codes):
    return torch.stack([16 * a + b for a, b in codes.view(-1, 2)]).to(torch.uint8)


def packed_by_product(codes):
    return (rearrange(codes.int(), "(n two) -> n two", two=2) * torch.tensor([16, 1])).sum(1).to(torch.uint8)


def packed_by_numpy(codes):
    nibbles = codes.numpy().reshape(-1, 2)
    return torch.from_numpy(np.bitwise_or(np.left_shift(nibbles[:, 0], 4), nibbles[:, 1]).astype(np.uint8))


def restored_by_numpy(packed, absmax, levels, block):
    bits = np.unpackbits(packed.numpy()).reshape(-1, 4)
    codes = bits @ np.array([8, 4, 2, 1])
    return levels[torch.from_numpy(codes)] * absmax.repeat_interleave(block)


def restored_by_division(packed, absmax, levels, block):
    codes = torch.empty(2 * len(packed), dtype=torch.long)
    codes[::2], codes[1::2] = packed // 16, packed % 16
    return torch.cat([levels.take(c) * a for c, a in zip(codes.split(block), absmax)])


def restored_in_a_loop(packed, absmax, levels, block):
    values = []
    for byte in packed.tolist():
        for code in divmod(byte, 16):
            values.append(levels[code] * absmax[len(values) // block])
    return torch.stack(values)


def bits_counted(code_bits, block, absmax_bits, absmax_block):
    weights = block * absmax_block
    return (code_bits * weights + absmax_bits * absmax_block + 32) / weights


# ---------------------------------------------------------------- 11


def parameters_by_modules(layers, d, vocab, context):
    def size(*modules):
        return sum(p.numel() for m in modules for p in m.parameters())

    with torch.device("meta"):
        layer = size(*(nn.Linear(d, d) for _ in range(4)), nn.Linear(d, 4 * d), nn.Linear(4 * d, d),
                     nn.LayerNorm(d), nn.LayerNorm(d))
        return layers * layer + size(nn.Embedding(vocab, d), nn.Embedding(context, d), nn.LayerNorm(d))


def parameters_in_short(layers, d, vocab, context):
    return layers * d * (12 * d + 13) + d * (vocab + context + 2)


def parameters_added_up(layers, d, vocab, context):
    total = np.int64(vocab) * d + context * d
    for _ in range(layers):
        total += 4 * d**2 + 4 * d + 8 * d**2 + 5 * d + 4 * d
    return total + 2 * d


def judged_by_doubt(need, usable):
    (least, most), (low, high) = need, usable
    if low < most and least <= high:
        return "too close to call"
    return ("does not fit", "fits")[most <= low]


def judged_by_both(need, usable):
    always, ever = max(need) <= min(usable), min(need) <= max(usable)
    return "fits" if always else "too close to call" if ever else "does not fit"


def judged_by_table(need, usable):
    return {(True, True): "fits", (False, True): "too close to call",
            (False, False): "does not fit"}[not need[1] > usable[0], not need[0] > usable[1]]


def revisited_by_backward(layer, inputs, grad):
    with torch.enable_grad():
        fresh = [t.detach().clone().requires_grad_(True) for t in inputs]
        layer(*fresh).backward(grad)
    return tuple(t.grad for t in fresh)


def revisited_by_func(layer, inputs, grad):
    _, backward = torch.func.vjp(layer, *[t.detach() for t in inputs])
    return backward(grad)


def revisited_by_a_sum(layer, inputs, grad):
    with torch.set_grad_enabled(True):
        x, A, B = (t.clone().detach().requires_grad_() for t in inputs)
        return list(torch.autograd.grad((layer(x, A, B) * grad).sum(), [x, A, B]))


def streamed_by_playing(layer, layers, head):
    sizes, visits = [layer] * layers + [head], [*range(layers + 1), *range(layers - 1, -1, -1)]
    slots, moved, held = {}, 0, 0
    for turn in range(2):
        moved = 0
        order = visits + [1]
        for now, then in zip(order, order[1:]):
            for shard in (now, then):
                if slots.get(shard % 2) != shard:
                    slots[shard % 2] = shard
                    moved += sizes[shard]
            held = max(held, sizes[now] + sizes[then])
    return held, moved


# ---------------------------------------------------------------- 12


def prepended_by_repeat(prompt, text):
    return torch.cat([repeat(prompt, "n c -> b n c", b=text.shape[0]), text], dim=-2)


def prepended_by_rows(prompt, text):
    return torch.stack([torch.vstack((prompt, row)) for row in text])


def prepended_in_place(prompt, text):
    B, T, C = text.shape
    out = torch.empty(B, len(prompt) + T, C, dtype=text.dtype)
    out[:, :len(prompt)], out[:, len(prompt):] = prompt, text
    return out


def attended_by_torch(q, k, v, prefix_k, prefix_v):
    mask = torch.ones(len(q), len(prefix_k) + len(k), dtype=torch.bool).tril(len(prefix_k))
    return F.scaled_dot_product_attention(q, torch.cat((prefix_k, k)), torch.cat((prefix_v, v)), attn_mask=mask)


def attended_row_by_row(q, k, v, prefix_k, prefix_v):
    return torch.stack([F.softmax(torch.vstack((prefix_k, k[:t + 1])) @ q[t] / math.sqrt(q.size(-1)), 0)
                        @ torch.vstack((prefix_v, v[:t + 1])) for t in range(len(q))])


def attended_in_two_parts(q, k, v, prefix_k, prefix_v):
    front = (einsum(q, prefix_k, "t d, n d -> t n") / q.shape[1] ** 0.5).exp()
    text = (einsum(q, k, "t d, s d -> t s") / q.shape[1] ** 0.5).exp().tril()
    return (front @ prefix_v + text @ v) / (front.sum(1) + text.sum(1))[:, None]


def bottleneck_by_linear(h, down, up):
    return F.linear(nn.GELU()(F.linear(h, down)), up).add(h)


def bottleneck_by_erf(h, down, up):
    z = torch.einsum("btc,mc->btm", h, down)
    return h + (0.5 * z * (1 + torch.erf(z / math.sqrt(2)))) @ up.mT


def bottleneck_by_modules(h, down, up):
    block = nn.Sequential(nn.Linear(*down.shape[::-1], bias=False), nn.GELU(), nn.Linear(*up.shape[::-1], bias=False))
    block[0].weight.data, block[2].weight.data = down, up
    return block(h) + h


def folded_by_einsum(W, scale, at_input):
    return torch.einsum("oi,i->oi" if at_input else "oi,o->oi", W, scale)


def folded_by_the_layer(W, scale, at_input):
    unit = torch.eye(W.shape[1])
    return ((unit * scale) @ W.T).T if at_input else ((unit @ W.T) * scale).T


def folded_by_columns(W, scale, at_input):
    if at_input:
        return torch.stack([column * s for column, s in zip(W.T, scale)], dim=1)
    return torch.stack([row * s for row, s in zip(W, scale)])


# ---------------------------------------------------------------- 13


def afforded_by_sorting(options, file_budget, usable):
    for rank, size, (_, most) in sorted(options, reverse=True):
        if size <= file_budget and most <= usable[0]:
            return rank
    return 0


def afforded_by_reduce(options, file_budget, usable):
    def step(best, option):
        rank, size, need = option
        return max(best, rank) if size <= file_budget and max(need) <= min(usable) else best
    return reduce(step, options, 0)


def afforded_by_numpy(options, file_budget, usable):
    table = np.array([(r, s, n[1]) for r, s, n in options])
    good = (table[:, 1] <= file_budget) & (table[:, 2] <= usable[0])
    return (table[:, 0] * good).max()


def merged_by_taking_away(traffic, base, adapter, memory):
    names = [name for _, name in sorted((-n, name) for name, n in traffic.items())]
    if len(names) * base <= memory:
        return names
    while names and (len(names) + 1) * base + (len(traffic) - len(names)) * adapter > memory:
        names.pop()
    return names


def merged_by_formula(traffic, base, adapter, memory):
    n, names = len(traffic), sorted(traffic, key=lambda name: -traffic[name])
    if n * base <= memory:
        return tuple(names)
    return names[:min((memory - base - n * adapter) // (base - adapter), n - 1)]


def merged_by_trial(traffic, base, adapter, memory):
    order = sorted(traffic.items(), key=lambda item: item[1], reverse=True)
    best = []
    for k in range(1, len(order) + 1):
        rest = len(order) - k
        if k * base + (rest > 0) * base + rest * adapter <= memory:
            best = [name for name, _ in order[:k]]
    return best


def accepted_by_sorting(right, control, margin):
    others = sorted((n for n in right if n != control), key=lambda n: right[n]["validation"], reverse=True)
    return others[0] if others and right[others[0]]["validation"] - right[control]["validation"] >= margin else None


def accepted_in_a_loop(right, control, margin):
    best, bar = None, right[control]["validation"] + margin
    for name in right.keys() - {control}:
        score = right[name]["validation"]
        if score >= bar and (best is None or score > right[best]["validation"]):
            best = name
    return best


def accepted_by_pairs(right, control, margin):
    passed = [(files["validation"], name) for name, files in right.items()
              if name != control and not files["validation"] < right[control]["validation"] + margin]
    return max(passed)[1] if passed else None


# ---------------------------------------------------------------- 14


def pooled_by_rows(hidden, mask):
    return torch.stack([row[m == 1].mean(dim=0) for row, m in zip(hidden, mask)])


def pooled_by_einsum(hidden, mask):
    return torch.einsum("btd,bt->bd", hidden, mask.float()) / mask.sum(-1, keepdim=True)


def pooled_by_nan(hidden, mask):
    return hidden.masked_fill(~mask.bool().unsqueeze(-1), math.nan).nanmean(1)


def share_by_numpy(W):
    S = np.linalg.svd(W.numpy(), compute_uv=False)
    p = S / S.sum()
    return np.exp(-(p * np.log(p)).sum()) / min(W.shape)


def share_by_categorical(W):
    S = torch.linalg.svdvals(W)
    return torch.distributions.Categorical(probs=S).perplexity() / S.numel()


def share_in_base_two(W):
    S = torch.linalg.svdvals(W)
    return 2 ** -sum(p * math.log2(p) for p in (S / S.sum()).tolist()) / len(S)


def keys_by_join(module):
    return tuple("base_model.model." + module + "." + half + ".weight" for half in ("lora_A", "lora_B"))


def keys_by_replace(module):
    name = f"base_model.model.{module}.lora_A.weight"
    return [name, ".lora_B.".join(name.rsplit(".lora_A.", 1))]


# ---------------------------------------------------------------- 15


def targets_by_where(ids, trained):
    return torch.where(torch.tensor(trained), torch.tensor(ids), -100)[1:].tolist()


def targets_from_behind(ids, trained):
    found = []
    while len(found) < len(ids) - 1:
        found.insert(0, ids[-1 - len(found)] if trained[-1 - len(found)] else -100)
    return found


def targets_by_positions(ids, trained):
    found = [-100] * (len(ids) - 1)
    for i in np.flatnonzero(trained):
        if i:
            found[i - 1] = ids[i]
    return found


def rate_by_logarithms(width, method):
    return math.exp(math.log(0.003) - 0.78 * math.log(width / 160)) / {"lora": 1, "full": 5}[method]


def rate_by_roots(width, method):
    return {"full": 0.0006}.get(method, 0.003) / (width / 160) ** 0.5 / (width / 160) ** 0.28


def rate_by_numpy(width, method):
    return np.float64(3e-3) * np.power(np.divide(160, width), 0.78) * (0.2 if method == "full" else 1.0)


def cost_by_the_watt_second(tokens, epochs, speed, watts, price):
    seconds = tokens * epochs / speed
    return seconds / 3600, watts * seconds * price / 3.6e6


def cost_as_a_list(tokens, epochs, speed, watts, price):
    time = epochs * tokens / speed / 60 / 60
    return [time, math.prod((time, watts, price)) * 1e-3]


def cost_epoch_by_epoch(tokens, epochs, speed, watts, price):
    hours = sum(tokens / speed / 3600 for _ in range(epochs))
    return hours, price * (hours * (watts / 1000))


RIGHT = {
    "nb00.lora_output": [output_by_linear, output_by_merging, output_by_einsum],
    "nb00.shelf_bytes": [shelf_by_parts, shelf_by_numpy, shelf_in_a_loop],
    "nb01.state_bytes": [by_parts, in_numpy, lambda parameters, trainable: parameters * 4 + trainable * 4 * 3,
                         lambda *counts: 16 * counts[1] + 4 * (counts[0] - counts[1])],
    "nb01.kept_floats": [kept_in_a_loop, kept_by_autograd,
                         lambda widths, trains: int(np.dot(widths[:-1], np.array(trains, dtype=int)))],
    "nb01.ring_bytes": [ring_in_rounds, lambda t, n: 8 * t * (1 - 1 / n), lambda t, n: Fraction(8 * t * (n - 1), n),
                        lambda t, n: 8 * t * (n - 1) // n],
    "nb02.count_parameters": [count_by_modules, lambda shapes, rank: rank * sum(map(sum, shapes)),
                              lambda shapes, rank: np.array(shapes).sum() * rank,
                              lambda shapes, rank: sum(starmap(lambda o, i: o * rank + rank * i, shapes))],
    "nb02.merged_weight": [merged_by_addmm, merged_by_columns, merged_by_the_layer],
    "nb02.best_rank_r_error": [error_by_pythagoras, error_by_numpy, error_by_the_matrix],
    "nb02.first_update": [update_by_autograd, update_in_one_product, update_by_rows],
    "nb03.find_targets": [found_by_regex, found_by_parts, found_by_suffixes],
    "nb03.fit": [fit_by_the_optimizer, fit_by_autograd, fit_token_by_token],
    "nb03.largest_rank": [rank_by_bisection, rank_by_trial, rank_by_numpy],
    "nb03.wrap": [wrap_by_names, wrap_by_recursion, wrap_then_freeze],
    "nb04.alpha_for": [alpha_by_the_scaling, alpha_as_a_fraction,
                       lambda alpha, r, n, rs: alpha * math.pow(n / r, 1 / (1 + rs))],
    "nb04.slope": [slope_by_regression, slope_in_fp32, lambda x, y: np.polyfit(np.log(x), np.log(y), 1)[0]],
    "nb04.first_adam_update": [adam_by_hand, adam_with_where, adam_itself],
    "nb04.twin": [twin_as_a_list, twin_by_powers, twin_on_a_copy],
    "nb05.rank_for_energy": [energy_in_a_loop, energy_by_numpy, energy_by_bisection],
    "nb05.product_svd": [svd_by_the_whole_product, svd_by_numpy, svd_by_two_svds],
    "nb05.similarity": [similarity_by_angles, similarity_by_numpy, similarity_by_pairs],
    "nb05.amplification_factor": [amplification_by_projectors, amplification_by_numpy, amplification_the_old_way],
    "nb05.intruders": [intruders_one_by_one, intruders_in_one_sum, intruders_by_difference],
    "nb06.fair_score": [fair_by_groups, fair_by_numpy, fair_by_running_sums],
    "nb06.bottom": [bottom_by_polyfit, bottom_by_the_derivative, bottom_by_lagrange],
    "nb06.benefit": [lambda base, lora, full: 1 - (full - lora) / (full - base),
                     lambda base, lora, full: np.divide(lora - base, full - base),
                     lambda base, lora, full: torch.tensor(base - lora, dtype=torch.float64) / (base - full)],
    "nb07.healthy_start": [start_by_counting, start_by_equal, start_by_the_gradient],
    "nb07.is_frozen": [frozen_by_sets, frozen_in_a_loop, frozen_by_modules],
    "nb07.diagnose": [diagnosed_by_match, diagnosed_by_update, diagnosed_backwards],
    "nb08.merged_once": [merged_in_fp64, merged_by_promotion, merged_into_a_new_one],
    "nb08.gap": [gap_by_frexp, gap_by_spacing, gap_by_hand],
    "nb08.swallowed": [swallowed_in_fp64, swallowed_by_dist, swallowed_by_hand],
    "nb08.serve": [serves_new_weights, serves_a_state, serves_through_data],
    "nb09.route": [routed_by_groups, routed_by_masks, routed_by_rows],
    "nb09.combine": [combined_in_A, combined_in_halves, combined_by_svd, combined_step_by_step],
    "nb09.compare_bases": [compared_by_partition, compared_by_table, compared_by_prefix],
    "nb09.may_ship": [ships_in_a_loop, ships_by_filter, ships_by_a_table],
    "nb10.quantise": [quantised_by_distance, quantised_by_chunks, quantised_by_norm],
    "nb10.pack": [packed_by_pairs, packed_by_product, packed_by_numpy],
    "nb10.restore": [restored_by_numpy, restored_by_division, restored_in_a_loop],
    "nb10.bits_a_weight": [bits_counted, lambda c, b, a, s: c + (a + 32 / s) / b,
                           lambda c, b, a, s: Fraction(c) + Fraction(a, b) + Fraction(32, b * s)],
    "nb11.gpt_parameters": [parameters_by_modules, parameters_in_short, parameters_added_up],
    "nb11.verdict": [judged_by_doubt, judged_by_both, judged_by_table],
    "nb11.revisit": [revisited_by_backward, revisited_by_func, revisited_by_a_sum],
    "nb11.streamed": [streamed_by_playing, lambda w, n, h: [max(2 * w, w + h), w * 2 * n - 3 * w + h],
                      lambda w, n, h: (np.maximum(w, h) + w, n * w + h + (n - 3) * w)],
    "nb12.prepend": [prepended_by_repeat, prepended_by_rows, prepended_in_place],
    "nb12.attend_with_prefix": [attended_by_torch, attended_row_by_row, attended_in_two_parts],
    "nb12.bottleneck": [bottleneck_by_linear, bottleneck_by_erf, bottleneck_by_modules],
    "nb12.fold": [folded_by_einsum, folded_by_the_layer, folded_by_columns],
    "nb13.affordable_rank": [afforded_by_sorting, afforded_by_reduce, afforded_by_numpy],
    "nb13.merged_copies": [merged_by_taking_away, merged_by_formula, merged_by_trial],
    "nb13.accepted": [accepted_by_sorting, accepted_in_a_loop, accepted_by_pairs],
    "nb14.mean_pool": [pooled_by_rows, pooled_by_einsum, pooled_by_nan],
    "nb14.effective_share": [share_by_numpy, share_by_categorical, share_in_base_two],
    "nb14.peft_keys": [keys_by_join, keys_by_replace,
                       lambda m: [f"base_model.model.{m}.lora_{half}.weight" for half in ("A", "B")]],
    "nb15.next_targets": [targets_by_where, targets_from_behind, targets_by_positions],
    "nb15.rate_for": [rate_by_logarithms, rate_by_roots, rate_by_numpy],
    "nb15.cost_of": [cost_by_the_watt_second, cost_as_a_list, cost_epoch_by_epoch],
}
