"""The allocation trace: against real runs, the CPU's own allocator and sums by hand; and where CUDA differs."""

import copy
import gc
import importlib
import json
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import MLP, SIZES
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from minilora.__main__ import main
from minilora.llama import LlamaConfig
from minilora.memory import ModelSpec, Training, trace
from minilora.memory.cuda import MIB, CachingAllocator
from minilora.memory.traced_bill import traced
from minilora.memory.traced_step import training_step
from minilora.memory.tracer import fake, measure

OURS = LlamaConfig(num_key_value_heads=2, **SIZES)


def hf_llama():
    from transformers import LlamaConfig as Config

    return Config(num_key_value_heads=2, **SIZES)


def gpt2():
    from transformers import GPT2Config

    return GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)


def llama_step(**options):
    return lambda: training_step(OURS, **{"batch": 3, "seq": 8, "rank": 4, **options})


def peft_step(config, **options):
    return lambda: training_step(config(), **{"batch": 3, "seq": 8, "rank": 4, **options})


def mlp_step(**options):
    def make():
        model, x, y = MLP(), torch.randn(5, 12), torch.randint(6, (5,))
        model.up.requires_grad_(False)
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)

        def step():
            hidden = F.layer_norm(model.up(x).relu(), (20,))
            loss = F.cross_entropy(model.down(F.dropout(hidden, 0.1)), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            assert loss.item() == loss.item()
            opt.step()
            opt.zero_grad()

        return step

    return make


CELLS = {
    "ours, full": llama_step(method="full", dtype="float32"),
    "ours, full, bf16, checkpointing": llama_step(method="full", checkpointing=True),
    "ours, full, autocast, checkpointing": llama_step(method="full", dtype="float32", autocast=True,
                                                      checkpointing=True),
    "ours, full, bf16, momentum": llama_step(method="full", optimizer="momentum"),
    "ours, LoRA": llama_step(dtype="float32"),
    "ours, LoRA q v, bf16": llama_step(target_modules=("q_proj", "v_proj")),
    "ours, LoRA, bf16, dropout, sgd": llama_step(dropout=0.1, optimizer="sgd"),
    "ours, LoRA, bf16, dropout, checkpointing": llama_step(dropout=0.1, checkpointing=True),
    "ours, LoRA, autocast, checkpointing": llama_step(dtype="float32", autocast=True, checkpointing=True),
    "ours, LoRA, fp16, adafactor": llama_step(dtype="float16", optimizer="adafactor"),
    "MLP, half frozen": mlp_step(),
    "MLP, half frozen, foreach": mlp_step(foreach=True),
    "Llama + PEFT, bf16": peft_step(hf_llama),
    "Llama + PEFT, autocast, checkpointing": peft_step(hf_llama, dtype="float32", autocast=True, checkpointing=True),
    "GPT-2, full, bf16, checkpointing": peft_step(gpt2, method="full", checkpointing=True),
    "GPT-2 + PEFT, autocast, sgd": peft_step(gpt2, dtype="float32", autocast=True, optimizer="sgd"),
    "GPT-2 + PEFT, bf16, dropout": peft_step(gpt2, dropout=0.1),
}


def births(t):
    """The live bytes at every birth, with the place. (The order in which several storages die at once is chance.)"""
    return [new[:1] + new[3:] for old, new in zip(t.timeline, t.timeline[1:]) if new.requested > old.requested]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", CELLS)
def test_with_the_cpus_kernels_a_trace_is_a_real_runs_count_of_storages(cell):
    with fake():
        traced = measure(CELLS[cell](), kernels="cpu")
    real = measure(CELLS[cell](), real=True)
    assert births(traced) == births(real)
    assert (traced.peak, traced.requested, traced.reserved) == (real.peak, real.requested, real.reserved)
    assert traced.parts == real.parts and sum(traced.parts.values()) == traced.peak
    held, really = ([(b.bytes, b.kind, b.module, b.op) for b in t.held] for t in (traced, real))
    assert held == really
    assert traced.timeline[0].requested == traced.timeline[-1].requested  # nothing of a step outlives it


@pytest.mark.parametrize("cell", [cell for cell in CELLS if "ours" in cell or "MLP" in cell])
def test_the_count_of_storages_is_what_the_cpus_allocator_gave(cell, monkeypatch):
    """After every module's forward, recomputed ones too, and at the end, when no kernel has scratch in hand."""
    # the state of the random numbers that checkpointing keeps is a storage that no operator makes
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", partial(torch.utils.checkpoint.checkpoint,
                                                                      preserve_rng_state=False))
    step, marks = CELLS[cell](), []
    step()

    def at_every_module(mark):
        hook = nn.modules.module.register_module_forward_hook(lambda *_: mark())
        step()
        mark()
        hook.remove()

    with trace(real=True) as t:
        at_every_module(lambda: marks.append(len(t.events)))
    counted = [t.timeline[i].requested - t.timeline[0].requested for i in marks]

    def mark():
        with record_function("mark"):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        at_every_module(mark)
    live, allocated = 0, []
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
        elif event.name() == "mark":
            allocated.append(live)
    assert counted == allocated and len(counted) > 2 and max(counted) > 0


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        square = (x * x).mul_(grad)
        return square + square + square  # a sum, but no meeting of gradients


