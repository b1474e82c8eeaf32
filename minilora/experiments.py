"""The experiments behind the notebooks: adapt the base to a task, and sweeps of such runs, recorded in data/measured/.

    python -m minilora.experiments targets        writes data/measured/targets.json, with the command and the machine

A recorded sweep is a list of rows; every notebook that shows one trains a row of it again and compares.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .adapters import load_adapter, save_adapter
from .config import LoRAConfig
from .desk import DATA, TASKS, batches, evaluate, load_base, load_task
from .distributed import WAYS, Wire, first, many
from .insert import inject
from .adapters import fingerprint, load_adapter, save_adapter
from .config import LoRAConfig
from .desk import DATA, batches, evaluate, load_base, load_task, tokenizer
from .family import IA3, BitFit, BottleneckAdapters, Method, PrefixTuning, PromptTuning, insert
from .insert import lora_layers, merge
from .config import LoRAConfig, need
from .desk import DATA, batches, evaluate, load_base, load_task
from .insert import inject, lora_layers
from .llama import Llama
from .quant import BLOCK, nf4_levels, quantise_model
from .insert import inject, merge
from .llama import Llama, LlamaConfig
from .train import Log, train

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LR = {"lora": 1e-2, "full": 1e-3}  # what the learning-rate sweep found best on tone


@dataclass
class Run:
    """A model adapted to a task: its log, and loss (nats a token) and exact match on the test file."""

    model: nn.Module
    log: Log
    loss: float
    exact: float


def adapt(task: str, config: LoRAConfig | Method | None = None, *, base: str | nn.Module = "base", steps: int = 150,
          lr: float | None = None, batch: int = 32, seed: int = 0, on_step: Callable | None = None,
          prepare: Callable[[nn.Module], None] | None = None) -> Run:
    """Fine-tune a copy of the base on a task's train file and score it on its test file.

    Args:
        config: the LoRA, or its relative, to insert; None trains every weight.
        base: a base's name, "random" (its shape, fresh weights), or a model, which is left alone.
        lr: the peak learning rate; None takes that of `LR`.
        seed: of the order of the batches, the adapter's start and dropout.
        prepare: called with the model when it is about to train.
    """
    if isinstance(base, nn.Module):
        model = copy.deepcopy(base)
    else:
        model = Llama(load_base().config, seed) if base == "random" else load_base(base)
    torch.manual_seed(seed)
    if config is None:
        model.requires_grad_(True)
    else:
        insert(model, config)
    if prepare is not None:
        prepare(model)
    data = load_task(task)
    log = train(model, batches(data.train, batch, seed), steps=steps, seed=seed, on_step=on_step, progress=False,
                lr=lr or LR["full" if config is None else "lora"])
    return Run(model, log, *evaluate(model, data.test))


SWEEPS: dict[str, Callable[[], list[dict]]] = {}


def sweep(function: Callable[[], list[dict]]) -> Callable[[], list[dict]]:
    """Makes a function that trains and returns rows a sweep of the command line."""
    SWEEPS[function.__name__] = function
    return function


@sweep
def targets() -> list[dict]:
    """Notebook 03: which modules to adapt, at (nearly) one budget of trainable parameters; full fine-tuning beside."""
    budgets = {"q": (("q_proj",), 16), "k": (("k_proj",), 16), "v": (("v_proj",), 16), "o": (("o_proj",), 16),
               "q, v": (("q_proj", "v_proj"), 8), "q, k, v, o": (ATTENTION, 4), "up": (("up_proj",), 8),
               "down": (("down_proj",), 8), "gate, up, down": (MLP, 3), "all": (ATTENTION + MLP, 2), "full": (None, 0)}
    rows = []
    for task, (name, (modules, rank)), seed in grid(("tone", "ticket"), budgets.items(), range(2)):
        run = adapt(task, modules and LoRAConfig(rank, 2 * rank, modules), steps=80, seed=seed)
        rows.append({"task": task, "targets": name, "rank": rank, "seed": seed, "trained": run.log.trained,
                     "loss": round(run.loss, 4), "exact": run.exact})
    return rows


@sweep
def adapters() -> list[dict]:
    """Notebooks 08, 09 and 13: five small adapters, written to data/adapters/, each scored on its own task and base."""
    rows = []
    for name, base in tqdm((("tone", "base"), ("ticket", "base"), ("catalogue", "base"), ("cipher", "base"),
                            ("tone_early", "base_early"))):
        run = adapt(name.removesuffix("_early"), LoRAConfig(2, 4, ATTENTION + MLP), base=base)
        save_adapter(run.model, DATA / "adapters" / name)
        rows.append({"adapter": name, "base": base, "rank": 2, "trained": run.log.trained, "loss": round(run.loss, 4),
                     "exact": run.exact})
    return rows


def next_base() -> Llama:
    """The base's next version, as a desk may make one: 20 steps of full fine-tuning on the catalogue."""
    return adapt("catalogue", steps=20).model


