"""Hundreds of hostile files, drawn over the structure of safetensors, JSON and names: an answer or one line, never a
traceback, and nothing on the terminal that is no text."""

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_adapter_tools import adapter_of

from minilora import LoRAConfig, cli, load_adapter
from minilora.adapter_tools import inspect_adapter
from minilora.adapters import WEIGHTS
from minilora.peft_format import keys_of, peft_config
from minilora.stream_run import Peak
from minilora.tables import plain, quoted

EXAMPLES = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
NAMES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "up_proj",
            "layers.1.up_proj",
            "\x1b]0;x\x07",
            "\u202e",
            "\n\r",
            "a" * 5000,
            ".",
            "",
            "9" * 5000 + ".q",
            "\ud800",
            "$x$",
        ]
    ),
)
NUMBERS = st.one_of(
    st.integers(-2, 12), st.sampled_from([2**31, 2**63, 2**64, 10**400, -(2**63), 1.5, float("nan"), 1e308])
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, NAMES)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=8
)
ENDS = ["lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "weight", ""]
KEYS = st.one_of(
    st.builds("base_model.model.{}.{}".format, NAMES, st.sampled_from(ENDS)), NAMES, st.just("__metadata__")
)
ENTRIES = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(
                ["F32", "F32", "BF16", "F16", "F64", "I32", "F8_E4M3", "BOOL", "C64", "X", None, 3]
            ),
            "shape": st.lists(NUMBERS, max_size=3),
            "data_offsets": st.lists(NUMBERS, max_size=3),
        }
    ),
)
SETTINGS = st.sampled_from(
    [
        "r",
        "lora_alpha",
        "target_modules",
        "rank_pattern",
        "alpha_pattern",
        "peft_type",
        "bias",
        "use_dora",
        "use_rslora",
        "lora_dropout",
        "init_lora_weights",
        "modules_to_save",
        "layers_to_transform",
        "exclude_modules",
        "fan_in_fan_out",
        "other",
    ]
)
FIELDS = st.sampled_from(
    [
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "head_dim",
        "intermediate_size",
        "num_key_value_heads",
        "tie_word_embeddings",
        "hidden_act",
        "text_config",
        "max_position_embeddings",
        "attention_bias",
        "_name_or_path",
        "num_experts",
        "attention_dropout",
        "sliding_window",
        "layer_types",
        "rope_scaling",
        "torch_dtype",
        "quantization_config",
    ]
)


@st.composite
def true_entries(draw):
    """A header and a body that agree, of factors that may not."""
    header, body, rank = {}, b"", draw(st.integers(1, 4))
    for name in draw(st.lists(NAMES, min_size=1, max_size=4)):
        for key, shape in zip(keys_of(name, "linear").values(), ((rank, 5), (4, draw(st.integers(0, 4)) or rank))):
            size = shape[0] * shape[1] * 4
            header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(body), len(body) + size]}
            body += draw(st.sampled_from([b"\0\0\x80\x3f", b"\0\0\0\0", b"\xff\xff\x7f\x7f", b"\1\0\0\0"])) * (
                size // 4
            )
    header["__metadata__"] = {"minilora.base": draw(st.text(max_size=9))}
    return header, body


@st.composite
def safetensors(draw) -> bytes:
    header, body = draw(true_entries())
    header |= draw(st.dictionaries(KEYS, ENTRIES, max_size=2))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text = text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 5)) == 0 else text
    length = draw(st.sampled_from([len(text)] * 8 + [0, 1, len(text) + 9, 2**63, 2**64 - 1]))
    return (
        struct.pack("<Q", length)
        + text
        + body
        + draw(st.binary(max_size=4) if draw(st.integers(0, 5)) == 0 else st.just(b""))
    )


