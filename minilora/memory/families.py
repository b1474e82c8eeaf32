"""What a family of decoders is: where its matrices are, how its config.json is read, who plays its step.

A family is a file of `decoders/`, read when a model of it is first asked for.
"""

import pkgutil
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .activations import ACTIVATIONS
from .config_file import Fields

if TYPE_CHECKING:
    from .models import ModelSpec


@dataclass(frozen=True)
class Linear:
    """One matrix of a layer; its weight is seen as (out, in).

    flat: its input has two dimensions, (tokens, in), so that torch needs no view of it.
    """

    name: str  # inside the layer
    out: int
    inp: int
    bias: bool
    flat: bool = False

    @property
    def parameters(self) -> int:
        return self.out * (self.inp + self.bias)

    def adapter(self, rank: int) -> int:
        """What a LoRA of this rank on it trains: rank (in + out) (LoRA, section 4.2)."""
        return rank * (self.inp + self.out)


@dataclass(frozen=True)
class Bare:
    """A parameter of a layer that is no linear's: of shape (count, out, in), or (out, in) where count is 1.

    No quantiser reaches it. PEFT adapts it where it was linears once, in transformers before 5, under their names
    (`peft.utils.transformers_weight_conversion`).

    Attributes:
        was: the linears' names. fused: how many of them it is; an adapter's rank is so many times as large.
        bias: a second parameter of (count, out) goes with it. transposed: its shape is (count, in, out).
    """

    name: str  # inside the layer
    count: int
    out: int
    inp: int
    was: tuple[str, ...] = ()
    fused: int = 1
    bias: bool = False
    transposed: bool = False

    @property
    def parameters(self) -> int:
        return self.count * self.out * (self.inp + self.bias)

    def adapter(self, rank: int) -> int:
        """What PEFT's adapter of this rank on it trains, one a matrix (`lora.ParamWrapper`)."""
        return rank * self.fused * self.count * (self.inp + self.out)


class NotPriced(ValueError):
    """A config that is right, of a model that has no closed form here."""


