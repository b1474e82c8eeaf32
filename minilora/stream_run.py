"""A streamed run beside its plan: ``python -m minilora stream`` builds a store, trains a few steps under a hard budget
of device memory, and says what was held, moved and waited for, next to what `memory.estimate` said before.

Device memory is CUDA's, or without CUDA the process's anonymous memory: what it wrote itself and no file backs. The
page cache, which holds what was read of the store, is not in it: it is the system's, and gives way.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .adapters import check_free, save_adapter
from .checkpoints import read_json
from .config import ALL_LINEAR, LoRAConfig, require
from .extract import check_device
from .injection import inject
from .llama import LlamaConfig
from .memory.bill import Bill, estimate
from .memory.cards import Card
from .memory.config_file import suggest
from .memory.costs import flops
from .memory.fitting import judge
from .memory.models import FAMILIES, ModelSpec
from .memory.run import Training
from .quant import LEVELS
from .stream import StreamedLlama, Traffic
from .tables import bytes_text, table
from .train import train
from .weight_store import Source, Store, build_store

M_MMAP_THRESHOLD = -3  # of mallopt
# what a process on the CPU takes besides the plan: 8 MiB for the stack of the thread that prefetches, and what the
# allocator and Python keep in reserve. Below it no error can be promised: C code that gets no memory ends the process
FLOOR = 32 * 2**20
UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def config_of(name: str) -> LlamaConfig:
    """The shape of a known model as our decoder has it.

    GPT-3's MLP has no gate; ours, gated and 8/3 d wide in place of 4 d, makes the same 12 d^2 weights a layer.

    Raises:
        ValueError: no such model, or one that our decoder is not.
    """
    spec = ModelSpec.preset(name)
    gpt3, ours = name == "gpt3-175b", spec.layout.own_decoder is not None
    if not (gpt3 or ours):
        known = ", ".join(kind for kind, family in FAMILIES.items() if family.own_decoder)
        require(False, f"our decoder is no {name}: expected a model of {known}, or gpt3-175b", spec.family)
    return LlamaConfig(spec.vocab, spec.hidden, spec.ffn if ours else spec.hidden * 8 // 3, spec.layers, spec.heads,
                       spec.kv_heads, spec.head_dim, spec.context, attention_bias=ours and spec.qkv_bias,
                       attention_out_bias=ours and spec.out_bias, tie_word_embeddings=spec.tied)


def size_of(text: str) -> int:
    """Bytes of "24GiB" and the like."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)", text.strip().upper())
    require(found, "budget must be a size such as 24GiB", text)
    size = float(found[1]) * UNITS[found[2]]
    require(0 < size < 2**63, "budget must be a size that a machine can have", text)
    return int(size)


