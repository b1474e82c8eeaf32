"""DoRA: each output row's length trains apart from its direction (Liu et al. 2024, arXiv 2402.09353)."""

import torch
from torch import Tensor

from ..bases import dense_weight, quantised, widest
from ..layers import LoRALayer


class DoRA(LoRALayer):
    """``m * (W + s B A) / ||W + s B A||``, row by row; the norm is held constant in backward (section 4.3).

    Attributes:
        lora_magnitude: m, (out,), the trained length of each output row. It starts at the row's own.
    """

    variant, choice = "dora", {"use_dora": True}
    kinds = ("linear", "conv1d", "embedding")
    settings = LoRALayer.settings | {"use_dora": "use_dora"}
    keys = LoRALayer.keys | {"lora_magnitude": "lora_magnitude_vector"}

    @staticmethod
    def shapes(out: int, inp: int, rank: int) -> dict[str, tuple[int, ...]]:
        return LoRALayer.shapes(out, inp, rank) | {"lora_magnitude": (out,)}

    def start(self) -> None:
        super().start()
        self.lora_magnitude.data = self.row_norm()

    def plain(self, x: Tensor) -> Tensor:
        """Eq. 5: c (W + s B A) x + b, arranged so that c = 1 gives the base's output exactly."""
        y = self.base_layer(x)  # (..., out)
        update = self.update(self.dropped(x, y.dtype), y.dtype)  # (..., out)
        c, bias = self.row_scale(), getattr(self.base_layer, "bias", None)  # (out,)
        return y + (c - 1).to(y.dtype) * (y if bias is None else y - bias.to(y.dtype)) + c.to(y.dtype) * update

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """A row that forward leaves alone stays as it is; the others get the norm in full precision."""
        W, wide = super().merged_weight(), widest(self.lora_A)
        return W.mul_(torch.where(self.row_scale() == 1, 1, self.lora_magnitude.to(wide) / W.norm(dim=1))[:, None])

    def row_scale(self) -> Tensor:
        """magnitude / norm, (out,); 1 where the norm is zero."""
        norm = self.row_norm()
        return torch.where(norm > 0, self.lora_magnitude / norm.masked_fill(norm == 0, 1), 1)

    def row_norm(self) -> Tensor:
        """||W + s B A|| of each output row, (out,), without forming the sum (in x out).

        ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>, row by row.
        """
        device = self.lora_A.device.type
        with torch.no_grad(), torch.autocast("cpu" if device == "meta" else device, enabled=False):
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