@sweep
def combinations() -> list[dict]:
    """Notebook 09: the base alone ("none") and every adapter of data/adapters/, on every base and every task."""
    rows, bases = [], {"base": load_base(), "base_next": next_base(), "base_early": load_base("base_early")}
    shelf = ("none", *(row["adapter"] for row in measured("adapters")["rows"]))
    for base, adapter, task in grid(bases, shelf, TASKS):
        model = copy.deepcopy(bases[base])
        if adapter != "none":
            load_adapter(model, DATA / "adapters" / adapter, any_base=True)
        loss, exact = evaluate(model, load_task(task).test)
        rows.append({"base": base, "adapter": adapter, "task": task, "loss": round(loss, 4), "exact": exact})
    return rows


SHAPES = {"one token": ("help-desk", 1, 1), "a message": ("help-desk", 1, 64), "32 messages": ("help-desk", 32, 64),
          "one token, wider": ("wider", 1, 1), "a message, wider": ("wider", 1, 64)}


@sweep
def latency() -> list[dict]:
    """Notebook 08: a forward pass with LoRA on all linears, beside and merged, in multiples of the base's time."""
    return [merged_latency(name, rounds=101) for name in tqdm(SHAPES)]


def merged_latency(shape: str, rounds: int) -> dict:
    """One row of `latency`: median seconds of a forward pass, in multiples of the base's. The models take turns, so that
    other work on the machine falls on all alike; "base again" shows what is noise."""
    kind, batch, seq = SHAPES[shape]
    wide = LlamaConfig(730, 768, 2048, 4, 12, tie_word_embeddings=True)
    models = {name: load_base() if kind == "help-desk" else Llama(wide, seed=0)
              for name in ("base", "base again", "beside", "merged", "merged for good")}
    for name in ("beside", "merged", "merged for good"):
        inject(models[name], LoRAConfig(8, 16, ATTENTION + MLP))
    merge(models["merged"])
    merge(models["merged for good"], permanent=True)
    ids = torch.arange(batch * seq).view(batch, seq) % 730  # (B, T)
    seconds = interleaved({name: lambda model=model: model(ids) for name, model in models.items()}, rounds)
    ratios = {name: round(s / seconds["base"], 3) for name, s in seconds.items() if name != "base"}
    return {"shape": shape, "batch": batch, "tokens": seq} | ratios