def device_of(name: str | None) -> torch.device:
    """The device of that name, on which a run can be planned whether it is there or not; the default is cuda, if there
    is one, else cpu."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name is None else name
    require(re.fullmatch(r"cpu|cuda(:\d{1,3})?", name), "device must be cpu, cuda or cuda:NUMBER", name)
    return torch.device(name)


# ---------------------------------------------------------------- what a process holds


def check_system(device: torch.device) -> None:
    """What host memory a process takes is counted and limited as Linux does it; on CUDA torch does both.

    Raises:
        ValueError: the run is to take place in host memory, on another system.
    """
    if device.type != "cuda" and sys.platform != "linux":
        raise ValueError(f"a run on the CPU is measured through Linux's /proc, which {sys.platform} does not have; "
                         "expected --plan, or --device cuda")


def bytes_of(what: str) -> int:
    """A line of Linux's /proc/self/status in bytes: "RssAnon", the anonymous memory; "VmData", all that is its own."""
    return int(re.search(rf"^{what}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024


# run beside a process, until its input ends: prints a line when it has begun, then the most anonymous memory, kB
WATCH = """
import select, sys
status, most = open(f"/proc/{sys.argv[1]}/status", "rb", buffering=0), 0
print("begun", flush=True)
while not select.select([sys.stdin], [], [], 0.001)[0]:
    status.seek(0)
    most = max(most, int(status.read().split(b"RssAnon:")[1].split()[0]))
print(most)
"""


class Peak:
    """The most device memory that was held inside a `with`, over what was held before; ``.bytes`` after it.

    CUDA counts by itself. The kernel keeps no peak of anonymous memory, so a process beside this one (a thread would
    hold up every operator) looks at it every millisecond.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        # freed blocks of 128 KiB and more go back to the system, so that what is free is not counted (glibc)
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)
        self.watch = subprocess.Popen([sys.executable, "-S", "-c", WATCH, str(os.getpid())], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, text=True)
        self.watch.stdout.readline()
        self.before = bytes_of("RssAnon")
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        else:
            self.bytes = int(self.watch.communicate()[0]) * 1024 - self.before


@contextmanager
def budget_of(device: torch.device, budget: int | None) -> Iterator[None]:
    """Inside it an allocation beyond the budget fails: CUDA's share of the card, else the process's own data
    (RLIMIT_DATA, which counts what is asked for, touched or not). The failure is one ValueError."""
    on_card = device.type == "cuda"
    if not on_card:
        import resource  # Windows has none; `check_system` has said so

        limits = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        if budget and on_card:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
        elif budget:
            resource.setrlimit(resource.RLIMIT_DATA, (bytes_of("VmData") + budget, limits[1]))
        yield
    except (MemoryError, RuntimeError) as e:
        if budget is None or not (isinstance(e, MemoryError) or "memory" in str(e) or "new thread" in str(e)):
            raise
        raise ValueError(f"the run did not fit into its budget of {bytes_text(budget)}: {e}") from None
    finally:
        if budget and on_card:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        if not on_card:
            resource.setrlimit(resource.RLIMIT_DATA, limits)


# ---------------------------------------------------------------- the run


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """A step of a tiny decoder, so that what torch sets up once for itself is not taken for the run's."""
    store = Store.make(Source(LlamaConfig(64, 64, 64, 2, 2), dtype), "nf4")
    model = inject(StreamedLlama(store, device), LoRAConfig(2, 4))
    ids = torch.zeros(1, 8, dtype=torch.long, device=device)
    train(model, lambda step: (ids, ids), steps=2, lr=1e-3, progress=False, loss=StreamedLlama.loss)


def measure(store: Store, lora: LoRAConfig, batch: int, seq: int, steps: int, device: torch.device,
            budget: int | None = None, offload: bool = False, out: str | None = None) -> dict:
    """Train on random tokens and return the loss of every step and what a step took.

    Returns:
        loss: of every step. peak: bytes of device memory. moved, copying, waiting: of the last step, bytes and seconds.
        step: seconds of the last step (of the first, if there is no other).
    """
    warm_up(device, store.dtype)
    generator, seen = torch.Generator().manual_seed(0), []
    data = [torch.randint(store.config.vocab_size, (batch, seq), generator=generator) for _ in range(2)]
    with budget_of(device, budget), Peak(device) as peak:
        model = inject(StreamedLlama(store, device, offload=offload), lora)
        ids, targets = (t.to(device) for t in data)
        layers, bar = store.config.num_hidden_layers, tqdm(total=0, unit="layer", leave=False, disable=None)

        def told(i: int) -> None:
            bar.set_description(f"step {len(seen) + 1}: " + (f"layer {i} of {layers}" if i < layers else "head"))
            bar.update()

        model.visits.on_fetch = told
        log = train(model, lambda step: (ids, targets), steps=steps, lr=1e-4, progress=False, loss=StreamedLlama.loss,
                    on_step=lambda *state: seen.append((replace(model.visits.traffic), state[2].seconds)))
        bar.close()
        if out:
            save_adapter(model, out)
    # from one backward's end to the next: what stays between steps is not fetched again
    (before, begun), (after, ended) = ([(Traffic(), 0.0)] + seen)[-2:]
    moved = {name: value - getattr(before, name) for name, value in asdict(after).items()}
    return {"loss": log.loss, "peak": peak.bytes, "moved": moved["bytes"], "copying": moved["copying"],
            "waiting": moved["waiting"], "step": ended - begun if len(seen) > 1 else log.seconds}


def stream_command(parser, arguments: list[str]) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="random weights of a known shape: `models` lists them")
    which.add_argument("--config", type=Path, help="a checkpoint folder; with a config.json alone, random weights")
    parser.add_argument("--quantise", help=f"store the layers' linears in {' or '.join(LEVELS)}; default 16 bits")
    parser.add_argument("--store", type=Path, help="folder of the store, built if need be; default: in host memory")
    parser.add_argument("--base", choices=("host", "disk"), help="where it waits; default disk with --store, else host")
    parser.add_argument("--budget", help="of device memory, such as 24GiB; an allocation beyond it fails")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default=ALL_LINEAR, help="modules to adapt, commas between them")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--offload", action="store_true", help="saved inputs wait in host memory")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--card", default="rtx-4090", help="whose limits to plan with: `cards` lists them")
    parser.add_argument("--out", help="save the adapter to this folder")
    parser.add_argument("--plan", action="store_true", help="say what it would take, and stop")
    parser.add_argument("--json", action="store_true")
    o = parser.parse_args(arguments)
    device = device_of(o.device)
    budget, card = size_of(o.budget) if o.budget is not None else None, Card.of(o.card)
    if o.quantise is not None and o.quantise not in LEVELS:
        raise ValueError(f"no quantisation {o.quantise!r}; {suggest(o.quantise, LEVELS)}")
    require(0 < o.steps < 2**31, "steps must be a positive integer", o.steps)
    if o.out:
        check_free(o.out)
    base = o.base or ("disk" if o.store else "host")
    if base == "disk" and not (o.store or o.plan):
        raise ValueError("base disk needs --store, a folder for it")
    if o.model is not None:
        source = config = config_of(o.model)
    else:
        if not o.config.is_dir():
            raise ValueError(f"there is no {o.config}; expected a checkpoint folder, or one with a config.json")
        config = LlamaConfig.from_hf(read_json(o.config / "config.json"))
        source = o.config if list(o.config.glob("*.safetensors")) else config
    targets = o.targets if o.targets == ALL_LINEAR else tuple(o.targets.split(","))
    run = Training("qlora" if o.quantise else "lora", o.rank, targets, o.batch, o.seq, checkpointing=True, base=base,
                   offload=o.offload)
    bill = estimate(ModelSpec.from_config(config.to_hf() | {"_name_or_path": o.model or o.config.name}), run)
    floor = FLOOR if device.type == "cpu" else 0
    if budget and bill.peak + floor > budget:
        itself = f", and a process on the CPU {bytes_text(floor)} for itself" * bool(floor)
        raise ValueError(f"the plan needs {bytes_text(bill.peak)} of device memory{itself}: more than the budget of "
                         f"{bytes_text(budget)}; shorter sequences, --offload or --quantise nf4 take less")
    verdict, found = judge(bill, card), None
    if not o.json:
        print(f"{bill.spec.name}: {bill.spec.parameters:,} weights\n\nThe plan\n\n{bill}\n\n{verdict}\n", flush=True)
    if not o.plan:
        check_device(str(device))
        check_system(device)
        if o.store:
            build_store(source, o.store, o.quantise, device=device, progress=not o.json and sys.stderr.isatty())
            store = Store.open(o.store, hold=base == "host")
        else:
            store = Store.make(Source(source), o.quantise, device)
        found = measure(store, LoRAConfig(o.rank, 2 * o.rank, targets), o.batch, o.seq, o.steps, device, budget,
                        o.offload, o.out)
    if o.json:
        print(json.dumps(compared(bill, found) | {"plan": bill.to_dict(), "card": verdict.to_dict()}, indent=2))
    elif found:
        print(told_of(bill, found, card if device.type == "cuda" else None))


