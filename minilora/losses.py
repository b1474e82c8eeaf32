"""Losses for `train`: each is called as loss(model, ids, targets, counted) and gives a scalar."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # a target that does not count, as torch's cross_entropy has it
LOSS_CHUNK = 512  # tokens whose logits stand at once; the planner's (memory/decoders/decoder.py) is the same


def masked_cross_entropy(model: nn.Module, ids: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the targets that are not -100. ids, targets (B, T) -> scalar.

    With `counted`, the sum divided by that: for rows that are a part of a batch, their part of its mean.
    """
    out = model(ids)  # logits (B, T, V), or an object that has them, as Hugging Face's models return
    logits, targets = getattr(out, "logits", out).flatten(0, 1), targets.flatten()  # (B T, V), (B T,)
    if counted is None:
        return F.cross_entropy(logits, targets, ignore_index=IGNORE)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / counted


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of head(y), summed and divided by `counted`, `LOSS_CHUNK` tokens at a time, so that the logits of
    all tokens, (B T, V), never stand at once.

    The gradients of y and of what trains in the head are made in forward, while the head is there: neither it nor any
    logits are needed in backward. y (N, C), targets (N,); `wanted`: whether gradients are; `trained`: the head's
    parameters that train.
    """

    @staticmethod
    def forward(ctx, y: Tensor, targets: Tensor, counted: Tensor, head: nn.Module, wanted: bool,
                *trained: Tensor) -> Tensor:
        dy = torch.empty_like(y) if wanted and ctx.needs_input_grad[0] else None  # (N, C)
        sums = [torch.zeros_like(p) for p in trained]
        loss = torch.zeros((), device=y.device, dtype=torch.promote_types(y.dtype, torch.float32))
        for start in range(0, len(y), LOSS_CHUNK):
            piece = slice(start, start + LOSS_CHUNK)
            rows = y[piece].detach().requires_grad_(dy is not None)  # (n, C)
            with torch.set_grad_enabled(dy is not None or bool(trained)):
                part = F.cross_entropy(head(rows), targets[piece], ignore_index=IGNORE, reduction="sum") / counted
            loss += part.detach()
            leaves = [rows] * (dy is not None) + list(trained)
            grads = list(torch.autograd.grad(part, leaves)) if leaves else []
            if dy is not None:
                dy[piece] = grads.pop(0)
            for total, grad in zip(sums, grads):
                total += grad
        ctx.save_for_backward(dy, *sums)
        return loss.to(y.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        dy, *sums = ctx.saved_tensors
        return None if dy is None else dy * grad, None, None, None, None, *(total * grad for total in sums)
