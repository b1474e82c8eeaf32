"""The calculator's page in Chromium, both ways of running it: the bytes, the errors, the address, the keyboard.

The bytes are those of 40 random states in which every family, stack, method and option comes up; those of 300:

    pytest tests/test_page_browser.py --whole
"""

import json
from urllib.parse import urlencode

import page_browser
import page_states
import pytest
from page_browser import NODE_MODULES, answered, until, visited

from minilora.page.asked import START

pytest.importorskip("playwright", reason="needs playwright")
pytestmark = pytest.mark.skipif(page_browser.CHROMIUM is None, reason="needs a Chromium")
WAYS = ("served", pytest.param("static", marks=pytest.mark.skipif(
    not (NODE_MODULES / "pyodide").is_dir(), reason="needs Pyodide: npm ci")))
AXE = NODE_MODULES / "axe-core" / "axe.min.js"
CONFIG = {"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 256, "num_attention_heads": 8,
          "num_key_value_heads": 2, "intermediate_size": 700, "vocab_size": 1000, "max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def chromium():
    with page_browser.browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """Way of running the page -> its address."""
    with page_browser.served_site() as served:
        if not (NODE_MODULES / "pyodide").is_dir():
            yield {"served": served}
            return
        with page_browser.static_site(tmp_path_factory.mktemp("site")) as static:
            yield {"served": served, "static": static}


@pytest.fixture(scope="module")
def lines(request):
    """40 of 300 states, with --whole all, and what the command line says of each."""
    states = page_states.random_states(300)
    asked = states if request.config.getoption("--whole") else page_states.sample(states, 40)
    return [(state, page_states.command_line(page_states.words(state))) for state in asked]


@pytest.fixture(scope="module", params=WAYS)
def opened(request, chromium, sites):
    """A page for all tests of one way: Python is loaded once."""
    page = visited(chromium, sites[request.param])
    page.base = sites[request.param]
    yield page
    page.close()


@pytest.fixture
def page(opened):
    """The page as it is when it is opened."""
    opened.evaluate("""() => {
      document.getElementById("clear").click();
      for (const details of document.querySelectorAll("details")) details.open = false;
      history.replaceState(null, "", location.pathname);
      dispatchEvent(new HashChangeEvent("hashchange"));
    }""")
    until(opened, "document.getElementById('answer').dataset.of === '' && document.getElementById('error').hidden")
    return opened


def ask(page, **state) -> None:
    page.evaluate("(hash) => { location.hash = hash }", urlencode(state))
    answered(page)


def test_random_answers_are_the_command_line_s_to_the_byte(page, lines):
    found = page.evaluate(page_browser.ANSWERS, [urlencode(state) for state, _ in lines])
    for (state, line), here in zip(lines, found, strict=True):
        if isinstance(line, str):
            assert here == {"error": line}, state
        else:
            assert here["peak"] == line["peak"], state
            assert sorted(here["items"]) == sorted([i["part"], i["name"], i["count"], i["bytes"]] for i in line["items"])
    assert len(lines) / 2 < sum(not isinstance(line, str) for _, line in lines) < len(lines)
    assert [url for url in page.requests if not url.startswith((page.base, "data:", "blob:"))] == []  # nor any error


def test_the_first_answer_stands_there_before_python_does(chromium, sites):
    for address in sites.values():
        page = chromium.new_page(java_script_enabled=False)
        page.goto(address)
        assert "It fits." in page.inner_text("#verdict") and "Most is held at" in page.inner_text("#moment")
        assert "half the sequence" in page.inner_text("#changes")
        assert page.input_value("[name=model]") == START["model"]
        page.close()


def test_a_change_is_one_click_and_in_the_address(page):
    ask(page, **START)
    answered(page, "whole")
    page.click("[aria-label='apply: half the sequence']")
    answered(page)
    assert "seq=1024" in page.url and page.input_value("[name=seq]") == "1024"
    page.go_back()
    answered(page)
    assert page.input_value("[name=seq]") == "2048"
    page.reload()
    answered(page)
    assert page.input_value("[name=seq]") == "2048" and "--seq 2048" in page.inner_text("#command")


@pytest.mark.parametrize("name, typed", [("rank", "0"), ("rank", "many"), ("model", "llama-3-9b"), ("seq", "999999"),
                                         ("targets", "query")])
def test_what_is_wrong_is_said_in_the_command_line_s_words_and_stays(page, name, typed):
    page.fill(f"[name={name}]", typed)
    page.wait_for_selector("#error:not([hidden])", timeout=60_000)
    words = [f"--{key}={value}" for key, value in (START | {name: typed}).items()]
    line = page_states.command_line(words)
    until(page, "line => document.getElementById('error').textContent === line", line)
    assert page.input_value(f"[name={name}]") == typed
    assert all(page.input_value(f"[name={key}]") == value for key, value in START.items() if key != name)
    page.fill(f"[name={name}]", START[name])
    page.wait_for_selector("#error", state="hidden")


def give(page, name: str, content: bytes) -> None:
    page.evaluate("document.getElementById('own').open = true")
    page.set_input_files("#file", files=[{"name": name, "mimeType": "application/json", "buffer": content}])


def test_a_config_is_taken_and_a_wrong_one_refused(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    give(page, "config.json", json.dumps(CONFIG).encode())
    answered(page)
    until(page, "document.getElementById('command').textContent.includes('--config config.json')")
    assert "--model" not in page.inner_text("#command") and page.is_disabled("[name=model]")
    rest = [f"--{key}={value}" for key, value in START.items() if key != "model"]
    for content in (json.dumps(CONFIG | {"hidden_size": "wide"}), "[1, 2]", "{", '{"model_type": "llama"}'):
        (tmp_path / "config.json").write_text(content)
        line = page_states.command_line(["--config", "config.json", *rest])
        give(page, "config.json", content.encode())
        until(page, "line => document.getElementById('error').textContent === line", line)
        assert page.input_value("[name=config]") == content
    before = page.input_value("[name=config]")
    page.evaluate("""() => {
      const files = new DataTransfer();
      files.items.add(new File([new Uint8Array(50_000_000)], "config.json"));
      document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
    }""")
    with open("config.json", "wb") as f:
        f.truncate(50_000_000)
    line = page_states.command_line(["--config", "config.json", *rest])
    until(page, "line => document.getElementById('error').textContent === line", line)
    assert page.input_value("[name=config]") == before and page.input_value("[name=rank]") == START["rank"]
    page.click("#clear")
    page.wait_for_selector("#error", state="hidden")
    assert page.is_enabled("[name=model]") and page.input_value("[name=model]") == START["model"]


def test_parts_that_take_longer_come_when_they_are_opened(page):
    ask(page, **START)
    page.click("text=Every item, with its formula")
    until(page, "document.getElementById('items').textContent.includes('layers × batch × seq × hidden')")
    page.click("text=This card for all models and methods")
    until(page, "document.querySelectorAll('#models tbody tr').length > 2")
    page.click("#models a >> nth=1")
    until(page, "location.hash.includes('model=gpt3-175b')")  # no smaller model reads 2,048 tokens
    assert "method=lora" in page.url


def test_serving_asks_other_things(page):
    page.check("[name=serve]")
    until(page, "document.getElementById('command').textContent.includes('--serve')")
    page.wait_for_selector("#error:not([hidden]), #verdict")
    assert page.is_disabled("[name=seq]") and page.is_enabled("[name=prompt]")


def test_the_keyboard_is_enough(page):
    page.focus("[name=rank]")
    page.keyboard.press("Control+A")
    page.keyboard.type("32")
    until(page, "document.getElementById('command').textContent.includes('--rank 32')")
    answered(page, "whole")
    until(page, "document.getElementById('said').textContent.includes('It fits')")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "apply":
            break
    before = page.url
    page.keyboard.press("Enter")
    until(page, "was => location.href !== was", before)


def test_the_json_is_the_command_line_s(page):
    ask(page, **START)
    with page.expect_download() as download:
        page.click("#download")
    words = [f"--{key}={value}" for key, value in START.items()]
    assert json.loads(download.value.path().read_text()) == page_states.command_line(words)


@pytest.mark.skipif(not AXE.is_file(), reason="needs axe-core: npm ci")
@pytest.mark.parametrize("width, scheme, states", (
    (360, "light", (START, START | {"rank": "0"})), (1366, "dark", (START | {"model": "llama-3-70b", "method": "full"},))))
def test_it_can_be_used_by_all(chromium, sites, scheme, width, states):
    page = visited(chromium, sites["served"], color_scheme=scheme, viewport={"width": width, "height": 800})
    page.evaluate(AXE.read_text(encoding="utf-8"))
    for state in states:
        ask(page, **state)
        if state["rank"] != "0":
            answered(page, "whole")
        page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        page.wait_for_timeout(400)
        found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
        serious = [(v["id"], v["impact"], [n["html"][:150] for n in v["nodes"]][:3]) for v in found
                   if v["impact"] in ("serious", "critical")]
        assert serious == [], state
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


@pytest.mark.parametrize("width", (360, 1366, 1920))
def test_no_column_of_the_cards_is_cut_off(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    ask(page, **START)
    answered(page, "whole")
    shown, whole = page.evaluate("(({ clientWidth, scrollWidth }) => [clientWidth, scrollWidth])(document.getElementById('cards'))")
    assert whole <= shown


@pytest.mark.skipif(not (NODE_MODULES / "pyodide").is_dir(), reason="needs Pyodide: npm ci")
def test_once_loaded_it_needs_no_network(chromium, sites):
    page = visited(chromium, sites["static"])
    ask(page, **START)
    page.context.set_offline(True)
    ask(page, **(START | {"rank": "5"}))
    assert "--rank 5" in page.inner_text("#command") and page.is_hidden("#error")
    page.close()
