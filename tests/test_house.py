"""The shape of the house: rooms in the order of the lesson, each importing only those above it, and no long files."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "minilora"
FILES = sorted(HOUSE.rglob("*.py"))
# From the top floor down: a room may import those before it. A new room gets its place here.
ORDER = ("__init__ tables refusals shipped plots patterns config distributed bases layers variants naming trained_copy "
         "parameters beside planning injection checkpoints pair hub_names fingerprints peft_format adapters "
         "single_file spectrum bank adapter_tools extract quant llama_config rotary fast_decode llama weight_store "
         "losses stream peft_methods train helpdesk memory stream_run tuning experiments grading check grade "
         "release page cli __main__ nbgrader_config").split()
# who grades reads in a student's process what a checker says: two rooms of one floor
NEIGHBOURS = {"grading": {"check"}}
LIMIT = 400


def module(path: Path) -> str:
    """minilora/memory/__init__.py -> "memory"; minilora/__init__.py -> "__init__"."""
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every statement, those inside functions too, but for what only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from statements(node)


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, at any place in it."""
    package = ("minilora", *path.relative_to(HOUSE).parts[:-1])
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {known(name) for name in names if name.split(".")[0] == "minilora"}
    return found - {module(path)}


def known(name: str) -> str:
    """The module that ``minilora.a.b`` is, or that b is a name of."""
    inside = name.removeprefix("minilora").removeprefix(".")
    while inside and inside not in MODULES:
        inside = inside.rpartition(".")[0]
    return inside or "__init__"


GRAPH = {name: imported(path) for name, path in MODULES.items()}


def test_the_imports_are_read():
    assert {"config", "layers"} <= GRAPH["injection"]
    assert "plots" in GRAPH["adapter_tools"]  # within a function
    assert "memory.bill" not in GRAPH["plots"]  # for a type checker alone


@pytest.mark.parametrize("name", MODULES)
def test_a_room_imports_only_rooms_above_it(name):
    room = name.split(".")[0]
    assert room in ORDER, f"{room} has no place yet in the order of {Path(__file__).name}"
    above = {*ORDER[:ORDER.index(room) + 1], *NEIGHBOURS.get(room, ())}
    below = sorted(other for other in GRAPH[name] if other.split(".")[0] not in above)
    assert not below, f"{name} imports from below: {', '.join(below)}"


def test_no_circle_of_imports():
    try:
        order = list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")
    assert len(order) == len(MODULES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_no_file_is_long(path):
    assert path.read_text(encoding="utf-8").count("\n") <= LIMIT
