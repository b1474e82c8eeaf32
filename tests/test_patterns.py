"""Patterns match as Python's `re` says, in a time that no pattern can stretch."""

import copy
import json
import pickle
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import LoRAConfig, load_adapter
from minilora.adapter_tools import inspect_adapter
from minilora.adapters import write_adapter
from minilora.config import ending
from minilora.extract import truncate_adapter
from minilora.patterns import MOST_CHARACTERS, PatternTable
from minilora.peft_format import keys_of, peft_config

ONE = st.sampled_from(["a", "b", "_", "0", r"\.", ".", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "[ab]", "[^a]",
                       "[a-c0-9]", r"[\d.]", r"[^\w.]", "\n", "é"])
REPEAT = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}", "{,2}", "{2,}"])


def composed(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(st.lists(parts, max_size=4).map("".join), parts.map("({})".format),
                     st.lists(parts, min_size=1, max_size=3).map(lambda ways: f"(?:{'|'.join(ways)})"),
                     st.builds("(?:{}){}".format, parts, REPEAT))


LOOKAHEADS = st.builds("({}{})".format, st.sampled_from(["?=", "?!"]), st.recursive(ONE, composed, max_leaves=5))
PLACES = st.sampled_from(["^", "$", r"\A", r"\Z", r"\b"])
PATTERNS = st.recursive(ONE | ONE | PLACES | LOOKAHEADS, composed, max_leaves=10)
NAMES = st.lists(st.text("ab_01.c\né ", max_size=7), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.lists(PATTERNS, min_size=1, max_size=3, unique=True), NAMES)
def test_the_first_pattern_that_python_matches_wins(patterns, names):
    try:
        table = PatternTable({p: i for i, p in enumerate(patterns)})
    except ValueError as e:
        assert "has more than 16 lookaheads" in str(e) or "has a lookahead in a lookahead" in str(e)
        return
    hits = {name: [i for i, p in enumerate(patterns) if re.fullmatch(p, name)] for name in names}
    for name, expected in hits.items():
        assert table.get(name) == (expected[0] if expected else None)
    assert table.unused(names) == [p for i, p in enumerate(patterns) if not any(i in hit for hit in hits.values())]


@pytest.mark.parametrize("pattern", [
    r".*\.(q_proj|v_proj)", r"model\.layers\.([0-9]|1[0-5])\..*_proj", r"model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*", r"^(?!.*patch_embed).*(?:gate_proj|up_proj|k_proj).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
], ids=str)
def test_patterns_that_are_in_use(pattern):
    names = [f"{stem}layers.{i}.{end}" for stem in ("model.", "visual.", "language_model.model.") for i in range(20)
             for end in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "norm", "patch_embed.q_proj")]
    table, expected = PatternTable({pattern: True}), [re.fullmatch(pattern, name) is not None for name in names]
    assert [table.get(name, False) for name in names] == expected and 0 < sum(expected) < len(names)


@pytest.mark.parametrize("pattern, said", [
    (r"(a)\1", "a reference to a group"), ("(?<=a)b", "a lookbehind"), ("(?<!a)b", "a lookbehind"),
    ("(?i)a", "the flag"), ("(?i:a)", "a flag"), ("(?>a*)b", "an atomic group"), ("a*+b", "a possessive repeat"),
    (r"a\Bb", r"\B"),
    ("(a)?(?(1)b|c)", "a condition on a group"), ("(?:a{1000}){10000}", "repeats that come to more than 20,000 copies"),
    ("(?!b)" * 17, "more than 16 lookaheads"), ("(?!a(?=b))", "a lookahead in a lookahead"),
], ids=str)
def test_what_cannot_be_bounded_is_refused_by_name(pattern, said):
    with pytest.raises(ValueError) as e:
        PatternTable({pattern: 1})
    assert str(e.value).startswith(f"the pattern {pattern!r} has {said}"[:100]) and len(str(e.value)) < 400


def test_patterns_too_long_or_no_patterns_at_all():
    for patterns, said in (({"a" * (MOST_CHARACTERS + 1): 1}, "the patterns have 2,000,001 characters in all"),
                           ({7: 1}, "a pattern must be a string, got 7"), ({"(" * 5000: 1}, "is not a regular expr")):
        with pytest.raises(ValueError, match=said) as e:
            PatternTable(patterns)
        assert len(str(e.value)) < 400


HANGS = [r"(([a-z0-9_]+)\.?)+Z", r"((((a|b|.)*)*)*)*Z", r"(.*.*.*.*.*.*)*Z", r"(a?|[a-z]?|.?){200}Z", r".*x.{900}",
         r"(?:(?:.{0,20}){0,20}){0,20}Z", r"(?!(([a-z0-9_]+)\.?)+Z).*", "(){4000000000}(a{0}){1000000000,}Z"]


@pytest.mark.parametrize("pattern", HANGS)
def test_no_pattern_hangs(pattern, tmp_path):
    """Python's own engine takes hours or for ever for most of these."""
    name, start = "model.layers.0.self_attn.q_proj", time.process_time()
    keys = keys_of(name, "linear")
    tensors = {keys["lora_A"]: torch.ones(4, 9), keys["lora_B"]: torch.ones(7, 4)}
    config = peft_config(LoRAConfig(4, target_modules=("q_proj",)))
    for setting in ({"rank_pattern": {pattern: 4}}, {"alpha_pattern": {pattern: 4}}, {"target_modules": pattern}):
        write_adapter(tmp_path, tensors, config)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | setting))
        assert inspect_adapter(tmp_path).modules[0].rank == 4
        truncate_adapter(tmp_path, tmp_path / f"{len(list(tmp_path.iterdir()))}", rank=2)
        with pytest.raises(ValueError, match="does not fit this model"):
            load_adapter(torch.nn.Sequential(torch.nn.Linear(9, 7)), tmp_path)
    assert time.process_time() - start < 20


def test_steps_are_bounded_and_not_spent_by_use(monkeypatch):
    table = PatternTable({"(a|b){40}a(a|b)*": 1})
    for name in ("ab" * 30, "ba" * 30, "a" * 60) * 200:
        assert table.get(name) == (1 if re.fullmatch("[ab]{40}a[ab]*", name) else None)
    spent = table.automaton.steps
    assert table.get("ab" * 30) is not None or table.automaton.steps == spent
    monkeypatch.setattr("minilora.patterns.MOST_STEPS", spent + 10)
    with pytest.raises(ValueError, match="need more than .* steps on these names"):
        table.get("aabb" * 20)


def test_thousands_of_patterns_take_a_moment():
    names = [f"model.layers.{i}.{end}" for i in range(126) for end in ("q_proj", "k_proj", "v_proj", "up_proj")]
    start = time.process_time()
    config = LoRAConfig(8, rank_pattern={name: i + 1 for i, name in enumerate(names)})
    assert [config.rank_of(name) for name in names] == list(range(1, len(names) + 1))
    assert time.process_time() - start < 5


def test_a_config_is_copied_and_pickled_with_its_patterns():
    config = LoRAConfig(target_modules=r".*\.q", rank_pattern={r"1\.q": 3})
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config and other.rank_of("a.1.q") == 3 and other.matches("a.q") and not other.matches("q")


def test_many_entries_take_a_moment():
    entries, start = tuple(f"x{i}" for i in range(100_000)), time.process_time()
    config = LoRAConfig(target_modules=entries)
    assert sum(config.matches(f"a.b.x{i}") for i in range(0, 200_000, 100)) == 1000
    assert time.process_time() - start < 5 and ending("a") == r"(.*\.)?(a)"
