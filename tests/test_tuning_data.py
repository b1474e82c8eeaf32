"""Files of rows to tune on: five forms, and every way in which a file is wrong as one line that names it."""

import gzip
import json
import re

import pytest

from minilora.tuning.data import read_rows

GOOD = {
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "input": "", "output": "b", "text": "a b"},
    "prompt/completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a b"},
}


def written(tmp_path, *rows) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("form", GOOD)
def test_every_form_is_read(form, tmp_path):
    path = written(tmp_path, GOOD[form], "", GOOD[form])
    rows = read_rows(path)
    assert rows.form == form and [row.line for row in rows.rows] == [1, 3] and len(rows.sha256) == 64
    row = rows.rows[0]
    if form in ("messages", "ShareGPT", "alpaca"):
        assert [(turn["role"], turn["content"]) for turn in row.messages] == [("user", "a"), ("assistant", "b")]
        assert row.trained == [1]
    else:
        assert row.messages is None and (row.prompt, row.text) == (("a", "b") if "prompt" in form else ("", "a b"))


def test_what_forms_may_also_hold(tmp_path):
    system = {"role": "system", "content": "s"}
    user, said = GOOD["messages"]["messages"]
    first = read_rows(written(tmp_path, {"prompt": [system, user, said, user], "completion": [said]})).rows[0]
    assert first.trained == [4] and len(first.messages) == 5
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    quiet = said | {"weight": 0}
    row = read_rows(written(tmp_path, {"messages": [parts, quiet, user, said], "tools": "[{\"type\": \"function\"}]"})).rows[0]
    assert row.messages[0]["content"] == "ab" and row.trained == [3] and row.tools == ({"type": "function"},)
    row = read_rows(written(tmp_path, {"conversations": GOOD["ShareGPT"]["conversations"], "system": "s"})).rows[0]
    assert row.messages[0] == system
    row = read_rows(written(tmp_path, {"instruction": "a", "input": "b", "output": "c", "system": "s"})).rows[0]
    assert [turn["content"] for turn in row.messages] == ["s", "a\n\nb", "c"]


def messages(*turns) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


