"""The LoRA layer: ``y = W x + b + scaling * B (A x)``, around a frozen linear, GPT-2 Conv1D or embedding.

The whole idea is `LoRALayer.plain`, three lines. `LoRAFunction` is the same sum with a backward of its own, so that
training keeps nothing but the layer's input; `LoRALayer.forward` picks between them.

One orientation everywhere: a weight is seen as (out, in), as `dense_weight` returns it. A is (r, in), B is (out, r),
so the update is always ``scaling * B @ A``. An embedding is a linear on one-hot rows: in = rows, out = width.

In the shape comments N stands for all leading dimensions of the input (batch, tokens) together.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LoRAConfig, scaling


def kind_of(module: nn.Module) -> str | None:
    """"linear", "conv1d" (GPT-2's: a linear that stores W transposed), "embedding", or None: cannot be adapted.

    A layer that does something else with its weight does not count: a subclass with a forward of its own, a weight that
    is computed (weight norm, parametrisation), an embedding that rescales its rows in forward (max_norm).
    """
    if quantised(module):
        return "linear"
    weight, forward = module._parameters.get("weight"), type(module).forward
    if weight is None:
        return None
    if forward is nn.Linear.forward:
        return "linear"
    if forward is nn.Embedding.forward and module.max_norm is None:
        return "embedding"
    if type(module).__name__ == "Conv1D" and getattr(module, "nf", None) == weight.shape[-1]:
        return "conv1d"
    return None


def quantised(module: nn.Module) -> bool:
    """A linear that keeps its weight in codes: ``dequantize()`` gives it as (out, in)."""
    return hasattr(module, "dequantize") and hasattr(module, "in_features") and hasattr(module, "out_features")


def dense_weight(base: nn.Module) -> Tensor:
    """The layer's weight as (out, in): a view, or for a quantised layer a fresh tensor."""
    if quantised(base):
        return base.dequantize()
    return base.weight if kind_of(base) == "linear" else base.weight.T


def shape_of(base: nn.Module) -> tuple[int, int]:
    """(out, in)"""
    return (base.out_features, base.in_features) if kind_of(base) == "linear" else tuple(base.weight.T.shape)


def adapter_options(base: nn.Module) -> dict:
    """Device and dtype of an adapter on this layer: the base's, but at least fp32, where small steps are not lost.

    A streamed layer (stream.py) rests on one device and computes on another, which it calls `compute_device`.
    """
    tensors = [*base.parameters(), *base.buffers()]
    floats = [t.dtype for t in tensors if t.is_floating_point()] or [torch.float32]
    return {"device": getattr(base, "compute_device", tensors[0].device), "dtype": torch.promote_types(floats[0], torch.float32)}


def widest(t: Tensor) -> torch.dtype:
    """fp64, or fp32 where the device has no fp64."""
    return torch.float32 if t.device.type == "mps" else torch.float64


class LoRAFunction(torch.autograd.Function):
    """``base(x) + scaling * drop(x) A^T B^T`` for a frozen base: saves x, A and B, and nothing else.

    Adapters on the same input share the one saved x; x A^T (N, r) is cheap to compute again in backward, and so is a
    dropout mask, from its seed. Adapters may be fp32 on a 16-bit base: they are cast down, never x up.
    """

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, base: nn.Module, scaling: float, dropout: float) -> Tensor:
        ctx.scaling, ctx.dropout = scaling, dropout
        # drawn from the global generator, so that checkpointing, which restores it, draws the same mask again
        ctx.seed = int(torch.randint(2**62, ())) if dropout else 0
        ctx.dequantize = base.dequantize if quantised(base) else None
        ctx.save_for_backward(x, A, B, None if quantised(base) else dense_weight(base))
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        seen = rows * keep_mask(rows, dropout, ctx.seed) if dropout else rows
        inner = seen @ A.to(x.dtype).T  # (N, r), before base(x), which then finds x in the cache
        y = base(x)  # (..., out), by the base's own kernel: with B = 0 the result is the base's, bit for bit
        y.view(-1, y.shape[-1]).addmm_(inner.to(y.dtype), B.to(y.dtype).T, alpha=scaling)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, A, B, W = ctx.saved_tensors
        dx = dA = dB = None
        with torch.autocast(x.device.type, enabled=False):
            grad = grad.reshape(-1, grad.shape[-1])  # (N, out)
            rows = x.reshape(-1, x.shape[-1])  # (N, in)
            mask = keep_mask(rows, ctx.dropout, ctx.seed) if ctx.dropout else None
            seen = (rows if mask is None else rows * mask).to(grad.dtype)
            a, b = A.to(grad.dtype), B.to(grad.dtype)
            # a thin product costs the time to read x or grad: the two that read x follow each other
            inner = (grad @ b).mul_(ctx.scaling)  # (N, r), the gradient of x A^T
            if ctx.needs_input_grad[1]:
                dA = (inner.T @ seen).to(A.dtype)  # (r, in)
            if ctx.needs_input_grad[2]:
                dB = ((seen @ a.T).mul_(ctx.scaling).T @ grad).T.to(B.dtype)  # (out, r); grad^T (x A^T) takes longer
            if ctx.needs_input_grad[0]:
                W = ctx.dequantize() if W is None else W
                dx = grad @ W.to(grad.dtype)  # (N, in)
                dx = dx.addmm_(inner, a) if mask is None else dx.addcmul_(inner @ a, mask.to(dx.dtype))
                dx = dx.view(x.shape).to(x.dtype)
        return dx, dA, dB, None, None, None


