"""The command line: ``minilora COMMAND ...``. What a command does stands in its room."""

import os
import sys
from difflib import get_close_matches
from importlib import import_module

from . import __version__
from .refusals import REFUSED, Parser, refusal
from .tables import plain

# command -> the room that has the function of the same name and "_command", and what it does
COMMANDS: dict[str, tuple[str, str]] = {
    "tune": ("tuning.cli", "fine-tune a Hugging Face model on a file of rows: plan, train, evaluate, save"),
    "chat": ("tuning.cli", "talk to a base and its adapters, side by side"),
    "eval": ("tuning.cli", "loss and exact match of a base and its adapter, and what it forgot"),
    "merge": ("tuning.cli", "put an adapter into its base for good, as a model of its own"),
    "export": ("tuning.cli", "write a model or an adapter as a GGUF file, for llama.cpp"),
    "inspect": ("adapter_tools", "what is inside an adapter: rank, norm, spectrum of every module"),
    "truncate": ("extract", "write an adapter again at a smaller rank, as near as that rank allows"),
    "extract": ("extract", "write the adapter nearest to the difference of two checkpoints"),
    "memory": ("memory.cli", "what a training step of a model needs, to the byte, and when"),
    "fit": ("memory.cli", "whether a training step fits which cards, and what to change so that it does"),
    "claims": ("memory.cli", "what papers say of memory, reproduced or not, with the arithmetic"),
    "models": ("memory.cli", "the models whose shapes are known"),
    "cards": ("memory.cli", "the cards, and how much of each a run may use"),
    "wire": ("experiments", "what a training step sends to other processes, counted: to be run under torchrun"),
    "stream": ("stream_run", "train on a base that stays on disk or in host memory, beside the plan"),
    "page": ("page", "the calculator in the browser, answered by this Python on this machine alone"),
    "trace": ("memory.cli", "what one training step of a Hugging Face architecture would allocate on a GPU, traced"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. `arguments`: the words after ``minilora``, those of this process by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("minilora COMMAND ..., where COMMAND is one of\n")
        print("\n".join(f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()))
        print("\nminilora COMMAND --help tells of its options.")
        return 0
    if arguments[0] == "--version":
        print(f"minilora {__version__}")
        return 0
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, n=1)
            raise ValueError(f"no command {name!r}, expected one of {', '.join(COMMANDS)}"
                             + (f"; near: {near[0]}" if near else ""))
        room, what = COMMANDS[name]
        run = getattr(import_module(f"minilora.{room}"), f"{name}_command")
        run(Parser(prog=f"minilora {name}", description=what), rest)
        if sys.stdout is not None:  # closed by whoever started this
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, `head` say, has had enough
        forget_output()
    except REFUSED as error:
        print(refusal(name, error), file=sys.stderr)
        forget_output()
        return 2
    except KeyboardInterrupt:
        print(f"minilora {plain(name, 40)}: interrupted", file=sys.stderr)
        return 130  # as a shell has it
    return 0


def forget_output() -> None:
    """Let what is not yet printed go, where it cannot be: nor may the flush at exit complain (a full disk, a pipe)."""
    try:
        sys.stdout.flush()
    except AttributeError:  # there is none
        pass
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