MEETINGS = {  # what becomes of h, to which two gradients or more come back
    "fresh ones": lambda h: h.sin() * h.cos(),
    "three": lambda h: h.sin() * h.cos() * h.tanh(),
    "around a layer": lambda h: (h + h.sin().tanh()).exp(),
    "around two layers": lambda h: (lambda g: g + g.sin().tanh())(h + h.cos().tanh()),
    "the same one twice": lambda h: (h + h).exp(),
    "a view": lambda h: (h.sin().tanh() + h.view(10, 100).cos().view(-1).tanh()).exp(),
    "transposed": lambda h: h.view(10, 100).t().tanh() * h.view(100, 10).sin(),
    "expanded": lambda h: h.sum() * h.sin().sum(),
    "of a function in Python": lambda h: Cube.apply(h) * Cube.apply(h.sin()),
}


@pytest.mark.parametrize("meeting", MEETINGS)
def test_gradients_that_meet_are_added_in_place_as_when_nobody_watches(meeting):
    x = torch.randn(1000, requires_grad=True)

    def step():
        x.grad = None
        MEETINGS[meeting](x.exp()).sum().backward()

    step()
    with trace(real=True) as t:
        step()
    kept = x.grad  # or its end would be an event, and so would be that of garbage which another test left
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    finally:
        gc.enable()
    del kept
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    allocated = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert [sign * block.bytes for block, sign, *_ in t.events] == allocated


# By hand


def linear_step(optimizer):
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(16, 64)
    opt = optimizer(layer.parameters(), lr=0.1)

    def step():
        loss = layer(x).sum()
        loss.backward()
        opt.step()
        opt.zero_grad()

    return step


def test_sgd_on_a_linear_layer_by_hand():
    with fake():
        t = measure(linear_step(torch.optim.SGD))
    W, x, one = 64 * 32 * 4, 16 * 64 * 4, 512
    assert t.timeline[0][:3] == (W + x, W + x, 2 * MIB)
    assert t.parts == {"trainable weights": W, "gradients": W, "inputs": x, "activations": 2 * one}  # the loss and
    # the gradient that backward starts from
    assert t.peak == 2 * W + x + 2 * one and t.requested == 2 * W + x + 2 * 4 and t.reserved == 2 * MIB
    assert t.moment[3:] == ("backward", "Linear", "mm") and str(t.moment) == "backward, Linear, mm"
    assert [(b.bytes, b.kind, b.module, b.op, b.born) for b in t.held[:2]] == [
        (W, "trainable weights", "Linear", "", 0), (W, "gradients", "Linear", "mm", 5)]


