"""The pretraining of the bases in data/: ``python -m minilora.helpdesk.pretraining``."""

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import nn

from .. import distributed
from ..config import require
from ..llama import Llama, LlamaConfig
from ..shipped import written
from ..train import Log, train
from .evaluation import evaluate
from .tasks import endless_batches, load_task
from .tokens import tokenizer

CARD = """# The help-desk base{kind}

A Llama-style decoder of {parameters:,} parameters for the made-up support conversations of `minilora/helpdesk/`.

- Data: the `general` corpus, drawn without end (seed {seed}), in the second part with more of its
  questions about listed facts; only replies are scored. No slot combination or phrasing of the validation and test files is in it.
- Command: `{command}` ({steps} + {more} steps of {batch} conversations{stopped})
- Time: {hours:.2f} hours on {threads} threads, torch {torch}
- Held-out (`general`, test file): loss {score.loss:.4f} nats a token, exact match {score.exact:.1%}
- The loss of every tenth step is in `log.json`.
"""  # noqa: E501


def pretrain(folder: Path, steps: int, more: int, early: int, batch: int, lr: float, seed: int = 0,
             parallel: str | None = None) -> None:
    """Pretrain the base: write ``base`` and, as it stands after `early` steps, ``base_early`` to `folder`.

    `steps` at a peak learning rate of `lr`, then `more` at a third of it, in which every other conversation is one
    about listed facts: looking up comes late. A run that was interrupted goes on from its checkpoints in `folder`.

    Raises:
        ValueError: `early` is not among the first `steps`; else what `train` and `stream` raise.
    """
    require(steps < 1 or 0 <= early < steps, f"early must be from 0 to below the {steps} steps", early)
    config = LlamaConfig(len(tokenizer()), hidden_size=160, intermediate_size=448, num_hidden_layers=4,
                         num_attention_heads=5, max_position_embeddings=256, tie_word_embeddings=True)
    model = Llama(config, seed)
    run = {"steps": steps, "more": more, "early": early, "batch": batch, "lr": lr, "seed": seed}
    command = " ".join(["python -m minilora.helpdesk.pretraining", *(f"--{key} {value}" for key, value in run.items())])
    examples = load_task("general").test

    def ship(name: str, log: Log) -> None:
        model.save_pretrained(folder / name)
        score = evaluate(model, examples)
        if not distributed.is_main_process():
            return
        tokenizer().save(folder / name / "tokenizer.json")
        log.save(folder / name / "log.json", every=10)
        is_early = name == "base_early"
        (folder / name / "README.md").write_text(CARD.format(
            kind=", stopped early" * is_early, stopped=f", stopped after {early}" * is_early, command=command, **run,
            parameters=log.trained, hours=log.seconds / 3600, threads=torch.get_num_threads(), torch=torch.__version__,
            score=score))

    def on_step(step: int, model: nn.Module, log: Log) -> None:
        if step == early:  # gradients are there, the weights are those of `early` steps
            ship("base_early", log)

    common = {"warmup": 100, "weight_decay": 0.1, "seed": seed, "parallel": parallel}
    log = train(model, endless_batches("general", batch=batch, seed=seed), steps=steps, lr=lr, **common,
                on_step=on_step, checkpoint=folder / "pretraining_1.safetensors")
    second = train(model, endless_batches("general", "facts", batch=batch, seed=seed), steps=more, lr=lr / 3, **common,
                   checkpoint=folder / "pretraining_2.safetensors")
    log = Log(log.loss + second.loss, log.lr + second.lr, log.grad_norm + second.grad_norm,
              log.seconds + second.seconds, log.trained)
    ship("base", log)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m minilora.helpdesk.pretraining",
                                     description="Pretrain the base of the notebooks.")
    parser.add_argument("--folder", type=Path, help="where to; data/ of the checkout by default")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--more", type=int, default=2000)
    parser.add_argument("--early", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", choices=distributed.WAYS, help="under torchrun: how processes share the model")
    try:
        options = vars(parser.parse_args(arguments))
        pretrain(written(options.pop("folder"), "the base"), **options)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun one speaks
            print(f"minilora.helpdesk.pretraining: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
