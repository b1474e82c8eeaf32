"""Makes slides of the notebooks: ``python tools/slides.py [FOLDER [NN ...]]``, by default all of them into slides/.

A heading begins a slide; figures, outputs and predictions are on it. Solutions and hints are left out, code is kept
where it is short. The speaker's notes (key s in the browser) are the plan of the lesson, from notebooks/LESSONS.md.
The pages are nbconvert's, with reveal.js, which a browser fetches when it shows them.
"""

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
LINES = 14  # of code on a slide


def plans(text: str) -> dict[str, str]:
    """Number of a notebook -> its plan in LESSONS.md."""
    parts = re.split(r"^## (\d\d) · ", text, flags=re.MULTILINE)[1:]
    return {number: "## " + part.split("\n## ")[0].strip() for number, part in zip(parts[::2], parts[1::2])}


def kind(cell) -> str:
    """nbconvert's name for what becomes of a cell: a slide begins, it goes on, or the cell is left out."""
    if cell.cell_type == "markdown":
        if cell.source.lstrip().startswith("<details>"):
            return "skip"
        return "slide" if re.match(r"##? ", cell.source) else "-"
    hidden = cell.metadata.get("nbgrader") or cell.source.startswith("import ")
    return "skip" if hidden or len(cell.source.splitlines()) > LINES and not cell.outputs else "-"


def slides(notebook, plan: str):
    """The notebook as slides, changed in place: the first one bears the plan as the speaker's notes."""
    for cell in notebook.cells:
        cell.source = re.sub(r"(?s)<details>.*?</details>", "", cell.source)
        if cell.cell_type == "code" and len(cell.source.splitlines()) > LINES:
            cell.source = f"# {len(cell.source.splitlines())} lines, in the notebook"
        cell.metadata["slideshow"] = {"slide_type": kind(cell)}
    note = nbformat.v4.new_markdown_cell(plan, metadata={"slideshow": {"slide_type": "notes"}})
    notebook.cells.insert(1, note)
    return notebook


def main(arguments: list[str]) -> None:
    from nbconvert import SlidesExporter

    folder, wanted = Path(arguments[0] if arguments else "slides"), arguments[1:]
    folder.mkdir(parents=True, exist_ok=True)
    notes = plans((ROOT / "notebooks" / "LESSONS.md").read_text(encoding="utf-8"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        number = path.name[:2]
        if not wanted or number in wanted:
            book = slides(nbformat.read(path, as_version=4), notes.get(number, ""))
            page, _ = SlidesExporter().from_notebook_node(book)
            (folder / f"{path.stem}.html").write_text(page, encoding="utf-8")
            print(folder / f"{path.stem}.html")


if __name__ == "__main__":
    main(sys.argv[1:])
