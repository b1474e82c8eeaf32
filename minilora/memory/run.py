"""What is asked: a training step (`Training`) or the answer to prompts (`Serving`), checked when it is made."""

from collections.abc import Iterable
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar

from ..config import is_number
from .config_file import suggest
from .families import Bare, Linear
from .ledger import WIDTH
from .models import ModelSpec
from .optimizers import OPTIMIZERS
from .stacks import STACKS, Stack

METHODS = ("full", "lora", "qlora")
ATTENTION = ("fused", "efficient", "plain", "flash", "eager")
ROWS = ("equal", "padded", "packed")
BASES = ("device", "host", "disk")
LOSSES = ("whole", "chunked", "fused")
UPCASTS = ("all", "norms", "none")
KERNELS = ("torch", "unsloth")
QUANTISATIONS = ("nf4", "gptq")
# what the fields may be, by their names
KNOWN = {"method": METHODS, "optimizer": OPTIMIZERS, "dtype": WIDTH, "stack": STACKS, "attention": ATTENTION,
         "rows": ROWS, "base": BASES, "zero": (0, 1, 2, 3), "loss": LOSSES, "upcast": UPCASTS, "kernels": KERNELS,
         "adapter_dtype": WIDTH, "quantisation": QUANTISATIONS}
LEAST = {"rank": 1, "group": 0, "batch": 1, "seq": 1, "accumulation": 1, "cards": 1, "prompt": 1, "new": 0,
         "adapters": 0}


