"""Published memory of real cards (data/published/memory.csv), each row in the stack of its time, against the bill.

Nothing is fitted: a row's set-up is read from its columns and from the scripts of its source, what its stack does
from that stack's own code. A row whose set-up is not known, or not priced, is left out with the reason.

Source of the first 111 rows: fms-acceleration, scripts/benchmarks (scenarios*.yaml, defaults.yaml, accelerate.yaml,
refs/requirements*.txt): `tuning.sft_trainer` of fms-hf-tuning, sequences packed to 4,096 tokens, flash-attn,
checkpointing, FSDP (full shard) on several cards, and one pad token added to each vocabulary.
"""

import csv
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from .bill import estimate
from .models import PRESETS, ModelSpec
from .run import Training

WORKSPACES = 2 * (8 * 2**20 + 2**17)  # cuBLAS's on an A100, of the thread of forward and of that of backward
MASK = 8  # bytes a token: attention_mask, beside ids and labels
GRANITE = {"model_type": "granite", "num_hidden_layers": 40, "hidden_size": 2304, "num_attention_heads": 36,
           "num_key_value_heads": 36, "intermediate_size": 9216, "vocab_size": 49152, "max_position_embeddings": 4096,
           "tie_word_embeddings": True, "_name_or_path": "PowerLM-3b"}
MIXTRAL = {"model_type": "mixtral_until_4", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
           "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8,
           "num_experts_per_tok": 2, "max_position_embeddings": 32768, "_name_or_path": "Mixtral-8x7B"}
WHOLE_COLUMNS = ("Llama-2-70B", "Mixtral")  # GPTQ checkpoints without groups; the others have groups of 128


@dataclass(frozen=True)
class Measured:
    """One row of the table: what was run, and torch's `max_memory_allocated` of it (bytes)."""

    row: dict[str, str]

    @property
    def peak(self) -> int:
        return int(self.row["peak_allocated_bytes"] or self.row["reserved_bytes"])

    @property
    def name(self) -> str:
        r = self.row
        return (f"{r['model'].rpartition('/')[2]}, {r['method']}, {r['framework']}, {r['cards']} card"
                f"{'s' * (r['cards'] != '1')}, {r['batch']} x {r['seq']}")

    @property
    def left_out(self) -> str:
        """Why there is no prediction, or ""."""
        if self.row["source"].startswith("peft "):
            return "what was reserved, not allocated, of rows of unknown lengths up to 768"
        if "bigcode" in self.row["model"]:
            return "rows of 4,096 tokens, and the model has 2,048 positions: what was run is not known"
        return ""

    @property
    def spec(self) -> ModelSpec:
        model = self.row["model"]
        for part, preset in (("Mistral-7B", "mistral-7b-v0.1"), ("Llama-3-8B", "llama-3-8b"),
                             ("Llama-2-70", "llama-2-70b")):
            if part in model:
                spec = PRESETS[preset]
                break
        else:
            spec = ModelSpec.from_config(MIXTRAL if "Mixtral" in model else GRANITE)
        added = "PowerLM" not in model  # its tokenizer has a token to pad with
        return replace(spec, vocab=spec.vocab + added)

    @property
    def run(self) -> Training:
        r, framework = self.row, self.row["framework"]
        of_2024 = "liger" in r["source"] or "granite" in r["source"]
        quantised, cards = "bnb" in framework or "gptq" in framework, int(r["cards"])
        full = r["method"] == "full"
        return Training.of_stack(
            "transformers-4.45" if of_2024 else "transformers-4.48",
            method="qlora" if quantised else r["method"], batch=int(r["batch"]), seq=int(r["seq"]), cards=cards,
            zero=3 if cards > 1 else 0, dtype=r["dtype"],
            autocast="true" in (r["bf16_autocast"] + r["fp16_autocast"]).lower(),
            **({} if full else {"rank": int(float(r["rank"])), "dropout": float(r["dropout"]),
                                "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}),
            quantisation="gptq" if "gptq" in framework else "nf4",
            group=0 if any(part in r["model"] for part in WHOLE_COLUMNS) else 128,
            kernels="unsloth" if "foak" in framework else "torch", loss="fused" if "liger" in framework else "whole",
            # one card: `SFTTrainer` prepares the base and casts embedding and head back; sharded it does not
            upcast="norms" if framework == "baseline-peft-bnb" and cards == 1 else "none")

    @property
    def predicted(self) -> int:
        """What torch's allocator should have held: the bill, cuBLAS's workspaces, the attention mask."""
        return predict(self.spec, self.run)


@cache
def predict(spec: ModelSpec, run: Training) -> int:
    return estimate(spec, run).peak + WORKSPACES + MASK * run.batch * run.seq


def measurements(file: Path) -> list[Measured]:
    """The rows of the table."""
    with open(file, newline="") as f:
        return [Measured(row) for row in csv.DictReader(f)]


# ---------------------------------------------------------------- as tables


def cause(m: Measured) -> str:
    """What is behind the difference, as far as it is known."""
    r, off = m.row, abs(m.predicted - m.peak)
    if off < 12e6:
        return "under 12 MB: scalars, small tables, counters"
    if "Mixtral" in r["model"]:
        return "experts take unequal shares of the tokens; the bill takes equal ones"
    if "foak" in r["framework"] and m.run.method == "qlora" and m.run.cards > 1:
        return ("adapters stay whole on each card: priced at 16 bytes a parameter, of which about 12 were held; why is "
                "not found")
    return "not found"


def summary(rows: list[Measured]) -> list[tuple[str, ...]]:
    """By method and number of cards: how many rows, the mean size of the difference, the lowest and the highest."""
    kinds = {"full": "every weight trains", "lora": "LoRA", "nf4": "LoRA on 4 bits (bitsandbytes)",
             "gptq": "LoRA on 4 bits (GPTQ)"}
    lines = []
    for kind, name in kinds.items():
        for several in (False, True):
            off = [m.predicted / m.peak - 1 for m in rows if not m.left_out and (m.run.cards > 1) == several
                   and kind == (m.run.quantisation if m.run.method == "qlora" else m.run.method)]
            lines.append((f"{name}, {'2 and 4 cards, FSDP' if several else '1 card'}", *spread(off)))
    return [*lines, ("all", *spread([m.predicted / m.peak - 1 for m in rows if not m.left_out]))]


def spread(off: list[float]) -> tuple[str, ...]:
    """How many, the mean of their sizes, the lowest and the highest."""
    return str(len(off)), f"{sum(map(abs, off)) / len(off):.2%}", f"{min(off):+.2%}", f"{max(off):+.2%}"
