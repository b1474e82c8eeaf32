"""The shape of a decoder, from which every byte of the bill follows: read from a ``config.json``, or a preset.

A family is the list of names under which Hugging Face keeps a decoder's matrices. With the sizes it gives every
matrix, so the exact parameter total, and what an adapter on any of them costs.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from ..config import ALL_LINEAR, LoRAConfig, is_number
from ..tables import table


@dataclass(frozen=True)
class Family:
    """Where a Hugging Face architecture keeps its matrices, and what it does that others do not."""

    layer: str  # what comes before a layer's number
    qkv: tuple[str, ...]  # three names, or one: fused
    out: str
    up: tuple[str, ...]  # two names (gate, up), or one: no gate, or both fused
    down: str
    targets: tuple[str, ...]  # what PEFT adapts when told nothing
    gated: bool = False  # the MLP multiplies two projections
    rms: bool = False  # RMSNorm, which has no bias; else LayerNorm
    biased: bool = False  # every linear has a bias
    qkv_bias: bool = False  # q, k and v have one even so
    norms: int = 2  # in a layer
    embedding_norm: bool = False
    tied: bool = False  # unless config.json says otherwise
    activation: str = "silu"
    dropout: float = 0.0  # of what goes into the residual stream, unless config.json says otherwise


LLAMA = Family("model.layers.", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj",
               ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", ("q_proj", "v_proj"), gated=True, rms=True)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": replace(LLAMA, qkv_bias=True),
    "gemma2": replace(LLAMA, norms=4, tied=True, activation="gelu_pytorch_tanh"),
    "phi3": replace(LLAMA, qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",), targets=("qkv_proj",)),
    "gpt2": Family("transformer.h.", ("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj", ("c_attn",),
                   biased=True, tied=True, activation="gelu_new", dropout=0.1),
    "opt": Family("model.decoder.layers.", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                  "self_attn.out_proj", ("fc1",), "fc2", ("q_proj", "v_proj"), biased=True, tied=True,
                  activation="relu", dropout=0.1),
    "bloom": Family("transformer.h.", ("self_attention.query_key_value",), "self_attention.dense",
                    ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", ("query_key_value",), biased=True, tied=True,
                    embedding_norm=True, activation="gelu_bloom"),
}

# what a size is called in config.json, where it is not `hidden_size` and the like
NAMES = {
    "gpt2": {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
             "intermediate_size": "n_inner", "max_position_embeddings": "n_positions"},
    "opt": {"intermediate_size": "ffn_dim"},
    "bloom": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "max_position_embeddings": "seq_length"},
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
MOST = {"num_hidden_layers": 10_000}  # no model is deeper
ACTIVATION_FIELD = {"gpt2": "activation_function", "opt": "activation_function", "gemma2": "hidden_activation",
                    "bloom": "activation"}
ACTIVATIONS = ("silu", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_bloom")
OLD_NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "hidden_size": "n_embed",
             "n_positions": "n_ctx"}


@dataclass(frozen=True)
class Linear:
    """One matrix of a layer; its weight is seen as (out, in)."""

    name: str  # inside the layer
    out: int
    inp: int
    bias: bool

    @property
    def parameters(self) -> int:
        return self.out * (self.inp + self.bias)


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

    def __post_init__(self):
        object.__setattr__(self, "embedding", self.embedding or self.hidden)

    @property
    def layout(self) -> Family:
        return FAMILIES[self.family]

    def linears(self) -> tuple[Linear, ...]:
        """The matrices of one layer, in the order in which the layer uses them."""
        f, q, kv = self.layout, self.heads * self.head_dim, self.kv_heads * self.head_dim
        outs = (q, kv, kv) if len(f.qkv) == 3 else (q + 2 * kv,)
        ups = self.ffn * (1 + (f.gated and len(f.up) == 1))
        return (*(Linear(name, out, self.hidden, self.qkv_bias) for name, out in zip(f.qkv, outs)),
                Linear(f.out, self.hidden, q, self.out_bias),
                *(Linear(name, ups, self.hidden, self.mlp_bias) for name in f.up),
                Linear(f.down, self.hidden, self.ffn, self.mlp_bias))

    @property
    def norm_parameters(self) -> int:
        """Of one norm."""
        return self.hidden * (1 if self.layout.rms else 2)

    @property
    def layer_parameters(self) -> int:
        return sum(m.parameters for m in self.linears()) + self.layout.norms * self.norm_parameters

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
        linears = self.linears()
        if wanted == ALL_LINEAR:
            return linears
        config = LoRAConfig(target_modules=wanted or self.layout.targets)
        short = [m.name.rpartition(".")[2] for m in linears]
        for entry in [wanted] if isinstance(wanted, str) else config.target_modules:
            one = LoRAConfig(target_modules=entry if isinstance(wanted, str) else (entry,))
            hits = [{m for m in linears if one.matches(f"{self.layout.layer}{i}.{m.name}")} for i in range(self.layers)]
            if not any(hits):
                near = get_close_matches(entry.lower(), [*short, ALL_LINEAR], 3, 0.5)
                raise ValueError(f"target {entry!r} matches no linear of a layer of {self.name}; "
                                 + (f"near it: {', '.join(near)}" if near else f"there are: {', '.join(short)}"))
            if any(h != hits[0] for h in hits):
                raise ValueError(f"target {entry!r} means other matrices in one layer than in another; the bill is "
                                 f"made for layers that are alike. There are: {', '.join(short)}")
        return tuple(m for m in linears if config.matches(f"{self.layout.layer}0.{m.name}"))

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
    def from_config(cls, source: str | Path | Mapping, family: str | None = None) -> "ModelSpec":
        """Read a Hugging Face ``config.json``: a folder that has one, the file itself, or its contents as a dict.

        Args:
            family: read it as this model_type, whatever it says of itself.

        Raises:
            ValueError: no file, no JSON, an unknown family, a field missing or of a nonsense value: each by name.
        """
        config, name = (source, "config") if isinstance(source, Mapping) else read_config(Path(source))
        kind = family or config.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise ValueError(unknown_family(kind, config, name))
        if experts := next((field for field in EXPERTS if config.get(field)), None):
            raise ValueError(f"{name}: {experts} is {config[experts]!r}; layers of several experts are not priced")
        f, names = FAMILIES[kind], NAMES.get(kind, {})

        def size(field: str, default: int | None = None, least: int = 1) -> int:
            key = names.get(field, field)
            key = OLD_NAMES[key] if key not in config and OLD_NAMES.get(key) in config else key
            value = config.get(key)
            if value is None and default is not None:
                return default
            if key not in config:
                raise ValueError(f"{name}: a {kind} config lacks {key}")
            if type(value) is not int or not least <= value < MOST.get(field, 2**31):
                raise ValueError(f"{name}: {key} must be a positive integer of a sensible size, got {value!r}")
            return value

        def flag(field: str, default: bool) -> bool:
            value = config.get(field)
            if value not in (True, False, None):
                raise ValueError(f"{name}: {field} must be true or false, got {value!r}")
            return default if value is None else bool(value)

        def word(field: str, default: str, known: tuple[str, ...]) -> str:
            value = config.get(field) or default
            if value not in known:
                raise ValueError(f"{name}: {field} {value!r} is not known; {suggest(str(value), known)}")
            return value

        def share(field: str, default: float) -> float:
            value = default if config.get(field) is None else config[field]
            if not is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name}: {field} must be in [0, 1), got {value!r}")
            return float(value)

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads) if f.rms else heads
        if "head_dim" not in config and hidden % heads:
            raise ValueError(f"{name}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
        if heads % kv_heads:
            raise ValueError(f"{name}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        needs_context = kind in ("gpt2", "opt")  # their position tables have a row for each
        context = size("max_position_embeddings", None if needs_context else 0)
        attention_bias = flag("attention_bias", False) if kind in ("llama", "gemma2") else f.biased
        if kind == "opt":
            attention_bias = flag("enable_bias", True)
        return cls(
            name=str(config.get("_name_or_path") or name), family=kind, layers=size("num_hidden_layers"), hidden=hidden,
            heads=heads, kv_heads=kv_heads, head_dim=size("head_dim", hidden // heads) if f.rms else hidden // heads,
            ffn=size("intermediate_size", 4 * hidden if kind in ("gpt2", "bloom") else None),
            vocab=size("vocab_size"), context=context, tied=flag("tie_word_embeddings", f.tied),
            positions={"gpt2": context, "opt": context + 2}.get(kind, 0),  # OPT counts from row 2
            qkv_bias=attention_bias or f.qkv_bias, out_bias=attention_bias,
            mlp_bias=flag("mlp_bias", False) if kind == "llama" else attention_bias and f.biased,
            activation=word(ACTIVATION_FIELD.get(kind, "hidden_act"), f.activation, ACTIVATIONS),
            dropout=share({"gpt2": "resid_pdrop", "phi3": "resid_pdrop", "opt": "dropout"}.get(kind, "hidden_dropout"),
                          f.dropout),
            attention_dropout=share("attn_pdrop" if kind == "gpt2" else "attention_dropout",
                                    0.1 if kind == "gpt2" else 0.0),
            embedding=size("word_embed_proj_dim", hidden) if kind == "opt" else hidden,
            last_norm=flag("do_layer_norm_before", True) and not flag("_remove_final_layer_norm", False)
            if kind == "opt" else True)


def read_config(path: Path) -> tuple[dict, str]:
    """The JSON object in a folder's ``config.json``, or in a file, and a name for it."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"there is no {file}; expected a folder with a config.json, or the file itself")
    try:
        config = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, expected an object with fields")
    return config, file.parent.name or file.name


