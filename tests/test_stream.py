"""The streamed decoder: the ordinary one's numbers, two layers' memory, a store that is whole or refused."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small import IDS, SIZES, logits, roundings, shake

from minilora import (
    LoRAConfig,
    fingerprint,
    inject,
    load_adapter,
    lora_parameters,
    merge,
    plan,
    remove,
    report,
    save_adapter,
    weight_store,
)
from minilora import losses as losses_room
from minilora.__main__ import main
from minilora.injection import adapter_layers
from minilora.llama import Cache, Llama, LlamaConfig
from minilora.losses import masked_cross_entropy
from minilora.memory import ModelSpec, Training, estimate
from minilora.memory.costs import moved
from minilora.memory.decoders.decoder import LOSS_CHUNK
from minilora.memory.tracer import fake, trace
from minilora.peft_methods import IA3, BitFit, PromptTuning
from minilora.quant import quantise_model
from minilora.stream import StreamedLlama
from minilora.stream_run import bytes_of
from minilora.train import train
from minilora.weight_store import Source, Store, build_store

SHAPE = SIZES | {"num_hidden_layers": 5, "num_key_value_heads": 2}
CONFIG = LlamaConfig(**SHAPE, attention_bias=True, attention_out_bias=True)
QV = ("q_proj", "v_proj")


def batches(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids, targets = (torch.randint(64, (2, 9), generator=generator) for _ in range(2))
    return ids, targets.masked_fill(torch.rand(2, 9, generator=generator) < 0.3, -100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint in bf16, beside it its stores "dense" and "nf4"."""
    folder = tmp_path_factory.mktemp("stream")
    model = Llama(CONFIG, seed=0).bfloat16()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.1) if name.endswith("bias") else p.mul_(4 if p.dim() == 2 else 1)  # so that layers matter
    model.save_pretrained(folder / "model")
    build_store(folder / "model", folder / "dense")
    build_store(folder / "model", folder / "nf4", "nf4")
    return folder


def pair(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Llama, StreamedLlama]:
    """The ordinary decoder and the streamed one, both computing in `dtype` on the same stored weights."""
    whole = Llama.from_pretrained(folder / "model", dtype)
    if kind == "nf4":
        quantise_model(whole)
    return whole, StreamedLlama(Store.open(folder / kind), dtype=dtype)


def loss_of(model: Llama):
    return StreamedLlama.loss if isinstance(model, StreamedLlama) else masked_cross_entropy


def far(a, b) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


# The same numbers


def same_start(models: tuple[Llama, StreamedLlama], dtype: torch.dtype) -> None:
    """What trains of the first becomes what trains of the second, both in `dtype`."""
    for one, other in zip(*(list(trained(model)) for model in models), strict=True):
        one.data = one.detach().to(dtype)
        other.data = one.detach().clone()


def trained(model: torch.nn.Module):
    """The parameters that train, and what PiSSA subtracts: its singular vectors turn with the last bit of a weight."""
    yield from lora_parameters(model)
    for layer in adapter_layers(model).values():
        yield from layer.buffers(recurse=False)


def adapted(models: tuple[Llama, StreamedLlama], settings: dict, dtype: torch.dtype) -> tuple[Llama, StreamedLlama]:
    """Both with the very same adapters, away from their start."""
    for model in models:
        torch.manual_seed(0)
        inject(model, LoRAConfig(4, 8, **settings)).train()
    shake(models[0], 0.02)
    same_start(models, dtype)
    return models


EVERY_KIND = pytest.mark.parametrize("settings", [
    {"target_modules": QV}, {"target_modules": "all-linear", "dropout": 0.2}, {"use_dora": True}, {"init": "pissa"},
    {"target_modules": ("embed_tokens", "lm_head", "down_proj")}], ids=str)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@EVERY_KIND
