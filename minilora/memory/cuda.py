"""What PyTorch does on CUDA: how its allocator rounds and keeps memory, and which kernels and dtypes it would choose.

From the sources of PyTorch 2.13: c10/cuda/CUDACachingAllocator.cpp, ATen/native/transformers/cuda/sdp_utils.cpp,
ATen/autocast_mode.h, ATen/cuda/CUDABlas.cpp. Not followed: softmax of fp16 into fp32, which CUDA does without an fp32
copy of its input; expandable segments and other settings of the allocator.
"""

import warnings
from bisect import bisect_left, insort
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import Tensor, nn

aten = torch.ops.aten
MIB = 2**20
CUBLAS_WORKSPACE = {"Hopper, Blackwell": 32 * MIB, "other cards": 8_519_680}  # taken once, at the first matrix product


# ---------------------------------------------------------------- the CUDA caching allocator


class CachingAllocator:
    """A replay of CUDA's caching allocator (c10/cuda/CUDACachingAllocator.cpp) with its default settings.

    Sizes are rounded to 512 bytes. Up to 1 MiB come out of 2 MiB segments, below 10 MiB out of 20 MiB segments, larger
    ones out of segments of their own, rounded to 2 MiB. The smallest free block that is large enough is taken (best
    fit), split if enough is left over, and merged with its free neighbours when it is given back. Segments are kept.
    """

    def __init__(self):
        self.reserved, self.top = 0, 0
        self.free = {True: [], False: []}  # small or large: sorted (size, address)
        self.size, self.end = {}, {}  # of free blocks: address -> size, end -> address

    def allocate(self, size: int) -> tuple[bool, int, int]:
        """A block (is small, address, size) of at least `size` bytes."""
        size = rounded(size)
        small = size <= MIB
        i = bisect_left(self.free[small], (size, 0))
        if i < len(self.free[small]):
            have, address = self.free[small][i]
            self.take(small, address)
        else:
            have = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            address, self.top, self.reserved = self.top, self.top + have + 1, self.reserved + have  # a gap: no merging
        if have - size >= (512 if small else MIB + 1):
            self.put(small, address + size, have - size)
            have = size
        return small, address, have

    def release(self, block: tuple[bool, int, int]) -> None:
        small, address, size = block
        if (after := address + size) in self.size:
            size += self.take(small, after)
        if address in self.end:
            address = self.end[address]
            size += self.take(small, address)
        self.put(small, address, size)

    def put(self, small: bool, address: int, size: int) -> None:
        insort(self.free[small], (size, address))
        self.size[address], self.end[address + size] = size, address

    def take(self, small: bool, address: int) -> int:
        size = self.size.pop(address)
        del self.end[address + size]
        self.free[small].pop(bisect_left(self.free[small], (size, address)))
        return size


def rounded(size: int) -> int:
    """Bytes as the allocator counts them."""
    return -(-size // 512) * 512


# ---------------------------------------------------------------- what CUDA does otherwise

# CUDA's autocast runs these in fp32, the CPU's does not; those of the second row only if no dtype is asked for
IN_FP32 = ("exp", "log", "reciprocal", "rsqrt", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus",
           "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "logsumexp")
TO_FP32 = ("softmax.int", "log_softmax.int", "cumsum", "cumprod", "sum", "sum.dim_IntList", "linalg_vector_norm")
NOT_CAST = ("cross_entropy_loss", "cat", "stack")  # the CPU's autocast casts these, CUDA's does not


def follow_cuda(stack: ExitStack) -> None:
    """Until `stack` closes, let PyTorch choose on the CPU as it does on CUDA: attention and norms fused, dropout's mask
    in bytes, what autocast casts, and optimizers that take all parameters at once (foreach)."""
    library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that kernels are replaced
        library.impl("scaled_dot_product_attention", attention, "AutogradCPU")
        library.impl("rms_norm", FusedRMSNorm.run, "AutogradCPU")
        library.impl("dropout", dropout, "AutogradCPU")
        library.impl("_grouped_mm", GroupedMM.run, "AutogradCPU")
        for name in IN_FP32 + TO_FP32:
            library.impl(name, autocast_kernel(name, name in IN_FP32), "AutocastCPU")
        for name in NOT_CAST:
            library.impl(name, torch.library.fallthrough_kernel, "AutocastCPU")
    asked = torch.is_autocast_enabled  # without a device it is CUDA's that is meant: PEFT asks so
    stack.enter_context(patch("torch.is_autocast_enabled", lambda *device: asked(*device or ("cpu",))))
    stack.enter_context(patch("torch.optim.optimizer._get_foreach_kernels_supported_devices", lambda: ["cpu"]))


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False) -> Tensor:
    """The kernel that CUDA would choose (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp), from sm80 on.

    Flash attention for 16 bits without a mask, else memory-efficient attention, which has no grouped heads, else the
    plain one. q (..., H, T, D). cuDNN's kernel, which some cards prefer, keeps as much as flash attention.
    """
    size, grouped = q.shape[-1], enable_gqa and q.shape[-3] != k.shape[-3]
    scale = size**-0.5 if scale is None else scale
    flash = q.dtype in (torch.float16, torch.bfloat16) and attn_mask is None and q.dim() == 4
    flash = flash and size <= 256 and size == k.shape[-1] == v.shape[-1]
    if flash and torch.backends.cuda.flash_sdp_enabled() and (not is_causal or q.shape[-2] == k.shape[-2]):
        q, k, v = (nn.functional.pad(x, (0, -size % 8)) if size % 8 else x for x in (q, k, v))
        y = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
        return y[..., :size] if size % 8 else y
    efficient = not grouped and q.dtype != torch.float64 and q.dim() == 4
    if efficient and torch.backends.cuda.mem_efficient_sdp_enabled():
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # turned into what is added to the scores
            attn_mask = torch.where(attn_mask, *(torch.scalar_tensor(x, dtype=q.dtype) for x in (0, -torch.inf)))
        if attn_mask is not None:
            if extra := -attn_mask.shape[-1] % 8:  # attention.cpp, `pad_bias`
                attn_mask = nn.functional.pad(attn_mask, (0, extra))[..., :-extra]
            attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, keep, dropout_p, is_causal,
                                                            scale=scale)[0]
    return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale,
                                                   enable_gqa=enable_gqa)[0]


