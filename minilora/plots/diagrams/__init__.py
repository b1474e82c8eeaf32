"""The ideas, drawn: each function gives a figure and the sentence that says what it shows, for `plots.show`."""

from .layers import decoder_block, lora_layer, rank_one_step, svd_arrows
from .memory import kept_for_backward, ring_and_shards, two_slots
from .methods import mixed_batch, quantised_blocks, relatives

__all__ = ["decoder_block", "kept_for_backward", "lora_layer", "mixed_batch", "quantised_blocks", "rank_one_step",
           "relatives", "ring_and_shards", "svd_arrows", "two_slots"]