@torch.no_grad()
def interleaved(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median processor seconds of each call; they run in turn, in an order drawn anew each round (two to warm up)."""
    seconds, order = {name: [] for name in calls}, list(calls)
    for i in range(rounds + 2):
        random.Random(i).shuffle(order)
        for name in order:
            start = time.process_time()
            calls[name]()
            if i >= 2:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


@sweep
def wire() -> list[dict]:
    """Notebook 01: bytes that each process sends in a step of fine-tuning the base, full and LoRA, by DDP and FSDP."""
    rows = []
    for method, parallel, processes in grid(LR, WAYS, (2, 4)):
        alone = exchange(method, None)["loss"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run([*torchrun, "-m", "minilora", "wire", "--method", method, "--parallel", parallel],
                              capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        gap = max(abs(a - b) for a, b in zip(alone, found.pop("loss"), strict=True))
        rows.append(found | {"loss_gap": float(f"{gap:.1e}")})
    return rows


def exchange(method: str, parallel: str | None, steps: int = 20) -> dict:
    """Fine-tune the base on `tone`, LoRA of rank 8 on all linears or every weight: the losses, and what this process
    sent in the last step, by kind (bytes)."""
    model = load_base()
    torch.manual_seed(0)
    if method == "lora":
        inject(model, LoRAConfig(8, 16, ATTENTION + MLP))
    sent, data = {}, batches(load_task("tone").train, 16)
    with Wire() as counter:
        log = train(model, data, steps=steps, lr=LR[method], parallel=parallel, progress=False,
                    on_step=lambda *_: (sent.clear(), sent.update(counter.take())))
    processes = torch.distributed.get_world_size() if many() else 1
    return {"method": method, "parallel": parallel, "processes": processes, "trained": log.trained, "sent": sent,
            "loss": log.loss}


def wire_command(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("--method", choices=LR, default="lora")
    parser.add_argument("--parallel", choices=WAYS, default="ddp")
    found = exchange(**vars(parser.parse_args(arguments)))
    if first():
        print(json.dumps(found))


@torch.no_grad()
def rounded(model: nn.Module, bits: int, shuffle: bool = False) -> nn.Module:
    """Round every linear of the blocks, in place, to the NormalFloat of so many bits with an fp32 absmax a block of 64.

    The weights stay dense: this is about what rounding loses, not about memory. shuffle: the rounded weights of each
    matrix change places at random, so that their histogram is right and nothing else.
    """
    levels = torch.tensor(nf4_levels(bits))
    for linear in (m for m in model.model.layers.modules() if isinstance(m, nn.Linear)):
        blocks = linear.weight.view(-1, BLOCK)  # (b, 64)
        absmax = blocks.abs().amax(1, keepdim=True)
        blocks.copy_(levels[(blocks / absmax)[..., None].sub(levels).abs().argmin(-1)] * absmax)
        if shuffle:
            flat = linear.weight.view(-1)
            flat.copy_(flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))])
    return model


@sweep
def four_bit() -> list[dict]:
    """Notebook 10: LoRA on bases of fewer and fewer bits, on shuffled codes, and full fine-tuning; before and after."""
    config = LoRAConfig(8, 16, "all-linear")
    bases = {"full": load_base(), "fp32": load_base(), "NF4": quantise_model(load_base()),
             "INT4": quantise_model(load_base(), kind="int4"), "3 bits": rounded(load_base(), 3),
             "2 bits": rounded(load_base(), 2), "NF4, shuffled": rounded(load_base(), 4, shuffle=True)}
    before = {(task, name): evaluate(base, load_task(task).test) for task in ("tone", "general")
              for name, base in bases.items()}
    rows = []
    for (task, name), seed in grid(before, range(2)):
        run = adapt(task, None if name == "full" else config, base=bases[name], steps=60, seed=seed)
        loss, exact = before[task, name]
        rows.append({"task": task, "base": name, "seed": seed, "trained": run.log.trained,
                     "loss_before": round(loss, 4), "exact_before": exact, "loss": round(run.loss, 4),
                     "exact": run.exact})
    return rows


@sweep
def race() -> list[dict]:
    """Notebook 06: full fine-tuning (here rank 0) and LoRA, each at its own learning rates, on a near and a far task.
    The validation loss is there to choose the learning rate, the test file to score.

    alpha is 32 at every rank, as where the "about ten times" was measured (Schulman et al. 2025).
    """
    rows = []
    arms = [("tone", 0), ("cipher", 0), ("tone", 8), ("cipher", 8), ("tone", 64), ("cipher", 64), ("tone", 1)]
    rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    for (task, rank), i, seed in grid(arms, range(4), range(3)):
        lr = rates[i + (rank > 0 or task == "cipher")]  # four that hold the bottom
        config = LoRAConfig(rank, 32, ATTENTION + MLP) if rank else None
        run = adapt(task, config, steps=60, batch=16, lr=lr, seed=seed)
        validation = evaluate(run.model, load_task(task).validation).loss
        rows.append({"task": task, "rank": rank, "lr": lr, "seed": seed, "trained": run.log.trained,
                     "validation": round(validation, 4), "loss": round(run.loss, 4), "exact": run.exact})
    return rows


@sweep
def limits() -> list[dict]:
    """Notebook 06: what LoRA lacks on the far task (parts of the model trained alone), and a base that fits ill."""
    cases = [("cipher", "base", "model.layers", (3e-3, 1e-2, 3e-2)),
             ("cipher", "base", "model.embed_tokens", (1e-2, 3e-2, 1e-1)),
             ("tone", "base_early", "lora", (3e-3, 1e-2, 3e-2)), ("tone", "base_early", "", (3e-4, 1e-3, 3e-3))]
    rows = []
    for (task, base, part, rates), i in grid(cases, range(3)):
        model, data = load_base(base), load_task(task)
        torch.manual_seed(0)
        if part == "lora":
            inject(model, LoRAConfig(8, 32, ATTENTION + MLP))
        else:
            model.requires_grad_(False).get_submodule(part).requires_grad_(True)  # "" is the whole model
        log = train(model, batches(data.train, 16), steps=60, lr=rates[i], progress=False)
        loss, exact = evaluate(model, data.test)
        rows.append({"task": task, "base": base, "part": part or "full", "lr": rates[i], "seed": 0,
                     "trained": log.trained, "validation": round(evaluate(model, data.validation).loss, 4),
                     "loss": round(loss, 4), "exact": exact})
    return rows


@sweep
def ranks() -> list[dict]:
    """Notebook 04: the first 10 updates at alpha / r and at alpha / sqrt(r), with Adam and with plain gradient descent.

    alpha is 16 throughout. Rank 256 is more than these matrices have: wasteful, but sound algebra.
    """
    rows = []
    optimizers = {"adam": (torch.optim.AdamW, 1e-3), "sgd": (torch.optim.SGD, 0.01)}
    for name, use_rslora, rank, seed in grid(optimizers, (False, True), (1, 4, 16, 64, 256), range(3)):
        optimizer, lr = optimizers[name]
        config = LoRAConfig(rank, 16, ATTENTION + MLP, use_rslora=use_rslora)
        log = watched(config, optimizer=optimizer, lr=lr, seed=seed)
        rows.append({"optimizer": name, "rslora": use_rslora, "rank": rank, "seed": seed}
                    | {what: [float(f"{x:.4g}") for x in values] for what, values in log.items()})
    return rows


def watched(config: LoRAConfig, *, steps: int = 11, lr: float = 1e-3, optimizer: type = torch.optim.AdamW,
            seed: int = 0, base: nn.Module | None = None, data: Callable | None = None) -> dict[str, list[float]]:
    """A short LoRA run at a constant learning rate, without clipping, that logs how loud the adapter is at every step.

    Args:
        base: changed in place; None takes the pretrained one.
        data: step -> (ids, targets), as in `train`; None takes `tone` in batches of 16.

    Returns:
        Lists whose entry t is taken after t updates: "loss"; "update", ||s BA||_F over all adapted modules together;
        "grad_A", "grad_B", likewise; "activation", the root mean square of s BA x over modules, tokens and features.
    """
    torch.manual_seed(seed)
    model = inject(base or load_base(), config, any_rank=True)
    layers, squares = list(lora_layers(model).values()), []
    log = {"update": [], "grad_A": [], "grad_B": [], "activation": []}

    @torch.no_grad()
    def heard(layer, inputs, output):
        squares.append((layer.scaling * layer.product(inputs[0], layer.lora_A, layer.lora_B)).square().mean())

    @torch.no_grad()
    def on_step(step, model, _):
        # matrices this small are quicker to form than the QR of spectrum.product_norm
        log["update"].append(norm_of_all(layer.scaling * layer.lora_B @ layer.lora_A for layer in layers))
        log["grad_A"].append(norm_of_all(layer.lora_A.grad for layer in layers))
        log["grad_B"].append(norm_of_all(layer.lora_B.grad for layer in layers))
        log["activation"].append(torch.stack(squares).mean().sqrt().item())
        squares.clear()

    hooks = [layer.register_forward_hook(heard) for layer in layers]
    done = train(model, data or batches(load_task("tone").train, 16, seed), steps=steps, lr=lr, warmup=0,
                 schedule="constant", clip=None, seed=seed, optimizer=optimizer, on_step=on_step, progress=False)
    for hook in hooks:
        hook.remove()
    return {"loss": done.loss} | log


def norm_of_all(tensors: Iterable[Tensor]) -> float:
    return torch.stack([t.norm() for t in tensors]).norm().item()


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent k of the power law y = c x^k that fits best: a straight line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def twins(base: nn.Module, data: Callable, config: LoRAConfig, p: float, q: float, *, steps: int = 8, lr: float = 1e-3,
          seed: int = 0, eps: float = 1e-30, clip: float | None = None) -> tuple[Log, Log, float]:
    """Two LoRA runs on copies of `base` that Adam cannot tell apart: the second has alpha / (p q), A0 times p, and the
    learning rates p lr for A and q lr for B (Schulman et al. 2025, "LoRA Without Regret").

    The second run's gradients are 1 / p (A) and 1 / q (B) of the first's. Adam divides that out if its eps is 0, and
    s BA stays the same. A true 0 will not do: the first gradient of A is zero, and 0 / 0 is no number.

    Returns:
        Both logs, and ||s BA - its twin|| / ||s BA|| over all modules after the last step.
    """
    logs, updates = [], []
    for p, q in ((1, 1), (p, q)):
        torch.manual_seed(seed)
        model = inject(copy.deepcopy(base), dataclasses.replace(config, alpha=config.alpha / (p * q)))
        layers = lora_layers(model).values()
        for layer in layers:
            layer.lora_A.data *= p
        groups = [{"params": [layer.lora_A for layer in layers], "lr": p * lr, "eps": eps},
                  {"params": [layer.lora_B for layer in layers], "lr": q * lr, "eps": eps}]
        logs.append(train(model, data, steps=steps, lr=lr, parameters=groups, clip=clip, seed=seed, progress=False))
        updates.append([(layer.scaling * layer.lora_B @ layer.lora_A).detach() for layer in layers])
    apart = norm_of_all(a - b for a, b in zip(*updates)) / norm_of_all(updates[0])
    return *logs, apart


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The learning rate at the bottom of a U: of the parabola through the logarithms of the best point and of its two
    neighbours, which need not be evenly spaced.

    Raises:
        ValueError: the best point is at an end, so that the bottom may lie beyond it.
    """
    i = int(np.argmin(losses))
    need(0 < i < len(rates) - 1, "the best learning rate must lie inside the sweep", rates[i])
    a, b, _ = np.polyfit(np.log(rates[i - 1:i + 2]), np.log(losses[i - 1:i + 2]), 2)
    return float(np.exp(-b / (2 * a)))


def grid(*axes) -> tqdm:
    """Every combination, with a progress bar."""
    return tqdm(list(itertools.product(*axes)))


def measured(name: str) -> dict:
    """A recorded sweep: {"command", "machine", "rows"}.

    Raises:
        ValueError: nothing of that name is recorded.
    """
    path = DATA / "measured" / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"no record {name!r}, expected one of {', '.join(sorted(p.stem for p in path.parent.glob('*')))}")
    return json.loads(path.read_text())


