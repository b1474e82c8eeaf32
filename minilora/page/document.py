"""The page as one document, with the answer to its first question in it, so that it says something at once."""

from functools import cache
from importlib.resources import files

from .. import __version__
from ..memory.config_file import LARGEST
from .answer import ask
from .asked import START
from .form import form
from .html import Html, joined, tag

FILES = {"page.css": "text/css", "page.js": "text/javascript", "licences.txt": "text/plain"}
# what is seen at once, and formulas where the page is built once for many; whoever serves wants to start soon
PARTS_AT_ONCE = {"served": ("changes", "curve"), "static": ("changes", "curve", "items")}
HEADINGS = {"parts": "What takes it", "moment": "The fullest moment", "changes": "What to change first",
            "curve": "Over one step"}
# no inline script or style, nothing from elsewhere; Pyodide compiles WebAssembly
POLICY = ("default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' data:; "
          "connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'")
LICENCES = {"served": "", "static": (
    " This site ships Pyodide (MPL-2.0; its source is at github.com/pyodide/pyodide) with CPython and its standard "
    "library (PSF-2.0) and the libraries in it.")}


def source(name: str) -> str:
    """A file of this folder that is no Python."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def first_answer(parts: tuple[str, ...]) -> dict:
    """The answer to `START`, with these of its further parts."""
    reply = ask({"state": START}, budget=60)
    for part in parts:
        reply["html"] |= ask({"state": START, "part": part}, budget=60)["html"]
    return reply


@cache
def document(answers: str, bytes_to_load: int = 0) -> str:
    """The page. `answers`: who does, "served" (a Python that serves it) or "static" (one in the browser)."""
    reply = first_answer(PARTS_AT_ONCE[answers])
    html = {name: Html(text) for name, text in reply["html"].items()}
    parts = [tag("section", tag("h2", heading, id=f"h-{name}"), tag("div", html[name], id=name),
                 aria_labelledby=f"h-{name}", class_=f"part s-{name}") for name, heading in HEADINGS.items()]
    items = tag("details", tag("summary", "Every item, with its formula"), tag("div", html["items"], id="items",
                class_="wide", tabindex="0", role="region", aria_label="every item"), data_part="items", class_="part")
    same = tag("section", tag("h2", "The same answer elsewhere", id="h-same"), tag("p", tag(
        "code", reply["command"], id="command")), tag("p", tag("button", "copy the command", type="button", id="copy"),
        " ", tag("button", "copy this page's address", type="button", id="share"), " ",
        tag("button", "download as JSON", type="button", id="download"), " ",
        tag("a", "start again", href="#", class_="button")), aria_labelledby="h-same", class_="part same")
    answer = tag("div", tag("div", html["verdict"], id="verdict"), *parts, items, same, id="answer")
    beside = tag("aside", tag("section", tag("h2", "This run on all cards", id="h-cards"),
                              tag("div", html["cards"], id="cards"), aria_labelledby="h-cards", class_="part"),
                 tag("details", tag("summary", "This card for all models and methods"), tag("div", "…", id="models"),
                     data_part="models", class_="part"), aria_label="other cards, other models")
    loading = tag("p", tag("progress", id="loaded", max=bytes_to_load or 1, value=0, aria_label="loading Python"), " ",
                  tag("span", "", id="loading-what"), id="loading", hidden=True)
    body = tag(
        "body", tag("header", tag("h1", "Does it fit?"), tag("p", (
            "The memory of a fine-tune, to the byte and by name, before you rent the card. Python works it out "
            f"{'on this machine' if answers == 'served' else 'in this browser'}; nothing is sent anywhere."))),
        tag("main", tag("div", form(START, reply["effective"]), class_="asked"),
            tag("div", loading, tag("p", "", id="error", role="alert", hidden=True), answer, class_="answered"),
            beside),
        tag("p", "", id="said", role="status", class_="unseen"),
        tag("footer", tag("p", f"minilora {__version__}, MIT licence.{LICENCES[answers]} ",
                          tag("a", "All licences", href="licences.txt"))),
        data_answers=answers, data_largest=LARGEST)
    head = tag("head", tag("meta", charset="utf-8"), tag("title", f"Does it fit? {reply['title']}"),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
               tag("meta", name="color-scheme", content="light dark"),
               tag("link", rel="icon", href="data:,"), tag("link", rel="stylesheet", href="page.css"),
               tag("script", src="page.js", type="module"))
    return joined(Html("<!doctype html>\n"), tag("html", head, body, lang="en"))
