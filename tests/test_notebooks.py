"""What nbval does not see: form, figures, exercises and prose of every notebook. Each check is shown able to fail."""

import base64
import copy
import re
from pathlib import Path

import nbformat
import pytest
from names_in_cells import overwritten
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbgrader.nbgraderformat import MetadataValidator

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LAST = 15


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def grader(cell, key):
    return bool(cell.metadata.get("nbgrader", {}).get(key))


def text_of(output):
    """The text of one output, whatever its kind."""
    return output.get("text") or output.get("data", {}).get("text/plain", "")


def text_outputs(cell):
    return "".join(text_of(output) for output in cell.outputs)


def has_picture(output):
    return "image/png" in output.get("data", {})


def markdown(nb):
    return "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")


def name_of(cell):
    return cell.get("id") or short(cell.source)


def short(source):
    return repr(source.strip().partition("\n")[0][:60])


# Checks: each takes a notebook and returns a list of what is wrong with it.


def executed_in_order(nb):
    counts = [cell.execution_count for cell in code_cells(nb)]
    return [] if counts == list(range(1, len(counts) + 1)) else [f"execution counts are {counts}"]


def nothing_skipped(nb):
    skip = re.compile(r"nbval[-_]skip|NBVAL_(SKIP|RAISES|VARIABLE)|PYTEST_VALIDATE_IGNORE", re.IGNORECASE)
    return [f"{name_of(c)} is skipped" for c in nb.cells if any(map(skip.search, [*tags(c), c.source]))]


def ignored_outputs_have_reasons(nb):
    ignored = [c for c in code_cells(nb) if re.search("nbval[-_](ignore|test)", " ".join([*tags(c), c.source]).lower())]
    problems = [f"{len(ignored)} cells ignore their output, at most 2 may"] if len(ignored) > 2 else []
    return problems + [f"{name_of(c)} ignores its output without a metadata reason" for c in ignored
                       if "nbval-ignore-output" not in tags(c) or len(c.metadata.get("reason", "")) < 20]


def outputs_are_clean(nb):
    problems = []
    for cell in code_cells(nb):
        for output in cell.outputs:
            data = output.get("data", {})
            bad = {"stderr": output.get("name") == "stderr",
                   "an error": output.output_type == "error" and "raises-exception" not in tags(cell),
                   "an SVG": "image/svg+xml" in data or "<svg" in data.get("text/html", ""),
                   "a widget, which a file cannot keep": "application/vnd.jupyter.widget-view+json" in data,
                   "an address or a path": re.search(r"\b0x[0-9a-f]{6,}|/(home|root|tmp|Users)/", text_of(output))}
            problems += [f"{name_of(cell)} has {what} in its outputs" for what, found in bad.items() if found]
        if "raises-exception" in tags(cell) and not any(o.output_type == "error" for o in cell.outputs):
            problems.append(f"{name_of(cell)} is tagged raises-exception and raises none")
    return problems


def metadata_is_clean(nb):
    problems = [f"{name_of(c)} keeps {key}" for c in nb.cells for key in ("execution", "ExecuteTime", "collapsed")
                if key in c.metadata]
    kernel = nb.metadata.get("kernelspec", {}).get("name")
    problems += [] if kernel == "python3" else [f"the kernel is {kernel}, expected python3"]
    return problems + [f"the notebook keeps {key}" for key in nb.metadata if key not in ("kernelspec", "language_info")]


def file_is_small(nb):
    size = len(nbformat.writes(nb).encode())
    return [] if size < 600_000 else [f"{size:,} bytes, expected fewer than 600,000"]


def cells_are_short(nb):
    lines = {name_of(c): sum(bool(line.strip()) for line in c.source.splitlines()) for c in code_cells(nb)}
    problems = [f"{name} has {n} lines of code, at most 25 may be" for name, n in lines.items() if n > 25]
    long = [name for name, n in lines.items() if n > 15]
    return problems + ([f"over a fifth of the cells have over 15 lines: {long}"] if 5 * len(long) > len(lines) else [])


def figures_have_summaries(nb):
    problems = [] if any(map(has_picture, (o for c in code_cells(nb) for o in c.outputs))) else ["there is no figure"]
    for cell in code_cells(nb):
        for output, following in zip(cell.outputs, [*cell.outputs[1:], {}]):
            if has_picture(output) and not (following.get("name") == "stdout" and len(following.text.strip()) >= 20):
                problems.append(f"{name_of(cell)} has a figure that no printed summary follows")
    return problems


