"""A conversation as tokens, and which of them the loss counts: those that the model itself must write.

The tokenizer's chat template writes all turns as one text. Of it we count what stands between the prompt for a turn of
the assistant and the end of that turn: its thoughts, its words, its calls of tools, and the mark that ends it, but not
the header before it and no line end after it. A template that says so itself (``{% generation %}``) is believed. For
any other the places are found by rendering the conversation again with other words in one turn: what stays is the
template's, what changes is the turn's. Both agree with TRL's assistant-only loss.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..tables import quoted
from .data import Row

MARK = "qzxmarkxzq"  # a word that no conversation holds
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """One row as tokens.

    ids: of the whole text. trained: for each, whether the model must learn to write it. line: in the file.
    """

    line: int
    ids: tuple[int, ...]
    trained: tuple[bool, ...]


class Chat:
    """A tokenizer with its chat template, which it may lack where no row is a conversation.

    Raises:
        ValueError: a tokenizer that cannot say where its tokens stand in the text.
    """

    def __init__(self, tokenizer: Any, template: str | None = None):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} does not say where a token stands in the text; expected a "
                             "fast tokenizer (one with a tokenizer.json)")
        self.tokenizer = tokenizer
        self.template = template or tokenizer.chat_template
        if isinstance(self.template, dict):  # several under names
            self.template = self.template.get("default") or next(iter(self.template.values()))

    def encode(self, row: Row) -> Encoded:
        """A row as tokens; a text that stands for itself ends in the tokenizer's end-of-text token.

        Raises:
            ValueError: a text that holds one of the tokenizer's special tokens, a turn that the template cannot write,
                or one whose place in the text cannot be found.
        """
        for text in texts_of(row) if row.messages else ():
            if held := next((token for token in self.specials if token in text), None):
                raise ValueError(f"the text holds {quoted(held)}, a special token of this tokenizer; expected words "
                                 "alone: in a user's text it would end the turn")
        if row.messages is None:
            end = self.tokenizer.eos_token or ""
            return self.tokens(row.line, row.prompt + row.text + end, [(len(row.prompt), None)], True)
        if self.template is None:
            raise ValueError("the tokenizer has no chat template, and the row is a conversation; expected a tokenizer "
                             "with one, a template of your own (--template FILE), or rows of prompt and completion")
        if self.says_it_itself:
            return self.by_generation(row)
        self.check_roles()
        text = self.render(row.messages, row.tools)
        return self.tokens(row.line, text, [self.place(row, text, i) for i in row.trained], False)

    def tokens(self, line: int, text: str, places: list[tuple[int, int | None]], special: bool) -> Encoded:
        """The tokens of a text, those marked that overlap one of `places`; `special`: with those that begin a text."""
        try:
            out = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        except Exception as error:  # the library's own, of a word that a word-level vocabulary lacks
            raise ValueError(f"the tokenizer cannot write this text: {error}") from None
        places = [(start, len(text) if end is None else end) for start, end in places]
        starts, trained = [start for start, _ in places], []
        for start, end in out["offset_mapping"]:
            i = bisect_right(starts, max(start, end - 1)) - 1  # the last place that begins before the token ends
            trained.append(start < end and i >= 0 and start < places[i][1])
        return Encoded(line, tuple(out["input_ids"]), tuple(trained))

    @property
    def says_it_itself(self) -> bool:
        return self.template is not None and bool(GENERATION.search(self.template))

    def by_generation(self, row: Row) -> Encoded:
        """By the marks in the template, as transformers reads them; a turn that must not count is taken out."""
        out = self.apply(row.messages, row.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        trained = list(map(bool, out["assistant_masks"]))
        turns = [i for i, turn in enumerate(row.messages or ()) if turn["role"] == "assistant"]
        if len(turns) > len(row.trained):
            blocks = [i for i, on in enumerate(trained) if on and not (i and trained[i - 1])]
            if len(blocks) != len(turns):
                raise ValueError("some turns of the assistant do not count, and the template's generation marks do not "
                                 "part them")
            for turn, start in zip(turns, blocks):
                stop = start
                while stop < len(trained) and trained[stop]:
                    trained[stop] = turn in row.trained
                    stop += 1
        return Encoded(row.line, tuple(out["input_ids"]), tuple(trained))

    # ------------------------------------------------------------ rendering

    def apply(self, messages, tools=None, **how) -> Any:
        turns = [{key: value for key, value in turn.items() if key != "weight"} for turn in messages]
        try:
            return self.tokenizer.apply_chat_template(turns, list(tools) if tools else None,
                                                      chat_template=self.template, **how)
        except Exception as error:  # jinja's, and what a template raises by itself
            raise ValueError(f"the chat template cannot write this conversation: {error}") from None

    def render(self, messages, tools=None, prompt: bool = False) -> str:
        """The text of a conversation; `prompt`: and of the header that asks the assistant to go on."""
        return self.apply(messages, tools, tokenize=False, add_generation_prompt=prompt)

    @cached_property
    def specials(self) -> list[str]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        marks = {str(token) for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        return sorted((mark for mark in marks if len(mark) > 2), key=len, reverse=True)

    # ------------------------------------------------------------ where a turn stands

    def place(self, row: Row, text: str, i: int) -> tuple[int, int]:
        """Where turn `i` stands in the text: from after its header to after the mark that ends it."""
        left, right = self.words_of(row, text, i)
        start = self.start(row, text, i, left)
        limit = len(text)
        if i + 1 < len(row.messages):
            limit = self.words_of(row, text, i + 1)[0]
        found = text.find(self.stop, right, limit) if self.stop else -1
        return start, right if found < 0 else found + len(self.stop)

    def words_of(self, row: Row, text: str, i: int) -> tuple[int, int]:
        """Where the words of turn `i` stand, with its calls of tools: what changes with them."""
        turn = row.messages[i]
        other = {key: value for key, value in turn.items() if key != "tool_calls"} | {"content": MARK}
        other = self.render([*row.messages[:i], other, *row.messages[i + 1:]], row.tools)
        left = other.find(MARK)
        if left < 0:
            raise ValueError(f"the chat template leaves out turn {i} ({turn['role']})")
        rest = len(other) - left - len(MARK)
        if text[:left] != other[:left] or other[len(other) - rest:] != text[len(text) - rest:]:
            raise ValueError(f"the chat template writes other turns otherwise when the words of turn {i} "
                             f"({turn['role']}) change, so the turn's place cannot be found; expected a template with "
                             "{% generation %} around what the assistant writes")
        return left, len(text) - rest

    def start(self, row: Row, text: str, i: int, words: int) -> int:
        """Where what the assistant writes begins: after the header of turn `i`."""
        try:
            before = self.render(row.messages[:i], row.tools, prompt=True) if i else ""
        except ValueError:  # a conversation that the template does not end there
            before = ""
        if before and text.startswith(before) and len(before) <= words:
            return len(before)
        at = text.rfind(self.header, 0, words) if self.header else -1
        return at + len(self.header) if at >= 0 else words

    @cached_property
    def probe(self) -> tuple[str, str, str]:
        """What the template writes between a user's words and the assistant's, between the assistant's and the
        user's, and after the assistant's last."""
        words = [f"{MARK}{i}x" for i in range(4)]
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, words)]
        text = self.render(turns)
        ends = [(text.find(word), text.find(word) + len(word)) for word in words]
        if any(start < 0 for start, _ in ends) or ends != sorted(ends):
            raise ValueError("the chat template leaves out what the user or the assistant says, or changes it")
        asked, answered = text[ends[0][1]:ends[1][0]], text[ends[1][1]:ends[2][0]]
        return asked, answered, text[ends[3][1]:]

    def check_roles(self) -> None:
        """Raise a ValueError if nothing in the text says whose turn it is."""
        asked, answered, _ = self.probe
        if not asked or asked == answered:
            raise ValueError(f"the chat template does not tell roles apart: it writes {quoted(asked)} before the "
                             f"assistant's words and {quoted(answered)} before the user's, so the model could not know "
                             "whose turn it is; expected another mark before each")

    @cached_property
    def header(self) -> str:
        """What asks the assistant to go on, by itself."""
        turn = [{"role": "user", "content": MARK}]
        without, asked = self.render(turn), self.render(turn, prompt=True)
        return asked[len(without):] if asked.startswith(without) else ""

    @cached_property
    def stop(self) -> str:
        """The mark that ends a turn of the assistant: up to its first special token, or, in a template of plain text,
        what follows the words; empty if nothing does."""
        tail = self.probe[2]
        ends = [tail.index(token) + len(token) for token in self.specials if token in tail]
        return tail[:min(ends)] if ends else tail.strip() or tail


def texts_of(row: Row):
    """All that people wrote in a conversation."""
    for turn in row.messages or ():
        yield from (value for value in turn.values() if isinstance(value, str))


def shown(tokenizer: Any, row: Encoded, most: int = 600) -> str:
    """The text of a row with what counts between 【 and 】, on one line."""
    out, ids, on = "", [], False
    for token, counts in [*zip(row.ids, row.trained), (None, not row.trained[-1])]:
        if counts != on or token is None:
            piece = tokenizer.decode(ids).replace("\n", "⏎") if ids else ""
            out, ids, on = out + (f"【{piece}】" if on else piece), [], counts
        if token is not None:
            ids.append(token)
    return out if len(out) <= most else f"{out[:most * 2 // 3]} ... {out[-most // 3:]}"
