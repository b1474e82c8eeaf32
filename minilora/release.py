"""Writes the student version of the notebooks: ``python -m minilora.release [--overwrite] [notebooks [release]]``.

Without folders, those of this course go to release/ in the folder you are in; an installed package brings them along.

What stands between ``### BEGIN SOLUTION`` and ``### END SOLUTION`` becomes nbgrader's own stub. Outputs go, since they
answer the predictions. Hints and nbgrader's metadata stay, so nbgrader can grade what comes back. A file that is there
and differs is somebody's work and is kept, unless --overwrite says otherwise. Each file is written whole or not at all.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .shipped import shipped

REGION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n(?:(?!.*### BEGIN SOLUTION).*\n)*?[ \t]*### END SOLUTION[ \t]*$",
                    re.MULTILINE)
# what a student finds in the place of a solution: nbgrader's own text, word for word
STUB = r"\1# YOUR CODE HERE\n\1raise NotImplementedError()"


class Released(NamedTuple):
    """The files that are there now as released; those that differ and were kept; a line about each
    notebook that could not be read or written."""

    written: list[Path]
    kept: list[Path]
    problems: list[str]


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


def read_notebook(path: Path) -> dict:
    """Raises:
        ValueError: it cannot be read, or is no notebook.
    """
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            _ = "".join(cell["source"]), cell["metadata"].get("nbgrader"), cell["cell_type"]
        return notebook
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path.name} is no notebook") from None


def release(source: Path, target: Path, overwrite: bool = False) -> Released:
    """Writes the student version of every notebook in folder `source` to folder `target`. A notebook that cannot be
    read, or written, is a problem of its own: the others are released.

    Raises:
        ValueError: no notebooks in `source`, the folders are one, `target` cannot be made, or a notebook's marks are
            wrong, so that a solution could get out; nothing is written.
    """
    paths = sorted(source.glob("*.ipynb"))
    if not paths:
        raise ValueError(f"no notebooks in {source}")
    if source.resolve() == target.resolve():
        raise ValueError(f"{target} holds the solved notebooks: choose another folder for the student version")
    done, texts = Released([], [], []), {}
    for path in paths:
        try:
            notebook = read_notebook(path)
        except ValueError as error:
            done.problems.append(str(error))
            continue
        try:
            texts[target / path.name] = json.dumps(strip(notebook), indent=1, ensure_ascii=False) + "\n"
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {target}: {error.strerror}") from None
    for path, text in texts.items():
        try:
            if not overwrite and differs(path, text):
                done.kept.append(path)
            else:
                write_whole(path, text)
                done.written.append(path)
        except (OSError, UnicodeError) as error:
            done.problems.append(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}")
    return done


def differs(path: Path, text: str) -> bool:
    """Whether something else stands at `path`, readable or not."""
    try:
        return path.read_bytes() != text.encode()
    except FileNotFoundError:
        return path.is_symlink()
    except OSError:
        return True


def write_whole(path: Path, text: str) -> None:
    """Writes a file under another name first, so that a full disk or a kill leaves the old one or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def main(arguments: list[str]) -> int:
    folders = [argument for argument in arguments if argument != "--overwrite"]
    if len(folders) > 2 or any(folder.startswith("-") for folder in folders):
        print("expected --overwrite or not, and at most two folders: the notebooks' and the student version's",
              file=sys.stderr)
        return 2
    source, target = folders + [shipped("notebooks"), "release"][len(folders):]
    try:
        files, kept, problems = release(Path(source), Path(target), "--overwrite" in arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(files)} student notebooks in {target}")
    if kept:
        print(f"kept {len(kept)} more that have been worked on, {kept[0]} first; --overwrite writes them anew")
    for problem in problems:
        print(f"not released: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
