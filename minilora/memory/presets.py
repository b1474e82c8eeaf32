"""The models whose shapes are known: of each the fields of its published config.json that make its shape.

A new one is one more entry, with any field that its family reads. `models.PRESETS` are the shapes. Sources: the
config.json beside each model's weights on the hub, and for models of several experts also the training scripts of slime
(scripts/models) and transformers' own defaults, which are those of gpt-oss-120b, DeepSeek-V3 and Llama-4-Scout.

Not held against a published config.json: mixtral-8x22b, qwen3-coder-480b-a35b, deepseek-v2-lite, deepseek-v2.
"""

from typing import Any

Config = dict[str, Any]


def gpt2(layers: int, hidden: int, heads: int, vocab: int, context: int) -> Config:
    return {"model_type": "gpt2", "n_layer": layers, "n_embd": hidden, "n_head": heads, "vocab_size": vocab,
            "n_positions": context}


def opt(layers: int, hidden: int, heads: int, vocab: int, context: int, **more) -> Config:
    return {"model_type": "opt", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
            "ffn_dim": 4 * hidden, "vocab_size": vocab, "max_position_embeddings": context, **more}


def bloom(layers: int, hidden: int, heads: int, vocab: int, context: int) -> Config:
    return {"model_type": "bloom", "n_layer": layers, "hidden_size": hidden, "n_head": heads, "vocab_size": vocab,
            "seq_length": context}


def llama(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, context: int, tied: bool = False,
          model_type: str = "llama", **more) -> Config:
    """Of any family whose config has Llama's fields."""
    return {"model_type": model_type, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": ffn, "vocab_size": vocab,
            "max_position_embeddings": context, "tie_word_embeddings": tied, **more}


def gemma3(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int, vocab: int, context: int,
           window: int) -> Config:
    return llama(layers, hidden, heads, kv_heads, ffn, vocab, context, True, "gemma3_text", head_dim=head_dim,
                 sliding_window=window)


def experts(base: Config, number: int, a_token: int, ffn: int, **more) -> Config:
    """With layers of several experts, in the words of Qwen3-MoE."""
    return base | {"num_experts": number, "num_experts_per_tok": a_token, "moe_intermediate_size": ffn, **more}


def mixtral(layers: int, hidden: int, heads: int, ffn: int, vocab: int, context: int) -> Config:
    base = llama(layers, hidden, heads, 8, ffn, vocab, context, model_type="mixtral", sliding_window=None)
    return base | {"num_local_experts": 8, "num_experts_per_tok": 2}


def qwen3_moe(layers: int, hidden: int, heads: int, ffn: int, number: int, width: int, context: int) -> Config:
    base = llama(layers, hidden, heads, 4 if number == 128 else 8, ffn, 151936, context, model_type="qwen3_moe",
                 head_dim=128)
    return experts(base, number, 8, width, norm_topk_prob=True)


def gpt_oss(layers: int, number: int) -> Config:
    base = llama(layers, 2880, 64, 8, 2880, 201088, 131072, model_type="gpt_oss", head_dim=64, sliding_window=128)
    return base | {"num_local_experts": number, "num_experts_per_tok": 4}


def deepseek(kind: str, layers: int, hidden: int, heads: int, ffn: int, vocab: int, q_rank: int | None, number: int,
             shared: int, a_token: int, width: int, dense: int, **more) -> Config:
    base = llama(layers, hidden, heads, heads, ffn, vocab, 163840, model_type=kind)
    return base | {"q_lora_rank": q_rank, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
                   "v_head_dim": 128, "n_routed_experts": number, "n_shared_experts": shared,
                   "num_experts_per_tok": a_token, "moe_intermediate_size": width, "first_k_dense_replace": dense,
                   **more}


