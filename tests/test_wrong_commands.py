"""Hundreds of wrong command lines: each says one line on stderr, ends with code 2, and does nothing."""

import json
import random
import time
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import small
import torch
from test_adapter_tools import adapter_of, listing
from wrong_configs import SIZES, as_json, failure, sample

from minilora import cli

LONG, ESCAPE, TURNED = "x" * 5000, "\x1b[2J\nevil", "\u202elive"
NO_NUMBER = ["", "x", "nan", "-inf", "-7", "1e400x", "9" * 400, "-" + "9" * 5000, ESCAPE, TURNED, "½", "0x10", "1,5"]
NO_INTEGER = [*NO_NUMBER, "1.5", "1e3", "true"]
NO_WORD = ["", "nothing", LONG, ESCAPE, TURNED, "../..", "-7x"]
NO_FOLDER = ["", "nothing", LONG, ESCAPE, "loop", "empty", "file", "file/x", "damaged", "deep", "list"]
NO_DEVICE = ["", "quark", "meta", "gpu", "cuda:-1", ESCAPE, LONG, "cpu:x", "7x"]
NO_SIZE = ["", "24", "x", "-1GiB", "9" * 400 + "GiB", "nanGiB", "1e9GiB", "0GiB", "1B", ESCAPE, "GiB", "24GiB24GiB"]
NO_TARGETS = ["nothing", "(", r"(q_proj)\1", "q_proj,nothing", ESCAPE, LONG, "(?i)q_proj", "[", ",", "q_proj,"]

# option -> values that are wrong wherever it stands; an integer or float is known by its type
WRONG = {
    "--plot": ["nothing/x.png", "x.foo", "file/x.png", LONG + ".png"],
    "--device": NO_DEVICE,
    "--budget": NO_SIZE,
    "--targets": NO_TARGETS,
    "--config": NO_FOLDER,
    "--out": [],
    "--store": [],
}
# command -> the right line that a wrong word is put into
RIGHT = {
    "tune": ["tune", "--model", "hf", "--data", "rows.jsonl", "--out", "o"],
    "chat": ["chat", "--model", "hf", "--prompt", "hello"],
    "eval": ["eval", "--model", "hf", "--data", "rows.jsonl"],
    "merge": ["merge", "--model", "hf", "--adapter", "a", "--out", "o"],
    "export": ["export", "--model", "hf", "--gguf", "o.gguf"],
    "inspect": ["inspect", "a"],
    "truncate": ["truncate", "a", "o", "--rank", "2"],
    "extract": ["extract", "base", "tuned", "o", "--rank", "2"],
    "memory": ["memory", "--model", "gpt2"],
    "fit": ["fit", "--card", "t4", "--model", "gpt2"],
    "claims": ["claims"],
    "models": ["models"],
    "cards": ["cards"],
    "wire": ["wire"],
    "stream": ["stream", "--plan", "--model", "qwen2.5-0.5b"],
    "trace": ["trace", "--config", "hf"],
    "page": ["page"],
}
FITS = {("memory", "--prompt"), ("memory", "--new"), ("memory", "--adapters")}  # options of --serve


def options_of(command: str) -> list:
    """What argparse knows of a command's options."""

    class Asked(Exception):
        pass

    class Asker(cli.Parser):
        def parse_args(self, arguments):
            raise Asked

    parser, (room, _) = Asker(prog=command), cli.COMMANDS[command]
    with pytest.raises(Asked):
        getattr(import_module(f"minilora.{room}"), f"{command}_command")(parser, [])
    return [a for a in parser._actions if a.option_strings and a.dest != "help"]


def wrong_values(option) -> list[str]:
    name = option.option_strings[0]
    if option.nargs == 0:
        return [f"{name}=1"]
    values = WRONG[name] if name in WRONG else {int: NO_INTEGER, float: NO_NUMBER}.get(option.type) or NO_WORD
    return [f"{name}={value}" for value in values]


