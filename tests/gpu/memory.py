"""Memory on a card beside what was said of it: the grid of `run.py memory`, the verdicts of `run.py verdicts`.

The grid: our decoder, Hugging Face's Llama with PEFT and its GPT-2, each with full fine-tuning, LoRA on q and v, LoRA
on all linears, and NF4 with LoRA on all linears; in pure bf16 and in fp32 under bf16 autocast; with and without
checkpointing; three shapes each. A cell is a process of its own, and its second step is measured. Beside it stand the
trace's three counts and the account's. What cuBLAS takes for its workspace is known from PyTorch's source and added to
each; the CUDA context is recorded. Half the cells, chosen by a hash of their names, are there to mend the trace with;
what is reported is the other half.

The verdicts: with the allocator's memory capped so that the process stays within 8, 12, 16 and 24 GiB, six recipes,
each with the largest batch that is said to fit and the smallest that is said not to. The goal: what is to fit does.

A dry run, a few cells of each, counts the storages of a real step on the CPU in the card's place, and traces with the
CPU's kernels; its verdicts are held against the trace of the very batch, CUDA's kernels, plus what a context takes.
"""

import gc
import json
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial

import torch
from common import GIB, HERE, UNDER, Benchmark, Skip, off, used

from minilora.config import ALL_LINEAR
from minilora.llama import LlamaConfig
from minilora.memory import Card, ModelSpec, Training, estimate, fake, measure, training_step
from minilora.memory.cuda import CUBLAS_WORKSPACE
from minilora.memory.fitting import FITS, LARGEST, NOT, judge, largest

GOALS = {"requested": 0.01, "allocated": 0.02, "reserved": 0.05}  # of the trace
ACCOUNT = 0.03  # of the closed form, of what is allocated

TINY = {"layers": 2, "hidden": 64, "heads": 4, "head_dim": 16, "ffn": 96, "vocab": 192, "context": 64, "embedding": 64}
TINY_SPECS = {"tiny-llama": replace(ModelSpec.preset("llama-3.2-1b"), name="tiny-llama", kv_heads=2, **TINY),
              "tiny-gpt2": replace(ModelSpec.preset("gpt2"), name="tiny-gpt2", kv_heads=4, positions=64, **TINY)}

SHAPES = {"llama": (("llama-3.2-1b", 1, 512), ("llama-3.2-1b", 3, 1000), ("llama-3.2-3b", 1, 2048)),
          "gpt2": (("gpt2-medium", 1, 512), ("gpt2-medium", 8, 1024), ("gpt2-large", 3, 777))}
DRY_SHAPES = {"llama": (("tiny-llama", 2, 24),), "gpt2": (("tiny-gpt2", 2, 24),)}
MODELS = {"ours": "llama", "transformers": "llama", "GPT-2": "gpt2"}
METHODS = {"full": ("full", ALL_LINEAR), "LoRA q,v": ("lora", None), "LoRA all": ("lora", ALL_LINEAR),
           "NF4 LoRA all": ("qlora", ALL_LINEAR)}


@dataclass(frozen=True)
class Cell:
    """One training step to measure. model: of `MODELS`; spec: a preset's name; targets: q and v where it is None."""

    model: str
    spec: str
    method: str
    targets: str | None
    dtype: str
    autocast: bool
    checkpointing: bool
    batch: int
    seq: int

    @property
    def shape(self) -> ModelSpec:
        return TINY_SPECS.get(self.spec) or ModelSpec.preset(self.spec)

    @property
    def target_modules(self) -> str | tuple[str, ...]:
        return self.targets or (("c_attn",) if self.model == "GPT-2" else ("q_proj", "v_proj"))

    def step(self, device: str = "cpu"):
        s = self.shape
        if self.model == "ours":
            config = LlamaConfig(s.vocab, s.hidden, s.ffn, s.layers, s.heads, s.kv_heads, s.head_dim, s.context,
                                 tie_word_embeddings=s.tied)
        else:
            from test_memory_models import transformers_config

            config = transformers_config(s)
        return training_step(config, self.method, 16, self.target_modules, self.batch, self.seq, "adamw", self.dtype,
                             self.autocast, self.checkpointing, device=device)

    def bill(self):
        return estimate(self.shape, Training(
            self.method, 16, self.target_modules, self.batch, self.seq, dtype=self.dtype, autocast=self.autocast,
            checkpointing=self.checkpointing, stack="minilora" if self.model == "ours" else "transformers"))

    def need_packages(self) -> None:
        needed = (self.model != "ours") * (2 + (self.method == "qlora"))
        for package in ("transformers", "peft", "bitsandbytes")[:needed]:
            try:
                __import__(package)
            except ImportError:
                raise Skip(f"{package} is not installed") from None


