"""Ten fine-tunes with transformers and peft: what our bill and public calculators say, beside the trace.

GiB at the peak, and the difference from the trace. The trace counts tensors; peers that add an allowance for CUDA or
fragmentation are taken without it where they say how large it is. "-" is a fine-tune that a peer has no answer for.

    pip install --no-deps --target EXTRA fitcheck-llm==0.3.1 torch-kitsune==0.7.0
    PYTHONPATH=.:EXTRA python tests/bench/memory_peers.py        (two minutes)

accelerate: its `estimate-memory` asks the Hub for the model, so its formula is called directly: four times the weights
for Adam. DeepSpeed: the formula of `estimate_zero3_model_states_mem_needs`, one card, nothing offloaded: 18 bytes a
parameter that it takes to be trained, 4 more for the largest layer; activations are not in it.

Written to data/measured/peers.json, from which README.md has its table.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_memory_models import on_meta, transformers_config

from minilora.experiments.run import record
from minilora.memory import ModelSpec, Training, estimate, fake, trace, training_step
from minilora.tables import table

ALL, QV = "all-linear", ("q_proj", "v_proj")
RUNS = [
    ("llama-3.2-1b", {"method": "full"}),
    ("llama-3.2-1b", {"method": "full", "seq": 2048, "checkpointing": True}),
    ("llama-3.2-1b", {"method": "full", "dtype": "float32", "autocast": True}),
    ("llama-3.2-1b", {"target_modules": QV, "seq": 2048}),
    ("llama-3.2-1b", {"target_modules": ALL, "batch": 4}),
    ("llama-2-7b", {"target_modules": QV, "rank": 8, "seq": 1024}),
    ("llama-2-7b", {"target_modules": ALL, "seq": 2048, "checkpointing": True}),
    ("mistral-7b-v0.1", {"target_modules": ALL, "seq": 4000, "checkpointing": True}),
    ("qwen2.5-0.5b", {"method": "full", "batch": 4}),
    ("gpt2", {"method": "full", "dtype": "float32", "seq": 1024}),
]


def traced(spec: ModelSpec, run: Training, config) -> int:
    with fake():
        step = training_step(config, run.method, run.rank, run.target_modules or ALL, run.batch, run.seq, run.optimizer,
                             run.dtype, run.autocast, run.checkpointing)
        step()
    with trace() as t:
        step()
    return t.peak


def accelerate(spec: ModelSpec, run: Training, model) -> float:
    """Weights four times over: weights, gradients, and Adam's two states. It knows no adapters."""
    return 4 * model.get_memory_footprint() if run.method == "full" else float("nan")


def deepspeed(spec: ModelSpec, run: Training, model) -> float:
    layers = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
    return 4 * max(layers) + 18 * spec.parameters


def fitcheck(spec: ModelSpec, run: Training, model) -> float:
    import fitcheck

    if not spec.layout.rms:
        return float("nan")  # it reads no GPT-2
    config = fitcheck.ModelConfig(spec.name, spec.parameters, spec.hidden, spec.layers, spec.heads, spec.kv_heads,
                                  spec.ffn, spec.vocab, spec.head_dim, spec.tied)
    targets = [m.name.rpartition(".")[2] for m in spec.targets(run.target_modules)] if run.method != "full" else []
    report = fitcheck.estimate(config, fitcheck.TrainingConfig(
        precision="fp32" if run.dtype == "float32" and not run.autocast else "bf16", optimizer="adamw",
        optimizer_dtype="fp32" if run.dtype == "float32" or run.method != "full" else "bf16", batch_size=run.batch,
        seq_len=run.seq, lora_rank=run.rank if run.method != "full" else None, grad_checkpoint=run.checkpointing,
        flash_attn=True, **({"lora_targets": targets} if targets else {})), fitcheck.get_gpu("t4"))
    return (report.total_mib - report.overhead_mib) * 2**20


def kitsune(spec: ModelSpec, run: Training, model) -> float:
    from kitsune.predict import LoRAConfig, estimate_lora_memory, predict_memory

    shape, dtype = (run.seq,), getattr(torch, run.dtype)
    if run.method == "full":
        found = predict_memory(model, shape, run.batch, dtype, "adamw", training=True)
        return sum(v for k, v in asdict(found).items() if k.endswith("_bytes") and k in KITSUNE)
    targets = tuple(m.name.rpartition(".")[2] for m in spec.targets(run.target_modules))
    found = estimate_lora_memory(model, shape, run.batch, dtype, LoRAConfig(run.rank, targets))
    return found.total_bytes - found.overhead_bytes


KITSUNE = ("param_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes")
PEERS = {"accelerate": accelerate, "DeepSpeed": deepspeed, "fitcheck-llm": fitcheck, "torch-kitsune": kitsune}


def answer(peer, *question) -> float:
    try:
        return peer(*question)
    except Exception as error:  # a peer's own trouble is its answer
        print(f"  {peer.__name__}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
        return float("nan")


if __name__ == "__main__":
    rows, records = [], []
    for name, options in RUNS:
        spec, run = ModelSpec.preset(name), Training(stack="transformers", **options)
        config = transformers_config(spec)
        config.dtype = getattr(torch, run.dtype)
        truth, model = traced(spec, run, config), on_meta(config)
        answers = {"ours": estimate(spec, run).peak} | {p: answer(peer, spec, run, model) for p, peer in PEERS.items()}
        answers = {who: int(value) if value == value else None for who, value in answers.items()}  # NaN: no answer
        what = ", ".join(f"{k} {v if isinstance(v, (int, str)) else '+'.join(v)}" for k, v in options.items())
        records.append({"model": name, "options": what, "trace": truth, **answers})
        cells = [f"{v / 2**30:.2f} ({v / truth - 1:+.1%})" if v else "-" for v in answers.values()]
        rows.append((f"{name} {what}", f"{truth / 2**30:.2f}", *cells))
        print(rows[-1], flush=True, file=sys.stderr)
    print(table(("fine-tune", "trace", "ours", *PEERS), rows))
    record("peers", records, "python tests/bench/memory_peers.py")
