"""Time on a card: a LoRA step, the 4-bit linear, the streamed 175B and the routed batch (`run.py step`, `nf4`, ...).

Rows that are compared take turns in one process; figures are medians of seconds. What is said beforehand: by arithmetic
(FLOPs, bytes over the memory's or the bus's bandwidth, which are measured in the same run), and bytes by the trace and
by the account. Peers that are not installed are left out of a row.
"""

import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from blocks import ALL, adapted, stack  # the benches', as are the next three
from common import GIB, MIB, Benchmark, Skip, clock, device, off
from dequantise import plain
from lora_step import contestants, flops, optimizer_of, step
from lora_step import measure as race
from routing import interleaved
from routing import measure as routed

from minilora.llama import LlamaConfig
from minilora.memory import fake, measure
from minilora.memory.costs import four_bit_bytes
from minilora.memory.models import ModelSpec
from minilora.quant import dequantise, quantise, quantise_model
from minilora.stream_run import config_of

# ---------------------------------------------------------------- a LoRA step

SCENES = {f"{where}, rank {rank}": (rank, targets)
          for where, targets in (("q and v", ("q", "v")), ("all linears", ALL)) for rank in (16, 64)}
FLOOR = 1.05  # the goal: ours over the frozen forward and input-gradient
COMPILED, OURS, PEFT = "ours, torch.compile", "ours", ("PEFT", "PEFT, adapters in the base's dtype")


def sizes(dry: bool) -> dict:
    return {"blocks": 2, "width": 64, "batch": 2, "seq": 16} if dry else {"blocks": 8, "width": 4096, "batch": 2,
                                                                          "seq": 2048}


def base_of(dry: bool) -> torch.nn.Sequential:
    s = sizes(dry)
    return stack(s["blocks"], s["width"], torch.bfloat16, device(dry))


def input_of(dry: bool, place: str | None = None) -> torch.Tensor:
    s = sizes(dry)
    return torch.randn(s["batch"], s["seq"], s["width"], dtype=torch.bfloat16, device=place or device(dry),
                       requires_grad=True)


def compiled(base: torch.nn.Module, rank: int, targets: tuple, dry: bool) -> torch.nn.Module:
    return torch.compile(adapted(base, OURS, rank, targets), backend="aot_eager" if dry else "inductor")


def bytes_of(make, dry: bool) -> int:
    """Requested at the peak of the second step of one model alone."""
    if dry:
        x, model = input_of(dry), make()
        return measure(partial(step, model, x, optimizer_of(model)), real=True).requested
    torch.ones(16, 16, device="cuda", dtype=torch.bfloat16) @ torch.ones(16, 16, device="cuda", dtype=torch.bfloat16)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]  # cuBLAS's workspace and the base it is made from
    x, model = input_of(dry), make()
    opt = optimizer_of(model)
    step(model, x, opt)
    torch.cuda.reset_peak_memory_stats()
    step(model, x, opt)
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def predicted_bytes(rank: int, targets: tuple, dry: bool) -> dict[str, int]:
    """The same by the trace, but for what a compiler makes of it."""
    s, found = sizes(dry), {}
    for name in contestants(torch.nn.Sequential(), rank, targets):
        with fake():
            model = contestants(stack(s["blocks"], s["width"], torch.bfloat16), rank, targets)[name]()
            x, opt = input_of(dry, "cpu"), optimizer_of(model)
        found[name] = measure(partial(step, model, x, opt), "cpu" if dry else "cuda").requested
    return found


def step_row(rank: int, targets: tuple, dry: bool) -> dict:
    base = base_of(dry)
    makers = contestants(base, rank, targets)
    held = {name: bytes_of(make, dry) for name, make in makers.items()}
    makers[COMPILED] = partial(compiled, base, rank, targets, dry)
    if not dry:  # a trace's dispatch mode keeps torch.compile from compiling
        held[COMPILED] = bytes_of(makers[COMPILED], dry)
    seconds = race({name: make() for name, make in makers.items()}, input_of(dry), 3 if dry else 30, clock)
    s = sizes(dry)
    least, added = flops(base, rank, targets, s["batch"], s["seq"])
    return s | {"rank": rank, "targets": targets, "seconds": {n: statistics.median(t) for n, t in seconds.items()},
                "bytes": held, "predicted": predicted_bytes(rank, targets, dry), "by_flops": 1 + added / least}


