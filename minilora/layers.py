"""The LoRA layer: ``y = W x + b + scaling * B (A x)``, around a frozen linear, GPT-2 Conv1D or embedding.

The whole idea is `LoRALayer.plain`, three lines. `LoRAFunction` is the same sum with a backward of its own, so that
training keeps nothing but the layer's input; `LoRALayer.forward` picks between them.

A weight is seen as (out, in), whatever the layer (see bases.py). A is (r, in), B is (out, r), so the update is always
``scaling * B @ A``.

In the shape comments N stands for all leading dimensions of the input (batch, tokens) together.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bases import (
    adapter_options,
    as_stored,
    dense_weight,
    execution_device,
    kind_of,
    on_disk,
    output_scale,
    quantised,
    shape_of,
    weight_read,
    widest,
    words,
)
from .config import VARIANTS, LoRAConfig, scaling


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
        ctx.dequantize = partial(dense_weight, base) if quantised(base) else None
        ctx.save_for_backward(x, A, B, None if quantised(base) else dense_weight(base))
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        seen = rows * keep_mask(rows, dropout, ctx.seed) if dropout else rows
        inner = seen @ A.to(x.dtype).T  # (N, r), before base(x), which then finds x in the cache
        y = base(x)  # (..., out), by the base's own kernel: with B = 0 the result is the base's, bit for bit
        y.view(-1, y.shape[-1]).addmm_(inner.to(y.dtype), B.to(y.dtype).T, alpha=scaling)
        return no_view(y)

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


def no_view(y: Tensor) -> Tensor:
    """The same memory, no view: autograd forbids an operation in place after a view that a function of ours returns."""
    return y if torch.compiler.is_compiling() or not y._is_view() else torch.ops.aten._unsafe_view(y, y.shape)


class Wrapper(nn.Module):
    """A module around a `base_layer`. Code that asks it for a weight, bias or in_features finds the base's, and who
    sets a weight (to tie it) sets the base's."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def __setattr__(self, name: str, value):
        base = self.__dict__.get("_modules", {}).get("base_layer")
        mine = base is None or name not in base._parameters or name in self._parameters
        super().__setattr__(name, value) if mine else setattr(base, name, value)


class AdapterLayer(nn.Module):
    """A frozen module of the base, `base_layer`, and the parameters that train around it: at least fp32, on its device.

    Attributes:
        peft_type: what ``adapter_config.json`` calls the method; "MINILORA" is ours alone, which others must not take
            for theirs.
        config: what `inject` was given.
    """

    peft_type = "MINILORA"
    mergeable = False  # whether it has merge(), unmerge() and merged
    config = None

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer

    def own(self) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base_layer.")}

    def saved(self) -> dict[str, Tensor]:
        """What a file holds of it, by the end of its key."""
        return self.own()

    def plain_module(self) -> nn.Module:
        """What is left of a merged one that stays merged for good."""
        return self.base_layer

    def replaced(self) -> dict[nn.Parameter, nn.Parameter]:
        """While merged: the parameter that stands in the base now -> the base's own."""
        return {}

    def common(self) -> dict[str, Tensor]:
        """What a file holds once for all layers, by its key. What a file lacks of that stays as `shared` made it."""
        return {}


class PlainWhenMerged:
    """A merged layer's state is that of a plain layer, so that a merged model is saved as any other."""

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        inner = self.base_layer if self.merged else super()
        return inner.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if not self.merged:
            return super()._load_from_state_dict(state_dict, prefix, *args)
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}base_layer.{key[len(prefix):]}"] = state_dict.pop(key)


