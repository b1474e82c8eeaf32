"""Notebook 10, a 4-bit base: two choices, and the three steps from weights to stored bytes."""

import random
from fractions import Fraction

import torch

from . import Exercise, Prediction

rounding = Prediction("a", {
    "a": "Rounding errors go up as often as down, so they mostly cancel in the sums over hundreds of weights, and the "
         "right word leads by more than what is left of them.",
    "b": "The error of the weights is not the error of the replies. Errors of many weights, as often up as down, "
         "cancel in a sum, and a reply changes only if another word overtakes the right one.",
    "c": "A model is not a program, in which one wrong bit ends everything: each output is a sum over hundreds of "
         "weights, and most of the rounding errors in it cancel.",
    "d": "Rounding can move a few replies either way, but it knows nothing about the task: it cannot make a model "
         "better by more than chance.",
})

loses = Prediction("c", {
    "a": "NF4 is made for weights of one shape, the normal distribution's. A list of 16 numbers cannot be the best for "
         "every shape.",
    "b": "With heavy tails most weights of a block are tiny beside its absmax. That is where NF4's levels are dense: "
         "its lead over even steps grows.",
    "c": "Even weights want even steps. NF4 spends its levels near zero, where these weights are no more frequent than "
         "elsewhere, and leaves wide gaps at the ends.",
    "d": "Trained weights turn out to be nearly normal, block by block, and NF4 is ahead on them.",
})


def blocks_and_levels(seed: int) -> tuple:
    block = (64, 16, 32, 8)[seed % 4]
    levels = (torch.rand(4 + 2 * seed) * 2 - 1).sort().values  # (k,)
    levels[0], levels[-1] = -1, 1
    weight = torch.randn(3 + seed, block) * torch.tensor([1.0, -3.0, 0.2, 7.0, 0.5, 2.0])[:3 + seed, None]
    weight[:, 1] = -3.5 * weight.abs().amax(1)  # the largest magnitude is negative
    return weight.flatten(), levels, block


def draw_blocks(number: int) -> tuple:
    """No weight lies so near the middle between two levels that rounding could decide."""
    while True:
        weight, levels, block = blocks_and_levels(number)
        blocks = weight.double().view(-1, block)  # (b, block)
        x = blocks / blocks.abs().amax(1, keepdim=True)
        first, second = (x[..., None] - levels.double()).abs().sort(-1).values[..., :2].unbind(-1)
        if (second - first).min() > 1e-5:
            return weight, levels, block


def one_by_one(weight, levels, block):
    codes, tops, values = [], [], weight.tolist()
    for start in range(0, len(values), block):
        top = max(max(values[start:start + block]), -min(values[start:start + block]))
        tops.append(top)
        for w in values[start:start + block]:
            distances = [abs(w - level * top) for level in levels.tolist()]
            codes.append(distances.index(min(distances)))
    return torch.tensor(codes), torch.tensor(tops)


def with_tops(tops, find=lambda x, levels: (x[..., None] - levels).abs().argmin(-1)):
    """A wrong answer: other constants for the blocks, or another way to a code."""
    def wrong(weight, levels, block):
        top = tops(weight.view(-1, block))  # (b, 1)
        return find(weight.view(len(top), -1) / top, levels).flatten(), top.flatten()
    return wrong


def absmax(blocks):
    return blocks.abs().amax(1, keepdim=True)


def undivided(weight, levels, block):
    return (weight[:, None] - levels).abs().argmin(-1), absmax(weight.view(-1, block)).flatten()


def strided(weight, levels, block):
    columns = weight.view(block, -1)
    top = columns.abs().amax(0)
    return (columns.div(top)[..., None] - levels).abs().argmin(-1).flatten(), top


def values_of(weight, levels, block):
    codes, top = one_by_one(weight, levels, block)
    return levels[codes], top


def shaped(form):
    """The right codes and absmax in a wrong form."""
    return lambda weight, levels, block: form(*one_by_one(weight, levels, block), block)


def codes_and_tops(result, *arguments):
    """The codes may be of any whole dtype."""
    codes, top = result
    return {"the tensor of codes": codes if codes.is_floating_point() else codes.long(), "the absmax": top}


