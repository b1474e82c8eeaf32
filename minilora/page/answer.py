"""A question of the page, and its answer: the bill that ``minilora memory --json`` prints, and HTML that shows it."""

import json
from collections.abc import Mapping
from typing import Any

from ..memory.config_file import check_size
from ..refusals import REFUSED, refusal
from .asked import asked
from .options import CONFIG
from .parts import PARTS


def ask(question: object, budget: float = 0.1) -> dict[str, Any]:
    """The answer to ``{"state": {name: text}, "part": ..., "size": ...}``, or ``{"error": line}``.

    Args:
        question: anything. part: "bill" (the default) or another of `parts.PARTS`. size: the bytes of a config.json
            that was too large to be sent.
        budget: seconds after which a long part answers with what it has: "again" then asks for the same once more.
    """
    try:
        if not isinstance(question, Mapping) or not isinstance(state := question.get("state"), Mapping) or not all(
                isinstance(text, str) for pair in state.items() for text in pair):
            raise ValueError("expected a question with a state, an object whose values are strings")
        part, large = question.get("part", "bill"), question.get("size", 0)
        if not isinstance(part, str) or part not in PARTS:
            raise ValueError(f"no part {part!r}, expected one of {', '.join(PARTS)}")
        check_size(large if type(large) is int else 0, CONFIG)
        return PARTS[part](asked(tuple(sorted(state.items()))), budget)
    except REFUSED as error:
        return {"error": refusal("memory", error)}


def ask_json(question: str) -> str:
    """`ask`, in the browser."""
    return json.dumps(ask(json.loads(question)))
