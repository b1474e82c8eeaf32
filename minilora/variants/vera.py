"""VeRA: one random A and B for all layers, each trains two vectors (Kopiczko et al. 2023, arXiv 2310.11454)."""

import math

import torch
from torch import Tensor, nn

from ..bases import shape_of
from ..config import LoRAConfig, require
from ..layers import LoRALayer

D_START = 0.1  # where d starts; b starts at zero (table 6)


class Projection(nn.Module):
    """The random A (r, largest in) and B (largest out, r) that all layers share; a smaller layer takes a corner.

    Uniform in +-sqrt(6 / fan_in) (He et al. 2015), from a seed, as in PEFT: the same seed gives PEFT's matrices.
    """

    def __init__(self, shapes: list[tuple[int, int]], rank: int, seed: int):
        super().__init__()
        self.seed = seed
        for name, shape in self.shapes(shapes, rank).items():
            self.register_buffer(name, torch.empty(shape, device="cpu"))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for t in self.buffers():
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(t.shape[1]))
            t.copy_(torch.empty(t.shape, device="cpu").uniform_(-bound, bound, generator=generator))

    @staticmethod
    def shapes(shapes: list[tuple[int, int]], rank: int) -> dict[str, tuple[int, int]]:
        out, inp = (max(sizes) for sizes in zip(*shapes))
        return {"vera_A": (rank, inp), "vera_B": (out, rank)}


class VeRA(LoRALayer):
    """``W + diag(b) B diag(d) A`` (eq. 2): r + out trained parameters a layer, d and b. alpha plays no part."""

    variant, peft_type = "vera", "VERA"
    settings = {"rank": "r", "target_modules": "target_modules", "dropout": "vera_dropout",
                "seed": "projection_prng_key"}
    constants = {"d_initial": D_START, "save_projection": True, "init_weights": True}
    keys = {"vera_lambda_d": "vera_lambda_d", "vera_lambda_b": "vera_lambda_b"}
    kinds = ("linear", "conv1d")

    def __init__(self, *args, projection: Projection, **kwargs):
        super().__init__(*args, **kwargs)
        self.projection, self.scaling = projection.to(self.vera_lambda_d.device), 1.0

    @classmethod
    def check(cls, config: LoRAConfig) -> None:
        odd = config.use_rslora or config.rank_pattern or config.alpha_pattern or config.alpha != LoRAConfig.alpha
        require(not odd, "init='vera' has one rank and no alpha: leave alpha, rsLoRA and the patterns as they are",
                config)

    @classmethod
    def shared(cls, shapes: list[tuple[int, int]], config: LoRAConfig) -> dict:
        return {"projection": Projection(shapes, config.rank, config.seed)}

    @classmethod
    def common_shapes(cls, shapes: list[tuple[int, int]], rank: int) -> dict[str, tuple[int, ...]]:
        return {f"base_model.{name}": shape for name, shape in Projection.shapes(shapes, rank).items()}

    def chosen(self) -> dict:
        return self.choice | {"seed": self.projection.seed}

    def common(self) -> dict[str, Tensor]:
        return {f"base_model.{name}": t for name, t in self.projection.named_buffers()}

    @staticmethod
    def shapes(out: int, inp: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"vera_lambda_d": (rank,), "vera_lambda_b": (out,)}

    def start(self) -> None:
        self.vera_lambda_d.data.fill_(D_START)

    def factors(self) -> tuple[Tensor, Tensor]:
        d, b, A, B = self.vera_lambda_d, self.vera_lambda_b, self.projection.vera_A, self.projection.vera_B
        return d[:, None] * A[:, :shape_of(self.base_layer)[1]].to(d), b[:, None] * B[:len(b)].to(b)
