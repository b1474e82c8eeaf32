"""Whose code runs a step: what each stack does that the others do not. A new stack is one more entry.

What a stack's code decides is a field of `Stack`. What its user may change is a field of `run.Training`; `defaults`
says how the stack's current release sets it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stack:
    """What a stack decides, as plain facts; who plays them is named beside each.

    Attributes:
        versions: what was read, for the first line of an answer.
        own_decoder: our decoder runs where it is the family's (`Family.own_decoder`), else transformers' (`simulate`).
        linear: whose adapted linear, a name in `linears.LINEARS`.
        peft: adapters are PEFT's: ``adapter_dtype``, ``upcast`` and ``kernels`` can be asked for, and under
            checkpointing with a frozen base the embedding's output asks for a gradient, by `enable_input_require_grads`
            (`decoders.hugging_face`).
        shift: what the whole loss moves by one token, "labels" or "logits" (`losses`).
        keeps_logits: the 16-bit logits are held while the loss is computed.
        reentrant: checkpoints are (`Ledger.checkpoint_as_one_node`).
        fsdp1: weights on several cards are gathered as by torch's first FSDP (`fsdp`); else two layers at all times.
        old_mistral: Mistral's attention makes rotary tables a layer and repeats keys and values (`decoders.mistral`).
        offloads: checkpointed layers' inputs wait on the host.
        defaults: how its current release sets the fields of `Training`. qlora: and on a 4-bit base.
    """

    versions: str
    own_decoder: bool = False
    linear: str = "peft"
    peft: bool = True
    shift: str = "labels"
    keeps_logits: bool = True
    reentrant: bool = False
    fsdp1: bool = False
    old_mistral: bool = False
    offloads: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)
    qlora: Mapping[str, object] = field(default_factory=dict)


TODAY = "transformers 5.23, peft 0.21"
# Trainer and torch of the published measurements (`published`); flash-attn's own kernels, checkpointing as they set it
OF_THEIR_TIME = {"attention": "flash", "checkpointing": True, "upcast": "none"}
STACKS = {
    "minilora": Stack("this package", own_decoder=True, linear="minilora", peft=False),
    # Trainer and PEFT as they are: no checkpointing, no autocast. training_args.py: `optim` is fused AdamW; peft_model:
    # `autocast_adapter_dtype=True`. On a 4-bit base as PEFT's guide has it, with `prepare_model_for_kbit_training`
    "transformers": Stack(TODAY, defaults={"optimizer": "adamw_fused"}, qlora={"checkpointing": True}),
    # SFTTrainer: trainer/base_config.py: `gradient_checkpointing` and `bf16` are True; sft_trainer.py:
    # `add_fused_lm_head`, the loss by tiles of logits; adapters on a 4-bit base go to bf16, nothing is upcast
    "trl": Stack(f"trl 1.16, {TODAY}",
                 defaults={"checkpointing": True, "autocast": True, "loss": "chunked", "optimizer": "adamw_fused",
                           "upcast": "none"},
                 qlora={"adapter_dtype": "bfloat16"}),
    # models/llama.py `get_peft_model`: use_gradient_checkpointing="unsloth" sends layers' inputs to the host; its
    # kernels for norm, rotary positions and adapters; its loss by chunks; optimizer "adamw_8bit" in its notebooks
    "unsloth": Stack(f"unsloth 2026.10, trl 1.16, {TODAY}", offloads=True,
                     defaults={"checkpointing": True, "autocast": True, "loss": "chunked", "optimizer": "adamw8bit",
                               "upcast": "none", "kernels": "unsloth"}),
    "transformers-4.48": Stack("transformers 4.48.1, peft 0.13.2, trl 0.13.0, torch 2.4.1, flash-attn 2.7",
                               shift="logits", reentrant=True, fsdp1=True, defaults=OF_THEIR_TIME),
    "transformers-4.45": Stack("transformers 4.45.2, peft 0.13.2, trl 0.11.4, torch 2.4.1, flash-attn 2.7",
                               shift="logits", keeps_logits=False, reentrant=True, fsdp1=True, old_mistral=True,
                               defaults=OF_THEIR_TIME),
}