def test_the_first_step_and_generation(folder, kind, settings, monkeypatch):
    monkeypatch.setattr(losses_room, "LOSS_CHUNK", 5)  # 18 tokens in four chunks
    found = []
    for model in adapted(pair(folder, kind), settings, torch.float32):
        torch.manual_seed(0)
        loss = loss_of(model)(model, *batches(99))
        loss.backward()
        grads = [p.grad.clone() for p in lora_parameters(model)]
        found.append((loss.detach(), grads, logits(model.eval()), model.generate(IDS[:, :5], 6)))
    (loss, grads, out, said), (loss2, grads2, out2, said2) = found
    assert roundings(loss2, loss) <= 10 and roundings(grads2, grads) <= 100 and roundings(out2, out) <= 100
    assert min(g.abs().max() for g in grads) > 1e-5  # the comparison is of something
    assert torch.equal(said, said2)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@EVERY_KIND
def test_ten_steps_of_training(folder, kind, settings, monkeypatch):
    """In fp64: ten steps at this rate make of the last bit of an fp32 number its fifth digit."""
    monkeypatch.setattr(losses_room, "LOSS_CHUNK", 5)
    found = []
    for model in adapted(pair(folder, kind, torch.float64), settings, torch.float64):
        start = [p.detach().clone() for p in lora_parameters(model)]
        log = train(model, batches, steps=10, lr=1e-2, progress=False, loss=loss_of(model))
        assert far(start, lora_parameters(model)) > 0.01
        found.append((log.loss, lora_parameters(model), logits(model.eval()), model.generate(IDS[:, :5], 6)))
    (losses, adapters, out, said), (losses2, adapters2, out2, said2) = found
    assert losses == pytest.approx(losses2, abs=1e-10)
    assert far(adapters, adapters2) <= 1e-10 and far([out], [out2]) <= 1e-9 and torch.equal(said, said2)


def test_the_comparison_can_fail(folder):
    """One layer's weights in another's place are seen; so is a slot that is overwritten too early."""
    whole, streamed = pair(folder, "dense")
    expected = logits(whole)
    first, second = streamed.visits.shards[1:3]
    for a, b in zip(first, second):
        a.rest, b.rest = b.rest, a.rest
    assert far([logits(streamed)], [expected]) > 1e-3


def test_sixteen_bits_stay_sixteen_bits(folder):
    whole = Llama.from_pretrained(folder / "model")
    streamed = StreamedLlama(Store.open(folder / "dense"))
    assert roundings(logits(streamed), logits(whole)) <= 4 and logits(streamed).dtype == torch.bfloat16
    assert fingerprint(whole) == fingerprint(streamed)


def test_any_loss_on_the_logits(folder):
    """The head too comes again in backward, also when other passes came between."""
    grads = []
    for model in pair(folder, "dense"):
        torch.manual_seed(0)
        inject(model, LoRAConfig(4, 8, "all-linear"))
        shake(model)
        out = model(IDS).logsumexp(-1).sum(), model(IDS.flip(1)).logsumexp(-1).square().sum()
        model.generate(IDS[:, :3], 2)
        sum(out).backward()
        grads.append([p.grad for p in lora_parameters(model)])
    assert roundings(*grads) <= 100


def test_a_cache_that_is_fed_in_pieces(folder):
    whole, streamed = pair(folder, "nf4")
    cache = Cache(8)
    with torch.no_grad():
        out = torch.cat([streamed(piece, cache) for piece in IDS.split([3, 1, 4], dim=1)], dim=1)
        assert roundings(out, whole(IDS)) <= 100


