"""`minilora tune` beside TRL's SFTTrainer with PEFT: tokens a second and peak memory of the same fine-tune, CPU, fp32.

    python tests/bench/tune_vs_trl.py [--widths 160 768 1024] [--steps 6] [--repeats 3]

Every measurement is a process of its own; the two take turns, and medians are compared. Both see the same rows in the
same order, without packing, dropout or recomputation. Memory is the most anonymous memory over what was held before the
model was made. Needs trl. Rows go to data/measured/tune_vs_trl.json with --record.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

LAYERS, RANK, BATCH, LR, TEXT = 4, 16, 8, 1e-3, "data/own/tickets.jsonl"
ROOT = Path(__file__).parents[2]


def make_base(folder: Path, width: int) -> None:
    """A Llama of that width with random weights and the help desk's words and template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from minilora.tuning.demo import save_help_desk

    save_help_desk(folder)
    if width != 160:
        torch.manual_seed(0)
        vocab = len(AutoTokenizer.from_pretrained(folder))
        LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=width, intermediate_size=width * 8 // 3 // 32 * 32,
                                     num_hidden_layers=LAYERS, num_attention_heads=width // 64,
                                     max_position_embeddings=256, tie_word_embeddings=True)).save_pretrained(folder)


def ours(base: str, steps: int, out: str) -> None:
    from minilora.tuning.run import tune

    tune(base, str(ROOT / TEXT), out, rank=RANK, steps=steps, batch=BATCH, lr=LR, eval_share=0, warmup=0,
         schedule="linear", every=steps, say=None)


def theirs(base: str, steps: int, out: str) -> None:
    from trl_run import trainer

    trainer(base, str(ROOT / TEXT), Path(out), steps=steps, batch=BATCH, lr=LR, rank=RANK, alpha=32).train()


def child(who: str, base: str, steps: int) -> None:
    """Run once and print seconds of the steps after the first two, tokens of them, and the peak."""
    import torch

    from minilora.stream_run import Peak
    from minilora.tuning.batches import batches, tokenised
    from minilora.tuning.data import read_rows
    from minilora.tuning.model import load_tokenizer
    from minilora.tuning.templates import Chat

    torch.set_num_threads(1)
    stamps, step = [], torch.optim.AdamW.step

    def stamped(self, *args, **kwargs):
        done = step(self, *args, **kwargs)
        stamps.append(time.process_time())
        return done

    torch.optim.AdamW.step = stamped
    with tempfile.TemporaryDirectory() as out, Peak(torch.device("cpu")) as peak:
        {"ours": ours, "theirs": theirs}[who](base, steps, f"{out}/run")
    rows = tokenised(Chat(load_tokenizer(base)), read_rows(ROOT / TEXT)).rows
    at = batches(rows, BATCH, 0, 0)
    tokens = sum(at(i)[0].numel() for i in range(2, steps))
    print(json.dumps({"seconds": stamps[-1] - stamps[1], "tokens": tokens, "peak": peak.bytes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[160, 768, 1024])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child, options.steps)
    rows = []
    for width in options.widths:
        with tempfile.TemporaryDirectory() as base:
            make_base(Path(base), width)
            seen = {"ours": [], "theirs": []}
            for _ in range(options.repeats):
                for who in seen:
                    command = [sys.executable, __file__, "--child", who, base, "--steps", str(options.steps)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    seen[who].append(json.loads(done.stdout.splitlines()[-1]))
        speed = {who: statistics.median(r["tokens"] / r["seconds"] for r in runs) for who, runs in seen.items()}
        peak = {who: statistics.median(r["peak"] for r in runs) for who, runs in seen.items()}
        rows.append({"width": width, "tokens a CPU second": speed, "peak": peak,
                     "faster": speed["ours"] / speed["theirs"], "memory": peak["ours"] / peak["theirs"]})
        print(f"width {width:4}: {speed['ours']:,.0f} tokens a second of one core, TRL {speed['theirs']:,.0f}: "
              f"{rows[-1]['faster']:.2f} times; peak {peak['ours'] / 2**20:,.0f} MiB, TRL {peak['theirs'] / 2**20:,.0f}: "
              f"{rows[-1]['memory']:.2f} times", flush=True)
    if options.record:
        from minilora.experiments import record

        record("tune_vs_trl", rows, f"python tests/bench/tune_vs_trl.py --steps {options.steps} "
               f"--repeats {options.repeats} --record")


if __name__ == "__main__":
    main()
