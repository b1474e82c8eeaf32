"""The decoder of the notebooks: a Llama.

Parameter names are Hugging Face's (``model.layers.0.self_attn.q_proj.weight`` ...), so a real Llama, Mistral or
Qwen2 checkpoint folder loads unchanged, and an adapter trained here opens there.

Sources: Llama (Touvron et al. 2023, arXiv 2302.13971), RMSNorm (Zhang & Sennrich 2019, 1910.07467), grouped-query
attention (Ainslie et al. 2023, 2305.13245), SwiGLU (Shazeer 2020, 2002.05202).

In the shape comments B is batch, T tokens, C hidden size, H query heads, K key/value heads, D head size, F the MLP's
width and V the vocabulary.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import distributed
from .checkpoints import CONFIG, MODEL, check_tensors, read_checkpoint, read_json, save_tensors, writing
from .fast_decode import fast_decode
from .llama_config import LlamaConfig
from .rotary import rotary_tables, rotate


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in fp32 at least."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
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
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.q_proj = nn.Linear(c.hidden_size, q, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=c.attention_out_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: "Cache | None",
                layer: int) -> Tensor:
        q, k, v = (rearrange(project(x), "b t (h d) -> b h t d", d=self.head_dim)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # by name: what is not rotated is let go before the attention
        y = self.attend(q, k, v, mask, cache, layer)
        return self.o_proj(rearrange(y, "b h t d -> b t (h d)"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: "Cache | None",
               layer: int) -> Tensor:
        """q (B, H, T, D) looks at k, v (B, K, T, D), and at those before them that the cache holds -> (B, H, T, D)."""
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, T seen, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1,
                                              enable_gqa=self.heads != self.kv_heads)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, C) -> (B, T, F) -> (B, T, C)


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

    @property
    def device(self) -> torch.device:
        """Where it computes: the last norm is there also when the weights only visit (stream.py)."""
        return self.model.norm.weight.device

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
        with torch.inference_mode(), fast_decode(self.model, max_new):  # inference mode: less work than no_grad
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
        values = read_json(folder / CONFIG)
        try:
            config = LlamaConfig.from_hf(values)
        except ValueError as e:
            raise ValueError(f"{folder / 'config.json'}: {e}") from None
        tensors = {k: v for k, v in read_checkpoint(folder).items()
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
        check_tensors(tensors, expected, folder)
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
        with writing(folder, MODEL, CONFIG) as fresh:
            save_tensors(weights, fresh / MODEL, {"format": "pt", **(metadata or {})})
            (fresh / CONFIG).write_text(json.dumps(self.config.to_hf(), indent=2) + "\n", encoding="utf-8")

