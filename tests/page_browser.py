"""A Chromium that opens the calculator's page, answered by a server or by Pyodide, and nothing but this machine."""

import contextlib
import functools
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import page_site

ROOT = Path(__file__).parents[1]
NODE_MODULES = ROOT / "node_modules"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]

# in the page: go to each address in turn, and say what stands there
ANSWERS = """async (addresses) => {
  const found = [];
  for (const address of addresses) {
    location.hash = address;
    while (document.getElementById("answer").dataset.of !== location.hash) await new Promise((r) => setTimeout(r, 2));
    const error = document.getElementById("error");
    found.push(error.hidden ? {
      peak: Number(document.querySelector("#parts tbody tr:last-child data").value),
      items: [...document.querySelectorAll("#items tbody tr")].map((row) => {
        const [name, part, count, bytes] = [...row.children].map((cell) => cell.textContent);
        return [part, name, Number(count.replaceAll(",", "")), Number(row.querySelector("data").value)];
      }) } : { error: error.textContent });
  }
  return found;
}"""


class Quiet(SimpleHTTPRequestHandler):
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def running(server) -> Iterator[object]:
    """A server in a thread."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def static_site(folder: Path) -> Iterator[str]:
    """The address of the static site, under a sub-path of a plain web server."""
    page_site.write(folder / "some" / "where", NODE_MODULES / "pyodide")
    handler = functools.partial(Quiet, directory=str(folder))
    with running(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
        yield f"http://127.0.0.1:{server.server_port}/some/where/"


@contextlib.contextmanager
def served_site() -> Iterator[str]:
    from minilora.page.server import Page

    with running(Page()) as server:
        yield server.address


@contextlib.contextmanager
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield chromium
        finally:
            chromium.close()


def visited(chromium, address: str, **options):
    """A page at the address, and the list of all that it asks for from then on."""
    page = chromium.new_page(**options)
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: page.requests.append(f"error {error}"))
    page.on("console", lambda said: page.requests.append(f"{said.type}: {said.text}") if said.type == "error" else None)
    page.goto(address)
    return page


def until(page, true: str, given=None, seconds: float = 60) -> None:
    """Wait for an expression, or a function of `given`; polled from here, since the page's policy forbids eval."""
    end = time.monotonic() + seconds
    while not page.evaluate(true, given):
        assert time.monotonic() < end, f"not in {seconds} s: {true}"
        time.sleep(0.02)


def answered(page, what: str = "of") -> None:
    """Wait until the answer (what="whole": with all of it that is seen) is that of the address."""
    until(page, f"document.getElementById('answer').dataset.{what} === location.hash")
