"""`minilora tune` on the help-desk base in Hugging Face's form: what it writes, that it resumes bit for bit, and what it
says when something goes wrong."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import SIZES, hf_llama
from torch import nn

from minilora import LoRAConfig, inject, load_adapter
from minilora.checkpoints import read_safetensors
from minilora.cli import main
from minilora.helpdesk import IGNORE, collate, load_base, load_task
from minilora.helpdesk import tokenizer as own_tokenizer
from minilora.memory import Training
from minilora.tuning import run as room
from minilora.tuning.batches import batches, packed, split, tokenised
from minilora.tuning.batches import collate as fill
from minilora.tuning.data import Row, read_rows
from minilora.tuning.demo import save_help_desk
from minilora.tuning.model import WithLoss, has_plain_head, load_config, load_model, load_tokenizer, scores
from minilora.tuning.plan import learning_rate, make_plan
from minilora.tuning.run import tune
from minilora.tuning.templates import Chat

pytest.importorskip("transformers")
QUICK = {"rank": 4, "steps": 4, "batch": 4, "every": 2, "lr": 1e-2}


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> str:
    return str(save_help_desk(tmp_path_factory.mktemp("desk")))


def rows_of(task: str, n: int, path: Path) -> str:
    examples = [re.fullmatch(r"<customer> (.*) <agent>", e.prompt)[1] for e in load_task(task).train[:n]]
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": e.reply}]}
            for text, e in zip(examples, load_task(task).train)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    if "writes" not in request.node.name:  # drawing takes longer than training here
        monkeypatch.setattr(room.card, "draw", lambda *_: "")


@pytest.fixture(scope="module")
def tickets(tmp_path_factory) -> str:
    return rows_of("ticket", 24, tmp_path_factory.mktemp("data") / "tickets.jsonl")


def tuned(desk, tickets, out, **choices):
    return tune(desk, tickets, str(out), say=None, **QUICK | choices)


def tensors(folder) -> dict:
    return read_safetensors(Path(folder) / "adapter_model.safetensors")[0]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------- the model and its loss


def test_the_folder_is_the_help_desk(desk):
    """Tokens, logits, chat template: as the help desk's own."""
    model, tokenizer, ours = load_model(desk), load_tokenizer(desk), load_base()
    examples = load_task("ticket").test[:8]
    ids, targets = collate(examples)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, ours(ids), atol=1e-4, rtol=0)
    path = [re.fullmatch(r"<customer> (.*) <agent>", e.prompt)[1] for e in examples]
    chat = Chat(tokenizer)
    rows = [chat.encode(Row(1, ({"role": "user", "content": text}, {"role": "assistant", "content": e.reply})))
            for text, e in zip(path, examples)]
    for mine, theirs in zip(fill(rows, tokenizer.pad_token_id), (ids, targets)):
        assert torch.equal(mine, theirs)
    for text in ("the order k482 is late .", "i have 2 of k7", "a 5 is here"):
        numbers = tokenizer(text)["input_ids"]
        assert tokenizer.decode(numbers) == own_tokenizer().decode(numbers)


def counted_rows(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(SIZES["vocab_size"], (3, 9), generator=torch.Generator().manual_seed(0))
    targets = torch.roll(ids, -1, 1)
    targets[:, :4], targets[:, -1] = IGNORE, IGNORE
    return ids, targets


def capped() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, **SIZES)).eval()


@pytest.mark.parametrize("make, narrow", [(hf_llama, True), (capped, False)])
def test_the_loss_and_its_gradients_are_transformers_own(make, narrow):
    model = make()
    ids, targets = counted_rows(model)
    net = WithLoss(model)
    assert net.narrow == has_plain_head(model) == narrow
    own = nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    own.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ours = net(ids, targets)
    ours.backward()
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-6)
    half = (targets != IGNORE).sum()
    torch.testing.assert_close(net(ids[:1], targets[:1], half) + net(ids[1:], targets[1:], half), ours.detach(),
                               rtol=1e-4, atol=1e-6)


def test_packed_rows_do_not_see_each_other(desk, tickets):
    rows = tokenised(Chat(load_tokenizer(desk)), read_rows(tickets)).rows[:5]
    net = WithLoss(load_model(desk))
    with torch.no_grad():
        apart, together = net(*fill(rows)), net(*packed(rows, 200))
        mixed = net(*((x[:, 0] if x.dim() == 3 else x) for x in packed(rows, 200)))
    assert packed(rows, 200)[0].shape[0] < 5
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert abs(mixed - apart) > 1e-3  # without positions they would


# ---------------------------------------------------------------- the plan


def test_the_rate_falls_with_the_width_and_full_takes_a_fifth():
    assert learning_rate("lora", 160) == 3e-3 and learning_rate("full", 160) == 6e-4
    assert learning_rate("qlora", 4096) == pytest.approx(2.4e-4) and learning_rate("lora", 1024) == pytest.approx(7.1e-4)


