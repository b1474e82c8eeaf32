"""Notebook 14: a mean over the words there are, a share of a spectrum, PEFT's names; a prediction about a probe."""

import math
import random

import torch
from torch import Tensor

from . import Exercise, Prediction


def draw_hidden(seed: int) -> tuple[Tensor, Tensor]:
    batch, length, width = 3 + seed, 7, 5
    lengths = torch.randint(1, length + 1, (batch,))
    lengths[seed % batch] = 3  # a row at least is shorter than the batch
    mask = torch.arange(length) < lengths[:, None]
    return torch.randn(batch, length, width), mask.long()


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Row by row, of the words alone."""
    return torch.stack([row[m.bool()].mean(0) for row, m in zip(hidden, mask)])


mean_pool = Exercise("mean_pool", pooled, draw_hidden, [
    (lambda h, m: h.mean(1), "the padding is averaged in too: a text would depend on how long its neighbours are"),
    (lambda h, m: (h * m[..., None]).mean(1),
     "the sum leaves the padding out, but is divided by the length of the batch: divide by how many words there are"),
    (lambda h, m: (h * m[..., None]).sum(1), "this is the sum: a long text would count for more. Divide by its words"),
    (lambda h, m: h[:, 0], "this is the first token alone, as in BERT's classifier; MiniLM was trained with the mean"),
    (lambda h, m: (h * m[..., None]).sum(1) / m.sum(),
     "divided by all words of the batch: each row has a count of its own"),
    (lambda h, m: h.masked_fill(m[..., None] == 0, -math.inf).amax(1), "this is the maximum; MiniLM takes the mean"),
    (lambda h, m: (h * m[..., None]).sum(2) / m.sum(1, keepdim=True),
     "this adds up the features of each word: the sum goes over the words, dimension 1"),
    (lambda h, m: h[torch.arange(len(h)), m.sum(1) - 1],
     "this is the last word alone; MiniLM was trained with the mean"),
    (lambda h, m: (h * (1 - m[..., None])).sum(1) / (1 - m).sum(1, keepdim=True).clamp(min=1),
     "this is the mean over the padding: 1 marks a word, 0 the padding"),
    (lambda h, m: torch.nn.functional.normalize(pooled(h, m), dim=1), "the mean is asked for, not scaled to length 1"),
    (lambda h, m: pooled(h, m)[:, None], "one vector a ticket, (B, d): here keepdim has left a dimension"),
    (lambda h, m: (h * m[..., None]).sum(1) / m.sum(1, keepdim=True).sqrt(),
     "divided by the root of the number of words: by the number itself"),
    (lambda h, m: (h * m[..., None]).sum(1) / (m.sum(1, keepdim=True) + 1),
     "divided by one too many: by the number of words"),
    (lambda h, m: pooled(h, m).mean(0, keepdim=True).expand(len(h), -1),
     "this is the mean over the whole batch: each row has one of its own"),
], situations=[(lambda h, m: bool(m.all()), "there is no padding"), (lambda h, m: not m.all(), "there is padding")])


def draw_matrix(seed: int) -> tuple[Tensor]:
    d_out, d_in = (12, 20, 15, 9)[seed], (18, 8, 15, 30)[seed]
    return (torch.randn(d_out, d_in, dtype=torch.float64) * 0.8 ** torch.arange(d_in),)


def by_entropy(W: Tensor) -> float:
    """The perplexity of the singular values, over how many there are."""
    S = torch.linalg.svd(W, full_matrices=False).S.tolist()
    return math.prod((s / sum(S)) ** (-s / sum(S)) for s in S) / len(S)


def of_spectrum(share):
    """The mistake that makes `share` of the singular values' shares p, and of W."""
    def mistake(W):
        S = torch.linalg.svdvals(W)
        return float(share(S / S.sum(), W))
    return mistake


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum()