def step_items(dry: bool) -> dict:
    return {name: partial(step_row, rank, targets, dry)
            for name, (rank, targets) in list(SCENES.items())[:1 if dry else None]}


def step_goals(record: dict) -> list[str]:
    lines = []
    for row in record["rows"]:
        name, t, held = row["name"], row["seconds"], row["bytes"]
        for what, predicted in row["predicted"].items():
            lines += off(f"{name}: bytes of {what}, the trace", predicted, held[what], 0.01)
        if record["dry"]:  # the adapters are most of so small a model
            continue
        lines += [f"{name}: ours holds {held[OURS]:,} bytes, {peer} {held[peer]:,}" for peer in PEFT
                  if held[OURS] >= held[peer] + wider(row, peer)]
        if t[OURS] / t["the floor"] > FLOOR:
            lines.append(f"{name}: ours takes {t[OURS] / t['the floor']:.3f} of the floor, the goal is {FLOOR}; "
                         f"by FLOPs {row['by_flops']:.3f}")
        lines += [f"{name}: ours takes {t[OURS] / t[peer]:.3f} of {peer}" for peer in PEFT if t[OURS] >= t[peer]]
    return lines


def wider(row: dict, peer: str) -> int:
    """What adapters in fp32, as ours are, hold beyond a peer's in bf16: 2 more bytes for each of their numbers and for
    each of Adam's two moments. Their gradients, not all there at the peak, are left out."""
    if peer == "PEFT":
        return 0
    numbers = sum(row["rank"] * row["width"] * (5 if name in ("up", "down") else 2) for name in row["targets"])
    return 6 * numbers * row["blocks"]


def step_notes(record: dict) -> list[str]:
    """The bytes of fp32 adapters are no secret: where PEFT's in bf16 hold less, it is said by how much."""
    return [f"{row['name']}: ours holds {(row['bytes'][OURS] - row['bytes'][PEFT[1]]) / MIB:+.1f} MiB beside PEFT with "
            f"bf16 adapters; fp32 adapters and their moments make {wider(row, PEFT[1]) / MIB:.1f}"
            for row in record["rows"]]


def step_columns(row: dict) -> dict[str, str]:
    floor = row["seconds"]["the floor"]
    return {"floor, ms": f"{1e3 * floor:.2f}", "by FLOPs": f"{row['by_flops']:.3f}"} | {
        name: f"{s / floor:.3f}" + (f", {row['bytes'][name] / GIB:.3f} GiB" if name in row["bytes"] else "")
        for name, s in row["seconds"].items()}


# ---------------------------------------------------------------- the 4-bit linear


def dequantise_row(out: int, inp: int, dry: bool) -> dict:
    """Seconds to make one weight dense, beside a copy of as many bf16 numbers, which sets the bandwidth."""
    weight = torch.randn(out, inp, dtype=torch.bfloat16, device=device(dry))
    q, other = quantise(weight), torch.empty_like(weight)
    rows = {"ours": lambda: dequantise(q, torch.bfloat16), "copy": lambda: other.copy_(weight)}
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        theirs = quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
        rows["bitsandbytes"] = lambda: dequantize_4bit(*theirs)
    except ImportError:
        pass
    reference = plain(quantise(weight.cpu()), torch.bfloat16)
    error = (dequantise(q, torch.bfloat16).cpu().float() - reference.float()).abs().max().item()
    seconds = interleaved(rows, 5 if dry else 100, clock)
    return {"shape": [out, inp], "error": error,
            "held": sum(t.nbytes for t in vars(q).values() if isinstance(t, torch.Tensor)),
            "bandwidth": 4 * out * inp / seconds["copy"], "seconds": seconds}