def compared(bill: Bill, found: dict | None) -> dict:
    """The plan's figures and the measured ones, by what they are."""
    if found is None:
        return {}
    weights = sum(size for what, size in bill.moved.items() if what != "saved inputs, away and back")
    return {"loss": found["loss"], "peak": {"plan": bill.peak, "measured": found["peak"]},
            "moved": {"plan": weights, "measured": found["moved"]}, "flops": flops(bill.spec, bill.run),
            "seconds": {name: found[name] for name in ("step", "copying", "waiting")}}


def told_of(bill: Bill, found: dict, card: Card | None) -> str:
    """The end of a run as a table; with a card the shares of its limits."""
    c = compared(bill, found)
    step, flops, moved = c["seconds"]["step"], c["flops"], c["moved"]["measured"]
    rows = [(what, bytes_text(c[key]["plan"]), bytes_text(c[key]["measured"]),
             f"{c[key]['measured'] / c[key]['plan']:.3f}")
            for what, key in (("device memory, at the peak", "peak"), ("moved a step, weights", "moved"))]
    speed = [("moved", f"{moved / step / 1e9:.2f} GB/s", card and moved / step / card.bus),
             ("computed", f"{flops / step / 1e12:.3f} TFLOP/s", card and flops / step / card.flops)]
    return "\n\n".join((
        "The run, loss " + ", ".join(f"{loss:.4f}" for loss in c["loss"]),
        table(("", "plan", "measured", "measured / plan"), rows),
        f"{step:.3f} s a step, of which computing waited {c['seconds']['waiting']:.3f} s for weights",
        table(("", "in a step", f"of the limit of {card.name}" if card else ""),
              [(what, rate, f"{share:.1%}" if card else "") for what, rate, share in speed])))
