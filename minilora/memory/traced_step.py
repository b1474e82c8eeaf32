"""The standard training step to trace, of our decoder or of a Hugging Face architecture with PEFT."""

import copy
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ..bases import dense_weight, kind_of
from ..config import ALL_LINEAR, LoRAConfig, entry_matches
from ..injection import inject
from ..llama import Llama, LlamaConfig
from ..losses import masked_cross_entropy
from ..quant import quantise_model  # here, not on fake tensors: its levels are computed when it is imported
from ..tables import quoted
from .optimizers import OPTIMIZERS
from .packages import require_package
from .run import METHODS
from .traced_losses import with_fused_head

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def training_step(config, method: str = "lora", rank: int = 16, target_modules=ALL_LINEAR, batch: int = 1,
                  seq: int = 512, optimizer: str = "adamw", dtype: str = "bfloat16", autocast: bool = False,
                  checkpointing: bool = False, dropout: float = 0.0, device: str = "cpu", loss: str = "whole",
                  adapter_dtype: str = "float32", upcast: str = "all") -> Callable[[], None]:
    """Make a model, its data and its optimizer; return the function that runs one step of training on them.

    Call it inside `with fake():` for a step to trace (``measure(step)``), outside for one that really runs.

    Args:
        config: a `LlamaConfig` (our decoder, our LoRA layers), or a config of transformers' (its causal language model,
            adapters by PEFT; both must be installed).
        method: "full": every weight trains; "lora": only adapters; "qlora": adapters on a 4-bit base (of
            transformers': by bitsandbytes, which must be installed).
        rank, target_modules, dropout: LoRA's, as in `LoRAConfig`.
        batch, seq: rows, and tokens in each.
        optimizer: a name in `optimizers.OPTIMIZERS`.
        dtype: of the weights; adapters are fp32, which is the default of both stacks.
        autocast: run the forward under bf16 autocast (mixed precision: with fp32 weights).
        checkpointing: recompute each layer in backward.
        loss, adapter_dtype, upcast: of transformers' models, as in `run.Training`; loss "whole" or "chunked".
        device: where a step that really runs has its tensors; fake ones are the CPU's, whatever they follow.

    Raises:
        ValueError: an unknown name, a size below 1 or above the context, or a package missing.
    """
    for what, value, known in (("method", method, METHODS), ("optimizer", optimizer, OPTIMIZERS),
                               ("dtype", dtype, DTYPES), ("adapter_dtype", adapter_dtype, DTYPES),
                               ("loss", loss, ("whole", "chunked")), ("upcast", upcast, ("all", "none"))):
        if value not in known:
            near = get_close_matches(str(value), known, n=1)
            raise ValueError(f"no {what} {value!r}, expected one of {', '.join(known)}"
                             + (f"; near: {near[0]}" if near else ""))
    for what, value in (("batch", batch), ("seq", seq)):
        if type(value) is not int or not 1 <= value < 2**31:
            raise ValueError(f"{what} must be a positive integer below 2^31, got {quoted(value)}")
    if seq > (context := getattr(config, "max_position_embeddings", None) or seq):
        raise ValueError(f"seq {seq} is longer than the model's context of {context}")
    lora = LoRAConfig(rank, 2 * rank, target_modules, dropout) if method != "full" else None
    ours = isinstance(config, LlamaConfig)
    theirs = {"chunked": loss == "chunked", "adapters": DTYPES[adapter_dtype], "upcast": upcast == "all"}
    if ours and (loss, adapter_dtype, upcast) != ("whole", "float32", "all"):
        raise ValueError("loss, adapter_dtype and upcast are of transformers' models, and this is ours")
    with torch.device(device):
        model, loss_of = (our_model if ours else partial(hugging_face_model, **theirs))(
            config, lora, DTYPES[dtype], checkpointing, method == "qlora")
        ids, targets = (torch.randint(config.vocab_size, (batch, seq)) for _ in range(2))  # (B, T)
    opt = OPTIMIZERS[optimizer].make([p for p in model.train().parameters() if p.requires_grad], 1e-3)

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
            value = loss_of(model, ids, targets)
        value.backward()
        opt.step()
        opt.zero_grad()

    return step


def our_model(config: LlamaConfig, lora: LoRAConfig | None, dtype: torch.dtype, checkpointing: bool, four_bit: bool):
    model = Llama(config).to(dtype)
    if four_bit:
        quantise_model(model)
    if lora:
        inject(model, lora)
    model.model.checkpointing = checkpointing
    return model, masked_cross_entropy


def hugging_face_model(config, lora: LoRAConfig | None, dtype: torch.dtype, checkpointing: bool, four_bit: bool,
                       chunked: bool = False, adapters: torch.dtype = torch.float32, upcast: bool = True):
    peft, transformers = require_hugging_face("peft"), require_hugging_face("transformers")
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"expected a LlamaConfig or the config of a causal language model of transformers', "
                         f"got a {type(config).__name__}")
    config = copy.deepcopy(config)
    config.use_cache = False  # training keeps no keys and values
    if isinstance(torch.empty(0), FakeTensor):  # there is nothing to initialise, and some code would never end
        from transformers.initialization import no_init_weights

        with no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if four_bit:
        model = bitsandbytes_model(model, dtype)
        model = peft.prepare_model_for_kbit_training(model, False) if upcast else model.requires_grad_(False)
    if lora:
        targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
        names = [name for name, _ in model.named_modules()]
        for target in () if isinstance(targets, str) else targets:  # PEFT passes one over if another matches
            if not any(entry_matches(target, name) for name in names):
                raise ValueError(f"target {quoted(target)} matches no module of the architecture")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha,
                                                           target_modules=targets, lora_dropout=lora.dropout))
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.to(adapters)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if chunked:
        with_fused_head(model)
        return model, lambda model, ids, targets: model(input_ids=ids, labels=targets)
    return model, lambda model, ids, targets: model(input_ids=ids, labels=targets).loss


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


def require_hugging_face(package: str) -> Any:
    """The package, which minilora does without elsewhere."""
    return require_package(package, "tracing a Hugging Face architecture needs transformers and peft, for qlora "
                                    "bitsandbytes too")


def read_architecture(folder: str | Path):
    """transformers' config of the architecture in a folder's config.json."""
    file = Path(folder) / "config.json" if Path(folder).is_dir() else Path(folder)
    if not file.is_file():
        raise ValueError(f"there is no {file}; expected the folder of a Hugging Face model, with a config.json")
    transformers = require_hugging_face("transformers")
    transformers.logging.set_verbosity_error()
    return transformers.AutoConfig.from_pretrained(file)
