"""What a run leaves for people: the picture of its loss, and a card that says what it was made of."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import __version__
from ..tables import bytes_text, plain
from .batches import Tokens
from .data import Rows

if TYPE_CHECKING:
    from .run import Result

CARD, CURVE = "README.md", "loss.png"


def draw(result: "Result", path: Path) -> str:
    """The loss of every step and of every validation; the sentence that says what the picture shows."""
    from ..plots import lines

    steps = list(range(1, len(result.log.loss) + 1))
    x, y = {"training, a step": steps}, {"training, a step": result.log.loss}
    if result.history:
        x["validation"] = [entry["step"] for entry in result.history]
        y["validation"] = [entry["loss"] for entry in result.history]
    fig = lines(x, y, title="Loss of the run", xlabel="step", ylabel="loss (nats a token)")
    fig.savefig(path, format="png", dpi=90, bbox_inches="tight")
    return sentence(result)


def sentence(result: "Result") -> str:
    losses = result.log.loss
    said = f"Training loss {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {len(losses)}"
    if result.base and result.best:
        said += (f"; validation loss {result.base['loss']:.3f} of the base, {result.best['loss']:.3f} after step "
                 f"{result.step}, whose weights were kept")
    return said + "."


def write(result: "Result", rows: Rows, tokens: Tokens, modules: list[str]) -> str:
    """The text of the card, in Markdown, with the fields that a hub reads at its head."""
    s, plan = result.settings, result.plan
    kind = "A full fine-tune" if s.method == "full" else f"A LoRA adapter of rank {s.rank}"
    head = [f"base_model: {json.dumps(s.model)}", "tags:", "- lora" if s.method != "full" else "- full-fine-tuning",
            "- minilora"]
    head = head if s.method == "full" else ["library_name: peft", *head]
    out = ["---", *head, "---", "", f"# {plain(Path(s.out).name)}", "",
           f"{kind} for `{plain(s.model)}`, made by minilora {__version__} with torch {torch.__version__}.", ""]
    if result.base and result.best:
        out += ["## Scores", "", f"On {result.held} rows held back by seed {s.seed}. Exact: the share of replies of "
                "which greedy generation gives every token.", "", "| | loss (nats a token) | exact |", "|---|---|---|"]
        out += [f"| {name} | {entry['loss']:.4f} | {entry['exact']:.1%} |"
                for name, entry in (("base", result.base), (f"after step {result.step}", result.best))]
        out.append("")
    else:
        out += ["## Scores", "", "No rows were held back: nothing is known of how well it does on others.", ""]
    out += [f"![{sentence(result)}]({CURVE})", ""] if (Path(s.out) / CURVE).exists() else []
    out += ["## Data", "",
            f"- `{plain(Path(s.data).name)}`, sha256 `{rows.sha256}`",
            f"- {len(rows.rows)} rows of the form {rows.form}, {tokens.counted:,} tokens that the loss counts"]
    out += [f"- {tokens.cut} rows were cut to {s.seq} tokens"] * bool(tokens.cut)
    out += ["", "## Settings", "", "```json", json.dumps(asdict(s), indent=1), "```", ""]
    if modules:
        out += [f"Adapted: {len(modules)} modules, " + ", ".join(f"`{name}`" for name in ends(modules)) + ".", ""]
    out += ["## Cost", "", f"- {result.log.trained:,} parameters trained, {len(result.log.loss)} steps of "
            f"{s.batch * s.accumulation} rows, {result.log.seconds:,.0f} s, about {result.tokens_a_second:,.0f} tokens "
            "a second"]
    out += [f"- planned peak: {bytes_text(plan.bill.peak)}"] * (plan.bill is not None)
    out += [f"- ended early: {result.stopped}"] * bool(result.stopped)
    return "\n".join(out) + "\n"


def ends(names: list[str]) -> list[str]:
    """The last parts of the modules' names, each once."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))