def record(name: str, rows: list[dict], command: str) -> None:
    """Write rows to data/measured/ with the command and the machine that made them."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({"command": command, "machine": machine})[:-1]
    (DATA / "measured").mkdir(exist_ok=True)
    (DATA / "measured" / f"{name}.json").write_text(f'{head}, "rows": [\n{lines}\n]}}\n')


# ---------------------------------------------------------------- notebook 07: faults and their symptoms

EVERYWHERE = ATTENTION + MLP
HEALTHY = LoRAConfig(8, 16, EVERYWHERE)


def zero_A(model: nn.Module) -> None:
    for layer in lora_layers(model).values():
        nn.init.zeros_(layer.lora_A)


def unfreeze(model: nn.Module) -> None:
    model.requires_grad_(True)


def forget_alpha(folder: Path) -> None:
    """Drop alpha from an adapter's file; every reader then takes PEFT's default of 8."""
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    del settings["lora_alpha"]
    path.write_text(json.dumps(settings))


FAULTS = {  # what differs from the healthy run: arguments of `examine`
    "healthy": {},
    "rank": {"config": LoRAConfig(1, 2, EVERYWHERE)},
    "modules": {"config": LoRAConfig(8, 16, ("q_proj",))},
    "base": {"base": "base_early"},
    "zeros": {"prepare": zero_A},
    "unfrozen": {"prepare": unfreeze},
    "scale": {"spoil": forget_alpha},
}


def examine(task: str = "catalogue", config: LoRAConfig = HEALTHY, *, base: str = "base",
            prepare: Callable[[nn.Module], None] | None = None, spoil: Callable[[Path], None] | None = None,
            steps: int = 100, seed: int = 0) -> dict:
    """Train an adapter, save it, load it on a fresh base, and note what a doctor would ask for.

    Args:
        prepare: as in `adapt`.
        spoil: called with the adapter's folder after it was saved.

    Returns:
        modules, trained: adapted modules, trained parameters.
        loss: of every step, nats a token.
        grad_A, grad_B: mean over the steps of the gradient's norm over all A, over all B, before clipping.
        update: mean over the modules of ||s B A||_F / ||W||_F.
        base_changed: whether the trained model's base has another fingerprint than before.
        exact: of the model as trained, on the test file. served: of the file loaded on a fresh base.
        base_exact: of the base on the general test file.
    """
    norms = []

    def watch(step: int, model: nn.Module, log: Log) -> None:
        unclip = max(1.0, log.grad_norm[-1])  # train clips at 1
        layers = lora_layers(model).values()
        norms.append([unclip * nn.utils.get_total_norm([getattr(layer, which).grad for layer in layers]).item()
                      for which in ("lora_A", "lora_B")])

    fresh = load_base(base)
    run = adapt(task, config, base=base, steps=steps, seed=seed, prepare=prepare, on_step=watch)
    with torch.no_grad():
        layers = lora_layers(run.model).values()
        moved = [layer.scaling * (layer.lora_B @ layer.lora_A).norm() / layer.weight.norm() for layer in layers]
    noted = {"modules": len(layers), "trained": run.log.trained, "loss": run.log.loss,
             "grad_A": sum(a for a, _ in norms) / steps, "grad_B": sum(b for _, b in norms) / steps,
             "update": torch.stack(moved).mean().item(), "base_changed": fingerprint(run.model) != fingerprint(fresh),
             "exact": run.exact, "base_exact": evaluate(fresh, load_task("general").test).exact}
    with TemporaryDirectory() as folder:
        save_adapter(run.model, folder)
        if spoil is not None:
            spoil(Path(folder))
        noted["served"] = evaluate(load_adapter(fresh, folder, any_base=True), load_task(task).test).exact
    return noted


@sweep
def faults() -> list[dict]:
    """Notebook 07: the healthy run and each fault, as `examine` sees them; the loss of every fifth step."""
    rows = []
    for (name, differs), seed in grid(FAULTS.items(), range(2)):
        noted = examine(**differs, seed=seed)
        noted["loss"] = noted["loss"][::5] + noted["loss"][-1:]
        rows.append({"fault": name, "seed": seed} | rounded_row(noted))
    return rows


@sweep
def barely_moved() -> list[dict]:
    """Notebook 07: the three checks of "we used LoRA and quality barely moved": base fit, rank and placement on tone.

    The same checks on the catalogue are among `faults`; here are the ranks between.
    """
    config = {name: differs.get("config", HEALTHY) for name, differs in FAULTS.items()}
    runs = [("tone", "healthy", "base"), ("tone", "base", "base_early"), ("tone", "rank", "base"),
            ("tone", "modules", "base")]
    runs = [(task, name, base, config[name]) for task, name, base in runs]
    runs += [("catalogue", f"rank {r}", "base", LoRAConfig(r, 2 * r, EVERYWHERE)) for r in (2, 4)]
    rows = []
    for task, name, base, lora in tqdm(runs):
        run = adapt(task, lora, base=base, steps=100)
        rows.append(rounded_row({"task": task, "run": name, "trained": run.log.trained,
                                 "loss": run.loss, "exact": run.exact}))
    return rows


# ---------------------------------------------------------------- notebook 12: LoRA and its relatives

FAMILY = {  # name -> method, and the peak learning rates to try
    "full": (None, (LR["full"],)),
    "LoRA, rank 8": (HEALTHY, (LR["lora"],)),
    "LoRA, rank 1, q and v": (LoRAConfig(1, 2, ("q_proj", "v_proj")), (1e-2, 3e-2)),
    "prompt": (PromptTuning(20), (1e-2, 3e-2, 1e-1)),
    "prefix": (PrefixTuning(20), (1e-2, 3e-2, 1e-1)),
    "(IA)3": (IA3(), (1e-2, 3e-2, 1e-1)),
    "bottleneck": (BottleneckAdapters(8), (1e-3, 3e-3, 1e-2)),
    "BitFit": (BitFit(add=True), (3e-3, 1e-2, 3e-2)),
}


@sweep
def family() -> list[dict]:
    """Notebook 12: each member of the family on the catalogue at each of its rates, then on tone at the one that fitted
    the catalogue's train file best.

    train: mean loss of the last ten steps. A rate chosen by it has not seen the test file.
    """
    rows: list[dict] = []

    def one(task: str, name: str, lr: float) -> None:
        run = adapt(task, FAMILY[name][0], lr=lr, steps=60)
        rows.append(rounded_row({"task": task, "method": name, "lr": lr, "trained": run.log.trained,
                                 "train": sum(run.log.loss[-10:]) / 10, "loss": run.loss, "exact": run.exact}))

    for name, lr in tqdm([(name, lr) for name, (_, rates) in FAMILY.items() for lr in rates]):
        one("catalogue", name, lr)
    for name in tqdm(FAMILY):
        one("tone", name, min((r for r in rows if r["method"] == name), key=lambda r: r["train"])["lr"])
    return rows


@sweep
def family_latency() -> list[dict]:
    """Notebook 12: what each member adds to a reply of 32 tokens to one customer, in CPU time of one thread.

    All take turns, and each is given by the ratio of its median to the base's: "again" is the base once more.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    models = {"base": load_base(), "again": load_base()}
    models |= {name: insert(load_base(), method) for name, (method, _) in FAMILY.items() if method}
    models["LoRA, rank 8, merged"] = insert(load_base(), HEALTHY)
    merge(models["LoRA, rank 8, merged"], permanent=True)
    ids = torch.tensor([tokenizer().encode(load_task("tone").test[0].prompt)])  # (1, T)
    seconds = {name: [] for name in models}
    for _ in tqdm(range(40)):
        for name, model in models.items():
            start = time.process_time()
            model.generate(ids, 32)
            seconds[name].append(time.process_time() - start)
    torch.set_num_threads(threads)
    base = median(seconds["base"][3:])  # the first ones warm up
    return [{"method": name, "ratio": round(median(times[3:]) / base, 3)} for name, times in seconds.items()]


