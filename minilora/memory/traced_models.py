"""A Hugging Face architecture to trace: the class that its config.json names, on fake tensors, adapted by PEFT.

Nothing is initialised, no code but transformers' own is run, and a config is looked over before transformers reads it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ..bases import dense_weight, kind_of
from ..config import ALL_LINEAR, LoRAConfig, entry_matches
from ..tables import plain, quoted
from .config_file import check_sizes, read_config, suggest
from .packages import require_package
from .traced_losses import with_fused_head

# what a model is for: transformers' mapping of its classes, and what it reads and is told. The first that knows a
# config counts, if the config names no class
TASKS = (("CAUSAL_LM", "tokens"), ("SEQ_TO_SEQ_CAUSAL_LM", "tokens"), ("IMAGE_TEXT_TO_TEXT", "tokens"),
         ("MULTIMODAL_LM", "tokens"), ("MASKED_LM", "tokens"), ("SEQUENCE_CLASSIFICATION", "a class"),
         ("TOKEN_CLASSIFICATION", "classes"), ("IMAGE_CLASSIFICATION", "images"))
# state spaces of the first kind, whose kernels (mamba-ssm) are no part of transformers
SCANS = ("mamba", "falcon_mamba", "jamba", "zamba")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
          "num_decoder_layers")


def require_hugging_face(package: str) -> Any:
    """The package, which minilora does without elsewhere."""
    return require_package(package, "tracing a Hugging Face architecture needs transformers and peft, for qlora "
                                    "bitsandbytes too")


def read_architecture(source: str | Path) -> Any:
    """transformers' config of the architecture in a config.json: the file, its folder, or a model's name on the hub
    whose config is in the local cache.

    Raises:
        ValueError: no such file, fields that make no sense, an architecture that transformers does not know.
    """
    read, name = read_config(Path(source))
    return as_config(read, name)


def as_config(read: Mapping[str, Any], name: str) -> Any:
    """transformers' config of what stands in a config.json."""
    transformers = require_hugging_face("transformers")
    transformers.logging.set_verbosity_error()
    kind, known = read.get("model_type"), transformers.CONFIG_MAPPING
    if not isinstance(kind, str) or kind not in known:
        what = "says no model_type" if kind is None else f"is of model_type {quoted(kind)}"
        raise ValueError(f"{name} {what}, which transformers {transformers.__version__} does not know; "
                         + suggest(str(kind), known.keys()).split("; ")[0][:300])
    check_sizes(read, name)
    with in_one_line(f"{name}, {kind},"):
        return known[kind].from_dict({**read, "quantization_config": None} if "quantization_config" in read else read)


@contextmanager
def in_one_line(name: str) -> Iterator[None]:
    """Whatever a stranger's code raises on a config that it cannot build, as a ValueError of one line."""
    try:
        yield
    except (ValueError, ModuleNotFoundError):
        raise
    except Exception as error:
        said = plain(f"{type(error).__name__}: {' '.join(str(error).split())}", 300)
        raise ValueError(f"{name} cannot be traced: {said}") from None


# ---------------------------------------------------------------- which class, and how deep


def class_of(config: Any) -> tuple[type, str]:
    """The class of transformers' that a config means, and what it reads: a name in `TASKS`."""
    transformers = require_hugging_face("transformers")
    if config.model_type in SCANS:
        raise ValueError(f"{config.model_type} scans its tokens one after the other where its CUDA kernels are "
                         "missing, and these are not followed here; so its step is not priced")
    named = getattr(config, "architectures", None)
    named = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    auto = transformers.models.auto.modeling_auto
    # a config that names no class means an encoder, or both, though a decoder could be made of it too
    encoder = getattr(config, "is_encoder_decoder", False) or (
        type(config) in auto.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False))
    for task, reads in TASKS:
        classes = getattr(auto, f"MODEL_FOR_{task}_MAPPING")
        if type(config) not in classes or task == "CAUSAL_LM" and named is None and encoder:
            continue
        found = classes[type(config)]
        found = found if isinstance(found, tuple) else (found,)
        if named is None or not hasattr(transformers, named) or headless(named):
            return found[0], reads
        if named in (one.__name__ for one in found):
            return getattr(transformers, named), reads
    what = f"{config.model_type} ({named})" if named else config.model_type
    raise ValueError(f"{what} is none of the kinds that are priced: language models (causal, masked, sequence to "
                     "sequence, with images), classifiers of text and of images")