def lines_of(command: str) -> list[list[str]]:
    """The right line with one wrong word, and some with two."""
    right, wrong = RIGHT[command], [word for option in options_of(command) for word in wrong_values(option)]
    name = next((word for word in right if word.startswith("--")), None)
    lines = [
        [*right, "--serve", word]
        if (command, word.split("=")[0]) in FITS
        else [*without(right, word.split("=")[0]), word]
        for word in wrong
    ]
    lines += [[*right, word] for word in ("--bogus", "-q", "surplus", ESCAPE, LONG, "--bogus=" + LONG, "--=", "-")]
    lines += [right[:i] for i in range(1, len(right)) if name]  # something is missing
    lines += [[*right, option.option_strings[0]] for option in options_of(command) if option.nargs != 0]  # no value
    draw = random.Random(0)
    return lines + [[*right, *draw.sample(wrong, 2)] for _ in range(8 if len(wrong) > 8 else 0)]


def without(line: list[str], option: str) -> list[str]:
    """The line without an option that is given once more, and its value; --rank and --energy exclude each other."""
    taken = {option} | ({"--rank"} if option == "--energy" else {"--model"} if option == "--config" else set())
    return [word for i, word in enumerate(line) if word not in taken and (i == 0 or line[i - 1] not in taken)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("world")
    adapter_of({"up_proj": [1.0] * 4}, path / "a", 4)
    for name in ("base", "tuned"):
        model = small.our_llama()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.add_(name == "tuned")
        model.save_pretrained(path / name)
    small.hf_llama().config.save_pretrained(path / "hf")
    (path / "file").write_text("x")
    (path / "loop").symlink_to("loop")
    for name, text in (
        ("empty", None),
        ("damaged", '{"model_type": "llama", '),
        ("list", "[1]"),
        ("deep", "[" * 100_000),
    ):
        (path / name).mkdir()
        if text is not None:
            (path / name / "config.json").write_text(text)
    return path


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_wrong_line_is_one_line(command, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before, failed, lines = listing(world), [], lines_of(command)
    for line in lines:
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = cli.main(line)
        except BaseException as e:  # as Python would end: with a traceback
            code = f"{type(e).__name__}: {e}"[:300]
        out, err = capsys.readouterr()
        said = err.splitlines()
        if not (
            code == 2
            and out == ""
            and len(said) == 1
            and said[0].isprintable()
            and len(said[0]) < 700
            and said[0].startswith(f"minilora {command}: ")
            and time.process_time() - start < 20
        ):
            failed.append(([word[:60] for word in line], code, out[:100], err[-300:], time.process_time() - start))
    assert not failed, f"{len(failed)} of {len(lines)}:\n" + "\n".join(map(str, failed))
    assert listing(world) == before and {p.name for p in world.iterdir()} == {
        "a",
        "base",
        "tuned",
        "hf",
        "file",
        "loop",
        "empty",
        "damaged",
        "list",
        "deep",
    }


def test_damaged_configs_end_in_one_line(tmp_path, capsys):
    """A part of `tests/bench/wrong_inputs.py`."""
    failed = [(line, content[:200], wrong) for line, content in sample(60)
              if (wrong := failure(line, content, tmp_path, capsys))]
    assert not failed


def test_a_byte_order_mark_is_no_fault(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + as_json({"model_type": "llama", **SIZES}))
    assert cli.main(["memory", "--config", str(tmp_path), "--seq", "16"]) == 0
    assert capsys.readouterr().out.startswith("stack trl")


def test_a_config_is_found_in_the_hub_s_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_bytes(as_json({"model_type": "llama", **SIZES}))
    assert cli.main(["memory", "--config", "owner/name", "--seq", "16"]) == 0
    capsys.readouterr()
    assert cli.main(["memory", "--config", "owner/nothing", "--seq", "16"]) == 2
    assert "there is no owner/nothing" in capsys.readouterr().err


def test_there_are_700():
    counts = {command: len(lines_of(command)) for command in cli.COMMANDS}
    assert sum(counts.values()) >= 700, json.dumps(counts)
