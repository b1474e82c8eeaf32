"""Configs and command lines of the calculator that make no sense, each to end in one line and code 2, or in an answer.

A damaged field may leave a config that still means something (a default takes its place), so an answer is right too;
what is never right is a traceback, more than one line, or a wait.
"""

import json
import random
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from minilora import cli

SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
         "intermediate_size": 96, "max_position_embeddings": 128, "head_dim": 16, "hidden_act": "silu",
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False}
# three that have closed forms, and two that only a trace answers
KINDS = {"llama": {}, "gemma3_text": {"sliding_window": 16, "hidden_activation": "gelu_pytorch_tanh"},
         "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
         "helium": {}, "olmoe": {"num_experts": 4, "num_experts_per_tok": 2}}
WRONG = [None, "", "x", [], [64, 64], {}, {"a": 1}, True, -1, 0, 0.5, 1e308, float("nan"), float("inf"), 2**40, 10**400]
ROPE = [None, [], "yarn", {"rope_type": "nothing"}, {"rope_type": None}, {"rope_type": "yarn", "factor": "x"},
        {"rope_type": "default", "rope_theta": float("nan")}, {"rope_type": "llama3"}]
FILES = [b"", b"null", b"[]", b"[1]", b"1e400", b"\xff\xfe{}", b"{", b'{"model_type": }', b'"llama"', b"NaN", b"[" * 50_000,
         b"\xef\xbb\xbf", b"\xef\xbb\xbfnull", b'{"model_type": ["llama"]}', b'{"model_type": null}', b'{"model_type": 7}',
         b'{"model_type": ""}', b'{"model_type": "\\u202e"}', b'{"model_type": "nothing"}', b"\x00", b"{}"]
OPTIONS = ["--seq=0", "--seq=1e3", "--batch=-1", "--rank=0", "--rank=9999999", "--dtype=int8", "--targets=", "--targets=(",
           "--optimizer=x", "--stack=x", "--attention=x", "--rows=x", "--zero=7", "--cards=0", "--dropout=1",
           "--dropout=nan", "--family=x", "--card=", "--card=x", "--loss=x", "--upcast=x", "--method=x", "--config="]


def cases() -> Iterator[tuple[list[str], bytes]]:
    """(command and options, the bytes of its config.json), some 700 of them; the first of a kind first."""
    for command in ("memory", "fit", "trace"):
        for content in FILES:
            yield [command], content
        for option in OPTIONS:
            yield [command, option], as_json({"model_type": "llama", **SIZES})
    for command in ("memory", "fit", "trace"):
        for name in ("", " ", "nothing", "../x", "x" * 3000, "llama-3-8b\n"):
            yield [command, f"--model={name}"], b""
    for kind, more in KINDS.items():
        config = {"model_type": kind, **SIZES, **more}
        for field in config:
            for i, value in enumerate(ROPE if field == "rope_parameters" else WRONG):
                yield ["fit" if i % 8 == 3 else "memory"], as_json(config | {field: value})
            yield ["memory"], as_json({k: v for k, v in config.items() if k != field})


def as_json(config: dict) -> bytes:
    return json.dumps(config).encode()


def failure(line: list[str], content: bytes, folder: Path, capsys=None) -> str:
    """What is wrong with how a case ends, or ""."""
    (folder / "config.json").write_bytes(content)
    command, *options = line
    given = any(option.startswith(("--model", "--config")) for option in options)
    words = [command, *([] if given else ["--config", str(folder)]), *options]
    if not any(option.startswith("--seq") for option in options):
        words += ["--seq", "16", "--rank", "2", "--targets", "q_proj"]
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = cli.main(words)
    except BaseException as e:  # as Python would end: with a traceback
        return f"{type(e).__name__}: {str(e)[:200]}"
    said = capsys.readouterr().err.splitlines() if capsys else None
    if time.process_time() - start > 30:
        return f"took {time.process_time() - start:.0f} s"
    if code not in (0, 2):
        return f"code {code}"
    if code == 2 and said is not None and (len(said) != 1 or not said[0].startswith(f"minilora {command}: ")
                                           or len(said[0]) > 900):
        return f"said {said[:3]}"
    return ""


def sample(count: int) -> list[tuple[list[str], bytes]]:
    """Some that need no trace."""
    quick = [case for case in cases() if case[0][0] != "trace" and b"helium" not in case[1] and b"moe" not in case[1]]
    return random.Random(0).sample(quick, count)
