"""The shape of a decoder, from which every byte of the bill follows: read from a ``config.json``, or a preset.

A `Family` knows under which names Hugging Face keeps a decoder's matrices and how its config.json is read. With the
sizes (`ModelSpec`) it gives every matrix, so the exact parameter total, and what an adapter on any of them costs.
"""

import pkgutil
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from ..config import ALL_LINEAR, LoRAConfig
from ..tables import plain, quoted
from .activations import ACTIVATIONS
from .config_file import Fields, read_config, read_quantisation, suggest
from .presets import CONFIGS

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


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


class NotPriced(ValueError):
    """A config that is right, of a model that has no closed form here."""


# ---------------------------------------------------------------- families


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
    window: int | None = None  # how many tokens back it sees, if its config is silent; 0: to the first; None: always

    def linears(self, spec: "ModelSpec") -> tuple[Linear, ...]:
        """The matrices of one layer, in the order in which the layer uses them."""
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        outs = (q, kv, kv) if len(self.qkv) == 3 else (q + 2 * kv,)
        ups = spec.ffn * (1 + (self.gated and len(self.up) == 1))
        return (*(Linear(name, out, spec.hidden, spec.qkv_bias) for name, out in zip(self.qkv, outs)),
                Linear(self.out, spec.hidden, q, spec.out_bias),
                *(Linear(name, ups, spec.hidden, spec.mlp_bias) for name in self.up),
                Linear(self.down, spec.hidden, spec.ffn, spec.mlp_bias))

    def extra_norms(self, spec: "ModelSpec") -> dict[str, int]:
        """Norms inside a layer that are not as wide as the residual stream: name -> width."""
        return {}

    def kind(self, spec: "ModelSpec", layer: int) -> object:
        """What tells a layer's step from another's; where all say the same, layers are alike."""
        return spec.pattern[layer] if spec.pattern else None

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

    no_family = ("decoder", "hugging_face", "minilora", "several_kinds")  # files that families share
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


# ---------------------------------------------------------------- shapes


@dataclass(frozen=True)
class ModelSpec:
    """A decoder's shape.

    Attributes:
        name: for people. family: Hugging Face's model_type.
        layers, hidden, heads, kv_heads, head_dim, ffn, vocab: sizes; kv_heads < heads is grouped-query attention.
        context: the longest sequence; 0 where nothing bounds it (ALiBi without a stated length).
        tied: the output head is the token embedding.
        positions: rows of a learned position table, 0 without one.
        activation: as config.json calls it.
        dropout, attention_dropout: of what is added to the residual stream, and of attention's weights.
        embedding: width of the token embedding; hidden, but in OPT-350M.
        last_norm: whether a norm stands before the head (all but OPT-350M).
        experts, experts_a_token: MLPs of a layer, and how many of them a token goes through; 0: there is one MLP.
        quantised: how its linears are stored, if in 4 bits, "nf4" or "gptq"; group: weights to a scale in GPTQ, 0: all
            of a column.
        window: how many tokens back its attention sees, 0: to the first; pattern: the kind of each layer, where
            there are several; rotary: the share of a head that turns; qk_norm: q and k have norms, where a family
            leaves that open.
    """

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    tied: bool
    positions: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    embedding: int = 0
    last_norm: bool = True
    experts: int = 0
    experts_a_token: int = 0
    quantised: str = ""
    group: int = 0
    window: int = 0
    pattern: tuple[str, ...] = ()
    rotary: float = 1.0
    qk_norm: bool = False

    def __post_init__(self):
        object.__setattr__(self, "embedding", self.embedding or self.hidden)

    @property
    def layout(self) -> Family:
        return FAMILIES[self.family]

    def linears(self) -> tuple[Linear, ...]:
        """The matrices of one layer, in the order in which the layer uses them."""
        return self.layout.linears(self)

    @property
    def norm_parameters(self) -> int:
        """Of one norm."""
        return self.hidden * (1 if self.layout.rms else 2)

    @property
    def layer_parameters(self) -> int:
        extra = sum(self.layout.extra_norms(self).values())
        return sum(m.parameters for m in self.linears()) + self.layout.norms * self.norm_parameters + extra

    @property
    def outer_parameters(self) -> int:
        """What stands outside the layers: embeddings, their norm, the last norm, the head."""
        tables = self.vocab * self.embedding * (1 if self.tied else 2) + self.positions * self.hidden
        projections = 2 * self.hidden * self.embedding * (self.embedding != self.hidden)
        return tables + projections + self.norm_parameters * (self.last_norm + self.layout.embedding_norm)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.outer_parameters

    def targets(self, wanted: str | Iterable[str] | None = None) -> tuple[Linear, ...]:
        """The matrices of a layer that LoRA adapts, by the rules of `LoRAConfig.target_modules`.

        None means what PEFT adapts by default in this family.

        Raises:
            ValueError: a target that matches no matrix, or not the same ones in every layer.
        """
        return adapted(self, wanted if wanted is None or isinstance(wanted, str) else tuple(wanted))

    def lora_parameters(self, rank: int, wanted: str | Iterable[str] | None = None) -> int:
        """What a LoRA of this rank trains: rank (in + out) a matrix (LoRA, section 4.2)."""
        return self.layers * sum(rank * (m.inp + m.out) for m in self.targets(wanted))

    @classmethod
    def preset(cls, name: str) -> "ModelSpec":
        """A known model by its name.

        Raises:
            ValueError: no such preset; near names are listed.
        """
        if name not in PRESETS:
            raise ValueError(f"no model {name!r}; " + suggest(name, PRESETS) + " (`models` lists all; or give a folder "
                             "with a config.json)")
        return PRESETS[name]

    @classmethod
    def from_config(cls, source: str | Path | Mapping, family: str | None = None, name: str = "config") -> "ModelSpec":
        """Read a Hugging Face ``config.json``: a folder that has one, the file itself, or its contents as a dict.

        Args:
            family: read it as this model_type, whatever it says of itself.
            name: what to call contents that do not say their name.

        Raises:
            ValueError: no file, no JSON, an unknown family, a field missing or of a nonsense value: each by name.
        """
        config, name = (source, name) if isinstance(source, Mapping) else read_config(Path(source))
        kind = family or config.get("model_type")
        if not isinstance(kind, str):
            raise ValueError(unknown_family(kind, config, name))
        if kind not in FAMILIES:
            raise NotPriced(unknown_family(kind, config, name))
        experts = None if FAMILIES[kind].experts else next((field for field in EXPERTS if config.get(field)), None)
        if experts:
            raise NotPriced(f"{name}: {experts} is {quoted(config[experts])}; layers of several experts are not "
                            "priced")
        named = config["architectures"][:1] if isinstance(config.get("architectures"), list) else []
        named = named[0] if named else None
        if isinstance(named, str) and "For" in named and "ForCausalLM" not in named:
            raise NotPriced(f"{name}: {plain(named, 80)} is no causal language model; other kinds have no closed form")
        sizes = FAMILIES[kind].read(Fields(config, name, kind, FAMILIES[kind].names))
        sizes |= read_quantisation(config.get("quantization_config"), name)
        return cls(name=plain(config.get("_name_or_path") or name, 80), family=kind, **sizes)