class FusedRMSNorm(torch.autograd.Function):
    """Keeps x, the weight and 1 / rms in fp32; there are no values to compute."""

    @staticmethod
    def run(x, shape, weight=None, eps=None) -> Tensor:
        if weight is not None and weight.dtype != x.dtype:
            return aten._fused_rms_norm(x, shape, weight, eps)[0]  # not fused on CUDA either
        return FusedRMSNorm.apply(x, len(shape), weight)

    @staticmethod
    def forward(ctx, x, dims, weight):
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-dims], *[1] * dims), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors  # once: checkpointing computes them again at this moment
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        return dx, None, torch.empty_like(weight) if ctx.needs_input_grad[2] else None


class GroupedMM(torch.autograd.Function):
    """Rows (S, in), sorted by their matrix of (E, in, out) -> (S, out), of any dtype: what is no bfloat16 goes matrix
    by matrix into one result (GroupedBlas.cpp, `_grouped_mm_fallback`), which fake tensors do not know. Not followed:
    that a last dimension is rounded up to 16 bytes."""

    @staticmethod
    def run(x, matrices, offs=None, bias=None, out_dtype=None) -> Tensor:
        return GroupedMM.apply(x, matrices, offs)

    @staticmethod
    def forward(ctx, x, matrices, offs):
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, matrices if needs[0] else None, offs)
        ctx.like = [(t.shape, t.stride(), t.dtype) for t in (x, matrices)]
        return x.new_empty(x.shape[0], matrices.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        _ = ctx.saved_tensors  # once, as above
        made = [torch.empty_strided(shape, stride, dtype=dtype, device=grad.device) if needed else None
                for needed, (shape, stride, dtype) in reversed(list(zip(ctx.needs_input_grad, ctx.like)))]
        return made[1], made[0], None


def dropout(x: Tensor, p: float, train: bool) -> Tensor:
    """A mask of one byte an element; the CPU's has the dtype of x."""
    return torch.native_dropout(x, p, train)[0] if train and 0 < p < 1 else x * 0 if train and p else x


def autocast_kernel(name: str, cast: bool) -> Callable:
    """Autocast's rule for an operator: 16-bit inputs cast to fp32, or (not `cast`) the result asked for in fp32."""
    packet, _, overload = name.partition(".")
    op = getattr(getattr(aten, packet), overload or "default")
    names = [argument.name for argument in op._schema.arguments]

    def kernel(*args, **kwargs):
        kwargs |= dict(zip(names, args))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            if cast:
                kwargs = {k: v.float() if isinstance(v, Tensor) and v.dtype in (torch.float16, torch.bfloat16) else v
                          for k, v in kwargs.items()}
            elif kwargs.get("dtype") is None and kwargs["self"].is_floating_point():
                kwargs["dtype"] = torch.float32
            return op(**kwargs)

    return kernel