def test_adamw_takes_a_copy_of_everything_at_once_as_on_cuda_and_keeps_its_steps_on_the_host():
    with fake():
        t, one_by_one = (measure(linear_step(torch.optim.AdamW), kernels) for kernels in ("cuda", "cpu"))
    W, x, one = 64 * 32 * 4, 16 * 64 * 4, 512
    assert t.parts == {"optimizer states": 2 * W, "trainable weights": W, "gradients": W, "optimizer temporaries": W,
                       "inputs": x, "activations": one}
    assert t.moment.phase == "optimizer" and t.moment.op == "_foreach_sqrt"
    assert one_by_one.moment.op == "div.Tensor" and one_by_one.parts["optimizer states"] == 2 * W + one
    with fake():
        adafactor = measure(linear_step(torch.optim.Adafactor))
    assert not any(moment.op.startswith("_foreach") for moment in adafactor.timeline)  # it never defaults to that


def test_weights_of_before_gradients_that_stay_and_names_of_modules():
    with fake():
        model, x = MLP(), torch.randn(5, 12)
        model.up.requires_grad_(False)
        model(x).sum().backward()  # gradients of before, to be added to
    with trace() as t:
        model(x).sum().backward()
    kinds = {(b.kind, b.module, b.op, b.bytes) for b in t.held}
    assert {("frozen weights", "up", "", 20 * 12 * 4), ("trainable weights", "down", "", 6 * 20 * 4),
            ("gradients", "down", "", 6 * 20 * 4), ("gradients", "down", "", 6 * 4), ("inputs", "", "", 5 * 12 * 4),
            ("backward temporaries", "down", "mm", 6 * 20 * 4)} <= kinds
    assert all(b.module == "up" for b in t.held if b.bytes == 20 * 12 * 4)
    assert t.held_by(lambda b: b.module)["up"] == 1024 + 512
    table = str(t)
    assert f"peak {t.peak:,} bytes" in table and "frozen weights" in table and "33,554,432 bytes on Hopper" in table


