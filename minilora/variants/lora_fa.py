"""LoRA-FA: A stays at its random start and B alone trains (Zhang et al. 2023, arXiv 2308.03303)."""

from torch import Tensor

from ..layers import LoRALayer


class LoRAFA(LoRALayer):
    """``W + s B A`` with A frozen: half of the parameters, and B's gradient needs only x A^T (N, r), not x (N, in).

    The plain form keeps just that, so it is the one to use: section 3.2. On disk it is plain LoRA, as in PEFT.
    """

    variant, frozen, fused = "lora_fa", ("lora_A",), False
    kinds = ("linear", "conv1d")  # an embedding's A is what starts at zero and has to train

    def plain_form(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_A, self.lora_B, self.alpha