@lru_cache(maxsize=256)  # one bill asks for it thirty times, and every layer's names are looked at
def adapted(spec: ModelSpec, wanted: str | tuple[str, ...] | None) -> tuple[Linear, ...]:
    linears = spec.linears()
    if wanted == ALL_LINEAR:
        return linears
    config = LoRAConfig(target_modules=spec.layout.targets if wanted is None else wanted)  # pyright: ignore[reportArgumentType]
    short = [m.name.rpartition(".")[2] for m in linears]
    for entry in [wanted] if isinstance(wanted, str) else config.target_modules:
        one = LoRAConfig(target_modules=entry if isinstance(wanted, str) else (entry,))
        hits = [{m for m in linears if one.matches(f"{spec.layout.layer}{i}.{m.name}")} for i in range(spec.layers)]
        if not any(hits):
            near = get_close_matches(entry.lower(), [*short, ALL_LINEAR], 3, 0.5)
            raise ValueError(f"target {entry!r} matches no linear of a layer of {spec.name}; "
                             + (f"near it: {', '.join(near)}" if near else f"there are: {', '.join(short)}"))
        if any(h != hits[0] for h in hits):
            raise ValueError(f"target {entry!r} means other matrices in one layer than in another; the bill is "
                             f"made for layers that are alike. There are: {', '.join(short)}")
    return tuple(m for m in linears if config.matches(f"{spec.layout.layer}0.{m.name}"))


def unknown_family(kind: object, config: Mapping, name: str) -> str:
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    lacks = [field for field in needed if field not in config]
    what = "says no model_type" if kind is None else f"is of model_type {quoted(kind)}"
    if any(config.get(field) for field in EXPERTS):
        return f"{name} {what}; layers of several experts are not priced"
    read = (f"as a llama it lacks {', '.join(lacks)}" if lacks else "it has all sizes of a llama: if it is built as "
            "one, say family llama (--family llama)")
    if isinstance(config.get("text_config"), Mapping):
        read = "its decoder stands in text_config: give that part alone"
    return f"{name} {what}; {suggest(str(kind), FAMILIES)}; {read}"


class Presets(Mapping[str, ModelSpec]):
    """Name -> shape, read from `presets.CONFIGS` when it is first asked for."""

    def __init__(self):
        self.read: dict[str, ModelSpec] = {}

    def __getitem__(self, name: str) -> ModelSpec:
        if name not in self.read:
            self.read[name] = ModelSpec.from_config(CONFIGS[name] | {"_name_or_path": name})
        return self.read[name]

    def __contains__(self, name: object) -> bool:
        return name in CONFIGS

    def __iter__(self) -> Iterator[str]:
        return iter(CONFIGS)

    def __len__(self) -> int:
        return len(CONFIGS)


PRESETS = Presets()
