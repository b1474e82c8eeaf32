"""Each paper's claim and its verdict, as computed."""

import json

import pytest

from minilora.__main__ import main
from minilora.memory.claims import NOT, REPRODUCED, claims, judge

EXPECTED = {
    "1.2 TB": (NOT, "6.87 bytes a parameter"),
    "down to 350": (REPRODUCED, "349.2 GB"),
    "two thirds": (REPRODUCED, "71%"),
    "35 MB": (REPRODUCED, "18,874,368 parameters, 36.0 MiB"),
    "43.1": (REPRODUCED, "33% more tokens a second; 25% it is only as time"),
    "0.35M": (NOT, "393,216"),
    "4.127 bits": (REPRODUCED, "4.127, 0.373 less"),
    "780 GB": (REPRODUCED, "11.9 bytes a parameter"),
    "less than 48 GB": (REPRODUCED, "paged out"),
    "one card of 24 GB": (REPRODUCED, "84.8 GiB in NF4"),
}


@pytest.mark.parametrize("words", EXPECTED)
def test_the_claims(words):
    claim, = (c for c in claims() if words in c.says)
    verdict, ours = EXPECTED[words]
    assert claim.verdict == verdict and ours in claim.ours


def test_a_verdict_can_be_either():
    assert judge(1.04, 1) == judge(0.96, 1) == REPRODUCED and judge(1.06, 1) == judge(0.9, 1) == NOT


def test_the_command(capsys):
    assert main(["claims"]) == 0 and "not reproducible" in (out := capsys.readouterr().out)
    assert "8 of 10 reproduced" in out
    assert main(["claims", "--json"]) == 0 and len(json.loads(capsys.readouterr().out)) == len(EXPECTED)
