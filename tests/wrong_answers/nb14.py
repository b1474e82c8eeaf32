"""Wrong answers to the exercises of notebook 14, as learners may write them, and a part of what each must be told."""

import torch


def all_tokens(hidden, mask):
    return torch.mean(hidden, dim=1)


def zeros_counted(hidden, mask):
    return torch.where(mask[:, :, None].bool(), hidden, 0.0).mean(dim=1)


def not_divided(hidden, mask):
    return torch.einsum("btd,bt->bd", hidden, mask.to(hidden.dtype))


def first_token(hidden, mask):
    return hidden[:, 0, :]


def shared_count(hidden, mask):
    return torch.einsum("btd,bt->bd", hidden, mask.float()) / int(mask.sum())


def last_token(hidden, mask):
    return hidden[torch.arange(len(hidden)), mask.sum(1) - 1]


def wrong_broadcast(hidden, mask):
    return (hidden * mask).sum(1) / mask.sum(1)


def bare_entropy(W):
    S = torch.linalg.svdvals(W)
    p = S / S.sum()
    return torch.special.entr(p).sum().item() / len(S)


def a_count(W):
    S = torch.linalg.svdvals(W)
    return torch.distributions.Categorical(S).entropy().exp().item()


def of_the_larger(W):
    S = torch.linalg.svd(W, full_matrices=False).S
    p = S / S.sum()
    return float(torch.exp(-(p * p.log()).sum()) / max(W.shape))


def of_squares(W):
    p = torch.linalg.svdvals(W) ** 2
    p = p / p.sum()
    return float(torch.exp(-(p * p.log()).sum()) / min(W.shape))


def rows(W):
    S = torch.linalg.svdvals(W)
    p = S / S.sum()
    return float(torch.exp(torch.special.entr(p).sum()) / len(W))


def whole_rank(W):
    return torch.linalg.matrix_rank(W).item() / min(W.shape)


def bare(module):
    return [module + ".lora_A.weight", module + ".lora_B.weight"]


def one_wrapper(module):
    return ["base_model." + module + f".lora_{half}.weight" for half in ("A", "B")]


def no_ending(module):
    return ["base_model.model." + module + f".lora_{half}" for half in ("A", "B")]


def default(module):
    return ["base_model.model." + module + f".lora_{half}.default.weight" for half in ("A", "B")]


def swapped(module):
    return ["base_model.model." + module + f".lora_{half}.weight" for half in ("B", "A")]


def glued(module):
    return ["base_model.model" + module + f".lora_{half}.weight" for half in ("A", "B")]


WRONG = {
    "mean_pool": [
        (all_tokens, "the padding is averaged in"), (zeros_counted, "divided by the length of the batch"),
        (not_divided, "this is the sum"), (first_token, "the first token alone"),
        (shared_count, "all words of the batch"), (last_token, "the last word alone"), (wrong_broadcast, "raised RuntimeError")],
    "effective_share": [
        (bare_entropy, "this is the entropy"), (a_count, "divide by how many"), (of_the_larger, "not max"),
        (of_squares, "shares of the squares"), (rows, "divides by d_out"), (whole_rank, "this is the rank itself")],
    "peft_keys": [
        (bare, "wraps the model twice"), (one_wrapper, "two wrappers"), (no_ending, "end in .weight"),
        (default, "the file leaves it out"), (swapped, "A comes first"), (glued, "expected")],
}