def said_by(*arguments: str) -> str:
    """What a command says, which must be an answer or one line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(a) for a in arguments])
    lines = err.getvalue().splitlines()
    assert (code, lines) == (0, []) or code == 2 and out.getvalue() == "" and len(lines) == 1, (code, out, lines)
    said = lines[0] if lines else out.getvalue()
    assert all(line.isprintable() for line in said.split("\n")) and len(said) < (800 if lines else 100_000), said[:1000]
    return said


@EXAMPLES
@given(weights=safetensors(), changed=st.dictionaries(SETTINGS, JSON, max_size=2))
def test_an_adapter_s_folder(weights, changed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("a")
    (folder / WEIGHTS).write_bytes(weights)
    config = peft_config(LoRAConfig(2, 4, ("up_proj",))) | changed
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")
    said_by("inspect", folder)
    said_by("truncate", folder, folder / "out", "--rank", 1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4))
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError) as e:  # no target of such a name is in the model
        load_adapter(model, folder)
    assert len(str(e.value)) < 2500 and [type(m) for m in model.modules()] == before


@EXAMPLES
@given(changed=st.dictionaries(FIELDS, JSON, min_size=1, max_size=3))
def test_a_config_of_a_model(changed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("m")
    config = small.hf_llama().config.to_dict() | changed
    (folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8", errors="surrogatepass")
    said_by("memory", "--config", folder)
    said_by("stream", "--config", folder, "--plan", "--seq", 16)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[" * 200_000,
        b"{" * 200_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"\xff\xfe\0",
        b"null",
        b'{"r": "' + b"x" * 30_000_000 + b'"}',
        b'{"peft_type": "' + b"\\u001b[2J" * 10**6 + b'"}',
    ],
)
def test_a_large_or_strange_config_is_a_few_hundred_characters(text, tmp_path):
    folder = adapter_of({"up_proj": [1.0]}, tmp_path, 2)
    for file, command in (
        ("adapter_config.json", ("inspect", folder)),
        ("config.json", ("memory", "--config", folder)),
    ):
        (folder / file).write_bytes(text)
        assert said_by(*command).startswith("minilora ")


@pytest.mark.skipif(sys.platform != "linux", reason="measured through /proc")
def test_a_sparse_file_takes_little_memory(tmp_path):
    """4 GiB of zeros that take no room on the disk, as one factor; it took 12.8 GB of memory to be refused."""
    folder = adapter_of({"up_proj": [1.0]}, tmp_path, 1)
    entries, size = keys_of("up_proj", "linear"), 2**32
    header = {
        entries["lora_A"]: {"dtype": "F32", "shape": [1, size // 4], "data_offsets": [0, size]},
        entries["lora_B"]: {"dtype": "F32", "shape": [1, 1], "data_offsets": [size, size + 4]},
    }
    text = json.dumps(header).encode()
    with open(folder / WEIGHTS, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + size + 4)
    with Peak(torch.device("cpu")) as peak:
        assert "no layer's factor is so large" in said_by("inspect", folder)
    assert peak.bytes < 2**28


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_not_called_damaged(tmp_path):
    folder = adapter_of({"up_proj": [1.0]}, tmp_path, 2)
    (folder / WEIGHTS).chmod(0)
    assert "cannot be read: Permission denied" in said_by("inspect", folder)


def test_a_folder_in_a_file_s_place_is_not_called_damaged(tmp_path):
    folder = adapter_of({"up_proj": [1.0]}, tmp_path, 2)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to("adapter_config.json")  # a loop
    assert "damaged" not in said_by("inspect", folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_adapter_of_8_bits(dtype, tmp_path):
    keys, folder = keys_of("up_proj", "linear"), adapter_of({"up_proj": [1.0]}, tmp_path, 2)
    save_file(
        {keys["lora_A"]: torch.ones(2, 9).to(dtype), keys["lora_B"]: torch.ones(7, 2).to(dtype)}, folder / WEIGHTS
    )
    with pytest.raises(ValueError, match="float8.* values, expected finite floating-point numbers of 16 bits or more"):
        inspect_adapter(folder)


@pytest.mark.parametrize("redirected, code", [(">&-", 0), (">/dev/full", 2), ("2>&-", 0), (">&- 2>&-", 0)])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_an_output_that_takes_nothing(redirected, code):
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m minilora models {redirected}"], capture_output=True, text=True
    )
    assert done.returncode == code and "Traceback" not in done.stderr and "ignored" not in done.stderr, done.stderr
    assert done.stderr.count("\n") == (code == 2), done.stderr


def test_a_tensor_under_two_names(tmp_path):
    keys, folder = keys_of("up_proj", "linear"), adapter_of({"up_proj": [1.0]}, tmp_path, 2)
    tensors = {keys["lora_A"]: torch.ones(2, 9), keys["lora_B"]: torch.ones(7, 2)}
    save_file(tensors | {keys["lora_A"].replace(".weight", ".default.weight"): torch.zeros(2, 9)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="up_proj.lora_A.*twice, as .*up_proj.lora_A"):
        inspect_adapter(folder)


def test_text_is_escaped_and_cut():
    assert (
        plain("q_proj é 模型") == "q_proj é 模型"
        and plain("a\x1b[2J\n\u202e\x9b\ud800") == r"a\x1b[2J\n\u202e\x9b\ud800"
    )
    assert len(plain("x" * 10**7)) < 700 and plain("abc" * 100, 30) == "abc" * 6 + "ab ... cabcabcabc"
    assert quoted({"a": "\x1b"}) == r"{'a': '\x1b'}" and quoted(10**5000) == "a int too large to be shown"
