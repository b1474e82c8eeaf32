"""PiSSA: A and B start as the leading singular part of W (Meng et al. 2024, arXiv 2404.02948, eq. 2-3)."""

import torch
from torch import Tensor

from ..bases import dense_weight
from ..config import LoRAConfig, require, scaling
from ..distributed import full_tensor
from ..layers import LoRALayer


class PiSSA(LoRALayer):
    """``W + s (B A - B0 A0)``, where A0, B0 is the start: the top-r singular part of W, divided by s.

    The paper moves the rest of W into the base. Here the base stays whole and the update is taken less its start: the
    same function, and the base can still be shared, fingerprinted and given back.

    Attributes:
        start_A, start_B: A0 (r, in) and B0 (out, r).
    """

    variant, kinds = "pissa", ("linear", "conv1d", "embedding")

    @classmethod
    def check(cls, config: LoRAConfig) -> None:
        require(not config.use_dora, "init='pissa' splits W, which DoRA needs whole: use_dora must be False", True)
        alphas = {"alpha": config.alpha} | dict(config.alpha_pattern)
        require(min(alphas.values()) > 0, "init='pissa' takes the root of the scaling: alpha must be above 0", alphas)

    def start(self) -> None:
        U, S, Vh = torch.linalg.svd(dense_weight(self.base_layer).detach().to(self.lora_A.dtype), full_matrices=False)
        root = (S[:self.rank] / self.scaling).sqrt()  # (r,)
        self.lora_A.data.copy_(root[:, None] * Vh[:self.rank])
        self.lora_B.data.copy_(U[:, :self.rank] * root)
        self.register_buffer("start_A", self.lora_A.detach().clone())
        self.register_buffer("start_B", self.lora_B.detach().clone())

    def update(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        start = self.product(x, self.start_A.to(dtype), self.start_B.to(dtype))
        return self.scaling * (self.product(x, self.lora_A.to(dtype), self.lora_B.to(dtype)) - start)

    def dense_update(self, wide: torch.dtype) -> Tensor:
        return self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide)
                               - self.start_B.to(wide) @ self.start_A.to(wide))

    def plain_form(self) -> tuple[Tensor, Tensor, float]:
        """B A - B0 A0 = [B, -B0] [A; A0], of rank 2r (the appendix on conversion); alpha grows, scaling stays."""
        A = torch.cat((full_tensor(self.lora_A), self.start_A))  # (2r, in)
        B = torch.cat((full_tensor(self.lora_B), -self.start_B), dim=1)  # (out, 2r)
        return A, B, self.scaling / scaling(2 * self.rank, 1, self.use_rslora)
