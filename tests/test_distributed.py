"""Several processes under torchrun, on gloo: the numbers of one process, the bytes of the formula, one end for all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from distributed_worker import ADAPTER, DOUBLE, SHAPE, STEPS, VARIANTS, at_birth, model, run, variant
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from minilora import load_adapter, lora_parameters, save_adapter
from minilora.adapters import read_adapter
from minilora.distributed import WAYS, Wire, patience
from minilora.experiments import measured
from minilora.helpdesk import DATA
from minilora.llama import Llama
from minilora.memory import ModelSpec, Training, estimate

WORKER = Path(__file__).with_name("distributed_worker.py")
FILES = ("adapter_config.json", "adapter_model.safetensors")


def torchrun(processes: int, job: str, folder: Path, *rest: str, timeout: float = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               str(WORKER), job, str(folder), *rest]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process does: its folder, its log, its model."""
    folder, m = tmp_path_factory.mktemp("alone"), model(dtype=DOUBLE)
    log = run(m)
    run(model(dtype=DOUBLE), checkpoint=folder / "start.safetensors", stop_at=7)
    return folder, log, m


@pytest.fixture(scope="module", params=[2, 4])
def together(request, alone, tmp_path_factory):
    """What two and four processes do: how many, their folder, what they found."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "start.safetensors").write_bytes((alone[0] / "start.safetensors").read_bytes())
    done = torchrun(request.param, "compare", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr[-3000:]
    return request.param, folder, json.loads((folder / "compare.json").read_text())


@pytest.mark.parametrize("parallel", WAYS)
def test_the_numbers_are_those_of_one_process(parallel, together, alone):
    _, folder, found = together
    found, log = found[parallel], alone[1]
    assert len(found["double"]) == STEPS and found["trained"] == log.trained
    assert log.loss[0] - log.loss[-1] > 0.1  # it does train
    for name, steps in (("double", STEPS), ("accumulated", 5), ("resumed", STEPS)):
        assert found[name] == pytest.approx(log.loss[:steps], abs=1e-12)  # but for the order of sums, they are equal
    assert found["norm"] == pytest.approx(log.grad_norm, abs=1e-12)
    first = run(model(), stop_at=1)  # in fp32: its first step, before training amplifies what rounding does
    rounding = torch.finfo(torch.float32).eps
    assert found["single"] == pytest.approx((first.loss[0], first.grad_norm[0]), rel=20 * rounding)
    a, b = (load_file(place / FILES[1]) for place in (folder / parallel / "trained", saved(alone)))
    assert all(torch.allclose(a[key], b[key], rtol=0, atol=1e-10) for key in a | b)


def saved(alone) -> Path:
    save_adapter(alone[2], alone[0] / "trained")
    return alone[0] / "trained"


@pytest.mark.parametrize("parallel", WAYS)
@pytest.mark.parametrize("name", VARIANTS)
def test_other_kinds_of_layers(name, parallel, together):
    tolerance = {"rel": torch.finfo(torch.bfloat16).eps} if name == "16-bit" else {"rel": 0, "abs": 1e-12}
    assert together[2][parallel][name] == pytest.approx(variant(name), **tolerance)


@pytest.mark.parametrize("parallel", WAYS)
def test_the_adapter_is_the_same_file(parallel, together, alone):
    """Before the first update the numbers are the same too, so all of the file is."""
    at_birth(alone[0] / "born")
    many, one = (place / "born" for place in (together[1] / parallel, alone[0]))
    assert (many / FILES[0]).read_bytes() == (one / FILES[0]).read_bytes()
    assert parts(many / FILES[1]) == parts(one / FILES[1])
    trained = read_adapter(together[1] / parallel / "trained")
    assert {k: (t.shape, t.dtype) for k, t in trained.tensors.items()} == {
        k: (t.shape, t.dtype) for k, t in read_adapter(saved(alone)).tensors.items()}
    assert trained.base == read_adapter(saved(alone)).base and trained.config == read_adapter(saved(alone)).config
    load_adapter(Llama(SHAPE, seed=0).to(DOUBLE), together[1] / parallel / "trained")


@pytest.mark.parametrize("parallel", WAYS)
def test_one_process_goes_on_from_the_checkpoint_of_many(parallel, together, alone):
    m = model(dtype=DOUBLE)
    log = run(m, checkpoint=together[1] / parallel / "end.safetensors")
    assert log.loss == together[2][parallel]["double"]
    for mine, theirs in zip(lora_parameters(m), lora_parameters(alone[2]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def parts(path: Path) -> tuple[dict, bytes]:
    """A safetensors file's header, whose two lines of metadata the library writes in any order, and all bytes after."""
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8:8 + size]), path.read_bytes()[8 + size:]


