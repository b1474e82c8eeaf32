"""What follows a run: scores beside what was forgotten, talk, merging for good, GGUF files."""

import io
import json
import re

import numpy as np
import pytest
import torch
from chat_templates import TEMPLATES, byte_level
from small import SIZES, shake
from test_tuning_run import rows_of

from minilora import LoRAConfig, inject, load_adapter, save_adapter
from minilora.cli import main
from minilora.shipped import DATA
from minilora.tuning.after import Talk, converse, dequantise_model, evaluate, merge_for_good
from minilora.tuning.demo import save_help_desk
from minilora.tuning.gguf_file import export_adapter, export_model, in_pairs
from minilora.tuning.model import load_model, load_tokenizer

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> str:
    return str(save_help_desk(tmp_path_factory.mktemp("desk")))


TICKETS = str(DATA / "adapters" / "ticket")  # trained on the help desk's own base: the fingerprint is the same


def files(tmp_path) -> list[str]:
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join((DATA / "own" / "answers.jsonl").read_text().splitlines(True)[:12]))
    return [rows_of("ticket", 12, tmp_path / "ticket.jsonl"), str(answers)]


def test_scores_say_what_was_learnt_and_what_was_forgotten(desk, tmp_path):
    ticket, answers = files(tmp_path)
    found = evaluate(load_model(desk), load_tokenizer(desk), [ticket, answers], TICKETS)
    rows = {(file, who): (loss, exact) for file, who, loss, exact, _ in found.rows}
    assert rows[ticket, "base"][1] == 0 and rows[ticket, "adapter"][1] > 0.8
    assert rows[answers, "base"][1] > 0.8 and rows[answers, "adapter"][0] > rows[answers, "base"][0]
    assert str(found).splitlines()[0].startswith("file") and len(found.to_dict()["scores"]) == 4


def test_voices_side_by_side(desk):
    talk, heard = Talk(load_model(desk), load_tokenizer(desk), {"ticket": TICKETS}, max_new=40), io.StringIO()
    message = "hello , the reference is w106 . please help me to connect my new headset . nadia is my name ."
    converse(talk, iter([message, "/ticket", message, "/what", "/reset", "/quit", "never"]), heard.write)
    said = heard.getvalue().splitlines()
    assert said[0].startswith("base: hello nadia") and said[1].startswith("ticket: [ code = w106 | team = electronics")
    assert said[2].startswith("ticket: ") and "/base" in said[3] and len(said) == 4
    assert talk.turns["base"] == [] and talk.active == ["ticket"]
    pieces = []
    whole = talk.say(message, "ticket", pieces.append)
    assert "".join(pieces).strip() == whole and len(pieces) > 10
    with pytest.raises(ValueError, match="the model's context is 256"):
        talk.say("hello " * 300, "base")


def test_merged_for_good_is_the_adapter(desk):
    ids = torch.arange(30)[None]
    with torch.no_grad():
        adapted = load_adapter(load_model(desk), TICKETS)(ids).logits
        merged = load_model(desk)
        found = merge_for_good(merged, TICKETS)
        torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-3, rtol=1e-3)
    assert found.modules == 28 and found.requantised is None and not any("lora" in n for n, _ in merged.named_parameters())


def test_an_adapter_of_four_bits_is_merged_into_what_they_say(desk):
    merged, plain = load_model(desk), load_model(desk)
    found = merge_for_good(merged, TICKETS, four_bit=True)
    from minilora.quant import quantise_model

    expected = load_adapter(quantise_model(load_model(desk)), TICKETS, any_base=True)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected(ids).logits, atol=1e-2, rtol=1e-2)
        assert (merged(ids).logits - load_adapter(plain, TICKETS)(ids).logits).abs().max() > 1e-2
    assert 0 < found.requantised[0] <= found.requantised[1] and "In 4 bits again" in str(found)
    assert all(type(m).__name__ != "Linear4bit" for m in dequantise_model(quantise_model(load_model(desk))).modules())


