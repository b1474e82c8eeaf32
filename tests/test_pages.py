"""The pages say what the notebooks say, and their links lead somewhere."""

import json
import re

import minutes
import nbformat
import pages
import pytest

PARTS = ["title", *(f"{part} {n}" for part, last in (("concept", 3), ("troubleshooting", 3), ("connection", 2),
                                                     ("key insight", 3)) for n in range(1, last + 1))]
PART = "|".join([*PARTS, "why this matters"])
PLACE = r"(abstract|appendix \w|(section|table|figure|theorem) \d+(\.\d+)*|sections \d+(\.\d+)* and \d+(\.\d+)*)"
FORMS = (rf"the lesson, ({PART})( and ({PART}))?", rf"paper, {PLACE}( and {PLACE})?",
         rf"[A-Za-z][\w .]+(, {PLACE}( and {PLACE})?| #\d+)?")
TEXTS = [path for folder in (".", "docs", "notebooks") for path in sorted((pages.ROOT / folder).glob("*.md"))]


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page):
    assert page.read_text(encoding="utf-8") == pages.filled(page), "run python tools/pages.py"


def test_figures_are_those_of_the_notebooks():
    found = {path.stem: path.read_bytes() for path in (pages.ROOT / "notebooks" / "figures").glob("*")}
    assert found == {name: png for name, (png, _) in pages.pictures().items()}, "run python tools/pages.py"
    assert all(alt for _, alt in pages.pictures().values())


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text)
    local = [a or b for a, b in links if not (a or b).startswith("http")]
    assert [link for link in local if not (page.parent / link).is_file()] == []
    assert links or page.parent.name == "docs" or page.name in ("ARCHITECTURE.md", "CHANGELOG.md")


@pytest.mark.parametrize("path", pages.NOTEBOOKS, ids=lambda path: path.stem)
def test_the_minutes_that_a_notebook_names_are_those_of_the_model(path):
    assert 0.75 < minutes.said(path) / minutes.work(path).minutes < 1.25


def test_what_takes_time_is_counted(tmp_path):
    v4 = nbformat.v4
    printed = v4.new_output("stream", text="four words are printed\n")
    book = v4.new_notebook(cells=[
        v4.new_markdown_cell("# 07 · A title\n\n**Time** 5 minutes. Here $x$ is one.\n\n$$y = 2$$\n\n```\nnot read\n```"),
        v4.new_code_cell("import torch\n\n# a comment\nx = 1\nprint(x)\nnb07.guess.reveal(None)", outputs=[printed]),
        v4.new_code_cell("def f(n):\n    ### BEGIN SOLUTION\n    a = n  # twice\n\n    return a + a\n    ### END SOLUTION")])
    nbformat.write(book, tmp_path / "07_a.ipynb")
    done = minutes.work(tmp_path / "07_a.ipynb")
    assert done == minutes.Work(words=9 + 3 + 10, printed=4, code=3, figures=0, predictions=1, exercises=1, written=2)
    assert done.minutes == pytest.approx(22 / 180 + 4 / 240 + 3 / 12 + 2 + 3 + 3)
    assert minutes.said(tmp_path / "07_a.ipynb") == 5 and "| 07 | 22 | 4 |" in minutes.table([tmp_path / "07_a.ipynb"])


def test_a_claim_is_read_as_it_stands(tmp_path):
    book = pages.nbformat.v4.new_notebook(cells=[pages.nbformat.v4.new_markdown_cell(
        "# 07 · A\n\n## What you can now claim\n\n| claim | shown by | verdict |\n|---|---|---|\n"
        "| B starts at zero (the lesson, concept 2; paper, section 4.1) | the curve, cells 3, 5 and 12 | Confirmed |\n"
        "| ours alone (at r = 8) | cell 4 | Refuted |\n\n**Next: notebook 08**")])
    pages.nbformat.write(book, tmp_path / "07_a.ipynb")
    first, second = pages.claims(tmp_path / "07_a.ipynb")
    assert (first.text, first.source) == ("B starts at zero", "the lesson, concept 2; paper, section 4.1")
    assert (first.cells, first.verdict) == ([3, 5, 12], "Confirmed")
    assert (second.text, second.source, second.cells) == ("ours alone (at r = 8)", "", [4])


@pytest.mark.parametrize("path", pages.NOTEBOOKS, ids=lambda path: path.stem)
def test_sources_are_written_alike(path):
    for claim in pages.claims(path):
        for source in filter(None, claim.source.split("; ")):
            of = FORMS[0] if source.startswith("the lesson") else FORMS[1] if source.startswith("paper") else FORMS[2]
            assert re.fullmatch(of, source), f"{source}: expected the form {of}"
        unread = re.search(r"\((?!a common )[^()]*\)$", claim.text)
        assert claim.source or not unread, f"no source is read in {claim.text}"


@pytest.mark.parametrize("path", pages.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_claim_of_others_names_the_cells_that_show_it(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    outputs = {cell.execution_count: cell.outputs for cell in cells}
    sourced = [claim for claim in pages.claims(path) if claim.source]
    assert sourced
    for claim in sourced:
        assert claim.cells or claim.verdict.startswith("Not testable here"), f"no cell shows: {claim.text}"
        assert [n for n in claim.cells if not outputs.get(n)] == [], f"cells that show nothing: {claim.text}"


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_the_lesson_is_in_the_ledger(part):
    made_in = [row.split(" | ")[1] for row in pages.ledger().splitlines()[2:]]
    assert any(re.search(rf"the lesson, ([^;]* and )?{part}\b", source) for source in made_in)


def test_what_a_card_said_is_told(tmp_path, monkeypatch):
    assert set(pages.card().splitlines()[2].split(" | ")) >= {"144", "not measured yet |"}
    rows = [{"name": "one adapter", "failed": "a power cut"}]
    (tmp_path / "gpu_routing.json").write_text(json.dumps({"card": "a card", "date": "2026-01-01", "rows": rows}))
    monkeypatch.setattr(pages.gpu, "RECORDS", tmp_path)
    assert pages.card().splitlines()[-1].endswith("| a card, 2026-01-01: 0 rows, 1 goals missed |")
