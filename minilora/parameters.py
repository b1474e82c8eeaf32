"""Adapters around single parameters of a module, where A and B around a layer do not reach: rows of an embedding that
train whole (PEFT's `trainable_token_indices`), and experts stacked in one parameter (its `target_parameters`).

While merged, the base holds the new parameter, and its own is kept, so `unmerge` gives the very same tensor back.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bases import adapter_options, output_scale, widest
from .config import scaling
from .layers import AdapterLayer, PlainWhenMerged, Wrapper


class ParameterAdapter(PlainWhenMerged, Wrapper, AdapterLayer):
    """A frozen module, some of whose parameters get another value. Subclasses say which: `values`."""

    peft_type, mergeable = "LORA", True

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.before: dict[str, nn.Parameter] = {}  # while merged: the base's own parameters, by name
        self.lost = 0.0

    @property
    def merged(self) -> bool:
        return bool(self.before)

    def values(self, wide: torch.dtype | None = None) -> dict[str, Tensor]:
        """The new parameters by name, in `wide`, or (None) in the base's dtype."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> float:
        """Put the new parameters in the place of the base's, rounded once; return the share of the change that rounding
        took, ||rounding|| / ||change||."""
        if self.merged:
            return self.lost
        new = {name: (W, W.to(self.base_layer._parameters[name].dtype)) for name, W in
               self.values(widest(next(iter(self.own().values())))).items()}
        if not all(rounded.isfinite().all() for _, rounded in new.values()):
            raise ValueError("the merged weight holds infinite or NaN values")
        self.before = {name: self.base_layer._parameters[name] for name in new}
        away = sum(float((rounded.to(W.dtype) - W).square().sum()) for W, rounded in new.values())
        change = sum(float((W - self.before[name].to(W.dtype)).square().sum()) for name, (W, _) in new.items())
        for name, (_, rounded) in new.items():
            self.base_layer._parameters[name] = nn.Parameter(rounded, requires_grad=False)
        self.lost = math.sqrt(away / change) if change else 0.0
        return self.lost

    def unmerge(self) -> None:
        self.base_layer._parameters.update(self.before)
        self.before = {}

    def replaced(self) -> dict[nn.Parameter, nn.Parameter]:
        return {self.base_layer._parameters[name]: p for name, p in self.before.items()}

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for p in self.before.values():
            p.data = fn(p.data)
        return self


class TrainedRows(ParameterAdapter):
    """An embedding, or the output head tied to it, of which some rows train whole: those of a few tokens.

    Attributes:
        tokens: the rows' numbers, (k,).
        rows: (k, width), at least fp32; they start as the base's own. A tied head shares its embedding's: `first`.
    """

    how = "row by row (trainable_tokens)"

    def __init__(self, base_layer: nn.Module, tokens: tuple[int, ...], first: "TrainedRows | None" = None):
        super().__init__(base_layer)
        options = adapter_options(base_layer)
        self.register_buffer("tokens", torch.tensor(tokens, device=options["device"]), persistent=False)
        self.tied = first is not None
        own = base_layer.weight.detach()[self.tokens].to(**options)  # (k, width)
        self.rows = nn.Parameter(own) if first is None else first.rows

    def saved(self) -> dict[str, Tensor]:
        return {} if self.tied else {TOKENS_KEY: self.rows}

    def values(self, wide: torch.dtype | None = None) -> dict[str, Tensor]:
        W = self.base_layer.weight
        W = W.to(wide or W.dtype)
        return {"weight": W.index_copy(0, self.tokens, self.rows.to(W.dtype))}

    def forward(self, x: Tensor) -> Tensor:
        y, W = self.base_layer(x), self.base_layer.weight
        if self.merged:
            return y
        if not isinstance(self.base_layer, nn.Embedding):  # a head: the difference of its rows, so zero at the start
            change = x @ (self.rows - W[self.tokens].to(self.rows)).to(x.dtype).T  # (..., k)
            return y.index_add(-1, self.tokens, change.to(y.dtype))
        hit = x[..., None] == self.tokens  # (..., k)
        rows = F.embedding(hit.int().argmax(-1), self.rows.to(W.dtype)) * output_scale(self.base_layer)
        return torch.where(hit.any(-1, keepdim=True), rows.to(y.dtype), y)


