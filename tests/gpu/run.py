"""All that is to be measured on an NVIDIA card, beside what was predicted. From the root of the repository:

    python tests/gpu/run.py all                    everything below, some hours
    python tests/gpu/run.py memory                 the memory grid, 144 cells: data/measured/gpu_memory.json
    python tests/gpu/run.py verdicts               fits or not, on a card capped at 8 to 24 GiB: gpu_verdicts.json
    python tests/gpu/run.py step                   time and bytes of a LoRA step at width 4096: gpu_step.json
    python tests/gpu/run.py nf4                    the 4-bit linear and the memory's bandwidth: gpu_nf4.json
    python tests/gpu/run.py stream                 GPT-3 175B within 24 GiB, streamed: gpu_stream.json
    python tests/gpu/run.py routing                a batch of 64 rows over 1, 8 and 64 adapters: gpu_routing.json

It needs requirements-dev.txt, torch for CUDA, nvidia-smi, a card of 80 GB for every cell (what a smaller one cannot
hold is recorded as such), and for transformers' 4-bit cells `pip install bitsandbytes` (else they are skipped, with
that reason). The record is written row by row: the same command goes on where it was stopped, if the card and torch are
the same. It ends with a table and the goals that were missed; exit code 1 if there are any. tests/test_gpu_records.py
holds every record against the predictions, on any machine.

    python tests/gpu/run.py all --dry              the same code on the CPU with tiny shapes, a minute or two

A dry run writes dry_*.json to a temporary folder, never to data/measured, and holds no time against a goal.
"""

import argparse
import gc
import json
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from common import Benchmark, Skip, machine, measured_rows
from memory import MEMORY, VERDICTS, child
from speed import NF4, ROUTING, STEP, STREAM

from minilora.experiments import record
from minilora.helpdesk import DATA
from minilora.tables import table

BENCHMARKS: dict[str, Benchmark] = {"memory": MEMORY, "verdicts": VERDICTS, "step": STEP, "nf4": NF4, "stream": STREAM,
                                    "routing": ROUTING}
RECORDS = DATA / "measured"


def run(name: str, dry: bool, folder: Path) -> Path:
    """Measure every item that the record lacks; return the record's file."""
    file = folder / f"{'dry' if dry else 'gpu'}_{name}.json"
    head, rows = machine(dry), []
    if file.exists():
        old = json.loads(file.read_text())
        if any(old[key] != head[key] for key in ("dry", "card", "torch")):
            raise ValueError(f"{file} is of {old['card']}, torch {old['torch']}; move it away to measure anew")
        rows = measured_rows(old)
    done, items = {row["name"] for row in rows}, BENCHMARKS[name].items(dry)
    for i, (what, work) in enumerate(items.items()):
        if what in done:
            continue
        print(f"{name} {i + 1}/{len(items)}: {what}", file=sys.stderr, flush=True)
        try:
            found = work()
        except Skip as reason:
            found = {"skipped": str(reason)}
        except Exception as error:  # one item's failure is its row: the others go on
            found = {"failed": f"{type(error).__name__}: {error}"}
        rows.append({"name": what} | found)
        record(file.stem, rows, f"python tests/gpu/run.py {name}{' --dry' * dry}", folder, **head)
        gc.collect()
        if not dry:
            torch.cuda.empty_cache()
    return file


def told(name: str, file: Path) -> list[str]:
    """Print a record as a table; return the goals that it misses."""
    found, benchmark = json.loads(file.read_text()), BENCHMARKS[name]
    measured = found | {"rows": measured_rows(found)}
    rows = [(row["name"], benchmark.columns(row)) for row in measured["rows"]]
    columns = list(dict.fromkeys(column for _, shown in rows for column in shown))
    print(f"\n{name}: {found['card']}, torch {found['torch']}, {found['date']}; {file}\n")
    print(table(("", *columns), [(what, *(shown.get(c, "") for c in columns)) for what, shown in rows]))
    reasons = {}
    for row in found["rows"]:
        if "skipped" in row:
            reasons.setdefault(row["skipped"], []).append(row["name"])
    for reason, names in reasons.items():
        print(f"skipped, {reason}: {len(names)}, the first {names[0]}")
    print(*benchmark.notes(measured), sep="\n")
    misses = benchmark.misses(found)
    print(*(f"MISSED {line}" for line in misses), sep="\n")
    print("every goal is met" if not misses else f"{len(misses)} goals are missed")
    return misses


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--child"]:
        child(arguments[1])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("all", *BENCHMARKS))
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--out", type=Path, help="folder of the record; default data/measured, of a dry run a new one")
    o = parser.parse_args(arguments)
    if not (o.dry or torch.cuda.is_available()):
        parser.error("torch sees no CUDA device here; --dry tries everything out on the CPU")
    if o.dry and o.out and o.out.resolve() == RECORDS.resolve():
        parser.error("a dry run measures no card: it may not write to data/measured")
    folder = o.out or (Path(tempfile.mkdtemp(prefix="dry-")) if o.dry else RECORDS)
    names, misses = list(BENCHMARKS) if o.what == "all" else [o.what], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            try:
                file = run(name, o.dry, folder)
            except ValueError as error:
                parser.error(str(error))
            misses += told(name, file)
    return int(bool(misses))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
