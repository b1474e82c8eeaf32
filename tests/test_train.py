"""The training loop: the numbers of a loop written out, resuming bit for bit, whole checkpoints, bad settings."""

import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import SIZES, our_llama
from torch import nn

from minilora import LoRAConfig, helpdesk, inject, lora_parameters
from minilora import train as loop
from minilora.helpdesk import IGNORE, batches, collate, endless_batches, evaluate, load_task, tokenizer
from minilora.helpdesk import pretraining as room
from minilora.helpdesk.pretraining import pretrain
from minilora.injection import loraplus_groups
from minilora.llama import Llama, LlamaConfig
from minilora.losses import masked_cross_entropy
from minilora.train import Log, learning_rate_factor, load_checkpoint, sealed, seed_everything, train, what_trains


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four rows that count in threes; the last six places are scored."""
    start = torch.randint(64, (4, 1), generator=torch.Generator().manual_seed(step))
    ids = (start + 3 * torch.arange(9)) % 64  # (4, 9)
    targets = ids[:, 1:].clone()
    targets[:, :2] = IGNORE
    return ids[:, :-1], targets


def adapted(dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    torch.manual_seed(0)
    return inject(our_llama().to(dtype), LoRAConfig(4, 8, **settings))


def run(model: nn.Module, **settings) -> Log:
    return train(model, data, **({"steps": 12, "lr": 1e-2, "warmup": 3, "progress": False} | settings))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def numbers(log: Log) -> tuple:
    return log.loss, log.lr, log.grad_norm, log.trained


# The loop


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_loop_written_out_gives_the_same(clip):
    ours, plain = our_llama().double(), our_llama().double()
    log = run(ours, clip=clip, weight_decay=0.1)
    opt, norms, losses = torch.optim.AdamW(plain.parameters(), weight_decay=0.1), [], []
    for step in range(12):
        rate = 1e-2 * ((step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 9)))
        opt.param_groups[0]["lr"] = rate
        ids, targets = data(step)
        picked = plain(ids).log_softmax(-1)[targets != IGNORE]
        loss = -picked.gather(1, targets[targets != IGNORE][:, None]).mean()
        opt.zero_grad()
        loss.backward()
        norms.append(torch.stack([p.grad.norm() for p in plain.parameters()]).norm().item())
        losses.append(loss.item())
        if clip:
            for p in plain.parameters():
                p.grad.mul_(min(1, clip / (norms[-1] + 1e-6)))
        opt.step()
        assert log.lr[step] == pytest.approx(rate)
    assert log.loss == pytest.approx(losses, rel=1e-10) and log.grad_norm == pytest.approx(norms, rel=1e-10)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    assert len(log.loss) == 12 and log.seconds > 0 and log.trained == sum(p.numel() for p in plain.parameters())


def test_what_does_not_require_grad_stays():
    model = adapted()
    adapters = lora_parameters(model)
    before, base = [p.detach().clone() for p in adapters], [p for p in model.parameters() if not p.requires_grad]
    kept = [p.clone() for p in base]
    log = run(model)
    assert log.trained == sum(p.numel() for p in adapters) and equal(base, kept)
    assert not any(torch.equal(a, b) for a, b in zip(adapters, before, strict=True))
    assert all(p.grad is None for p in model.parameters()) and model.training


def test_gradients_that_were_there_before_do_not_count():
    fresh, stale = our_llama(), our_llama()
    (1000 * stale(data(99)[0]).sum()).backward()
    assert numbers(run(fresh)) == numbers(run(stale)) and equal(weights(fresh), weights(stale))


def test_the_seed_decides_dropout():
    logs = [numbers(run(adapted(dropout=0.5), seed=seed)) for seed in (1, 1, 2)]
    assert logs[0] == logs[1] != logs[2]
    draws = []
    for _ in range(2):
        seed_everything(3)
        draws.append((random.random(), torch.rand(()).item()))
    assert draws[0] == draws[1]


def test_it_learns():
    model = our_llama()
    held_out = collate_of(range(1000, 1010))
    before = masked_cross_entropy(model, *held_out).item()
    log = run(model, steps=150, lr=1e-2)
    assert before > 4 and masked_cross_entropy(model, *held_out).item() < 0.5 and log.loss[-1] < 0.5


def collate_of(steps: range) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(map(torch.cat, zip(*map(data, steps))))


def test_on_step_sees_gradients_and_the_weights_of_so_many_steps():
    model, seen = our_llama(), []

    def look(step, given, log):
        assert given is model and len(log.loss) == len(log.lr) == len(log.grad_norm) == step + 1
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        assert norm == pytest.approx(min(log.grad_norm[-1], 0.5), rel=1e-4)  # clipped
        seen.append((step, weights(model)))

    run(model, on_step=look, clip=0.5)
    assert [step for step, _ in seen] == list(range(12)) and equal(seen[0][1], weights(our_llama()))
    for steps in (1, 5):
        part = our_llama()
        run(part, stop_at=steps, clip=0.5)
        assert equal(seen[steps][1], weights(part))


# Schedules and groups


@pytest.mark.parametrize("schedule, middle, end", [("constant", 1, 1), ("linear", 0.5, 0.01), ("cosine", 0.5, 0)])
def test_schedules(schedule, middle, end):
    factor = [learning_rate_factor(step, 110, 10, schedule) for step in range(110)]
    assert factor[:10] == pytest.approx([0.1 * i for i in range(1, 11)]) and factor[10] == 1
    assert factor[60] == pytest.approx(middle) and factor[109] == pytest.approx(end, abs=1e-3)
    assert all(a >= b > 0 for a, b in zip(factor[10:], factor[11:]))
    assert learning_rate_factor(0, 5, 0, schedule) == 1 and learning_rate_factor(3, 4, 10, schedule) == 0.4
    log = run(our_llama(), schedule=schedule, warmup=0, steps=4)
    assert log.lr == [1e-2 * learning_rate_factor(step, 4, 0, schedule) for step in range(4)]


def test_groups_have_their_own_learning_rates():
    model, rates = adapted(), []

    class Watched(torch.optim.AdamW):
        def step(self):
            rates.append([group["lr"] for group in self.param_groups])
            super().step()

    log = run(model, parameters=loraplus_groups(model, 1e-3, 16), optimizer=Watched, schedule="linear")
    assert log.lr == [slow for slow, _ in rates] and max(log.lr) == 1e-3
    assert [fast for _, fast in rates] == pytest.approx([16 * slow for slow in log.lr])
    # one group at both rates is the same as no group, but for the order in which the norm is summed
    grouped, plain = adapted(torch.float64), adapted(torch.float64)
    run(grouped, parameters=loraplus_groups(grouped, 1e-2, 1))
    run(plain)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(weights(grouped), weights(plain), strict=True))


def test_some_parameters_alone():
    model = our_llama()
    kept = weights(model.model)
    log = run(model, parameters=iter([model.lm_head.weight]), optimizer=torch.optim.SGD)
    assert log.trained == model.lm_head.weight.numel() and equal(weights(model.model), kept)
    assert not torch.equal(model.lm_head.weight, our_llama().lm_head.weight)


# Resuming


class Momentum(torch.optim.SGD):
    def __init__(self, groups, **settings):
        super().__init__(groups, momentum=0.9, **settings)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, Momentum, torch.optim.Adafactor])
@pytest.mark.parametrize("stops", [[1], [5], [11], [4, 7, 8]])
def test_an_interrupted_run_gives_the_same_bits(optimizer, stops, tmp_path):
    settings = {"optimizer": optimizer, "weight_decay": 0.01, "seed": 5}
    whole = adapted(dropout=0.3)
    log = run(whole, **settings)
    for stop in stops:
        torch.manual_seed(stop)  # what another process starts from
        part = run(adapted(dropout=0.3), checkpoint=tmp_path / "run.safetensors", stop_at=stop, **settings)
        assert numbers(part)[0] == log.loss[:stop]
    torch.rand(3)
    resumed = adapted(dropout=0.3)
    with torch.no_grad():
        for p in lora_parameters(resumed):
            p.normal_()  # whatever is there, the checkpoint's comes
    again = run(resumed, checkpoint=tmp_path / "run.safetensors", **settings)
    assert numbers(again) == numbers(log) and equal(weights(resumed), weights(whole))
    assert again.seconds > part.seconds


def test_resumed_groups_and_all_weights(tmp_path):
    for make in (our_llama, adapted):
        groups = (lambda model: None) if make is our_llama else (lambda model: loraplus_groups(model, 1e-3))
        whole, part = make(), make()
        log, path = run(whole, parameters=groups(whole)), tmp_path / make.__name__
        run(part, parameters=groups(part), checkpoint=path, stop_at=6)
        resumed = make()
        assert numbers(run(resumed, parameters=groups(resumed), checkpoint=path)) == numbers(log)
        assert equal(weights(resumed), weights(whole))


def test_checkpoints_are_written_on_time_and_a_finished_run_is_left_alone(tmp_path):
    path, steps, model = tmp_path / "new" / "run.safetensors", [], our_llama()

    def look(step, model, log):
        if path.exists():
            opt = torch.optim.AdamW(our_llama().parameters())
            steps.append((step, len(load_checkpoint(path, opt.param_groups[0]["params"], opt, settings).loss)))

    settings = {"steps": 12, "lr": [1e-2], "warmup": 3, "schedule": "cosine", "weight_decay": 0.0, "clip": 1.0,
                "seed": 0, "optimizer": "AdamW", "loss": "masked_cross_entropy"}
    settings |= what_trains(model, list(model.parameters()))
    run(model, checkpoint=path, every=5, on_step=look)
    assert steps == [(step, 5 if step < 10 else 10) for step in range(5, 12)]
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing else is left there
    before, after = path.read_bytes(), our_llama()
    with pytest.warns(UserWarning, match="run.safetensors holds all 12 steps of this run: nothing was left to do"):
        log = run(after, checkpoint=path)
    assert len(log.loss) == 12 and equal(weights(after), weights(model)) and path.read_bytes() == before


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    run(our_llama(), checkpoint=path, stop_at=4)
    before = path.read_bytes()

    def full(tensors, where, metadata):
        where.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(loop, "save_tensors", full)
        run(our_llama(), checkpoint=path)
    assert path.read_bytes() == before
    whole, resumed = our_llama(), our_llama()
    assert numbers(run(resumed, checkpoint=path)) == numbers(run(whole)) and equal(weights(resumed), weights(whole))


# Bad input

BAD, DAMAGED = math.nan, "is damaged or not a training checkpoint"


@pytest.mark.parametrize("settings, said", [
    ({"steps": 0}, "steps must be an integer from 1 on, got 0"), ({"steps": 2.0}, "steps must be an integer"),
    ({"steps": None}, "steps must be an integer"), ({"stop_at": 0}, "stop_at must be an integer from 1 on, got 0"),
    ({"every": 0}, "every must be an integer from 1 on"), ({"warmup": -1}, "warmup must be an integer from 0 on"),
    ({"lr": BAD}, "lr must be a positive number, got nan"), ({"lr": math.inf}, "lr must be a positive number, got inf"),
    ({"lr": 0}, "lr must be"), ({"lr": -1e-3}, "lr must be"), ({"lr": "1e-3"}, "lr must be .*, got '1e-3'"),
    ({"weight_decay": -1}, "weight_decay must be"), ({"weight_decay": BAD}, "weight_decay must be"),
    ({"clip": 0}, "clip must be a positive number or None, got 0"), ({"clip": BAD}, "clip must be"),
    ({"schedule": "cosin"}, "no schedule 'cosin', expected one of constant, linear, cosine; near: cosine"),
    ({"schedule": None}, "no schedule None"), ({"parameters": []}, "nothing to train"),
    ({"parameters": [{"params": []}]}, "nothing to train"),
    ({"parameters": [torch.zeros(3)]}, "nothing to train: `parameters` must hold tensors, each with requires_grad"),
    ({"parameters": [{"params": [nn.Parameter(torch.zeros(3))], "lr": BAD}]}, "every group's lr must be"),
])
def test_settings(settings, said):
    model = our_llama().eval()
    random_state = torch.get_rng_state()
    with pytest.raises(ValueError, match=said):
        run(model, **settings)
    assert torch.equal(torch.get_rng_state(), random_state) and not model.training
    assert equal(weights(model), weights(our_llama()))


def test_nothing_to_train():
    with pytest.raises(ValueError, match="nothing to train: no parameter has requires_grad"):
        run(our_llama().requires_grad_(False))


@pytest.mark.parametrize("spoil", ["weights", "gradients", "targets"])
def test_numbers_that_are_not_finite_end_the_run_before_they_reach_the_weights(spoil):
    model = our_llama()

    def bad(step):
        ids, targets = data(step)
        if step == 5 and spoil == "weights":
            with torch.no_grad():
                model.lm_head.weight[0] = math.inf
        if step == 5 and spoil == "gradients":  # the loss is finite, its gradient is not
            model.model.norm.weight.register_hook(lambda grad: grad * math.nan)
        return ids, torch.full_like(targets, IGNORE) if step == 5 and spoil == "targets" else targets

    with pytest.raises(ValueError, match="at step 5 the loss is .* gradient's norm .*: the learning rate 0.01 is"):
        train(model, bad, steps=9, lr=1e-2, progress=False)
    before = our_llama()
    train(before, data, steps=9, lr=1e-2, stop_at=5, progress=False)
    assert equal(weights(model.model), weights(before.model))
    assert all(p.grad is None for p in model.parameters())


def test_a_learning_rate_far_too_high():
    with pytest.raises(ValueError, match="the learning rate 1e[+]20 is too high"):
        run(our_llama(), lr=1e20, clip=None, optimizer=torch.optim.SGD)


def spoil_metadata(path, **changes):
    """The checkpoint at `path` with other metadata."""
    size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8:8 + size])["__metadata__"] | changes
    metadata = {k: v for k, v in metadata.items() if v is not None}
    if {"run", "log"} <= metadata.keys():
        metadata["sha256"] = sealed(load_file(path), metadata)
    save_file(load_file(path), path, metadata)


def spoil_tensors(path, change):
    size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata, found = json.loads(path.read_bytes()[8:8 + size])["__metadata__"], load_file(path)
    change(found)
    save_file(found, path, metadata | {"sha256": sealed(found, metadata)})


def flip_a_bit(path):
    """In the last byte of what was saved."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage, said", [
    (lambda path: path.write_bytes(b""), DAMAGED),
    (lambda path: path.write_bytes(bytes(range(256)) * 4), DAMAGED),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), DAMAGED),
    (lambda path: path.write_bytes(path.read_bytes()[:300]), DAMAGED),
    (lambda path: path.unlink() or path.mkdir(), "cannot be read: Is a directory"),
    (lambda path: save_file({"weight": torch.ones(3)}, path), DAMAGED + ": KeyError"),
    (lambda path: spoil_metadata(path, log=None), DAMAGED + ": KeyError.'log'"),
    (lambda path: spoil_metadata(path, run="{"), DAMAGED), (flip_a_bit, DAMAGED + ".*not those that were written"),
    (lambda path: path.write_bytes(path.read_bytes().replace(b'\\"seed\\": 0', b'\\"seed\\": 1')), "bytes are not those"),
    (lambda path: spoil_metadata(path, run="[1]"), DAMAGED),
    (lambda path: spoil_metadata(path, log='{"speed": 3}'), DAMAGED),
    (lambda path: spoil_metadata(path, log='{"loss": 3}'), DAMAGED),
    (lambda path: spoil_metadata(path, log='{"loss": [1, 2], "lr": [1]}'), DAMAGED),
    (lambda path: spoil_metadata(path, run="{}"), "is of another run .steps None there, 12 here"),
    (lambda path: spoil_tensors(path, lambda t: t.pop("rng")), DAMAGED + ": KeyError.'rng'"),
    (lambda path: spoil_tensors(path, lambda t: t.update(rng=torch.ones(3))), DAMAGED),
    (lambda path: spoil_tensors(path, lambda t: t.pop("param.1")), "is of a run that trains other parameters"),
    (lambda path: spoil_tensors(path, lambda t: t.update({"param.0": t["param.0"][:-1]})), "trains other parameters"),
    (lambda path: spoil_tensors(path, lambda t: t.update({"param.99": torch.ones(1)})), "trains other parameters"),
    (lambda path: spoil_tensors(path, lambda t: t.update({"state.99.exp_avg": torch.ones(1)})), "other parameters"),
    (lambda path: spoil_tensors(path, lambda t: t.update({"state.x": torch.ones(1)})), DAMAGED),
])
def test_a_damaged_checkpoint_changes_nothing(damage, said, tmp_path):
    path, model = tmp_path / "run.safetensors", adapted()
    run(adapted(), checkpoint=path, stop_at=4)
    damage(path)
    with pytest.raises(ValueError, match=said) as error:
        run(model, checkpoint=path)
    assert str(path) in str(error.value) and len(str(error.value)) < 400
    assert equal(weights(model), weights(adapted()))


