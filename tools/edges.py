"""Which printed numbers stand near a rounding edge? For authors, before a notebook is committed.

    python tools/edges.py [NOTEBOOK ...] [--within 0.05]        default: all of notebooks/, some minutes

0.2349 in two digits is 0.23 here, and 0.24 on a CPU that sums in another order: a test that fails by luck. Each
notebook is executed twice, the second time with torch's plain kernels, and every formatted value of its f-strings
(`{loss:.2f}`) is held up to its edge. Listed is what lies within so many units of its last printed digit (0.05 by
default) and is not the same in both runs, to the last bit; print fewer digits of it, or a comparison. Whole numbers and
what the package formats are not looked at. Exit code 1 if anything is listed.
"""

import argparse
import ast
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
SPEC = re.compile(r"[<>=^+ ]*\d*,?\.(?P<digits>\d+)(?P<kind>[fFeEgG%])")


def room(value: float, spec: str) -> float | None:
    """How far a value is from where its text changes, in units of the last digit: 0 to 0.5, None for other values."""
    found = SPEC.fullmatch(spec)
    if not found or not isinstance(value, float) or value != value or abs(value) == float("inf"):
        return None
    digits, kind = int(found["digits"]), found["kind"].lower()
    exponent = int(f"{value:.{max(digits - 1, 0)}e}".partition("e")[2])  # of the rounded value, as %g counts
    last = {"f": -digits, "%": -digits - 2, "e": exponent - digits, "g": exponent - max(digits, 1) + 1}[kind]
    return abs(abs(value) / 10.0**last % 1 - 0.5)


class Watched(ast.NodeTransformer):
    """Hands the value of each `{value:spec}` to `__edge__` on its way into the text."""

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.FormattedValue:
        self.generic_visit(node)
        parts = node.format_spec.values if node.format_spec else []
        if len(parts) == 1 and isinstance(parts[0], ast.Constant):
            what = ast.Constant(ast.unparse(node.value))
            node.value = ast.Call(ast.Name("__edge__", ast.Load()), [node.value, parts[0], what], [])
        return node


def watched(source: str) -> str:
    return ast.unparse(ast.fix_missing_locations(Watched().visit(ast.parse(source))))


PROLOGUE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from edges import room as __room__
sys.path.pop(0)
__near__ = []
def __edge__(value, spec, what):
    number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if (distance := __room__(number, spec)) is not None:
        __near__.append((distance, f"{{what}} = {{number!r}} printed as {{number:{{spec}}}}"))
    return value
"""


def printed(path: Path, **settings: str) -> list[tuple[str, float, str]]:
    """(cell, room, text) of each formatted value of a notebook, executed with these environment variables."""
    book = nbformat.read(path, as_version=4)
    for number, cell in enumerate(c for c in book.cells if c.cell_type == "code"):
        said = f"for __d, __t in __near__:\n    print('EDGE', {number + 1}, round(__d, 3), __t)"
        cell.source = f"{PROLOGUE * (number == 0)}\n{watched(cell.source)}\n{said}\n__near__.clear()"
    client = NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=os.environ | settings)
    text = "".join(o.get("text", "") for c in book.cells if c.cell_type == "code" for o in c.outputs)
    return [(where, float(distance), what)
            for where, distance, what in re.findall(r"^EDGE (\d+) (\S+) (.+)$", text, re.MULTILINE)]


def near_edges(path: Path, within: float) -> list[str]:
    """One line for each value that a notebook prints near its edge, unless another CPU would print the very same."""
    here, there = printed(path), printed(path, ATEN_CPU_CAPABILITY="default")
    if [where for where, *_ in here] != [where for where, *_ in there]:
        return [f"{path.name[:2]}: with torch's plain kernels other cells print other numbers of values"]
    return [f"{path.name[:2]} [{where}] {distance:.3f}: {what}"
            for (where, distance, what), other in zip(here, there) if distance < within and what != other[2]]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    parser.add_argument("--within", type=float, default=0.05)
    options = parser.parse_args(arguments)
    found = 0
    for path in options.notebooks:
        lines = near_edges(path, options.within)
        found += len(lines)
        print(*(lines or [f"{path.name[:2]} nothing"]), sep="\n", flush=True)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