quantise = Exercise(
    "quantise", one_by_one, blocks_and_levels,
    [(with_tops(lambda blocks: blocks.abs().amax().view(1, 1)),
      "one absmax for the whole tensor: each block has its own, so that one outlier spoils no more than its block"),
     (with_tops(lambda blocks: blocks.amax(1, keepdim=True)),
      "the largest weight is not the largest magnitude: a block's absmax may be that of a negative weight"),
     (with_tops(lambda blocks: blocks.std(1, keepdim=True)),
      "divided by the standard deviation: then weights land outside of [-1, 1], where there are no levels; divide by "
      "the largest magnitude"),
     (undivided, "the levels lie between -1 and 1: divide each weight by its block's absmax before you look for one"),
     (with_tops(absmax, lambda x, levels: torch.searchsorted(levels, x, right=True) - 1),
      "that is the level below the weight; the nearest may be the one above"),
     (with_tops(absmax, lambda x, levels: torch.searchsorted(levels, x)),
      "that is the level above the weight; the nearest may be the one below"),
     (strided, "a block is a run of neighbouring weights: view(-1, block), one block a row"),
     (values_of, "these are the levels themselves: a code is the number of the level, from 0 on"),
     (shaped(lambda codes, top, block: (codes, top[:, None])),
      "absmax has one dimension, (n / block,): here keepdim has left a second"),
     (shaped(lambda codes, top, block: (codes.view(-1, block), top)),
      "the codes are flat, (n,), as the weights are: flatten() at the end"),
     (shaped(lambda codes, top, block: (codes.view(-1, block), top[:, None])),
      "both are flat: codes (n,) and absmax (n / block,); here they have two dimensions"),
     (shaped(lambda codes, top, block: (top, codes)), "the codes come first, then absmax"),
     (shaped(lambda codes, top, block: (codes + 1, top)), "a code is the number of the level, from 0 on"),
     (shaped(lambda codes, top, block: (codes, 1 / top)), "these are the factors 1 / absmax: give absmax itself"),
     (with_tops(lambda blocks: blocks.abs().mean(1, keepdim=True)),
      "divided by the mean magnitude: the largest must come to 1, so divide by the largest magnitude"),
     (with_tops(lambda blocks: blocks.norm(dim=1, keepdim=True)),
      "divided by the block's length: the largest must come to 1, so divide by the largest magnitude"),
     (with_tops(absmax, lambda x, levels: ((x + 1) / 2 * (len(levels) - 1)).round().long()),
      "this takes the levels for evenly spaced: look for the nearest of the levels that you are given"),
     (with_tops(lambda blocks: (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 2),
      "half the range is not the largest magnitude: abs().amax()")],
    observe=codes_and_tops, draw=draw_blocks)


def draw_codes(seed: int) -> tuple:
    return (torch.randint(0, 16, (6 + 8 * seed,)).to(torch.uint8),)


def in_hexadecimal(codes):
    digits = "".join(f"{code:x}" for code in codes.tolist())
    return torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8)


