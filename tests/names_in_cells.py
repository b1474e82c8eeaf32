"""Names in a notebook's cells: which of them mean one thing to the cell that reads them and are given another meaning
by a later cell, so that running the first cell again gives another result."""

import ast

SCOPES = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.FunctionDef)


class Cell(ast.NodeVisitor):
    """The names that a cell reads from cells before it, and those that it writes."""

    def __init__(self, source: str):
        self.reads: set[str] = set()
        self.writes: set[str] = set()
        self.own: list[set[str]] = []  # of the functions and comprehensions around
        lines = (line for line in source.splitlines() if not line.startswith(("%", "!")))
        self.visit(ast.parse("\n".join(lines)))

    def visit(self, node):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not self.own:
            self.writes.add(node.name)
        if isinstance(node, SCOPES):
            inside = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            self.own.append(inside | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)})
            self.generic_visit(node)
            self.own.pop()
        else:
            super().visit(node)

    def visit_Assign(self, node):
        self.visit(node.value)  # read before the target is written
        for target in node.targets:
            self.visit(target)

    def visit_For(self, node):
        for part in (node.iter, node.target, *node.body, *node.orelse):
            self.visit(part)

    def visit_AugAssign(self, node):
        self.visit(node.value)
        if isinstance(node.target, ast.Name) and node.target.id not in self.writes:
            self.reads.add(node.target.id)
        self.visit(node.target)

    def visit_Name(self, node):
        if any(node.id in names for names in self.own):
            return
        if isinstance(node.ctx, ast.Store):
            self.writes.add(node.id)
        elif node.id not in self.writes:
            self.reads.add(node.id)


def overwritten(sources: list[str]) -> list[str]:
    """Each name that a cell reads, that came from a cell before, and that a later cell writes anew."""
    cells = [Cell(source) for source in sources]
    return [f"{name}, read in cell {at}, is another thing after cell {later}"
            for at, cell in enumerate(cells, 1) for name in sorted(cell.reads)
            if any(name in c.writes for c in cells[:at - 1])
            for later in [next((n for n, c in enumerate(cells[at:], at + 1) if name in c.writes), 0)] if later]
