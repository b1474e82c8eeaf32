"""The experiments' instruments: the adapter's loudness at every step, power laws and Adam's twins."""

import copy

import numpy as np
import pytest
import torch
from small import our_llama

from minilora import LoRAConfig
from minilora.experiments import shipping, slope, twins, watched
from minilora.helpdesk import IGNORE, load_task
from minilora.injection import lora_layers
from minilora.train import Log

TARGETS = ("q_proj", "v_proj", "down_proj")


def data(step):
    """Four rows that count in threes."""
    start = torch.randint(64, (4, 1), generator=torch.Generator().manual_seed(step))
    ids = (start + 3 * torch.arange(9)) % 64  # (4, 9)
    targets = ids[:, 1:].clone()
    targets[:, :2] = IGNORE
    return ids[:, :-1], targets


@pytest.fixture(scope="module")
def base():
    return our_llama().double()


# What a run without a log of its own would find


def test_what_is_logged_is_what_the_weights_say(base):
    log = watched(LoRAConfig(3, 6, TARGETS), base=copy.deepcopy(base), data=data, steps=5, lr=1e-2)
    model = copy.deepcopy(base)
    watched(LoRAConfig(3, 6, TARGETS), base=model, data=data, steps=4, lr=1e-2)
    layers = lora_layers(model)
    assert len(layers) == 6 and not any(layer._forward_hooks for layer in layers.values())
    inputs, branch = {}, []
    hooks = [layer.register_forward_hook(lambda layer, i, o, name=name: inputs.update({name: i[0]}))
             for name, layer in layers.items()]
    ids, targets = data(4)
    logits = model(ids)
    picked = logits.log_softmax(-1)[targets != IGNORE].gather(1, targets[targets != IGNORE][:, None])
    (-picked.mean()).backward()
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        branch.append((layer(inputs[name]) - layer.base_layer(inputs[name])).square().mean())
    square = lambda tensors: sum(t.square().sum() for t in tensors) ** 0.5
    dense = [layer.merged_weight() - layer.base_layer.weight for layer in layers.values()]
    assert log["loss"][4] == pytest.approx(-picked.mean().item(), rel=1e-9)
    assert log["update"][4] == pytest.approx(square(dense).item(), rel=1e-9)
    assert log["grad_A"][4] == pytest.approx(square(layer.lora_A.grad for layer in layers.values()).item(), rel=1e-9)
    assert log["grad_B"][4] == pytest.approx(square(layer.lora_B.grad for layer in layers.values()).item(), rel=1e-9)
    assert log["activation"][4] == pytest.approx((sum(branch) / len(branch)).sqrt().item(), rel=1e-9)


def test_at_birth_only_b_feels_anything(base):
    log = watched(LoRAConfig(3, 6, TARGETS), base=copy.deepcopy(base), data=data, steps=2)
    assert log["update"][0] == log["activation"][0] == log["grad_A"][0] == 0 < log["grad_B"][0]
    assert all(values[1] > 0 for values in log.values())


@pytest.mark.parametrize("use_rslora, expected", [(False, -0.5), (True, 0.0)])
def test_the_first_gradient_of_b_falls_as_one_over_root_r_unless_scaled_by_root_r(base, use_rslora, expected):
    # E||s G^T X A^T||^2 = s^2 r / (3 d_in) ||G^T X||^2, whatever the gradient G (rsLoRA, theorem 3.2's argument)
    ranks, seeds = (1, 4, 16, 64, 256), range(20)  # 64 and 256 exceed the model's width of 32
    norms = [np.sqrt(np.mean([watched(LoRAConfig(r, 8, TARGETS, use_rslora=use_rslora),
                                      base=copy.deepcopy(base), seed=s,
                                      data=data, steps=1)["grad_B"][0] ** 2 for s in seeds])) for r in ranks]
    assert slope(ranks, norms) == pytest.approx(expected, abs=0.06)


# Adam's twins


@pytest.mark.parametrize("seed", range(20))
def test_adam_cannot_tell_twins_apart(base, seed):
    p, q = np.exp(np.random.default_rng(seed).uniform(-4, 4, 2))  # from 1/55 to 55
    one, other, apart = twins(base, data, LoRAConfig(4, 8, TARGETS), p, q, seed=seed)
    assert apart < 1e-10
    assert one.loss == pytest.approx(other.loss, rel=1e-12)


@pytest.mark.parametrize("p, q", [(2, 1), (1, 2), (4, 0.5), (0.125, 64)])
@pytest.mark.parametrize("seed", range(3))
def test_powers_of_two_round_nowhere_so_the_twins_are_equal_bit_for_bit(seed, p, q):
    one, other, apart = twins(our_llama(), data, LoRAConfig(4, 8, TARGETS), p, q, seed=seed)  # in fp32
    assert one.loss == other.loss and apart == 0


@pytest.mark.parametrize("broken", [{"eps": 1e-8}, {"eps": 1e-3}, {"clip": 1e-3}])
def test_what_breaks_the_twins(base, broken):
    config = LoRAConfig(4, 8, TARGETS)
    assert twins(base, data, config, 50, 20)[2] < 1e-10
    assert twins(base, data, config, 50, 20, **broken)[2] > 1e-8


def test_twins_leave_the_base_alone(base):
    before = {name: t.clone() for name, t in base.state_dict().items()}
    twins(base, data, LoRAConfig(4, 8, TARGETS), 3, 5, steps=2)
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in before.items())


# Lines


@pytest.mark.parametrize("power", [-1.5, -0.5, 0, 1])
def test_a_slope_is_the_power(power):
    x = np.array([1, 4, 16, 64, 256])
    assert slope(x, 7 * x**power) == pytest.approx(power, abs=1e-12)
    noisy = 7 * x**power * np.exp([0.1, -0.1, 0.1, -0.1, 0.1])
    assert slope(x, noisy) == pytest.approx(power, abs=0.05) and slope(x, noisy) == pytest.approx(
        np.cov(np.log(x), np.log(noisy))[0, 1] / np.var(np.log(x), ddof=1))


def test_a_candidate_is_scored_on_the_validation_file_alone(monkeypatch):
    asked, scored = {}, []

    def adapt(task, config, **settings):
        asked.update(settings, task=task, config=config)
        return shipping.Run(torch.nn.Module(), Log(trained=7), loss=9.0, exact=0.125)  # what the test file said

    monkeypatch.setattr(shipping, "adapt", adapt)
    monkeypatch.setattr(shipping, "evaluate", lambda model, examples: scored.append(examples) or (0.51236, 0.915))
    run, row = shipping.candidate("ticket", "all, rank 2, random weights", seed=1)
    assert (asked["task"], asked["base"], asked["seed"]) == ("ticket", "random", 1)
    config = asked["config"]
    assert (config.rank, config.scaling_of("up_proj"), len(config.target_modules)) == (2, 2, 7)
    assert scored == [load_task("ticket").validation] and run.exact == 0.125
    assert row == {"task": "ticket", "candidate": "all, rank 2, random weights", "rank": 2, "seed": 1, "trained": 7,
                   "loss": 0.5124, "right": 183, "of": 200}
