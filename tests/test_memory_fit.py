"""The search against trying every size; verdicts; figures."""

import json
from dataclasses import replace

import pytest

from minilora import plots
from minilora.__main__ import main
from minilora.memory import Card, ModelSpec, Training, estimate, fit
from minilora.memory.bill import timeline
from minilora.memory.cards import CARDS
from minilora.memory.fitting import CLOSE, FITS, NOT, Verdict, fewest_cards, judge, largest

SPEC, RUN = ModelSpec.preset("llama-3.2-1b"), Training(target_modules="all-linear", rank=8, seq=1024)
GIB = 2**30


def test_largest_is_what_trying_all_finds():
    for limit in range(0, 40):
        for most in (1, 7, 30):
            assert largest(lambda n: n <= limit, most) == max([n for n in range(1, most + 1) if n <= limit], default=0)


def test_the_largest_batch_and_sequence_fit_and_no_larger():
    found = fit(SPEC, RUN, "rtx-3060")
    answer = lambda **change: judge(estimate(SPEC, replace(RUN, **change)), "rtx-3060").answer
    assert 1 <= found.batch and answer(batch=found.batch) == FITS != answer(batch=found.batch + 1)
    assert 1 <= found.seq and answer(seq=found.seq) == FITS != answer(seq=found.seq + 1)


def test_the_fewest_cards_suffice_and_no_fewer_do():
    spec, run, card = ModelSpec.preset("llama-3-70b"), Training(checkpointing=True), Card.of("rtx-4090")
    n = fewest_cards(spec, run, card)
    answer = lambda cards: judge(estimate(spec, replace(run, cards=cards, zero=3)), card).answer
    assert n > 2 and answer(n) == FITS != answer(n - 1)
    # a layer of GPT-3 is 3.4 GiB: two of them and the embeddings fit no 12 GiB card, however many there are
    assert fewest_cards(ModelSpec.preset("gpt3-175b"), run, Card.of("rtx-3060")) is None


@pytest.mark.parametrize("need, usable, answer, sign", [((8, 9), (10, 12), FITS, 1), ((8, 10), (10, 12), FITS, 0),
                                                        ((8, 11), (10, 12), CLOSE, -1), ((11, 13), (10, 12), CLOSE, -1),
                                                        ((12, 13), (10, 12), CLOSE, -1), ((13, 14), (10, 12), NOT, -1)])
def test_verdicts(need, usable, answer, sign):
    verdict = Verdict(Card.of("t4"), need, usable)
    assert verdict.answer == answer and (verdict.margin > 0) - (verdict.margin < 0) == sign


def test_changes_are_ranked_and_true():
    run = Training("full", batch=4, seq=1024, dtype="float32")
    found = fit(ModelSpec.preset("gpt2-xl"), run, "rtx-4090")
    assert found.verdicts[0].answer == NOT and found.batch == 0
    saved = [change.saves for change in found.changes]
    assert saved == sorted(saved, reverse=True) and saved[-1] > 0
    by_name = {change.what: change for change in found.changes}
    lora = by_name["train adapters, not every weight (lora)"]
    assert lora.saves == found.bill.peak - estimate(ModelSpec.preset("gpt2-xl"), replace(run, method="lora")).peak
    assert "half the rank" not in by_name  # there is none in full fine-tuning


def test_175b_on_a_consumer_card():
    """No number of layers of rank reduction makes 175B fit 24 GiB; a streamed 4-bit base does."""
    found = fit(ModelSpec.preset("gpt3-175b"), Training(checkpointing=True, seq=2048, rank=4), "rtx-4090")
    assert found.verdicts[0].answer == NOT and found.batch == 0
    fits = [change.what for change in found.changes if change.answer == FITS]
    assert fits == ["stream a 4-bit base from the host", "stream the base from the host, layer by layer"]


LLAMA = ModelSpec.preset("llama-3-8b")


