"""The commands tune, chat, eval, merge and export. All that knows of arguments is here."""

import json
import sys
from argparse import SUPPRESS
from pathlib import Path

from ..adapters import check_free
from ..config import ALL_LINEAR, require
from ..memory.run import METHODS
from .data import read_rows


def tune_command(parser, arguments: list[str]) -> None:
    """Plan, train, evaluate, save."""
    parser.add_argument("--model", required=True, help="a Hugging Face folder, or a name on the hub")
    parser.add_argument("--data", required=True, help="a .jsonl file of messages, prompt and completion, text, alpaca "
                        "or ShareGPT")
    parser.add_argument("--out", required=True, help="the folder to write; a run that was stopped goes on from there")
    choices = parser.add_argument_group("each with a default of its own")
    choices.add_argument("--method", default=SUPPRESS, help=", ".join(METHODS))
    choices.add_argument("--targets", default=SUPPRESS, help="modules to adapt, commas between them, or all-linear")
    for name, kind, what in (
            ("rank", int, "of the adapters; default 16"), ("alpha", float, "default 32, at every rank"),
            ("dropout", float, "of the adapters; default 0"), ("lr", float, "the peak; default by the model's width"),
            ("epochs", float, "default 3"), ("steps", int, "in the place of epochs"),
            ("batch", int, "rows of one forward; default 8"),
            ("accumulation", int, "forwards to a step; default 1"), ("seq", int, "most tokens of a row"),
            ("eval-share", float, "of the rows, held back; default 0.1"),
            ("patience", int, "validations without a better one before the end; default 3, 0: never"),
            ("every", int, "steps between validations and checkpoints; default a tenth of all"),
            ("warmup", int, "steps; default a twentieth of all"), ("weight-decay", float, "default 0"),
            ("seed", int, "default 0")):
        choices.add_argument(f"--{name}", type=kind, default=SUPPRESS, help=what)
    choices.add_argument("--schedule", default=SUPPRESS, help="cosine, linear or constant")
    choices.add_argument("--device", default=SUPPRESS, help="cuda, mps or cpu")
    choices.add_argument("--dtype", default=SUPPRESS, help="of the base's weights: bfloat16, float16 or float32")
    choices.add_argument("--template", default=SUPPRESS, help="a file with a chat template")
    choices.add_argument("--start", default=SUPPRESS, help="an adapter to go on from")
    choices.add_argument("--packing", action="store_true", default=SUPPRESS, help="several rows in one line")
    choices.add_argument("--checkpointing", action="store_true", default=SUPPRESS, help="recompute in backward")
    parser.add_argument("--anyway", action="store_true", help="begin also where the plan says that it does not fit")
    parser.add_argument("--budget", help="plan with so much memory, such as 24GiB, in the place of this device's")
    options = vars(parser.parse_args(arguments))
    from ..stream_run import size_of
    from .run import Settings, tune

    budget = size_of(options.pop("budget")) if options["budget"] is not None else options.pop("budget")
    anyway = options.pop("anyway")
    options |= targets_of(options) | template_of(options)
    Settings(**options)  # what is wrong with a setting, before any file is read
    read_rows(options["data"])
    tune(**options, anyway=anyway, budget=budget)


def targets_of(options: dict) -> dict:
    """Names with commas between, or a regular expression, or all-linear."""
    targets = options.get("targets")
    if targets is None or targets == ALL_LINEAR or set(targets) & set("*+?|()[]{}\\^$"):
        return {}
    return {"targets": tuple(target.strip() for target in targets.split(","))}


def template_of(options: dict) -> dict:
    if options.get("template") is None:
        return {}
    path = Path(options["template"])
    require(path.is_file(), "template must be a file with a chat template", str(path))
    return {"template": path.read_text(encoding="utf-8")}


def add_model(parser, many: bool = False) -> None:
    parser.add_argument("--model", help="a folder or a name on the hub; default: the base that the adapter names")
    if many:
        parser.add_argument("--adapter", action="append", default=[], help="FOLDER or NAME=FOLDER; may be repeated")
    else:
        parser.add_argument("--adapter", help="its folder")
    parser.add_argument("--any-base", action="store_true", help="also an adapter of other weights of this shape")
    parser.add_argument("--device", help="cuda, mps or cpu")
    parser.add_argument("--dtype", help="of the base's weights: bfloat16, float16 or float32")


def need_one(options, adapters) -> None:
    require(options.model is not None or adapters, "expected --model or --adapter, or both", None)
    for folder in adapters:
        require(Path(folder).is_dir(), "adapter must be a folder", folder)