def exercises_are_whole(nb):
    at = [i for i, c in enumerate(nb.cells) if grader(c, "solution")]
    problems = [] if 2 <= len(at) <= 5 else [f"{len(at)} exercises, expected 2 to 5"]
    for i, end in zip(at, [*at[1:], len(nb.cells)]):
        name, rest = nb.cells[i].metadata["nbgrader"].get("grade_id"), nb.cells[i + 1:end]
        checks = [c for c in rest if grader(c, "grade") and re.search(rf"\bnb\d\d\.{name}\({name}\)", c.source)]
        if not any(f"ok: {name} " in text_outputs(c) for c in checks):
            problems.append(f"exercise {name} is followed by no graded cell with nbNN.{name}({name}) that prints ok")
        if not any(c.cell_type == "markdown" and "<details>" in c.source and "</details>" in c.source for c in rest):
            problems.append(f"exercise {name} is followed by no folded hint")
    for i, cell in enumerate(nb.cells):
        marks = re.findall(r"^\s*### (BEGIN|END) SOLUTION$", cell.source, re.MULTILINE)
        if marks != (["BEGIN", "END"] if i in at else []) or len(marks) != cell.source.count(" SOLUTION"):
            problems.append(f"{name_of(cell)} has the solution marks {marks}")
    try:
        MetadataValidator().validate_nb(copy.deepcopy(nb))
    except Exception as error:  # nbgrader's own verdict
        problems.append(f"nbgrader: {error}")
    return problems


def structure_is_whole(nb):
    prose, first = markdown(nb), nb.cells[0].source if nb.cells else ""
    title = re.match(r"# (\d\d) · \S", first)
    problems = [] if title else ["the first cell has no title '# NN · Title'"]
    problems += [f"the first cell does not say {what}" for what, pattern in
                 (("what you will be able to do", "you will be able to"), ("how many minutes it takes", r"\d minutes"))
                 if not re.search(pattern, first, re.IGNORECASE)]
    problems += [f"no heading '{h}'" for h in ("Predict", "Exercises", "What you can now claim")
                 if not re.search(rf"^##+ {h}", prose, re.MULTILINE)]
    if not any(".reveal(" in cell.source for cell in code_cells(nb)):
        problems.append("no prediction is answered with .reveal")
    problems += [] if "negative control" in prose.lower() else ["no negative control"]
    following = f"notebook {int(title[1]) + 1:02d}" if title else "notebook"
    if not (title and int(title[1]) == LAST) and following not in prose_after(nb, "What you can now claim"):
        problems.append(f"the last text does not point to {following}")
    return problems


def claims_have_verdicts(nb):
    rows = re.findall(r"^\|(.+)\|\s*$", prose_after(nb, "What you can now claim"), re.MULTILINE)[2:]
    problems = [] if rows else ["there is no table of claims"]
    return problems + [f"a claim has no verdict: {short(row)}" for row in rows
                       if not re.match(r"\W*(confirmed|refuted|not testable)", row.split("|")[-1], re.IGNORECASE)]


def prose_after(nb, heading):
    return re.split(rf"^##+ {heading}", markdown(nb) + "\n", maxsplit=1, flags=re.MULTILINE)[-1]


def no_network(nb):
    code = re.compile(r"https?://|\b(requests|urllib|httpx|aiohttp|socket|wget|curl|ftplib|huggingface_hub)\b"
                      r"|^\s*[!%]\s*(pip|conda|git|apt)\b", re.MULTILINE)
    problems = [f"{name_of(c)} uses the network" for c in code_cells(nb) if code.search(c.source)]
    remote = re.search(r"!\[[^\]]*\]\(https?:|<(img|iframe|script|link)[^>]*https?:", markdown(nb))
    return problems + ([f"the text loads {remote[0]}"] if remote else [])


def code_is_plain(nb):
    banned = {"ends a line in ';'": r";[ \t]*$", "clears its output": r"\bclear_output\b",
              "is interactive": r"\binteract\b", "turns off warnings": r"simplefilter\(|filterwarnings\(",
              "changes the format of figures": r"set_matplotlib_formats|retina"}
    return [f"{name_of(c)} {what}" for c in code_cells(nb) for what, pattern in banned.items()
            if re.search(pattern, c.source, re.MULTILINE)]


