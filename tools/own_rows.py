"""Writes data/own/, the rows of notebook 15, from the help desk's files: ``python tools/own_rows.py``.

tickets.jsonl: a hundred conversations to tune on. answers.jsonl: forty that the base can answer, to see what is
forgotten.
"""

import json
import re

from minilora.helpdesk import DATA, load_task

PROMPT = re.compile(r"(?:<system> (.*) )?<customer> (.*) <agent>")


def conversation(example) -> dict:
    """A prompt of the help desk's and its reply, as messages."""
    system, message = PROMPT.fullmatch(example.prompt).groups()
    turns = [("system", system)] * bool(system) + [("user", message), ("assistant", example.reply)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


if __name__ == "__main__":
    folder = DATA / "own"
    folder.mkdir(exist_ok=True)
    for name, examples in (("tickets", load_task("ticket").train[:100]), ("answers", load_task("general").test[:40])):
        lines = [json.dumps(conversation(example)) for example in examples]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{len(lines)} rows in {folder / name}.jsonl")
