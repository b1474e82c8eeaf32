"""How much more than its tensors the caching allocator holds: reserved / allocated at the peak, over traced steps.

`minilora.memory.fit` multiplies by the largest ratio when it says what a card must have. The trace replays the
allocator's pools without a limit; a real allocator that meets one gives empty segments back first: this is the worst.

    python tests/bench/fragmentation.py        (about two minutes)
"""

from minilora.llama import LlamaConfig
from minilora.memory import ModelSpec, fake, measure, training_step

SHORT = [{}, {"seq": 2048, "checkpointing": True}, {"seq": 333, "batch": 5, "rank": 8}, {"method": "qlora"},
         {"method": "qlora", "seq": 1024, "batch": 2, "checkpointing": True}, {"method": "full"},
         {"method": "full", "seq": 2048, "checkpointing": True, "optimizer": "sgd"},
         {"method": "full", "dtype": "float32", "autocast": True, "seq": 700, "batch": 3, "checkpointing": True}]
RUNS = [(name, options) for name in ("llama-2-7b", "llama-3.2-1b", "qwen2.5-0.5b") for options in SHORT]


def ratio(name: str, options: dict) -> float:
    s = ModelSpec.preset(name)  # eight of its layers: the rest are alike
    config = LlamaConfig(s.vocab, s.hidden, s.ffn, 8, s.heads, s.kv_heads, s.head_dim, s.context,
                         attention_bias=s.qkv_bias, tie_word_embeddings=s.tied)
    with fake():
        step = training_step(config, **options)
    t = measure(step)
    print(f"{name:14} {t.peak / 2**30:7.2f} GiB allocated, {t.reserved / t.peak:.3f} times that reserved: "
          + ", ".join(f"{key} {value}" for key, value in options.items()), flush=True)
    return t.reserved / t.peak


if __name__ == "__main__":
    ratios = [ratio(*run) for run in RUNS]
    print(f"{len(ratios)} steps: {min(ratios):.3f} to {max(ratios):.3f}")
