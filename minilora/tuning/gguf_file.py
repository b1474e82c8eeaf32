"""Models and adapters as llama.cpp reads them: GGUF files, written through the library ``gguf`` (an extra).

llama.cpp turns pairs of neighbouring dimensions where Hugging Face's Llama turns halves, so the rows of q and k are put
in another order; for an adapter these are the rows of B. Its scale is alpha / rank for all modules, so any other is
multiplied into B.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import require
from ..injection import lora_layers
from ..layers import LoRALayer

# model_type -> (llama.cpp's name, whether q and k change the order of their rows)
ARCHITECTURES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False),
                 "qwen3": ("qwen3", False)}
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# how a byte-level tokenizer cuts text before it merges: a part of its pattern -> llama.cpp's name of it
CUTS = {r"\p{N}{1,3}": "llama-bpe", r"\p{N}|": "qwen2"}


def check_model(model: nn.Module) -> tuple[str, bool]:
    kind = model.config.model_type
    require(kind in ARCHITECTURES, f"a GGUF file is written of {', '.join(ARCHITECTURES)} only; the model must be one "
            "of these", kind)
    scaling = getattr(model.config, "rope_parameters", None) or {}
    require(scaling.get("rope_type", "default") == "default", "rotary positions must be the plain ones", scaling)
    return ARCHITECTURES[kind]


def export_model(model: nn.Module, tokenizer: Any, path: str | Path, dtype: str = "f16", name: str = "") -> int:
    """Write a plain (merged) model with its tokenizer; matrices in `dtype`, the rest in fp32. The number of tensors."""
    gguf, (arch, turned), path = library(), check_model(model), Path(path)
    require(dtype in TYPES, f"type must be one of {', '.join(TYPES)}", dtype)
    require(not any(isinstance(m, LoRALayer) for m in model.modules()), "the model must have no adapters: merge them",
            "adapters")
    c = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(name or path.stem)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float((getattr(c, "rope_parameters", None) or {}).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
    writer.add_file_type(getattr(gguf.LlamaFileType, kinds[dtype]))
    add_tokenizer(gguf, writer, tokenizer, c.vocab_size)
    names, count = name_map(gguf, arch, c.num_hidden_layers), 0
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and c.tie_word_embeddings or key.endswith("rotary_emb.inv_freq"):
            continue
        if turned:
            tensor = in_pairs(key, tensor, c)
        add_tensor(gguf, writer, names(key), tensor, "f32" if tensor.dim() == 1 else dtype)
        count += 1
    close(writer)
    return count


def export_adapter(model: nn.Module, path: str | Path, dtype: str = "f32") -> int:
    """Write the adapters of a model (not the base) for llama.cpp's --lora. The number of tensors."""
    gguf, (arch, turned), path = library(), check_model(model), Path(path)
    require(dtype in ("f32", "f16"), "the type of an adapter must be f32 or f16", dtype)
    layers = lora_layers(model)
    alpha = float(next(iter(layers.values())).alpha)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    names = name_map(gguf, arch, model.config.num_hidden_layers)
    for name, layer in layers.items():
        require(layer.variant == "lora" and layer.kind == "linear", f"{name} must be a plain LoRA on a linear: "
                "llama.cpp knows no other", layer.variant)
        A, B = layer.lora_A.detach(), layer.lora_B.detach()  # (r, in), (out, r)
        B = B * (layer.scaling * layer.rank / alpha)
        B = in_pairs(f"{name}.weight", B, model.config) if turned else B
        add_tensor(gguf, writer, f"{names(f'{name}.weight')}.lora_a", A, dtype)
        add_tensor(gguf, writer, f"{names(f'{name}.weight')}.lora_b", B, dtype)
    close(writer)
    return 2 * len(layers)


def library() -> Any:
    import gguf

    return gguf


def name_map(gguf: Any, arch: str, layers: int):
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    known = gguf.get_tensor_name_map(kind, layers)

    def named(key: str) -> str:
        name = known.get_name(key, try_suffixes=(".weight", ".bias"))
        require(name is not None, "every tensor must be one that llama.cpp knows", key)
        return name

    return named


def in_pairs(key: str, t: Tensor, config: Any) -> Tensor:
    """Rows of q and k from halves to pairs: (heads * d, ...) -> the same, each head's rows 0, d/2, 1, d/2 + 1, ..."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
    if heads is None:
        return t
    return t.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def add_tensor(gguf: Any, writer: Any, name: str, t: Tensor, dtype: str) -> None:
    t = t.detach().cpu().contiguous()
    if dtype == "bf16":  # numpy has none: its bytes
        raw = t.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, t.to(TYPES[dtype]).numpy())


def close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------- the tokenizer


def add_tokenizer(gguf: Any, writer: Any, tokenizer: Any, vocab: int) -> None:
    """The tokens with their kinds, merges and marks. A word-level tokenizer, which llama.cpp has none of, is left out:
    such a model is then asked with ids."""
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    model = form["model"]
    if model["type"] != "BPE":
        writer.add_tokenizer_model("none")
        return
    tokens, kinds = tokens_of(gguf, form, tokenizer, vocab)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
    else:
        writer.add_tokenizer_model("gpt2")
        pattern = json.dumps(form.get("pre_tokenizer"))
        writer.add_tokenizer_pre(next((name for part, name in CUTS.items() if json.dumps(part)[1:-1] in pattern),
                                      "gpt-2"))
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name in ("bos", "eos", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def tokens_of(gguf: Any, form: dict, tokenizer: Any, vocab: int) -> tuple[list[str], list[int]]:
    """Every id's text and kind, filled up to the rows of the embedding."""
    words = {i: word for word, i in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry for entry in form.get("added_tokens", ())}
    kinds, tokens = [], []
    for i in range(vocab):
        if i in added:
            kind = gguf.TokenType.CONTROL if added[i]["special"] else gguf.TokenType.USER_DEFINED
        elif i not in words:
            kind = gguf.TokenType.UNUSED
        elif form["model"].get("byte_fallback") and len(words[i]) == 6 and words[i].startswith("<0x"):
            kind = gguf.TokenType.BYTE
        else:
            kind = gguf.TokenType.NORMAL
        tokens.append(words.get(i, f"[PAD{i}]"))
        kinds.append(kind)
    return tokens, kinds