def headless(name: str) -> bool:
    """Whether a class is an encoder or decoder without anything that learns from labels, such as BertModel."""
    return "For" not in name and "LMHead" not in name


def writes_on(kind: type, config: Any) -> bool:
    """Whether the class writes on from what it read: TRL's loss in chunks is for such models alone."""
    return hasattr(kind, "prepare_inputs_for_generation") and not getattr(config, "is_encoder_decoder", False)


def part_with_layers(config: Any) -> Any:
    """The config, or the part of it, that says how many layers there are."""
    parts = (config, config.get_text_config())
    part = next((p for p in parts if any(isinstance(getattr(p, name, None), int) for name in LAYERS)), None)
    if part is None:
        raise ValueError(f"{config.model_type} does not say how many layers it has")
    return part


def depth(config: Any) -> int:
    """The number of layers."""
    part = part_with_layers(config)
    return max(value for name in LAYERS if isinstance(value := getattr(part, name, None), int))


def per_layer(config: Any) -> Iterator[tuple[str, list]]:
    """The fields that say something of every layer."""
    part, layers = part_with_layers(config), depth(config)
    for name, value in vars(part).items():
        if isinstance(value, (list, tuple)) and len(value) == layers:
            yield name, list(value)


def with_layers(config: Any, layers: int) -> Any:
    """The same model with its first layers alone."""
    changed = {name: value[:layers] for name, value in per_layer(config)}
    whole, config = depth(config), copy.deepcopy(config)
    part = part_with_layers(config)
    for name, value in changed.items():
        setattr(part, name, value)
    for name in LAYERS:
        if getattr(part, name, None) == whole:
            setattr(part, name, layers)
    return config


# ---------------------------------------------------------------- the model


def hugging_face_model(config: Any, lora: LoRAConfig | None, dtype: torch.dtype, checkpointing: bool, four_bit: bool,
                       chunked: bool = False, adapters: torch.dtype = torch.float32, upcast: bool = True,
                       attention: str = "fused", counted: Callable[[int], object] = lambda count: None,
                       ) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    """The model, and the function from it and its data to the loss; `counted` is told its number of parameters."""
    peft, transformers = require_hugging_face("peft"), require_hugging_face("transformers")
    if not isinstance(config, transformers.PretrainedConfig):
        raise ValueError(f"expected a LlamaConfig or the config of a causal language model of transformers', "
                         f"got a {type(config).__name__}")
    kind, reads = class_of(config)
    config = copy.deepcopy(config)
    for part in {id(p): p for p in (config, config.get_text_config())}.values():
        part.use_cache = False  # training keeps no keys and values
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    model = empty_model(kind, config, dtype, "eager" if attention == "eager" else None)
    counted(sum(p.numel() for p in model.parameters()))
    if four_bit:
        model = bitsandbytes_model(model, dtype)
        model = peft.prepare_model_for_kbit_training(model, False) if upcast else model.requires_grad_(False)
    if lora:
        model = adapted(model, lora, adapters, "CAUSAL_LM" if writes_on(kind, config) else None)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if chunked and writes_on(kind, config):
        with_fused_head(model)
        return model, lambda model, ids, targets, **more: model(input_ids=ids, labels=targets, **more)
    return model, LOSSES[reads]