def starts_with_seed_and_threads(nb):
    first = code_cells(nb)[0].source if code_cells(nb) else ""
    calls = ("manual_seed(", "set_num_threads(")
    return [f"the first code cell does not call {call}" for call in calls if call not in first]


# Numbers in prose that need no output: references, years, what stands in code, links or tags, a prediction's choices.
FREE = [r"(?s:```.*?```)", r"`[^`]*`", r"^\s*[-*] \*\*[a-z]\*\*.*$", r"\]\([^)]*\)", r"https?://\S+", r"<[^>]+>",
        r"\barxiv\W*\d{4}\.\d{4,5}(v\d)?", r"\b\d{4}\.\d{5}(v\d)?\b", r"\b(19|20)\d\d\b", r"^\s*(\*\*)?\d+[.)]",
        r"\b(sections?|tables?|figures?|cells?|notebooks?|theorems?|equations?|concepts?|chapters?|appendix|exercises?"
        r"|pages?|python|version|seeds?)\s+\d+(\.\d+)*((,| and|,? and| to| or|–|-)\s*\d+(\.\d+)*)*",
        r"\b\d+ minutes", r"#\d+", r"\b\d+-(bit|byte)"]
LATEX = r"(?s:\$\$.*?\$\$)|\$[^$\n]+\$"
NUMBER = r"\d+(?:[,_]\d{3})+(?:\.\d+)?|\d*\.?\d+(?:e[-+]?\d+)?"
STANDS_ALONE = rf"(?<![\w.])({NUMBER})(?=%|[x×]\b|[KMGT]i?B\b|m?s\b|(?![\w.])|\.(?!\d))"


def value(number):
    return float(re.sub("[,_]", "", number))


def numbers_in_prose_are_shown(nb):
    prose = markdown(nb)
    equations = re.findall(LATEX, prose)
    shown = {value(n) for text in (*(c.source for c in code_cells(nb)), *map(text_outputs, code_cells(nb)), *equations)
             for n in re.findall(NUMBER, text)}
    for pattern in (LATEX, *FREE):
        prose = re.sub(pattern, " ", prose, flags=re.MULTILINE | re.IGNORECASE)
    return [f"{number} stands in the text and in no output" for number in re.findall(STANDS_ALONE, prose, re.IGNORECASE)
            if value(number) not in shown and not (value(number) <= 12 and number.isdigit())]


def names_keep_their_meaning(nb):
    """So that any cell may be run again, after any other."""
    return overwritten([cell.source for cell in code_cells(nb)])


def opens_with_questions_and_ends_with_a_card(nb):
    first, card = nb.cells[0].source, prose_after(nb, "The card")
    questions = re.findall(r"^[123]\. ", first.partition("<details>")[0], re.MULTILINE)
    answers = re.findall(r"^[123]\. ", first.partition("<details>")[2], re.MULTILINE)
    return ([] if len(questions) == len(answers) == 3 else ["no three questions with their answers folded"]) + (
        [] if len(re.findall(r"^- ", card, re.MULTILINE)) == 5 else ["no card of five lines"])


CHECKS = [executed_in_order, nothing_skipped, ignored_outputs_have_reasons, outputs_are_clean, metadata_is_clean,
          file_is_small, cells_are_short, figures_have_summaries, exercises_are_whole, structure_is_whole,
          claims_have_verdicts, no_network, code_is_plain, starts_with_seed_and_threads, numbers_in_prose_are_shown,
          names_keep_their_meaning, opens_with_questions_and_ends_with_a_card]


def test_the_folder_is_there_and_its_files_are_named_as_titled():
    assert FOLDER.is_dir()
    for path in NOTEBOOKS:
        assert re.match(r"\d\d_[a-z0-9_]+\.ipynb$", path.name)
        assert f"# {path.name[:2]} · " in nbformat.read(path, as_version=4).cells[0].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_notebook(path, check):
    assert check(nbformat.read(path, as_version=4)) == []


# Each check can fail: a small notebook that passes all of them is spoilt in one place at a time.


def printed(text):
    return new_output("stream", name="stdout", text=text)


def picture(kind="image/png", content=b"png"):
    return new_output("display_data", data={kind: base64.b64encode(content).decode(), "text/plain": "<Image>"})


