"""What Python in WebAssembly says of states of the page, as node runs it, against the command line here."""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import page_site
import page_states

NODE, PYODIDE = shutil.which("node"), Path(__file__).parents[1] / "node_modules" / "pyodide"


def in_pyodide(states: list[dict[str, str]]) -> list[dict]:
    """What the page's Python says of each."""
    with tempfile.TemporaryDirectory() as folder:
        code, asked = Path(folder) / "minilora.zip", Path(folder) / "states"
        code.write_bytes(page_site.package())
        asked.write_text("\n".join(map(json.dumps, states)))  # a pipe of so many is not read whole
        done = subprocess.run([NODE, Path(__file__).with_suffix(".mjs"), PYODIDE, code, asked], capture_output=True,
                              text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def differences(states: list[dict[str, str]]) -> list[dict[str, str]]:
    """The states of which the two do not say the same."""
    lines = [page_states.command_line(page_states.words(state)) for state in states]
    expected = [{"error": line} if isinstance(line, str) else line for line in lines]
    return [state for state, here, there in zip(states, expected, in_pyodide(states), strict=True) if here != there]
