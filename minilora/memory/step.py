"""The standard training step to trace, of our decoder or of a Hugging Face architecture with PEFT."""

from collections.abc import Callable

import torch
from torch import nn

from ..config import LoRAConfig
from ..insert import inject
from ..llama import Llama, LlamaConfig
from ..train import reply_loss

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-3),
}
METHODS = ("full", "lora", "qlora")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def training_step(config, method: str = "lora", rank: int = 8, target_modules="all-linear", batch: int = 1, seq: int = 128,
                  optimizer: str = "adamw", dtype: str = "bfloat16", autocast: bool = False, checkpointing: bool = False,
                  dropout: float = 0.0) -> Callable[[], None]:
    """A model, its data and optimizer, and the function that runs one step of training on them.

    Call it inside `with fake():` for a step to trace (`measure(step)`), outside for one that really runs.

    Args:
        config: a `LlamaConfig` of ours (our decoder and LoRA layers), or a config of transformers' (its model of
            ``AutoModelForCausalLM``, with adapters by PEFT; both must be installed).
        method: "full": every weight trains; "lora": only adapters; "qlora": adapters on a 4-bit base.
        dtype: of the weights; adapters are fp32, as both implementations make them.
        autocast: run the forward under bf16 autocast, as mixed precision does.
        dropout: LoRA's.

    Raises:
        ValueError: an unknown name, a size below 1, or transformers or peft missing.
    """
    for what, value, known in (("method", method, METHODS), ("optimizer", optimizer, OPTIMIZERS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"no {what} {value!r}, expected one of {', '.join(known)}")
    for what, value in (("batch", batch), ("seq", seq)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{what} must be a positive integer, got {value!r}")
    if method == "qlora":
        raise ValueError("qlora is not there yet")
    build = our_model if isinstance(config, LlamaConfig) else hugging_face_model
    model, loss_of = build(config, method, rank, target_modules, DTYPES[dtype], checkpointing, dropout)
    model.train()
    opt = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    ids, targets = (torch.randint(0, config.vocab_size, (batch, seq)) for _ in range(2))  # (B, T)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, ids, targets)
        loss.backward()
        opt.step()
        opt.zero_grad()

    return step


def our_model(config, method, rank, target_modules, dtype, checkpointing, dropout) -> tuple[nn.Module, Callable]:
    model = Llama(config, seed=0).to(dtype)
    if method == "lora":
        inject(model, LoRAConfig(rank, 2 * rank, target_modules, dropout))
    model.model.checkpointing = checkpointing
    return model, reply_loss


def hugging_face_model(config, method, rank, target_modules, dtype, checkpointing, dropout) -> tuple[nn.Module, Callable]:
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
    except ImportError as e:
        raise ValueError(f"to trace a Hugging Face architecture install transformers and peft: {e}") from None
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if method == "lora":
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=dropout,
                                                 task_type="CAUSAL_LM"))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if method == "lora":
            model.enable_input_require_grads()
    return model, lambda model, ids, targets: model(input_ids=ids, labels=targets).loss