U, A = ("user", "a"), ("assistant", "b")
# what is wrong -> (the rows, the number of the line, what is said)
WRONG = {
    "empty": ([], 1, "is empty, expected one JSON object a line"),
    "no JSON": (['{"text": "a"}', "hello"], 2, "is no JSON .*character 1.*expected one JSON object a line"),
    "cut off": (['{"text": "a"}', '{"text": "a'], 2, "is no JSON"),
    "a list": (['[{"text": "a"}]'], 1, "is a JSON list of 1 entries, expected one JSON object a line"),
    "JSON over several lines": (["[", '{"text": "a"},'], 1, "beginning of a JSON file over several lines"),
    "a number": (["7"], 1, "is 7, expected one JSON object"),
    "NaN": (['{"text": "a", "score": NaN}'], 1, "holds NaN"),
    "a field twice": (['{"text": "a", "text": "b"}'], 1, "'text' twice"),
    "half a character": (['{"text": "a \\ud800"}'], 1, "half a character"),
    "nested too deeply": (['{"text": ' + "[" * 100_000], 1, "is no JSON|too deep"),
    "unknown fields": ([{"mesages": []}], 1, "expected messages, .*near: messages"),
    "half a form": ([{"prompt": "a"}], 1, "has prompt and lacks completion"),
    "two forms": ([GOOD["messages"] | GOOD["alpaca"]], 1, "is of two forms, messages and alpaca"),
    "forms mixed": ([GOOD["text"], GOOD["messages"]], 2, "form messages, expected text as on line 1"),
    "no turns": ([messages()], 1, "messages is \\[\\], expected a list of turns"),
    "turns that are none": ([{"messages": "hello"}], 1, "messages is 'hello', expected a list"),
    "a turn that is text": ([{"messages": ["hello"]}], 1, r"messages\[0\] is 'hello', expected an object with role"),
    "no role": ([{"messages": [{"content": "a"}]}], 1, r"messages\[0\] lacks role, expected one of system"),
    "an unknown role": ([messages(("asistant", "a"))], 1, "role 'asistant', expected .*near: assistant"),
    "a role of ShareGPT's": ([messages(("gpt", "a"))], 1, "role 'gpt', expected .*near: assistant"),
    "no content": ([{"messages": [{"role": "user"}]}], 1, r"messages\[0\] lacks content, expected text"),
    "content that is a number": ([messages(("user", 7))], 1, "has the content 7, expected text"),
    "a picture": ([messages(("user", [{"type": "image"}]))], 1, "expected parts of type text alone"),
    "nothing to learn": ([messages(U)], 1, "no turn of the assistant, expected one"),
    "the user's last": ([messages(U, A, U)], 1, "ends with a turn of user, expected the assistant's"),
    "an empty answer": ([messages(U, ("assistant", " \n"))], 1, r"messages\[1\] is an empty turn of the assistant"),
    "a late system turn": ([messages(U, ("system", "s"), A)], 1, r"messages\[1\] is a system turn, expected one at"),
    "calls of the user": ([{"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}], 1, "tool_calls"),
    "tools that are none": ([GOOD["messages"] | {"tools": "x"}], 1, "tools is 'x', expected a list of objects"),
    "a weight": ([{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}], 1, "weight 2, expected 0 or 1"),
    "an unknown speaker": ([{"conversations": [{"from": "bob", "value": "a"}]}], 1, r"conversations\[0\] is from 'bob'"),
    "a turn without value": ([{"conversations": [{"from": "gpt"}]}], 1, "expected an object with from and value"),
    "an empty completion": ([{"prompt": "a", "completion": ""}], 1, "completion is empty, expected text"),
    "a prompt of turns alone": ([{"prompt": [{}], "completion": "b"}], 1, "expected text, or a list of messages in both"),
    "an empty text": ([{"text": "  "}], 1, "text is empty"),
    "an output that is null": ([{"instruction": "a", "output": None}], 1, "output is None, expected text"),
    "an input that is a list": ([{"instruction": "a", "input": [1], "output": "b"}], 1, "input is \\[1\\], expected text"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_malformed_file_is_one_line(what, tmp_path):
    rows, line, said = WRONG[what]
    path = written(tmp_path, *rows)
    with pytest.raises(ValueError) as error:
        read_rows(path)
    text = str(error.value)
    assert text.startswith(f"{path}, line {line}: ") and re.search(said, text) and "expected" in text, text
    assert text.isprintable() and len(text) < 600


BYTES = {
    "Latin-1": ('{"text": "Grüße"}'.encode("latin-1"), "is not UTF-8 at byte 12"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "UTF-16"),
    "zeros": (b'{"text": "a"}\n' + bytes(50), "is not UTF-8"),
    "gzip": (gzip.compress(b'{"text": "a"}'), "is (of a compressed or parquet file|not UTF-8)"),
    "parquet": (b"PAR1\x15\x04" + b"x" * 20, "compressed or parquet"),
}


@pytest.mark.parametrize("what", BYTES)
def test_bytes_that_are_no_text(what, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(BYTES[what][0])
    with pytest.raises(ValueError, match=f"rows.jsonl, line [12]: .*{BYTES[what][1]}.*expected"):
        read_rows(path)


def test_a_mark_at_the_beginning_is_no_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n')
    assert read_rows(path).rows[0].text == "a"


def test_no_file_or_a_folder(tmp_path):
    written(tmp_path, GOOD["text"])
    with pytest.raises(ValueError, match="there is no .*row.jsonl, expected a .jsonl file; near: rows.jsonl"):
        read_rows(tmp_path / "row.jsonl")
    with pytest.raises(ValueError, match="is a folder, expected a .jsonl file"):
        read_rows(tmp_path)
