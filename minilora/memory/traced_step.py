"""The standard training step to trace, of our decoder or of a Hugging Face architecture with PEFT."""

import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from difflib import get_close_matches
from functools import partial
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import ALL_LINEAR, LoRAConfig
from ..injection import inject
from ..llama import Llama, LlamaConfig
from ..losses import masked_cross_entropy
from ..quant import quantise_model  # here, not on fake tensors: its levels are computed when it is imported
from ..tables import quoted
from .optimizers import OPTIMIZERS
from .run import METHODS, ROWS
from .traced_models import hugging_face_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# attention that a trace follows -> the kernels that torch then has to choose from
KERNELS = {"fused": (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
           "efficient": (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH), "plain": (SDPBackend.MATH,)}
KERNELS["eager"] = KERNELS["fused"]
GROUPED = "transformers.integrations.moe"


def training_step(config, method: str = "lora", rank: int = 16, target_modules=ALL_LINEAR, batch: int = 1,
                  seq: int = 512, optimizer: str = "adamw", dtype: str = "bfloat16", autocast: bool = False,
                  checkpointing: bool = False, dropout: float = 0.0, device: str = "cpu", loss: str = "whole",
                  adapter_dtype: str = "float32", upcast: str = "all", attention: str = "fused",
                  rows: str = "equal", accumulation: int = 1, reference: bool = False,
                  dora: bool = False,
                  counted: Callable[[int], object] = lambda count: None) -> Callable[[], None]:
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
        attention, rows, accumulation: as in `run.Training`; attention not "flash".
        reference: a forward without adapters, or through a frozen copy, follows each forward (`run.Training`).
        dora: adapters have a magnitude too.
        counted: is told the number of the parameters of a model of transformers', adapters left out.
        device: where a step that really runs has its tensors; fake ones are the CPU's, whatever they follow.

    Raises:
        ValueError: an unknown name, a size below 1 or above the context, or a package missing.
    """
    for what, value, known in (("method", method, METHODS), ("optimizer", optimizer, OPTIMIZERS),
                               ("dtype", dtype, DTYPES), ("adapter_dtype", adapter_dtype, DTYPES),
                               ("loss", loss, ("whole", "chunked")), ("upcast", upcast, ("all", "none")),
                               ("attention", attention, KERNELS), ("rows", rows, ROWS)):
        if value not in known:
            near = get_close_matches(str(value), known, n=1)
            raise ValueError(f"no {what} {value!r}, expected one of {', '.join(known)}"
                             + (f"; near: {near[0]}" if near else ""))
    for what, value in (("batch", batch), ("seq", seq), ("accumulation", accumulation)):
        if type(value) is not int or not 1 <= value < 2**31:
            raise ValueError(f"{what} must be a positive integer below 2^31, got {quoted(value)}")
    if seq > (context := getattr(config, "max_position_embeddings", None) or seq):
        raise ValueError(f"seq {seq} is longer than the model's context of {context}")
    lora = LoRAConfig(rank, 2 * rank, target_modules, dropout, use_dora=dora) if method != "full" else None
    ours = isinstance(config, LlamaConfig)
    theirs = {"chunked": loss == "chunked", "adapters": DTYPES[adapter_dtype], "upcast": upcast == "all",
              "attention": attention, "counted": counted}
    if ours and (loss, adapter_dtype, upcast, rows) != ("whole", "float32", "all", "equal") or (
            ours and attention == "eager"):
        raise ValueError("loss, adapter_dtype, upcast, rows and eager attention are of transformers' models, and this "
                         "is ours")
    with torch.device(device):
        model, loss_of = (our_model if ours else partial(hugging_face_model, **theirs))(
            config, lora, DTYPES[dtype], checkpointing, method == "qlora")
        frozen = (partial(hugging_face_model, **theirs | {"counted": lambda count: None})(
            config, None, DTYPES[dtype], False, False)[0].requires_grad_(False)
            if reference and method == "full" else None)
        ids, targets = (torch.randint(words_of(config), (batch, seq)) for _ in range(2))  # (B, T)
    trained = [p for p in model.train().parameters() if p.requires_grad]
    opt = OPTIMIZERS[optimizer].make(trained, 1e-3)
    if isinstance(ids, FakeTensor):  # the optimizer's state is there, so that any step is like any other
        for p in trained:
            p.grad = torch.empty_like(p)
        opt.step()
        opt.zero_grad()

    def step() -> None:
        with ExitStack() as stack:
            if attention != "fused":
                stack.enter_context(sdpa_kernel(list(KERNELS[attention])))
            if attention == "efficient" and GROUPED in sys.modules:  # of cards before sm80, which have none
                stack.enter_context(patch(f"{GROUPED}._can_use_grouped_mm", lambda *_: False))
            for _ in range(accumulation):
                with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
                    value = loss_of(model, ids, targets, **masks(rows, ids))
                    scores = referred(frozen, model, loss_of, ids, targets, rows) if reference else None
                value.backward()
                del scores
        opt.step()
        opt.zero_grad()

    return step


@torch.no_grad()
def referred(frozen, model, loss_of: Callable, ids: torch.Tensor, targets: torch.Tensor, rows: str) -> torch.Tensor:
    """The scores of a reference model: a copy, or the model without its adapters."""
    with nullcontext() if frozen is not None else model.disable_adapter():
        return loss_of(model if frozen is None else frozen, ids, targets, **masks(rows, ids))


def masks(rows: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Which token sees which, as the model itself makes it of rows that are not alike, (B, 1, T, T): only here is it
    known that they are not, as fake tensors have no values."""
    batch, seq = ids.shape
    return {} if rows == "equal" else {"attention_mask": ids.new_ones(batch, 1, seq, seq, dtype=torch.bool)}


def words_of(config) -> int:
    """The size of a vocabulary; what a model of pictures is told are numbers below 2."""
    part = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(part, "vocab_size", None) or 2


def our_model(config: LlamaConfig, lora: LoRAConfig | None, dtype: torch.dtype, checkpointing: bool, four_bit: bool):
    model = Llama(config).to(dtype)
    if four_bit:
        quantise_model(model)
    if lora:
        inject(model, lora)
    model.model.checkpointing = checkpointing
    return model, masked_cross_entropy