effective_share = Exercise("effective_share", by_entropy, draw_matrix, [
    (of_spectrum(lambda p, W: entropy(p) / len(p)), "this is the entropy; its exponential counts the directions"),
    (of_spectrum(lambda p, W: entropy(p).exp()), "this is a number of directions: divide by how many there could be"),
    (of_spectrum(lambda p, W: entropy(p).exp() / max(W.shape)),
     "a matrix has min(d_out, d_in) directions at most, not max"),
    (of_spectrum(lambda p, W: entropy(p).exp() / W.shape[0]), "this divides by d_out; the smaller side is the limit"),
    (of_spectrum(lambda p, W: entropy(p).exp() / W.shape[1]), "this divides by d_in; the smaller side is the limit"),
    (of_spectrum(lambda p, W: entropy(p**2 / (p**2).sum()).exp() / len(p)),
     "these are the shares of the squares; Roy and Vetterli take the singular values themselves"),
    (of_spectrum(lambda p, W: (-(p * p.log2()).sum()).exp() / len(p)), "log2 goes with 2 ** entropy, log with exp"),
    (of_spectrum(lambda p, W: entropy(p) / math.log(len(p))),
     "this is the entropy as a share of the largest one; take the exponential first, then the share"),
    (of_spectrum(lambda p, W: 1 / (p**2).sum() / len(p)),
     "this is the participation ratio: another count, without an entropy"),
    (lambda W: int(torch.linalg.matrix_rank(W)) / min(W.shape),
     "this is the rank itself, which counts a direction however small it is"),
    (of_spectrum(lambda p, W: (-entropy(p)).exp() * len(p)),
     "the sign is lost: -sum p log p is above 0, and its exponential counts"),
    (of_spectrum(lambda p, W: 1 / p[0] / len(p)), "this is the sum over the largest one, another count"),
    (of_spectrum(lambda p, W: 1 / p.square().max() * p.square().sum() / len(p)),
     "this is the stable rank; the effective rank is the exponential of an entropy"),
    (of_spectrum(lambda p, W: 2 ** entropy(p) / len(p)), "2 ** entropy goes with log2, exp with log"),
], situations=[(lambda W: W.shape[0] > W.shape[1], "W is taller than wide"),
               (lambda W: W.shape[0] < W.shape[1], "W is wider than tall"),
               (lambda W: W.shape[0] != W.shape[1], "W is not square")])


NAMES = ("encoder.layer.0.attention.self.query", "encoder.layer.11.output.dense", "pooler.dense", "q_proj")


def draw_name(number: int) -> tuple[str]:
    parts = ("encoder", "layer", "attention", "self", "output", "dense", "query", "mlp", "blocks", "pooler")
    return (".".join(str(random.choice((*parts, random.randint(0, 40)))) for _ in range(random.randint(1, 6))),)


def spelled(module: str) -> list[str]:
    return [".".join(("base_model", "model", module, half, "weight")) for half in ("lora_A", "lora_B")]


peft_keys = Exercise("peft_keys", spelled, lambda seed: (NAMES[seed],), [
    (lambda m: [f"{m}.lora_A.weight", f"{m}.lora_B.weight"],
     "PEFT wraps the model twice before it saves: base_model.model. comes first"),
    (lambda m: [f"base_model.{m}.lora_A.weight", f"base_model.{m}.lora_B.weight"],
     "two wrappers, two names: base_model.model., not base_model. alone"),
    (lambda m: [f"base_model.model.{m}.lora_A", f"base_model.model.{m}.lora_B"],
     "in PEFT both factors of a linear are modules: their names end in .weight"),
    (lambda m: [f"base_model.model.{m}.lora_A.default.weight", f"base_model.model.{m}.lora_B.default.weight"],
     "default is the adapter's name in a running model; the file leaves it out"),
    (lambda m: [f"base_model.model.{m}.lora_B.weight", f"base_model.model.{m}.lora_A.weight"], "A comes first, then B"),
    (lambda m: [f"base_model.model.{m.split('.')[-1]}.lora_{x}.weight" for x in "AB"],
     "this keeps only the last part of the module's name, which every layer has"),
    (lambda m: [f"base_model.model.{m}.weight"],
     "this is the module's own weight; its two companions are lora_A and lora_B"),
    (lambda m: [f"model.base_model.{m}.lora_{x}.weight" for x in "AB"],
     "the two wrappers are exchanged: base_model.model."),
    (lambda m: [f"base_model.model.{m}.lora_{x}.weight" for x in "ab"], "A and B are capitals: lora_A, lora_B"),
    (lambda m: f"base_model.model.{m}.lora_A.weight", "two names are wanted, in a list: lora_A's and lora_B's"),
    (lambda m: [f"base_model.model.{m}.lora_A.weight"], "lora_B's name is missing"),
    (lambda m: [f"base_model.model.{m}.weight.lora_{x}" for x in "AB"], ".weight stands at the end, behind lora_A"),
    (lambda m: [f"base_model.model.model.{m}.lora_{x}.weight" for x in "AB"], "model once: base_model.model."),
    (lambda m: [f"base_model.model.{m}.lora_{x}.weight" for x in "AB"] if m.count(".") else
     [f"base_model.{m}.lora_{x}.weight" for x in "AB"], "a module at the top has the same two wrappers"),
], draw=draw_name, situations=[(lambda m: "." not in m, "the module is at the top, without a dot"),
                               (lambda m: "." in m, "the module lies deeper down")])


beyond_the_probe = Prediction("a", {
    "a": "A few thin corrections turn general vectors into vectors for this job, and moving all weights adds little to "
         "that: a strong base, and a moderate shift.",
    "b": "Right on the tickets it has seen is not right on new words for the same thing. The probe can only weigh what "
         "the frozen vectors say; LoRA changes what they say.",
    "c": "The adapters reach every linear of every layer. What they lack is rank, and this job needs little of it.",
    "d": "The base is frozen, the corrections are small, and the training is short. What it knows is all still there: "
         "take the adapter out and you have it back.",
})