def test_adapters_travel_both_ways(folder, tmp_path):
    whole, streamed = pair(folder, "dense")
    inject(streamed, LoRAConfig(4, 8, "all-linear"))
    shake(streamed)
    expected = logits(streamed)
    save_adapter(streamed, tmp_path / "a")
    assert roundings(logits(load_adapter(whole, tmp_path / "a")), expected) <= 100  # the fingerprint is the base's
    again = StreamedLlama(Store.open(folder / "dense"), dtype=torch.float32)
    before = logits(again)
    assert torch.equal(logits(load_adapter(again, tmp_path / "a")), expected)
    assert torch.equal(logits(remove(again)), before) and not torch.equal(before, expected)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_few_layers_and_tied_heads(layers, tied):
    config = LlamaConfig(**SIZES | {"num_hidden_layers": layers}, tie_word_embeddings=tied)
    source = Source(config, torch.float32, seed=3)
    streamed, whole = StreamedLlama(Store.make(source), dtype=torch.float64), Llama(config).double()
    whole.load_state_dict({name: source.weight(name, t, "cpu") for name, t in source.plain.state_dict().items()
                           if not (tied and name == "lm_head.weight")}, strict=not tied)
    for model in (whole, streamed):
        inject(model, LoRAConfig())
    same_start((whole, streamed), torch.float64)
    for model in (whole, streamed):
        train(model, batches, steps=3, lr=1e-2, progress=False, loss=loss_of(model))
    assert far(lora_parameters(whole), lora_parameters(streamed)) <= 1e-10
    assert torch.equal(whole.generate(IDS, 4), streamed.generate(IDS, 4))


def test_loss_without_gradients_or_targets(folder):
    whole, streamed = pair(folder, "dense")
    ids, targets = batches(0)
    with torch.no_grad():
        found = [loss_of(model)(model, ids, targets) for model in (whole, streamed)]
        assert roundings(*found) <= 10
    assert not streamed.loss(ids, targets).requires_grad  # nothing trains yet
    assert streamed.loss(ids, torch.full_like(ids, -100)).isnan()  # as torch's cross_entropy


@pytest.mark.parametrize("method", [BitFit(), IA3(), PromptTuning(3)], ids=str)
def test_the_relatives_train_on_it_too(folder, method):
    found, models = [], pair(folder, "nf4", torch.float64)
    for model in models:
        inject(model, method)
    same_start(models, torch.float64)
    for model in models:
        train(model, batches, steps=3, lr=1e-2, progress=False, loss=loss_of(model))
        found.append(lora_parameters(model))
    assert far(*found) <= 1e-10 and max(p.grad is None for p in found[1])


# What moves and what is held


def test_what_is_on_the_device_and_what_moves(folder):
    """At any time at most two shards; in a steady step 2 L - 3 layers, the head and a row a token."""
    _, model = pair(folder, "dense")
    inject(model, LoRAConfig())
    layers, seen, order = list(model.model.layers), [], []
    slots = [slot.untyped_storage().data_ptr() for slot in model.visits.slots]

    def look(i: int) -> None:
        order.append(i)
        on_device = [n for n, block in enumerate(layers)
                     if block.mlp.up_proj.weight.untyped_storage().data_ptr() in slots]
        seen.append(len(on_device) + (model.lm_head.weight.untyped_storage().data_ptr() in slots))

    model.visits.on_fetch = look
    train(model, batches, steps=1, lr=1e-2, progress=False, loss=StreamedLlama.loss)
    assert order == [0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0] and max(seen) == 2
    before = replace(model.visits.traffic)
    train(model, batches, steps=1, lr=1e-2, progress=False, loss=StreamedLlama.loss)
    after = model.visits.traffic
    assert after.visits - before.visits == 2 * 5 - 3 + 1
    run = Training(seq=9, batch=2, checkpointing=True, base="disk")  # it is 16 bits that move, though fp32 computes
    assert after.bytes - before.bytes == sum(moved(ModelSpec.from_config(CONFIG.to_hf()), run).values())


def test_the_store_has_the_bytes_of_the_plan(folder):
    spec = ModelSpec.from_config(CONFIG.to_hf())
    for kind, method in (("dense", "lora"), ("nf4", "qlora")):
        run = Training(method, checkpointing=True, base="disk")
        assert Store.open(folder / kind).nbytes == estimate(spec, run).disk


