"""The commands of the calculator: memory, fit, claims, models, cards, trace. All that knows of arguments is here."""

import json
import sys
import textwrap
from argparse import SUPPRESS, BooleanOptionalAction
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..config import ALL_LINEAR
from ..tables import bytes_text, table
from .bill import estimate
from .cards import CARDS, Card
from .config_file import read_config, read_quantisation
from .models import PRESETS, ModelSpec, NotPriced
from .presets import CONFIGS
from .run import KNOWN, Serving, Training
from .stacks import STACKS

if TYPE_CHECKING:
    from .fitting import Verdict
    from .traced_bill import TracedBill

DEFAULT_STACK = "trl"  # on the command line; in Python a `Training` is our own unless it says otherwise
SET_BY_STACKS = {name for stack in STACKS.values() for name in (*stack.defaults, *stack.qlora)}

# what people ask for and what is not priced, each with the reason and what comes nearest
NOT_PRICED = {
    "rslora": "rsLoRA changes the scaling alone, and no byte: leave it out",
    "rank-pattern": "ranks that differ from matrix to matrix are not priced; the largest of them as --rank is the most",
    "modules-to-save": "trained copies of whole modules (embedding, head) are not priced; each takes its weights, "
                       "gradients and optimizer states once more",
    "offload-optimizer": "an optimizer on the host (ZeRO-Offload) is not priced; paged_adamw is the nearest",
    "offload-params": "parameters on the host that train are not priced; a frozen base can be: --base host",
    "offload-activations": "TRL's offloading of activations is not priced; --stack unsloth sends layers' inputs to the "
                           "host",
    "generation": "a phase of generation between steps (GRPO) is not priced; --serve prices it by itself",
    "load-in-8bit": "a base in 8 bits is not priced; 4 bits are: --method qlora",
    "tensor-parallel": "matrices that are split over cards are not priced; ZeRO is: --cards and --zero",
    "sequence-parallel": "rows that are split over cards are not priced; ZeRO is: --cards and --zero",
}

R = TypeVar("R", Training, Serving)


def memory_command(parser, arguments: list[str]) -> None:
    """What a training step of a model needs, or with --serve the answer to prompts."""
    add_memory_options(parser)
    options = parser.parse_args(arguments)
    spec = shape_of(options)
    if isinstance(spec, dict):
        return by_trace(spec, options, [Card.of(options.card)] if options.card is not None else [])
    run = run_of(options, Serving if options.serve else Training, stored_as(spec))
    bill = estimate(spec, run)
    more = []
    if options.card is not None:
        from .fitting import judge, turning_points

        more.append(judge(bill, options.card))
    if options.json:
        print(json.dumps(as_dict(run, bill, *more), indent=2))
        return
    if more and not options.serve:
        more += [filled(line) for line in turning_points(bill, options.card)]
    print(filled(run.assumptions()), bill.text(bars=sys.stdout.isatty()), *more, sep="\n\n")


def by_trace(config: dict, options, cards: list[Card]) -> None:
    """The answer for an architecture without a closed form, and the verdict of each card."""
    from .traced_bill import TracedBill, estimate_by_trace  # imports torch

    run, bills = run_of(options, Training, read_quantisation_of(config)), {}

    def priced(run: Training) -> TracedBill:
        if run not in bills:
            bills[run] = estimate_by_trace(config, run)
        return bills[run]

    bill, verdicts = priced(run), [traced_verdict(priced, run, card) for card in cards]
    if options.json:
        print(json.dumps(as_dict(run, bill, *verdicts), indent=2))
    else:
        print(filled(run.assumptions()), bill, *verdicts, sep="\n\n")


def traced_verdict(priced: Callable[[Training], "TracedBill"], run: Training, card: Card) -> "Verdict":
    from .fitting import FRAGMENTATION, WORKSPACE, Verdict, as_on

    changed, taken = as_on(run, card)
    bill = priced(replace(run, **changed))
    need = bill.peak, int(bill.peak * FRAGMENTATION) + WORKSPACE + bill.scratch
    return Verdict(card, need, card.usable, taken=taken)


def as_dict(run, bill, *verdicts) -> dict:
    """What `memory --json` prints: one verdict under "card", several under "cards"."""
    said = [verdict.to_dict() for verdict in verdicts]
    judged = {} if not said else {"card": said[0]} if len(said) == 1 else {"cards": said}
    return {"assumptions": run.assumptions()} | bill.to_dict() | judged


