"""Wrong answers to the exercises of notebook 10, as learners may write them, and a part of what each must be told."""

import torch


def whole_tensor(weight, levels, block):
    top = weight.abs().max()
    return ((weight / top)[:, None] - levels[None]).abs().min(1).indices, top[None]


def signed_max(weight, levels, block):
    top = weight.reshape(-1, block).max(dim=1).values
    scaled = weight.reshape(-1, block) / top[:, None]
    return torch.argmin((scaled.reshape(-1, 1) - levels).abs(), dim=1), top


def by_std(weight, levels, block):
    rows = weight.reshape(-1, block)
    return ((rows / rows.std(1)[:, None]).reshape(-1, 1) - levels).abs().argmin(1), rows.std(1)


def not_divided(weight, levels, block):
    codes = torch.stack([(w - levels).abs().argmin() for w in weight])
    return codes, weight.abs().reshape(-1, block).max(1).values


def level_below(weight, levels, block):
    rows = weight.reshape(-1, block)
    top = rows.abs().max(1, keepdim=True).values
    return torch.bucketize(rows / top, levels, right=True).sub(1).reshape(-1), top.squeeze(1)


def level_above(weight, levels, block):
    rows = weight.reshape(-1, block)
    top = rows.abs().max(1, keepdim=True).values
    return torch.bucketize(rows / top, levels).flatten(), top.flatten()


def every_so_many(weight, levels, block):
    columns = weight.reshape(block, -1)
    top = columns.abs().max(0).values
    return ((columns / top).reshape(-1, 1) - levels).abs().argmin(1), top


def the_levels(weight, levels, block):
    rows = weight.reshape(-1, block)
    top = rows.abs().max(1).values
    return levels[((rows / top[:, None]).reshape(-1, 1) - levels).abs().argmin(1)], top


def low_first(codes):
    return codes[0::2] | (codes[1::2] << 4)


def two_halves(codes):
    first, second = codes.chunk(2)
    return (first << 4) | second


def no_shift(codes):
    return codes.view(-1, 2).sum(1).to(torch.uint8)


def fifteen(codes):
    return torch.tensor([15 * a + b for a, b in codes.view(-1, 2).tolist()], dtype=torch.uint8)


def eight(codes):
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] << 8) + pairs[:, 1]


def wide(codes):
    pairs = codes.view(-1, 2).long()
    return pairs[:, 0] * 16 + pairs[:, 1]


def one_a_byte(codes):
    return codes.clone()


def first_level_only(code_bits, block, absmax_bits, absmax_block):
    return (code_bits * block + absmax_bits) / block


def single(code_bits, block, absmax_bits, absmax_block):
    return (code_bits * block + 32) / block


def swapped(code_bits, block, absmax_bits, absmax_block):
    return code_bits + 32 / block + absmax_bits / block / absmax_block


def one_block_per_scale(code_bits, block, absmax_bits, absmax_block):
    return code_bits + absmax_bits / block + 32 / absmax_block


def scale_in_bytes(code_bits, block, absmax_bits, absmax_block):
    return code_bits + absmax_bits / block + 4 / block / absmax_block


def in_bytes(code_bits, block, absmax_bits, absmax_block):
    return code_bits / 8 + absmax_bits / 8 / block + 4 / block / absmax_block


def not_shared(code_bits, block, absmax_bits, absmax_block):
    return code_bits + absmax_bits + 32


def low_half_first(packed, absmax, levels, block):
    codes = torch.stack((packed & 15, packed >> 4), dim=1).flatten()
    return (levels[codes.long()].view(-1, block) * absmax[:, None]).flatten()


def joined(packed, absmax, levels, block):
    codes = torch.cat((packed >> 4, packed & 15))
    return (levels[codes.int()].view(-1, block) * absmax[:, None]).flatten()


def no_constants(packed, absmax, levels, block):
    codes = torch.stack((packed // 16, packed % 16), dim=-1).view(-1)
    return levels[codes.long()]


def divided(packed, absmax, levels, block):
    return no_constants(packed, absmax, levels, block) / absmax.repeat_interleave(block)


def largest_of_all(packed, absmax, levels, block):
    return absmax.amax() * no_constants(packed, absmax, levels, block)


def no_lookup(packed, absmax, levels, block):
    codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1, block)
    return (codes * absmax[:, None]).reshape(-1)


def always_64(packed, absmax, levels, block):
    return no_constants(packed, absmax, levels, block) * absmax.repeat_interleave(64)


WRONG = {
    "restore": [
        (low_half_first, "in the high half"), (joined, "are neighbours"), (no_constants, "the absmax is missing"),
        (divided, "multiply by the absmax"), (largest_of_all, "by its own"), (no_lookup, "look the level up"),
        (always_64, "another size than 64")],
    "quantise": [
        (whole_tensor, "the whole tensor"), (signed_max, "not the largest magnitude"), (by_std, "standard deviation"),
        (not_divided, "divide each weight"), (level_below, "the level below"), (level_above, "the level above"),
        (every_so_many, "neighbouring weights"), (the_levels, "the levels themselves")],
    "pack": [
        (low_first, "the high half"), (two_halves, "two neighbours"), (no_shift, "on top of each other"),
        (fifteen, "times 16"), (eight, "falls out at the top"), (wide, "must be uint8"), (one_a_byte, "half as long")],
    "bits_a_weight": [
        (first_level_only, "the scales are missing"), (single, "without double quantisation"), (swapped, "swapped"),
        (one_block_per_scale, "a scale serves"), (scale_in_bytes, "counted in bytes"), (in_bytes, "these are bytes"),
        (not_shared, "bears a part of it")],
}