def test_a_plan_names_three_changes_each_of_which_makes_it_fit(desk):
    config = load_config(desk)
    run = Training("full", 16, "all-linear", 32, 256, dtype="float32", loss="chunked")
    peak = make_plan(config, "desk", run, torch.device("cpu")).bill.peak
    plan = make_plan(config, "desk", run, torch.device("cpu"), budget=peak // 2)
    assert not plan.fits and len(plan.ways) == 3
    known = {"--batch": "batch", "--accumulation": "accumulation", "--seq": "seq", "--rank": "rank"}
    for way in plan.ways:
        words = iter(way.split())
        change = {}
        for word in words:
            if word == "--checkpointing":
                change["checkpointing"] = True
            elif word in known:
                change[known[word]] = int(next(words))
            else:
                value = next(words)
                change[{"--method": "method", "--dtype": "dtype", "--targets": "target_modules"}[word]] = value
        assert make_plan(config, "desk", replace(run, **change), torch.device("cpu"), peak // 2).verdict.answer == "fits"
    said = plan.refusal()
    assert all(f"({i}) {way}" in said for i, way in enumerate(plan.ways, 1)) and "--anyway" in said


def test_what_does_not_fit_is_refused_or_begun_anyway(desk, tickets, tmp_path):
    with pytest.raises(ValueError, match=r"does not fit.*What would make it fit.*--anyway"):
        tuned(desk, tickets, tmp_path / "a", budget=2**20)
    assert not (tmp_path / "a").exists()
    tuned(desk, tickets, tmp_path / "a", budget=2**20, anyway=True, steps=1)
    assert tensors(tmp_path / "a")


# ---------------------------------------------------------------- a run


def test_what_a_run_writes(desk, tickets, tmp_path):
    said = []
    result = tune(desk, tickets, str(tmp_path / "a"), say=said.append, **QUICK)
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md",
        "loss.png", "log.json", "history.json"}
    assert not list((tmp_path / "a").glob("*run.safetensors")) + list((tmp_path / "a").glob("best.safetensors"))
    card = (tmp_path / "a" / "README.md").read_text()
    assert read_rows(tickets).sha256 in card and '"rank": 4' in card and "library_name: peft" in card
    assert f"| base | {result.base['loss']:.4f} |" in card and f"{result.best['loss']:.4f}" in card
    assert [entry["step"] for entry in result.history] == [0, 2, 4]
    assert result.best["loss"] < 0.7 * result.base["loss"]
    text = "\n".join(said)
    for what in ("24 rows of the form messages", "【[ code =", "plan on", "step 4 of 4", "tokens/s", "planned",
                 "validation after step 4"):
        assert what in text, text
    assert (tmp_path / "a" / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_peft_opens_it_with_the_same_logits(desk, tickets, tmp_path):
    peft = pytest.importorskip("peft")
    tuned(desk, tickets, tmp_path / "a")
    ids = torch.arange(20)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")(ids).logits
        ours = load_adapter(load_model(desk), tmp_path / "a")(ids).logits
        base = load_model(desk)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - base).abs().max() > 1e-2


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["step 3 ", "validation after step 4"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(at, desk, tickets, tmp_path):
    settings = {"dropout": 0.3}
    whole = tuned(desk, tickets, tmp_path / "whole", **settings)

    def kill(line):
        if line.startswith(at):
            raise Killed

    with pytest.raises(Killed):
        tune(desk, tickets, str(tmp_path / "a"), say=kill, **QUICK | settings)
    said = []
    again = tune(desk, tickets, str(tmp_path / "a"), say=said.append, **QUICK | settings)
    assert any(line.startswith("going on from step") for line in said)
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "whole"))
    assert again.log.loss == whole.log.loss and again.history == whole.history and again.step == whole.step


def test_what_it_does_not_overwrite(desk, tickets, tmp_path):
    tuned(desk, tickets, tmp_path / "a", steps=1)
    with pytest.raises(ValueError, match="holds an adapter already"):
        tuned(desk, tickets, tmp_path / "a", steps=1)
    with pytest.raises(ValueError, match="without a model"):
        tuned(desk, tickets, desk, steps=1)


def test_it_ends_where_validation_does_not_get_better_and_keeps_the_best(desk, tickets, tmp_path):
    result = tuned(desk, tickets, tmp_path / "a", steps=40, every=2, lr=3e-2, patience=2, schedule="constant", warmup=0)
    losses = [entry["loss"] for entry in result.history]
    assert result.stopped and result.history[-1]["step"] < 40
    assert result.step == result.history[losses.index(min(losses[1:]))]["step"] < result.history[-1]["step"]
    model = load_adapter(load_model(desk), tmp_path / "a")
    held = split(tokenised(Chat(load_tokenizer(desk)), read_rows(tickets)).rows, 0.1, 0)[1]
    assert scores(WithLoss(model), held, 4, 0)["loss"] == pytest.approx(min(losses[1:]), rel=1e-4)