class LoRALayer(PlainWhenMerged, Wrapper, AdapterLayer):
    """A frozen layer and its trainable low-rank update (Hu et al. 2021, section 4.1).

    `base_layer` is an nn.Linear, GPT-2's Conv1D, an nn.Embedding, an nn.Conv2d or a quantised linear; for the rest see
    `LoRAConfig`.

    This is the plain form. A variant is a subclass with a `variant` of its own, in a file of variants/; what it may
    change is `shapes`, `start`, `update` or `plain`, `merged_weight`, and the lines below that say how it is written.

    Attributes:
        lora_A, lora_B: (r, in) and (out, r), at least fp32. One starts at zero, so the layer starts as its base.
        scaling: what multiplies ``B @ A``, from alpha and rank.
    """

    mergeable = True
    variant = "lora"  # its name in VARIANTS
    choice: dict = {}  # what asks for it in a LoRAConfig; a variant's is {"init": its name} if it does not say
    kinds = ("linear", "conv1d", "embedding", "conv2d")  # of base layers
    frozen: tuple[str, ...] = ()  # those of `shapes` that do not train
    fused = True  # LoRAFunction computes it; not where a variant changes what is computed
    peft_type = "LORA"
    settings = {"rank": "r", "alpha": "lora_alpha", "target_modules": "target_modules", "dropout": "lora_dropout",
                "use_rslora": "use_rslora", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
    constants: dict = {"init_lora_weights": True}  # the rest of its adapter_config.json
    keys = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}  # our name of a tensor -> the end of its key
    embedding_keys = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.fused = vars(cls).get("fused", cls.plain is LoRALayer.plain and cls.update is LoRALayer.update)
        if "variant" in vars(cls):
            cls.choice = vars(cls).get("choice", {"init": cls.variant})
            VARIANTS[cls.variant] = cls

    def __init__(self, base_layer: nn.Module, rank: int = 8, alpha: float = 16, dropout: float = 0.0,
                 use_rslora: bool = False):
        super().__init__(base_layer)
        LoRAConfig(rank, alpha, (".",), dropout, use_rslora)  # only to check the values
        if (kind := kind_of(base_layer)) not in self.kinds:
            raise ValueError(f"a {type(base_layer).__name__} cannot be adapted: expected {words(self.kinds)}")
        self.kind, self.rank, self.alpha, self.scaling = kind, rank, alpha, scaling(rank, alpha, use_rslora)
        self.dropout, self.use_rslora = dropout, use_rslora
        self.unmerged = ()  # while merged: the base's own weight, and the share of the update that rounding took
        for name, shape in self.shapes(*shape_of(base_layer), rank).items():
            zeros = torch.zeros(shape, **adapter_options(base_layer))
            if name in self.frozen:
                self.register_buffer(name, zeros)
            else:
                self.register_parameter(name, nn.Parameter(zeros))
        self.start()

    # What a variant may change

    @classmethod
    def check(cls, config: LoRAConfig) -> None:
        """Raise a ValueError if a config asks for what the variant cannot do."""

    @classmethod
    def shared(cls, shapes: list[tuple[int, int]], config: LoRAConfig) -> dict:
        """Arguments that all layers of a model get, made once; `shapes` are the (out, in) of all that are adapted."""
        return {}

    @classmethod
    def common_shapes(cls, shapes: list[tuple[int, int]], rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of `common`."""
        return {}

    @staticmethod
    def shapes(out: int, inp: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Its tensors, by name."""
        return {"lora_A": (rank, inp), "lora_B": (out, rank)}

    def reset_parameters(self) -> None:
        """Start again: what torch calls on a model that was made on the meta device, once it has memory and the base's
        own weights."""
        for t in (*self.parameters(recurse=False), *self.buffers(recurse=False)):
            t.data.zero_()
        self.start()

    def start(self) -> None:
        """Give the tensors, which are zero, the values that training starts from."""
        if self.kind == "embedding":
            nn.init.normal_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in)), as in the authors' code

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, (r, in) and (out, r)."""
        return self.lora_A, self.lora_B

    def update(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to the base's output, (..., out), in `dtype`."""
        A, B = self.factors()
        return self.scaling * self.product(x, A.to(dtype), B.to(dtype))

    def dense_update(self, wide: torch.dtype) -> Tensor:
        """``scaling * B @ A``, (out, in), in `wide`."""
        A, B = self.factors()
        return self.scaling * (B.to(wide) @ A.to(wide))

    def plain(self, x: Tensor) -> Tensor:
        """The definition, left to autograd."""
        y = self.base_layer(x)  # (..., out)
        return y + self.update(self.dropped(x, y.dtype), y.dtype)

    def row_scale(self) -> Tensor | None:
        """(out,): what W and the update together are multiplied by, row by row; None is 1."""
        return None

    def plain_form(self) -> tuple[Tensor, Tensor, float] | None:
        """A, B and alpha of the plain LoRA that does the same, in whose place it is saved; None: saved as itself."""
        return None

    # What is the same for all

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base_layer(x)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # the compiler fuses the plain form by itself
            return self.plain(x)
        self.__dict__["read_and_not_called"] = False
        fused = self.fused and self.kind in ("linear", "conv1d") and execution_device(self.base_layer) is None
        if not fused or any(p is not None and p.requires_grad for p in self.base_layer._parameters.values()):
            return self.plain(x)
        dropout = self.dropout if self.training else 0.0
        return LoRAFunction.apply(x, *self.factors(), self.base_layer, self.scaling, dropout)

    def dropped(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The input as the adapter sees it; row numbers of an embedding stay what they are."""
        return x if self.kind == "embedding" else F.dropout(x.to(dtype), self.dropout, self.training)

    def product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """``x A^T B^T``, (..., out); for an embedding x holds row numbers, for a convolution images (N, C, H, W)."""
        if self.kind == "conv2d":  # A takes the place of the kernel, B that of one of 1 x 1
            A = A.view(on_disk(self.base_layer, "lora_A", A.shape))  # (r, in, kernel height, kernel width)
            return F.conv2d(self.base_layer._conv_forward(x, A, None), B[..., None, None])
        if self.kind != "embedding":
            return x @ A.T @ B.T
        scale = output_scale(self.base_layer)
        scale = scale.to(B) if isinstance(scale, Tensor) else scale
        return F.embedding(x, A.T, self.base_layer.padding_idx) @ B.T * scale

    @classmethod
    def keys_of(cls, kind: str) -> dict[str, str]:
        """Our tensor -> the end of PEFT's key, on a layer of this kind."""
        return cls.keys | cls.embedding_keys if kind == "embedding" else cls.keys

    def chosen(self) -> dict:
        """What asks, in a LoRAConfig, for such a layer as it is saved."""
        return self.choice if self.plain_form() is None else LoRALayer.choice

    def saved(self) -> dict[str, Tensor]:
        if (form := self.plain_form()) is not None:
            keys = LoRALayer.keys_of(self.kind)
            return {keys["lora_A"]: form[0], keys["lora_B"]: form[1]}
        own = {key: (name, getattr(self, name)) for name, key in self.keys_of(self.kind).items()}
        return {key: t.view(on_disk(self.base_layer, name, t.shape)) if self.kind == "conv2d" else t
                for key, (name, t) in own.items()}

    # Merging

    @property
    def merged(self) -> bool:
        return bool(self.unmerged)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W with the update added, (out, in), in fp64 where there is fp64: nothing is rounded yet."""
        wide = widest(self.factors()[0])
        return dense_weight(self.base_layer).to(wide) + self.dense_update(wide)

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
            raise ValueError("cannot merge into a streamed weight: it is read-only and only visits the device. Keep "
                             "the adapter beside it, or load the base whole")
        if quantised(self.base_layer):
            raise ValueError("cannot merge into a quantised weight: its levels are too coarse for the update. Keep the "
                             "adapter beside it, or dequantise the base first")
        W, wide = dense_weight(self.base_layer), self.merged_weight()
        rounded = wide.to(W.dtype)  # (out, in)
        if not torch.isfinite(rounded).all():
            raise ValueError(f"the merged weight does not fit {W.dtype}: it holds infinite or NaN values")
        lost, update = (rounded.to(wide.dtype) - wide).norm(), (wide - W.to(wide.dtype)).norm()
        self.unmerged = self.base_layer.weight, float(lost / update) if update > 0 else 0.0
        self.base_layer.weight = nn.Parameter(as_stored(rounded, self.base_layer), requires_grad=False)
        return self.unmerged[1]

    def unmerge(self) -> None:
        """Give the base its own weight back: the same tensor, so the same bits."""
        if self.merged:
            self.base_layer.weight, self.unmerged = self.unmerged[0], ()

    def __setattr__(self, name: str, value):
        if name != "weight" or not self.__dict__.get("unmerged"):
            return super().__setattr__(name, value)
        self.unmerge()  # the base gets a new weight under a merged update: tie_weights()
        super().__setattr__(name, value)
        self.merge()

    def __getattr__(self, name: str):
        found = super().__getattr__(name)
        if name == "weight" and not self.merged and not torch.compiler.is_compiling():
            weight_read(self)
        return found

    def replaced(self) -> dict[nn.Parameter, nn.Parameter]:
        return {self.base_layer.weight: self.unmerged[0]} if self.merged else {}

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.merged:  # model.to(...) moves the kept weight too, in place: it may be tied to another layer's
            self.unmerged[0].data = fn(self.unmerged[0].data)
        return self

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, variant={self.variant}"


VARIANTS[LoRALayer.variant] = LoRALayer


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