def test_a_four_bit_base_is_counted_as_such():
    with fake():
        t = measure(training_step(OURS, "qlora", rank=4, batch=3, seq=8, target_modules=("q_proj", "v_proj")))
    weights = {b.module: 0 for b in t.held if b.kind == "quantised weights"}
    for b in t.held:
        if b.kind == "quantised weights":
            weights[b.module] += b.bytes
    blocks = -(-48 * 32 // 64)  # of gate_proj: 4 bits a weight, one byte a block, 4 bytes a 256 blocks, 4 for the mean
    assert len(weights) == 2 * 7 and weights["model.layers.1.mlp.gate_proj"] == 32 * blocks + blocks + 4 + 4
    assert "lm_head" in {b.module for b in t.held if b.kind == "frozen weights"}


# What CUDA does otherwise


def made(function, *shapes, kernels="cuda", dtype=torch.bfloat16, autocast=False):
    """The bytes of the storages that are alive after `function`, by operator."""
    with fake():
        inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    with trace(kernels) as t, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = function(*inputs)
    assert y.requires_grad
    alive, found = [b for b in (e[0] for e in t.events) if b.died is None], {}
    for block in alive:
        found.setdefault(block.op, []).append(block.bytes)
    return found


ROW, WIDTH = 64, 1024
N = ROW * WIDTH


def test_dropout_keeps_a_mask_of_one_byte():
    assert made(lambda x: F.dropout(x, 0.1), (ROW, WIDTH)) == {"native_dropout": [2 * N, N]}
    assert made(lambda x: F.dropout(x, 0.1), (ROW, WIDTH), kernels="cpu") == {"empty_like": [2 * N],
                                                                              "mul.Tensor": [2 * N]}
    assert made(lambda x: F.dropout(x, 0.1, training=False) * 2, (ROW, WIDTH)) == {"mul.Tensor": [2 * N]}


def test_norms_keep_fp32_statistics_and_no_copy():
    def layer_norm(x, w):
        return F.layer_norm(x, (WIDTH,), w)

    def rms_norm(x, w):
        return F.rms_norm(x, (WIDTH,), w, 1e-6)

    assert made(layer_norm, (ROW, WIDTH), (WIDTH,))["native_layer_norm"] == [2 * N, 4 * ROW, 4 * ROW]
    assert made(layer_norm, (ROW, WIDTH), (WIDTH,), kernels="cpu")["native_layer_norm"] == [2 * N, 2 * ROW, 2 * ROW]
    assert made(rms_norm, (ROW, WIDTH), (WIDTH,)) == {"new_empty": [4 * ROW], "empty_like": [2 * N]}
    assert sum(sum(sizes) for sizes in made(rms_norm, (ROW, WIDTH), (WIDTH,), kernels="cpu").values()) > 10 * N


@pytest.mark.parametrize("options, heads, dtype, quadratic", [
    ({"is_causal": True}, 2, torch.bfloat16, False),
    ({"is_causal": True, "enable_gqa": True}, 1, torch.bfloat16, False),
    ({"is_causal": True, "dropout_p": 0.1}, 2, torch.bfloat16, False),
    ({"is_causal": True}, 2, torch.float32, False),
    ({"is_causal": True, "enable_gqa": True}, 1, torch.float32, True),  # the memory-efficient kernel has no groups
])
def test_attention_is_fused_where_cuda_has_a_kernel(options, heads, dtype, quadratic):
    T, D = 256, 20
    size = dtype.itemsize
    sizes = made(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), (1, 2, T, D), (1, heads, T, D),
                 (1, heads, T, D), dtype=dtype)
    assert any(T * T <= n for n in sum(sizes.values(), [])) == quadratic
    if dtype == torch.bfloat16:  # heads are padded to a multiple of 8; log-sum-exp in fp32
        padded = 2 * T * 24 * size
        assert sizes["_scaled_dot_product_flash_attention"][:2] == [padded, 2 * T * 4]
    cpu = made(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), (1, 2, T, D), (1, heads, T, D),
               (1, heads, T, D), dtype=dtype, kernels="cpu")
    assert any(T * T <= n for n in sum(cpu.values(), [])) == ("dropout_p" in options)


def test_a_mask_takes_the_memory_efficient_kernel():
    T = 256
    with fake():
        mask = torch.ones(T, T, dtype=torch.bool)
    sizes = made(lambda q: F.scaled_dot_product_attention(q, q, q, mask), (1, 2, T, 16))
    assert sizes["_scaled_dot_product_efficient_attention"][:2] == [2 * T * 16 * 2, 2 * T * 4]
    assert sizes["where.self"] == [T * T * 2]  # the mask, as what is added to the scores


def test_autocast_follows_cudas_lists():
    def loss(x):
        return F.cross_entropy(x, torch.zeros(ROW, dtype=torch.int64))

    with fake():
        x, w = torch.randn(ROW, WIDTH), torch.randn(8, WIDTH)
    for kernels, normed, squared in (("cuda", torch.float32, torch.float32), ("cpu", torch.bfloat16, torch.bfloat16)):
        with trace(kernels), torch.autocast("cpu", torch.bfloat16):
            half = x @ x.T
            assert half.dtype == F.linear(x, w).dtype == torch.bfloat16
            assert F.layer_norm(half, (ROW,)).dtype == normed
            assert half.pow(2).dtype == squared and half.softmax(-1).dtype == squared
            assert torch.cat((half, x), dim=1).dtype == torch.float32
    # CUDA's cross_entropy_loss asks for a log-softmax in the logits' own dtype, and only nll_loss is cast
    assert made(loss, (ROW, WIDTH), autocast=True)["_log_softmax"] == [2 * N]
    assert made(loss, (ROW, WIDTH), autocast=True, kernels="cpu")["_log_softmax"] == [4 * N]