class Wrapper(nn.Module):
    """A module around a `base_layer`. Code that asks it for a weight, bias or in_features finds the base's."""

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(super().__getattr__("base_layer"), name)


class LoRALayer(Wrapper):
    """A frozen layer and its trainable low-rank update (Hu et al. 2021, section 4.1).

    `base_layer` is an nn.Linear, GPT-2's Conv1D, an nn.Embedding, or a quantised linear; for the rest see `LoRAConfig`.

    Attributes:
        lora_A, lora_B: (r, in) and (out, r), at least fp32. One starts at zero, so the layer starts as its base.
        lora_magnitude: (out,), with DoRA only: the trained length of each output row.
        scaling: what multiplies ``B @ A``, from alpha and rank.
    """

    def __init__(self, base_layer: nn.Module, rank: int = 8, alpha: float = 16, dropout: float = 0.0,
                 use_rslora: bool = False, use_dora: bool = False, init: str = "kaiming"):
        super().__init__()
        LoRAConfig(rank, alpha, (".",), dropout, use_rslora, use_dora, init)  # only to check the values
        self.kind = kind_of(base_layer)
        if self.kind is None:
            raise ValueError(f"a {type(base_layer).__name__} cannot be adapted: expected Linear, Conv1D or Embedding")
        self.base_layer = base_layer
        out, inp = shape_of(base_layer)
        self.rank, self.alpha, self.scaling = rank, alpha, scaling(rank, alpha, use_rslora)
        self.dropout, self.use_rslora, self.use_dora, self.init = dropout, use_rslora, use_dora, init
        self.unmerged = ()  # while merged: the base's own weight, and the share of the update that rounding took
        self.lora_A = nn.Parameter(torch.zeros(rank, inp, **adapter_options(base_layer)))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, **adapter_options(base_layer)))
        if init == "pissa":
            self.start_from_singular_part()
        elif self.kind == "embedding":
            nn.init.normal_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in)), as in the authors' code
        if use_dora:
            self.lora_magnitude = nn.Parameter(self.row_norm())

    def start_from_singular_part(self) -> None:
        """PiSSA (2404.02948, eq. 2-3): A, B = the top-r singular part of W; what they start from is subtracted.

        The paper moves the rest of W into the base. Here the base stays whole and the update is B A - B0 A0, less its
        start: the same function, and the base can still be shared, fingerprinted and given back.
        """
        U, S, Vh = torch.linalg.svd(dense_weight(self.base_layer).detach().to(self.lora_A.dtype), full_matrices=False)
        root = (S[:self.rank] / self.scaling).sqrt()  # (r,)
        self.lora_A.data.copy_(root[:, None] * Vh[:self.rank])
        self.lora_B.data.copy_(U[:, :self.rank] * root)
        self.register_buffer("start_A", self.lora_A.detach().clone())
        self.register_buffer("start_B", self.lora_B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base_layer(x)
        frozen = not any(p is not None and p.requires_grad for p in self.base_layer._parameters.values())
        plain = self.kind == "embedding" or self.use_dora or self.init == "pissa"
        if plain or not frozen or torch.compiler.is_compiling():  # the compiler fuses the plain form by itself
            return self.plain(x)
        dropout = self.dropout if self.training else 0.0
        return LoRAFunction.apply(x, self.lora_A, self.lora_B, self.base_layer, self.scaling, dropout)

    def plain(self, x: Tensor) -> Tensor:
        """The definition, left to autograd."""
        y = self.base_layer(x)  # (..., out)
        if self.kind != "embedding":
            x = F.dropout(x.to(y.dtype), self.dropout, self.training)  # (..., in)
        update = self.product(x, self.lora_A.to(y.dtype), self.lora_B.to(y.dtype))  # (..., out)
        if self.init == "pissa":
            update = update - self.product(x, self.start_A.to(y.dtype), self.start_B.to(y.dtype))
        update = self.scaling * update
        if not self.use_dora:
            return y + update
        # DoRA, eq. 5: c (W + sBA) x + b, arranged so that c = 1 gives y exactly
        c, bias = self.row_scale(), getattr(self.base_layer, "bias", None)  # (out,)
        return y + (c - 1).to(y.dtype) * (y if bias is None else y - bias.to(y.dtype)) + c.to(y.dtype) * update

    def product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """``x A^T B^T``, (..., out); for an embedding x holds row numbers."""
        return (F.embedding(x, A.T, self.base_layer.padding_idx) if self.kind == "embedding" else x @ A.T) @ B.T

    def row_norm(self) -> Tensor:
        """||W + scaling B A|| of each output row, (out,), without forming the sum (in x out).

        ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>, row by row. DoRA holds it constant in backward (section 4.3).
        """
        with torch.no_grad(), torch.autocast(self.lora_A.device.type, enabled=False):
            A, B, s = self.lora_A, self.lora_B, self.scaling
            W = dense_weight(self.base_layer)  # (out, in)
            cross = (W.to(A) @ A.T * B).sum(1)  # (out,)
            square = ((B @ (A @ A.T)) * B).sum(1)  # (out,)
            return (self.weight_square(W) + 2 * s * cross + s * s * square).clamp_min(0).sqrt()

    def weight_square(self, W: Tensor) -> Tensor:
        """||W||^2 of each output row, (out,), computed once for as long as W is not changed (in place through ``.data``
        is the one change that goes unseen)."""
        if quantised(self.base_layer) or torch.compiler.is_compiling():
            return W.to(self.lora_A).square().sum(1)
        state = (W.untyped_storage()._cdata, self.base_layer.weight._version, W.dtype)
        if getattr(self, "_square", (None,))[0] != state:
            self._square = state, W.to(self.lora_A).square().sum(1)
        return self._square[1]

    def row_scale(self) -> Tensor:
        """magnitude / norm, (out,); 1 where the norm is zero."""
        norm = self.row_norm()
        return torch.where(norm > 0, self.lora_magnitude / norm.masked_fill(norm == 0, 1), 1)

    # Merging

    @property
    def merged(self) -> bool:
        return bool(self.unmerged)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W with the update added, (out, in), in fp64 where there is fp64: nothing is rounded yet."""
        wide = widest(self.lora_A)
        update = self.lora_B.to(wide) @ self.lora_A.to(wide)  # (out, in)
        if self.init == "pissa":
            update -= self.start_B.to(wide) @ self.start_A.to(wide)
        W = dense_weight(self.base_layer).to(wide) + self.scaling * update
        if self.use_dora:  # a row that forward leaves alone stays as it is; the others get the norm in full precision
            W.mul_(torch.where(self.row_scale() == 1, 1, self.lora_magnitude.to(wide) / W.norm(dim=1))[:, None])
        return W

    @torch.no_grad()
    def merge(self) -> float:
        """Put W + update in the place of W, rounded once; return the share of the update lost to that rounding.

        The share is ||update that arrived - update|| / ||update||: 0 when the base's precision kept it all, about 1
        when it swallowed it. W itself is kept, so `unmerge` is exact, and a layer tied to it is not touched.

        Raises:
            ValueError: the base is quantised or streamed, or the sum does not fit its dtype.
        """
        if self.merged:
            return self.unmerged[1]
        if hasattr(self.base_layer, "compute_device"):
            raise ValueError("cannot merge into a streamed weight: it is read-only and only visits the device. Keep the "
                             "adapter beside it, or load the base whole")
        if quantised(self.base_layer):
            raise ValueError("cannot merge into a quantised weight: its levels are too coarse for the update. Keep the "
                             "adapter beside it, or dequantise the base first")
        W, wide = dense_weight(self.base_layer), self.merged_weight()
        rounded = wide.to(W.dtype)  # (out, in)
        if not torch.isfinite(rounded).all():
            raise ValueError(f"the merged weight does not fit {W.dtype}: it holds infinite or NaN values")
        lost, update = (rounded.to(wide.dtype) - wide).norm(), (wide - W.to(wide.dtype)).norm()
        self.unmerged = self.base_layer.weight, float(lost / update) if update > 0 else 0.0
        stored = rounded if self.kind == "linear" else rounded.T.contiguous()
        self.base_layer.weight = nn.Parameter(stored, requires_grad=False)
        return self.unmerged[1]

    def unmerge(self) -> None:
        """Give the base its own weight back: the same tensor, so the same bits."""
        if self.merged:
            self.base_layer.weight, self.unmerged = self.unmerged[0], ()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.merged:  # model.to(...) moves the kept weight too, in place: it may be tied to another layer's
            self.unmerged[0].data = fn(self.unmerged[0].data)
        return self

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, dora={self.use_dora}, init={self.init}"


def keep_mask(like: Tensor, dropout: float, seed: int) -> Tensor:
    """Dropout's mask, 0 or 1 / (1 - dropout), of `like`'s shape; the same for the same seed.

    It is drawn twice, in forward and in backward, so it has to be cheap: 16 random bits an entry, cut out of 64-bit
    draws, cost a quarter of what ``bernoulli_`` does, and meet the share to 1 / 2^17.
    """
    generator, count = torch.Generator(like.device).manual_seed(seed), like.numel()
    draws = torch.empty((count + 3) // 4, dtype=torch.int64, device=like.device)
    draws.random_(-2**63, None, generator=generator)  # every 64-bit number is as likely
    bits = draws.view(torch.int16)[:count].view(like.shape)  # -2^15 to 2^15 - 1
    return torch.ge(bits, round(dropout * 2**16) - 2**15, out=torch.empty_like(like)).mul_(1 / (1 - dropout))