@pytest.mark.parametrize("quantise, targets", [(None, QV), (None, "all-linear"), ("nf4", "all-linear")])
def test_a_traced_step_is_within_two_percent_of_the_plan(quantise, targets):
    config = LlamaConfig(2000, 512, 1376, 6, 4, max_position_embeddings=256)
    with fake():
        model = inject(StreamedLlama(Store.hollow(config, quantise)), LoRAConfig(4, 8, targets))
        adamw = torch.optim.AdamW(lora_parameters(model), lr=1e-3)
        ids, labels = (torch.randint(2000, (1, 256)) for _ in range(2))
    for _ in range(2):
        with trace() as t:
            model.loss(ids, labels).backward()
            adamw.step()
            adamw.zero_grad()
    run = Training("qlora" if quantise else "lora", 4, targets, seq=256, checkpointing=True, base="host")
    bill = estimate(ModelSpec.from_config(config.to_hf()), run)
    assert abs(t.peak / bill.peak - 1) <= 0.02
    resident = estimate(ModelSpec.from_config(config.to_hf()), replace(run, base="device"))
    assert abs(t.peak / resident.peak - 1) > 0.1  # the comparison can fail


def test_inputs_on_the_host_leave_the_device():
    spec = ModelSpec.preset("llama-2-7b")
    run = Training("qlora", seq=2048, checkpointing=True, base="disk")
    here, away = estimate(spec, run), estimate(spec, replace(run, offload=True))
    inputs = 32 * 2048 * 4096 * 2
    assert here.peak - away.peak == pytest.approx(inputs, rel=0.1) and away.host == inputs and here.host == 0
    assert sum(away.moved.values()) - sum(here.moved.values()) == 2 * inputs
    with pytest.raises(ValueError, match="offload is of a streamed run"):
        replace(run, offload=True, base="device")


def test_the_plan_knows_the_chunk():
    assert losses_room.LOSS_CHUNK == LOSS_CHUNK


def test_a_copy_that_fails_is_told_and_tried_again(folder):
    _, model = pair(folder, "dense")
    expected, copy = logits(model), model.visits.copy

    def broken(i, free):
        if i == 3:
            raise OSError("the disk is gone")
        return copy(i, free)

    model.visits.copy = broken
    with pytest.raises(OSError, match="the disk is gone"):
        logits(model)
    model.visits.copy = copy
    assert torch.equal(logits(model), expected)


# What cannot be done is refused


def test_a_streamed_base_is_read_only(folder):
    _, model = pair(folder, "dense")
    with pytest.raises(ValueError, match="weights stay where they are"):
        model.half()
    with pytest.raises(ValueError, match="nothing to train"):
        train(model, batches, steps=1, lr=1e-3, progress=False, loss=StreamedLlama.loss)
    inject(model, LoRAConfig())
    with pytest.raises(ValueError, match="cannot merge into a streamed weight"):
        merge(model)
    assert report(model).trainable == sum(p.numel() for p in lora_parameters(model))
    remove(model)
    model.model.layers[2].self_attn.q_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="requires_grad: a streamed base is read-only"):
        train(model, batches, steps=1, lr=1e-3, progress=False, loss=StreamedLlama.loss)


def test_nothing_looks_tied_that_only_shares_a_slot(folder):
    _, model = pair(folder, "dense")
    logits(model)
    assert not any(row.tied_to for row in plan(model, LoRAConfig(target_modules="all-linear")))


# The store on disk


def test_the_store_holds_the_checkpoint(folder):
    weights, found = load_file(folder / "model" / "model.safetensors"), Store.open(folder / "dense").tensors
    assert weights.keys() == found.keys() and all(torch.equal(t, found[name]) for name, t in weights.items())
    files = sorted(path.name for path in (folder / "dense").iterdir())
    assert files == ["embedding.safetensors", "head.safetensors", *(f"layer_0000{i}.safetensors" for i in range(5)),
                     "store.json"]
    held = Store.open(folder / "nf4", hold=True)
    assert all(torch.equal(t.view(torch.uint8), held.tensors[name].view(torch.uint8))
               for name, t in Store.open(folder / "nf4").tensors.items())


def test_random_weights_are_those_of_the_seed(tmp_path):
    build_store(CONFIG, tmp_path / "a", seed=1)
    a, b, c = Store.open(tmp_path / "a"), Store.make(Source(CONFIG, seed=1)), Store.make(Source(CONFIG, seed=2))
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(a.tensors[name], b.tensors[name]) and not torch.equal(a.tensors[name], c.tensors[name])
    assert a.tensors[name].float().std().item() == pytest.approx(0.02, rel=0.1)


