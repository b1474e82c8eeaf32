"""The calculator's page, looked at and timed. Needs a Chromium, `playwright` and what `npm ci` brings.

    PYTHONPATH=.:tools:tests python tests/bench/page.py speed          seconds to answers, both ways, medians of three
    PYTHONPATH=.:tools:tests python tests/bench/page.py weight         bytes of the site, as gzip -9 makes them
    PYTHONPATH=.:tools:tests python tests/bench/page.py pictures DIR   screenshots: three widths, light and dark
"""

import gzip
import statistics
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlencode

import page_browser
import page_site
from page_browser import answered, until, visited

from minilora.page.asked import START

LATER = [{}, {"seq": "4096"}, {"model": "llama-3-8b"}, {"method": "lora"}, {"stack": "unsloth"}, {"batch": "4"},
         {"model": "gemma-2-27b"}, {"targets": "q_proj,v_proj"}, {"model": "qwen2.5-72b"}]
STATES = {"start": {}, "not": START | {"model": "llama-3-70b", "method": "full", "stack": "transformers"},
          "wrong": START | {"rank": "0"}, "any": {"model": "gpt2-xl"}}


def seconds(page, state: dict) -> float:
    """From the change of an option to the answer in the page."""
    return page.evaluate("""async (hash) => {
      const start = performance.now();
      location.hash = hash;
      while (document.getElementById("answer").dataset.of !== location.hash) await new Promise((r) => setTimeout(r, 1));
      return (performance.now() - start) / 1000;
    }""", urlencode(state))


def speed() -> None:
    with tempfile.TemporaryDirectory() as folder, page_browser.browser() as chromium:
        for way, site in (("served", page_browser.served_site()), ("static", page_browser.static_site(Path(folder)))):
            with site as address:
                firsts, laters = [], []
                for run in range(3):
                    context = chromium.new_context()  # nothing of the last run is in its cache
                    page = context.new_page()
                    start = time.perf_counter()
                    page.goto(address + "#" + urlencode(START | {"rank": str(20 + run)}))
                    answered(page)
                    firsts.append(time.perf_counter() - start)
                    answered(page, "whole")
                    for change in LATER:
                        laters.append(seconds(page, START | change | {"rank": str(40 + run)}))  # new to any cache
                        answered(page, "whole")
                    context.close()
                print(f"{way}: first answer {statistics.median(firsts):.2f} s (of {', '.join(f'{t:.2f}' for t in firsts)}), "
                      f"later {statistics.median(laters):.3f} s, at most {max(laters):.3f} s (of {len(laters)})", flush=True)


def weight() -> None:
    with tempfile.TemporaryDirectory() as folder:
        page_site.write(Path(folder) / "site", page_browser.NODE_MODULES / "pyodide")
        sizes = {path: len(gzip.compress(path.read_bytes(), 9)) for path in Path(folder).rglob("*") if path.is_file()}
        ours = sum(size for path, size in sizes.items() if path.parent.name != "pyodide")
        for path, size in sorted(sizes.items(), key=lambda each: -each[1]):
            print(f"{size:>10,}  {path.relative_to(folder)}")
        print(f"{sum(sizes.values()):,} bytes in all, {ours:,} without Pyodide")


def pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with page_browser.browser() as chromium, page_browser.served_site() as address:
        for scheme in ("light", "dark"):
            for width, height in ((360, 740), (1366, 768), (1920, 1080)):
                page = visited(chromium, address, color_scheme=scheme, viewport={"width": width, "height": height})
                for name, state in STATES.items():
                    page.goto(address + "#" + urlencode(state))
                    if state:
                        answered(page, "of" if name == "wrong" else "whole")
                    if name == "any":
                        page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
                        until(page, "!document.getElementById('models').textContent.includes('so far')"
                                               " && document.querySelectorAll('#models tr').length > 9")
                    page.screenshot(path=folder / f"{name}-{width}-{scheme}.png", full_page=True)
                page.close()
        page = visited(chromium, address)
        page.pdf(path=folder / "print.pdf")


if __name__ == "__main__":
    {"speed": speed, "weight": weight, "pictures": lambda: pictures(Path(sys.argv[2]))}[sys.argv[1]]()