def graded(source, grade_id, solution, *outputs):
    meta = dict(schema_version=3, grade_id=grade_id, solution=solution, grade=not solution, locked=not solution,
                task=False, points=1)
    return new_code_cell(source, metadata={"nbgrader": meta}, outputs=list(outputs))


def exercise(name):
    return [graded(f"def {name}(n):\n    ### BEGIN SOLUTION\n    return n\n    ### END SOLUTION", name, True),
            graded(f"nb02.{name}({name})", f"check_{name}", False, printed(f"ok: {name} is right on 4 fresh inputs\n")),
            new_markdown_cell("<details><summary>Hint</summary>Look at the shapes.</details>")]


def good():
    """Cells: 0 title, 1 setup, 2 predict, 3 figure, 4 text, 5 to 10 exercises, 11 claims."""
    cells = [
        new_markdown_cell("# 02 · Two matrices\n**You will be able to** count. **Time** 25 minutes.\n\n1. a?\n2. b?\n"
                          "3. c?\n\n<details>\n\n1. A\n2. B\n3. C\n\n</details>"),
        new_code_cell("import torch\ntorch.manual_seed(0)\ntorch.set_num_threads(2)\nsize = 4_096"),
        new_markdown_cell("## Predict\n- **a** 77%\n- **b** 88%"),
        new_code_cell("plots.show(fig, 'r')\nnb02.guess.reveal('a')",
                      outputs=[picture(), printed("rank 4 leaves an error of 31.5%\n")]),
        new_markdown_cell("## Measure\nThe **negative control**: 31.5% of $x_{64}$, 4,096 wide ([Hu](https://a.b/2.8), "
                          "arXiv 2106.09685, section 7.3). In `r=99`, 64 of 3, a 16-bit base, see tables 15 and 16."),
        *exercise("one"), *exercise("two"),
        new_markdown_cell("## Exercises\n## What you can now claim\n\n| claim | where | verdict |\n|---|---|---|\n"
                          "| small | figure | confirmed |\n\n**Next:** notebook 03\n\n## The card\n\n"
                          + "- a line\n" * 5)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    for count, cell in enumerate(code_cells(nb), 1):
        cell.execution_count = count
    return nb


def source(at, old, new):
    """Spoils the source of a cell."""
    def spoil(nb):
        assert old in nb.cells[at].source
        nb.cells[at].source = nb.cells[at].source.replace(old, new)
    return spoil


def text(new):
    return lambda nb: setattr(nb.cells[4], "source", nb.cells[4].source + new)


def code(new):
    return lambda nb: setattr(nb.cells[1], "source", nb.cells[1].source + "\n" + new)


def output(*outputs):
    return lambda nb: nb.cells[3].outputs.extend(outputs)


def meta(at, **new):
    return lambda nb: nb.cells[at].metadata.update(new)


def grade_meta(at, **new):
    return lambda nb: nb.cells[at].metadata["nbgrader"].update(new)


ERROR = new_output("error", ename="E", evalue="", traceback=[])
IGNORE = {"tags": ["nbval-ignore-output"]}
BAD = {
    executed_in_order: [lambda nb: nb.cells[3].update(execution_count=7), lambda nb: nb.cells.pop(1),
                        lambda nb: nb.cells[1].update(execution_count=None)],
    nothing_skipped: [meta(1, tags=["nbval-skip"]), code("# NBVAL_SKIP"), code("# PYTEST_VALIDATE_IGNORE_OUTPUT")],
    ignored_outputs_have_reasons: [meta(1, **IGNORE), meta(1, reason="short", **IGNORE), code("# NBVAL_IGNORE_OUTPUT"),
                                   lambda nb: [c.metadata.update(reason="a reason that is long enough", **IGNORE)
                                               for c in code_cells(nb)]],
    outputs_are_clean: [output(new_output("stream", name="stderr", text="warned")), output(ERROR),
                        meta(3, tags=["raises-exception"]), output(picture("image/svg+xml")),
                        output(printed("<f at 0x7f12ab34cd>")), output(printed("/home/me/x")),
                        output(new_output("display_data", data={"text/html": "<svg/>"})),
                        output(new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}}))],
    metadata_is_clean: [meta(1, execution={"shell.execute_reply": "2026"}), lambda nb: nb.metadata.update(widgets={}),
                        lambda nb: nb.metadata.kernelspec.update(name="conda")],
    file_is_small: [output(picture(content=b"x" * 500_000))],
    cells_are_short: [code("x = 1\n" * 26), lambda nb: [c.update(source="x = 1\n" * 16) for c in code_cells(nb)[:2]]],
    figures_have_summaries: [lambda nb: nb.cells[3].outputs.reverse(), lambda nb: nb.cells[3].outputs.pop(),
                             lambda nb: nb.cells[3].outputs.pop(0), output(picture(), printed("ok\n")),
                             output(picture())],
    exercises_are_whole: [lambda nb: nb.cells.pop(6), lambda nb: nb.cells.pop(7),
                          lambda nb: nb.cells[6].outputs.clear(),
                          source(6, "nb02.one", "nb02.two"), source(7, "<details>", "<b>"),
                          source(5, "### END SOLUTION", "pass"),
                          source(8, "### BEGIN", "# BEGIN"), grade_meta(6, grade=False), grade_meta(8, grade_id="one"),
                          grade_meta(6, grade_id=""), code("### BEGIN SOLUTION\n### END SOLUTION"),
                          lambda nb: nb.cells.__setitem__(slice(5, 8), []),
                          lambda nb: nb.cells.extend(c for name in "wxyz" for c in exercise(name))],
    structure_is_whole: [source(0, "02 ·", "Two"), source(0, "You will be able to", "We"),
                         source(0, "minutes", "hours"), source(2, "## Predict", "Guess"),
                         source(11, "## Exercises", "Do"), source(11, "## What", "What"), source(3, ".reveal", ".x"),
                         source(4, "negative control", "x"), source(11, "notebook 03", "notebook 02")],
    claims_have_verdicts: [source(11, "confirmed", "perhaps"), source(11, "| small | figure | confirmed |", "")],
    no_network: [code("import requests"), code("open_url('https://a.b')"), code("!pip install x"),
                 text("![x](https://a.b/c.png)"), text("<img src='http://a.b/c.png'>")],
    code_is_plain: [code("plot(x);"), code("clear_output()"), code("interact(f)"),
                    code("warnings.simplefilter('ignore')"), code("set_matplotlib_formats('retina')")],
    names_keep_their_meaning: [
        lambda nb: [c.update(source=t) for c, t in zip(code_cells(nb), ("x = 1", "print(x)", "x = 2"))],
        lambda nb: [c.update(source=t) for c, t in zip(code_cells(nb), ("x = 1", "def f():\n    return x", "for x in f: 0"))]],
    opens_with_questions_and_ends_with_a_card: [source(0, "3. c?", ""), source(0, "3. C", ""),
                                                source(11, "- a line\n", "", ), source(11, "## The card", "")],
    starts_with_seed_and_threads: [source(1, "manual_seed", "seed"), source(1, "set_num_threads", "x"),
                                   lambda nb: nb.cells.pop(1)],
    numbers_in_prose_are_shown: [text(" It is " + n) for n in (
        "96%.", "37,748,736 bytes", "0.35 M", "1e-4", "13 steps", "90s", "24 GB", "17x less", "64.5, or", "4,097",
        "(98)", "31.4 %", "3 to 19")],
}


def test_a_good_notebook_passes_and_every_check_has_bad_ones():
    assert [problem for check in CHECKS for problem in check(good())] == []
    assert set(BAD) == set(CHECKS)


@pytest.mark.parametrize("check, spoil", [(check, spoil) for check, spoils in BAD.items() for spoil in spoils],
                         ids=[f"{check.__name__}-{i}" for check, spoils in BAD.items() for i, _ in enumerate(spoils)])
def test_each_check_rejects_a_bad_notebook(check, spoil):
    nb = good()
    spoil(nb)
    assert check(nb)


@pytest.mark.parametrize("fine", [
    " In 2021, 3 to 12 of 4096.", " See section 4.1 and cells 14 to 17.", " GPT3 175B and NF4.", " It took 31.50%.",
    " `x = 13.7`", " $$ x = 17 $$", "\n14. The next.", "\n- **c** 99 GB", " [a](b.md#l15)", " 64 x 4096"])
def test_what_the_number_check_lets_pass(fine):
    nb = good()
    text(fine)(nb)
    assert numbers_in_prose_are_shown(nb) == []