def test_nothing_of_cuda_stays_behind_not_even_after_an_error():
    def globals_of_torch():
        optimizer = sys.modules["torch.optim.optimizer"]
        return (optimizer._foreach_supported_types, optimizer._get_foreach_kernels_supported_devices(),
                len(nn.modules.module._global_forward_hooks), len(optimizer._global_optimizer_pre_hooks))

    before = globals_of_torch()
    with fake():
        step = linear_step(torch.optim.SGD)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), trace():
            step()
            1 / 0
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.layer_norm(x, (8,)).dtype == torch.bfloat16
    assert F.dropout(x, 0.1).grad_fn.name() == "MulBackward0"
    assert type(x + 1) is torch.Tensor and torch.isfinite(F.rms_norm(x, (8,))).all()
    assert globals_of_torch() == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", [cell for cell in CELLS if "checkpointing" in cell])
def test_checkpointing_goes_with_cudas_kernels(cell):
    with fake():
        t = measure(CELLS[cell]())
    assert {"recomputation", "backward", "optimizer"} <= {moment.phase for moment in t.timeline}
    assert sum(t.parts.values()) == t.peak and t.timeline[0].requested == t.timeline[-1].requested


# The allocator


def test_segments_of_the_caching_allocator():
    pool = CachingAllocator()
    small = [pool.allocate(n) for n in (1, 512, 513, MIB)]
    assert [size for _, _, size in small] == [512, 512, 1024, MIB] and pool.reserved == 2 * MIB  # all in one segment
    large = [pool.allocate(6 * MIB) for _ in range(3)]
    assert pool.reserved == 22 * MIB and pool.allocate(2 * MIB)[2] == 2 * MIB  # fits behind the third
    assert pool.allocate(10 * MIB + 1)[2] == 10 * MIB + 512 and pool.reserved == 34 * MIB  # rounded to 2 MiB, and split
    assert pool.allocate(11 * MIB)[2] == 12 * MIB and pool.reserved == 46 * MIB  # 1 MiB is left over: not split
    pool.release(large[0])
    pool.release(large[2])
    assert pool.allocate(4 * MIB)[1] == large[0][1] and pool.reserved == 46 * MIB  # best fit, at the lower address
    pool.release(large[1])
    assert pool.allocate(7 * MIB)[1] == large[0][1] + 4 * MIB  # merged with its free neighbours
    assert pool.allocate(MIB + 1) and pool.reserved == 46 * MIB


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40 * MIB), st.integers(0, 3)), max_size=60))
def test_the_allocator_gives_no_byte_twice_and_merges_all_it_gets_back(requests):
    pool, live, segments = CachingAllocator(), [], 0
    for size, drop in requests:
        before = pool.reserved
        live.append(pool.allocate(size))
        segments += pool.reserved > before
        assert live[-1][2] >= size
        for _ in range(min(drop, len(live))):
            pool.release(live.pop(len(live) // 2))
        spans = sorted((address, address + n) for _, address, n in live)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))
        assert sum(n for *_, n in live) + sum(pool.size.values()) == pool.reserved
    for block in live:
        pool.release(block)
    assert len(pool.size) == segments and sum(pool.size.values()) == pool.reserved


# Misuse


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="kernels must be 'cuda' or 'cpu', got 'tpu'"):
        trace("tpu")
    with pytest.raises(ValueError, match=r"a real tensor of shape \(12,\) met the fake ones.*inside `with fake\(\):`"):
        real = torch.randn(12)
        with trace():
            torch.ones(12) + real
    with fake():
        x = torch.randn(3)
        assert x.sum().item() == 1 and bool(x.isfinite().all()) and torch.equal(x, x + 1)  # any value is 1
    with pytest.raises(ValueError, match="nonzero.* shape that depends on data"), trace():
        torch.ones(3).nonzero()
    with trace() as t:
        pass
    assert t.peak == t.reserved == 0 and t.parts == {} and "peak 0 bytes" in str(t)


