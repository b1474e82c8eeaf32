"""The decoder of the notebooks: a Llama in about 270 lines, and the reading and writing of its checkpoint folders.

Parameter names are Hugging Face's (``model.layers.0.self_attn.q_proj.weight`` ...), so a real Llama, Mistral or
Qwen2 checkpoint folder loads unchanged, and an adapter trained here opens there.

Sources: Llama (Touvron et al. 2023, arXiv 2302.13971), RMSNorm (Zhang & Sennrich 2019, 1910.07467), rotary positions
(Su et al. 2021, 2104.09864), grouped-query attention (Ainslie et al. 2023, 2305.13245), SwiGLU (Shazeer 2020,
2002.05202), Llama-3's stretched rotary frequencies (Dubey et al. 2024, 2407.21783).

In the shape comments B is batch, T tokens, C hidden size, H query heads, K key/value heads, D head size, F the MLP's
width and V the vocabulary.
"""

import json
import math
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import distributed
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
        require(heads % kv_heads == 0, f"num_attention_heads {heads} must be a multiple of num_key_value_heads", kv_heads)
        require(self.head_dim > 0 and self.head_dim % 2 == 0, "head_dim must be even for rotary positions", self.head_dim)
        require(self.max_position_embeddings <= 2**20, "max_position_embeddings must be at most 2**20: a table holds all",
             self.max_position_embeddings)
        qwen2 = self.attention_bias and not self.mlp_bias  # biases on q, k and v alone
        require(self.attention_out_bias == self.attention_bias or qwen2, "attention_out_bias must equal attention_bias, "
             "except in Qwen2, which has biases on q, k and v alone", self.attention_out_bias)
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


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Radians per position of each pair of head dimensions, (D/2,), in fp32."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim  # (D/2,)
    freq = 1.0 / config.rope_theta ** half
    if not config.rope_scaling:
        return freq
    s = config.rope_scaling
    factor, old = s["factor"], s["original_max_position_embeddings"]
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    # turns made over the old context: few turns are slowed by `factor`, many are kept, between them a blend
    turns = old * freq / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * freq / factor + blend * freq


def rotary_tables(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, each (context, D); the sine's first half negated, for `rotate`."""
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), rope_frequencies(config))  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_j), j = i + D/2, by its angle a, to (x_i cos a - x_j sin a, x_j cos a + x_i sin a).

    x (B, H, T, D); cos, sin (T, D) from `rotary_tables`.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in fp32 at least."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.quick = None  # see `quick`

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.quick:  # x / sqrt(sum of squares + C eps) * sqrt(C) weight: a third of the calls
            scale, least = self.quick
            return x.div(torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(least)).mul_(scale)
        if x.dtype == weight.dtype == torch.float32:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention in which H query heads share K key/value heads."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.head_dim = c.head_dim
        self.grouped = c.num_key_value_heads != c.num_attention_heads
        self.q_proj = nn.Linear(c.hidden_size, q, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=c.attention_out_bias)
        self.heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)  # of q, k, v
        self.quick = {}  # see `quick`

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: "Cache | None",
                layer: int) -> Tensor:
        if "qkv" in self.quick:
            qkv = self.quick["qkv"](x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + K + K, T, D)
            qk, v = qkv.split((sum(self.heads[:2]), self.heads[2]), dim=1)
            q, k = rotate(qk, cos, sin).split(self.heads[:2], dim=1)
        else:
            q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or K, T, D)
                       for p in (self.q_proj, self.k_proj, self.v_proj))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, T seen, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1,
                                           enable_gqa=self.grouped)
        out = self.quick.get("o") or self.o_proj
        return out(y.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, H D) -> (B, T, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.quick = {}  # see `quick`

    def forward(self, x: Tensor) -> Tensor:
        down = self.quick.get("down") or self.down_proj
        if "gate_up" in self.quick:
            gate, up = self.quick["gate_up"](x).chunk(2, dim=-1)  # (B, T, F) each
            return down(F.silu(gate) * up)
        return down(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, C) -> (B, T, F) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, *where) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *where)  # (B, T, C)
        return x + self.mlp(self.post_attention_layernorm(x))