def chat_command(parser, arguments: list[str]) -> None:
    """Talk to a base and its adapters, side by side."""
    add_model(parser, many=True)
    parser.add_argument("--prompt", help="one message in the place of a conversation")
    parser.add_argument("--system", default="", help="what the system turn says")
    parser.add_argument("--max-new", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--template", help="a file with a chat template")
    options = parser.parse_args(arguments)
    named = dict(each.split("=", 1) if "=" in each else (Path(each).name or each, each) for each in options.adapter)
    need_one(options, named.values())
    template = template_of(vars(options)).get("template")
    from .after import HELP, Talk, converse, open_model

    model, tokenizer = open_model(options.model, next(iter(named.values()), None), options.device, options.dtype, True)
    talk = Talk(model, tokenizer, named, system=options.system, max_new=options.max_new, any_base=options.any_base,
                temperature=options.temperature, template=template)
    if options.prompt is not None:
        converse(talk, iter([options.prompt]))
        return
    if sys.stdin.isatty():
        print(HELP)
    converse(talk, iter(sys.stdin))


def eval_command(parser, arguments: list[str]) -> None:
    """Loss and exact match of a base and its adapter."""
    add_model(parser)
    parser.add_argument("--data", required=True, help="a .jsonl file as of tune")
    parser.add_argument("--forgetting", help="a second file, of what the base could do before")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, help="most tokens of a row")
    parser.add_argument("--template", help="a file with a chat template")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    need_one(options, [options.adapter] if options.adapter is not None else [])
    for name, value in (("batch", options.batch), ("seq", options.seq)):
        require(value is None or 0 < value < 2**31, f"{name} must be a positive integer", value)
    files = list(dict.fromkeys(file for file in (options.data, options.forgetting) if file is not None))
    for file in files:
        read_rows(file)
    template = template_of(vars(options)).get("template")
    from .after import evaluate, open_model

    model, tokenizer = open_model(options.model, options.adapter, options.device, options.dtype, True)
    found = evaluate(model, tokenizer, files, options.adapter, batch=options.batch, seq=options.seq,
                     any_base=options.any_base, template=template)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)


def merge_command(parser, arguments: list[str]) -> None:
    """Put an adapter into its base for good, as a model of its own."""
    add_model(parser)
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--four-bit", action="store_true",
                        help="the adapter was trained on the base in NF4 (its card may say so): merge it into that")
    options = parser.parse_args(arguments)
    require(options.adapter is not None, "expected --adapter", None)
    need_one(options, [options.adapter])
    check_free(options.out)
    require(not (Path(options.out) / "config.json").exists(), "out must be a folder without a model", options.out)
    from .after import merge_for_good, open_model, was_four_bit

    model, tokenizer = open_model(options.model, options.adapter, options.device, options.dtype)
    found = merge_for_good(model, options.adapter, options.four_bit or was_four_bit(options.adapter), options.any_base)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"{found}\nsaved to {options.out}")


def export_command(parser, arguments: list[str]) -> None:
    """Write a model or an adapter for llama.cpp."""
    add_model(parser)
    parser.add_argument("--gguf", required=True, help="the file to write")
    parser.add_argument("--adapter-only", action="store_true", help="the adapter alone, for llama.cpp's --lora")
    parser.add_argument("--type", default=None, help="f32, f16 or bf16, of the matrices; default f16, an adapter f32")
    options = parser.parse_args(arguments)
    adapters = [options.adapter] if options.adapter is not None else []
    need_one(options, adapters)
    require(adapters or not options.adapter_only, "adapter-only needs --adapter", None)
    out = Path(options.gguf)
    require(out.suffix == ".gguf" and out.parent.is_dir() and not out.exists(),
            "gguf must be a new file that ends in .gguf, in a folder that is there", options.gguf)
    from ..adapters import load_adapter
    from .after import merge_for_good, open_model, was_four_bit
    from .gguf_file import TYPES, check_model, export_adapter, export_model, library

    require(options.type is None or options.type in TYPES, f"type must be one of {', '.join(TYPES)}", options.type)
    library()
    model, tokenizer = open_model(options.model, options.adapter, options.device, options.dtype)
    check_model(model)
    if options.adapter_only:
        load_adapter(model, options.adapter, any_base=options.any_base or was_four_bit(options.adapter))
        count = export_adapter(model, out, options.type or "f32")
    else:
        if adapters:
            print(merge_for_good(model, options.adapter, was_four_bit(options.adapter), options.any_base))
        count = export_model(model, tokenizer, out, options.type or "f16")
    print(f"{count} tensors written to {out}")
