"""The help-desk world's tokenizer: one token for each known word, digit or sign."""

import difflib
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ..config import require
from ..shipped import DATA


class Tokenizer:
    """One token for each known word, digit or sign; an id is a place in `words`.

    >>> tokenizer.encode("order k48 is late .")       # order | k | 4 | 8 | is | late | .
    """

    PIECES = re.compile(r"<[a-z]+>|[a-z]+|[0-9]|[^\sa-z0-9]")

    def __init__(self, words: list[str]):
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.pad, self.end = self.ids["<pad>"], self.ids["<end>"]

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; capitals count as small letters.

        Raises:
            ValueError: a word or character outside the vocabulary, with the nearest known words.
        """
        pieces = self.PIECES.findall(text.lower())
        if unknown := [piece for piece in pieces if piece not in self.ids]:
            piece = min(unknown, key=str.isascii)  # of the parts of "spät", the letter that split it
            kind = "word" if piece.isalpha() and piece.isascii() else "character"
            near = difflib.get_close_matches(piece, self.words, n=3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ValueError(f"unknown {kind} {piece!r}, expected one of the {len(self)} known tokens{hint}")
        return [self.ids[piece] for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: digits are joined to each other and to the single letter of a code before them."""
        out = ""
        for word in (self.words[i] for i in ids):
            joined = word.isdigit() and re.search(r"([0-9]|(^| )[b-hj-z])$", out)
            out += word if joined or not out else " " + word
        return out

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.words, indent=0) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, or one that does not hold a list of words with <pad> and <end>, each once.
        """
        try:
            words = json.loads(path.read_text())
            sound = {"<pad>", "<end>"} <= set(words) and len(set(words)) == len(words) and "" not in words
        except (ValueError, OSError, TypeError, RecursionError) as e:
            raise ValueError(f"{path} is missing, damaged or no tokenizer: {e}") from None
        require(sound and isinstance(words, list) and all(isinstance(word, str) for word in words),
             f"{path} must hold a list of words with <pad> and <end>, each once", words)
        return cls(words)


@cache
def tokenizer() -> Tokenizer:
    """The tokenizer that every model of this world shares (data/base/tokenizer.json)."""
    return Tokenizer.load(DATA / "base" / "tokenizer.json")