pack = Exercise(
    "pack", in_hexadecimal, draw_codes,
    [(lambda codes: codes[1::2] * 16 + codes[::2],
      "the other way round: the first of two codes goes into the high half"),
     (lambda codes: codes[:len(codes) // 2] * 16 + codes[len(codes) // 2:],
      "two neighbours share a byte: pair codes[0] with codes[1], not with the one half the tensor away"),
     (lambda codes: codes[::2] + codes[1::2], "the two codes lie on top of each other: move the first up by 4 bits"),
     (lambda codes: codes[::2] * 15 + codes[1::2], "a half byte counts from 0 to 15, so it has 16 values: times 16"),
     (lambda codes: (codes[::2] << 8) | codes[1::2],
      "the first code is lost: a byte has 8 bits, so moved up by 8 it falls out at the top; move it by 4"),
     (lambda codes: codes[::2].long() * 16 + codes[1::2],
      "the numbers are right, but in int64 each takes 8 bytes: the result must be uint8"),
     (lambda codes: codes, "that is still one code a byte; the result is half as long"),
     (lambda codes: codes[::2] * 10 + codes[1::2], "decimal digits are no halves of a byte: times 16, not 10"),
     (lambda codes: codes[::2] << 4, "the second code of each pair is missing: it goes into the low half"),
     (lambda codes: (codes[::2] << 4) & codes[1::2], "& keeps the bits that both have: | or + puts them together"),
     (lambda codes: (codes[::2].int() * 16 + codes[1::2]).to(torch.int8),
      "int8 goes from -128 to 127, and a byte of two codes to 255: the result must be uint8"),
     (lambda codes: codes[:-1] * 16 + codes[1:], "the pairs overlap: codes 0 and 1, then 2 and 3"),
     (lambda codes: (codes[::2].int() * 16 + codes[1::2]).float(),
      "a byte is a whole number: the result must be uint8")])


def draw_sizes(seed: int) -> tuple:
    return (4, 3, 2, 8)[seed % 4], (64, 32, 128, 16)[seed % 4], (8, 16, 8, 6)[seed % 4], (256, 64, 128, 32)[seed % 4]


def draw_any_sizes(number: int) -> tuple:
    return (random.randint(1, 8), *(random.choice((8, 16, 32, 64, 128, 256)) for _ in range(3)))


def counted(code_bits, block, absmax_bits, absmax_block):
    """All that is stored of absmax_block blocks, over their weights."""
    weights = block * absmax_block
    return float(Fraction(code_bits * weights + absmax_bits * absmax_block + 32, weights))


bits_a_weight = Exercise(
    "bits_a_weight", counted, draw_sizes,
    [(lambda c, b, a, s: c + a / b, "the scales are missing: one of 32 bits for every absmax_block absmax"),
     (lambda c, b, a, s: c + 32 / b, "that is without double quantisation, with an absmax in 32 bits"),
     (lambda c, b, a, s: c + 32 / b + a / (b * s),
      "the two are swapped: an absmax takes absmax_bits, and the scale of many absmax takes 32"),
     (lambda c, b, a, s: c + a / b + 32 / s,
      "a scale serves absmax_block absmax, and each of those serves block weights: block * absmax_block in all"),
     (lambda c, b, a, s: c + a / b + 4 / (b * s), "the scale is counted in bytes: 4 bytes are 32 bits"),
     (lambda c, b, a, s: (c + a / b + 32 / (b * s)) / 8, "these are bytes; the question is how many bits"),
     (lambda c, b, a, s: c + a + 32,
      "a block's absmax is stored once, so each weight of the block bears a part of it"),
     (lambda c, b, a, s: a / b + 32 / (b * s), "these are the constants alone; the codes take bits too"),
     (lambda c, b, a, s: c + a / b + 32 / b, "a scale of 32 bits for every block: it is shared by absmax_block blocks"),
     (lambda c, b, a, s: c + a / b + 16 / (b * s), "a scale has 32 bits, not 16"),
     (lambda c, b, a, s: float(round(c + a / b + 32 / (b * s), 2)), "do not round: give all digits"),
     (lambda c, b, a, s: float(c + a // b + 32 // (b * s)), "// cuts the parts of a bit off: use /")],
    observe=lambda result, *_: float(result), draw=draw_any_sizes)


def draw_packed(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    block, blocks = (64, 16, 32, 8)[seed % 4], 3 + seed
    levels = (torch.rand(16) * 2 - 1).sort().values
    return (torch.randint(0, 256, (blocks * block // 2,)).to(torch.uint8), torch.rand(blocks) + 0.5, levels, block)


def read_back(packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, block: int) -> torch.Tensor:
    """Digit by digit of the bytes in hexadecimal."""
    digits = bytes(packed.tolist()).hex()
    return torch.stack([levels[int(digit, 16)] * absmax[i // block] for i, digit in enumerate(digits)])


def halves(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (packed >> 4).long(), (packed & 15).long()


def of_codes(codes):
    """The mistake that takes the codes out of the bytes in this way, (high, low) -> (n,)."""
    return lambda packed, absmax, levels, block: (
        levels[codes(*halves(packed))].view(-1, block) * absmax[:, None]).flatten()


def with_values(values):
    """The mistake that makes values of the right levels, (n / block, block), and of absmax."""
    def wrong(packed, absmax, levels, block):
        codes = torch.stack(halves(packed), 1).flatten()
        return values(levels[codes].view(-1, block), absmax).flatten()
    return wrong


restore = Exercise("restore", read_back, draw_packed, [
    (of_codes(lambda high, low: torch.stack((low, high), 1).flatten()),
     "the halves are exchanged: the first of two codes is in the high half"),
    (of_codes(lambda high, low: torch.cat((high, low))),
     "all high halves come first here: the two codes of a byte are neighbours"),
    (with_values(lambda values, absmax: values),
     "the absmax is missing: each level is multiplied by that of its block"),
    (with_values(lambda values, absmax: values / absmax[:, None]),
     "multiply by the absmax: dividing was the way there"),
    (with_values(lambda values, absmax: values * absmax.max()),
     "one absmax for all: each block is multiplied by its own"),
    (with_values(lambda values, absmax: values.flatten().view(len(absmax), -1) * absmax.flip(0)[:, None]),
     "the blocks' absmax stand in the reverse order"),
    (lambda packed, absmax, levels, block: (
        torch.stack(halves(packed), 1).flatten().view(-1, block) * absmax[:, None]).flatten(),
     "these are the codes times the absmax: a code is the number of a level, so look the level up"),
    (lambda packed, absmax, levels, block: read_back(packed, absmax, levels, block).view(-1, block),
     "the weights are flat, (n,): flatten() at the end"),
    (lambda packed, absmax, levels, block: read_back(packed, absmax, levels, block)[::2],
     "only every other weight is there: a byte holds two codes"),
], situations=[(lambda packed, absmax, levels, block: block == 64, "a block has 64 weights"),
               (lambda packed, absmax, levels, block: block != 64, "a block has another size than 64")])
