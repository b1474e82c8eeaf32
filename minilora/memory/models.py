"""The shape of a decoder, from which every byte of the bill follows: read from a ``config.json``, or a preset.

A `Family` knows under which names Hugging Face keeps a decoder's matrices and how its config.json is read. With the
sizes (`ModelSpec`) it gives every matrix, so the exact parameter total, and what an adapter on any of them costs.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from ..config import ALL_LINEAR, LoRAConfig
from ..tables import plain, quoted
from .config_file import Fields, read_config, read_quantisation, suggest
from .families import FAMILIES, Bare, Linear, NotPriced
from .families import Family as Family
from .families import register as register
from .presets import CONFIGS

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


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
        expert_ffn, shared_ffn: the width of such an MLP, and of one beside them that every token goes through.
        groups: that experts are in, where a token chooses groups first. norm_shares: whether the shares of a token's
            experts are made to sum to one.
        q_rank, kv_rank: widths through which q, and k and v, are made (DeepSeek's latent attention), 0: none;
            rope_dim: how much of a head turns there; value_dim: of a head of v, 0: head_dim.
        quantised: how its linears are stored, if in 4 bits, "nf4" or "gptq"; group: weights to a scale in GPTQ, 0: all
            of a column.
        window: how many tokens back its attention sees, 0: to the first; pattern: the kind of each layer, where
            there are several; rotary: the share of a head that turns; qk_norm: q and k have norms, where a family
            leaves that open; scaled_queries: q is scaled by its position, where it does not turn (Llama 4).
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
    scaled_queries: bool = False
    expert_ffn: int = 0
    shared_ffn: int = 0
    groups: int = 0
    norm_shares: bool = True
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    value_dim: int = 0

    def __post_init__(self):
        object.__setattr__(self, "embedding", self.embedding or self.hidden)
        if 0 < self.experts < self.experts_a_token:
            raise ValueError(f"{self.name}: a token goes through {self.experts_a_token} experts, and there are "
                             f"{self.experts}")

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

    def bare(self) -> tuple[Bare, ...]:
        """The parameters of one layer that are no linears and no norms, such as experts."""
        return self.layout.bare(self)

    def at(self, layer: int) -> "ModelSpec":
        """The model as this layer has it: what is said of one layer is said of this one."""
        return self.layout.at(self, layer)

    def kinds(self) -> list[tuple["ModelSpec", list[int]]]:
        """The kinds of layers, each as `at`, with the numbers of the layers that are of it."""
        if not self.pattern:
            return [(self, list(range(self.layers)))]
        numbers: dict[ModelSpec, list[int]] = {}
        pattern = self.pattern[:self.layers]
        for kind in dict.fromkeys(pattern):
            layers = [i for i, other in enumerate(pattern) if other == kind]
            numbers.setdefault(self.at(layers[0]), []).extend(layers)
        return list(numbers.items())

    @property
    def layer_parameters(self) -> int:
        """Of one layer."""
        extra = sum(self.layout.extra_norms(self).values())
        matrices = sum(m.parameters for m in (*self.linears(), *self.bare()))
        return matrices + self.layout.norms * self.norm_parameters + extra

    @property
    def outer_parameters(self) -> int:
        """What stands outside the layers: embeddings, their norm, the last norm, the head."""
        tables = self.vocab * self.embedding * (1 if self.tied else 2) + self.positions * self.hidden
        projections = 2 * self.hidden * self.embedding * (self.embedding != self.hidden)
        return tables + projections + self.norm_parameters * (self.last_norm + self.layout.embedding_norm)

    @property
    def parameters(self) -> int:
        return sum(len(layers) * kind.layer_parameters for kind, layers in self.kinds()) + self.outer_parameters

    def targets(self, wanted: str | Iterable[str] | None = None, layer: int = -1, by_peft: bool = True,
                ) -> tuple[Linear | Bare, ...]:
        """The matrices of a layer (the last, unless said) that LoRA adapts, by `LoRAConfig.target_modules`' rules.

        None means what PEFT adapts by default in this family. `by_peft`: as PEFT reads names that transformers 5 no
        longer has, so that stacked experts are adapted too.

        Raises:
            ValueError: a target that matches no matrix, or not the same ones in every layer.
        """
        wanted = wanted if wanted is None or isinstance(wanted, str) else tuple(wanted)
        return adapted(self, wanted, by_peft)[self.at(layer)]

    def lora_parameters(self, rank: int, wanted: str | Iterable[str] | None = None, by_peft: bool = True) -> int:
        """What a LoRA of this rank trains."""
        return sum(len(layers) * sum(m.adapter(rank) for m in self.targets(wanted, layers[0], by_peft))
                   for _, layers in self.kinds())

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


Targets = dict[ModelSpec, tuple[Linear | Bare, ...]]  # by kinds of layers


@lru_cache(maxsize=256)  # one bill asks for it thirty times, and every layer's names are looked at
def adapted(spec: ModelSpec, wanted: str | tuple[str, ...] | None, by_peft: bool) -> Targets:
    kinds = [(kind, kind.linears(), layers) for kind, layers in spec.kinds()]
    wanted = spec.layout.targets if wanted is None else wanted
    was = {name: stack for kind, _ in spec.kinds() for stack in kind.bare() for name in stack.was} if by_peft else {}
    stacks: set[str] = set()
    if was:
        wanted, stacks = renamed(spec, wanted, was)
    if wanted == ALL_LINEAR:
        return {kind: linears for kind, linears, _ in kinds}
    found: dict[ModelSpec, set[Linear]] = {kind: set() for kind, *_ in kinds}
    for entry in [wanted] if isinstance(wanted, str) else LoRAConfig(target_modules=wanted).target_modules if (
            wanted or not stacks) else ():
        one = LoRAConfig(target_modules=entry if isinstance(wanted, str) else (entry,))
        hits = {kind: [{m for m in linears if one.matches(f"{spec.layout.layer}{i}.{m.name}")} for i in layers]
                for kind, linears, layers in kinds}
        if not any(any(several) for several in hits.values()):
            raise no_such_target(spec, entry, was)
        if any(hit != several[0] for several in hits.values() for hit in several):
            raise ValueError(f"target {entry!r} means other matrices in one layer than in another; the bill is "
                             f"made for layers that are alike. There are: {', '.join(short_names(spec))}")
        for kind, several in hits.items():
            found[kind] |= several[0]
    return {kind: (*(m for m in linears if m in found[kind]), *(s for s in kind.bare() if s.name in stacks))
            for kind, linears, _ in kinds}


def renamed(spec: ModelSpec, wanted: str | tuple[str, ...], was: dict[str, Bare]) -> tuple[tuple[str, ...], set[str]]:
    """Targets as PEFT 0.21 reads them of a model whose experts transformers 4 had as linears: what is left to match,
    and the stacks that are adapted (`transformers_weight_conversion._convert_peft_config_moe`). A name that experts'
    linears had means no other linear any more, such as those of an MLP beside them."""
    linears = [(m, layers) for kind, layers in spec.kinds() for m in kind.linears()]
    if wanted == ALL_LINEAR:
        wanted = (*dict.fromkeys(m.name.rpartition(".")[2] for m, _ in linears), *was)
    elif isinstance(wanted, str):
        config = LoRAConfig(target_modules=wanted)
        matches = lambda name, layers: any(config.matches(f"{spec.layout.layer}{i}.{name}") for i in layers)
        before = [(f"{s.name.removesuffix('.weight').rpartition('.')[0]}.{name}", name) for name, s in was.items()]
        wanted = tuple(dict.fromkeys((*(m.name.rpartition(".")[2] for m, layers in linears if matches(m.name, layers)),
                                      *(name for full, name in before if matches(full, range(spec.layers)))))) or wanted
        if isinstance(wanted, str):
            raise no_such_target(spec, wanted, was)
    old = lambda target: next((name for name in was if target == name or target.endswith(f".{name}")), None)
    asked = {name for target in wanted if (name := old(target))}
    for stack in was.values():
        here = asked & set(stack.was)
        if 0 < len(here) < stack.fused:
            raise ValueError(f"PEFT adapts {' and '.join(stack.was)} of {spec.name} together or not at all, as they "
                             f"are one parameter, {stack.name}; got {', '.join(sorted(here))} alone")
    return tuple(target for target in wanted if not old(target)), {was[name].name for name in asked}


def short_names(spec: ModelSpec) -> list[str]:
    return list(dict.fromkeys(m.name.rpartition(".")[2] for kind, _ in spec.kinds() for m in kind.linears()))


def no_such_target(spec: ModelSpec, entry: str, was: Iterable[str]) -> ValueError:
    short = [*short_names(spec), *was]
    near = get_close_matches(entry.lower(), [*short, ALL_LINEAR], 3, 0.5)
    return ValueError(f"target {entry!r} matches no linear of a layer of {spec.name}; "
                      + (f"near it: {', '.join(near)}" if near else f"there are: {', '.join(short)}"))


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
