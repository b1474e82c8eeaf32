"""`minilora tune` beside TRL's SFTTrainer with PEFT's adapters (needs the package trl)."""

import json

import pytest
import torch

pytest.importorskip("trl")

from test_tuning_run import rows_of, tensors
from trl_run import trainer

from minilora import load_adapter
from minilora.tuning.demo import save_help_desk
from minilora.tuning.model import load_model
from minilora.tuning.run import tune

STEPS, BATCH, LR, RANK = 30, 4, 1e-3, 8


def test_thirty_steps_are_trls_and_the_adapters_change_places(tmp_path):
    desk, data = str(save_help_desk(tmp_path / "desk")), rows_of("ticket", 40, tmp_path / "rows.jsonl")
    # one step of ours, at a rate of nothing, writes the start: fresh A and B = 0 but for what 1e-12 moves
    tune(desk, data, str(tmp_path / "start"), rank=RANK, steps=1, lr=1e-12, eval_share=0, batch=BATCH, warmup=0, say=None)
    ours = tune(desk, data, str(tmp_path / "ours"), rank=RANK, steps=STEPS, batch=BATCH, lr=LR, eval_share=0, warmup=0,
                schedule="linear", start=str(tmp_path / "start"), say=None)
    theirs = trainer(desk, data, tmp_path / "theirs", steps=STEPS, batch=BATCH, lr=LR, rank=RANK, alpha=32,
                     start=str(tmp_path / "start"))
    theirs.train()
    losses = theirs.losses
    apart = max(abs(a - b) for a, b in zip(ours.log.loss, losses, strict=True))
    print(json.dumps({"largest difference of a loss": apart, "first": losses[0], "last": losses[-1]}))
    assert apart < 1e-4 and losses[-1] < losses[0] / 2
    theirs.model.save_pretrained(tmp_path / "theirs")
    mine, their = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert mine.keys() == their.keys()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        logits = [load_adapter(load_model(desk), tmp_path / who)(ids).logits for who in ("ours", "theirs")]
        in_peft = theirs.model.eval()(ids).logits
        base = load_model(desk)(ids).logits
    torch.testing.assert_close(logits[1], in_peft, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[0], logits[1], atol=2e-2, rtol=1e-2)
    assert (logits[0] - base).abs().max() > 1