@pytest.mark.parametrize("settings, said", [
    ({"steps": 13}, "steps 12 there, 13 here"), ({"lr": 2e-2}, r"lr \[0.01\] there, \[0.02\] here"),
    ({"seed": 1}, "seed 0 there, 1 here"), ({"schedule": "linear"}, "schedule cosine there, linear here"),
    ({"clip": None}, "clip 1.0 there, None here"), ({"warmup": 4}, "warmup 3 there, 4 here"),
    ({"optimizer": torch.optim.SGD}, "optimizer AdamW there, SGD here"),
    ({"weight_decay": 0.1, "seed": 2}, "weight_decay 0.0 there, 0.1 here, seed 0 there, 2 here")])
def test_the_checkpoint_of_another_run(settings, said, tmp_path):
    path, model = tmp_path / "run.safetensors", our_llama()
    run(our_llama(), checkpoint=path, stop_at=4)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"is of another run .{said}.; delete it to start afresh"):
        run(model, checkpoint=path, **settings)
    assert equal(weights(model), weights(our_llama())) and path.read_bytes() == before
    with pytest.raises(ValueError, match="is of another run .targets: .*q_proj.* only here.*; delete it"):
        run(adapted(), checkpoint=path)


def other_base() -> nn.Module:
    torch.manual_seed(0)
    model = our_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    return inject(model, LoRAConfig(4, 8))