@pytest.mark.parametrize("options, says", [
    ({"method": "lorra"}, "no method 'lorra', expected one of full, lora.*near: lora"),
    ({"optimizer": "adam"}, "no optimizer 'adam', expected one of adamw, .*near: adamw"),
    ({"dtype": "bf16"}, "no dtype 'bf16', expected one of float32, bfloat16"),
    ({"batch": 0}, r"batch must be a positive integer below 2\^31, got 0"),
    ({"seq": 2.5}, r"seq must be a positive integer below 2\^31, got 2.5"),
    ({"seq": 4096}, "seq 4096 is longer than the model's context of 2048"),
    ({"rank": 0}, "rank must be a positive integer, got 0"),
    ({"rank": 40, "target_modules": ("q_proj",)}, "rank 40 is larger"),
    ({"target_modules": ("q_porj",)}, "'q_porj' matches no module; near it: q_proj"),
    ({"config": dict}, "expected a LlamaConfig or the config of a causal language model of transformers', got a dict"),
])
def test_a_step_that_makes_no_sense_is_refused(options, says):
    with pytest.raises(ValueError, match=says), fake():
        training_step(**{"config": OURS, **options} if "config" not in options else
                      options | {"config": options["config"](), "seq": 8})


def test_the_function_keeps_its_name_when_the_room_is_imported():
    importlib.import_module("minilora.memory.tracer")
    from minilora import memory

    assert memory.trace is trace and callable(memory.trace)
    assert "trace" in dir(memory)
    with pytest.raises(AttributeError, match="no attribute 'trase'"):
        memory.trase


# The command


@pytest.fixture
def folder(tmp_path):
    gpt2().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_the_command_traces_a_hugging_face_architecture(folder, capsys):
    assert main(["trace", "--config", str(folder), "--rank", "4", "--targets", "c_attn", "--seq", "16", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    run = Training.of_stack("trl", rank=4, target_modules=("c_attn",), seq=16)  # as `memory` takes it
    t, count = traced(gpt2(), run)
    assert answer == {"assumptions": run.assumptions()} | t.to_dict() and answer["peak"] == sum(answer["parts"].values())
    assert count == ModelSpec.from_config(folder).parameters
    assert main(["trace", "--config", str(folder / "config.json"), "--method", "full", "--seq", "16"]) == 0
    assert "trainable weights" in capsys.readouterr().out


@pytest.mark.parametrize("change, says", [
    (["--config", "/nowhere"], "there is no /nowhere"),
    (["--optimizer", "adam"], "near it: adamw"),
    (["--seq", "64"], "seq 64 is longer than the model's context of 32"),
    (["--seq", "many"], "invalid int value: 'many'"),
    (["--targets", "q_proj"], "q_proj"),
    (["--kernels", "tpu"], "no kernels 'tpu'"), (["--kernels", "unsloth"], "the trace has kernels torch alone"),
    (["--cards", "2"], "the trace has cards 1 alone"), (["--card", "t5"], "near it: t4"),
    (["--stack", "minilora"], "the trace has stack transformers or trl alone"),
])
def test_the_command_ends_in_one_line(folder, change, says, capsys):
    assert main(["trace", "--config", str(folder), "--seq", "16", *change]) == 2
    out = capsys.readouterr()
    assert says in out.err and out.err.count("\n") == 1 and not out.out


def test_without_transformers_the_command_says_so(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["trace", "--config", str(folder)]) == 2
    assert "transformers is not installed" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert main(["trace", "--config", str(folder), "--method", "qlora", "--seq", "16"]) == 2
    assert "bitsandbytes is not installed: pip install bitsandbytes" in capsys.readouterr().err


def test_a_copied_model_traces_as_the_model_does():
    """Its tensors' mode must not be copied with it: tensors of two modes do not mix."""
    with fake():
        model = MLP()
        twin, x = copy.deepcopy(model), torch.randn(5, 12)
    peaks = {measure(lambda: m(x).square().sum().backward()).peak for m in (model, twin)}
    assert len(peaks) == 1 and peaks.pop() > 0