def unknown_family(kind: object, config: Mapping, name: str) -> str:
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    lacks = [field for field in needed if field not in config]
    what = "says no model_type" if kind is None else f"is of model_type {kind!r}"
    if any(config.get(field) for field in EXPERTS):
        return f"{name} {what}; layers of several experts are not priced"
    read = (f"as a llama it lacks {', '.join(lacks)}" if lacks else "it has all sizes of a llama: if it is built as "
            "one, say family llama (--family llama)")
    if isinstance(config.get("text_config"), Mapping):
        read = "its decoder stands in text_config: give that part alone"
    return f"{name} {what}; {suggest(str(kind), FAMILIES)}; {read}"


def suggest(wanted: str, names: Iterable[str]) -> str:
    """The names a mistyped one may have meant, for an error message."""
    names = list(names)
    wanted = wanted.lower()
    close = list(dict.fromkeys([n for n in names if wanted in n] + get_close_matches(wanted, names, 3, 0.5)))[:3]
    return f"near it: {', '.join(close)}" if close else f"there are: {', '.join(names)}"


def llama(name: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, context: int,
          tied: bool = False, family: str = "llama", head_dim: int = 0) -> ModelSpec:
    return ModelSpec(name, family, layers, hidden, heads, kv_heads, head_dim or hidden // heads, ffn, vocab, context,
                     tied, qkv_bias=family == "qwen2", activation=FAMILIES[family].activation)