def test_the_batches_are_trained_as_a_loop_written_out_does(desk, tickets, tmp_path):
    result = tuned(desk, tickets, tmp_path / "a", eval_share=0, schedule="linear", warmup=0, accumulation=2, batch=2)
    model = load_model(desk)
    torch.manual_seed(0)
    inject(model, LoRAConfig(4, 32, "all-linear"))
    data = batches(tokenised(Chat(load_tokenizer(desk)), read_rows(tickets)).rows, 4, 0, 0)
    opt, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0), []
    for step in range(4):
        opt.param_groups[0]["lr"] = 1e-2 * (1 - step / 4)
        ids, targets = data(step)
        loss = nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert result.log.loss == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_the_other_methods(method, desk, tickets, tmp_path, capsys):
    result = tuned(desk, tickets, tmp_path / "a", method=method, checkpointing=method == "qlora",
                   lr=1e-3 if method == "full" else 1e-2)
    assert result.best["loss"] < 0.8 * result.base["loss"]
    if method == "full":
        again = load_model(str(tmp_path / "a"))
        assert not (tmp_path / "a" / "adapter_config.json").exists()
        assert (again.lm_head.weight - load_model(desk).lm_head.weight).abs().max() > 1e-4
    else:
        assert main(["eval", "--adapter", str(tmp_path / "a"), "--data", tickets, "--json"]) == 0  # on the base in NF4
        said = json.loads(capsys.readouterr().out)["scores"]
        assert said[1]["loss"] < 0.8 * said[0]["loss"]


def test_going_on_from_an_adapter(desk, tickets, tmp_path):
    first = tuned(desk, tickets, tmp_path / "a")
    second = tuned(desk, tickets, tmp_path / "b", start=str(tmp_path / "a"))
    assert second.base["loss"] == pytest.approx(first.best["loss"], rel=1e-4)
    assert second.log.trained == first.log.trained


# ---------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_says_what_to_do(desk, tickets, tmp_path):
    with pytest.raises(ValueError, match=r"at step \d+ the loss is .*Try --lr 3.3e\+07 in a new --out"):
        tuned(desk, tickets, tmp_path / "a", lr=1e8, warmup=0, schedule="constant", alpha=1e6)


def test_a_full_disk_says_what_stands(desk, tickets, tmp_path, monkeypatch):
    tried = []

    def full(path, save):
        tried.append(path)
        if len(tried) > 3:
            raise OSError(28, "No space left on device")
        return write(path, save)

    write = room.write_file
    monkeypatch.setattr(room, "write_file", full)
    with pytest.raises(OSError, match=r"No space left.*free some space.*checkpoint of step \d+ stands"):
        tuned(desk, tickets, tmp_path / "a", every=2)
    monkeypatch.undo()
    assert tuned(desk, tickets, tmp_path / "a", every=2).step


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_comes_with_advice(error, desk, tickets, tmp_path, monkeypatch):
    def train(*_, **__):
        raise error

    monkeypatch.setattr(room, "train", train)
    with pytest.raises(ValueError, match=r"out of memory.*the plan was .*what takes less: \(1\) --"):
        tuned(desk, tickets, tmp_path / "a")


def test_other_errors_are_not_taken_for_these(desk, tickets, tmp_path, monkeypatch):
    def train(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(room, "train", train)
    with pytest.raises(RuntimeError, match="^a bug$"):
        tuned(desk, tickets, tmp_path / "a")


def test_a_word_that_the_tokenizer_lacks_is_named_with_its_line(desk, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "hello", "completion": " hello"}\n{"prompt": "hello", "completion": " qwertz"}\n')
    with pytest.raises(ValueError, match="rows.jsonl, line 2: "):
        tuned(desk, str(path), tmp_path / "a")


@pytest.mark.parametrize("words, said", [
    (["--model", "nothing/x/y"], "there is no folder nothing/x/y"), (["--model", "."], "holds no config.json"),
    (["--data", "nothing.jsonl"], "there is no nothing.jsonl"), (["--rank", "0"], "rank must be an integer from 1"),
    (["--method", "loar"], "no method 'loar'.*near: lora"), (["--targets", "q_prj"], "q_prj"),
    (["--batch", "25"], "a step takes 25 rows and there are 22"), (["--seq", "300"], None),
    (["--eval-share", "1"], r"eval_share must be in \[0, 1\)"), (["--device", "tpu"], "device must be cuda"),
    (["--dtype", "int8"], "no dtype 'int8'"), (["--budget", "24"], "budget must be a size")])
def test_a_wrong_line_is_one_line(words, said, desk, tickets, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = {"--model": desk, "--data": tickets, "--out": "a", "--steps": "1"} | dict([words])
    code = main(["tune", *(word for pair in line.items() for word in pair)])
    out, err = capsys.readouterr()
    if said is None:
        assert code == 0 and "saved to a" in out
    else:
        assert code == 2 and err.count("\n") == 1 and re.search(said, err), err