def cell_of(row: dict) -> Cell:
    return Cell(**{f.name: row[f.name] for f in fields(Cell)})


def workspace_of(head: dict) -> int:
    """cuBLAS's workspace on a record's card (ATen/cuda/CublasHandlePool.cpp: compute capability 9 and 10)."""
    if head["dry"]:
        return 0
    return CUBLAS_WORKSPACE["Hopper, Blackwell" if head["capability"][0] in (9, 10) else "other cards"]


# ---------------------------------------------------------------- one step, measured and predicted


def measured(cell: Cell, dry: bool, cap: int | None = None) -> dict:
    """The second step's bytes; {"out_of_memory": the card's or the cap's bytes} if there are too few.

    Args:
        cap: what the process may hold in all, its CUDA context too.
    """
    if dry:
        t = measure(cell.step(), "cpu", real=True)
        return {"requested": t.requested, "allocated": t.peak, "reserved": t.reserved, "context": 0}
    before, total = used(), torch.cuda.get_device_properties(0).total_memory
    torch.zeros(1, device="cuda")
    if cap:
        allowed = cap - (used() - before - torch.cuda.memory_reserved())
        torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        step = cell.step("cuda")
        gc.collect()
        torch.cuda.empty_cache()  # of what making the model left
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return {"out_of_memory": cap or total}
    return {"requested": torch.cuda.memory_stats()["requested_bytes.all.peak"],
            "allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(),
            "context": used() - before - torch.cuda.memory_reserved()}


