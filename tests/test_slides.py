"""Slides: what a class sees has no solution and no hint, and the speaker has the plan of the lesson."""

import nbformat
import pytest
import slides

NOTEBOOKS = sorted((slides.ROOT / "notebooks").glob("*.ipynb"))
PLANS = slides.plans((slides.ROOT / "notebooks" / "LESSONS.md").read_text(encoding="utf-8"))


def shown(book):
    return [cell for cell in book.cells if cell.metadata["slideshow"]["slide_type"] in ("slide", "-")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_slides_show_no_solution_and_bear_the_plan(path):
    book = slides.slides(nbformat.read(path, as_version=4), PLANS[path.name[:2]])
    text = "\n".join(cell.source for cell in shown(book))
    assert "BEGIN SOLUTION" not in text and "<details>" not in text
    assert sum(cell.metadata["slideshow"]["slide_type"] == "slide" for cell in book.cells) >= 4
    assert any("image/png" in o.get("data", {}) for cell in shown(book) for o in cell.get("outputs", []))
    (note,) = [cell.source for cell in book.cells if cell.metadata["slideshow"]["slide_type"] == "notes"]
    assert "**Minutes.**" in note and note.count("\n- *") == 3


def test_a_solution_would_be_noticed():
    cell = nbformat.v4.new_code_cell("def f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION",
                                     metadata={"nbgrader": {"solution": True}})
    assert slides.kind(cell) == "skip"
    cell.metadata.clear()
    assert slides.kind(cell) == "-"