def four_bit_step_row(dry: bool) -> dict:
    """Seconds of a step of LoRA, rank 16 on all linears, over a bf16 base and over the same in NF4."""
    base = base_of(dry)
    models = {"bf16": adapted(base, OURS, 16, ALL), "NF4": adapted(quantise_model(base), OURS, 16, ALL)}
    seconds = race(models, input_of(dry), 3 if dry else 30, clock)
    return sizes(dry) | {"seconds": {name: statistics.median(s) for name, s in seconds.items()}}


def nf4_items(dry: bool) -> dict:
    shapes = ((128, 192),) if dry else ((4096, 4096), (14336, 4096), (12288, 12288))
    rows = {f"dequantise {out} x {inp}": partial(dequantise_row, out, inp, dry) for out, inp in shapes}
    return rows | {"a step": partial(four_bit_step_row, dry)}


def least_seconds(row: dict) -> float:
    """Of reading the codes and writing the weights, at the bandwidth of the copy."""
    return (four_bit_bytes(row["shape"][0] * row["shape"][1], True) + 2 * math.prod(row["shape"])) / row["bandwidth"]


def nf4_goals(record: dict) -> list[str]:
    """No share of the bandwidth was promised: what is held is that the weights are right, and as small as was said."""
    lines = []
    for row in record["rows"]:
        if "shape" in row:
            lines += [f"{row['name']}: off by {row['error']} from the definition"] * (row["error"] > 0)
            lines += off(f"{row['name']}: bytes stored", four_bit_bytes(math.prod(row["shape"]), True),
                         row["held"], 1e-4)
            if not record["dry"] and least_seconds(row) > 1.1 * row["seconds"]["ours"]:
                lines.append(f"{row['name']}: faster than its bytes allow, so the clock is wrong")
    return lines


def nf4_columns(row: dict) -> dict[str, str]:
    shown = {name: f"{1e3 * s:.3f} ms" for name, s in row["seconds"].items()}
    if "shape" not in row:
        return shown | {"NF4 / bf16": f"{row['seconds']['NF4'] / row['seconds']['bf16']:.3f}"}
    return shown | {"copy, GB/s": f"{row['bandwidth'] / 1e9:,.1f}",
                    "share of it, ours": f"{least_seconds(row) / row['seconds']['ours']:.1%}"}


# ---------------------------------------------------------------- the streamed 175B

STREAMS = {"LoRA q,v, rank 4": (4, "q_proj,v_proj"), "LoRA all, rank 8": (8, "all-linear")}


