"""The calculator's page, apart from a browser: its form is the command line's, and so is its answer."""

import json
import shlex
from argparse import SUPPRESS
from dataclasses import fields
from html.parser import HTMLParser

import page_states
import pytest

from minilora.memory import ModelSpec, Serving, Training, estimate
from minilora.memory.cli import add_memory_options
from minilora.memory.fitting import CHANGES
from minilora.memory.formulas import Size, formulas, polynomial, remembered, written
from minilora.page.answer import ask, ask_json
from minilora.page.asked import START, asked
from minilora.page.document import document
from minilora.page.html import Html, joined, tag
from minilora.page.options import options, words_of
from minilora.page.parts import PARTS, tried
from minilora.refusals import Parser

VOID = ("input", "link", "meta")
CONFIG = {"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 256, "num_attention_heads": 8,
          "num_key_value_heads": 2, "intermediate_size": 700, "vocab_size": 1000, "max_position_embeddings": 4096}


class Elements(HTMLParser):
    """Reads a document; every element that is opened must be closed, in turn."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.found = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.found.append((name, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name


def page_of(state: dict, **more) -> dict:
    return json.loads(ask_json(json.dumps({"state": state, **more})))


def test_the_form_has_every_option_of_the_command_line():
    parser = Parser()
    add_memory_options(parser)
    asked_there = {action.dest for action in parser._actions if action.help != SUPPRESS} - {"help", "json"}
    page = Elements(document("served"))
    names = [a["name"] for name, a in page.found if name in ("input", "select", "textarea") and "name" in a]
    assert sorted(names) == sorted(asked_there) and set(names) == set(options())
    assert {f.name for f in (*fields(Training), *fields(Serving))} == {
        option.field for option in options().values()} - {"model", "config", "family", "card", "serve"}
    labelled = {a["for"] for name, a in page.found if name == "label" and "for" in a}
    assert {f"o-{name}" for name, option in options().items() if option.kind != "switch"} == labelled
    assert len(page.ids) == len(set(page.ids))


def test_an_option_says_what_its_dataclass_says_of_it():
    told = {name: option.about for name, option in options().items()}
    assert "8 bits" in told["double_quant"] and "share a scale" in told["group"] and "group:" not in told["double_quant"]
    assert all(told.values())


@pytest.mark.parametrize("state", page_states.random_states(12, seed=1), ids=str)
def test_the_answer_is_the_command_line_s(state):
    line, page = page_states.command_line(page_states.words(state)), page_of(state)
    assert page == {"error": line} if isinstance(line, str) else page["json"] == line


def test_the_command_that_is_shown_gives_the_same_answer():
    for state in (START, START | {"targets": r".*\.(q|v)_proj", "checkpointing": "no"},
                  {"model": "gpt2", "serve": "yes", "four_bit": "yes"}):
        page = page_of(state)
        typed = shlex.split(page["command"])
        assert typed[:2] == ["minilora", "memory"] and page_states.command_line(typed[2:]) == page["json"]


WRONG = [{"rank": "0"}, {"rank": "eight"}, {"rank": "9" * 5000}, {"rank": "-1"}, {"model": "qwen3-9b"}, {"seq": "1000000"},
         {"card": "rtx-5095"}, {"targets": "query"}, {"method": "dora"}, {"stack": "axolotl"}, {"dropout": "nan"},
         {"optimizer": "-"}, {"zero": "3"}, {"base": "disk", "checkpointing": "no"}, {"serve": "yes"}, {"prompt": "5"}, {"family": "llama"},
         {"model": "\x1b[31m"}, {"model": "-h"}, {"card": ""}]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: str(wrong)[:40])
def test_what_makes_no_sense_is_the_command_line_s_one_line(wrong):
    state = START | wrong
    typed = [{"yes": f"--{name}", "no": f"--no-{name}"}.get(value, f"--{name}={value}") for name, value in state.items()]
    line = page_states.command_line(typed)
    assert page_of(state) == {"error": line} and "\n" not in line and line.startswith("minilora memory: ")


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "9" * 5000, "[" * 100_000, "{}", '{"model_type": "llama"}', json.dumps(CONFIG),
    json.dumps(CONFIG | {"hidden_size": "wide"}), json.dumps(CONFIG | {"_name_or_path": "mine"}),
    json.dumps(CONFIG | {"quantization_config": {"load_in_4bit": True}}),
    json.dumps(CONFIG | {"x": "y" * 2**20}), "é" * 600_000], ids=lambda text: text[:30])
def test_a_config_is_read_as_the_command_line_reads_the_file(text, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    line, page = page_states.command_line(["--config", "config.json", "--seq", "64"]), page_of(
        {"config": text, "seq": "64"})
    assert page == {"error": line} if isinstance(line, str) else page["json"] == line


def test_a_file_of_50_megabytes_is_refused_by_its_size_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("config.json", "wb") as f:
        f.truncate(50_000_000)
    line = page_states.command_line(["--config", "config.json"])
    assert line.startswith("minilora memory: config.json has 50,000,000 bytes")
    assert page_of(START, size=50_000_000) == {"error": line}


def test_an_architecture_without_a_closed_form_is_named():
    said = page_of({"config": json.dumps(CONFIG | {"model_type": "bertram"})})["error"]
    assert "config.json is of model_type 'bertram'" in said and "--family llama" in said
    said = page_of({"config": json.dumps(CONFIG | {"num_local_experts": 8})})["error"]
    assert "several experts" in said and said.endswith("minilora memory --config FOLDER")


@pytest.mark.parametrize("question", [
    None, [], 5, {}, {"state": []}, {"state": {"model": 5}}, {"state": {}, "part": "all"}, {"state": {}, "part": []},
    {"state": {"help": "yes"}}, {"state": {"json": "yes"}}, {"state": {"serve": "maybe"}}, {"state": {"a" * 10_000: ""}}],
    ids=lambda question: str(question)[:40])
def test_a_question_may_be_anything(question):
    reply = ask(question)
    assert list(reply) == ["error"] and len(reply["error"]) < 1000 and reply["error"].isprintable()


def test_a_change_leads_where_it_says():
    for state in (START, START | {"stack": "unsloth", "batch": "8"}, {"model": "llama-2-7b", "method": "full", "seq": "512"}):
        was = asked(tuple(sorted(state.items())))
        found = [change for change in (tried(was, what) for what in CHANGES) if change]
        assert len(found) > 3
        for change in found:
            assert asked(change.state).bill.peak == was.bill.peak - change.saves, change.what


def test_a_long_part_comes_bit_by_bit():
    state, steps = START | {"seq": "777"}, 1
    while (reply := ask({"state": state, "part": "changes"}, budget=0.02)).get("again") and steps < 100:
        steps += 1
    assert 1 < steps < 100 and "apply" in reply["html"]["changes"]


@pytest.mark.parametrize("state", [START, {"model": "gpt2", "serve": "yes", "adapters": "2"}, {"model": "opt-175b"},
                                   START | {"stack": "minilora", "checkpointing": "yes", "base": "host"}], ids=str)
def test_every_part_is_html_that_closes(state):
    for part in PARTS:
        if part != "models" or state == START:
            for text in page_of(state, part=part).get("html", {}).values():
                Elements(text)


def test_what_is_typed_is_text():
    config = json.dumps(CONFIG | {"_name_or_path": "<img src=x onerror=alert(1)>"})
    page = page_of({"config": config, "card": "t4"})
    assert not any("<img" in text for text in page["html"].values())
    assert joined("<b>", tag("i", "&", title='"')) == '&lt;b&gt;<i title="&quot;">&amp;</i>'
    assert isinstance(tag("p"), Html)


@pytest.mark.parametrize("state", page_states.random_states(5, seed=2), ids=str)
def test_formulas_come_to_the_bytes(state):
    try:
        was = asked(tuple(sorted(state.items())))
    except ValueError:
        return
    rows, told = remembered(was.spec, was.run), formulas(was.spec, was.run)
    assert [(r.part, r.name, r.count, int(r.bytes)) for r in rows] == [
        (r.part, r.name, r.count, r.bytes) for r in was.bill.rows]
    assert set(told) == {(r.part, r.name) for r in was.bill.rows}
    values = {name: value for thing in (was.spec, was.run) for name, value in vars(thing).items()}
    for row in rows:
        terms = polynomial(row.bytes)
        if all(symbol in values for product in terms for symbol in product):  # nothing is rounded
            total = 0
            for product, factor in terms.items():
                for symbol in product:
                    factor *= values[symbol]
                total += factor
            assert total == row.bytes, (row, written(terms))


def test_formulas_of_a_known_model():
    spec, run = ModelSpec.preset("llama-3-8b"), Training(seq=1024, target_modules="all-linear", checkpointing=True)
    told = formulas(spec, run)
    assert told["frozen weights", "embed_tokens"] == "2 × hidden × vocab"
    assert told["activations", "input of a checkpointed layer"] == "2 × layers × batch × seq × hidden"
    assert told["adapters", "mlp.up_proj lora_B"] == "4 × layers × rank × ffn"
    assert estimate(spec, run).peak == sum(int(row.bytes) for row in remembered(spec, run))


def test_a_size_is_written_as_it_was_made():
    a, b = Size.named(10, "batch"), Size.named(7, "seq")
    for size, value, text in ((a * b * 2, 140, "2 × batch × seq"), (a * b // b, 10, "batch"), (-(-a // 4), 3, "⌈batch / 4⌉"),
                              (a // 4, 2, "⌊batch / 4⌋"), (a * (b - 1), 60, "batch × (seq − 1)"), (20 // a, 2, "(20 / batch)"),
                              (3 - b, -4, "-seq + 3"), (a * a // 5, 20, "batch^2 / 5"), (a - a, 0, "0")):
        assert (int(size), written(polynomial(size))) == (value, text)


def test_words_are_in_the_order_of_the_form():
    assert words_of({"seq": "5", "model": "gpt2"}) == ["--model", "gpt2", "--seq", "5"]
    assert words_of({"targets": "-x"}) == ["--targets=-x"]