def gpt(name: str, layers: int, hidden: int, heads: int, vocab: int, context: int, family: str = "gpt2",
        offset: int = 0, activation: str = "", dropout: float | None = None) -> ModelSpec:
    positions = context + offset if family != "bloom" else 0
    return ModelSpec(name, family, layers, hidden, heads, heads, hidden // heads, 4 * hidden, vocab, context, True,
                     positions, True, True, True, activation or FAMILIES[family].activation,
                     FAMILIES[family].dropout if dropout is None else dropout, 0.1 if family == "gpt2" else 0.0)


PRESETS = {spec.name: spec for spec in (
    gpt("gpt2", 12, 768, 12, 50257, 1024),
    gpt("gpt2-medium", 24, 1024, 16, 50257, 1024),
    gpt("gpt2-large", 36, 1280, 20, 50257, 1024),
    gpt("gpt2-xl", 48, 1600, 25, 50257, 1024),
    # never published as code: GPT-2's with q, k and v apart, as the LoRA paper speaks of it, under OPT's names
    gpt("gpt3-175b", 96, 12288, 96, 50257, 2048, "opt", activation="gelu", dropout=0.0),
    gpt("opt-6.7b", 32, 4096, 32, 50272, 2048, "opt", offset=2),
    gpt("opt-175b", 96, 12288, 96, 50272, 2048, "opt", offset=2),
    gpt("bloom-176b", 70, 14336, 112, 250880, 2048, "bloom"),
    llama("llama-7b", 32, 4096, 32, 32, 11008, 32000, 2048),
    llama("llama-2-7b", 32, 4096, 32, 32, 11008, 32000, 4096),
    llama("llama-2-13b", 40, 5120, 40, 40, 13824, 32000, 4096),
    llama("llama-2-70b", 80, 8192, 64, 8, 28672, 32000, 4096),
    llama("llama-3-8b", 32, 4096, 32, 8, 14336, 128256, 8192),
    llama("llama-3-70b", 80, 8192, 64, 8, 28672, 128256, 8192),
    llama("llama-3.1-405b", 126, 16384, 128, 8, 53248, 128256, 131072),
    llama("llama-3.2-1b", 16, 2048, 32, 8, 8192, 128256, 131072, tied=True),
    llama("llama-3.2-3b", 28, 3072, 24, 8, 8192, 128256, 131072, tied=True),
    llama("mistral-7b-v0.1", 32, 4096, 32, 8, 14336, 32000, 32768, family="mistral"),
    llama("mistral-7b-v0.3", 32, 4096, 32, 8, 14336, 32768, 32768, family="mistral"),
    llama("qwen2.5-0.5b", 24, 896, 14, 2, 4864, 151936, 32768, True, "qwen2"),
    llama("qwen2.5-1.5b", 28, 1536, 12, 2, 8960, 151936, 131072, True, "qwen2"),
    llama("qwen2.5-3b", 36, 2048, 16, 2, 11008, 151936, 32768, True, "qwen2"),
    llama("qwen2.5-7b", 28, 3584, 28, 4, 18944, 152064, 131072, family="qwen2"),
    llama("qwen2.5-14b", 48, 5120, 40, 8, 13824, 152064, 131072, family="qwen2"),
    llama("qwen2.5-32b", 64, 5120, 40, 8, 27648, 152064, 131072, family="qwen2"),
    llama("qwen2.5-72b", 80, 8192, 64, 8, 29568, 152064, 131072, family="qwen2"),
    llama("gemma-2-2b", 26, 2304, 8, 4, 9216, 256000, 8192, True, "gemma2", 256),
    llama("gemma-2-9b", 42, 3584, 16, 8, 14336, 256000, 8192, True, "gemma2", 256),
    llama("gemma-2-27b", 46, 4608, 32, 16, 36864, 256000, 8192, True, "gemma2", 128),
    llama("phi-3-mini", 32, 3072, 32, 32, 8192, 32064, 4096, family="phi3"),
)}


def models_command(parser, arguments: list[str]) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    columns = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context", "tied", "parameters")
    rows = {name: {c: getattr(spec, c) for c in columns} for name, spec in PRESETS.items()}
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        body = [(s.name, s.layers, s.hidden, f"{s.heads}/{s.kv_heads}", s.head_dim, s.ffn, s.vocab, s.context,
                 "yes" if s.tied else "no", s.parameters) for s in PRESETS.values()]
        print(table(("model", "layers", "hidden", "heads/kv", "head dim", "ffn", "vocab", "context", "tied",
                     "parameters"), body))