def interrupted(monkeypatch, folder: Path, shards: int) -> None:
    """Build a store that is stopped after so many shards, in the middle of writing the next."""
    count, save = iter(range(99)), weight_store.save_tensors

    def stop(tensors, path, metadata):
        if next(count) == shards:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(tensors, path, metadata)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(weight_store, "save_tensors", stop)
        build_store(CONFIG, folder, "nf4")


@pytest.mark.parametrize("shards", [0, 1, 4])
def test_an_interrupted_build_is_refused_by_name_and_goes_on(tmp_path, monkeypatch, shards):
    interrupted(monkeypatch, tmp_path, shards)
    files = list(tmp_path.glob("*.safetensors"))
    missing = ["embedding", "layer_00000", "", "", "layer_00003"][shards]
    with pytest.raises(ValueError, match=f"not complete: it lacks {missing}.safetensors and {6 - shards} more"):
        Store.open(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in files}
    build_store(CONFIG, tmp_path, "nf4")
    assert all(path.stat().st_mtime_ns == at for path, at in before.items()) and len(files) == shards
    whole = Store.make(Source(CONFIG), "nf4").tensors
    assert all(torch.equal(t.view(torch.uint8), whole[name].view(torch.uint8))
               for name, t in Store.open(tmp_path).tensors.items())


KILLED = """
import sys
from minilora.llama import LlamaConfig
from minilora.weight_store import build_store
print("go", flush=True)
build_store(LlamaConfig(64, 256, 512, 40, 4), sys.argv[1], "nf4")
"""


