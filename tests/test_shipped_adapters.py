"""The adapters of data/adapters/ and what is recorded of them, merging's latency, and the scores of combinations."""

import pytest

from minilora import load_adapter, plan
from minilora.adapters import read_adapter
from minilora.experiments import SHAPES, interleaved, measured
from minilora.helpdesk import DATA, TASKS, evaluate, load_base, load_task

ROWS = {row["adapter"]: row for row in measured("adapters")["rows"]}


def test_each_recorded_adapter_is_there_and_small():
    folders = {folder.name: sum(file.stat().st_size for file in folder.iterdir())
               for folder in (DATA / "adapters").iterdir()}
    assert folders.keys() == ROWS.keys() and max(folders.values()) < 150_000


@pytest.mark.parametrize("name", ROWS)
def test_an_adapter_loads_on_its_own_base_alone(name):
    folder, row = DATA / "adapters" / name, ROWS[name]
    own, other = load_base(row["base"]), load_base({"base": "base_early", "base_early": "base"}[row["base"]])
    assert plan(own, read_adapter(folder).config).parameters == row["trained"]
    with pytest.raises(ValueError, match="other weights"):
        load_adapter(other, folder)
    load_adapter(own, folder)


def test_a_recorded_score_is_what_the_file_scores():
    score = evaluate(load_adapter(load_base(), DATA / "adapters" / "ticket"), load_task("ticket").test)
    assert score.loss == pytest.approx(ROWS["ticket"]["loss"], abs=2e-4)
    assert score.exact == pytest.approx(ROWS["ticket"]["exact"], abs=0.011)


def test_every_combination_is_recorded_once_and_agrees_with_the_adapters_own_score():
    rows = measured("combinations")["rows"]
    keys = [(row["base"], row["adapter"], row["task"]) for row in rows]
    assert len(set(keys)) == len(keys) == 3 * (1 + len(ROWS)) * len(TASKS)
    found = dict(zip(keys, rows))
    for name, row in ROWS.items():
        again = found[row["base"], name, name.removesuffix("_early")]
        assert (again["loss"], again["exact"]) == (row["loss"], row["exact"])


def test_latency_has_a_row_a_shape_and_noise_below_its_effect():
    rows = measured("latency")["rows"]
    assert [row["shape"] for row in rows] == list(SHAPES)
    assert all(row["beside"] > 1.5 * row["base again"] for row in rows if row["shape"] == "one token")


def test_interleaved_calls_each_as_often_and_tells_the_slow_from_the_quick():
    calls = {"quick": 0, "slow": 0}

    def work(name, n):
        calls[name] += 1
        sum(range(n))

    seconds = interleaved({"quick": lambda: work("quick", 10), "slow": lambda: work("slow", 300_000)}, rounds=5)
    assert calls == {"quick": 7, "slow": 7} and seconds["slow"] > seconds["quick"] >= 0
