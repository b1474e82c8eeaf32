"""The tool that finds numbers near a rounding edge: what it takes for near, and that a watched cell prints the same."""

import math

import pytest
from edges import room, watched


@pytest.mark.parametrize("value, spec, distance", [
    (0.2349, ".2f", 0.01), (0.2351, ".2f", 0.01), (0.23, ".2f", 0.5), (12.3449, "6,.2f", 0.01), (0.12349, ".1%", 0.01),
    (0.95, ".0%", 0.5), (123449.0, ".4g", 0.01), (0.0012349, ".3g", 0.01), (1234.9, ".2e", 0.01), (-1.25, ".1f", 0.0)])
def test_how_far_the_edge_is(value, spec, distance):
    assert room(value, spec) == pytest.approx(distance, abs=2e-3)
    near = {format(value * (1 + s), spec) != format(value, spec) for s in (-1e-3, 1e-3)}
    assert any(near) == (distance < 0.1)  # a step that small makes another text of what is near


@pytest.mark.parametrize("value, spec", [(3, ".1f"), (0.5, ">9"), ("text", "5"), (math.nan, ".1f"), (math.inf, ".1f")])
def test_what_has_no_edge(value, spec):
    assert room(value, spec) is None


def test_a_watched_cell_prints_the_same(capsys):
    source = 'for x in (0.2349, 2):\n    print(f"{x:.2f} of {x!r:>8}", f"{x:{6}.1f}")'
    seen = []
    exec(source)
    plain = capsys.readouterr().out
    exec(watched(source), {"__edge__": lambda value, spec, what: seen.append((value, spec, what)) or value})
    assert capsys.readouterr().out == plain
    assert seen == [(0.2349, ".2f", "x"), (0.2349, ">8", "x"), (2, ".2f", "x"), (2, ">8", "x")]
