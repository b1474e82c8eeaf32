"""The list of deliberate bugs stays applicable; `python tools/mutants.py` says whether the suite sees them."""

import ast

import mutants


def test_every_bug_can_be_made_and_is_python():
    for mutant in mutants.MUTANTS:
        ast.parse(mutants.applied(mutant))  # a ValueError if the text has moved on: bring the list along
    assert len(mutants.MUTANTS) >= 40 and len(set(mutants.MUTANTS)) == len(mutants.MUTANTS)