class StackedLoRA(ParameterAdapter):
    """``W[e] + scaling * B[e] A[e]`` for every expert e of parameters of shape (experts, out, in), or (experts, in,
    out) where the module says `is_transposed`, as gpt-oss does; a matrix counts as one expert.

    The module that holds them computes what it likes with them, so the sum is formed in every forward, as PEFT does:
    the one place here where an update is dense in training. For each parameter `p`:

    Attributes:
        lora_A_p: (experts * rank, in), expert by expert.
        lora_B_p: (out, rank * experts), the experts of one rank side by side: PEFT's order.
    """

    how = "as stacked experts (target_parameters)"

    def __init__(self, base_layer: nn.Module, ranks: dict[str, int], alphas: dict[str, float], use_rslora: bool):
        super().__init__(base_layer)
        self.ranks, self.alphas, self.use_rslora = ranks, alphas, use_rslora
        for name, rank in ranks.items():
            options = adapter_options(base_layer) | {"device": base_layer._parameters[name].device}
            for which, shape in stacked_shapes(base_layer, name, rank).items():
                self.register_parameter(f"{which}_{name}", nn.Parameter(torch.zeros(shape, **options)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name in self.ranks:
            nn.init.kaiming_uniform_(getattr(self, f"lora_A_{name}"), a=math.sqrt(5))
            nn.init.zeros_(getattr(self, f"lora_B_{name}"))

    def saved(self) -> dict[str, Tensor]:
        return {key: getattr(self, f"{which}_{name}") for (which, name), key in stacked_keys(self.ranks).items()}

    def values(self, wide: torch.dtype | None = None) -> dict[str, Tensor]:
        found = {}
        for name, rank in self.ranks.items():
            W = self.base_layer._parameters[name]
            W = W.to(wide or W.dtype)
            A, B = (getattr(self, f"lora_{which}_{name}").to(wide or torch.float32) for which in "AB")
            A = A.view(-1, rank, A.shape[1])  # (experts, rank, in)
            B = B.view(len(B), rank, -1).permute(2, 0, 1)  # (experts, out, rank)
            delta = scaling(rank, self.alphas[name], self.use_rslora) * (B @ A)  # (experts, out, in)
            delta = delta.mT if getattr(self.base_layer, "is_transposed", False) and W.dim() == 3 else delta
            found[name] = W + delta.reshape(W.shape).to(W.dtype)
        return found

    def forward(self, *args, **kwargs):
        if self.merged:
            return self.base_layer(*args, **kwargs)
        return torch.func.functional_call(self.base_layer, self.values(), args, kwargs)


TOKENS_KEY = "token_adapter.trainable_tokens_delta"  # the end of PEFT's key


def stacked_shapes(module: nn.Module, name: str, rank: int) -> dict[str, tuple[int, int]]:
    """Shapes of A and B for the parameter called `name` of a module."""
    W = module._parameters[name]
    experts, (out, inp) = (len(W) if W.dim() == 3 else 1), W.shape[-2:]
    if W.dim() == 3 and getattr(module, "is_transposed", False):
        out, inp = inp, out
    return {"lora_A": (experts * rank, inp), "lora_B": (out, rank * experts)}


def stacked_keys(names) -> dict[tuple[str, str], str]:
    """(which, parameter) -> the end of PEFT's key. PEFT wraps a module once for each parameter, in their order in the
    module; so the last one's key is the plain one."""
    names = list(names)
    return {(which, name): "base_layer." * (len(names) - 1 - i) + f"{which}.weight"
            for i, name in enumerate(names) for which in ("lora_A", "lora_B")}
