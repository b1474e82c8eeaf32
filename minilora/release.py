"""Writes the student version of the notebooks: ``python -m minilora.release [--overwrite] [notebooks [release]]``.

Without folders, those of this course go to release/ in the folder you are in; an installed package brings them along.

What stands between ``### BEGIN SOLUTION`` and ``### END SOLUTION`` becomes nbgrader's own stub. Outputs go, since they
answer the predictions. Hints and nbgrader's metadata stay, so nbgrader can grade what comes back. A file that is there
and differs is somebody's work and is kept, unless --overwrite says otherwise.
"""

import json
import re
import sys
from pathlib import Path

from .shipped import shipped

REGION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n(?:(?!.*### BEGIN SOLUTION).*\n)*?[ \t]*### END SOLUTION[ \t]*$",
                    re.MULTILINE)
# what a student finds in the place of a solution: nbgrader's own text, word for word
STUB = r"\1# YOUR CODE HERE\n\1raise NotImplementedError()"


def strip(notebook: dict) -> dict:
    """The student version of a notebook, given and returned as parsed JSON.

    Raises:
        ValueError: a solution cell without a marked region, a mark without its partner or outside a solution cell.
    """
    return notebook | {"cells": [strip_cell(cell) for cell in notebook["cells"]]}


def strip_cell(cell: dict) -> dict:
    grading = cell["metadata"].get("nbgrader", {})
    source = "".join(cell["source"])
    stripped, regions = REGION.subn(STUB, source)
    broken = "### BEGIN SOLUTION" in stripped or "### END SOLUTION" in stripped
    if broken or bool(regions) != bool(grading.get("solution")):
        raise ValueError(f"cell {cell.get('id')!r} must be marked as a solution in its metadata and hold whole regions "
                         f"from ### BEGIN SOLUTION to ### END SOLUTION, or neither: {source[:80]!r}")
    if cell["cell_type"] == "code":
        cell = cell | {"outputs": [], "execution_count": None}
    return cell | {"source": stripped.splitlines(keepends=True)}


def release(source: Path, target: Path, overwrite: bool = False) -> tuple[list[Path], list[Path]]:
    """Writes the student version of every notebook in folder `source` to folder `target`.

    Returns the files that are there now as released, and those that were there otherwise and were kept.

    Raises:
        ValueError: no notebooks in `source`, the folders are one, or a notebook's marks are wrong; nothing is written.
    """
    notebooks = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(source.glob("*.ipynb"))}
    if not notebooks:
        raise ValueError(f"no notebooks in {source}")
    if source.resolve() == target.resolve():
        raise ValueError(f"{target} holds the solved notebooks: choose another folder for the student version")
    students = {}
    for path, notebook in notebooks.items():
        try:
            students[target / path.name] = strip(notebook)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
    target.mkdir(parents=True, exist_ok=True)
    kept = []
    for path, notebook in students.items():
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        if not overwrite and path.exists() and path.read_text(encoding="utf-8") != text:
            kept.append(path)
        else:
            path.write_text(text, encoding="utf-8")
    return [path for path in students if path not in kept], kept


def main(arguments: list[str]) -> int:
    folders = [argument for argument in arguments if argument != "--overwrite"]
    if len(folders) > 2 or any(folder.startswith("-") for folder in folders):
        print("expected --overwrite or not, and at most two folders: the notebooks' and the student version's",
              file=sys.stderr)
        return 2
    source, target = folders + [shipped("notebooks"), "release"][len(folders):]
    try:
        files, kept = release(Path(source), Path(target), "--overwrite" in arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(files)} student notebooks in {target}")
    if kept:
        print(f"kept {len(kept)} more that have been worked on, {kept[0]} first; --overwrite writes them anew")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
