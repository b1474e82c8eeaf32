"""The decoder beside transformers' Llama, Mistral and Qwen2, and what it says to a bad checkpoint or prompt."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import our_llama, roundings, shake

from minilora import LoRAConfig, fast_decode, inject, llama, merge
from minilora.llama import Cache, Llama, LlamaConfig
from minilora.rotary import rope_frequencies

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
FAMILIES = {  # transformers' name and what its config adds
    "llama": ("Llama", {}),
    "one head for all": ("Llama", {"num_key_value_heads": 1}),
    "no grouping": ("Llama", {"num_key_value_heads": 4}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("Llama", {"head_dim": 16}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "mistral": ("Mistral", {"sliding_window": None, "rms_norm_eps": 1e-5}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}
IDS = torch.randint(0, 64, (3, 40), generator=torch.Generator().manual_seed(0))


def theirs(name: str):
    """transformers' model with weights large enough that every part of it matters."""
    import transformers

    kind, settings = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**(SIZES | settings))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.3)
            else:  # from 0.02 to what lets attention choose
                p.mul_(15 if "layers" in name else 5)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """transformers' model, its sharded folder, and ours from that folder."""
    folder, model = tmp_path_factory.mktemp("sharded"), theirs(request.param)
    model.save_pretrained(folder, max_shard_size="10KB")
    return model, folder, Llama.from_pretrained(folder).eval()


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@torch.no_grad()
def in_pieces(model: Llama, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits from a cache that is fed some tokens at a time."""
    cache = Cache(ids.shape[1])
    return torch.cat([model(piece, cache) for piece in ids.split(sizes, dim=1)], dim=1)


# Equal to transformers


def test_logits_with_and_without_cache(pair):
    model, folder, ours = pair
    assert len(list(folder.glob("*.safetensors"))) > 5
    with torch.no_grad():
        expected, whole = model(IDS).logits, ours(IDS)
        double = copy.deepcopy(ours).double()  # in which what a cache changes is the order of sums alone
        exact = double(IDS)
    assert expected.std() > 0.2
    assert roundings(whole, expected) <= 64
    for sizes in ([1] * 40, [30] + [1] * 10, [7, 20, 1, 12]):
        assert roundings(in_pieces(ours, IDS, sizes), expected) <= 64, sizes
        assert far(in_pieces(double, IDS, sizes), exact) <= 1e-12, sizes


def test_gradients(pair):
    model, _, ours = pair
    for logits in (model(IDS).logits, ours(IDS)):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert far(p.grad, grads[name]) <= 1e-5 * max(1, grads[name].abs().max()), name
    model.zero_grad(), ours.zero_grad()


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_generation(pair, batch):
    model, _, ours = pair
    ids, mask = IDS[:batch, :9], torch.ones(batch, 9, dtype=torch.long)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)[:, 9:]
    found = ours.generate(ids, 30)
    assert torch.equal(found, expected) and len(found.unique()) > 3
    stop = found[0, 4].item()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=stop,
                              pad_token_id=stop)[:, 9:]
    assert torch.equal(ours.generate(ids, 30, stop), expected)


def test_a_folder_of_ours_opens_there(pair, tmp_path):
    import transformers

    model, _, ours = pair
    ours.save_pretrained(tmp_path, {"about": "us"})
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert far(opened(IDS).logits, model(IDS).logits) <= 1e-5
        assert torch.equal(Llama.from_pretrained(tmp_path)(IDS), ours(IDS))
    again = json.loads((tmp_path / "config.json").read_text())
    assert LlamaConfig.from_hf(again) == ours.config
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != ours.config.tie_word_embeddings


def test_the_comparison_can_fail(tmp_path):
    """Each thing that sets one family apart is seen in the logits."""
    theirs("llama 3").save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    right = Llama.from_pretrained(tmp_path)(IDS)
    ropes = [LLAMA3 | change for change in ({"rope_type": "default"}, {"factor": 7.0}, {"rope_theta": 400000.0})]
    for change in ({"rms_norm_eps": 1e-2}, *({"rope_parameters": rope} for rope in ropes)):
        (tmp_path / "config.json").write_text(json.dumps(said | change))
        assert far(Llama.from_pretrained(tmp_path)(IDS), right) > 1e-3, change


def test_rope_settings_of_older_transformers(tmp_path):
    theirs("llama 3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    new = LlamaConfig.from_hf(config)
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    assert LlamaConfig.from_hf(config | {"rope_theta": theta, "rope_scaling": rope}) == new
    rope["type"] = rope.pop("rope_type")
    old = LlamaConfig.from_hf(config | {"rope_theta": theta, "rope_scaling": rope})
    assert torch.equal(rope_frequencies(old), rope_frequencies(new))
    plain = LlamaConfig.from_hf(config | {"rope_theta": theta, "rope_scaling": None})
    assert plain.rope_scaling is None and plain.rope_theta == 500000.0


def test_rotary_frequencies_fall_from_one_to_one_over_theta():
    """theta ** (-2 i / D) radians a position, for pair i of D / 2 (RoFormer, 3.2.2)."""
    config = LlamaConfig(**SIZES, rope_theta=1000.0)  # D is 8
    assert rope_frequencies(config).tolist() == pytest.approx([1000 ** (-i / 4) for i in range(4)], rel=1e-6)


@pytest.mark.parametrize("kind, settings, context", [
    ("mistral", {"sliding_window": 8}, 8), ("mistral", {"sliding_window": 4096}, 64), ("mistral", {}, 64),
    ("qwen2", {"sliding_window": 8}, 64), ("qwen2", {"sliding_window": 8, "use_sliding_window": True}, 8)])
def test_the_context_ends_where_a_sliding_window_would_begin_to_matter(kind, settings, context):
    assert LlamaConfig.from_hf({"model_type": kind, **SIZES, **settings}).max_position_embeddings == context


def test_sixteen_bit_files(tmp_path):
    import transformers

    theirs("llama").bfloat16().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)  # .bfloat16() rounds its rotary frequencies
    narrow, wide = Llama.from_pretrained(tmp_path), Llama.from_pretrained(tmp_path, torch.float32)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16} and narrow(IDS).dtype == torch.bfloat16
    assert all(torch.equal(a.float(), b) for a, b in zip(narrow.parameters(), wide.parameters(), strict=True))
    assert roundings(narrow(IDS), model(IDS).logits) <= 8 and not torch.equal(narrow(IDS).float(), wide(IDS))
    assert narrow.generate(IDS[:, :5], 5).shape == (3, 5)


# On its own


def test_generation_is_the_argmax_of_the_plain_forward_pass():
    model, ids = our_llama(), IDS[:, :6]
    for _ in range(12):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(IDS[:, :6], 12), ids[:, 6:])


def test_a_row_that_has_stopped_stays_stopped_and_all_stopped_ends_it():
    model = our_llama()
    free = model.generate(IDS[:, :6], 20)  # (3, 20)
    stop = free[0, 3].item()
    found = model.generate(IDS[:, :6], 20, stop)
    ends = [row.index(stop) if stop in row else 20 for row in free.tolist()]
    assert found.shape[1] == min(max(ends) + 1, 20) and min(ends) <= 3
    for row, until, before in zip(found.tolist(), ends, free.tolist()):
        assert row[:until] == before[:until] and set(row[until:]) <= {stop}


def test_generation_joins_plain_linears_only_and_leaves_no_trace(monkeypatch):
    model, seen, joined = our_llama(), [], []
    expected, join = model.generate(IDS[:, :6], 14), fast_decode.join
    block, other = model.model.layers[0], model.model.layers[1]
    block.self_attn.q_proj.register_forward_hook(lambda *_: seen.append("q"))
    inject(block.mlp, LoRAConfig(2, target_modules=("up_proj",)))
    monkeypatch.setattr(fast_decode, "join", lambda *linears: joined.append(join(*linears)) or joined[-1])
    assert torch.equal(model.generate(IDS[:, :6], 14), expected) and seen == ["q"] * 14
    assert [each is not None for each in joined] == [False, True, False, True] + [True] * 4  # qkv, o, gate and up, down
    other.self_attn.o_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(IDS[:, :6], 14)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("width, layers, new, fast", [(160, 4, 13, True), (160, 4, 12, False), (160, 4, 1, False),
                                                      (768, 12, 30, False), (2048, 8, 200, False)])
def test_weights_are_copied_only_where_that_pays(width, layers, new, fast):
    with torch.device("meta"):
        model = Llama(LlamaConfig(100, width, width * 14 // 5, layers, width // 32))
    assert fast_decode.pays(model.model, new) == fast


def test_nothing_that_generation_copies_goes_stale():
    model = our_llama()
    first = model.generate(IDS[:, :6], 20)
    for p in model.parameters():
        p.data.mul_(-1)  # a change that not even torch's version counter sees
    ids = IDS[:, :6]
    for _ in range(20):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    again = model.generate(IDS[:, :6], 20)
    assert torch.equal(again, ids[:, 6:]) and not torch.equal(again, first)


def test_what_is_generated_can_be_trained_on():
    model, kept = our_llama().train(), []
    watch = model.lm_head.register_forward_hook(lambda module, args, logits: kept.append(logits.requires_grad))
    out = model.generate(IDS[:, :6], 8)
    watch.remove()
    assert kept == [False] * 8  # nothing is kept for a backward pass
    model(out).sum().backward()
    assert model.training and model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = our_llama().train()
        model.model.checkpointing = checkpointing
        model(IDS).logsumexp(-1).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_seed_decides_the_weights():
    a, b, c = (Llama(LlamaConfig(**SIZES), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    for name, p in Llama(LlamaConfig(64, 256, 256, 8, 4, attention_bias=True), 0).named_parameters():
        if p.dim() == 2:  # output projections start smaller by sqrt(2 x 8 layers)
            small = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert p.std().item() == pytest.approx(0.005 if small else 0.02, rel=0.05), name
        else:
            assert p.eq(0 if name.endswith("bias") else 1).all(), name


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    our_llama().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(llama, "save_tensors", full)
        Llama(LlamaConfig(**SIZES), 1).save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert torch.equal(Llama.from_pretrained(tmp_path)(IDS), our_llama()(IDS))


def test_a_model_with_adapters_is_not_saved_as_a_checkpoint(tmp_path):
    model = inject(our_llama(), LoRAConfig())
    with pytest.raises(ValueError, match=r"no plain Llama, it has .*q_proj.*save_adapter"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("permanent", [False, True])
def test_a_merged_model_is_saved_as_a_plain_checkpoint(permanent, tmp_path):
    model = inject(our_llama(), LoRAConfig())
    shake(model)
    merge(model, permanent=permanent)
    model.save_pretrained(tmp_path / "new")
    assert not torch.equal(model(IDS), our_llama()(IDS))
    assert torch.equal(Llama.from_pretrained(tmp_path / "new")(IDS), model(IDS))


# Bad input


@pytest.mark.parametrize("settings, said", [
    ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
    ({"hidden_size": "32"}, "hidden_size must be a positive integer, got '32'"),
    ({"vocab_size": 64.0}, "vocab_size must be a positive integer"),
    ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer"),
    ({"num_attention_heads": -4}, "num_attention_heads must be a positive integer"),
    ({"num_attention_heads": None}, "num_attention_heads must be a positive integer"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be a positive integer"),
    ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads, got 3"),
    ({"intermediate_size": 2**40}, "intermediate_size must be a positive integer"),
    ({"head_dim": 7}, "head_dim must be even"),
    ({"num_attention_heads": 64, "num_key_value_heads": 64}, "head_dim must be even"),
    ({"max_position_embeddings": 2**30}, r"at most 2\*\*20"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
    ({"rope_theta": 0}, "rope_theta must be a positive number"),
    ({"mlp_bias": "yes"}, "mlp_bias must be True or False"),
    ({"attention_out_bias": True}, "attention_out_bias must equal attention_bias"),
    ({"attention_bias": True, "mlp_bias": True}, "attention_out_bias must equal attention_bias"),
    ({"rope_scaling": [8]}, "rope_scaling must be None or a dict"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "must be of type 'llama3', got 'yarn'"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling's factor must be a positive number, got None"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor must be below"),
])
def test_config_values(settings, said):
    with pytest.raises(ValueError, match=said):
        LlamaConfig(**(SIZES | settings))


def write_config(changes=None, lost=()):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text()) | (changes or {})
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in lost}))

    return damage


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(name, share):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:int(len(data) * share)])

    return damage


def tensors(change):
    def damage(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return damage


def index(data):
    def damage(folder):
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(data)

    return damage


def folder_for_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


Q = "model.layers.0.self_attn.q_proj.weight"
DAMAGE = [
    ("no folder", shutil.rmtree, "there is no config.json in"),
    ("no config", lambda folder: (folder / "config.json").unlink(), "there is no config.json in"),
    ("config cut", cut("config.json", 0.5), "config.json is damaged or not a JSON file"),
    ("config empty", write("config.json", b""), "config.json is damaged or not a JSON file"),
    ("config garbage", write("config.json", bytes(range(256))), "config.json is damaged or not a JSON file"),
    ("config deep", write("config.json", b"[" * 10**5), "config.json is damaged or not a JSON file"),
    ("config a list", write("config.json", b"[1]"), r"config.json must hold an object, got \[1\]"),
    ("config null", write("config.json", b"null"), "config.json must hold an object, got None"),
    ("config of nothing", write("config.json", b"{}"), "config.json: a decoder's config needs vocab_size, hidden_size"),
    ("a field missing", write_config(lost=["num_attention_heads"]), "needs num_attention_heads"),
    ("a field of another type", write_config({"hidden_size": "32"}), "config.json: hidden_size must be a positive"),
    ("a flag of another type", write_config({"tie_word_embeddings": 1}), "tie_word_embeddings must be True or False"),
    ("a window of another type", write_config({"model_type": "mistral", "sliding_window": "8"}), "sliding_window must"),
    ("rope of another type", write_config({"rope_parameters": "llama3"}), "rope_parameters must be an object"),
    ("rope unknown", write_config({"rope_scaling": {"type": "dynamic", "factor": 2}}), "'llama3', got 'dynamic'"),
    ("another family", write_config({"model_type": "gpt2"}), "must be llama, mistral or qwen2, got 'gpt2'"),
    ("another activation", write_config({"hidden_act": "gelu"}), "hidden_act must be 'silu', got 'gelu'"),
    ("more layers", write_config({"num_hidden_layers": 10**9}), "has 2 layers, config.json says 1000000000"),
    ("fewer layers", write_config({"num_hidden_layers": 1}), "has 2 layers, config.json says 1"),
    ("another vocabulary", write_config({"vocab_size": 65}), r"is \(64, 32\) of .*, config.json says \(65, 32\)"),
    ("another width", write_config({"intermediate_size": 50}), r"is \(48, 32\) of .*, config.json says \(50, 32\)"),
    ("impossible", write_config({"num_attention_heads": 2**30, "num_key_value_heads": 2**30, "head_dim": 2**30}),
     "a model of impossible size"),
    ("biases elsewhere", write_config({"tie_word_embeddings": True, "model_type": "qwen2"}), "lacks .*bias"),
    ("no weights", lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
    ("weights a folder", folder_for_weights, "holds no model.safetensors"),
    ("weights cut", cut("model.safetensors", 0.7), "model.safetensors is damaged or not a safetensors file"),
    ("header cut", cut("model.safetensors", 0.01), "model.safetensors is damaged or not a safetensors file"),
    ("weights empty", write("model.safetensors", b""), "model.safetensors is damaged or not a safetensors file"),
    ("weights garbage", write("model.safetensors", bytes(range(256)) * 9), "is damaged or not a safetensors file"),
    ("a pickle", write("model.safetensors", b"\x80\x02}q\x00."), "is damaged or not a safetensors file"),
    ("a tensor missing", tensors(lambda t: t.pop(Q)), f"lacks {Q}$"),
    ("a layer missing", tensors(lambda t: [t.pop(k) for k in list(t) if ".1." in k]), "has 1 layers, .* says 2"),
    ("many missing", tensors(lambda t: [t.pop(k) for k in list(t) if "proj" in k]), "and 11 more$"),
    ("a tensor too many", tensors(lambda t: t.update(extra=torch.ones(1))), "has the unknown extra$"),
    ("a tensor transposed", tensors(lambda t: t.update({"lm_head.weight": torch.ones(32, 64)})), r"is \(32, 64\) of"),
    ("a tensor of integers", tensors(lambda t: t.update({Q: t[Q].int()})), "of torch.int32, .* says .* floating"),
    ("all integers", tensors(lambda t: t.update({k: v.int() for k, v in t.items()})), "of torch.int32, .* floating"),
    ("no tensors", tensors(lambda t: t.clear()), "has 0 layers, config.json says 2"),
    ("index cut", index(b'{"weight_map": {"a": '), "index.json is damaged or not a JSON file"),
    ("index a list", index(b"[]"), "index.json must hold an object"),
    ("index without map", index(b'{"metadata": {}}'), "must map tensors to files under weight_map, got None"),
    ("index of a list", index(b'{"weight_map": ["a.safetensors"]}'), "must map tensors to files under weight_map"),
    ("index of nothing", index(b'{"weight_map": {}}'), "must map tensors to files under weight_map"),
    ("index of numbers", index(b'{"weight_map": {"a": 1}}'), "holds no 1, which model.safetensors.index.json names"),
    ("a shard missing", index(b'{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}'),
     "holds no b.safetensors, which model.safetensors.index.json names"),
]


@pytest.mark.parametrize("damage, said", [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_a_damaged_checkpoint_is_one_clear_error(damage, said, tmp_path):
    folder = tmp_path / "checkpoint"
    our_llama().save_pretrained(folder)
    Llama.from_pretrained(folder)
    damage(folder)
    with pytest.raises(ValueError, match=said) as error:
        Llama.from_pretrained(folder)
    assert str(folder) in str(error.value) and len(str(error.value)) < 400
    assert error.value.__context__ is None or error.value.__suppress_context__  # no second error above it


def test_every_truncation_and_any_byte(tmp_path):
    """Cut anywhere, both files are refused; with a byte changed they are refused, or the model has the right shape."""
    our_llama().save_pretrained(tmp_path)
    draw = torch.Generator().manual_seed(0)
    for name in ("config.json", "model.safetensors"):
        whole = (tmp_path / name).read_bytes()
        header = len(whole.rstrip()) if name == "config.json" else 8 + int.from_bytes(whole[:8], "little")
        for _ in range(60):
            place = torch.randint(header, (), generator=draw).item()
            (tmp_path / name).write_bytes(whole[:place])
            with pytest.raises(ValueError, match=str(tmp_path)):
                Llama.from_pretrained(tmp_path)
            spoiled = bytearray(whole)
            spoiled[place] = torch.randint(256, (), generator=draw).item()
            (tmp_path / name).write_bytes(spoiled)
            try:
                assert Llama.from_pretrained(tmp_path)(IDS[:, :8]).shape == (3, 8, 64)
            except ValueError as e:
                assert str(tmp_path) in str(e)
        (tmp_path / name).write_bytes(whole)
    Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("ids, max_new, said", [
    (IDS[:, :0], 5, r"at least one token, got \(3, 0\)"),
    (IDS[:0], 5, r"at least one token, got \(0, 40\)"),
    (IDS[0], 5, r"shape \(batch, tokens\).*got \(40,\)"),
    (IDS.float(), 5, "got .* of torch.float32"),
    (IDS + 1, 5, "ids must be from 0 to 63, got 1 to 64"),
    (IDS - 1, 5, "ids must be from 0 to 63, got -1 to 62"),
    (IDS, 25, "context of 64 tokens, got a prompt of 40 and max_new 25"),
    (IDS, -1, "max_new -1"),
])
def test_prompts(ids, max_new, said):
    with pytest.raises(ValueError, match=said):
        Llama(LlamaConfig(**SIZES), 0).generate(ids, max_new)


def test_more_tokens_than_the_context():
    model, cache = Llama(LlamaConfig(**SIZES), 0), Cache(70)
    with pytest.raises(ValueError, match="70 tokens are more than the context of 64"):
        model(IDS.new_zeros(1, 70))
    model(IDS.new_zeros(1, 60), cache)
    with pytest.raises(ValueError, match="65 tokens are more than the context of 64"):
        model(IDS.new_zeros(1, 5), cache)
    assert cache.length == 60 and model(IDS.new_zeros(1, 4), cache).shape == (1, 4, 64)
    assert model.generate(IDS, 24).shape == (3, 24) and model.generate(IDS, 0).shape == (3, 0)