def empty_model(kind: type, config: Any, dtype: torch.dtype, attention: str | None) -> nn.Module:
    """The model; on fake tensors nothing is initialised, as there is nothing, and some code would never end."""
    options = {"attn_implementation": attention} if attention else {}
    if not isinstance(torch.empty(0), FakeTensor):
        return kind._from_config(config, dtype=dtype, **options)
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = kind._from_config(config, dtype=dtype, **options)
    model.tie_weights()
    return model


def adapted(model: nn.Module, lora: LoRAConfig, dtype: torch.dtype, task: str | None) -> nn.Module:
    """The model with PEFT's adapters, in this dtype."""
    peft = require_hugging_face("peft")
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    names = [name for name, _ in model.named_modules()]
    for target in () if isinstance(targets, str) else targets:  # PEFT passes one over if another matches
        if not any(entry_matches(target, name) for name in names):
            raise ValueError(f"target {quoted(target)} matches no module of the architecture")
    model = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=lora.rank, lora_alpha=lora.alpha,
                                                       target_modules=targets, lora_dropout=lora.dropout,
                                                       use_dora=lora.use_dora))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)
    return model


def default_targets(config: Any) -> str | tuple[str, ...]:
    """What PEFT adapts in this architecture when told nothing; all linears where it has no rule."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    return tuple(known.get(config.model_type) or known.get(config.get_text_config().model_type) or ()) or ALL_LINEAR


def of_tokens(model: nn.Module, ids: torch.Tensor, targets: torch.Tensor, **more) -> torch.Tensor:
    return model(input_ids=ids, labels=targets, **more).loss


def of_a_class(model: nn.Module, ids: torch.Tensor, targets: torch.Tensor, **more) -> torch.Tensor:
    return model(input_ids=ids, labels=targets[:, 0].clamp(max=1), **more).loss


def of_classes(model: nn.Module, ids: torch.Tensor, targets: torch.Tensor, **more) -> torch.Tensor:
    return model(input_ids=ids, labels=targets.clamp(max=1), **more).loss


def of_images(model: Any, ids: torch.Tensor, targets: torch.Tensor, **more) -> torch.Tensor:
    """One picture a row, of the size that the model is made for."""
    config, width = model.config, next(model.parameters()).dtype
    size = getattr(config, "image_size", 224)
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.empty(ids.shape[0], getattr(config, "num_channels", 3), *sides, dtype=width)
    return model(pixel_values=pixels, labels=targets[:, 0].clamp(max=1)).loss


LOSSES = {"tokens": of_tokens, "a class": of_a_class, "classes": of_classes, "images": of_images}


def bitsandbytes_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model as transformers loads it in 4 bits: NF4, double quantisation, every linear but the head."""
    bnb = require_hugging_face("bitsandbytes")

    class Linear4bit(bnb.nn.Linear4bit):
        """With a plain parameter: bitsandbytes' own cannot hold a fake tensor."""

        def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None):
            nn.Module.__init__(self)
            self.out_features, self.in_features = weight.shape
            with patch.dict(bnb.functional.name2qmap):  # which must not keep what may be fake
                codes, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
            self.weight, self.bias = nn.Parameter(codes, requires_grad=False), bias
            self.weight.quant_state, self.weight.compress_statistics, self.weight.quant_type = state, True, "nf4"
            self.compute_dtype, self.compute_type_is_set, self.support_avx512bf16_for_cpu = dtype, True, False
            for name, t in (("levels", state.code), ("absmax", state.absmax), ("mean", state.offset),
                            ("absmax_levels", state.state2.code), ("absmax_scale", state.state2.absmax)):
                self.register_buffer(name, t, persistent=False)  # so that a trace knows them

    for name, module in list(model.named_modules()):
        if kind_of(module) in ("linear", "conv1d") and module is not model.get_output_embeddings():
            model.set_submodule(name, Linear4bit(dense_weight(module).detach().contiguous(), module.bias))
    model.is_loaded_in_4bit = True
    return model
