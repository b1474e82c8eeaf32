"""Deliberate bugs: does the suite see them?

    python tools/mutants.py                     every bug against the unit tests, then against the notebooks
    python tools/mutants.py --only unit layers  the unit tests alone, bugs in layers.py alone
    python tools/mutants.py --jobs 2

Each bug is one replaced piece of text in a copy of the repository. The unit tests run until one fails, those of the
broken room first; then, on their own, the notebooks, quick ones first, each executed and compared with its stored
outputs as nbval does, until one differs. A bug that neither sees is a test to write. One line a bug; exit code 1 if the
unit tests miss one.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """A bug: in minilora/`room`, `old`, which stands there once, becomes `new`."""

    what: str
    room: str
    old: str
    new: str


MUTANTS = [
    # scaling, targets
    Mutant("scaling is alpha, not alpha / rank", "config.py", "else alpha / rank", "else alpha"),
    Mutant("scaling is rank / alpha", "config.py", "else alpha / rank", "else rank / alpha"),
    Mutant("rsLoRA divides by the rank", "config.py", "alpha / math.sqrt(rank) if", "alpha / rank if"),
    Mutant("a target matches anywhere in a name", "config.py", 'name.endswith("." + entry)', "entry in name"),
    Mutant("a module's own alpha is ignored", "config.py",
           "return self.alpha_table.get(name, self.alpha)", "return self.alpha"),
    # the layer
    Mutant("the update is not scaled in forward", "layers.py", "B.to(y.dtype).T, alpha=scaling)", "B.to(y.dtype).T)"),
    Mutant("the gradient of A is not scaled", "layers.py", "(grad @ b).mul_(ctx.scaling)", "(grad @ b)"),
    Mutant("the gradient of B is scaled twice", "layers.py", "(seen @ a.T).mul_(ctx.scaling)",
           "(seen @ a.T).mul_(ctx.scaling ** 2)"),
    Mutant("the input's gradient forgets the update", "layers.py", "dx = dx.addmm_(inner, a) if mask is None else",
           "dx = dx if mask is None else"),
    Mutant("A starts at zero as well", "layers.py",
           "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))", "nn.init.zeros_(self.lora_A)"),
    Mutant("A starts normal with deviation 1", "layers.py",
           "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))", "nn.init.normal_(self.lora_A)"),
    Mutant("B starts at random", "layers.py", "    def start(self) -> None:\n",
           "    def start(self) -> None:\n        nn.init.normal_(self.lora_B, std=0.02)\n"),
    Mutant("dropout is lost", "layers.py", "dropout = self.dropout if self.training else 0.0", "dropout = 0.0"),
    Mutant("dropout stays on at inference", "layers.py", "dropout = self.dropout if self.training else 0.0",
           "dropout = self.dropout"),
    Mutant("dropout draws another mask in backward", "layers.py", "mask = keep_mask(rows, ctx.dropout, ctx.seed)",
           "mask = keep_mask(rows, ctx.dropout, ctx.seed + 1)"),
    Mutant("merge forgets the scaling", "layers.py", "return self.scaling * (B.to(wide)", "return (B.to(wide)"),
    Mutant("merge subtracts", "layers.py", "to(wide) + self.dense_update(wide)", "to(wide) - self.dense_update(wide)"),
    Mutant("unmerge subtracts the update again, and rounds", "layers.py",
           "self.base_layer.weight, self.unmerged = self.unmerged[0], ()",
           "self.base_layer.weight, self.unmerged = nn.Parameter(self.base_layer.weight - self.scaling "
           "* (self.lora_B @ self.lora_A).to(self.base_layer.weight.dtype), requires_grad=False), ()"),
    Mutant("a merged layer adds its update once more", "layers.py",
           "        if self.merged:\n            return self.base",
           "        if False:\n            return self.base"),
    Mutant("DoRA's norm leaves out the cross term", "variants/dora.py", "+ 2 * s * cross + s * s", "+ s * s"),
    # over a model
    Mutant("the base stays trainable", "injection.py", "    model.requires_grad_(False)\n", ""),
    Mutant("the first target is left out", "planning.py", "for name in meant if name in kinds]",
           "for name in meant if name in kinds][1:]"),
    Mutant("the plan counts A alone", "planning.py", "if own not in layer.frozen)", "if own == \"lora_A\")"),
    Mutant("all-linear takes the head too", "planning.py",
           "if not is_head(model, modules, name)]", "if True]"),
    Mutant("remove leaves the base frozen", "injection.py", "        p.requires_grad_(True)\n", "        pass\n"),
    # on disk and in the bank
    Mutant("A and B are swapped in the file", "layers.py", '"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"',
           '"lora_A": "lora_B.weight", "lora_B": "lora_A.weight"'),
    Mutant("any base will do", "adapters.py", "if adapter.base in (None, here) or", "if True or"),
    Mutant("the bank routes every row to the first adapter", "bank.py", "[layers.get(module) for layers in rows]",
           "[rows[0].get(module) for layers in rows]"),
    Mutant("combining ignores the weights", "bank.py", "torch.cat([weight * layer.scaling * layer.factors",
           "torch.cat([layer.scaling * layer.factors"),
    Mutant("a routed row is not scaled", "bank.py", "scalings = [layer.scaling for", "scalings = [1.0 for"),
    # the mathematics
    Mutant("the product's SVD is not scaled", "spectrum.py",
           "(ms, es) = torch.frexp(b), torch.frexp(a), math.frexp(scale)",
           "(ms, es) = torch.frexp(b), torch.frexp(a), math.frexp(1.0)"),
    Mutant("energy sums values, not squares", "spectrum.py", "e = relative(S, stacked).square().cumsum(-1)",
           "e = relative(S, stacked).cumsum(-1)"),
    Mutant("stable rank sums values, not squares", "spectrum.py",
           "return number(relative(S, stacked).square().sum(-1))",
           "return number(relative(S, stacked).sum(-1))"),
    Mutant("subspace similarity divides by the larger", "spectrum.py", "torch.minimum(i[:, None], j)",
           "torch.maximum(i[:, None], j)"),
    Mutant("amplification looks along rows for columns", "spectrum.py",
           "random = rank / math.sqrt(W.numel()) * W.norm()",
           "random = rank / W.numel() * W.norm()"),
    Mutant("an intruder resembles some direction", "spectrum.py", ".abs().amax(0) for x in", ".abs().amin(0) for x in"),
    Mutant("NF4 takes the positive quantiles for the negative half", "quant.py",
           "-half(count // 2 - 1).flip(0)", "-half(count // 2).flip(0)[1:]"),
    Mutant("a block's mean is not added back", "quant.py", ".mul_(scale[:, None]).add_(mean)", ".mul_(scale[:, None])"),
    Mutant("the two codes of a byte change places", "quant.py", "code[:, ::2] * 16 + code[:, 1::2]",
           "code[:, 1::2] * 16 + code[:, ::2]"),
    Mutant("codes are rounded down", "quant.py", "middle = (levels[1:] + levels[:-1]) / 2", "middle = levels[1:]"),
    Mutant("(IA)3 starts at 0", "peft_methods.py", "torch.ones(", "torch.zeros("),
    # the decoder, the data, the loop
    Mutant("a stale cache: keys are not rotated to their place", "llama.py", "(table[start:start + t].to(x.dtype)",
           "(table[:t].to(x.dtype)"),
    Mutant("the cache forgets its length", "llama.py",
           "            cache.length += t\n", "            cache.length = t\n"),
    Mutant("attention sees the future", "llama.py", "is_causal=mask is None and q.shape[2] > 1", "is_causal=False"),
    Mutant("the wrong norm: mean for mean square", "llama.py", "return F.rms_norm(x, weight.shape, weight, self.eps)",
           "return F.layer_norm(x, weight.shape, weight, None, self.eps)"),
    Mutant("gate and up change places", "llama.py", "F.silu(self.gate_proj(x)) * self.up_proj(x)",
           "F.silu(self.up_proj(x)) * self.gate_proj(x)"),
    Mutant("one layer too few", "llama.py", "for i, block in enumerate(self.layers):",
           "for i, block in enumerate(self.layers[:-1]):"),
    Mutant("RoPE's exponent is half of what it is", "rotary.py", "freq = 1.0 / config.rope_theta ** half",
           "freq = 1.0 / config.rope_theta ** (half / 2)"),
    Mutant("a, the word, begins a code when it is decoded", "helpdesk/tokens.py", "[b-hj-z])$", "[a-hj-z])$"),
    Mutant("x A^T is not made again in the plan's backward", "memory/linears.py",
           'again = ops.new(rows * rank, width, "x A^T again")', "again = None"),
    Mutant("the loss counts the prompt too", "helpdesk/tasks.py",
           "[IGNORE] * (len(head) - 1) + tail", "head[1:] + tail"),
    Mutant("gradients pile up over the steps", "train.py", "            opt.step()\n            opt.zero_grad()\n",
           "            opt.step()\n"),
    Mutant("the learning rate never rises to its peak", "train.py", "group[\"lr\"] = peak * factor",
           "group[\"lr\"] = peak * factor * 0.1"),
]


def broken(mutant: Mutant, folder: Path) -> Path:
    """A copy of the repository with the bug in it."""
    copy = folder / "minilora"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".hypothesis", "release"))
    (copy / "minilora" / mutant.room).write_text(applied(mutant))
    return copy


def applied(mutant: Mutant) -> str:
    """The room's text with the bug in it.

    Raises:
        ValueError: the text to replace does not stand there exactly once.
    """
    text = (ROOT / "minilora" / mutant.room).read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.what}: {mutant.old!r} stands {text.count(mutant.old)} times in {mutant.room}")
    return text.replace(mutant.old, mutant.new)


def seen(copy: Path, *arguments: str) -> str:
    """The first test that fails, or "" if all pass."""
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments], cwd=copy,
                          env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    failed = [line.split(" - ")[0].partition(" ")[2] for line in done.stdout.splitlines()
              if line.startswith(("FAILED", "ERROR"))]
    return Path(failed[0]).name if failed else f"pytest ended with {done.returncode}"


def unit(copy: Path, room: str) -> str:
    name = room.removesuffix(".py").replace("/", "_")
    folder = room.partition("/")[0].removesuffix(".py")
    first = next(filter(None, (sorted(copy.glob(f"tests/test_{n}*.py")) for n in (name, folder, "injection"))))
    rest = sorted(p for p in copy.glob("tests/test_*.py") if p not in first
                  and p.name not in ("test_notebooks.py", "test_pages.py", "test_run_notebooks.py"))
    return seen(copy, *map(str, first)) or seen(copy, *map(str, rest))  # to collect all takes long


def notebooks(copy: Path, order: list[str]) -> str:
    for name in order:
        if found := seen(copy, "--nbval", "--nbval-current-env", f"notebooks/{name}"):
            return found
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rooms", nargs="*", help="rooms whose bugs to try (default: all)")
    parser.add_argument("--only", choices=("unit", "notebooks"))
    parser.add_argument("--jobs", type=int, default=1, help="bugs at a time")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.rooms or any(room in m.room for room in options.rooms)]
    books = (ROOT / "notebooks").glob("[0-9]*.ipynb")
    order = [p.name for p in sorted(books, key=lambda p: (p.read_text().count("adapt("), p.name))]  # quick ones first

    def attempt(mutant: Mutant) -> tuple[Mutant, str, str]:
        with tempfile.TemporaryDirectory() as folder:
            copy = broken(mutant, Path(folder))
            return (mutant, "" if options.only == "notebooks" else unit(copy, mutant.room),
                    "" if options.only == "unit" else notebooks(copy, order))

    start, units, told = time.perf_counter(), 0, 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, by_unit, by_notebook in tqdm(pool.map(attempt, chosen), total=len(chosen), unit="bug"):
            units, told = units + bool(by_unit), told + bool(by_notebook)
            found = {"unit tests": by_unit, "notebooks": by_notebook}
            shown = (f"{who} {what or 'SEE NOTHING'}" for who, what in found.items()
                     if who.startswith(options.only or ""))
            tqdm.write(f"{mutant.room}: {mutant.what}: {', '.join(shown)}", file=sys.stdout)
            sys.stdout.flush()
    print(f"{len(chosen)} bugs: {units} seen by the unit tests, {told} by the notebooks; "
          f"{time.perf_counter() - start:.0f} s")
    return int(options.only != "notebooks" and units < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