def traced(cell: Cell, kernels: str = "cuda") -> dict:
    """What the trace says of the same step, without cuBLAS's workspace."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fake():
            step = cell.step()
        t = measure(step, kernels)
    return {"requested": t.requested, "allocated": t.peak, "reserved": t.reserved}


def child(question: str) -> None:
    """In a process of its own: measure the cell, print what was found."""
    asked = json.loads(question)
    torch.manual_seed(0)
    print(json.dumps(measured(Cell(**asked["cell"]), asked["dry"], asked["cap"])))


def in_its_own_process(cell: Cell, dry: bool, cap: int | None = None) -> subprocess.Popen:
    question = json.dumps({"cell": asdict(cell), "dry": dry, "cap": cap})
    return subprocess.Popen([sys.executable, HERE / "run.py", "--child", question], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen) -> dict:
    out, err = process.communicate()
    if process.returncode:
        raise RuntimeError((err.strip().splitlines() or ["without a word"])[-1])
    return json.loads(out.splitlines()[-1])


# ---------------------------------------------------------------- the grid


def grid(shapes: dict) -> dict[str, Cell]:
    cells = {}
    for model, kind in MODELS.items():
        for method, (m, targets) in METHODS.items():
            for autocast in (False, True):
                for checkpointing in (False, True):
                    for spec, batch, seq in shapes[kind]:
                        name = ", ".join((model, method, "autocast" if autocast else "bf16")
                                         + ("checkpointing",) * checkpointing + (f"{spec} {batch} x {seq}",))
                        cells[name] = Cell(model, spec, m, targets, "float32" if autocast else "bfloat16", autocast,
                                           checkpointing, batch, seq)
    return cells


def half(name: str) -> str:
    """Whether a cell is for mending the trace or for the report: settled by its name alone."""
    return ("mend", "report")[zlib.crc32(name.encode()) % 2]


def memory_row(name: str, cell: Cell, dry: bool, own_process: bool) -> dict:
    cell.need_packages()
    if own_process:
        process = in_its_own_process(cell, dry)
        trace = traced(cell, "cpu" if dry else "cuda")  # while it runs
        found = answer(process)
    else:
        trace, found = traced(cell, "cpu" if dry else "cuda"), measured(cell, dry)
    return asdict(cell) | {"half": half(name), "measured": found, "trace": trace, "account": cell.bill().peak}


def memory_items(dry: bool) -> dict:
    """A process takes seconds, so a dry run makes one for the first cell alone, and takes a third of them."""
    cells = list(grid(DRY_SHAPES if dry else SHAPES).items())
    return {name: partial(memory_row, name, cell, dry, not dry or not i)
            for i, (name, cell) in enumerate(cells[::3] if dry else cells)}


def memory_goals(record: dict) -> list[str]:
    """The account's predictions are computed anew; the trace's, seconds each, are the record's."""
    lines, more = [], workspace_of(record)
    for row in record["rows"]:
        name, found = f"{row['name']} [{half(row['name'])}]", row["measured"]
        if room := found.get("out_of_memory"):
            if row["trace"]["reserved"] + more < 0.95 * room:
                lines.append(f"{name}: out of memory, though the trace reserves {row['trace']['reserved']:,} bytes")
            continue
        for what, goal in GOALS.items():
            lines += off(f"{name}: the trace, {what}", row["trace"][what] + more, found[what], goal,
                         None if what == "reserved" else UNDER)
        if not record["dry"]:  # the account knows CUDA's kernels alone
            lines += off(f"{name}: the account", cell_of(row).bill().peak + more, found["allocated"], ACCOUNT)
    return lines


def share(predicted: int, found: int) -> str:
    return f"{predicted / found - 1:+.2%}"


def memory_columns(row: dict) -> dict[str, str]:
    """Errors here are without cuBLAS's workspace; the goals are held with it."""
    found = row["measured"]
    if "out_of_memory" in found:
        return {"half": row["half"], "measured, GiB": "out of memory"}
    return {"half": row["half"], "measured, GiB": f"{found['allocated'] / GIB:.3f}",
            "context, GiB": f"{found['context'] / GIB:.2f}",
            **{f"{what}, trace": share(row["trace"][what], found[what]) for what in GOALS},
            "account": share(row["account"], found["allocated"])}


def memory_notes(record: dict) -> list[str]:
    """The largest errors by half, with the workspace."""
    lines, more = [], workspace_of(record)
    for which in ("mend", "report"):
        rows = [r for r in record["rows"] if r["half"] == which and "allocated" in r["measured"]]
        if rows:
            worst = {what: max(abs((r["trace"][what] + more) / r["measured"][what] - 1) for r in rows)
                     for what in GOALS}
            worst["account"] = max(abs((r["account"] + more) / r["measured"]["allocated"] - 1) for r in rows)
            lines.append(f"{which}, {len(rows)} cells, off by at most: "
                         + ", ".join(f"{what} {error:.2%}" for what, error in worst.items()))
    return lines


# ---------------------------------------------------------------- verdicts

