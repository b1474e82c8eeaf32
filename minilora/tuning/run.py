"""The run: plan, train in stretches with a validation after each, keep the best, save what others can open.

It goes through `train`, whose checkpoint is the run's: after a kill the same command goes on from there, with the
numbers of a run that nobody interrupted.
"""

import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import distributed
from ..adapters import check_free, load_adapter, save_adapter
from ..checkpoints import read_safetensors, save_tensors, write_file
from ..config import ALL_LINEAR, LoRAConfig, check_name, is_number, require
from ..injection import adapter_layers, inject
from ..memory.run import METHODS, Training
from ..quant import quantise_model
from ..tables import bytes_text
from ..train import SCHEDULES, Log, seed_everything, train
from . import card
from .batches import Tokens, batches, split, steps_an_epoch, tokenised
from .data import Rows, read_rows
from .model import WithLoss, load_config, load_model, load_tokenizer, loss_of, pick_device, pick_dtype, scores
from .plan import ALPHA, Plan, held_now, learning_rate, less, make_plan
from .templates import Chat, shown

CHECKPOINT, BEST, HISTORY = "run.safetensors", "best.safetensors", "history.json"


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do; see `tune`."""

    model: str
    data: str
    out: str
    method: str = "lora"
    rank: int = 16
    alpha: float = ALPHA
    targets: str | tuple[str, ...] = ALL_LINEAR
    dropout: float = 0.0
    lr: float | None = None
    epochs: float = 3
    steps: int | None = None
    batch: int = 8
    accumulation: int = 1
    seq: int | None = None
    packing: bool = False
    eval_share: float = 0.1
    patience: int = 3
    schedule: str = "cosine"
    warmup: int | None = None
    weight_decay: float = 0.0
    every: int | None = None
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    checkpointing: bool = False
    template: str | None = None
    start: str | None = None

    def __post_init__(self):
        check_name("method", self.method, METHODS)
        check_name("schedule", self.schedule, SCHEDULES)
        for name, least in (("rank", 1), ("batch", 1), ("accumulation", 1), ("patience", 0), ("seed", 0)):
            value = getattr(self, name)
            require(type(value) is int and least <= value < 2**31, f"{name} must be an integer from {least} on", value)
        for name, least in (("steps", 1), ("seq", 2), ("warmup", 0), ("every", 1)):
            value = getattr(self, name)
            require(value is None or type(value) is int and least <= value < 2**31,
                    f"{name} must be an integer from {least} on", value)
        require(is_number(self.epochs) and self.epochs > 0, "epochs must be a positive number", self.epochs)
        require(self.lr is None or is_number(self.lr) and self.lr > 0, "lr must be a positive number", self.lr)
        require(is_number(self.eval_share) and 0 <= self.eval_share < 1, "eval_share must be in [0, 1)",
                self.eval_share)
        require(self.method != "full" or self.start is None, "start is of adapters: method must be lora or qlora",
                self.method)


@dataclass
class Result:
    """What a run did.

    Attributes:
        settings: with everything that was left to be chosen filled in. log: every step's loss, rate and gradient.
        history: after so many steps, the validation's loss and exact match; step 0 is the base.
        step: whose weights were kept: the best on the validation rows, else the last. held: how many rows those are.
    """

    settings: Settings
    plan: Plan
    log: Log
    history: list[dict] = field(default_factory=list)
    step: int = 0
    stopped: str = ""
    tokens_a_second: float = 0.0
    held: int = 0

    @property
    def base(self) -> dict | None:
        return next((entry for entry in self.history if entry["step"] == 0), None)

    @property
    def best(self) -> dict | None:
        return next((entry for entry in self.history if entry["step"] == self.step), None)


def tune(model: str, data: str, out: str, *, anyway: bool = False, budget: int | None = None,
         say: Callable[[str], None] | None = print, **choices: Any) -> Result:
    """Fine-tune the Hugging Face model in a folder, or of a name on the hub, on a file of rows; save it to `out`.

    Under torchrun every process calls it with the same arguments.

    Args:
        model: a folder or a name. data: a .jsonl file of one of five forms: see data.py. out: the folder to write.
        method: "lora", "qlora" (the base in NF4) or "full".
        rank, alpha, targets, dropout: LoRA's. alpha is 32 at every rank, as where the rule for `lr` was measured.
        lr: the peak; by default `plan.learning_rate`, which falls with the model's width.
        epochs, steps: how long; `steps`, if given, decides.
        batch, accumulation: rows of one forward, and forwards whose gradients one step sums.
        seq: most tokens of a row, the rest is cut off; by default those of the longest row.
        packing: several rows in one line of `seq` tokens, kept apart.
        eval_share: of the rows, held back for validation. patience: end after so many validations without a better
            one; 0: never. every: steps between two; by default a tenth of all.
        schedule, warmup, weight_decay, seed: as in `train`; warmup is a twentieth of the steps by default.
        device, dtype: by default the best that is there.
        checkpointing: recompute each layer in backward.
        template: a chat template to use in place of the tokenizer's own.
        start: an adapter to go on from.
        anyway: begin also where the plan says that the run does not fit. budget: plan with so many bytes.
        say: what to call with each line of news; None: be silent.

    Raises:
        ValueError: a setting, file or model that is not as it should be; a run that does not fit, or that ran out of
            memory, with what would make it fit; a loss that is not finite.
        OSError: the disk said no; the checkpoint before stands.
    """
    s = Settings(model=model, data=data, out=out, **choices)
    tell = say if say is not None and distributed.is_main_process() else lambda line: None
    folder = Path(out)
    if not (folder / CHECKPOINT).exists():
        check_free(folder)
        require(not (folder / "config.json").exists(), "out must be a folder without a model", out)
    rows, tokenizer, config = read_rows(data), load_tokenizer(model), load_config(model)
    chat = Chat(tokenizer, s.template)
    tokens = tokenised(chat, rows, s.seq)
    s = completed(s, tokens, config)
    training, validation = split(tokens.rows, s.eval_share, s.seed)
    tell(f"{data}: {len(rows.rows)} rows of the form {rows.form}, {tokens.counted:,} tokens to learn"
         + f", {tokens.cut} rows cut to {s.seq} tokens" * bool(tokens.cut)
         + f", nothing left to learn on lines {', '.join(map(str, tokens.empty[:5]))}" * bool(tokens.empty))
    tell(f"the first row, with what is learnt between 【 and 】: {shown(tokenizer, tokens.rows[0])}")
    device = pick_device(s.device)
    plan = make_plan(config, model, planned_run(s), device, budget)
    tell(f"plan on {device}: {plan}")
    if not plan.fits and not anyway:
        raise ValueError(plan.refusal())
    with advised(s, plan, folder):
        before = 0 if device.type == "cuda" else held_now(device) or 0  # this program itself, not the run
        net = prepared(s, device)
        result = Run(s, plan, folder, net, training, validation, pad_of(tokenizer), tell, before).go()
        save(result, rows, tokens, tokenizer, net.model)
    tell(f"saved to {out}: the weights of step {result.step}"
         + (f", validation loss {result.base['loss']:.4f} before and {result.best['loss']:.4f} after"
            if result.base and result.best else ""))
    return result


def completed(s: Settings, tokens: Tokens, config: Any) -> Settings:
    """The settings with what was left to be chosen."""
    text = config.get_text_config()
    longest = max(len(row.ids) for row in tokens.rows)
    context = getattr(text, "max_position_embeddings", None)
    seq = s.seq if s.seq and s.packing else longest  # rows are cut to --seq already
    if context and seq > context:
        raise ValueError(f"rows of up to {seq} tokens and a context of {context}: expected --seq {context} or less")
    held = max(1, round(s.eval_share * len(tokens.rows))) if s.eval_share else 0
    an_epoch = steps_an_epoch(max(len(tokens.rows) - held, 1), s.batch * s.accumulation)
    steps = s.steps or math.ceil(s.epochs * an_epoch)
    return Settings(**asdict(s) | {
        "seq": seq, "steps": steps, "lr": s.lr or learning_rate(s.method, text.hidden_size),
        "warmup": min(steps // 20, 100) if s.warmup is None else s.warmup,
        "every": s.every or max(1, steps // 10), "dtype": pick_dtype(s.dtype, pick_device(s.device))})


def planned_run(s: Settings) -> Training:
    targets = s.targets if isinstance(s.targets, str) else tuple(s.targets)
    return Training(s.method, s.rank, targets, s.batch, s.seq, s.accumulation, dtype=s.dtype, loss="chunked",
                    checkpointing=s.checkpointing, dropout=s.dropout if s.method != "full" else 0.0)


def prepared(s: Settings, device: torch.device) -> WithLoss:
    """The model, ready to train."""
    model = load_model(s.model, s.dtype, device)
    if s.method == "qlora":
        quantise_model(model)
    seed_everything(s.seed)
    if s.start is not None:
        load_adapter(model, s.start, any_base=s.method == "qlora")
    elif s.method != "full":
        inject(model, LoRAConfig(s.rank, s.alpha, s.targets, s.dropout))
    if s.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return WithLoss(model)


def pad_of(tokenizer: Any) -> int:
    return next((x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id) if x is not None), 0)


class Run:
    """One run in its folder: stretches of training with a validation after each."""

    def __init__(self, s: Settings, plan: Plan, folder: Path, net: WithLoss, training: list, validation: list,
                 pad: int, tell: Callable[[str], None], before: int = 0):
        self.s, self.plan, self.folder, self.net = s, plan, folder, net
        self.validation, self.pad, self.tell, self.before = validation, pad, tell, before
        self.batches = batches(training, s.batch * s.accumulation, s.seed, pad, s.seq if s.packing else None)
        self.trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.checkpoint, self.history, self.seen = folder / CHECKPOINT, read_history(folder), [0, 0.0]

    def go(self) -> Result:
        s, log, stopped = self.s, Log(), ""
        done = steps_of(self.checkpoint)
        self.history = [entry for entry in self.history if entry["step"] <= done and done]
        if not done:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.judge(0)
        else:
            self.tell(f"going on from step {done} of {s.steps}")
            log = self.train(done)  # nothing is trained: the weights come back
            self.judge(done)
        while done < s.steps and not (stopped := self.enough()):
            done = min(s.steps, (done // s.every + 1) * s.every)
            log = self.train(done)
            self.judge(done)
        best = self.recall()
        return Result(s, self.plan, log, self.history, done if best is None else best, stopped,
                      self.seen[0] / max(self.seen[1], 1e-9), len(self.validation))

    def train(self, until: int) -> Log:
        s = self.s
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*nothing was left to do")
            return train(self.net, self.counting, steps=s.steps, lr=s.lr, warmup=s.warmup, schedule=s.schedule,
                         weight_decay=s.weight_decay, seed=s.seed, checkpoint=self.checkpoint, every=s.every,
                         stop_at=until, progress=False, accumulation=s.accumulation,
                         parallel="ddp" if distributed.many() else None, loss=loss_of, on_step=self.told)

    def counting(self, step: int):
        """The batch of a step; the tokens of the last one asked for are kept for the news."""
        ids, targets = self.batches(step)
        self.size = targets.numel()
        return ids, targets

    def told(self, step: int, net: nn.Module, log: Log) -> None:
        """After the backward pass of a step: every so often a line of news."""
        now = time.perf_counter()
        if step + 1 < self.s.steps and hasattr(self, "last") and self.last[0] == step - 1:
            self.seen[0] += self.size
            self.seen[1] += now - self.last[1]
        self.last = step, now
        if step % max(1, self.s.steps // 20) == 0 or step + 1 == self.s.steps:
            held = held_now(pick_device(self.s.device))
            planned = f" ({bytes_text(self.plan.bill.peak)} planned)" if self.plan.bill else ""
            memory = f"  memory {bytes_text(held - self.before)}{planned}" if held else ""
            speed = f"  {self.seen[0] / self.seen[1]:,.0f} tokens/s" if self.seen[1] else ""
            self.tell(f"step {step + 1:>{len(str(self.s.steps))}} of {self.s.steps}  loss {log.loss[-1]:.4f}"
                      f"  lr {log.lr[-1]:.1e}{speed}{memory}")

    def judge(self, step: int) -> None:
        """The validation after so many steps, once; the best weights are kept."""
        if not self.validation or any(entry["step"] == step for entry in self.history):
            return
        found = {"step": step} | scores(self.net, self.validation, self.s.batch, self.pad)
        if step and all(found["loss"] < entry["loss"] for entry in self.history if entry["step"]):
            self.keep(step)
        self.history.append(found)
        if distributed.is_main_process():
            text = json.dumps(self.history, indent=1) + "\n"
            write_file(self.folder / HISTORY, lambda path: path.write_text(text))
        self.tell(f"validation after step {step}: loss {found['loss']:.4f}, exact {found['exact']:.1%}")

    def keep(self, step: int) -> None:
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.trained.items()}
        if distributed.is_main_process():
            write_file(self.folder / BEST, lambda path: save_tensors(tensors, path, {"step": str(step)}))
        distributed.wait_for_all()

    def recall(self) -> int | None:
        """Put the best weights back; the step they are of, None where there was no validation."""
        if not self.validation or not (self.folder / BEST).exists():
            return None
        tensors, metadata = read_safetensors(self.folder / BEST)
        if int(metadata["step"]) not in [entry["step"] for entry in self.history]:
            return None  # of another run
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(tensors[name])
        return int(metadata["step"])

    def enough(self) -> str:
        """Why the run ends early, or nothing."""
        after = [entry["loss"] for entry in self.history]
        since = len(after) - 1 - after.index(min(after)) if after else 0
        return f"no better validation in {since} of them" if self.s.patience and since >= self.s.patience else ""


def steps_of(checkpoint: Path) -> int:
    """How many steps a checkpoint holds; 0 without one. What is wrong with it `train` says."""
    if not checkpoint.exists():
        return 0
    _, metadata = read_safetensors(checkpoint, kind="not a training checkpoint")
    try:
        return len(json.loads(metadata["log"])["loss"])
    except (KeyError, ValueError, TypeError):
        return 0


def read_history(folder: Path) -> list[dict]:
    path = folder / HISTORY
    return read_json_list(path) if path.exists() else []


def read_json_list(path: Path) -> list[dict]:
    try:
        found = json.loads(path.read_text())
        return [entry for entry in found if {"step", "loss", "exact"} <= entry.keys()]
    except (ValueError, OSError, AttributeError, TypeError):
        return []  # it is only what was seen: the run looks again


# ---------------------------------------------------------------- the end


def save(result: Result, rows: Rows, tokens: Tokens, tokenizer: Any, model: nn.Module) -> None:
    """Adapter (or model), tokenizer, curve and card; then what only a run needs goes."""
    folder = Path(result.settings.out)
    if result.settings.method == "full":
        if distributed.is_main_process():
            model.save_pretrained(folder)
    else:
        save_adapter(model, folder)
    distributed.wait_for_all()
    if not distributed.is_main_process():
        return
    tokenizer.save_pretrained(folder)
    with suppress(ModuleNotFoundError):  # matplotlib comes with an extra; the card then has no picture
        card.draw(result, folder / card.CURVE)
    text = card.write(result, rows, tokens, list(adapter_layers(model)) if result.settings.method != "full" else [])
    write_file(folder / card.CARD, lambda path: path.write_text(text, encoding="utf-8"))
    result.log.save(folder / "log.json")
    for name in (CHECKPOINT, BEST):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def advised(s: Settings, plan: Plan, folder: Path):
    """What may go wrong in a run, each in one line with what to do."""
    stands = lambda: (f"the checkpoint of step {step} stands, and the same command goes on from there"
                      if (step := steps_of(folder / CHECKPOINT)) else "the same command starts afresh")
    try:
        yield
    except OSError as error:
        raise OSError(f"{error}; free some space, or mend what it says: {stands()}") from None
    except ValueError as error:
        if "learning rate" in str(error) and "too high" in str(error):
            raise ValueError(f"{error}. Try --lr {s.lr / 3:.1e} in a new --out folder"
                             + ", or --dtype bfloat16" * (s.dtype == "float16")) from None
        raise
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        ways = "; ".join(f"({i}) {way}" for i, way in enumerate(less(plan), 1)) or "a shorter --seq"
        said = str(error)[:100] or "none is left"
        planned = f"the plan was {bytes_text(plan.bill.peak)}; " if plan.bill else ""
        raise ValueError(f"out of memory ({said}); {planned}what takes less: {ways}. "
                         f"Other settings need a new --out folder; with these {stands()}") from None