def test_a_killed_build_leaves_no_half_shard(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "go\n"
    while len(list(tmp_path.glob("store/*.safetensors"))) < 3 and child.poll() is None:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with pytest.raises(ValueError, match=r"not complete: it lacks layer_000\d\d.safetensors"):
        Store.open(tmp_path / "store")
    config = LlamaConfig(64, 256, 512, 40, 4)
    build_store(config, tmp_path / "store", "nf4")
    assert Store.open(tmp_path / "store").nbytes == Store.make(Source(config), "nf4").nbytes


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def of_another(path: Path) -> None:
    build_store(CONFIG, path.parent.parent / "other", seed=7)
    path.write_bytes((path.parent.parent / "other" / path.name).read_bytes())


@pytest.mark.parametrize("damage, said", [(flip, "is damaged: its bytes are not those that were written"),
                                          (cut, "is damaged or not a safetensors file"),
                                          (of_another, "is a shard of another store"),
                                          (Path.unlink, "lacks layer_00002.safetensors")])
def test_a_damaged_shard_is_refused_before_anything_runs(tmp_path, damage, said):
    build_store(CONFIG, tmp_path / "store")
    damage(tmp_path / "store" / "layer_00002.safetensors")
    with pytest.raises(ValueError, match="layer_00002.safetensors" if damage is not Path.unlink else said) as told:
        Store.open(tmp_path / "store")
    assert said in str(told.value)


def test_another_recipe_in_the_same_folder_is_refused(folder, tmp_path):
    build_store(CONFIG, tmp_path)
    for other in (lambda: build_store(CONFIG, tmp_path, "nf4"), lambda: build_store(CONFIG, tmp_path, seed=1),
                  lambda: build_store(folder / "model", tmp_path)):
        with pytest.raises(ValueError, match="holds another store"):
            other()
    with pytest.raises(ValueError, match="no store.json"):
        Store.open(folder / "model")
    with pytest.raises(ValueError, match="quantise must be None or one of nf4, int4, got 'nf8'"):
        build_store(CONFIG, tmp_path / "b", "nf8")
    (tmp_path / "store.json").write_text('{"config": {}}')
    with pytest.raises(ValueError, match="store.json is damaged"):
        Store.open(tmp_path)


def test_a_disk_that_is_too_small_is_told_before(tmp_path):
    with pytest.raises(ValueError, match=r"needs [\d,.]+ TiB more, and the disk of .* has"):
        build_store(LlamaConfig(64, 2**17, 2**19, 96, 4), tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


FULL = """
import resource, signal, sys
from minilora.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
sys.exit(main(["stream", "--config", sys.argv[1], "--store", sys.argv[2], "--seq", "8"]))
"""


def test_a_write_that_fails_leaves_nothing_under_the_final_name(folder, tmp_path):
    """A real failing write: files may not grow beyond 10,000 bytes, as on a full disk."""
    done = subprocess.run([sys.executable, "-c", FULL, str(folder / "model"), str(tmp_path / "s")], text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "could not write" in done.stderr and "layer_00000.safetensors" in done.stderr
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["embedding.safetensors", "store.json"]


def test_a_checkpoint_is_read_shard_by_shard(tmp_path):
    """Building a store of 64 MiB takes the anonymous memory of a shard or two, in NF4 as in 16 bits."""
    config = LlamaConfig(64, 512, 1024, 12, 4)
    Llama(config, 0).save_pretrained(tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    script = """
import resource, sys
import torch, torch._dynamo  # which modules on the meta device import by themselves
from minilora.stream_run import bytes_of
from minilora.weight_store import build_store
torch.set_num_threads(1)
before = bytes_of("VmData")
resource.setrlimit(resource.RLIMIT_DATA, (before + int(sys.argv[3]), -1))
build_store(sys.argv[1], sys.argv[2], sys.argv[4] if sys.argv[4] != "dense" else None)
"""
    assert size > 100 * 2**20
    for kind in ("dense", "nf4"):  # the file is mapped privately, and counts as data: `size`, and a shard or two
        room = size + 60 * 2**20
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "model"), str(tmp_path / kind), str(room),
                               kind], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert Store.open(tmp_path / kind).nbytes < size


# Killed in training


TRAINED = """
import sys
import torch
from minilora import LoRAConfig, inject
from minilora.weight_store import Store
from minilora.stream import StreamedLlama
from minilora.train import train
torch.set_num_threads(1)
torch.manual_seed(0)
model = inject(StreamedLlama(Store.open(sys.argv[1])), LoRAConfig())
ids = torch.arange(24).view(3, 8)
print("go", flush=True)
log = train(model, lambda step: (ids, ids.roll(step, 1)), steps=400, lr=1e-2, checkpoint=sys.argv[2], every=5,
            progress=False, stop_at=int(sys.argv[3]), loss=StreamedLlama.loss)
"""


def test_killed_in_training_it_goes_on_from_its_checkpoint(folder, tmp_path):
    def command(name: str, until: int) -> list[str]:
        return [sys.executable, "-c", TRAINED, str(folder / "nf4"), str(tmp_path / name), str(until)]

    before = {path.name: path.read_bytes() for path in (folder / "nf4").iterdir()}
    child = subprocess.Popen(command("killed", 400), stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "go\n"
    while not (tmp_path / "killed").exists():
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    steps = len(json.loads(safe_metadata(tmp_path / "killed")["log"])["loss"])
    assert 0 < steps < 400 and {path.name: path.read_bytes() for path in (folder / "nf4").iterdir()} == before
    for name in ("killed", "whole"):
        subprocess.run(command(name, steps + 10), check=True, stdout=subprocess.DEVNULL)
    a, b = (load_file(tmp_path / name) for name in ("killed", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def safe_metadata(path: Path) -> dict:
    with safe_open(path, framework="pt") as f:
        return f.metadata()


# The command


def test_the_command_builds_trains_and_compares(folder, tmp_path, capsys):
    arguments = ["stream", "--config", str(folder / "model"), "--store", str(tmp_path / "s"), "--quantise", "nf4",
                 "--seq", "16", "--steps", "2", "--budget", "1GiB", "--json"]
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    assert main(arguments) == 0
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits
    said = json.loads(capsys.readouterr().out)
    assert said["moved"]["measured"] == said["moved"]["plan"] > 0 and len(said["loss"]) == 2
    assert said["peak"]["plan"] > 0 and said["seconds"]["step"] > 0
    assert Store.open(tmp_path / "s").quantise == "nf4"
    assert main(arguments[:-1]) == 0  # the store is there
    text = capsys.readouterr().out
    assert "device memory" in text and "moved a step" in text


@pytest.mark.parametrize("arguments, said", [
    (["--model", "gpt2"], "our decoder is no gpt2"),
    (["--model", "llama-2-8b"], "no model 'llama-2-8b'; near it: .*llama-2-7b"),
    (["--model", "llama-2-7b", "--budget", "many"], "budget must be a size such as 24GiB, got 'many'"),
    (["--model", "llama-2-7b", "--budget", "200MiB"], "the plan needs .* more than the budget of 200.00 MiB"),
    (["--model", "llama-2-7b", "--seq", "5000"], "more than the context"),
    (["--model", "llama-2-7b", "--base", "disk"], "base disk needs --store"),
    (["--config", "nowhere"], "there is no nowhere"),
    (["--model", "llama-2-7b", "--targets", "q_prj", "--plan"], "q_prj"),
])
def test_the_command_refuses_in_one_line(arguments, said, capsys):
    assert main(["stream", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(said, error), error


def test_the_plan_of_175b_alone(capsys):
    assert main(["stream", "--model", "gpt3-175b", "--quantise", "nf4", "--budget", "24GiB", "--targets",
                 "q_proj,v_proj", "--rank", "4", "--plan"]) == 0
    text = capsys.readouterr().out
    assert "174,566,105,088 weights" in text and "visiting weights" in text and "rtx-4090: fits" in text
    assert bytes_of("VmData") > 0


def test_a_budget_below_what_a_process_takes_is_refused(folder, capsys):
    """Below it C code that gets no memory would end the process, by a fault that Python cannot tell."""
    line = ["stream", "--config", str(folder / "model"), "--seq", "16", "--steps", "1", "--device", "cpu", "--budget"]
    for budget in ("1MiB", "3MiB", "10MiB", "30MiB"):
        assert main([*line, budget]) == 2
        said = capsys.readouterr().err
        assert "and a process on the CPU 32.00 MiB for itself: more than the budget" in said and said.count("\n") == 1


@pytest.mark.parametrize("device", ["", "quark", "meta", "gpu", "cpu:0", "cuda:-1", "cuda:x"])
def test_a_device_that_is_none(device, folder, capsys):
    assert main(["stream", "--config", str(folder / "model"), "--plan", "--device", device]) == 2
    assert "device must be cpu, cuda or cuda:NUMBER, got" in capsys.readouterr().err


def test_a_layer_that_is_cut_while_it_is_mapped_is_named(folder, tmp_path):
    """To read it would be SIGBUS, which ends the process."""
    for shard in ("layer_00003", "embedding", "head"):
        shutil.copytree(folder / "dense", tmp_path / shard)
        model = StreamedLlama(Store.open(tmp_path / shard))
        assert logits(model).isfinite().all()
        file = tmp_path / shard / f"{shard}.safetensors"
        size = file.stat().st_size
        os.truncate(file, size // 2)
        with pytest.raises(ValueError, match=f"{shard}.safetensors has changed under the run: it had {size:,} bytes"):
            logits(model)
        file.unlink()
        with pytest.raises(ValueError, match="its bytes now, got None"):
            logits(model)
    held = StreamedLlama(Store.open(folder / "dense", hold=True))  # needs no file any more
    assert not held.visits.before_copy(0) and logits(held).isfinite().all()


def test_one_builder_at_a_time(folder, tmp_path):
    with weight_store.builder_of(tmp_path):
        with pytest.raises(ValueError, match="another process is building a store in .*: wait for it, or name another"):
            build_store(folder / "model", tmp_path)
        code = f"from minilora.weight_store import build_store as b; b({str(folder / 'model')!r}, {str(tmp_path)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode != 0 and "another process is building" in done.stderr
    assert not list(tmp_path.iterdir())
    build_store(folder / "model", tmp_path)
    assert Store.open(tmp_path).nbytes == Store.open(folder / "dense").nbytes
