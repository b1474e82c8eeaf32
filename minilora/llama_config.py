"""The shape of a Llama, and its reading from and writing as Hugging Face's ``config.json``."""

from dataclasses import asdict, dataclass, fields, replace

from .config import is_number, require

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a decoder; field names are those of Hugging Face's ``config.json``.

    Raises:
        ValueError: a value of another type or out of range, heads that do not divide what they must divide, or biases
            that no supported family has.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # fewer than the query heads: grouped-query attention
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or Llama-3's {"rope_type": "llama3", "factor": ...}
    attention_bias: bool = False  # biases on q, k and v (Qwen2)
    attention_out_bias: bool = False  # a bias on o too (a Llama with attention_bias)
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is bool:
                require(isinstance(value, bool), f"{f.name} must be True or False", value)
            elif f.type is float:
                require(is_number(value) and value > 0, f"{f.name} must be a positive number", value)
            elif f.type is int or (f.type == int | None and value is not None):
                require(type(value) is int and 0 < value < 2**31, f"{f.name} must be a positive integer", value)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        object.__setattr__(self, "num_key_value_heads", kv_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // heads)
        require(heads % kv_heads == 0, f"num_attention_heads {heads} must be a multiple of num_key_value_heads",
                kv_heads)
        require(self.head_dim > 0 and self.head_dim % 2 == 0, "head_dim must be even for rotary positions",
                self.head_dim)
        require(self.max_position_embeddings <= 2**20,
                "max_position_embeddings must be at most 2**20: a table holds all",
             self.max_position_embeddings)
        qwen2 = self.attention_bias and not self.mlp_bias  # biases on q, k and v alone
        require(self.attention_out_bias == self.attention_bias or qwen2, "attention_out_bias must equal "
             "attention_bias, except in Qwen2, which has biases on q, k and v alone", self.attention_out_bias)
        if self.rope_scaling is not None:
            check_rope_scaling(self.rope_scaling)

    @classmethod
    def from_hf(cls, config: dict) -> "LlamaConfig":
        """Read the dict of a Hugging Face ``config.json`` of the llama, mistral or qwen2 family.

        Raises:
            ValueError: another model type, a missing field, or an option this decoder does not have.
        """
        kind = config.get("model_type", "llama")
        if kind not in ("llama", "mistral", "qwen2"):
            raise ValueError(f"model_type must be llama, mistral or qwen2, got {kind!r}")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act must be 'silu', got {config['hidden_act']!r}")
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in config.items() if k in known and v is not None}
        if missing := [name for name in REQUIRED if name not in values]:
            raise ValueError(f"a decoder's config needs {', '.join(missing)}")
        # transformers 5 moved theta and the scaling into one dict, "rope_parameters"
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        require(isinstance(rope, dict), "rope_parameters must be an object", rope)
        values["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
        rope = {k: v for k, v in rope.items() if k != "rope_theta"}
        values["rope_scaling"] = rope if rope and rope_type(rope) != "default" else None
        if kind == "qwen2":
            values["attention_bias"] = True  # Qwen2 has q, k, v biases and never says so
        elif kind == "llama":
            values["attention_out_bias"] = values.get("attention_bias", False)
        shape, window = cls(**values), config.get("sliding_window")
        if window is None or not config.get("use_sliding_window", kind == "mistral"):
            return shape
        # a window only differs from full attention beyond its length, so stay within it
        require(type(window) is int and window > 0, "sliding_window must be a positive integer", window)
        return replace(shape, max_position_embeddings=min(shape.max_position_embeddings, window))

    def to_hf(self) -> dict:
        """The same shape as a ``config.json`` that transformers reads."""
        kind = "qwen2" if self.attention_bias and not self.attention_out_bias else "llama"
        values = asdict(self)
        del values["attention_out_bias"]
        if kind == "qwen2":
            del values["attention_bias"], values["mlp_bias"]
        name = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]
        return {"model_type": kind, "architectures": [name], "hidden_act": "silu", **values}


def rope_type(scaling: dict) -> str:
    return scaling.get("rope_type", scaling.get("type", "default"))


def check_rope_scaling(scaling: dict) -> None:
    """Raise a ValueError unless this is Llama-3's scaling, whole."""
    require(isinstance(scaling, dict), "rope_scaling must be None or a dict", scaling)
    require(rope_type(scaling) == "llama3", "rope_scaling must be of type 'llama3'", rope_type(scaling))
    for name in ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"):
        require(is_number(scaling.get(name)) and scaling[name] > 0, f"rope_scaling's {name} must be a positive number",
             scaling.get(name))
    require(scaling["low_freq_factor"] < scaling["high_freq_factor"], "rope_scaling's low_freq_factor must be below "
         "high_freq_factor", (scaling["low_freq_factor"], scaling["high_freq_factor"]))
