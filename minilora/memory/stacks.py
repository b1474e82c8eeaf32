"""Whose code runs a step: what each stack does that the others do not. A new stack is one more entry."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    """What a stack decides, as plain facts; who plays them is named beside each.

    Attributes:
        own_decoder: our decoder runs where it is the family's (`Family.own_decoder`), else transformers' (`simulate`).
        linear: whose adapted linear, a name in `linears.LINEARS`.
        kbit_fp32: under qlora all that is no matrix of a layer is fp32, as PEFT's `prepare_model_for_kbit_training`
            makes it (`Run.outer_dtype`).
        input_gradients: under checkpointing with a frozen base the embedding's output asks for a gradient, by
            `enable_input_require_grads` (`decoders.hugging_face`).
    """

    own_decoder: bool
    linear: str
    kbit_fp32: bool
    input_gradients: bool


STACKS = {
    "minilora": Stack(own_decoder=True, linear="minilora", kbit_fp32=False, input_gradients=False),
    "transformers": Stack(own_decoder=False, linear="peft", kbit_fp32=True, input_gradients=True),
}