class Family:
    """A Hugging Face architecture: where it keeps its matrices, how its config.json is read, who plays its step.

    A family is a subclass in a file of `decoders/`, registered by `@register`; it says what differs from this one.
    """

    model_type: str
    decoder: type  # the `decoders.decoder.Decoder` of transformers' code
    own_decoder: type | None = None  # and of ours, where `llama.Llama` can be this family

    # where the matrices are
    layer: str  # what comes before a layer's number
    qkv: tuple[str, ...]  # three names, or one: fused
    out: str
    up: tuple[str, ...]  # two names (gate, up), or one: no gate, or both fused
    down: str
    targets: tuple[str, ...]  # what PEFT adapts when told nothing

    # what it does that others do not
    gated = False  # the MLP multiplies two projections
    rms = False  # RMSNorm, which has no bias; else LayerNorm
    grouped = False  # it may have fewer key/value heads than heads, and says how wide a head is
    biased = False  # every linear has a bias
    qkv_bias = False  # q, k and v have one even so
    norms = 2  # in a layer
    embedding_norm = False
    position_offset: int | None = None  # learned positions, the first in this row; None: it has no table of them

    # in config.json: what sizes are called there, fields that others call otherwise, and what holds if it is silent
    names: Mapping[str, str] = {}
    widens: int | None = None  # the MLP's width in hidden sizes
    tied = False
    activation, activation_field = "silu", "hidden_act"
    dropout, dropout_field = 0.0, "hidden_dropout"  # of what goes into the residual stream
    attention_dropout, attention_dropout_field = 0.0, "attention_dropout"
    attention_bias_field = mlp_bias_field = ""  # "": as `biased` says
    experts = False  # its layers have several MLPs, and a token goes through some of them
    pairs: tuple[str, ...] = ()  # linears whose output is a pair, which PEFT's adapter cannot take
    stacked: tuple[str, ...] = ()  # where all experts' gate and up are, and where their down is
    window: int | None = None  # how many tokens back it sees, if its config is silent; 0: to the first; None: always

    def linears(self, spec: "ModelSpec") -> tuple[Linear, ...]:
        """The matrices of one layer, in the order in which the layer uses them."""
        return (*self.attention_linears(spec), *self.mlp_linears(spec))

    def attention_linears(self, spec: "ModelSpec") -> tuple[Linear, ...]:
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        outs = (q, kv, kv) if len(self.qkv) == 3 else (q + 2 * kv,)
        return (*(Linear(name, out, spec.hidden, spec.qkv_bias) for name, out in zip(self.qkv, outs)),
                Linear(self.out, spec.hidden, q, spec.out_bias))

    def mlp_linears(self, spec: "ModelSpec") -> tuple[Linear, ...]:
        ups = spec.ffn * (1 + (self.gated and len(self.up) == 1))
        return (*(Linear(name, ups, spec.hidden, spec.mlp_bias) for name in self.up),
                Linear(self.down, spec.hidden, spec.ffn, spec.mlp_bias))

    def bare(self, spec: "ModelSpec") -> tuple[Bare, ...]:
        """The parameters of one layer that are no linears and no norms, such as experts."""
        return ()

    def matrices(self, spec: "ModelSpec") -> tuple[Linear | Bare, ...]:
        """Both, in the order in which the layer registers them."""
        return (*self.linears(spec), *self.bare(spec))

    def at(self, spec: "ModelSpec", layer: int) -> "ModelSpec":
        """The model as this layer has it, where layers do not have the same matrices."""
        return spec

    def extra_norms(self, spec: "ModelSpec") -> dict[str, int]:
        """Norms inside a layer that are not as wide as the residual stream: name -> width."""
        return {}

    def kind(self, spec: "ModelSpec", layer: int) -> object:
        """What tells a layer's step from another's; where all say the same, layers are alike."""
        return spec.pattern[layer] if spec.pattern else None

    def remarks(self, spec: "ModelSpec", run: Any) -> list[str]:
        """What a reader of the bill must know of this family's step."""
        return []

    def check(self, run: Any) -> None:
        """Refuse what of this family's step is not priced."""

    def read(self, config: Fields) -> dict[str, Any]:
        """A config.json as the sizes of a `ModelSpec`.

        Raises:
            ValueError: a field that is missing or makes no sense.
        """
        hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
        kv_heads = config.size("num_key_value_heads", heads) if self.grouped else heads
        if "head_dim" not in config.config and hidden % heads:
            raise ValueError(f"{config.name}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
        if heads % kv_heads:
            raise ValueError(f"{config.name}: num_attention_heads {heads} is no multiple of num_key_value_heads "
                             f"{kv_heads}")
        learned = self.position_offset is not None  # then the table has a row for each position
        context = config.size("max_position_embeddings", None if learned else 0)
        bias = config.flag(self.attention_bias_field, self.biased) if self.attention_bias_field else self.biased
        return {
            "layers": config.size("num_hidden_layers"), "hidden": hidden, "heads": heads, "kv_heads": kv_heads,
            "head_dim": config.size("head_dim", hidden // heads) if self.grouped else hidden // heads,
            "ffn": config.size("intermediate_size", self.widens and self.widens * hidden),
            "vocab": config.size("vocab_size"), "context": context,
            "tied": config.flag("tie_word_embeddings", self.tied),
            "positions": context + config.size("position_offset", self.position_offset, 0) if learned else 0,
            "qkv_bias": bias or self.qkv_bias, "out_bias": bias,
            "mlp_bias": config.flag(self.mlp_bias_field, False) if self.mlp_bias_field else bias and self.biased,
            "activation": config.word(self.activation_field, self.activation, tuple(ACTIVATIONS)),
            "window": config.window(self.window) if self.window is not None else 0,
            "dropout": config.share(self.dropout_field, self.dropout),
            "attention_dropout": config.share(self.attention_dropout_field, self.attention_dropout)}


class Families(MutableMapping[str, Family]):
    """model_type -> family: those in files of `decoders/`, each read when it is first asked for, and any set here."""

    # files that families share
    no_family = ("decoder", "experts", "hugging_face", "latent", "minilora", "several_kinds")
    unlisted = ("mixtral_until_4",)  # no config.json calls itself so

    def __init__(self):
        self.read: dict[str, Family] = {}

    @cached_property
    def files(self) -> tuple[str, ...]:
        found = (m.name for m in pkgutil.iter_modules([str(Path(__file__).parent / "decoders")]))
        return tuple(name for name in found if name not in self.no_family)

    def __getitem__(self, kind: str) -> Family:
        if kind not in self.read and kind in self.files:
            import_module(f"{__package__}.decoders.{kind}")  # it registers itself
        return self.read[kind]

    def __setitem__(self, kind: str, family: Family) -> None:
        self.read[kind] = family

    def __delitem__(self, kind: str) -> None:
        del self.read[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self.read or kind in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(name for name in dict.fromkeys((*self.files, *self.read)) if name not in self.unlisted)

    def __len__(self) -> int:
        return len(list(iter(self)))


FAMILIES = Families()


def register(family: type[Family]) -> type[Family]:
    """Decorator: make a family known under its model_type."""
    FAMILIES[family.model_type] = family()
    return family