def fit_command(parser, arguments: list[str]) -> None:
    """Whether a training step fits, on which cards, and what to change."""
    from .fitting import fit

    add_run_options(parser)
    parser.add_argument("--card", help="one of those that `cards` lists; without it, all of them")
    options = parser.parse_args(arguments)
    spec = shape_of(options)
    if isinstance(spec, dict):
        return by_trace(spec, options, [Card.of(options.card)] if options.card is not None else list(CARDS.values()))
    run = run_of(options, Training, stored_as(spec))
    found = fit(spec, run, options.card)
    if options.json:
        print(json.dumps({"assumptions": run.assumptions()} | found.to_dict(), indent=2))
    else:
        print(filled(run.assumptions()), found, sep="\n\n")


def filled(text: str) -> str:
    """As a paragraph of a hundred columns."""
    return textwrap.fill(text, 98, break_on_hyphens=False)


def claims_command(parser, arguments: list[str]) -> None:
    """What papers say of memory, with a verdict each."""
    from .claims import REPRODUCED, claims

    parser.add_argument("--json", action="store_true", help="for programs")
    if parser.parse_args(arguments).json:
        print(json.dumps([asdict(claim) for claim in claims()], indent=2))
        return
    for c in claims():
        print(f"{c.verdict}: {c.source}", *(textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="  ")
                                            for text in (c.says, c.ours)), sep="\n", end="\n\n")
    print(f"{sum(c.verdict == REPRODUCED for c in claims())} of {len(claims())} reproduced")


def models_command(parser, arguments: list[str]) -> None:
    """The models whose shapes are known."""
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    columns = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context", "tied", "parameters")
    rows = {name: {c: getattr(spec, c) for c in columns} for name, spec in PRESETS.items()}
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        body = [(s.name, s.layers, s.hidden, f"{s.heads}/{s.kv_heads}", s.head_dim, s.ffn, s.vocab,
                 f"{s.context // 1024:>6,}k" if s.context % 1024 == 0 else s.context,
                 "yes" if s.tied else "no", s.parameters) for s in PRESETS.values()]
        print(table(("model", "layers", "hidden", "q/kv", "dim", "ffn", "vocab", "context", "tied",
                     "parameters"), body))


def cards_command(parser, arguments: list[str]) -> None:
    """The cards, and how much of each a run may use."""
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    if options.json:
        print(json.dumps({name: c.to_dict() for name, c in CARDS.items()}, indent=2))
        return
    rows = [(c.name, bytes_text(c.nominal), bytes_text(c.reported) if c.reported else "unknown",
             f"{bytes_text(c.usable[0])} to {bytes_text(c.usable[1])}", f"{c.bus / 1e9:.1f} GB/s",
             f"{c.flops / 1e12:,.0f} TFLOP/s")
            for c in CARDS.values()]
    print(table(("card", "nominal", "driver reports", "usable", "bus", "16-bit"), rows))
    print(filled("usable: what the driver reports (93% to 100% of nominal where unknown, 65% to 95% of memory that the "
                 "system shares) less 0.15 to 1.4 GB for CUDA"))


def trace_command(parser, arguments: list[str]) -> None:
    """``minilora trace --config FOLDER``: what one step of the architecture allocates, followed through all layers."""
    add_run_options(parser)
    parser.add_argument("--card", help="also say whether it fits this card: `cards` lists them")
    options = parser.parse_args(arguments)
    if options.family is not None:
        raise ValueError("--family is of the closed form; a trace runs the architecture that the config names")
    card = Card.of(options.card) if options.card is not None else None
    config = dict(preset_config(options.model)) if options.model is not None else read_config(Path(options.config))[0]
    run = run_of(options, Training, read_quantisation_of(config))

    from .fitting import FRAGMENTATION, WORKSPACE, Verdict, as_on
    from .traced_bill import check, scratch, traced  # these import torch
    from .traced_models import as_config

    changed, taken = as_on(run, card) if card is not None else ({}, "")
    run = replace(run, **changed)
    check(run)
    architecture = as_config(config, options.model or options.config)
    t, _ = traced(architecture, run)
    verdicts = []
    if card is not None:
        need = t.peak, int(t.peak * FRAGMENTATION) + WORKSPACE + scratch(architecture, run)
        verdicts = [Verdict(card, need, card.usable, taken=taken)]
    if options.json:
        print(json.dumps(as_dict(run, t, *verdicts)))
    else:
        print(filled(run.assumptions()), t, *verdicts, sep="\n\n")