CONFIGS: dict[str, Config] = {
    "gpt2": gpt2(12, 768, 12, 50257, 1024),
    "gpt2-medium": gpt2(24, 1024, 16, 50257, 1024),
    "gpt2-large": gpt2(36, 1280, 20, 50257, 1024),
    "gpt2-xl": gpt2(48, 1600, 25, 50257, 1024),
    # never published as code: GPT-2's with q, k and v apart, as the LoRA paper speaks of it, under OPT's names
    "gpt3-175b": opt(96, 12288, 96, 50257, 2048, activation_function="gelu", dropout=0.0, position_offset=0),
    "opt-6.7b": opt(32, 4096, 32, 50272, 2048),
    "opt-175b": opt(96, 12288, 96, 50272, 2048),
    "bloom-176b": bloom(70, 14336, 112, 250880, 2048),
    "opt-125m": opt(12, 768, 12, 50272, 2048),
    "opt-1.3b": opt(24, 2048, 32, 50272, 2048),
    "opt-13b": opt(40, 5120, 40, 50272, 2048),
    "bloom-560m": bloom(24, 1024, 16, 250880, 2048),
    "bloom-7b1": bloom(30, 4096, 32, 250880, 2048),
    "santacoder": gpt2(24, 2048, 16, 49280, 2048) | {"model_type": "gpt_bigcode"},
    "starcoderbase-1b": gpt2(24, 2048, 16, 49152, 8192) | {"model_type": "gpt_bigcode"},
    "starcoderbase-15b": gpt2(40, 6144, 48, 49152, 8192) | {"model_type": "gpt_bigcode"},
    "llama-7b": llama(32, 4096, 32, 32, 11008, 32000, 2048),
    "llama-2-7b": llama(32, 4096, 32, 32, 11008, 32000, 4096),
    "llama-2-13b": llama(40, 5120, 40, 40, 13824, 32000, 4096),
    "llama-2-70b": llama(80, 8192, 64, 8, 28672, 32000, 4096),
    "llama-3-8b": llama(32, 4096, 32, 8, 14336, 128256, 8192),
    "llama-3-70b": llama(80, 8192, 64, 8, 28672, 128256, 8192),
    "llama-3.1-405b": llama(126, 16384, 128, 8, 53248, 128256, 131072),
    "llama-3.2-1b": llama(16, 2048, 32, 8, 8192, 128256, 131072, tied=True),
    "llama-3.2-3b": llama(28, 3072, 24, 8, 8192, 128256, 131072, tied=True),
    "mistral-7b-v0.1": llama(32, 4096, 32, 8, 14336, 32000, 32768, model_type="mistral"),
    "llama-3.1-8b": llama(32, 4096, 32, 8, 14336, 128256, 131072),
    "llama-3.1-70b": llama(80, 8192, 64, 8, 28672, 128256, 131072),
    "llama-3.3-70b": llama(80, 8192, 64, 8, 28672, 128256, 131072),
    "tinyllama-1.1b": llama(22, 2048, 32, 4, 5632, 32000, 2048),
    "codellama-7b": llama(32, 4096, 32, 32, 11008, 32016, 16384),
    "codellama-34b": llama(48, 8192, 64, 8, 22016, 32000, 16384),
    "smollm2-135m": llama(30, 576, 9, 3, 1536, 49152, 8192, tied=True),
    "smollm2-360m": llama(32, 960, 15, 5, 2560, 49152, 8192, tied=True),
    "smollm2-1.7b": llama(24, 2048, 32, 32, 8192, 49152, 8192, tied=True),
    "smollm3-3b": llama(36, 2048, 16, 4, 11008, 128256, 65536, True, "smollm3"),
    "yi-6b": llama(32, 4096, 32, 4, 11008, 64000, 4096),
    "yi-1.5-9b": llama(48, 4096, 32, 4, 11008, 64000, 4096),
    "yi-34b": llama(60, 7168, 56, 8, 20480, 64000, 4096),
    "deepseek-llm-7b": llama(30, 4096, 32, 32, 11008, 102400, 4096),
    "deepseek-coder-1.3b": llama(24, 2048, 16, 16, 5504, 32256, 16384),
    "deepseek-coder-6.7b": llama(32, 4096, 32, 32, 11008, 32256, 16384),
    "mistral-nemo-12b": llama(40, 5120, 32, 8, 14336, 131072, 131072, model_type="mistral", head_dim=128,
                              sliding_window=None),
    "mistral-small-24b": llama(40, 5120, 32, 8, 32768, 131072, 32768, model_type="mistral", head_dim=128,
                               sliding_window=None),
    "codestral-22b": llama(56, 6144, 48, 8, 16384, 32768, 32768, model_type="mistral", sliding_window=None),
    "mistral-large-123b": llama(88, 12288, 96, 8, 28672, 32768, 131072, model_type="mistral", sliding_window=None),
    "mistral-7b-v0.3": llama(32, 4096, 32, 8, 14336, 32768, 32768, model_type="mistral", sliding_window=None),
    "qwen2.5-0.5b": llama(24, 896, 14, 2, 4864, 151936, 32768, tied=True, model_type="qwen2"),
    "qwen2.5-1.5b": llama(28, 1536, 12, 2, 8960, 151936, 131072, tied=True, model_type="qwen2"),
    "qwen2.5-3b": llama(36, 2048, 16, 2, 11008, 151936, 32768, tied=True, model_type="qwen2"),
    "qwen2.5-7b": llama(28, 3584, 28, 4, 18944, 152064, 131072, model_type="qwen2"),
    "qwen2.5-14b": llama(48, 5120, 40, 8, 13824, 152064, 131072, model_type="qwen2"),
    "qwen2.5-32b": llama(64, 5120, 40, 8, 27648, 152064, 131072, model_type="qwen2"),
    "qwen2.5-72b": llama(80, 8192, 64, 8, 29568, 152064, 131072, model_type="qwen2"),
    "qwen3-0.6b": llama(28, 1024, 16, 8, 3072, 151936, 40960, True, "qwen3", head_dim=128),
    "qwen3-1.7b": llama(28, 2048, 16, 8, 6144, 151936, 40960, True, "qwen3", head_dim=128),
    "qwen3-4b": llama(36, 2560, 32, 8, 9728, 151936, 40960, True, "qwen3", head_dim=128),
    "qwen3-8b": llama(36, 4096, 32, 8, 12288, 151936, 40960, model_type="qwen3", head_dim=128),
    "qwen3-14b": llama(40, 5120, 40, 8, 17408, 151936, 40960, model_type="qwen3", head_dim=128),
    "qwen3-32b": llama(64, 5120, 64, 8, 25600, 151936, 40960, model_type="qwen3", head_dim=128),
    "qwen2-0.5b": llama(24, 896, 14, 2, 4864, 151936, 131072, True, "qwen2"),
    "qwen2-7b": llama(28, 3584, 28, 4, 18944, 152064, 131072, model_type="qwen2"),
    "r1-qwen-1.5b": llama(28, 1536, 12, 2, 8960, 151936, 131072, model_type="qwen2"),
    "gemma-2-2b": llama(26, 2304, 8, 4, 9216, 256000, 8192, tied=True, model_type="gemma2", head_dim=256),
    "gemma-2-9b": llama(42, 3584, 16, 8, 14336, 256000, 8192, tied=True, model_type="gemma2", head_dim=256),
    "gemma-2-27b": llama(46, 4608, 32, 16, 36864, 256000, 8192, tied=True, model_type="gemma2", head_dim=128),
    # the text models; the image tower of the larger ones is frozen beside them
    "gemma-3-270m": gemma3(18, 640, 4, 1, 256, 2048, 262144, 32768, 512),
    "gemma-3-1b": gemma3(26, 1152, 4, 1, 256, 6912, 262144, 32768, 512),
    "gemma-3-4b-text": gemma3(34, 2560, 8, 4, 256, 10240, 262208, 131072, 1024),
    "gemma-3-12b-text": gemma3(48, 3840, 16, 8, 256, 15360, 262208, 131072, 1024),
    "gemma-3-27b-text": gemma3(62, 5376, 32, 16, 128, 21504, 262208, 131072, 1024),
    "phi-3-mini": llama(32, 3072, 32, 32, 8192, 32064, 4096, model_type="phi3", sliding_window=2047),
    "phi-3-medium": llama(40, 5120, 40, 10, 17920, 32064, 4096, model_type="phi3", sliding_window=2047),
    "phi-3.5-mini": llama(32, 3072, 32, 32, 8192, 32064, 131072, model_type="phi3", sliding_window=262144),
    "phi-4": llama(40, 5120, 40, 10, 17920, 100352, 16384, model_type="phi3", sliding_window=None),
    "phi-4-mini": llama(32, 3072, 24, 8, 8192, 200064, 131072, True, "phi3", sliding_window=262144,
                        partial_rotary_factor=0.75),
    "olmo-2-1b": llama(16, 2048, 16, 16, 8192, 100352, 4096, model_type="olmo2"),
    "olmo-2-7b": llama(32, 4096, 32, 32, 11008, 100352, 4096, model_type="olmo2"),
    "olmo-2-13b": llama(40, 5120, 40, 40, 13824, 100352, 4096, model_type="olmo2"),
    "olmo-2-32b": llama(64, 5120, 40, 8, 27648, 100352, 4096, model_type="olmo2"),
    "olmo-3-7b": llama(32, 4096, 32, 32, 11008, 100278, 65536, model_type="olmo3", sliding_window=4096),
    "olmo-3-32b": llama(64, 5120, 40, 8, 27648, 100278, 65536, model_type="olmo3", sliding_window=4096),
    "granite-3.1-2b": llama(40, 2048, 32, 8, 8192, 49155, 131072, True, "granite"),
    "granite-3.1-8b": llama(40, 4096, 32, 8, 12800, 49155, 131072, True, "granite"),
    "glm-4-9b": llama(40, 4096, 32, 2, 13696, 151552, 32768, model_type="glm4", head_dim=128, attention_bias=True),
    "command-r": llama(40, 8192, 64, 64, 22528, 256000, 8192, True, "cohere"),
    "command-r-plus": llama(64, 12288, 96, 8, 33792, 256000, 131072, True, "cohere", use_qk_norm=True),
    "mixtral-8x7b": mixtral(32, 4096, 32, 14336, 32000, 32768),
    "mixtral-8x22b": mixtral(56, 6144, 48, 16384, 32768, 65536),
    "qwen3-30b-a3b": qwen3_moe(48, 2048, 32, 6144, 128, 768, 40960),
    "qwen3-235b-a22b": qwen3_moe(94, 4096, 64, 12288, 128, 1536, 40960),
    "qwen3-coder-480b-a35b": qwen3_moe(62, 6144, 96, 8192, 160, 2560, 262144),
    # as weights of 16 bits; published are the experts in MXFP4
    "gpt-oss-20b": gpt_oss(24, 32),
    "gpt-oss-120b": gpt_oss(36, 128),
    "deepseek-v2-lite": deepseek("deepseek_v2", 27, 2048, 16, 10944, 102400, None, 64, 2, 6, 1408, 1),
    "deepseek-v2": deepseek("deepseek_v2", 60, 5120, 128, 12288, 102400, 1536, 160, 2, 6, 1536, 1, n_group=8,
                            topk_group=3, topk_method="group_limited_greedy"),
    # and R1; without the layer that guesses a second token, which transformers leaves out. Published in fp8
    "deepseek-v3": deepseek("deepseek_v3", 61, 7168, 128, 18432, 129280, 1536, 256, 1, 8, 2048, 3, n_group=8,
                            topk_group=4),
    "llama-4-scout-text": llama(48, 5120, 40, 8, 8192, 202048, 10485760, model_type="llama4_text", head_dim=128,
                                intermediate_size_mlp=16384, num_local_experts=16, num_experts_per_tok=1,
                                interleave_moe_layer_step=1),
    "aya-23-8b": llama(32, 4096, 32, 8, 14336, 256000, 8192, True, "cohere"),
}