def test_a_card_without_flash_attention_is_priced_without():
    """A T4 and an RTX 4080 have 16 GB each. Llama-3's heads are grouped, which only torch's plain attention takes on a
    T4: all scores, in fp32. A false "fits" is what this is against."""
    bill = estimate(LLAMA, Training.of_stack("trl", method="qlora", target_modules="all-linear", seq=4096))
    new, old = (judge(bill, name) for name in ("rtx-4080", "t4"))
    assert new.answer == FITS and new.taken == "" and new.need[0] == bill.peak
    assert old.answer != FITS and old.need[0] - new.need[0] > LLAMA.heads * 4096**2 * 4
    assert "efficient attention, as it has no flash attention and float16" in str(old)
    apart = replace(LLAMA, kv_heads=LLAMA.heads)  # heads of their own: the memory-efficient kernel
    bill = estimate(apart, Training.of_stack("trl", method="qlora", target_modules="all-linear", seq=4096))
    assert judge(bill, "t4").need[0] < 1.02 * bill.peak
    run = Training.of_stack("trl", target_modules="all-linear", attention="flash", dtype="float32")
    assert "flash" not in str(judge(estimate(LLAMA, run), "a100-40"))
    assert judge(estimate(LLAMA, run), "apple-m4-16").taken.startswith("priced with plain attention")


def test_a_window_leaves_the_flash_path_where_rows_are_longer():
    """Mistral-7B-v0.1 looks 4,096 tokens back: the mask of it, once a layer and step, and keys and values repeated."""
    spec = ModelSpec.preset("mistral-7b-v0.1")
    for seq, masked in ((4095, False), (4096, True), (8192, True)):
        run = Training.of_stack("trl", target_modules="all-linear", seq=seq, checkpointing=False)
        more = estimate(spec, run).peak - estimate(replace(spec, window=0), run).peak
        assert (more > 2 * spec.layers * seq * seq) == masked
    run = Training.of_stack("trl", seq=2048)
    assert estimate(LLAMA, replace(run, rows="padded")).peak > estimate(LLAMA, run).peak
    assert estimate(LLAMA, replace(run, rows="packed", attention="flash")).peak == estimate(
        LLAMA, replace(run, attention="flash")).peak


def test_every_card_is_judged():
    found = fit(SPEC, RUN)
    assert len(found.verdicts) == len(CARDS) and found.batch is None
    order = {FITS: 0, CLOSE: 1, NOT: 2}
    for attention in {card.attention for card in CARDS.values()}:  # a card without flash attention needs more
        alike = [v for v in found.verdicts if v.card.attention == attention]
        answers = [order[v.answer] for v in sorted(alike, key=lambda v: v.usable, reverse=True)]
        assert answers == sorted(answers)


def test_the_command(capsys):
    command = "fit --model llama-3.2-1b --method qlora --targets all-linear --card rtx-4090".split()
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cards"][0]["answer"] == FITS and found["largest_batch"] >= 1
    assert main(command) == 0 and "the largest batch" in capsys.readouterr().out
    assert main([*command[:-1], "rtx4090"]) == 2
    assert "near it: rtx-4090" in capsys.readouterr().err


def test_figures_and_their_sentences(tmp_path):
    runs = {"full": Training("full", dtype="float32"), "LoRA": RUN}
    priced = {name: estimate(SPEC, run) for name, run in runs.items()}
    fig, sentence = plots.bills(priced, limit=("12 GiB", 12 * GIB))
    fig.savefig(tmp_path / "bills.png")
    assert f"full: {priced['full'].peak / GIB:.1f} GiB" in sentence
    points = timeline(SPEC, RUN)
    fig, sentence = plots.timeline(points)
    fig.savefig(tmp_path / "timeline.png")
    assert max(size for size, _ in points) == priced["LoRA"].peak and "falls in the backward" in sentence
    fig, sentence = plots.fit_grid({"1B": {name: judge(bill, "t4") for name, bill in priced.items()}}, title="T4")
    fig.savefig(tmp_path / "grid.png")
    assert sentence == "1 of 2 fits, 0 of 2 too close to call, 1 of 2 does not fit"


def test_a_long_timeline_is_drawn_with_every_peak_of_it():
    points = [(GIB * (i % 7), "forward") for i in range(5000)] + [(50 * GIB, "backward"), (0, "backward")]
    fig, sentence = plots.timeline(points)
    assert sentence == "the peak of 50.00 GiB falls in the backward, at moment 5,000 of 5,002"
    drawn = fig.axes[0].lines[0].get_ydata()
    assert len(drawn) < 700 and drawn.max() == 50 and drawn[:-1].min() == 6
