"""How far a merged weight is from the exact one, beside PEFT's two merges of the same adapter.

    python tests/bench/merge_error.py [--seeds 5]

Each figure is ||merged - exact|| / ||update|| of a 768 x 768 linear, rank 8, the exact one in fp64; the worst of the
seeds. "loss of the best" is what rounding the exact weight to the dtype would cost: no merge can be nearer.
"""

import argparse
import copy
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from minilora import LoRAConfig, inject, lora_parameters, merge

VARIANTS = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}


def errors(dtype: torch.dtype, options: dict, size: float, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(768, 768)).to(dtype)
    ours = inject(copy.deepcopy(base), LoRAConfig(8, 16, ("0",), **options))
    layer, found = ours[0], {}
    with torch.no_grad():
        for p in lora_parameters(ours):
            p.add_(torch.randn_like(p) * size)
        exact = base[0].weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        if layer.variant == "dora":
            exact = layer.lora_magnitude.double()[:, None] * exact / exact.norm(dim=1, keepdim=True)
        for name in ("plain", "safe"):
            theirs = get_peft_model(
                copy.deepcopy(base), LoraConfig(r=8, lora_alpha=16, target_modules=["0"], **options)
            )
            peft_layer = theirs.base_model.model[0]
            peft_layer.lora_A["default"].weight.copy_(layer.lora_A)
            peft_layer.lora_B["default"].weight.copy_(layer.lora_B)
            if layer.variant == "dora":
                peft_layer.lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude)
            found[f"PEFT {name}"] = theirs.merge_and_unload(safe_merge=name == "safe")[0].weight
    merge(ours)
    found = {"ours": layer.base_layer.weight} | found | {"loss of the best": exact.to(dtype)}
    update = (exact - base[0].weight.double()).norm()
    return {name: ((W.double() - exact).norm() / update).item() for name, W in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    warnings.simplefilter("ignore")
    names = ("ours", "PEFT plain", "PEFT safe", "loss of the best")
    print(f"{'dtype':<10}{'variant':<9}{'size':>8}" + "".join(f"{n:>18}" for n in names))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for variant, options in VARIANTS.items():
            for size in (1e-1, 1e-3):
                runs = [errors(dtype, options, size, seed) for seed in range(seeds)]
                print(
                    f"{str(dtype)[6:]:<10}{variant:<9}{size:>8g}"
                    + "".join(f"{max(r[n] for r in runs):>18.9f}" for n in names)
                )
