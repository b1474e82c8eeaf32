"""What was measured on a card against what is predicted, on any machine; the scripts that measure, tried out dry."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

import memory
import run
from common import MIB, measured_rows
from memory import CUBLAS_WORKSPACE, DRY_SHAPES, METHODS, MODELS, SHAPES, asdict, cell_of, grid, half, traced

RECORDS = sorted(run.RECORDS.glob("gpu_*.json"))
HOPPER = {"dry": False, "capability": [9, 0], "card": "made up"}


# ---------------------------------------------------------------- the records that are there


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_a_record_meets_its_goals(file):
    record, name = json.loads(file.read_text()), file.stem.removeprefix("gpu_")
    assert not record["dry"] and {"card", "driver", "torch", "command", "date"} <= record.keys()
    assert measured_rows(record) and run.BENCHMARKS[name].misses(record) == []


@pytest.mark.skipif(not any(file.stem == "gpu_memory" for file in RECORDS), reason="no card has been measured yet")
def test_the_grid_is_whole_and_the_trace_still_says_what_it_said():
    rows = measured_rows(json.loads((run.RECORDS / "gpu_memory.json").read_text()))
    assert len(rows) >= 100 and all(row["half"] == half(row["name"]) for row in rows)
    for row in sorted(rows, key=lambda row: row["trace"]["requested"])[:3]:
        assert traced(cell_of(row)) == row["trace"]


# ---------------------------------------------------------------- a dry run of everything


@pytest.mark.whole
def test_a_dry_run_of_everything(tmp_path, capsys):
    before = sorted(run.RECORDS.iterdir())
    assert run.main(["all", "--dry", "--out", str(tmp_path)]) == 0
    said, records = capsys.readouterr(), {file.stem: json.loads(file.read_text()) for file in tmp_path.iterdir()}
    assert said.out.count("every goal is met") == 6 and "MISSED" not in said.out
    assert records.keys() == {f"dry_{name}" for name in run.BENCHMARKS}
    assert all(record["dry"] and "dry run" in record["card"] and measured_rows(record) for record in records.values())
    assert sorted(run.RECORDS.iterdir()) == before
    cells = measured_rows(records["dry_memory"])
    assert {row["model"] for row in cells} == set(MODELS)
    assert {row["method"] for row in cells} >= {"full", "lora", "qlora"}
    assert {row["fitted"] for row in records["dry_verdicts"]["rows"]} == {True, False}


# What a dry run can try in seconds; the first of the grid makes a process of its own.
SOME = {"memory": ("ours, full, bf16", "transformers, LoRA all, autocast, checkpointing", "GPT-2, LoRA q,v, bf16"),
        "nf4": ""}


@pytest.mark.parametrize("name", SOME)
def test_a_dry_run_goes_on_from_what_is_there(name, tmp_path, capsys, monkeypatch):
    items = {item: work for item, work in run.BENCHMARKS[name].items(True).items() if item.startswith(SOME[name])}
    monkeypatch.setitem(run.BENCHMARKS, name, replace(run.BENCHMARKS[name], items=lambda dry: items))
    before = sorted(run.RECORDS.iterdir())
    assert run.main([name, "--dry", "--out", str(tmp_path)]) == 0
    said, file = capsys.readouterr(), tmp_path / f"dry_{name}.json"
    record = json.loads(file.read_text())
    assert "every goal is met" in said.out and "MISSED" not in said.out and sorted(run.RECORDS.iterdir()) == before
    assert record["dry"] and "dry run" in record["card"] and len(measured_rows(record)) == len(items) > 0

    # told again, nothing is measured twice, but a failure is
    rows = record["rows"]
    rows[-1] = {"name": rows[-1]["name"], "failed": "a power cut"}
    file.write_text(json.dumps(record))
    assert run.main([name, "--dry", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count(f"{name} ") == 1
    again = json.loads(file.read_text())
    assert len(measured_rows(again)) == len(items)
    assert [row for row in again["rows"] if row["name"] != rows[-1]["name"]] == rows[:-1]


def test_what_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "dry_nf4.json").write_text(json.dumps({"dry": True, "card": "another", "torch": "1", "rows": []}))
    for arguments, why in ((["memory"], "--dry tries"), (["memory", "--dry", "--out", str(run.RECORDS)], "measures no"),
                           (["nf4", "--dry", "--out", str(tmp_path)], "is of another")):
        with pytest.raises(SystemExit) as stop:
            run.main(arguments)
        assert stop.value.code == 2 and why in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- goals can be missed


def memory_record(error: float = 0.0, **head) -> dict:
    """Every cell of the tiny shapes as a card would measure it on which each prediction is `error` off."""
    rows = []
    for name, cell in grid(DRY_SHAPES).items():
        peak = cell.bill().peak
        bytes_of = int((peak + 32 * MIB) / (1 + error))
        rows.append({"name": name, **asdict(cell), "half": half(name), "account": peak,
                     "trace": dict.fromkeys(("requested", "allocated", "reserved"), peak),
                     "measured": dict.fromkeys(("requested", "allocated", "reserved"), bytes_of) | {"context": 0}})
    return HOPPER | head | {"rows": rows}


def test_memory_goals_are_held():
    assert memory.MEMORY.misses(memory_record()) == [] == memory.MEMORY.misses(memory_record(-0.004))
    short = memory.MEMORY.misses(memory_record(-0.01))  # 1% less than was measured
    cells = len(grid(DRY_SHAPES))
    assert len(short) == 3 * cells and all("too small by more than 0.5%" in line or "goal" in line for line in short)
    assert not any("reserved" in line for line in short)
    assert len(memory.MEMORY.misses(memory_record(0.06))) == 4 * cells
    assert {line.partition(": ")[2].partition(":")[0] for line in memory.MEMORY.misses(memory_record(0.015))} \
        == {"the trace, requested"}
    assert memory.MEMORY.misses(memory_record(capability=[8, 0]))  # whose workspace is another
    one = memory_record()
    one["rows"] = [one["rows"][5] | {"measured": {"out_of_memory": 2**33}}]
    assert "out of memory, though" in memory.MEMORY.misses(one)[0]
    assert memory.MEMORY.misses(HOPPER | {"rows": [{"name": "x", "failed": "why"}]}) == ["x: why"]


def test_the_grid_covers_what_it_says():
    cells = grid(SHAPES)
    assert len(cells) == 3 * 4 * 2 * 2 * 3 == len(set(cells.values())) and len(METHODS) == 4
    assert min(sum(half(name) == which for name in cells) for which in ("mend", "report")) > 50
    assert set(CUBLAS_WORKSPACE) == {"Hopper, Blackwell", "other cards"}
    assert memory.workspace_of({"dry": False, "capability": [12, 0]}) < memory.workspace_of(HOPPER) == 32 * MIB


def test_other_goals_are_held():
    cell = asdict(memory.RECIPES["ours, LoRA all"])
    for fitted, misses in ((True, 0), (False, 1)):
        record = HOPPER | {"rows": [{"name": "v", **cell, "cap": 2**36, "verdict": "fits", "fitted": fitted}]}
        assert len(memory.VERDICTS.misses(record)) == misses

    names = ("the floor", "ours", "PEFT", "PEFT, adapters in the base's dtype")
    row = {"name": "s", "rank": 16, "targets": ["q", "v"], "blocks": 8, "width": 4096, "by_flops": 1.002,
           "seconds": dict(zip(names, (1, 1.04, 1.2, 1.1))), "bytes": dict(zip(names, (100, 110, 130, 120))),
           "predicted": dict(zip(names, (100, 110, 130, 120)))}
    misses = lambda **changes: run.BENCHMARKS["step"].misses(HOPPER | {"rows": [row | changes]})
    assert misses() == []
    assert len(misses(seconds=row["seconds"] | {"ours": 1.06})) == 1 == len(misses(predicted={"ours": 109}))
    assert len(misses(seconds=row["seconds"] | {"ours": 1.3})) == 3
    assert len(misses(bytes=row["bytes"] | {"ours": 131}, predicted={})) == 1
    assert len(misses(bytes=row["bytes"] | {"ours": 120 + 6 * 8 * 16 * 4 * 4096}, predicted={})) == 2

    row = {"name": "d", "shape": [4096, 4096], "held": memory_of(4096), "error": 0.0, "bandwidth": 3e12,
           "seconds": {"ours": 2e-5, "copy": 2.2e-5}}
    misses = lambda **changes: run.BENCHMARKS["nf4"].misses(HOPPER | {"rows": [row | changes]})
    assert misses() == [] and len(misses(error=1e-3)) == len(misses(seconds={"ours": 1e-6})) == 1
    assert len(misses(held=2 * 4096**2)) == 1

    row = {"name": "t", "loss": [9.0, 9.0], "peak": {"plan": 100, "measured": 100}, "moved": {"plan": 7, "measured": 7}}
    misses = lambda **changes: run.BENCHMARKS["stream"].misses(HOPPER | {"rows": [row | changes]})
    assert misses() == []
    assert len(misses(loss=[9.0, float("nan")])) == len(misses(moved={"plan": 7, "measured": 8})) == 1
    assert len(misses(peak={"plan": 99, "measured": 100})) == 1 and misses(peak={"plan": 102, "measured": 100}) == []

    row = {"name": "r", "tokens_per_second": {"ours, routed": 3, "PEFT, mixed batch": 2}}
    assert run.ROUTING.misses(HOPPER | {"rows": [row]}) == []
    row["tokens_per_second"]["PEFT, mixed batch"] = 3
    assert len(run.ROUTING.misses(HOPPER | {"rows": [row]})) == 1


def memory_of(width: int) -> int:
    """Bytes of a square NF4 weight: 4 bits a number, a byte for 64, 4 bytes for 64 x 256, and 4 (QLoRA, section 3)."""
    return width**2 // 2 + width**2 // 64 + width**2 // 64 // 256 * 4 + 4