# The wire


def bill(method: str, processes: int, zero: int, tmp_path: Path, accumulation: int = 1) -> dict[str, int]:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE.to_hf()))
    return estimate(ModelSpec.from_config(tmp_path / "config.json"), Training(
        method, ADAPTER.rank, "all-linear", batch=4, seq=8, dtype="float32", cards=processes, zero=zero,
        accumulation=accumulation)).moved


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bytes_under_ddp_are_the_closed_form_s(method, together, tmp_path):
    processes, _, found = together
    steps = found["ddp"]["sent"][method]
    expected = sum(bill(method, processes, 0, tmp_path).values())
    assert {step["all-reduce"] for step in steps} == {expected}
    # besides, each process's loss for the log
    assert steps[-1] == {"all-reduce": expected, "all-gather": 4 * (processes - 1)}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bytes_under_fsdp_are_the_closed_form_s(method, together, tmp_path):
    processes, _, found = together
    step, expected = found["fsdp"]["sent"][method][-1], bill(method, processes, 3, tmp_path)
    summed = expected.pop("gradients, summed")
    assert step["reduce-scatter"] == summed
    assert step["all-gather"] == sum(expected.values()) + 4 * (processes - 1)
    assert step["all-reduce"] < 0.01 * (step["reduce-scatter"] + step["all-gather"])  # the norms, for clipping


@pytest.mark.parametrize("parallel", WAYS)
def test_accumulation_exchanges_gradients_once(parallel, together, tmp_path):
    processes, _, found = together
    once, twice = (found[parallel]["sent"][name][-1] for name in ("double", "accumulated"))
    exchange = "all-reduce" if parallel == "ddp" else "reduce-scatter"
    assert twice[exchange] == once[exchange] > 0
    if parallel == "fsdp":  # weights visit twice
        assert twice["all-gather"] - 8 * (processes - 1) == 2 * (once["all-gather"] - 8 * (processes - 1))
        one, two = (bill("lora", processes, 3, tmp_path, accumulation) for accumulation in (1, 2))
        assert two == {what: size * (1 if what.startswith("gradients") else 2) for what, size in one.items()}


@pytest.mark.parametrize("row", measured("wire")["rows"],
                         ids=lambda row: f"{row['method']}-{row['parallel']}-{row['processes']}")
def test_the_recorded_bytes_too(row):
    """Of the help-desk base, whose table of 730 rows four processes cannot share evenly; and its losses, in fp32."""
    ddp = row["parallel"] == "ddp"
    assert row["loss_gap"] < 1e-6  # over 20 steps
    expected = estimate(ModelSpec.from_config(DATA / "base" / "config.json"), Training(
        row["method"], 8, "all-linear", batch=4, seq=64, dtype="float32", cards=row["processes"],
        zero=0 if ddp else 3)).moved
    if ddp:
        assert row["sent"]["all-reduce"] == sum(expected.values())
    else:
        summed = expected.pop("gradients, summed")
        assert row["sent"]["reduce-scatter"] == pytest.approx(summed, rel=0.01)
        assert row["sent"]["all-gather"] == pytest.approx(sum(expected.values()), rel=0.01)
        assert sum(row["sent"].values()) == pytest.approx(sum(expected.values()) + summed, rel=0.01)


