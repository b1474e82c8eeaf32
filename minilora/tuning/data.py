"""A file of rows to tune on: five usual forms, read strictly. Every error names the file, the line and what was
expected there.

    messages            {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    ShareGPT            {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    alpaca              {"instruction": ..., "input": ..., "output": ...}, where input may be missing
    prompt/completion   {"prompt": ..., "completion": ...}: two texts as they are, or two lists of messages
    text                {"text": ...}: every token counts
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..tables import quoted

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
            "model": "assistant", "chatgpt": "assistant", "tool": "tool", "function": "tool", "observation": "tool"}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # under which a turn's thinking part is passed
ONE_A_LINE = "expected one JSON object a line"


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        line: where it stands in its file, from 1.
        messages: the turns of a conversation, or None: then `prompt` and `text` stand as they are.
        first: the loss counts the assistant's turns from this one on.
        tools: what the template is told of tools, or None.
        prompt, text: the part that does not count and the part that does, of a row without messages.
    """

    line: int
    messages: tuple[dict, ...] | None = None
    first: int = 0
    tools: tuple[dict, ...] | None = None
    prompt: str = ""
    text: str = ""

    @property
    def trained(self) -> list[int]:
        """The turns whose tokens count."""
        return [i for i, turn in enumerate(self.messages or ()) if i >= self.first and turn["role"] == "assistant"
                and turn.get("weight", 1) != 0]


@dataclass(frozen=True)
class Rows:
    """What a file holds.

    Attributes:
        form: one of the five, by its name above. sha256: of the file's bytes.
    """

    path: Path
    form: str
    rows: tuple[Row, ...]
    sha256: str


class Wrong(Exception):
    """What is wrong with a row, before anyone knows its file and line."""


def read_rows(path: str | Path) -> Rows:
    """All rows of a .jsonl file, which are of one form. Empty lines are passed over.

    Raises:
        ValueError: one line, with the file, the number of the line and what was expected.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a .jsonl file")
    if not path.is_file():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.json*")], 1)
        raise ValueError(f"there is no {path}, expected a .jsonl file" + (f"; near: {near[0]}" if near else ""))
    digest, rows, form, start = hashlib.sha256(), [], None, 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if not (line := line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip():
                    continue
                values = parsed(line)
                found = form_of(values)
                if form not in (None, found):
                    raise Wrong(f"is of the form {found}, expected {form} as on line {start}: one form a file")
                form, start = found, start or number
                rows.append(FORMS[found][1](number, values))
    except Wrong as wrong:
        raise ValueError(f"{path}, line {number}: {wrong}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    if form is None:
        raise ValueError(f"{path}, line 1: the file is empty, {ONE_A_LINE}")
    return Rows(path, form, tuple(rows), digest.hexdigest())


def parsed(line: bytes) -> dict:
    """The object on one line."""
    if line[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in line[:100]:
        raise Wrong("is not UTF-8 (UTF-16, or no text at all), expected JSON in UTF-8")
    if line[:2] == b"\x1f\x8b" or line[:4] in (b"PK\3\4", b"PAR1"):
        raise Wrong("is of a compressed or parquet file, expected plain JSON, one object a line")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Wrong(f"is not UTF-8 at byte {error.start}, expected JSON in UTF-8") from None
    try:
        values = json.loads(text, object_pairs_hook=once, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        told = getattr(error, "msg", None) or "nested too deeply"
        if text.strip() in ("[", "{"):
            raise Wrong(f"is the beginning of a JSON file over several lines, {ONE_A_LINE}") from None
        raise Wrong(f"is no JSON ({told} at character {getattr(error, 'pos', 0) + 1}), {ONE_A_LINE}") from None
    if isinstance(values, list):
        raise Wrong(f"is a JSON list of {len(values)} entries, {ONE_A_LINE}")
    if not isinstance(values, dict):
        raise Wrong(f"is {quoted(values)}, {ONE_A_LINE}")
    if (surrogate := lone(text, values)) is not None:
        raise Wrong(f"holds half a character, {surrogate}, that no UTF-8 text has; expected whole characters")
    return values


def once(pairs: list[tuple[str, Any]]) -> dict:
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise Wrong(f"has the field {quoted(twice[0])} twice, expected each once")
    return dict(pairs)


def no_number(word: str) -> None:
    raise Wrong(f"holds {word}, which is no JSON, expected text or finite numbers")


def lone(text: str, values: dict) -> str | None:
    """An escape such as \\ud800 that stands for no character."""
    if "\\u" in text:
        try:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            return f"\\u{ord(error.object[error.start]):x}"
    return None


# ---------------------------------------------------------------- the forms


def form_of(values: dict) -> str:
    """The form of a row by its fields. "text" beside the fields of another form is taken for a copy of it."""
    whole = [form for form, (fields, _) in FORMS.items() if all(field in values for field in fields)]
    if len(whole) > 1 and whole[-1] == "text":
        whole.pop()
    if len(whole) > 1:
        raise Wrong(f"is of two forms, {whole[0]} and {whole[1]}; expected the fields of one")
    if whole:
        return whole[0]
    for form, (fields, _) in FORMS.items():
        if any(field in values for field in fields):
            lacking = next(field for field in fields if field not in values)
            raise Wrong(f"has {next(f for f in fields if f in values)} and lacks {lacking}, "
                        f"expected both: {' and '.join(fields)}")
    known = [field for fields, _ in FORMS.values() for field in fields]
    near = [match for field in values for match in get_close_matches(str(field), known, 1)]
    raise Wrong(f"has the fields {quoted(list(values)[:6])}, expected messages, conversations, instruction and output, "
                "prompt and completion, or text" + (f"; near: {near[0]}" if near else ""))


def from_messages(line: int, values: dict) -> Row:
    return Row(line, turns_of(values["messages"], "messages"), tools=tools_of(values))


def from_sharegpt(line: int, values: dict) -> Row:
    turns = values["conversations"]
    need_list(turns, "conversations")
    found = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise Wrong(f"conversations[{i}] is {quoted(turn)}, expected an object with from and value")
        if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT:
            raise Wrong(f"conversations[{i}] is from {quoted(turn['from'])}, expected one of {', '.join(SHAREGPT)}")
        found.append({"role": SHAREGPT[turn["from"]], "content": turn["value"]})
    if isinstance(values.get("system"), str) and values["system"] and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": values["system"]})
    return Row(line, turns_of(found, "conversations"), tools=tools_of(values))


def from_alpaca(line: int, values: dict) -> Row:
    instruction, output = (need_text(values[name], name) for name in ("instruction", "output"))
    more = values.get("input") or ""
    if not isinstance(more, str):
        raise Wrong(f"input is {quoted(more)}, expected text or nothing")
    asked = instruction + ("\n\n" + more) * bool(more.strip())
    system = values.get("system")
    first = [{"role": "system", "content": need_text(system, "system")}] if system else []
    return Row(line, (*first, {"role": "user", "content": asked}, {"role": "assistant", "content": output}))


def from_pair(line: int, values: dict) -> Row:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        need_list(prompt, "prompt")
        need_list(completion, "completion")
        return Row(line, turns_of([*prompt, *completion], "prompt and completion"), len(prompt), tools_of(values))
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            raise Wrong(f"{name} is {quoted(value)}, expected text, or a list of messages in both")
    return Row(line, prompt=prompt, text=need_text(completion, "completion"))


def from_text(line: int, values: dict) -> Row:
    return Row(line, text=need_text(values["text"], "text"))


# form -> its fields, and what makes a row of them. "text" last: others may have it beside their own
FORMS: dict[str, tuple[tuple[str, ...], Callable[[int, dict], Row]]] = {
    "messages": (("messages",), from_messages),
    "ShareGPT": (("conversations",), from_sharegpt),
    "alpaca": (("instruction", "output"), from_alpaca),
    "prompt/completion": (("prompt", "completion"), from_pair),
    "text": (("text",), from_text),
}


# ---------------------------------------------------------------- turns


def turns_of(turns: Any, where: str) -> tuple[dict, ...]:
    """The turns of a conversation, checked: a system turn first if at all, the assistant's last."""
    need_list(turns, where)
    found = tuple(turn_of(turn, f"{where}[{i}]") for i, turn in enumerate(turns))
    for i, turn in enumerate(found[1:], 1):
        if turn["role"] in ("system", "developer"):
            raise Wrong(f"{where}[{i}] is a {turn['role']} turn, expected one at the beginning at most")
    if not any(turn["role"] == "assistant" for turn in found):
        raise Wrong(f"{where} has no turn of the assistant, expected one: there is nothing to learn")
    if found[-1]["role"] != "assistant":
        raise Wrong(f"{where} ends with a turn of {found[-1]['role']}, expected the assistant's")
    return found


