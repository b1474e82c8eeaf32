"""Notebook 12: LoRA and its relatives."""

import time
from statistics import median

import torch
from tqdm.auto import tqdm

from ..config import LoRAConfig
from ..helpdesk import load_base, load_task, tokenizer
from ..injection import inject, merge
from ..peft_methods import IA3, BitFit, BottleneckAdapters, PrefixTuning, PromptTuning
from .faults import HEALTHY
from .run import EVERYWHERE, adapt, rounded_row, sweep

FAMILY = {  # name -> method, and the peak learning rates to try
    "full": (None, (1e-3, 3e-3, 1e-2)),
    "LoRA, rank 8": (HEALTHY, (3e-3, 1e-2, 3e-2)),
    "LoRA, rank 2": (LoRAConfig(2, 4, EVERYWHERE), (1e-2, 3e-2, 1e-1)),
    "LoRA, rank 1, q and v": (LoRAConfig(1, 2, ("q_proj", "v_proj")), (1e-2, 3e-2, 1e-1)),
    "prompt": (PromptTuning(20), (3e-2, 1e-1, 3e-1)),
    "prefix": (PrefixTuning(20), (1e-1, 3e-1, 1.0)),
    "(IA)3": (IA3(), (1e-1, 3e-1, 1.0)),
    "bottleneck": (BottleneckAdapters(8), (1e-2, 3e-2, 1e-1)),
    "BitFit": (BitFit(add=True), (3e-2, 1e-1, 3e-1)),
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
    models |= {name: inject(load_base(), method) for name, (method, _) in FAMILY.items() if method}
    models["LoRA, rank 8, merged"] = inject(load_base(), HEALTHY)
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