@pytest.fixture()
def four():
    """Process 0 of four, whose exchanges go nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("kind, sent, exchange", [
    ("all-reduce", 6 * 16, lambda t: dist.all_reduce(t)),
    ("all-reduce", 6 * 16, lambda t: functional.all_reduce(t, "sum", dist.group.WORLD).wait()),
    ("all-gather", 3 * 64, lambda t: dist.all_gather([torch.empty_like(t) for _ in range(4)], t)),
    ("all-gather", 3 * 64, lambda t: dist.all_gather_single(t.new_empty(64), t)),
    ("all-gather", 3 * 64, lambda t: functional.all_gather_single(t, 0, dist.group.WORLD).wait()),
    ("reduce-scatter", 3 * 16, lambda t: dist.reduce_scatter_single(t.new_empty(4), t)),
    ("reduce-scatter", 3 * 16, lambda t: dist.reduce_scatter(t.new_empty(4), list(t.view(4, 4)))),
    ("reduce-scatter", 3 * 16, lambda t: functional.reduce_scatter_single(t, "sum", 0, dist.group.WORLD).wait()),
    ("broadcast", 3 * 16, lambda t: dist.broadcast(t, 0)),
    ("alltoall_base_", 3 * 16, lambda t: dist.all_to_all_single(t.clone(), t)),  # what is not known is not lost
])
def test_every_exchange_is_counted_once(kind, sent, exchange, four):
    """Sixteen numbers of four bytes: a ring passes (n - 1) / n of the whole on, an all-reduce twice."""
    with Wire() as wire:
        exchange(torch.ones(16))
        dist.barrier()
    assert wire.take() == {kind: sent} and wire.take() == {}


def test_alone_nothing_is_sent():
    with Wire() as wire:
        run(model(), parallel="fsdp", stop_at=2)
    assert wire.take() == {}


# The other verbs


def test_every_verb_is_right_or_refused_on_a_model_that_is_shared_out(tmp_path):
    done = torchrun(2, "verbs", tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "verbs.json").read_text())
    cut = found.pop("fsdp 1")
    assert cut["loaded"] <= 1e-5 and cut["moved"] > 1e-4 and "shared out over several processes" in cut["said"]
    assert len(found) == 6
    for name, got in found.items():
        assert got["losses"][-1] < got["losses"][0] and got["trainable"] > 0, name
        assert got["loaded"] <= 1e-5 and got["moved"] > 1e-3 and got["removed"], name
        if name.startswith("ddp"):
            assert got["said"].pop("merged") <= 1e-5 and set(got["said"]) == {"bank"}, name  # it has an adapter
            assert "has adapters already" in got["said"]["bank"], name
        else:
            assert set(got["said"]) == {"merge", "bank", "remove"}, name
            for verb in ("merge", "remove"):
                assert "shared out over several processes" in got["said"][verb], name


# Bad input, and bad luck


def test_what_cannot_be_shared_out_is_said(together):
    processes, _, found = together
    assert found["no parallel"].startswith(f"there are {processes} processes: say how they share the model")
    assert found["wrong parallel"] == "parallel must be None or one of ddp, fsdp, got 'dp'"
    assert found["few rows"] == f"a batch of 11 rows cannot be split into {6 * processes} (processes x accumulation)"
    assert "the learning rate 1e+30 is too high" in found["diverged"]
    assert "all processes must see the same checkpoint" in found["own checkpoint"]


def test_dropout_is_each_process_s_own_and_survives_a_restart(together):
    processes, _, found = together
    assert len(set(found["seeds"])) == processes
    assert found["dropout resumed"] == pytest.approx(found["dropout"], rel=0, abs=1e-12) and len(found["dropout"]) == 8
    assert found["dropout other"] != pytest.approx(found["dropout"], rel=0, abs=1e-3)  # other masks would be seen


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs of which process 0 of two, or the last of four, was killed at step 12; then both gone on with on two."""
    folder, ends = tmp_path_factory.mktemp("killed"), {}
    for parallel, processes, victim in (("ddp", 2, 0), ("fsdp", 4, 3)):
        done = torchrun(processes, "kill", folder, parallel, str(victim))  # gloo alone would wait for half an hour
        assert (folder / parallel / "killed").exists()
        ends[parallel] = done, load_file(folder / parallel / "adapter" / FILES[1])
    again = torchrun(2, "restart", folder)
    assert again.returncode == 0, again.stderr[-3000:]
    return folder, ends, json.loads((folder / "restart.json").read_text())