def preset_config(name: str) -> dict:
    """The config of a known model."""
    ModelSpec.preset(name)  # or an error that lists near ones
    return CONFIGS[name]


# ---------------------------------------------------------------- a model and a run, as options


def add_run_options(parser) -> None:
    """A model and a training step, as options."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="a known one: `models` lists them")
    which.add_argument("--config", help="a folder with a Hugging Face config.json")
    parser.add_argument("--family", help="read that config as this model_type, whatever it says of itself")
    parser.add_argument("--targets", help="names with commas between, a regular expression, or all-linear")
    for field in fields(Training):
        if field.name != "target_modules":
            add_option(parser, field)
    parser.add_argument("--json", action="store_true", help="for programs")
    for name in NOT_PRICED:
        parser.add_argument(f"--{name}", nargs="?", const="", default=SUPPRESS, help=SUPPRESS)


def add_memory_options(parser) -> None:
    """All that `memory` can be asked, here and on the page."""
    add_run_options(parser)
    parser.add_argument("--card", help="also say whether it fits this card: `cards` lists them")
    parser.add_argument("--serve", action="store_true", help="answer prompts instead of training")
    serving = parser.add_argument_group("with --serve, in the place of --seq and of all that trains")
    for field in fields(Serving):
        if field.name not in Training.__dataclass_fields__:
            add_option(serving, field)


def add_option(parser, field) -> None:
    name, default = "--" + field.name.replace("_", "-"), field.default
    by_stack = field.name in SET_BY_STACKS
    if isinstance(default, bool):
        parser.add_argument(name, action=BooleanOptionalAction, default=SUPPRESS,
                            help="default: as the stack has it" if by_stack else f"default {default}")
    else:
        known = "".join(f"{value}, " for value in KNOWN.get(field.name, ()))
        parser.add_argument(name, type=type(default), default=SUPPRESS, metavar=field.name.upper(),
                            help=known + ("default: as the stack has it" if by_stack else
                                          f"default {DEFAULT_STACK if field.name == 'stack' else default}"))


def shape_of(options) -> ModelSpec | dict:
    """The model's shape; of a model that has no closed form, what its config.json says."""
    if options.family is not None and options.model is not None:
        raise ValueError("--family goes with --config: the family of a known model is known")
    if options.model is not None:
        return ModelSpec.preset(options.model)
    try:
        return ModelSpec.from_config(options.config, options.family)
    except NotPriced:
        if options.family is not None or getattr(options, "serve", False):
            raise
    return read_config(Path(options.config))[0]


def read_quantisation_of(config: dict) -> dict:
    """What a config.json says of a run on weights that are stored in 4 bits."""
    stored = read_quantisation(config.get("quantization_config"), "config")
    return {"method": "qlora", "quantisation": stored["quantised"]} if stored else {}


def stored_as(spec: ModelSpec) -> dict:
    """What a base that is stored in 4 bits says of a run on it."""
    return {"method": "qlora", "quantisation": spec.quantised, "group": spec.group} if spec.quantised else {}


def run_of(options, kind: type[R], of_base: dict | None = None) -> R:
    """The run that the options say; `of_base` holds where they do not."""
    targets = options.targets
    if targets and targets != ALL_LINEAR and not set(targets) & set("*+?|()[]{}\\^$"):
        targets = tuple(target.strip() for target in targets.split(","))
    if asked := [name for name in NOT_PRICED if hasattr(options, name.replace("-", "_"))]:
        raise ValueError(f"--{asked[0]}: {NOT_PRICED[asked[0]]}")
    given = {f.name: getattr(options, f.name) for f in fields(Training) + fields(Serving) if hasattr(options, f.name)}
    given |= {"target_modules": targets} if targets else {}
    if stray := [name for name in given if name not in kind.__dataclass_fields__]:
        raise ValueError(f"--{stray[0].replace('_', '-')} goes " + ("with --serve" if kind is Training else
                         "with training, not with --serve"))
    given = {name: value for name, value in (of_base or {}).items() if name in kind.__dataclass_fields__} | given
    stack = given.pop("stack", DEFAULT_STACK if kind is Training else "minilora")
    return Training.of_stack(stack, **given) if kind is Training else kind(stack=stack, **given)