class Cache:
    """Keys and values of the tokens already seen, one pair per layer, so that a new token costs one column.

    Room for `size` tokens is taken at once: appending copies nothing that is already there.
    """

    def __init__(self, size: int):
        self.size, self.length, self.kv = size, 0, {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) after what is there; return all keys and values so far."""
        if layer not in self.kv:
            shape = (*k.shape[:2], self.size, k.shape[3])
            self.kv[layer] = k.new_empty(shape), v.new_empty(shape)
        keys, values = self.kv[layer]
        end = self.length + k.shape[2]
        keys[:, :, self.length:end], values[:, :, self.length:end] = k, v
        return keys[:, :, :end], values[:, :, :end]


class Joined:
    """Linears that share their input, as one product: x @ (in, sum of out), the layout that is fastest for few rows."""

    def __init__(self, *linears: nn.Linear):
        self.weight = torch.cat([p.weight.T for p in linears], dim=1)
        self.bias = torch.cat([p.bias for p in linears]) if linears[0].bias is not None else None

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


SHARED = {"self_attn": {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",)},  # what has one input
          "mlp": {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}}


@contextmanager
def quick(decoder: "Decoder"):
    """Within, a token costs fewer and cheaper calls, which where weights are small are what it costs: q, k, v are one
    product and so are gate and up, and a norm is four calls. Only for inference in fp32: no gradient, other roundings.

    Linears that are adapted, hooked or large stay as they are: large ones would cost memory and gain nothing. So do
    those of a block with a hook before it, which may bring weights (stream.py's does).
    """
    changed = []
    for block in decoder.layers:
        if block._forward_pre_hooks:
            continue
        for module, parts in ((getattr(block, name), parts) for name, parts in SHARED.items()):
            for name, members in parts.items():
                linears = [getattr(module, member) for member in members]
                if all(type(p) is nn.Linear and not p._forward_hooks and not p._forward_pre_hooks
                       and p.weight.numel() <= 2**20 for p in linears):
                    module.quick[name] = Joined(*linears)
            changed.append((module, {}))
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            if type(norm) is RMSNorm and norm.weight.dtype == torch.float32:
                n = norm.weight.numel()
                norm.quick = norm.weight * math.sqrt(n), norm.weight.new_tensor(math.sqrt(n * norm.eps))
                changed.append((norm, None))
    try:
        yield
    finally:
        for module, plain in changed:
            module.quick = plain


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: everything but the head."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.checkpointing = False  # recompute each block in backward instead of keeping its activations
        cos, sin = rotary_tables(c)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Token ids (B, T), or their embeddings (B, T, C), to the last hidden states (B, T, C)."""
        start, t = (cache.length if cache else 0), ids.shape[1]
        if start + t > len(self.cos):
            raise ValueError(f"{start + t} tokens are more than the context of {len(self.cos)}")
        x = ids if ids.is_floating_point() else self.embed_tokens(ids)  # (B, T, C)
        cos, sin = (table[start:start + t].to(x.dtype) for table in (self.cos, self.sin))  # (T, D)
        # several tokens after a cached prefix: token i sees the prefix and itself; else is_causal says it all
        mask = None
        if start and t > 1:
            mask = torch.ones(t, start + t, dtype=torch.bool, device=ids.device).tril(start)  # (T, T seen)
        for i, block in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, cos, sin, mask, cache, i, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache, i)
        if cache is not None:
            cache.length += t
        return self.norm(x)  # (B, T, C)


