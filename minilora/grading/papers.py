"""The submissions in a folder, read once before any of them runs, and what a teacher should look at in them."""

import ast
import importlib
import json
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..shipped import PACKAGE, shipped

LARGEST, CODE = 20 * 2**20, 300_000  # bytes of a notebook, characters of its code
OUTSIDE = {"open", "exec", "eval", "globals", "locals", "vars", "os", "sys", "gc", "inspect", "ctypes", "subprocess",
           "importlib", "pickle", "signal", "threading", "__import__", "__builtins__"}


@dataclass
class Paper:
    """One submitted notebook: whose it is, where it lay, which notebook it is, its code cells, and what is odd."""

    student: str
    name: str
    number: str = ""
    cells: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    problem: str = ""
    answers: dict[str, str] = field(default_factory=dict)


def read(path: Path) -> list[str]:
    """The code cells of a notebook.

    Raises:
        ValueError: it is none.
    """
    return sources(code_cells(path))


def sources(cells: list[dict]) -> list[str]:
    return ["".join(cell["source"]) for cell in cells]


def code_cells(path: Path) -> list[dict]:
    try:
        # no link is followed, and a pipe is not waited for
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("it is no plain file")
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"it has more than {LARGEST >> 20} MiB")
        cells = [cell for cell in json.loads(data.decode("utf-8"))["cells"] if cell["cell_type"] == "code"]
        if sum(map(len, sources(cells))) > CODE:
            raise ValueError(f"it has more than {CODE:,} characters of code")
        return [cell | {"metadata": dict(cell.get("metadata") or {})} for cell in cells]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a notebook that can be read: {type(error).__name__}: {error}") from None


@cache
def exercises_of(number: str) -> dict:
    """Name -> checker of notebook `number`; empty if there is no such notebook."""
    from ..check import Exercise

    if not (PACKAGE / "check" / f"nb{number}.py").is_file():
        return {}
    module = importlib.import_module(f"minilora.check.nb{number}")
    return {name: value for name, value in vars(module).items() if isinstance(value, Exercise)}


@cache
def numbers() -> list[str]:
    return sorted(path.stem[2:] for path in (PACKAGE / "check").glob("nb*.py"))


@cache
def published() -> dict[str, Path]:
    """Number -> the solved notebook."""
    return {path.name[:2]: path for path in sorted(shipped("notebooks").glob("[0-9][0-9]_*.ipynb"))}


# ---------------------------------------------------------------- collecting


def collect(folder: Path) -> list[Paper]:
    """Every notebook under `folder`; its student is the first folder on the way, or else the file."""
    found = [look_at(path, path.relative_to(folder).parts) for path in notebooks(folder)]
    answered: dict[tuple, list[Paper]] = {}
    for paper in found:
        if paper.answers:
            answered.setdefault((paper.number, *sorted(paper.answers.items())), []).append(paper)
    for (number, *answers), papers in answered.items():
        if dict(answers) == published_answers(number):
            for paper in papers:
                paper.flags.append("the same code as the published solution")
        for paper in papers:
            others = [f"{other.student}/{other.name}" for other in papers if other is not paper]
            if others:
                paper.flags.append(f"the same code as {', '.join(others[:3])}{' and others' * (len(others) > 3)}")
    return found


def notebooks(folder: Path) -> Iterator[Path]:
    """Notebooks, and links of any kind, which are not followed."""
    for place, folders, files in os.walk(folder, onerror=unread, followlinks=False):
        folders[:] = sorted(f for f in folders if f != ".ipynb_checkpoints")
        here = Path(place)
        yield from (here / f for f in folders if (here / f).is_symlink())
        yield from (here / f for f in sorted(files) if f.endswith(".ipynb"))


def unread(error: OSError) -> None:
    print(f"cannot read {error.filename!r}: {error.strerror}", file=sys.stderr)


def look_at(path: Path, parts: tuple[str, ...]) -> Paper:
    folder = path.is_symlink() and path.suffix != ".ipynb"
    paper = Paper(parts[0] if len(parts) > 1 or folder else path.stem, "/".join(parts[1:]) or parts[0])
    if path.is_symlink():
        paper.problem = f"a symbolic link, to {os.readlink(path)}: links are not graded"
        paper.flags.append("a symbolic link")
    try:
        cells = [] if paper.problem else code_cells(path)
    except ValueError as error:
        cells, paper.problem = [], str(error)
    paper.cells = sources(cells)
    trees = [parsed(source) for source in paper.cells]
    defined = Counter(node.name for tree in trees for node in tree.body
                      if isinstance(node, ast.FunctionDef | ast.ClassDef))
    paper.number = number_of(path.name, set(defined), paper)
    if not paper.problem and exercises_of(paper.number):
        look_closer(paper, trees, defined, cells)
    return paper