@pytest.mark.parametrize("make, settings, said", [
    (lambda: adapted(target_modules=("q_proj", "o_proj")), {},
     "targets: .*q_proj.*|targets: model.layers.0.self_attn.v_proj, model.layers.1.self_attn.v_proj only there and "
     "model.layers.0.self_attn.o_proj, model.layers.1.self_attn.o_proj only here"),
    (lambda: adapted(use_rslora=True), {}, "scaling 2.0 there, 4.0 here, use_rslora False there, True here"),
    (lambda: adapted(use_dora=True), {}, "method LoRALinear there, DoRA.* here|method .* there, .*DoRA.* here"),
    (lambda: adapted(dropout=0.1), {}, "dropout 0.0 there, 0.1 here"),
    (lambda: adapted(alpha_pattern={"model.layers.1.self_attn.q_proj": 64}), {},
     "alpha of model.layers.1.self_attn.q_proj 8 there, 64 here, scaling of .* 2.0 there, 16.0 here"),
    (other_base, {}, "frozen weights [0-9a-f]{12} there, [0-9a-f]{12} here"),
    (adapted, {"batches": lambda step: data(step + 1)}, "other data: the batch of step 0 is not the one that it saw"),
    (adapted, {"batches": lambda step: data(step if step < 2 else step + 1)}, "other data: the batch of step 2 is not"),
    (adapted, {"loss": lambda *args: masked_cross_entropy(*args)}, "loss masked_cross_entropy there, <lambda> here"),
])
@pytest.mark.parametrize("stop_at", [4, 12])
def test_a_checkpoint_is_not_taken_for_another_runs(make, settings, said, stop_at, tmp_path):
    """Neither a finished nor an unfinished one: each of these went on from it, or returned its weights, unnoticed."""
    path, model = tmp_path / "run.safetensors", make()
    run(adapted(), checkpoint=path, stop_at=stop_at)
    before, start = path.read_bytes(), weights(model)
    with pytest.raises(ValueError, match=f"is of another run .*({said}).*; delete it to start afresh") as error:
        train(model, **({"batches": data, "steps": 12, "lr": 1e-2, "warmup": 3, "progress": False, "checkpoint": path}
                        | settings))
    assert len(str(error.value)) < 900 and "\n" not in str(error.value)
    assert equal(weights(model), start) and path.read_bytes() == before


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init": "pissa"}, {"init": "lora_fa"}, {"init": "vera"}],
                         ids=str)