class Llama(nn.Module):
    """The decoder with its head: token ids (B, T) in, logits (B, T, V) out.

    `seed` fixes the random weights (normal, 0.02; output projections scaled down by sqrt(2 layers), GPT-2 section 2.3).
    """

    def __init__(self, config: LlamaConfig, seed: int | None = None):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * config.num_hidden_layers) if residual else 0.02
                nn.init.normal_(p, std=std, generator=generator)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) for ids (B, T); with a cache, ids are the tokens that follow what it holds."""
        return self.lm_head(self.model(ids, cache))

    def generate(self, ids: Tensor, max_new: int, stop: int | None = None) -> Tensor:
        """Greedy continuation. ids (B, T), all rows of one length -> (B, up to max_new).

        A row that has produced `stop` goes on as `stop`; generation ends when every row has.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, or prompt plus max_new longer than the context.
        """
        if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
            raise ValueError(f"generate needs ids of shape (batch, tokens) with at least one token, got "
                             f"{tuple(ids.shape)} of {ids.dtype}")
        words, room = self.config.vocab_size, self.config.max_position_embeddings
        if ids.min() < 0 or ids.max() >= words:
            raise ValueError(f"ids must be from 0 to {words - 1}, got {ids.min().item()} to {ids.max().item()}")
        if max_new < 0 or ids.shape[1] + max_new > room:
            raise ValueError(f"prompt and max_new must fit the context of {room} tokens, got a prompt of "
                             f"{ids.shape[1]} and max_new {max_new}")
        cache, out, step = Cache(ids.shape[1] + max_new), [ids[:, :0]], ids
        done = torch.zeros_like(ids[:, :1], dtype=torch.bool)  # (B, 1)
        with torch.inference_mode(), quick(self.model):  # inference mode: less work an operation than no_grad
            while len(out) <= max_new and not done.all():
                # only the last position's logits are needed, so the head never sees the rest
                step = self.lm_head(self.model(step, cache)[:, -1:]).argmax(-1)  # (B, 1)
                if stop is not None:
                    step = step.masked_fill(done, stop)
                    done = step == stop
                out.append(step)
        return torch.cat(out, dim=1)  # outside, so that it is a tensor like any other

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "Llama":
        """Load ``config.json`` and one or several safetensors files; `dtype` None keeps the file's.

        Raises:
            ValueError: a file missing or damaged, a tensor missing, extra or of another shape.
        """
        folder = Path(folder)
        values = read_json(folder / "config.json")
        try:
            config = LlamaConfig.from_hf(values)
        except ValueError as e:
            raise ValueError(f"{folder / 'config.json'}: {e}") from None
        tensors = {k: v for k, v in read_safetensors(folder).items()
                   if not k.endswith("rotary_emb.inv_freq")}  # old Llama files carry it
        depth = len({k.split(".")[2] for k in tensors if k.startswith("model.layers.")})
        if depth != config.num_hidden_layers:
            raise ValueError(f"checkpoint in {folder} has {depth} layers, config.json says {config.num_hidden_layers}")
        try:
            with torch.device("meta"):  # shapes only: the weights come from the file
                model = cls(config)
        except RuntimeError as e:
            raise ValueError(f"{folder}: config.json describes a model of impossible size: {e}") from None
        expected = dict(model.state_dict())
        if config.tie_word_embeddings:
            expected.pop("lm_head.weight")
            tensors.pop("lm_head.weight", None)
        for word, names in (("lacks", expected.keys() - tensors.keys()),
                            ("has the unknown", tensors.keys() - expected.keys())):
            if names:
                raise ValueError(f"checkpoint in {folder} {word} {', '.join(sorted(names)[:3])}"
                                 + (f" and {len(names) - 3} more" if len(names) > 3 else ""))
        for name, want in expected.items():
            if tensors[name].shape != want.shape or not tensors[name].is_floating_point():
                raise ValueError(f"{name} in {folder} is {tuple(tensors[name].shape)} of {tensors[name].dtype}, "
                                 f"config.json says {tuple(want.shape)} of a floating-point type")
        dtype = dtype or next(iter(tensors.values())).dtype
        model.load_state_dict({k: v.to(dtype) for k, v in tensors.items()}, strict=False, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        model.model.cos, model.model.sin = rotary_tables(config)  # no file holds them
        return model

    def save_pretrained(self, folder: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` (a tied head is not written twice).

        Of several processes that train one model all call this, and the first one writes.
        """
        weights = self.state_dict()
        with torch.device("meta"):
            plain = type(self)(self.config).state_dict()
        if extra := sorted(weights.keys() - plain.keys()):
            raise ValueError(f"the model is no plain {type(self).__name__}, it has {extra[0]}: save its adapters with "
                             "save_adapter, or merge(model, permanent=True) or remove(model) first")
        if self.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        weights = distributed.collect(weights)
        if not distributed.is_main_process():
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / "model.safetensors.tmp", {"format": "pt", **(metadata or {})})
        (folder / "config.json.tmp").write_text(json.dumps(self.config.to_hf(), indent=2) + "\n")
        for name in ("model.safetensors", "config.json"):  # neither is ever half written
            os.replace(folder / f"{name}.tmp", folder / name)


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: no such file, or one that is damaged or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path.name} in {path.parent}; expected a checkpoint folder") from None
    except (ValueError, OSError, RecursionError) as e:
        raise ValueError(f"{path} is damaged or not a JSON file: {e}") from None
    require(isinstance(value, dict), f"{path} must hold an object", value)
    return value


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` names.

    Raises:
        ValueError: no such file, a shard missing, or a damaged file.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = {single.name}
    if index.exists() and not single.exists():
        shards = read_json(index).get("weight_map")
        require(shards and isinstance(shards, dict), f"{index} must map tensors to files under weight_map", shards)
        names = set(map(str, shards.values()))
    tensors = {}
    for file in (folder / name for name in sorted(names)):
        if not file.is_file():
            raise ValueError(f"{folder} holds no {file.name}" + f", which {index.name} names" * (file != single))
        try:
            with safe_open(file, framework="pt") as f:
                tensors.update({name: f.get_tensor(name) for name in f.keys()})
        except Exception as e:  # the reader's errors have no common class: SafetensorError, OSError, KeyError, ...
            raise ValueError(f"{file} is damaged or not a safetensors file: {e!r}") from None
    return tensors
