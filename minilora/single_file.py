"""LoRAs of the diffusion world: one safetensors file, with kohya's names or with those of diffusers.

    kohya       lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .alpha (a number)
    diffusers   unet.down_blocks.0.attentions.0.proj_in.lora_A.weight, .lora_B.weight; alpha is the rank; before 0.21
                ...lora.down.weight, ...lora.up.weight, and processor.to_q_lora.down.weight

kohya writes "_" for every dot, so only the model at hand can tell where the dots were.
"""

import os
import re
import warnings
from collections import Counter
from pathlib import Path

from torch import Tensor, nn

from .adapters import insert_adapter, safe_tensors
from .bases import kind_of
from .config import LoRAConfig, require
from .naming import plain_modules, suggest
from .peft_format import AdapterFile, keys_of
from .tables import quoted

# the end of a key -> what it holds
ENDS = {".lora_A.weight": "lora_A", ".lora_down.weight": "lora_A", ".lora.down.weight": "lora_A",
        "_lora.down.weight": "lora_A", ".lora_B.weight": "lora_B", ".lora_up.weight": "lora_B",
        ".lora.up.weight": "lora_B", "_lora.up.weight": "lora_B", ".alpha": "alpha"}


def load_single_file(model: nn.Module, path: str | os.PathLike, part: str = "unet") -> nn.Module:
    """Inject the LoRA of one safetensors file into a plain model, in place. Returns `model`.

    Args:
        part: which part of the pipeline `model` is, by the beginning of its keys: "unet", "text_encoder",
            "transformer" (diffusers), "te", "te1", "te2" (kohya). What the file has for other parts is named.

    Raises:
        ValueError: a damaged file, tensors that are no LoRA's (LoHa, LoKr, DoRA's scale), nothing for this part, or
            names or shapes that are not the model's. The model is then as before.
    """
    path = Path(path)
    require(path.is_file(), "expected a safetensors file", str(path))
    modules, found, others = dict(plain_modules(model, seen=set())), {}, Counter()
    flat = Counter(name.replace(".", "_") for name in modules)
    dotted = {name.replace(".", "_"): name for name in modules}
    for key, t in safe_tensors(path)[0].items():
        end = next((end for end in ENDS if key.endswith(end)), None)
        if end is None:
            raise ValueError(f"{path}: {quoted(key)} is no LoRA's: expected keys that end in {', '.join(ENDS)}")
        stem = key.removesuffix(end).replace(".processor.", ".")
        kohya, plain = stem.removeprefix(f"lora_{part}_"), stem.removeprefix(f"{part}.")
        if kohya == plain == stem:
            others[re.match(r"lora_[^_.]*|[^.]*", stem)[0]] += 1  # lora_te1, text_encoder
            continue
        name = plain if plain != stem else dotted.get(kohya, kohya)
        name += ".0" * (end.startswith("_") and name.endswith("to_out"))  # of old, the layer was called as its list is
        require(plain != stem or flat[kohya] < 2, f"{path}: two modules of the model may be meant", kohya)
        if name not in modules:
            raise ValueError(f"{path}: {quoted(key)} has no place in the model; {suggest(name, list(modules))}")
        found.setdefault(name, {})[ENDS[end]] = t
    if not found:
        raise ValueError(f"{path} has nothing for {quoted(part)}: its keys begin with {', '.join(others) or 'nothing'}")
    if others:
        warnings.warn(f"{path} has {sum(others.values())} more tensors, for other parts ({', '.join(others)}): load "
                      "each into its own model", stacklevel=2)
    return insert_adapter(model, as_adapter(path, found, modules))


def as_adapter(path: Path, found: dict[str, dict[str, Tensor]], modules: dict[str, nn.Module]) -> AdapterFile:
    """The file's tensors by module, as an adapter in PEFT's format."""
    tensors, ranks, alphas = {}, {}, {}
    for name, own in found.items():
        kind = kind_of(modules[name]) or "linear"  # what cannot be adapted is refused as any other is
        for which in ("lora_A", "lora_B"):
            require(which in own and own[which].dim() >= 2, f"{path}: {name} lacks its {which}, or it is no matrix",
                    {key: tuple(t.shape) for key, t in own.items()})
            t = own[which]
            # a linear and a convolution of 1 x 1 are one thing; which of the two a model has changed
            tensors[keys_of(name, kind)[which]] = (t[..., None, None] if kind == "conv2d" and t.dim() == 2 else
                                                   t.flatten(1) if kind == "linear" and t.shape[2:].numel() == 1 else t)
        ranks[name] = len(own["lora_A"])
        alphas[name] = own["alpha"].item() if "alpha" in own else float(ranks[name])
    config = LoRAConfig(next(iter(ranks.values())), next(iter(alphas.values())), tuple(found),
                        rank_pattern={f"^{re.escape(name)}": r for name, r in ranks.items()},
                        alpha_pattern={f"^{re.escape(name)}": a for name, a in alphas.items()})
    return AdapterFile(path, config, tensors, None)