def test_every_variant_goes_on_bit_for_bit_and_knows_its_frozen_part(settings, tmp_path):
    def make(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return inject(our_llama(), LoRAConfig(4, **settings))

    whole, part, path = make(), make(), tmp_path / "run.safetensors"
    log = run(whole)
    run(part, checkpoint=path, stop_at=5)
    resumed = make()
    again = run(resumed, checkpoint=path)
    assert numbers(again) == numbers(log) and equal(weights(resumed), weights(whole))


# The log and the base


def test_the_log_is_kept(tmp_path):
    log = run(our_llama())
    log.save(tmp_path / "log.json", every=5)
    kept = json.loads((tmp_path / "log.json").read_text())
    assert kept["every"] == 5 and kept["trained"] == log.trained and kept["seconds"] == pytest.approx(log.seconds)
    assert kept["loss"] == [round(log.loss[step], 6) for step in (0, 5, 10)] and len(kept["grad_norm"]) == 3


def test_pretraining_ships_both_bases_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    task = load_task("general")
    monkeypatch.setattr(room, "load_task", lambda name: helpdesk.Task(name, [], [], task.test[:4]))
    small = LlamaConfig(**(SIZES | {"vocab_size": len(tokenizer())}))
    monkeypatch.setattr(room, "LlamaConfig", lambda *_, **__: small)
    settings = {"steps": 5, "more": 3, "early": 2, "batch": 4, "lr": 1e-3, "seed": 1}
    pretrain(tmp_path / "whole", **settings)
    model, early = Llama.from_pretrained(tmp_path / "whole" / "base"), tmp_path / "whole" / "base_early"
    by_hand = Llama(model.config, 1)
    log = train(by_hand, endless_batches("general", batch=4, seed=1), steps=5, lr=1e-3, warmup=100, weight_decay=0.1,
                seed=1,
                stop_at=2, progress=False)
    assert equal(weights(Llama.from_pretrained(early)), weights(by_hand))
    card, score = (tmp_path / "whole" / "base" / "README.md").read_text(), evaluate(model, task.test[:4])
    assert f"loss {score.loss:.4f} nats a token, exact match {score.exact:.1%}" in card
    assert "python -m minilora.helpdesk.pretraining --steps 5 --more 3 --early 2 --batch 4 --lr 0.001 --seed 1" in card
    assert "stopped early" in (early / "README.md").read_text() and "stopped" not in card
    assert json.loads((early / "log.json").read_text())["loss"] == [round(log.loss[0], 6)]
    assert helpdesk.Tokenizer.load(early / "tokenizer.json").words == tokenizer().words

    def interrupted(at):
        def draw(*tasks, **settings):
            whole, before = endless_batches(*tasks, **settings), 5 * (len(tasks) - 1)
            return lambda step: whole(step) if before + step < at else 1 / 0

        return draw

    for at in (1, 4, 7):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(room, "endless_batches", interrupted(at))
            patch.setattr(room.train, "__kwdefaults__", room.train.__kwdefaults__ | {"every": 1})
            pretrain(tmp_path / "parts", **settings)
    pretrain(tmp_path / "parts", **settings)
    for name in ("base", "base_early"):
        assert (tmp_path / "parts" / name / "model.safetensors").read_bytes() == (
            tmp_path / "whole" / name / "model.safetensors").read_bytes()


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert room.main(["--folder", str(tmp_path), "--steps", "0"]) == 2
    assert capsys.readouterr().err == "minilora.helpdesk.pretraining: steps must be an integer from 1 on, got 0\n"
    assert room.main(["--folder", str(tmp_path), "--steps", "5", "--early", "5"]) == 2
    said = capsys.readouterr().err
    assert said == "minilora.helpdesk.pretraining: early must be from 0 to below the 5 steps, got 5\n"
    (tmp_path / "pretraining_1.safetensors").write_bytes(b"no checkpoint")
    assert room.main(["--folder", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "pretraining_1.safetensors is damaged or not a training checkpoint" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pretraining_1.safetensors"]


def test_a_task_is_learnt_from_its_files():
    """The loop, the desk and LoRA together: a base that knows nothing learns four examples by heart."""
    examples = load_task("catalogue").train[:4]
    model = Llama(LlamaConfig(len(tokenizer()), 48, 96, 2, 4, max_position_embeddings=64), seed=0)
    inject(model, LoRAConfig(8, 16, "all-linear"))
    assert evaluate(model, examples).exact == 0
    train(model, batches(examples, 4), steps=80, lr=2e-2, progress=False)
    assert evaluate(model, examples).exact == 1
    assert collate(examples)[0].shape == batches(examples, 4)(0)[0].shape
