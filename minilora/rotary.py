"""Rotary positions (Su et al. 2021, arXiv 2104.09864), with Llama-3's stretched frequencies (Dubey et al. 2024,
2407.21783). T is tokens, D the head size."""

import math

import torch
from torch import Tensor

from .llama_config import LlamaConfig


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Radians per position of each pair of head dimensions, (D/2,), in fp32."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim  # (D/2,)
    freq = 1.0 / config.rope_theta ** half
    if not config.rope_scaling:
        return freq
    s = config.rope_scaling
    factor, old = s["factor"], s["original_max_position_embeddings"]
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    # turns made over the old context: few turns are slowed by `factor`, many are kept, between them a blend
    turns = old * freq / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * freq / factor + blend * freq


def rotary_tables(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, each (context, D); the sine's first half negated, for `rotate`."""
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), rope_frequencies(config))  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_j), j = i + D/2, by its angle a, to (x_i cos a - x_j sin a, x_j cos a + x_i sin a).

    x (B, H, T, D); cos, sin (T, D) from `rotary_tables`.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin
