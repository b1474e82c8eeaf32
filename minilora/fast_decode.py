"""Generation with fewer and cheaper calls a token, which is what a token costs where weights are small.

q, k and v are one product and so are gate and up, on copies of the weights that lie transposed, the layout that is
fastest for few rows; a norm is four calls. Only for inference in fp32: no gradient, other roundings.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rotary import rotate

LARGEST = 2**20  # weights of a linear; above, its product costs so much that the calls do not matter


@contextmanager
def fast_decode(decoder: nn.Module, max_new: int) -> Iterator[None]:
    """Within, the blocks of a `llama.Decoder` compute fast, if `max_new` tokens make up for the copying of weights.

    The copies live no longer than the `with`, so they cannot go stale. Linears that are adapted or hooked stay as they
    are. So does a block with a hook before it, which may bring its weights (stream.py's does).
    """
    changed = []
    try:
        if pays(decoder, max_new):
            for block in decoder.layers:
                if not block._forward_pre_hooks:
                    for module, forward in fast_forwards(block):
                        if "forward" not in vars(module):  # else it is somebody's already
                            module.forward = forward
                            changed.append(module)
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


def pays(decoder: nn.Module, max_new: int) -> bool:
    """Whether the calls saved in `max_new` tokens cost more than copying the weights: measured, the copying takes as
    long as 2 tokens save at 0.3 million weights a block, 4 at 0.8, 18 at 3.2 (tests/bench/generate_cost.py).

    Twice that and 8 more are asked for, since a stop token may come before `max_new`.
    """
    if max_new < 8:
        return False
    sizes = [p.numel() for p in decoder.layers[0].parameters()]
    return max(sizes) <= LARGEST and max_new >= 8 + sum(sizes) / 2**16


class Joined:
    """Linears that share their input, as one product: x @ (in, sum of out)."""

    def __init__(self, *linears: nn.Linear):
        self.weight = torch.cat([p.weight.T for p in linears], dim=1)
        self.bias = torch.cat([p.bias for p in linears]) if linears[0].bias is not None else None

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def join(*linears: nn.Module) -> Joined | None:
    """The linears as one, unless one of them is adapted, quantised or hooked."""
    plain = all(type(p) is nn.Linear and not p._forward_hooks and not p._forward_pre_hooks for p in linears)
    return Joined(*linears) if plain else None


def fast_forwards(block: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    """A block's modules, each with the forward to put in place of its own."""
    yield block.self_attn, fast_attention(block.self_attn)
    yield block.mlp, fast_mlp(block.mlp)
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        if norm.weight.dtype == torch.float32:
            yield norm, fast_norm(norm.weight, norm.eps)


def fast_attention(attention: nn.Module) -> Callable:
    q_proj, k_proj, v_proj, o_proj = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    qkv, out = join(q_proj, k_proj, v_proj), join(o_proj) or o_proj
    H, K = attention.heads, attention.kv_heads

    def heads(x: Tensor) -> Tensor:  # (B, T, any number of heads x D) -> (B, heads, T, D)
        return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # einops would cost a tenth of a layer's calls

    def forward(x: Tensor, cos: Tensor, sin: Tensor, *where) -> Tensor:
        if qkv is None:
            q, k, v = heads(q_proj(x)), heads(k_proj(x)), heads(v_proj(x))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        else:
            qk, v = heads(qkv(x)).split((H + K, K), dim=1)
            q, k = rotate(qk, cos, sin).split((H, K), dim=1)
        return out(attention.attend(q, k, v, *where).transpose(1, 2).flatten(2))  # (B, T, H D) -> (B, T, C)

    return forward


def fast_mlp(mlp: nn.Module) -> Callable:
    gate_up, down = join(mlp.gate_proj, mlp.up_proj), join(mlp.down_proj) or mlp.down_proj

    def forward(x: Tensor) -> Tensor:
        gate, up = (mlp.gate_proj(x), mlp.up_proj(x)) if gate_up is None else gate_up(x).chunk(2, dim=-1)  # (B, T, F)
        return down(F.silu(gate) * up)

    return forward


def fast_norm(weight: Tensor, eps: float) -> Callable:
    """RMSNorm as x / sqrt(sum of squares + C eps) * sqrt(C) weight: a third of the calls."""
    size = weight.numel()
    scale, least = weight * math.sqrt(size), weight.new_tensor(math.sqrt(size * eps))
    return lambda x: x.div(torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(least)).mul_(scale)
