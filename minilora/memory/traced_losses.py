"""TRL's loss for a trace: what `losses.chunked` plays, as torch runs it, without TRL or a GPU.

TRL's own kernels are Triton's. On fake tensors only what they allocate matters, so the function here makes TRL's
tensors (trl 1.16, kernels/chunked_logprob.py, `ChunkedLogProbFunction`) and leaves them empty. It computes no loss.
"""

import torch
from torch import Tensor, nn

from .losses import TRL_TOKENS, TRL_WORDS


class LogProbs(torch.autograd.Function):
    """(rows, C), (V, C), (rows,) -> (rows,)"""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        rows, autocast = hidden.shape[0], torch.is_autocast_enabled(hidden.device.type)
        ctx.dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype
        sums = [hidden.new_zeros(rows, dtype=torch.float32) for _ in range(7)]
        tile = hidden.new_empty(min(rows, TRL_TOKENS), TRL_WORDS, dtype=ctx.dtype)
        parts = hidden[:TRL_TOKENS].to(ctx.dtype), weight[:TRL_WORDS].to(ctx.dtype)
        del parts
        log_sum, out, entropy = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(3))
        ctx.save_for_backward(hidden, weight, targets, log_sum, entropy)
        del sums, tile
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, log_sum, entropy = ctx.saved_tensors
        dx, dw = (torch.zeros_like(t, dtype=torch.float32) if need else None
                  for t, need in zip((hidden, weight), ctx.needs_input_grad))
        tile = hidden.new_empty(min(hidden.shape[0], TRL_TOKENS), TRL_WORDS, dtype=ctx.dtype)
        parts = hidden[:TRL_TOKENS].to(ctx.dtype), weight[:TRL_WORDS].to(ctx.dtype)
        del parts
        dx = None if dx is None else dx.to(hidden.dtype)
        return dx, None if dw is None else dw.to(weight.dtype), None


class Rows(torch.autograd.Function):
    """``x[mask]`` where every place is chosen: fake tensors do not know how many a mask chooses."""

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.shape = x.shape
        places = x.new_empty(2, mask.numel(), dtype=torch.int64)
        return x.new_empty(mask.numel(), x.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        return grad.new_empty(ctx.shape), None


def with_fused_head(model: nn.Module) -> None:
    """Make ``model(input_ids=..., labels=...)`` return `SFTTrainer`'s loss, computed with its fused head.

    Args:
        model: a causal language model of transformers', plain or PEFT's.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def forward(input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None, **_) -> Tensor:
        out = base.base_model(input_ids=input_ids, attention_mask=attention_mask)
        hidden, labels = out.last_hidden_state[:, :-1], labels[:, 1:]
        mask = labels != -100
        rows = Rows.apply(hidden, mask)
        targets = labels.new_empty(mask.numel())
        log_probs = LogProbs.apply(rows, base.get_output_embeddings().weight, targets)
        return -(log_probs * 1).sum()

    base.forward = forward