def test_the_commands(desk, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gguf")
    ticket, answers = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    base = ["--model", desk, "--adapter", TICKETS]
    for line, said in (
            (["eval", *base, "--data", ticket, "--forgetting", answers], "adapter"),
            (["eval", *base, "--data", ticket, "--json"], '"who": "adapter"'),
            (["chat", *base, "--prompt", "hello , i am nadia ."], "ticket: ["),
            (["merge", *base, "--out", "merged"], "28 modules merged"),
            (["export", *base, "--gguf", "whole.gguf"], "tensors written"),
            (["export", *base, "--gguf", "lora.gguf", "--adapter-only"], "56 tensors written")):
        assert main(line) == 0, capsys.readouterr().err
        assert said in capsys.readouterr().out
    assert load_model("merged").config.vocab_size == 730
    assert main(["merge", *base, "--out", "merged"]) == 2
    assert re.match("minilora merge: .*without a model", capsys.readouterr().err)


# ---------------------------------------------------------------- GGUF


def small_llama(**more):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 400, "num_key_value_heads": 2, "max_position_embeddings": 128} | more
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def read(path) -> tuple[dict, dict]:
    import gguf

    reader = gguf.GGUFReader(path)
    return {t.name: np.array(t.data) for t in reader.tensors}, {k: f.contents() for k, f in reader.fields.items()}


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_a_model_read_back_is_the_model(dtype, tmp_path):
    pytest.importorskip("gguf")
    model, tokenizer = small_llama(), byte_level(chat_template=TEMPLATES["chatml"])
    count = export_model(model, tokenizer, tmp_path / "m.gguf", dtype)
    tensors, fields = read(tmp_path / "m.gguf")
    assert len(tensors) == count == 3 + 9 * 2
    layer = model.model.layers[1]
    assert np.array_equal(tensors["blk.1.ffn_up.weight"], layer.mlp.up_proj.weight.detach().numpy().astype(dtype.replace("f", "float")))
    q = layer.self_attn.q_proj.weight.detach()  # (heads d, C), d = 8: rows 0, 4, 1, 5, ... of each head
    rows = [h * 8 + i for h in range(4) for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    assert np.allclose(tensors["blk.1.attn_q.weight"], q[rows].numpy(), atol=1e-3)
    assert tensors["blk.0.attn_norm.weight"].dtype == np.float32
    assert fields["general.architecture"] == "llama" and fields["llama.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.tokens"][5] == tokenizer.convert_ids_to_tokens(5)
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id and fields["tokenizer.chat_template"]


def test_an_adapter_read_back_is_the_adapter(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = inject(small_llama(), LoRAConfig(4, 8, ("q_proj", "down_proj"), rank_pattern={"down_proj": 2}))
    shake(model)
    assert export_adapter(model, tmp_path / "a.gguf") == 8
    tensors, fields = read(tmp_path / "a.gguf")
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora" and gguf
    alpha = fields["adapter.lora.alpha"]
    for name, place in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
        layer = model.get_submodule(f"model.layers.0.{place}")
        A, B = (torch.from_numpy(tensors[f"blk.0.{name}.weight.lora_{x}"]) for x in "ab")
        expected = layer.scaling * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(alpha / len(A) * B @ A, in_pairs(f"{place}.weight", expected, model.config).detach(),
                                   atol=1e-5, rtol=1e-4)


def test_what_llama_cpp_does_not_know_is_refused(tmp_path):
    pytest.importorskip("gguf")
    from small import gpt2

    with pytest.raises(ValueError, match="written of llama, .*got 'gpt2'"):
        export_model(gpt2(), byte_level(), tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="merge them"):
        export_model(inject(small_llama(), LoRAConfig(4, 8)), byte_level(), tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="type must be one of f32"):
        export_model(small_llama(), byte_level(), tmp_path / "m.gguf", "q4")


def test_greedy_replies_are_llama_cpps(tmp_path):
    """The base in one file and the adapter in another, on 50 prompts: the same text."""
    xllamacpp = pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    model, tokenizer = small_llama(), byte_level()
    with torch.no_grad():
        for p in model.parameters():  # so that the most likely token is far ahead of the next
            p.mul_(3 if p.dim() == 2 else 1)
        for i in range(len(tokenizer)):  # and never a special token or a part of a character, which no text shows
            text = tokenizer.decode([i], skip_special_tokens=True)
            model.lm_head.weight[i] *= bool(text) and text.isascii() and text.isprintable()
    export_model(model, tokenizer, tmp_path / "base.gguf", "f32")
    save_adapter(shaken(model), tmp_path / "a")
    export_adapter(model, tmp_path / "a.gguf")
    words = "where is my order hello again it is late and on its way".split()
    prompts = [" ".join(words[i % 12:i % 12 + 1 + i % 5]) + f" {i}" for i in range(50)]
    expected = [greedy(model, tokenizer, prompt) for prompt in prompts]
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.cpuparams.n_threads = str(tmp_path / "base.gguf"), 128, 1, 1
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = str(tmp_path / "a.gguf"), 1.0
    params.lora_adapters = [adapter]
    server = xllamacpp.Server(params)
    got = [answered(server, prompt) for prompt in prompts]
    same = sum(a == b for a, b in zip(got, expected))
    print(json.dumps({"same": same, "of": len(prompts)}))
    assert same == len(prompts), [(a, b) for a, b in zip(got, expected) if a != b][:3]


def shaken(model):
    inject(model, LoRAConfig(4, 8, "all-linear"))
    shake(model, 0.05)
    return model


def greedy(model, tokenizer, prompt: str, n: int = 12) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, -n:], skip_special_tokens=True)


def answered(server, prompt: str, n: int = 12) -> str:
    answer = server.handle_completions({"prompt": prompt, "max_tokens": n, "temperature": 0.0, "ignore_eos": True})
    answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
    return answer["choices"][0]["text"] if "choices" in answer else answer["content"]