# ---------------------------------------------------------------- notebook 13: candidates for shipping

CANDIDATES = {  # name -> modules, rank, base
    "q and v, rank 1": (("q_proj", "v_proj"), 1, "base"),
    "q and v, rank 8": (("q_proj", "v_proj"), 8, "base"),
    "all, rank 1": (EVERYWHERE, 1, "base"),
    "all, rank 2": (EVERYWHERE, 2, "base"),
    "all, rank 8": (EVERYWHERE, 8, "base"),
    "all, rank 2, random weights": (EVERYWHERE, 2, "random"),
}


def candidate(task: str, name: str, seed: int = 0) -> tuple[Run, dict]:
    """A run of one of `CANDIDATES`, and its row: its size and its scores on the validation file, none on the test."""
    modules, rank, base = CANDIDATES[name]
    run = adapt(task, LoRAConfig(rank, 2 * rank, modules), base=base, steps=60, seed=seed)
    validation = load_task(task).validation
    loss, exact = evaluate(run.model, validation)
    return run, rounded_row({"task": task, "candidate": name, "rank": rank, "seed": seed, "trained": run.log.trained,
                             "loss": loss, "right": round(exact * len(validation)), "of": len(validation)})


@sweep
def candidates() -> list[dict]:
    """Notebook 13: ranks and targets to choose from, with the control on random weights, by the validation file."""
    return [candidate(task, name, seed)[1] for task, name, seed in grid(("tone", "ticket"), CANDIDATES, range(2))]


def rounded_row(row: dict, digits: int = 4) -> dict:
    """A row with its floats, also those in lists, rounded for a file."""
    return {key: [round(x, digits) for x in value] if isinstance(value, list) else
            round(value, digits) if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m minilora.experiments", description=__doc__.partition("\n")[0])
    parser.add_argument("sweep", choices=SWEEPS)
    name = parser.parse_args().sweep
    record(name, SWEEPS[name](), f"python -m minilora.experiments {name}")