class Run:
    """What a decoder, the costs and the bill ask of a run; `Training` and `Serving` say it.

    What only a training step has is here as a run without it has it.
    """

    __dataclass_fields__: ClassVar[dict[str, Field]]
    method: str
    rank: int
    target_modules: str | tuple[str, ...] | None
    batch: int
    seq: int  # tokens of a row in the forward
    tokens: int  # that a row may come to have
    dtype: str
    double_quant: bool
    quantisation: str
    stack: str
    attention: str
    rows: str = "equal"
    autocast: bool = False
    loss: str = "whole"
    upcast: str = "all"
    kernels: str = "torch"
    adapter_dtype: str = "float32"
    checkpointing: bool = False
    dropout: float = 0.0
    accumulation: int = 1
    base: str = "device"
    offload: bool = False
    dora: bool = False

    def __post_init__(self):
        if isinstance(self.target_modules, Iterable) and not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for field in fields(self):
            value, least = getattr(self, field.name), LEAST.get(field.name)
            if known := KNOWN.get(field.name):
                if value not in known:
                    raise ValueError(f"no {field.name} {value!r}; {suggest(str(value), map(str, known))}")
            elif least is not None and (type(value) is not int or not least <= value < 2**31):
                raise ValueError(f"{field.name} must be an integer from {least} on, got {value!r}")
            elif isinstance(field.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be True or False, got {value!r}")

    def check(self, spec: ModelSpec) -> None:
        """Refuse what this model cannot do, and what of it is not priced."""
        spec.layout.check(self)
        if spec.quantised and (self.method != "qlora" or self.quantisation != spec.quantised):
            raise ValueError(f"{spec.name} is stored in 4 bits ({spec.quantised}): that is method qlora, quantisation "
                             f"{spec.quantised}, got method {self.method}, quantisation {self.quantisation}")
        if spec.context and self.tokens > spec.context:
            raise ValueError(f"{self.tokens} tokens are more than the context of {spec.name}, {spec.context}")
        for m in (m for kind, layers in spec.kinds() for m in self.targets(spec, layers[0])):
            if isinstance(m, Bare) and (self.dropout or self.dora):
                raise ValueError(f"PEFT adapts {m.name} of {spec.name}, which is no linear, without dropout and "
                                 "without DoRA alone: leave them out, or name the attention's matrices")
            if m.name in spec.layout.pairs and self.software.peft:
                raise ValueError(f"{m.name} of {spec.name} gives two tensors, and PEFT's adapter fails on it: name the "
                                 "other matrices, such as q_proj,k_proj,v_proj,o_proj")
            if isinstance(m, Linear) and self.rank > min(m.out, m.inp):
                raise ValueError(f"rank {self.rank} is larger than {m.name} allows: its weight is {m.out} x {m.inp}, "
                                 f"so at most {min(m.out, m.inp)}")
        if self.own_decoder(spec):
            if self.attention in ("flash", "eager"):
                raise ValueError(f"our decoder has fused attention alone; {self.attention} attention is of the other "
                                 "stacks, such as stack transformers")
            if self.rows == "packed":
                raise ValueError("our decoder has no mask between rows that are packed; rows packed is of the other "
                                 "stacks, such as stack trl")

    def targets(self, spec: ModelSpec, layer: int = -1) -> tuple[Linear | Bare, ...]:
        """The matrices of a layer that have an adapter."""
        return spec.targets(self.target_modules, layer, self.software.peft) if self.adapts else ()

    @property
    def adapts(self) -> bool:
        """Whether there are adapters."""
        raise NotImplementedError

    def own_decoder(self, spec: ModelSpec) -> bool:
        """Whether our decoder runs, not transformers'."""
        return self.software.own_decoder and spec.layout.own_decoder is not None

    @property
    def software(self) -> Stack:
        """What the stack's code decides."""
        return STACKS[self.stack]

    @property
    def streamed(self) -> bool:
        """Whether the base visits the device layer by layer."""
        return self.base != "device"

    @property
    def outer_dtype(self) -> str:
        """Of what is no matrix of a layer, and no norm."""
        return "float32" if self.upcasts and self.upcast == "all" else self.dtype

    @property
    def norm_dtype(self) -> str:
        return "float32" if self.upcasts and self.upcast != "none" else self.dtype

    @property
    def upcasts(self) -> bool:
        """Whether PEFT prepares the base for training in 4 bits."""
        return self.method == "qlora" and self.software.peft and self.quantisation == "nf4"


@dataclass(frozen=True)
class Training(Run):
    """A training step.

    Args:
        method: "full" (every weight trains), "lora", "qlora" (LoRA on a base whose linears, but for the head, are NF4).
        rank, target_modules, dropout: LoRA's, as in `LoRAConfig`; targets None: what PEFT adapts in this family.
        batch, seq: rows of one forward, and tokens in each.
        accumulation: forwards whose gradients are summed before the optimizer's step.
        optimizer: "adamw" (torch's foreach), "adamw_fused", "sgd", "momentum", "adafactor", "lion", "muon" (of
            adapters, which are matrices), or bitsandbytes'
            "adamw8bit", "paged_adamw" and "paged_adamw8bit", whose states may leave the device: here they have.
        dtype: of the weights ("bfloat16", "float16", "float32").
        adapter_dtype: of PEFT's adapters; ours are fp32.
        autocast: run the forward under 16-bit autocast (mixed precision: with fp32 weights).
        checkpointing: recompute each layer in backward instead of keeping its activations.
        quantisation: of qlora's base: "nf4" (ours, or bitsandbytes'), or "gptq" (4 bits; PEFT's stacks).
        double_quant: NF4's blocks' absmax in 8 bits too (QLoRA, section 3). group: weights of a column that share a
            scale in GPTQ, 0: all.
        stack: whose code runs, a name in `stacks.STACKS`: "minilora" (our decoder, or where we have none transformers',
            with our adapters), or "transformers", "trl", "unsloth" (transformers' decoder, PEFT's adapters, a 4-bit
            base by bitsandbytes). `of_stack` sets the rest as the stack's release does.
        loss: "whole" (all logits in fp32), "chunked" (TRL's: by tiles; ours: 512 tokens at a time), "fused" (Liger's).
        upcast: what is fp32 on a 4-bit base of PEFT's: "all" that is no matrix of a layer, as
            `prepare_model_for_kbit_training` makes it; "norms" alone, as trl 0.13 left it; "none".
        kernels: "torch", or "unsloth": its norm, rotary positions and loss, and on a 4-bit base its adapters.
        attention: "fused" (torch's own), "efficient" (torch's own on cards before sm80, which have no flash attention:
            its memory-efficient kernel, for grouped heads the plain one), "plain" (torch's with all scores in memory),
            "flash" (the package flash-attn, whose scratch is in torch's allocator), or "eager" (transformers' own, all
            scores in memory). Gemma-2 and BLOOM have only that.
        rows: "equal", or "padded" or "packed" from examples of unequal lengths: the mask that tells them apart keeps
            torch's attention from its flash kernel.
        cards: on how many the step runs, each with a batch of its own; the bill is of one card.
        zero: what they share out: 0 nothing (DistributedDataParallel), 1 optimizer states, 2 gradients too, 3 weights
            too (ZeRO, 1910.02054; FSDP is stage 3).
        base: where frozen weights live: on the "device"; or in the "host"'s memory or on "disk", from where each layer
            visits the device in forward and again in backward (`stream.py`). Needs a frozen base and checkpointing.
        dora: adapters have a magnitude too, and every forward makes the whole weight for its norms (2402.09353).
        reference_model: a forward through frozen weights stands between forward and backward, as in DPO: with adapters
            through the same base, else through a second copy. `batch` counts rows: a pair of answers is two.
        offload: a streamed run's saved inputs, one a layer, wait for backward in the host's memory too.

    Raises:
        ValueError: an unknown name (near ones are listed), or a size that makes no sense.
    """

    method: str = "lora"
    rank: int = 16
    target_modules: str | tuple[str, ...] | None = None
    batch: int = 1
    seq: int = 512
    accumulation: int = 1
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    autocast: bool = False
    checkpointing: bool = False
    dropout: float = 0.0
    quantisation: str = "nf4"
    double_quant: bool = True
    group: int = 128
    stack: str = "minilora"
    loss: str = "whole"
    adapter_dtype: str = "float32"
    upcast: str = "all"
    kernels: str = "torch"
    attention: str = "fused"
    rows: str = "equal"
    cards: int = 1
    zero: int = 0
    base: str = "device"
    offload: bool = False
    reference_model: bool = False
    dora: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.dora and (self.method != "lora" or not self.software.peft or self.kernels != "torch" or self.dropout
                          or self.cards > 1 or self.streamed or self.software.reentrant):
            raise ValueError("DoRA is priced as PEFT has it, on a base of 16 or 32 bits: method lora, stack trl or "
                             "transformers, one card, no dropout")
        if self.reference_model and (self.loss != "chunked" or not self.software.peft or self.kernels != "torch"
                                     or self.software.reentrant):
            raise ValueError("a reference model is priced as TRL's DPOTrainer has it: stack trl, loss chunked")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.zero and self.cards == 1:
            raise ValueError(f"zero {self.zero} shares a step out over several cards: cards must be 2 or more, got 1")
        if self.streamed and (self.method == "full" or not self.checkpointing or self.cards > 1):
            raise ValueError(f"a base on the {self.base} visits layer by layer: that needs a frozen base (method lora "
                             "or qlora), checkpointing, and one card")
        if self.offload and not self.streamed:
            raise ValueError("offload is of a streamed run: say base host or disk too")
        if self.optimizer == "muon" and self.method == "full":
            raise ValueError("torch's Muon takes matrices alone, and with method full norms train too: the usual mix "
                             "of Muon and AdamW is not priced; of adapters it is (method lora)")
        if not self.software.peft:
            for name, only in (("adapter_dtype", "float32"), ("kernels", "torch"), ("upcast", "all"),
                               ("quantisation", "nf4")):
                if getattr(self, name) != only:
                    raise ValueError(f"{name} {getattr(self, name)} is of stacks with PEFT's adapters, such as trl; "
                                     f"stack is {self.stack}")
            if self.loss == "fused":
                raise ValueError(f"loss fused is Liger's, for transformers' decoders; stack is {self.stack}")

    @classmethod
    def of_stack(cls, stack: str, **given) -> "Training":
        """A step as this stack's current release runs it, but for what is given."""
        if stack not in STACKS:
            raise ValueError(f"no stack {stack!r}; {suggest(str(stack), STACKS)}")
        software = STACKS[stack]
        by_method = software.qlora if given.get("method") == "qlora" else {}
        settings: dict[str, Any] = {**software.defaults, **by_method, "stack": stack, **given}
        return cls(**settings)

    @property
    def stored(self) -> dict[str, int]:
        """Part -> bytes of an element as it is kept: under mixed precision FSDP keeps what trains in fp32."""
        parts = ("trainable weights", "optimizer", "gradients", "optimizer temporaries")
        return dict.fromkeys(parts, 4) if self.software.fsdp1 and self.zero == 3 and self.autocast else {}

    def assumptions(self) -> str:
        """One line: the stack, its versions, and what it is taken to do."""
        says = [f"stack {self.stack} ({self.software.versions}): {self.dtype} weights",
                "autocast" if self.autocast else "no autocast"]
        if self.method != "full" and self.software.peft:
            says.append(f"{self.adapter_dtype} adapters")
        elif self.method != "full":
            says.append("float32 adapters")
        if self.upcasts:
            says.append({"all": "embedding, norms and head in fp32", "norms": "norms in fp32",
                         "none": "nothing upcast"}[self.upcast])
        says += [f"loss {'in chunks' if self.loss == 'chunked' else self.loss}", f"optimizer {self.optimizer}",
                 f"{self.attention} attention", "checkpointing" if self.checkpointing else "no checkpointing"]
        says += ["a reference model"] * self.reference_model + ["DoRA"] * self.dora
        return ", ".join(says + [f"{self.kernels} kernels"] * (self.kernels != "torch"))

    @property
    def tokens(self) -> int:
        return self.seq

    @property
    def shares(self) -> dict[str, int]:
        """Part -> of how many cards each keeps a share. Gradients that accumulate are whole until exchanged."""
        if self.streamed:
            return {"frozen weights": 0}
        if self.software.fsdp1 and self.kernels == "unsloth" and self.method == "qlora":
            return {"frozen weights": self.cards}  # adapters stay whole (fms-acceleration: `ignored_modules`)
        sharded = (("optimizer", "optimizer temporaries"), ("gradients",) if self.accumulation == 1 else (),
                   ("frozen weights", "trainable weights", "adapters"))[:self.zero]
        return {part: self.cards for stage in sharded for part in stage}

    @property
    def adapts(self) -> bool:
        return self.method != "full"


@dataclass(frozen=True)
class Serving(Run):
    """Answering `batch` prompts at once.

    Args:
        batch, prompt, new: rows, tokens in each prompt, and tokens to come: the cache has room for all.
        adapters: how many are resident, each of `rank` on `target_modules`; 0: the base alone.
        four_bit: the base's linears are NF4.
        dtype, double_quant, stack, attention: as in `Training`.
    """

    batch: int = 1
    prompt: int = 512
    new: int = 512
    adapters: int = 0
    rank: int = 16
    target_modules: str | tuple[str, ...] | None = None
    four_bit: bool = False
    dtype: str = "bfloat16"
    double_quant: bool = True
    stack: str = "minilora"
    attention: str = "fused"

    def assumptions(self) -> str:
        """One line: the stack, its versions, and what it is taken to do."""
        return f"stack {self.stack} ({self.software.versions}): {self.dtype} weights, {self.attention} attention"

    @property
    def quantisation(self) -> str:
        return "nf4"

    @property
    def method(self) -> str:
        return "qlora" if self.four_bit else "lora"

    @property
    def seq(self) -> int:
        return self.prompt

    @property
    def tokens(self) -> int:
        return self.prompt + self.new

    @property
    def adapts(self) -> bool:
        return self.adapters > 0