@pytest.mark.parametrize("parallel", WAYS)
def test_a_killed_process_ends_the_others_with_one_message(parallel, killed):
    done, _ = killed[1][parallel]
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("minilora:")]
    assert len(said) == 1 and "another process of this run is gone" in said[0]
    assert f"{parallel}/run.safetensors stands, at step 10: the same command goes on from there" in said[0]
    assert "distributed_worker.py" not in done.stderr.split("ChildFailedError")[0]  # no traceback of ours


def started(folder: Path, *rest: str, **environment: str) -> subprocess.Popen:
    """Two processes under torchrun, in the third step of a run that would not end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER),
               "wait", str(folder), *rest]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    until = time.monotonic() + 200
    while not (folder / "step 3").exists() or not (folder / "step 3").read_text():
        assert process.poll() is None and time.monotonic() < until, process.stderr.read()[-3000:]
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("parallel", WAYS)
def test_a_paused_process_is_waited_for_so_long_and_no_longer(parallel, tmp_path):
    process = started(tmp_path, parallel, "1", MINILORA_TIMEOUT="3")
    paused, said = int((tmp_path / "step 3").read_text()), ""
    try:
        while not said.startswith("minilora:"):  # the test's time limit is that of the line
            said = process.stderr.readline()
            assert said, "torchrun ended without a word of ours"
    finally:
        os.kill(paused, signal.SIGCONT)  # torchrun has told it to end, and would kill it after half a minute
    rest = process.communicate(timeout=60)[1]
    assert said.startswith("minilora: another process of this run has not answered for 3 s (it is paused, slow or cut "
                           "off; MINILORA_TIMEOUT sets how long to wait), so process 0 and all others end. There is no "
                           "checkpoint yet")
    assert process.returncode != 0 and "minilora:" not in rest and "distributed_worker.py\", line" not in rest


def test_ctrl_c_is_one_line_of_ours(tmp_path):
    process = started(tmp_path, "ddp")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.communicate(timeout=60)[1]
    ours = [line for line in said.splitlines() if line.startswith("minilora:")]
    assert len(ours) == 1 and ours[0].startswith("minilora: interrupted, so process ")
    assert "distributed_worker.py\", line" not in said and process.returncode != 0
    assert len(said.split("Traceback")) <= 2, said  # torchrun's own


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "nan", "inf", "1e9"])
def test_a_time_out_is_a_number_of_seconds(text, monkeypatch):
    monkeypatch.setenv("MINILORA_TIMEOUT", text)
    with pytest.raises(ValueError, match="MINILORA_TIMEOUT must be seconds, from above 0 to 1,000,000, got "):
        patience()
    monkeypatch.setenv("MINILORA_TIMEOUT", "2.5")
    assert patience() == 2.5


@pytest.mark.parametrize("parallel", WAYS)
def test_the_adapter_saved_last_is_whole_and_a_restart_ends_where_it_would_have(parallel, killed, alone, tmp_path):
    _, ends, restarted = killed
    m = model(dtype=DOUBLE)
    run(m, stop_at=10)
    save_adapter(m, tmp_path)
    left = ends[parallel][1]
    assert all(torch.allclose(left[key], t, rtol=0, atol=1e-10) for key, t in load_file(tmp_path / FILES[1]).items())
    assert restarted[parallel]["loss"] == pytest.approx(alone[1].loss, abs=1e-12)
