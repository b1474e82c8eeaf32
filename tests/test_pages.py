"""The pages say what the notebooks say, and their links lead somewhere."""

import re

import pages
import pytest

TEXTS = [pages.ROOT / "README.md", *(pages.ROOT / "notebooks").glob("*.md")]


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page):
    assert page.read_text(encoding="utf-8") == pages.filled(page), "run python tests/pages.py"


def test_figures_are_those_of_the_notebooks():
    found = {path.stem: path.read_bytes() for path in (pages.ROOT / "notebooks" / "figures").glob("*")}
    assert found == {name: png for name, (png, _) in pages.pictures().items()}, "run python tests/pages.py"
    assert all(alt for _, alt in pages.pictures().values())


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text)
    local = [a or b for a, b in links if not (a or b).startswith("http")]
    assert [link for link in local if not (page.parent / link).is_file()] == []
    assert links


def test_a_claim_is_read_as_it_stands(tmp_path):
    book = pages.nbformat.v4.new_notebook(cells=[pages.nbformat.v4.new_markdown_cell(
        "# 07 · A\n\n## What you can now claim\n\n| claim | shown by | verdict |\n|---|---|---|\n"
        "| B starts at zero (concept 2; the paper, section 4.1) | the curve, cells 3, 5 and 12 | Confirmed |\n"
        "| ours alone (at r = 8) | cell 4 | Refuted |\n\n**Next: notebook 08**")])
    pages.nbformat.write(book, tmp_path / "07_a.ipynb")
    first, second = pages.claims(tmp_path / "07_a.ipynb")
    assert (first.text, first.source) == ("B starts at zero", "the lesson, concept 2; the paper, section 4.1")
    assert (first.cells, first.verdict) == ([3, 5, 12], "Confirmed")
    assert (second.text, second.source, second.cells) == ("ours alone (at r = 8)", "", [4])