def number_of(name: str, defined: set[str], paper: Paper) -> str:
    """The notebook that a file's name begins with, or, where its cells are another's, that one."""
    by_name = name[:2]
    scores = {number: len(defined & set(exercises_of(number))) for number in numbers()}
    best = max(scores, key=scores.get)
    number = by_name if scores.get(by_name) or not scores[best] else best
    official = published().get(number)
    if number != by_name:
        paper.flags.append(f"renamed: its cells are those of notebook {number}")
    elif official and official.name != name and number in scores:
        paper.flags.append(f"renamed: the released file is {official.name}")
    return number


# ---------------------------------------------------------------- what to look at


def look_closer(paper: Paper, trees: list[ast.Module], defined: Counter, cells: list[dict]) -> None:
    names = list(exercises_of(paper.number))
    paper.flags += [f"{name} stands in {defined[name]} cells: the last one counts" for name in names
                    if defined[name] > 1]
    if missing := [name for name in names if not defined[name]]:
        paper.flags.append(f"no cell defines {', '.join(missing)}")
    marks = Counter(str(grading.get("grade_id")) for cell in cells
                    if isinstance(grading := cell["metadata"].get("nbgrader"), dict))
    paper.flags += [f"cell {mark} stands {n} times" for mark, n in marks.items() if n > 1]
    if marks and (lost := sorted(marks_of(paper.number) - set(marks))):
        paper.flags.append(f"cells missing: {', '.join(lost)}")
    paper.answers = answers_in(trees, names)
    nodes, taken = {getattr(n, "name", None): n for tree in trees for n in tree.body}, imported(trees)
    for name in (name for name in names if name in nodes):
        parts = [part for node in reached(name, nodes) for part in ast.walk(node)]
        used = {n.id for n in parts if isinstance(n, ast.Name)}
        used |= {alias.asname or alias.name for n in parts if isinstance(n, ast.Import | ast.ImportFrom)
                 for alias in n.names}
        if library := sorted(taken[name] for name in used & taken.keys()):
            paper.flags.append(f"{name} uses {', '.join(library)}")
        if outside := sorted(used & OUTSIDE | {n.attr for n in parts if isinstance(n, ast.Attribute)
                                               and n.attr.startswith("__") and n.attr != "__init__"}):
            paper.flags.append(f"{name} reaches outside of its arguments: {', '.join(outside)}")


def reached(name: str, nodes: dict[str, ast.AST]) -> list[ast.AST]:
    """The definition of `name` and those that it uses, as far as the names tell."""
    found, names = [], [name]
    while names:
        if (node := nodes.get(names.pop())) and node not in found:
            found.append(node)
            names += [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    return found


def parsed(source: str) -> ast.Module:
    """A cell's syntax tree, without its magics; empty if it is broken."""
    lines = ("" if line.lstrip().startswith(("%", "!")) else line for line in source.split("\n"))
    try:
        tree = ast.parse("\n".join(lines))
        ast.dump(tree)  # too deep for this is too deep for what follows
        return tree
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def answers_in(trees: list[ast.Module], names: list[str]) -> dict[str, str]:
    """Exercise -> its code without docstrings and comments; empty if nothing is written yet."""
    found = {}
    for node in (n for tree in trees for n in tree.body if getattr(n, "name", None) in names):
        for part in ast.walk(node):
            if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part) is not None:
                part.body = part.body[1:]
        found[node.name] = ast.dump(node)
    return found if any("NotImplementedError" not in code for code in found.values()) else {}


def imported(trees: list[ast.AST]) -> dict[str, str]:
    """Name -> what it is, of all that is imported from minilora."""
    nodes = [n for tree in trees for n in ast.walk(tree)]
    names = {alias.asname or alias.name: f"{n.module}.{alias.name}" for n in nodes if isinstance(n, ast.ImportFrom)
             for alias in n.names if (n.module or "").partition(".")[0] == PACKAGE.name}
    return names | {(alias.asname or alias.name.partition(".")[0]): alias.name for n in nodes
                    if isinstance(n, ast.Import) for alias in n.names if alias.name.partition(".")[0] == PACKAGE.name}


@cache
def marks_of(number: str) -> set[str]:
    path = published().get(number)
    cells = code_cells(path) if path else []
    return {cell["metadata"]["nbgrader"]["grade_id"] for cell in cells if "nbgrader" in cell["metadata"]}


@cache
def published_answers(number: str) -> dict[str, str]:
    path = published().get(number)
    return answers_in([parsed(source) for source in read(path)], list(exercises_of(number))) if path else {}