def turn_of(turn: Any, where: str) -> dict:
    if not isinstance(turn, dict):
        raise Wrong(f"{where} is {quoted(turn)}, expected an object with role and content")
    if "role" not in turn:
        raise Wrong(f"{where} lacks role, expected one of {', '.join(ROLES)}")
    if turn["role"] not in ROLES:
        near = get_close_matches(str(turn["role"]).lower(), (*ROLES, *SHAREGPT), 1)
        near = [SHAREGPT.get(name, name) for name in near]
        raise Wrong(f"{where} has the role {quoted(turn['role'])}, expected one of {', '.join(ROLES)}"
                    + (f"; near: {near[0]}" if near else ""))
    calls = turn.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise Wrong(f"{where} has tool_calls {quoted(calls)}, expected a list of objects")
    if calls and turn["role"] != "assistant":
        raise Wrong(f"{where} is a {turn['role']} turn with tool_calls, expected them in the assistant's turns")
    for name in THOUGHTS:
        if not isinstance(turn.get(name, ""), str):
            raise Wrong(f"{where} has {name} {quoted(turn[name])}, expected text")
    if turn.get("weight", 1) not in (0, 1):
        raise Wrong(f"{where} has weight {quoted(turn['weight'])}, expected 0 or 1")
    content = content_of(turn.get("content"), where, bool(calls))
    if turn["role"] == "assistant" and not content.strip() and not calls:
        raise Wrong(f"{where} is an empty turn of the assistant, expected text to learn")
    return turn | {"content": content}


def content_of(content: Any, where: str, may_lack: bool) -> str:
    """The text of a turn; a list of text parts is one text."""
    if content is None and may_lack:
        return ""
    if isinstance(content, list) and content:
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise Wrong(f"{where} has the part {quoted(part)}, expected parts of type text alone")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        lacks = content is None
        raise Wrong(f"{where} {'lacks content' if lacks else f'has the content {quoted(content)}'}, expected text")
    return content


def tools_of(values: dict) -> tuple[dict, ...] | None:
    tools = values.get("tools")
    if isinstance(tools, str):  # some files keep them as a text of JSON
        try:
            tools = json.loads(tools)
        except ValueError:
            raise Wrong(f"tools is {quoted(tools)}, expected a list of objects") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Wrong(f"tools is {quoted(tools)}, expected a list of objects")
    return tuple(tools) if tools else None


def need_list(value: Any, name: str) -> None:
    if not isinstance(value, list) or not value:
        raise Wrong(f"{name} is {quoted(value)}, expected a list of turns with at least one")


def need_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Wrong(f"{name} is {quoted(value)}, expected text")
    if not value.strip():
        raise Wrong(f"{name} is empty, expected text")
    return value