CAPS = (8, 12, 16, 24)  # GiB
RECIPES = {  # name -> a cell with batch 1
    "ours, full": Cell("ours", "llama-3.2-1b", "full", ALL_LINEAR, "bfloat16", False, True, 1, 512),
    "ours, LoRA all": Cell("ours", "llama-3.2-3b", "lora", ALL_LINEAR, "bfloat16", False, True, 1, 512),
    "ours, NF4 LoRA all": Cell("ours", "llama-3.2-3b", "qlora", ALL_LINEAR, "bfloat16", False, False, 1, 512),
    "ours, LoRA q,v, autocast": Cell("ours", "llama-3.2-1b", "lora", None, "float32", True, False, 1, 512),
    "transformers, LoRA q,v": Cell("transformers", "llama-3.2-1b", "lora", None, "bfloat16", False, False, 1, 512),
    "GPT-2, full, autocast": Cell("GPT-2", "gpt2-medium", "full", ALL_LINEAR, "float32", True, True, 1, 512),
}


def card_of(cap: int) -> Card:
    """A card of which the driver reports so many bytes."""
    return Card("capped", cap, cap, 1.0, 1.0)


def verdict_cells(cap: int, recipe: Cell) -> dict[str, Cell]:
    """With the largest batch that is said to fit, and the smallest that is said not to; or with one row."""
    says = lambda batch: judge(replace(recipe, batch=batch).bill(), card_of(cap)).answer
    most = largest(lambda n: says(n) == FITS, LARGEST)
    least = largest(lambda n: says(n) != NOT, LARGEST) + 1
    return {f"{batch} x {recipe.seq}": replace(recipe, batch=batch) for batch in dict.fromkeys((max(most, 1), least))}


def verdict_row(cap: int, cell: Cell, dry: bool) -> dict:
    cell.need_packages()
    verdict = judge(cell.bill(), card_of(cap))
    if dry:
        held = traced(cell)["reserved"] + CUBLAS_WORKSPACE["Hopper, Blackwell"] + GIB // 2  # of a context
        found = {"reserved": held} if held <= cap else {"out_of_memory": cap}
    elif cap > torch.cuda.get_device_properties(0).total_memory:
        raise Skip("the card is smaller than the cap")
    else:
        found = answer(in_its_own_process(cell, dry, cap))
    return asdict(cell) | {"cap": cap, "verdict": verdict.answer, "need": verdict.need, "measured": found,
                           "fitted": "out_of_memory" not in found}


@cache  # the batches at the edge are found by hundreds of bills
def verdict_items(dry: bool) -> dict:
    caps, recipes = [cap * GIB for cap in CAPS], RECIPES
    if dry:
        caps = [2 * GIB]
        recipes = {name: replace(RECIPES[name], spec=spec, seq=64)
                   for name, spec in (("ours, NF4 LoRA all", "tiny-llama"), ("GPT-2, full, autocast", "tiny-gpt2"))}
    return {f"{cap / GIB:g} GiB, {name}, {rows}": partial(verdict_row, cap, cell, dry)
            for cap in caps for name, recipe in recipes.items() for rows, cell in verdict_cells(cap, recipe).items()}


def verdict_goals(record: dict) -> list[str]:
    """A false "fits", by the verdict as it is given now."""
    lines = []
    for row in record["rows"]:
        if not row["fitted"] and judge(cell_of(row).bill(), card_of(row["cap"])).answer == FITS:
            lines.append(f"{row['name']}: said to fit, and did not")
    return lines


def verdict_columns(row: dict) -> dict[str, str]:
    return {"said": row["verdict"], "need, GiB": " to ".join(f"{n / GIB:.2f}" for n in row["need"]),
            "did": "fit" if row["fitted"] else "not fit",
            "reserved, GiB": f"{row['measured'].get('reserved', 0) / GIB:.2f}"}


def verdict_notes(record: dict) -> list[str]:
    seen = Counter((row["verdict"], row["fitted"]) for row in record["rows"])
    return [f"said: {said}; did {'' if fitted else 'not '}fit: {n}" for (said, fitted), n in sorted(seen.items())]


MEMORY = Benchmark(memory_items, memory_goals, memory_columns, memory_notes)
VERDICTS = Benchmark(verdict_items, verdict_goals, verdict_columns, verdict_notes)
