"""Wrong answers to the exercises of notebook 07, as learners may write them, and a part of what each must be told."""

import torch


def product_only(A, B):
    if torch.equal(B @ A, torch.zeros(B.shape[0], A.shape[1])):
        return "healthy"
    return "not the base"


def b_is_zero(A, B):
    if B.norm() == 0:
        return "healthy"
    return "not the base"


def linears_only(A, B):
    if A.norm() == 0 and B.norm() == 0:
        return "never moves"
    return "healthy" if B.norm() == 0 else "not the base"


def any_zero_is_bad(A, B):
    if (A == 0).all() or (B == 0).all():
        return "never moves"
    return "not the base"


def factors_only(A, B):
    zero_A, zero_B = bool((A == 0).all()), bool((B == 0).all())
    if zero_A and zero_B:
        return "never moves"
    return "healthy" if zero_A or zero_B else "not the base"


def yes_or_no(A, B):
    return not (B @ A).any() and bool(A.any() or B.any())


def name_contains(model):
    for name, p in model.named_parameters():
        if p.requires_grad != ("lora_" in name):
            return False
    return True


def base_only(model):
    for name, p in model.named_parameters():
        if p.requires_grad and not name.endswith(("lora_A", "lora_B")):
            return False
    return True


def adapters_only(model):
    return all(p.requires_grad for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B")))


def by_gradient(model):
    return all((p.grad is not None) == name.endswith(("lora_A", "lora_B")) for name, p in model.named_parameters())


def inside_only(model):
    return all(p.requires_grad == name.endswith(("lora_A", "lora_B")) for name, p in model.named_parameters()
               if "base_layer" in name or name.endswith(("lora_A", "lora_B")))


def rank_first(report):
    if report["grad_A"] == 0 and report["grad_B"] == 0:
        return "zeros"
    if report["base_changed"]:
        return "unfrozen"
    if report["exact"] < 0.9:
        return "rank"
    return "scale" if report["served"] < 0.9 else "healthy"


def never_serves(report):
    if report["grad_A"] + report["grad_B"] == 0:
        return "zeros"
    if report["base_changed"]:
        return "unfrozen"
    if report["base_exact"] < 0.9:
        return "base"
    if report["modules"] < report["planned"]:
        return "modules"
    return "healthy" if report["exact"] >= 0.9 else "rank"


def no_fingerprint(report):
    if report["grad_A"] + report["grad_B"] == 0:
        return "zeros"
    if report["exact"] >= 0.9:
        return "healthy" if report["served"] >= 0.9 else "scale"
    if report["base_exact"] < 0.9:
        return "base"
    return "modules" if report["modules"] < report["planned"] else "rank"


def trusts_the_base(report):
    if report["grad_A"] + report["grad_B"] == 0:
        return "zeros"
    if report["base_changed"]:
        return "unfrozen"
    if report["exact"] >= 0.9:
        return "healthy" if report["served"] >= 0.9 else "scale"
    return "modules" if report["modules"] < report["planned"] else "rank"


def trusts_the_plan(report):
    if report["grad_A"] + report["grad_B"] == 0:
        return "zeros"
    if report["base_changed"]:
        return "unfrozen"
    if report["exact"] >= 0.9:
        return "healthy" if report["served"] >= 0.9 else "scale"
    return "base" if report["base_exact"] < 0.9 else "rank"


def forgets_zeros(report):
    if report["base_changed"]:
        return "unfrozen"
    if report["exact"] >= 0.9:
        return "healthy" if report["served"] >= 0.9 else "scale"
    if report["base_exact"] < 0.9:
        return "base"
    return "modules" if report["modules"] < report["planned"] else "rank"


WRONG = {
    "healthy_start": [
        (product_only, "a product of zero is not enough"), (b_is_zero, "says nothing about A"),
        (linears_only, "on an embedding"), (any_zero_is_bad, "one zero factor is the healthy start"),
        (factors_only, "form B @ A"), (yes_or_no, "not True or False")],
    "is_frozen": [
        (name_contains, "the name's last part"), (base_only, "must train"), (adapters_only, "so may the base"),
        (by_gradient, "ask requires_grad"), (inside_only, "norms, embeddings")],
    "diagnose": [
        (rank_first, "it comes last"), (never_serves, "compare served with exact"),
        (no_fingerprint, "look at base_changed"),
        (trusts_the_base, "look at base_exact"), (trusts_the_plan, "compare modules with planned"),
        (forgets_zeros, "both matrices zero")],
}
