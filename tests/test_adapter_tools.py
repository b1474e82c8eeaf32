"""inspect, truncate and extract: against the dense update, PEFT's files and outputs, and what they refuse."""

import json
import math
import re
import shutil
import time
import warnings
import weakref
from pathlib import Path
from statistics import median

import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from small import logits, shake
from torch import Tensor

from minilora import LoRAConfig, extract, fingerprint, inject, load_adapter, merge, save_adapter
from minilora.__main__ import main
from minilora.adapter_tools import inspect_adapter, plot_energy
from minilora.adapters import read_adapter, write_adapter
from minilora.extract import extract_adapter, truncate_adapter
from minilora.injection import lora_layers
from minilora.llama import Llama
from minilora.peft_format import keys_of, peft_config
from minilora.spectrum import effective_rank, energy, frobenius, product_svdvals, rank_for_energy, stable_rank


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def updates(model) -> dict[str, Tensor]:
    """scaling * B @ A of every adapted module, dense, in fp64."""
    return {name: layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
            for name, layer in lora_layers(model).items()}


def in_peft(adapter: Path, folder: Path):
    """Our Llama, saved to `folder` and opened by transformers, with the adapter opened by PEFT."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    small.our_llama().save_pretrained(folder)
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), adapter).eval()


def adapter_of(spectra: dict[str, list[float]], folder: Path, rank: int, seed: int = 0, **settings) -> Path:
    """An adapter whose modules have these singular values, at scaling 1."""
    torch.manual_seed(seed)
    tensors = {}
    for name, S in spectra.items():
        keys, S = keys_of(name, "linear"), torch.tensor(S + [0.0] * (rank - len(S)))
        U, V = (torch.linalg.qr(torch.randn(100, rank))[0] for _ in range(2))
        tensors |= {keys["lora_A"]: V.T.contiguous(), keys["lora_B"]: (U * S).contiguous()}
    config = LoRAConfig(rank, settings.pop("alpha", rank), tuple({n.rpartition(".")[2] for n in spectra}), **settings)
    write_adapter(folder, tensors, peft_config(config))
    return folder


# Inspect


@pytest.mark.parametrize("settings", [
    {}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ("embed_tokens", "q_proj")}, {"rank": 20},
    {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}}, {"init": "pissa"},
], ids=str)
def test_inspect_gives_what_the_dense_updates_have(settings, tmp_path):
    config = LoRAConfig(**{"rank": 6, "alpha": 9, "target_modules": "all-linear"} | settings)
    model = inject(small.our_llama(), config, any_rank=True)
    shake(model)
    save_adapter(model, tmp_path / "a")
    report = inspect_adapter(tmp_path / "a")
    dense = updates(load_adapter(small.our_llama(), tmp_path / "a"))  # PiSSA's is another one in the file
    layers = lora_layers(load_adapter(small.our_llama(), tmp_path / "a"))
    assert {m.name for m in report.modules} == dense.keys() and report.base == fingerprint(small.our_llama())
    for m in report.modules:
        S = torch.linalg.svdvals(dense[m.name])[:layers[m.name].rank]
        assert (m.rank, m.alpha, m.shape) == (layers[m.name].rank, layers[m.name].alpha, tuple(dense[m.name].shape))
        assert m.scaling == pytest.approx(layers[m.name].scaling)
        assert far(m.S.double(), S) < 1e-5 * S[0] and m.norm == pytest.approx(float(S.norm()), rel=1e-5)
        assert m.dead == max(0, m.rank - min(m.shape))
    assert report.file_bytes == (tmp_path / "a/adapter_model.safetensors").stat().st_size
    assert report.dtypes == ("float32",)


@pytest.mark.parametrize("family, targets", [
    ("hf_llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "mlp.c_proj"]), ("hf_llama", ["embed_tokens", "v_proj"]),
], ids=str)
def test_inspect_reads_what_peft_writes(family, targets, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, rank_pattern={targets[1]: 2},
                        init_lora_weights=False)
    theirs = get_peft_model(getattr(small, family)(), config)
    theirs.save_pretrained(tmp_path)
    deltas = {name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
              for name, module in theirs.named_modules() if hasattr(module, "get_delta_weight")}
    report = inspect_adapter(tmp_path)
    assert {m.name for m in report.modules} == deltas.keys() and report.base is None
    for m in report.modules:
        assert m.norm == pytest.approx(float(deltas[m.name].norm()), rel=1e-5)
        assert m.rank == (2 if m.name.endswith(targets[1]) else 4) and m.kind in ("linear", "embedding")
    assert len(report.others) == (targets[0] == "embed_tokens")  # PEFT's copy of the embedding itself
    if report.others:
        assert "also in the file: base_model.model.model.embed_tokens" in str(report)


def test_a_line_to_act_on(tmp_path):
    """Squares 50 25 10 8 2 2 2 1: 90% is in 4 directions, rank 4 loses 7%, rank 8 nothing."""
    S = [math.sqrt(x) for x in (50, 25, 10, 8, 2, 2, 2, 1)]
    folder = adapter_of({f"layers.{i}.up_proj": S for i in range(3)}, tmp_path / "a", 64)
    report = inspect_adapter(folder)
    assert report.advice == (8, pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert report.lost(4) == (pytest.approx(0.07), pytest.approx(0.07)) and report.lost(1)[0] == pytest.approx(0.5)
    assert report.summary.startswith("rank 64, but 90% of the energy is in 4: `python -m minilora truncate ")
    assert re.search(" OUT --rank 8` loses (0|under 0.1)% [(]at most (0|under 0.1)% in a module[)]$", report.summary)
    assert report.modules[0].dead == 56 and "168 dead directions in layers.0.up_proj, " in str(report)
    written = truncate_adapter(folder, tmp_path / "b", rank=8)
    assert written.lost < 1e-9
    again = inspect_adapter(tmp_path / "b")
    assert again.advice is None and again.summary == ("rank 8, and in use: 90% of the energy is in 4, "
                                                      "half the rank would lose 7%")


def test_the_advice_weighs_modules_by_their_energy(tmp_path):
    loud, quiet = [10.0] + [0.0] * 15, [0.1] * 16
    report = inspect_adapter(adapter_of({"a.up_proj": loud, "b.up_proj": quiet}, tmp_path / "a", 16))
    assert report.advice == (1, pytest.approx(0.15 / 100.16), pytest.approx(15 / 16))
    assert "90% of the energy is in 1 (the median module; at most 15)" in report.summary
    assert "loses 0.15% (at most 94% in a module)" in report.summary


def test_a_used_rank_is_left_alone(tmp_path):
    report = inspect_adapter(adapter_of({"up_proj": [1.0] * 16}, tmp_path / "a", 16))
    assert report.advice is None
    assert report.summary == "rank 16, and in use: 90% of the energy is in 15, half the rank would lose 50%"
    report = inspect_adapter(adapter_of({"up_proj": [1.0]}, tmp_path / "b", 1))
    assert report.advice is None and report.summary == "rank 1: there is nothing to truncate"


def test_an_untrained_adapter(tmp_path):
    save_adapter(inject(small.our_llama(), LoRAConfig()), tmp_path / "a")
    report = inspect_adapter(tmp_path / "a")
    assert "every update is zero" in report.summary and "4 modules are zero: " in str(report) and report.advice is None
    assert {m.dead for m in report.modules} == {8} and not report.outliers
    json.dumps(report.to_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="nothing to draw: every update is zero"):
        plot_energy(report, tmp_path / "x.png")


def test_outliers_are_far_from_their_peers(tmp_path):
    spectra = {f"layers.{i}.{n}": [x] for i in range(5) for n, x in (("q_proj", 1.0), ("up_proj", 50.0))}
    spectra["layers.3.q_proj"], spectra["layers.4.q_proj"], spectra["layers.2.up_proj"] = [3.5], [2.5], [10.0]
    report = inspect_adapter(adapter_of(spectra, tmp_path / "a", 2))
    assert report.outliers == {"layers.2.up_proj": pytest.approx(0.2), "layers.3.q_proj": pytest.approx(3.5)}
    assert "3.5 x its peers" in str(report) and "outliers by norm: layers.2.up_proj, layers.3.q_proj" in str(report)


def test_layers_stand_in_their_order(tmp_path):
    names = [f"model.layers.{i}.up_proj" for i in range(12)]
    report = inspect_adapter(adapter_of({n: [1.0] for n in sorted(names)}, tmp_path / "a", 1))
    assert [m.name for m in report.modules] == names


def test_16_bit_files(tmp_path):
    folder = adapter_of({"up_proj": [3.0, 2.0, 1.0]}, tmp_path / "a", 4)
    file = folder / "adapter_model.safetensors"
    save_file({k: t.bfloat16() for k, t in load_file(file).items()}, file)
    report = inspect_adapter(folder)
    assert report.dtypes == ("bfloat16",) and ", bfloat16" in str(report)
    assert report.modules[0].S.tolist() == pytest.approx([3, 2, 1, 0], abs=0.03)


def test_a_deep_model_takes_a_moment(tmp_path):
    """882 modules, of two shapes and three scalings; each figure is that of the module looked at alone."""
    names, tensors = [f"layers.{i}.{end}" for i in range(126) for end in "abcdefg"], {}
    for name in names:
        keys, width = keys_of(name, "linear"), 9 if name.endswith("g") else 12
        tensors |= {keys["lora_A"]: torch.randn(4, width), keys["lora_B"]: torch.randn(10, 4)}
    tensors[keys_of(names[5], "linear")["lora_B"]].zero_()
    alphas = {"a": 3, r"layers\.1\d\.b": 5}
    write_adapter(tmp_path, tensors, peft_config(LoRAConfig(4, target_modules=tuple("abcdefg"), alpha_pattern=alphas)))
    start = time.process_time()
    report = inspect_adapter(tmp_path)
    assert len(str(report).splitlines()) > 882 and len(report.to_dict()["modules"]) == 882
    assert time.process_time() - start < 5  # it took 45 s when each row asked for all the norms
    assert [m.name for m in report.modules] == names and report.modules[5].norm == 0 and report.modules[5].dead == 4
    for m in report.modules[::50]:
        A, B = (tensors[keys_of(m.name, "linear")[own]] for own in ("lora_A", "lora_B"))
        S = product_svdvals(B, A, m.scaling)
        assert far(m.S, S) <= 1e-6 * S[0] and m.norm == pytest.approx(frobenius(S), rel=1e-6)
        assert (m.stable_rank, m.effective_rank) == pytest.approx((stable_rank(S), effective_rank(S)), rel=1e-5)
        assert m.rank_for_90 == rank_for_energy(S, 0.9) and m.dead == 0
        assert report.ratio(m) == pytest.approx(m.norm / median(
            p.norm for p in report.modules if p.name[-1] == m.name[-1]))


HOSTILE = "up\x1b[2J\n\u202eevil\x07" + "x" * 100_000


def test_names_of_strangers_are_escaped_and_cut(tmp_path, capsys):
    """Escape codes clear a terminal, a mark turns the direction of reading, a name of a megabyte hides all else."""
    keys = keys_of(HOSTILE, "linear")
    tensors = {keys["lora_A"]: torch.randn(4, 9), keys["lora_B"]: torch.randn(7, 4), "more\x1b[0m": torch.ones(1)}
    for i in range(4):
        tensors |= {key: torch.ones(4, 9) * 1e-9 if own == "lora_A" else torch.randn(7, 4)
                    for own, key in keys_of(f"\x9b{i}.{HOSTILE}", "linear").items()}
    write_adapter(tmp_path / "a", tensors, peft_config(LoRAConfig(4, target_modules=("x",))), "base\x1b[31m")
    (tmp_path / "a/\x1b[5m").write_text("")
    for arguments in (("inspect", tmp_path / "a", "--plot", tmp_path / "x.png"),
                      ("truncate", tmp_path / "a", tmp_path / "b", "--rank", 2)):
        code, out, err = run(capsys, *arguments)
        assert code == 0 and len(out) < 10_000 and all(c.isprintable() or c == "\n" for c in out), out
        assert r"up\x1b[2J\n\u202eevil\x07xxx" in out
    contradiction = tensors | {keys["lora_B"]: torch.ones(7, 3)}
    write_adapter(tmp_path / "c", contradiction, peft_config(LoRAConfig(4, target_modules=("x",))))
    code, out, err = run(capsys, "inspect", tmp_path / "c")
    assert (code, out, err.count("\n")) == (2, "", 1) and err[:-1].isprintable() and len(err) < 700


# Truncate


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ("embed_tokens", "v_proj")},
                                      {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}], ids=str)
def test_truncation_to_the_true_rank_changes_no_output(settings, tmp_path):
    model = inject(small.our_llama(), LoRAConfig(**{"rank": 8, "alpha": 12, "target_modules": "all-linear"} | settings))
    shake(model)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B[:, 3:] = 0
    save_adapter(model, tmp_path / "a")
    written = truncate_adapter(tmp_path / "a", tmp_path / "b", rank=3)
    assert max(m.error for m in written.modules.values()) < 1e-5
    back = load_adapter(small.our_llama(), tmp_path / "b")
    assert {layer.rank for layer in lora_layers(back).values()} <= {2, 3}
    assert {layer.scaling for layer in lora_layers(back).values()} == {1.0}
    assert far(logits(back), logits(model)) < 1e-4 < far(logits(model), logits(small.our_llama()))
    assert far(logits(in_peft(tmp_path / "b", tmp_path / "hf")), logits(model)) < 1e-4
    assert read_adapter(tmp_path / "b").base == fingerprint(small.our_llama())


def test_truncation_states_the_error_it_makes(tmp_path):
    model = inject(small.our_llama(), LoRAConfig(8, target_modules="all-linear"))
    shake(model)
    save_adapter(model, tmp_path / "a")
    for options in ({"rank": 3}, {"energy": 0.7}):
        out = tmp_path / str(options)
        written, before = truncate_adapter(tmp_path / "a", out, **options), updates(model)
        after = updates(load_adapter(small.our_llama(), out))
        assert before.keys() == after.keys() == written.modules.keys()
        for name, m in written.modules.items():
            S = torch.linalg.svdvals(before[name])
            assert m.error == pytest.approx(float(S[len(m.A):].norm() / S.norm()), rel=1e-4)
            assert m.error == pytest.approx(float((after[name] - before[name]).norm() / S.norm()), rel=1e-4)
            assert m.norm == pytest.approx(float(before[name].norm()), rel=1e-4)
            assert len(m.A) == options.get("rank", len(m.A)) and m.error**2 <= 1 - options.get("energy", 0)
        lost = sum(float((after[n] - before[n]).square().sum()) for n in after)
        assert written.lost == pytest.approx(lost / sum(float(d.square().sum()) for d in before.values()), rel=1e-4)


def test_truncation_keeps_magnitudes_other_tensors_and_settings(tmp_path):
    model = inject(small.our_llama(), LoRAConfig(8, use_dora=True, dropout=0.1))
    shake(model)
    save_adapter(model, tmp_path / "a")
    file, extra = tmp_path / "a/adapter_model.safetensors", "base_model.model.model.embed_tokens.base_layer.weight"
    before = load_file(file) | {extra: torch.ones(2, 2)}
    save_file(before, file)
    config = tmp_path / "a/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "CAUSAL_LM", "revision": "x"}))
    truncate_adapter(tmp_path / "a", tmp_path / "b", rank=2)
    after = load_file(tmp_path / "b/adapter_model.safetensors")
    settings = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert before.keys() == after.keys()
    kept = [k for k in after if "lora_A" not in k and "lora_B" not in k]
    assert len(kept) == 5 and all(torch.equal(after[k], before[k]) for k in kept)
    assert (settings["task_type"], settings["revision"], settings["lora_dropout"], settings["use_dora"]) == (
        "CAUSAL_LM", "x", 0.1, True)


# Extract


def checkpoints(tmp_path: Path, change=None, model=small.our_llama) -> tuple[Path, Path]:
    """A base and the same with rank-3 updates merged into all linears."""
    base = model()
    base.save_pretrained(tmp_path / "base")
    tuned = inject(model(), LoRAConfig(3, target_modules="all-linear"))
    shake(tuned)
    merge(tuned, permanent=True)
    if change:
        with torch.no_grad():
            change(tuned)
    tuned.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def shard(folder: Path) -> None:
    """One file into three and an index, as Hugging Face does."""
    tensors, index = load_file(folder / "model.safetensors"), {}
    for i in range(3):
        part = {k: t for j, (k, t) in enumerate(tensors.items()) if j % 3 == i}
        save_file(part, folder / f"model-{i}.safetensors")
        index |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("form", ["folders", "files", "sharded", "one sharded"])
def test_extraction_gives_the_tuned_model_back(form, tmp_path):
    base, tuned = checkpoints(tmp_path)
    if "sharded" in form:
        shard(tuned)
    if form == "sharded":
        shard(base)
    suffix = "model.safetensors" if form == "files" else ""
    written = extract_adapter(base / suffix, tuned / suffix, tmp_path / "out", rank=3)
    back = load_adapter(Llama.from_pretrained(base), tmp_path / "out")
    expected = logits(Llama.from_pretrained(tuned))
    assert far(logits(back), expected) < 1e-4 < far(logits(small.our_llama()), expected)
    assert len(written.modules) == 14 and written.left_out == () and written.lost < 1e-9
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == [f"{n}_proj" for n in ("down", "gate", "k", "o", "q", "up", "v")]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})


def test_extraction_opens_in_peft(tmp_path):
    base, tuned = checkpoints(tmp_path)
    extract_adapter(base, tuned, tmp_path / "out", energy=0.8)
    ours = load_adapter(small.our_llama(), tmp_path / "out")
    assert far(logits(in_peft(tmp_path / "out", tmp_path / "hf")), logits(ours)) < 1e-5
    assert len({layer.rank for layer in lora_layers(ours).values()}) > 1  # so the patterns are read alike


def test_extraction_states_the_eckart_young_error(tmp_path):
    def noise(model):
        for name, p in model.named_parameters():
            if "proj" in name:
                p += 0.05 * torch.randn_like(p)

    base, tuned = checkpoints(tmp_path, noise)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    for options in ({"rank": 2}, {"energy": 0.9}):
        out = tmp_path / str(options)
        written = extract_adapter(base, tuned, out, **options)
        found = updates(load_adapter(small.our_llama(), out))
        for name, m in written.modules.items():
            delta = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
            S, rank = torch.linalg.svdvals(delta), len(m.A)
            assert m.error == pytest.approx(float(S[rank:].norm() / S.norm()), rel=1e-4)
            assert float((found[name] - delta).norm() / delta.norm()) == pytest.approx(m.error, rel=1e-4)
            assert rank == 2 if "rank" in options else float(energy(S)[rank - 1]) >= 0.9 > float(energy(S)[rank - 2])


def test_what_the_adapter_cannot_hold_is_named(tmp_path):
    def change(model):
        model.model.norm.weight += 0.1
        model.lm_head.weight += 0.1
        model.model.embed_tokens.weight[3] += 1
        model.model.layers[0].self_attn.q_proj.weight.copy_(small.our_llama().model.layers[0].self_attn.q_proj.weight)

    base, tuned = checkpoints(tmp_path, change)
    written = extract_adapter(base, tuned, tmp_path / "out", rank=3)
    assert written.left_out == ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")
    assert f"not in the adapter, though it changed: {', '.join(written.left_out)}\n" in str(written)
    assert len(written.modules) == 13  # one q_proj stayed, so the other is named in full
    targets = json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"]
    assert "model.layers.1.self_attn.q_proj" in targets and "q_proj" not in targets
    assert len(lora_layers(load_adapter(small.our_llama(), tmp_path / "out"))) == 13
    some = extract_adapter(base, tuned, tmp_path / "some", rank=1, targets=["v_proj", "layers.0.mlp.up_proj"])
    assert [name.removeprefix("model.layers.") for name in some.modules] == [
        "0.mlp.up_proj", "0.self_attn.v_proj", "1.self_attn.v_proj"]
    assert len(some.left_out) == 3 + 10


def test_new_rows_in_the_embedding_are_no_obstacle(tmp_path):
    base, tuned = checkpoints(tmp_path)
    weights = load_file(tuned / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat((weights[name], torch.zeros(2, weights[name].shape[1])))
    save_file(weights | {"new.bias": torch.ones(2)}, tuned / "model.safetensors")
    written = extract_adapter(base, tuned, tmp_path / "out", rank=3)
    assert written.left_out == ("lm_head.weight", "model.embed_tokens.weight", "new.bias")
    assert len(written.modules) == 14


def test_16_bit_checkpoints_are_subtracted_in_fp32(tmp_path):
    base, tuned = checkpoints(tmp_path)
    half = {}
    for folder in (base, tuned):
        half[folder] = {k: t.bfloat16() for k, t in load_file(folder / "model.safetensors").items()}
        save_file(half[folder], folder / "model.safetensors")
    written = extract_adapter(base, tuned, tmp_path / "out", rank=16)  # rounding has full rank
    name = "model.layers.0.self_attn.k_proj"
    m, delta = written.modules[name], half[tuned][f"{name}.weight"].double() - half[base][f"{name}.weight"].double()
    assert far(m.B.double() @ m.A.double(), delta) < 1e-6 and m.B.dtype == torch.float32


def test_gpt2_stores_its_weights_transposed(tmp_path):
    from peft import PeftModel

    base, tuned = small.gpt2(), small.gpt2()
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if name.endswith(("c_attn.weight", "c_fc.weight", "attn.c_proj.weight")):
                p += torch.randn(len(p), 2) @ torch.randn(2, p.shape[1]) * 0.05
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    written = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
    assert written.lost < 1e-9 and {m.B.shape[0] for m in written.modules.values()} == {96, 128, 32}
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert far(logits(load_adapter(small.gpt2(), tmp_path / "out")), logits(tuned)) < 1e-4
    theirs = PeftModel.from_pretrained(small.gpt2(), tmp_path / "out").eval()
    assert far(logits(theirs), logits(tuned)) < 1e-4
    (tmp_path / "base/config.json").unlink()
    with pytest.raises(ValueError, match="may be stored transposed, as in GPT-2, or not.*model_type"):
        extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out2", rank=2)


def test_checkpoints_are_streamed(tmp_path, monkeypatch):
    base, tuned = checkpoints(tmp_path)
    alive, most, read = set(), [], extract.read_tensor

    def watched(file, key):
        tensor = read(file, key)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(extract, "read_tensor", watched)
    extract_adapter(base, tuned, tmp_path / "out", rank=3)
    assert len(most) == 2 * 21 and max(most) == 2


# The figure


def test_the_figure_says_what_it_shows(tmp_path):
    folder = adapter_of({f"layers.{i}.up_proj": [1.0] * k for i, k in enumerate((1, 5, 12))}, tmp_path / "a", 16)
    sentence = plot_energy(inspect_adapter(folder), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert sentence == (f"{tmp_path / 'x.png'}: directions that hold 90% of the energy, 1 (fewest: layers.0.up_proj), "
                        "5 (median: layers.1.up_proj), 11 (most: layers.2.up_proj)")


# The command line


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_commands(tmp_path, capsys):
    base, tuned = checkpoints(tmp_path)
    code, out, err = run(capsys, "extract", base, tuned, tmp_path / "ex", "--energy", 0.99)
    assert code == 0 and "Traceback" not in err
    lines = out.splitlines()
    assert lines[0].split() == "module out x in rank norm error energy lost".split()
    assert len(lines) == 1 + 14 + 1 and lines[-1].startswith(f"{tmp_path / 'ex'}: 14 modules at rank")
    code, out, err = run(capsys, "inspect", tmp_path / "ex", "--plot", tmp_path / "x.pdf")
    lines = out.splitlines()
    assert code == 0 and err == "" and len(lines) == 1 + 14 + 3 and (tmp_path / "x.pdf").exists()
    assert lines[0].split() == "module out x in rank alpha scaling norm stable effective 90% in dead".split()
    assert lines[-1].startswith(f"{tmp_path / 'x.pdf'}: directions that hold 90% of the energy, ")
    code, out, err = run(capsys, "truncate", tmp_path / "ex", tmp_path / "tr", "--rank", 1)
    assert code == 0 and "14 modules at rank 1, which lose " in out and len(read_adapter(tmp_path / "tr").tensors) == 28


def test_json_says_the_same(tmp_path, capsys):
    base, tuned = checkpoints(tmp_path)
    written = json.loads(run(capsys, "extract", base, tuned, tmp_path / "ex", "--rank", 3, "--json")[1])
    assert written["energy_lost"] < 1e-9 and written["left_out"] == [] and len(written["modules"]) == 14
    report = json.loads(run(capsys, "inspect", tmp_path / "ex", "--json", "--plot", tmp_path / "x.svg")[1])
    assert report["summary"] == inspect_adapter(tmp_path / "ex").summary and report["use_dora"] is False
    m, w = report["modules"][0], written["modules"][0]
    assert (m["name"], m["shape"], m["rank"]) == (w["name"], w["shape"], 3) and len(m["singular_values"]) == 3
    assert m["norm"] == pytest.approx(w["norm"], rel=1e-4)
    assert m["stable_rank"] == pytest.approx(stable_rank(torch.tensor(m["singular_values"])))
    cut = json.loads(run(capsys, "truncate", tmp_path / "ex", tmp_path / "tr", "--rank", 2, "--json")[1])
    assert {m["rank"] for m in cut["modules"]} == {2} and 0 < cut["energy_lost"] < 0.5


WRONG = {
    "inspect": "the following arguments are required: FOLDER",
    "inspect nothing": "nothing is no adapter folder: it holds no adapter_config.json",
    "inspect base": "base is no adapter folder",
    "inspect a --plot x.foo": "Format 'foo' is not supported (supported formats: ",
    "inspect a --plot no/x.png": "No such file or directory",
    "inspect a --josn": "unrecognized arguments: --josn",
    "truncate a": "the following arguments are required: OUT",
    "truncate a o": "one of the arguments --rank --energy is required",
    "truncate a o --rank 2 --energy 0.9": "not allowed with argument --rank",
    "truncate a o --rank two": "invalid int value: 'two'",
    "truncate a o --rank 5": "rank 5 is above the adapter's 4",
    "truncate a o --rank 0": "rank must be an integer from 1 to 4 here, got 0",
    "truncate a o --energy 90": "a share of the energy must be in (0, 1], got 90",
    "truncate a a --rank 2": "a holds an adapter already: name another folder",
    "truncate pickle o --rank 2": "holds no adapter_model.safetensors; adapter_model.bin may be a pickle",
    "extract base base o --rank 2": "no linear weight of base differs in base",
    "extract base tuned o --rank 17": "k_proj.weight: rank must be an integer from 1 to 16 here, got 17",
    "extract base tuned o": "one of the arguments --rank --energy is required",
    "extract base tuned a --rank 2": "a holds an adapter already",
    "extract base nothing o --rank 2": "nothing is no checkpoint: it holds no model.safetensors",
    "extract base a o --rank 2": "a is no checkpoint",
    "extract base base/config.json o --rank 2": "base/config.json is damaged or not a safetensors file",
    "extract base tuned o --rank 2 --targets q_prj": "target 'q_prj' matches no weight; near: q_proj",
    "extract base tuned o --rank 2 --targets norm": "no linear weight of base differs in tuned among the targets",
    "extract base tuned o --rank 2 --device gpu": "cannot compute on 'gpu'",
    "extract wide base o --rank 2": "up_proj.weight is (48, 33) in wide and (48, 32) in base: not one architecture",
    "extract base short o --rank 2": "is (48, 32) in base and missing in short: not one architecture",
    "extract base nan o --rank 2": "up_proj.weight: delta holds NaN or infinite values",
    "extract base int8 o --rank 2": "up_proj.weight is stored as torch.float32 and torch.int8: dequantise",
    "extract base fp8 o --rank 2": "is stored as torch.float32 and torch.float8_e4m3fn: dequantise",
    "extract base no-shard o --rank 2": "holds no model-1.safetensors, which model.safetensors.index.json names",
    "extract base bad-index o --rank 2": "must map tensors to files under weight_map",
    "extract base cut o --rank 2": "model.safetensors is damaged or not a safetensors file",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the wrong commands find, and must leave as it is."""
    path = tmp_path_factory.mktemp("world")
    base, tuned = checkpoints(path)
    key = "model.layers.1.mlp.up_proj.weight"
    weights = load_file(tuned / "model.safetensors")

    def variant(name: str, **changed):
        (path / name).mkdir()
        save_file({k: t for k, t in (weights | {key: changed["value"]}).items() if t is not None},
                  path / name / "model.safetensors")

    variant("wide", value=torch.ones(48, 33))
    variant("short", value=None)
    variant("nan", value=weights[key] * math.nan)
    variant("int8", value=torch.ones(48, 32, dtype=torch.int8))
    variant("fp8", value=weights[key].to(torch.float8_e4m3fn))
    for name in ("no-shard", "bad-index"):
        shutil.copytree(tuned, path / name)
        shard(path / name)
    (path / "no-shard/model-1.safetensors").unlink()
    (path / "bad-index/model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    (path / "cut").mkdir()
    (path / "cut/model.safetensors").write_bytes((tuned / "model.safetensors").read_bytes()[:-100])
    adapter_of({"up_proj": [1.0] * 4}, path / "a", 4)
    (path / "pickle").mkdir()
    shutil.copy(path / "a/adapter_config.json", path / "pickle")
    (path / "pickle/adapter_model.bin").write_bytes(b"x")
    return path


def listing(path: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_commands_say_one_line_and_do_nothing(line, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before = listing(world)
    code, out, err = run(capsys, *line.split())
    said, = err.splitlines()
    assert code == 2 and out == "" and said.startswith(f"minilora {line.split()[0]}: ") and WRONG[line] in said
    assert listing(world) == before and not (world / "o").exists()


def contradictions() -> dict:
    A, B = (keys_of("up_proj", "linear")[own] for own in ("lora_A", "lora_B"))
    good = {A: torch.ones(4, 9), B: torch.ones(7, 4)}
    return {
        "no B": ({A: good[A]}, "lacks base_model.model.up_proj.lora_B.weight"),
        "no A": ({B: good[B]}, "which is no LoRA factor's name, or lacks its partner"),
        "rank of B": (good | {B: torch.ones(7, 3)}, r"lora_A \(4, 9\) and lora_B \(7, 3\).*rank 4"),
        "rank of both": ({A: torch.ones(5, 9), B: torch.ones(7, 5)}, "its adapter_config.json says rank 4"),
        "a vector": (good | {A: torch.ones(4)}, r"lora_A \(4,\)"),
        "other names": ({"transformer.up_proj.lora_A": good[A]}, "no LoRA factor's name"),
        "none": ({"base_model.model.x": good[A]}, "no LoRA factors: expected keys such as base_model.model.MODULE"),
        "empty": ({}, "holds no LoRA factors"),
        "NaN": (good | {A: good[A] * math.nan}, "not all finite"),
        "infinite": (good | {B: good[B] / 0}, "not all finite"),
        "overflow": ({A: good[A] * 1e30, B: good[B] * 1e30}, "up_proj: the product overflows torch.float32"),
        "integers": (good | {A: good[A].long()}, "torch.int64"),
    }


@pytest.mark.parametrize("what", contradictions())
def test_contradictory_adapters(what, tmp_path):
    tensors, message = contradictions()[what]
    write_adapter(tmp_path / "a", tensors, peft_config(LoRAConfig(4, target_modules=("up_proj",))))
    for call in (inspect_adapter, lambda folder: truncate_adapter(folder, tmp_path / "o", rank=2)):
        with pytest.raises(ValueError, match=message):
            call(tmp_path / "a")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("settings, message", [
    ({"peft_type": "IA3"}, "peft_type 'IA3'"), ({"bias": "all"}, "bias='all'"), ({"r": -1}, "rank must be a positive"),
    ({"init_lora_weights": "pissa"}, "'pissa', which changes"),
], ids=str)
def test_unsupported_adapters(settings, message, tmp_path):
    folder = adapter_of({"up_proj": [1.0]}, tmp_path / "a", 2)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(ValueError, match=message):
        inspect_adapter(folder)
