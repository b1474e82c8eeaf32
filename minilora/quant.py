"""Four bits a weight: NF4, double quantisation, and the frozen linear that keeps its weight so (QLoRA, 2305.14314).

A weight is cut into blocks of 64 in row-major order. A block keeps the largest magnitude in it (absmax) and, for each
weight, which of 16 levels between -1 and 1 is nearest to weight / absmax. The codes go two to a byte, the first in the
high half. Double quantisation stores the absmax themselves in 8 bits. Bits a weight, block by block:

    4 (code) + 32/64 (absmax in fp32)                     = 4.5
    4 (code) + 8/64 (absmax in fp8) + 32/(64 * 256) (scale) = 4.126953125, and once a tensor the absmax's mean, 4 bytes
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .bases import dense_weight, kind_of, quantised, shape_of
from .config import ALL_LINEAR, LoRAConfig
from .injection import replace
from .layers import LoRALayer, no_view
from .planning import choose, inside_torch, tied

BLOCK, ABSMAX_BLOCK = 64, 256  # weights that share an absmax; absmax that share a scale
FP8 = torch.float8_e4m3fn


def nf4_levels(bits: int = 4) -> tuple[float, ...]:
    """The levels of the NormalFloat, rising from -1 to 1: 16 in NF4, or 2^bits (section 3 and appendix E).

    They are quantiles of the standard normal distribution, so that normal weights use each about equally often: of 8
    evenly spaced probabilities for the positive half, of 7 for the negative, and zero itself, which must be exact. The
    outermost probability keeps away from 1, where the quantile is infinite; its quantile is then scaled to 1.

    Raises:
        ValueError: bits below 2: one bit has no negative level.
    """
    if type(bits) is not int or bits < 2:
        raise ValueError(f"bits must be an integer from 2 on, got {bits!r}")
    count = 2**bits  # 16
    outermost = 1 - (1 / (2 * count) + 1 / (2 * count - 2)) / 2  # half a step within, averaged over 16 and 15 steps

    def half(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(0.5, outermost, count + 1, dtype=torch.float64))[1:]  # (count,)

    levels = torch.cat((-half(count // 2 - 1).flip(0), torch.zeros(1, dtype=torch.float64), half(count // 2)))
    # the negative half's outermost quantile is the positive's: both ends are scaled to 1
    return tuple((levels / levels[-1]).float().tolist())


# kind -> its 16 levels. INT4's are evenly spaced: -8 ... 7, of which absmax takes -7 and 7
LEVELS = {"nf4": nf4_levels(), "int4": tuple(i / 7 for i in range(-8, 8))}


@dataclass(frozen=True)
class QuantisedTensor:
    """A tensor in 4 bits. With n weights (padded with zeros to whole blocks) and b = n / 64:

    Attributes:
        codes: (n / 2,) uint8, two codes a byte.
        absmax: (b,) fp8 (e4m3), or fp32 without double quantisation.
        absmax_scale: (b / 256, rounded up) fp32, or None; absmax = absmax * its scale + mean.
        absmax_mean: (1,) fp32, or None.
        shape: of the tensor.
        kind: "nf4" or "int4".
    """

    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_mean: Tensor | None
    shape: tuple[int, ...]
    kind: str = "nf4"

    @property
    def nbytes(self) -> int:
        """Bytes stored, every constant counted; the levels are the same for all tensors and stored with none."""
        parts = (self.codes, self.absmax, self.absmax_scale, self.absmax_mean)
        return sum(t.nbytes for t in parts if t is not None)

    @property
    def bits(self) -> float:
        """Bits stored a weight."""
        return 8 * self.nbytes / math.prod(self.shape)


@torch.no_grad()
def quantise(weight: Tensor, kind: str = "nf4", double: bool = True) -> QuantisedTensor:
    """Store `weight`, of any shape and floating-point dtype, in 4 bits (sections 2 and 3).

    A size that 64 does not divide is padded with zeros, at up to 32 bytes more. Each code is the nearest to the weight
    over the absmax as it will be read back, so that most of the error of double quantisation is taken out again.

    Raises:
        ValueError: no such kind, not a floating-point tensor, empty, or holding NaN or infinite values.
    """
    if kind not in LEVELS:
        raise ValueError(f"kind must be one of {', '.join(LEVELS)}, got {kind!r}")
    if not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"expected floating-point weights, got {weight.dtype} of shape {tuple(weight.shape)}")
    pieces = in_blocks(weight.detach().reshape(-1), BLOCK).split(piece_size(weight))  # each (p, 64)
    absmax = torch.cat([piece.abs().amax(1) for piece in pieces]).float()  # (b,)
    if not absmax.sum().isfinite():
        raise ValueError("the weights hold NaN, infinite or overflowing values, which have no place in a block")
    stored = quantise_absmax(absmax) if double else (absmax, None, None)
    absmax = dequantise_absmax(*stored)
    levels = torch.tensor(LEVELS[kind], device=weight.device)
    middle = (levels[1:] + levels[:-1]) / 2  # (15,): between two of them one level is the nearest
    codes = []
    for piece, top in zip(pieces, absmax.split(len(pieces[0]))):
        # a block of zeros may divide 0 by 0: the code is then 15, and 15's level times an absmax of 0 is 0 again
        code = torch.bucketize(piece.float() / top[:, None], middle, out_int32=True)  # (p, 64)
        codes.append((code[:, ::2] * 16 + code[:, 1::2]).to(torch.uint8).flatten())  # (32 p,)
    return QuantisedTensor(torch.cat(codes), *stored, tuple(weight.shape), kind)


@torch.no_grad()
def dequantise(q: QuantisedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor that the codes stand for, level * absmax, computed in fp32 and rounded once to `dtype`.

    Two weights at a time: a byte is looked up in a table of all 256 pairs of levels, each pair moved as one 8-byte
    number. It goes piece by piece, so that no temporary is as large as the tensor and on a CPU all stay in its cache.
    """
    table = pair_table(q.kind, q.codes)
    absmax = dequantise_absmax(q.absmax, q.absmax_scale, q.absmax_mean)[:, None]  # (b, 1)
    out = torch.empty(len(absmax), BLOCK, dtype=dtype, device=q.codes.device)  # (b, 64)
    size = piece_size(q.codes)
    for codes, top, piece in zip(q.codes.split(size * BLOCK // 2), absmax.split(size), out.split(size)):
        pairs = table.index_select(0, codes.int())  # (32 p,)
        torch.mul(pairs.view(torch.float32).view(-1, BLOCK), top, out=piece)  # (p, 64)
    return out.view(-1)[:math.prod(q.shape)].view(q.shape)


def quantise_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation (section 3): (b,) fp32 -> (b,) fp8, (b / 256,) fp32 scales, (1,) fp32 mean.

    absmax are positive, so their mean is taken off first and fp8's sign is put to use. One mean serves the tensor; a
    scale serves 256 absmax and maps the one farthest from the mean to fp8's largest number.
    """
    mean = absmax.mean(0, keepdim=True)
    centred = in_blocks(absmax - mean, ABSMAX_BLOCK)  # (b / 256, 256)
    scale = (centred.abs().amax(1) / torch.finfo(FP8).max).clamp_min(torch.finfo(torch.float32).tiny)
    return (centred / scale[:, None]).view(-1)[:len(absmax)].to(FP8), scale, mean


def dequantise_absmax(absmax: Tensor, scale: Tensor | None, mean: Tensor | None) -> Tensor:
    """The absmax of every block, (b,) fp32, from what is stored of them."""
    if scale is None:
        return absmax
    wide = in_blocks(absmax.float(), ABSMAX_BLOCK)  # (b / 256, 256)
    return wide.mul_(scale[:, None]).add_(mean).view(-1)[:len(absmax)]


def in_blocks(flat: Tensor, size: int) -> Tensor:
    """(n,) -> (n / size, size), the last row filled up with zeros."""
    short = -len(flat) % size
    return rearrange(F.pad(flat, (0, short)) if short else flat, "(block size) -> block size", size=size)


def unpack(codes: Tensor) -> Tensor:
    """Two codes a byte, (n / 2,) -> one a byte, (n,), each from 0 to 15."""
    return torch.stack((codes >> 4, codes & 15), dim=-1).flatten()


def pair_table(kind: str, codes: Tensor) -> Tensor:
    """Byte -> its two levels in fp32, seen as one 8-byte number: (256,) int64 on the device of `codes`."""
    build = build_pair_table if traced(codes) else kept_pair_table
    return build(kind, codes.device)


def build_pair_table(kind: str, device: torch.device) -> Tensor:
    levels = torch.tensor(LEVELS[kind], device=device)
    pairs = torch.stack(torch.meshgrid(levels, levels, indexing="ij"), dim=-1)  # (16, 16, 2)
    return pairs.view(torch.int64).flatten()


kept_pair_table = functools.cache(build_pair_table)  # 2 KB a device; sending it anew would hold up a GPU in every layer


def piece_size(like: Tensor) -> int:
    """Blocks to do at a time: on a CPU what its cache holds for each thread, elsewhere what hides a kernel's launch."""
    return 2**16 // BLOCK * torch.get_num_threads() if like.is_cpu and not traced(like) else 2**24 // BLOCK


def traced(like: Tensor) -> bool:
    """Whether the compiler looks on, or a tensor is fake, as when a step's memory is traced without data."""
    return type(like) is not Tensor or torch.compiler.is_compiling()


# How good it is


@dataclass(frozen=True)
class QuantisationError:
    """What quantising took from a tensor.

    Attributes:
        relative: ||W' - W|| / ||W||.
        rms, largest: of the entries of W' - W, in the weights' units.
        snr: signal to noise, decibels: -20 log10(relative).
        bits: stored a weight.
    """

    relative: float
    rms: float
    largest: float
    snr: float
    bits: float


@torch.no_grad()
def quantisation_error(weight: Tensor, kind: str = "nf4", double: bool = True) -> QuantisationError:
    """Quantise `weight`, read it back and compare; errors as `quantise`."""
    q = quantise(weight, kind, double)
    difference = dequantise(q) - weight.float()
    norm, size = difference.norm().item(), weight.float().norm().item()
    relative = norm / size if size else 0.0
    return QuantisationError(relative, norm / math.sqrt(weight.numel()), difference.abs().max().item(),
                             -20 * math.log10(relative) if relative else math.inf, q.bits)


# The linear


class Linear4bitFunction(torch.autograd.Function):
    """``x W^T + b`` for a frozen W in 4 bits: saves nothing, W is dequantised again in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, layer: "Linear4bit") -> Tensor:
        ctx.layer, ctx.x_dtype, ctx.bias_dtype = layer, x.dtype, None if bias is None else bias.dtype
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return no_view(F.linear(x.to(dtype), layer.dequantize(dtype), None if bias is None else bias.to(dtype)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        dx = db = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = (grad @ ctx.layer.dequantize(grad.dtype)).to(ctx.x_dtype)  # (..., in)
            if ctx.needs_input_grad[1]:
                db = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)  # (out,)
        return dx, db, None


class Linear4bit(nn.Module):
    """A linear whose frozen weight is kept in 4 bits and dequantised on the fly, in forward and again in backward.

    It computes in the dtype of its input (under autocast, autocast's). The weight's parts are buffers, so state_dict,
    safetensors and ``.to(device)`` carry them; ``.to(dtype)`` leaves them alone. A fresh one holds zeros, to be loaded.

    Attributes:
        codes, absmax, absmax_scale, absmax_mean: see `QuantisedTensor`.
        bias: (out,), frozen, or None.
        dtype: what `dequantize` gives when not told otherwise: that of the weight which was quantised.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None,
                 dtype: torch.dtype | None = None, kind: str = "nf4", double: bool = True):
        super().__init__()
        if kind not in LEVELS:
            raise ValueError(f"kind must be one of {', '.join(LEVELS)}, got {kind!r}")
        if min(in_features, out_features) < 1:
            raise ValueError(f"in_features and out_features must be positive, got {in_features} and {out_features}")
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self.dtype = dtype or torch.get_default_dtype()
        blocks = -(-in_features * out_features // BLOCK)
        zeros = functools.partial(torch.zeros, device=device)
        self.register_buffer("codes", zeros(blocks * BLOCK // 2, dtype=torch.uint8))
        # before absmax: an adapter on this layer takes the dtype of its first floating-point tensor, widened to fp32
        self.register_buffer("absmax_scale", zeros(-(-blocks // ABSMAX_BLOCK)) if double else None)
        self.register_buffer("absmax_mean", zeros(1) if double else None)
        self.register_buffer("absmax", zeros(blocks, dtype=FP8 if double else torch.float32))
        self.bias = nn.Parameter(zeros(out_features, dtype=self.dtype), requires_grad=False) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Module, kind: str = "nf4", double: bool = True) -> "Linear4bit":
        """The 4-bit form of an nn.Linear or GPT-2's Conv1D; its bias is shared, and frozen.

        Raises:
            ValueError: another module, or as `quantise`.
        """
        if quantised(linear) or kind_of(linear) not in ("linear", "conv1d"):
            raise ValueError(f"expected a Linear or Conv1D, got a {type(linear).__name__}")
        weight, (out, inp) = dense_weight(linear), shape_of(linear)
        layer = cls(inp, out, False, "meta", weight.dtype, kind, double)
        q = quantise(weight, kind, double)
        for name in layer._buffers:
            layer._buffers[name] = getattr(q, name)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.train(linear.training)

    @property
    def weight_4bit(self) -> QuantisedTensor:
        """The stored weight, (out, in)."""
        return QuantisedTensor(self.codes, self.absmax, self.absmax_scale, self.absmax_mean,
                               (self.out_features, self.in_features), self.kind)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a fresh dense tensor, (out, in)."""
        return dequantise(self.weight_4bit, dtype or self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return Linear4bitFunction.apply(x, self.bias, self)  # (..., out)

    def _apply(self, fn, recurse=True):
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        for name, old in kept.items():
            new = self._buffers[name]
            if old is not None and new.dtype != old.dtype:  # model.bfloat16() must not round the constants
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, " \
               f"kind={self.kind}, bits={self.weight_4bit.bits:.4g}"


def quantise_model(model: nn.Module, targets: str | tuple[str, ...] = ALL_LINEAR, kind: str = "nf4",
                   double: bool = True) -> nn.Module:
    """Turn a model's linears into frozen 4-bit ones, in place; then `inject`. Returns `model`.

    By default every linear but the output head and weights that another module shares (a tied head's); embeddings and
    norms stay as they are. All or nothing: after an error the model is as it was.

    Args:
        targets: which linears, as `LoRAConfig.target_modules`.
        kind, double: as in `quantise`.

    Raises:
        ValueError: a target that matches nothing or is no linear, a model without linears or with adapters already, or
            weights that cannot be quantised; the message names the module.
    """
    modules = dict(model.named_modules())
    if any(isinstance(m, LoRALayer) for m in modules.values()):
        raise ValueError("the model has adapters already: quantise it first, then inject or load_adapter")
    kinds = {name: found for name, m in modules.items()
             if name and not inside_torch(modules, name) and (found := kind_of(m))}
    new, shared = {}, tied(model)
    for name in choose(model, modules, kinds, LoRAConfig(target_modules=targets)):
        if targets == ALL_LINEAR and shared.get(name):
            continue
        try:
            new[modules[name]] = Linear4bit.from_linear(modules[name], kind, double)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
    replace(model, new)
    return model