def gpt3(dry: bool) -> tuple[LlamaConfig, str]:
    """GPT-3's shape, with as many layers as host memory has room for, and what was left out."""
    whole = config_of("gpt3-175b")
    if dry:
        return LlamaConfig(192, 64, 96, 4, 4, max_position_embeddings=64), "all but the idea: a dry run"
    free = next(int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemAvailable")) * 1024
    spec = ModelSpec.from_config(whole.to_hf())
    layer = sum(four_bit_bytes(m.parameters, True) for m in spec.linears())
    room = int((0.9 * free - 4 * spec.outer_parameters) / layer)
    if room < 5:
        raise Skip(f"{free / GIB:.0f} GiB of host memory hold {max(room, 0)} layers")
    if room >= whole.num_hidden_layers:
        return whole, ""
    return replace(whole, num_hidden_layers=room), f"{room} layers of {whole.num_hidden_layers}: host memory is short"


def bus_speed(dry: bool) -> float:
    """Bytes a second of a copy from pinned host memory, the best of ten."""
    host = torch.empty(2**22 if dry else 2**30, dtype=torch.uint8, pin_memory=not dry)
    there = torch.empty_like(host, device=device(dry))
    times = []
    for _ in range(10):
        start = clock()
        there.copy_(host)
        times.append(clock() - start)
    return host.nbytes / min(times)


def stream_row(rank: int, targets: str, dry: bool) -> dict:
    config, reduced = gpt3(dry)
    seq, budget = (32, "512MiB") if dry else (2048, "24GiB")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config.to_hf()))
        command = [sys.executable, "-m", "minilora", "stream", "--config", folder, "--quantise", "nf4",
                   "--rank", str(rank),
                   "--targets", targets, "--batch", "1", "--seq", str(seq), "--steps", "3", "--budget", budget,
                   "--device", device(dry), "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["without a word"])[-1])
    found = json.loads(done.stdout)
    return {"layers": config.num_hidden_layers, "reduced": reduced, "budget": budget, "bus": bus_speed(dry),
            **{key: found[key] for key in ("loss", "peak", "moved", "flops", "seconds")}}


def stream_items(dry: bool) -> dict:
    return {name: partial(stream_row, rank, targets, dry) for name, (rank, targets) in STREAMS.items()}


def stream_goals(record: dict) -> list[str]:
    lines = []
    for row in record["rows"]:
        name, moved = row["name"], row["moved"]
        if moved["measured"] != moved["plan"]:
            lines.append(f"{name}: moved {moved['measured']:,} bytes a step, planned {moved['plan']:,}")
        if not all(map(math.isfinite, row["loss"])):
            lines.append(f"{name}: the loss is no number: {row['loss']}")
        if not record["dry"]:  # a process's anonymous memory says nothing of so small a model
            lines += off(f"{name}: the plan's peak", row["peak"]["plan"], row["peak"]["measured"], 0.03)
    return lines


def stream_columns(row: dict) -> dict[str, str]:
    rate = row["moved"]["measured"] / row["seconds"]["step"]
    return {"layers": str(row["layers"]), "peak, GiB": f"{row['peak']['measured'] / GIB:.2f}",
            "plan, GiB": f"{row['peak']['plan'] / GIB:.2f}", "s a step": f"{row['seconds']['step']:.2f}",
            "waited, s": f"{row['seconds']['waiting']:.2f}", "moved, GiB": f"{row['moved']['measured'] / GIB:.2f}",
            "share of the bus": f"{rate / row['bus']:.1%}",
            "TFLOP/s": f"{row['flops'] / row['seconds']['step'] / 1e12:.3f}",
            "reduced": row["reduced"]}


# ---------------------------------------------------------------- many adapters in one batch

ROWS = 64


def routing_row(adapters: int, dry: bool) -> dict:
    """Tokens a second of a forward of 64 rows, row i through adapter i modulo their number, rank 16 on all linears."""
    blocks, width, seq, dtype = (1, 64, 4, torch.float32) if dry else (4, 4096, 128, torch.bfloat16)
    base = stack(blocks, width, dtype, device(dry)).eval().requires_grad_(False)
    x = torch.randn(ROWS, seq, width, dtype=dtype, device=device(dry))
    forward, switch = routed(base, list(ALL), [4 if dry else 16] * adapters, x, 2 if dry else 30, clock)
    return {"adapters": adapters, "blocks": blocks, "width": width, "seq": seq, "switch": switch,
            "tokens_per_second": {name: ROWS * seq / s for name, s in forward.items()}}


def routing_items(dry: bool) -> dict:
    return {f"{n} adapters": partial(routing_row, n, dry) for n in (1, 8, 64)}


def routing_goals(record: dict) -> list[str]:
    """The outputs were compared as they were measured; the goal is to be ahead of PEFT's mixed batch."""
    fast = lambda row, who: row["tokens_per_second"][who]
    return [f"{row['name']}: {fast(row, 'ours, routed'):,.0f} tokens a second, "
            f"PEFT {fast(row, 'PEFT, mixed batch'):,.0f}"
            for row in record["rows"] if not record["dry"]
            and fast(row, "ours, routed") <= fast(row, "PEFT, mixed batch")]


def routing_columns(row: dict) -> dict[str, str]:
    """Arithmetic says that as many rows through one adapter take as long."""
    alone = row["tokens_per_second"]["ours, one adapter"]
    return {name: f"{t:,.0f} ({t / alone:.3f})" for name, t in row["tokens_per_second"].items()}


STEP = Benchmark(step_items, step_goals, step_columns, step_notes)
NF4 = Benchmark(nf4_items, nf4_goals, nf4_columns)
STREAM = Benchmark(stream_items, stream_goals, stream_columns)
ROUTING = Benchmark(routing_items, routing_goals, routing_columns)
