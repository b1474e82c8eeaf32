"""A stranger's decoder family, optimizer and activation, defined in this file alone: priced and traced alike."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilora import LoRAConfig, inject
from minilora.llama import LlamaConfig
from minilora.memory import ModelSpec, Training, estimate, fake, fit, measure, training_step
from minilora.memory.activations import ACTIVATIONS
from minilora.memory.decoders.decoder import Layer
from minilora.memory.decoders.hugging_face import HuggingFaceDecoder, Matrices
from minilora.memory.ledger import Tensor
from minilora.memory.models import FAMILIES, Family, register
from minilora.memory.optimizers import OPTIMIZERS, Optimizer, full_states
from minilora.memory.stacks import STACKS

# ---------------------------------------------------------------- a family: what a file of decoders/ would hold


class TinyDecoder(HuggingFaceDecoder):
    """`Tiny`, below: no positions, one norm a layer, attention and MLP side by side."""

    def positioned(self, x: Tensor) -> list[Tensor]:
        return [x]

    def block(self, x: Tensor, layer: Layer, tables: list[Tensor]) -> Tensor:
        m, norms = layer
        normed = self.norm(x, norms[0])
        h, _ = self.attention(normed, m, tables)
        h = self.ops.add(h, self.mlp(normed, m), "sum of both")
        return self.ops.add(x, h, "residual sum")

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, ...]:
        return tuple(self.ops.view(m[name](x)) for name in self.spec.layout.qkv)

    def whole_loss(self) -> Tensor:
        return self.ops.cross_entropy(self.head_of(self.decode()), self.targets)


class TinyFamily(Family):
    model_type = "tiny"
    decoder = TinyDecoder
    layer = "layers."
    qkv, out = ("q_proj", "k_proj", "v_proj"), "o_proj"
    up, down = ("up_proj",), "down_proj"
    targets = ("q_proj", "v_proj")
    norms, tied = 1, True
    activation = "relu squared"
    names = {"intermediate_size": "width"}


def relu_squared(ops, x: Tensor) -> Tensor:
    """relu(x)^2, as two operators: relu keeps its output, and so does the product of it with itself."""
    y = ops.unary(x, "relu", "output")
    return ops.mul(y, y)


# the model that the family describes, as its authors would write it in torch


class TinyLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(c["hidden_size"]), c["num_attention_heads"]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(c["hidden_size"], c["hidden_size"], bias=False))
        self.up_proj = nn.Linear(c["hidden_size"], c["width"], bias=False)
        self.down_proj = nn.Linear(c["width"], c["hidden_size"], bias=False)

    def forward(self, x):
        normed = self.norm(x)
        h = self.attend(normed) + self.mlp(normed)
        return x + h

    def attend(self, x):
        q, k, v = (p(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj,
                                                                                      self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # B H T D
        return self.o_proj(y.transpose(1, 2).reshape(x.shape))

    def mlp(self, x):
        h = self.up_proj(x).relu()
        return self.down_proj(h * h)


class Tiny(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(TinyLayer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.LayerNorm(c["hidden_size"])

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.embed.weight)


# ---------------------------------------------------------------- an optimizer: what an entry of OPTIMIZERS would hold


class Signs(torch.optim.Optimizer):
    """Momentum's sign, times the weight's own mean size."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            m = self.state[p].setdefault("momentum", torch.zeros_like(p))
            m.mul_(0.9).add_(p.grad)
            sign = m.sign()
            size = p.abs()
            p.sub_(sign.mul_(size).mul_(self.param_groups[0]["lr"]))


def signs(ops, leaves) -> None:
    """One weight after the other; a loop's variables keep the last weight's tensors until the next one's are there."""
    for leaf, _ in leaves:
        ops.place = ("optimizer", ops.layers[leaf])
        sign = ops.new(leaf.count, leaf.width, "sign")
        size = ops.new(leaf.count, leaf.width, "size")


# ---------------------------------------------------------------- both at work

CONFIG = {"model_type": "tiny", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
          "width": 160, "max_position_embeddings": 64}


@pytest.fixture
def extended(monkeypatch):
    """The registries with all three, put back afterwards."""
    monkeypatch.setitem(FAMILIES, "tiny", TinyFamily())
    monkeypatch.setitem(ACTIVATIONS, "relu squared", relu_squared)
    monkeypatch.setitem(OPTIMIZERS, "signs", Optimizer(full_states("momentum"), signs, Signs))


def traced(run: Training) -> int:
    """The peak of a real step of `Tiny`."""
    with fake():
        model = Tiny(CONFIG).to(torch.bfloat16)
        if run.method == "lora":
            inject(model, LoRAConfig(run.rank, 2 * run.rank, run.target_modules or TinyFamily.targets))
        ids, targets = (torch.randint(CONFIG["vocab_size"], (run.batch, run.seq)) for _ in range(2))
        opt = OPTIMIZERS[run.optimizer].make([p for p in model.parameters() if p.requires_grad], 1e-3)

    def step():
        loss = F.cross_entropy(model(ids).view(-1, CONFIG["vocab_size"]), targets.view(-1))
        loss.backward()
        opt.step()
        opt.zero_grad()

    return measure(step).peak


@pytest.mark.parametrize("run", [
    Training("full", batch=2, seq=32), Training("lora", 4, batch=2, seq=32), Training("lora", 4, "all-linear", seq=48),
    Training("full", seq=1, optimizer="sgd"), Training("lora", 4, ("up_proj",), batch=3, seq=17)],
    ids=lambda run: f"{run.method} {run.target_modules} {run.seq} {run.optimizer}")
def test_a_new_family_is_priced_as_it_is_traced(extended, run):
    spec = ModelSpec.from_config(CONFIG)
    assert spec.parameters == sum(p.numel() for p in Tiny(CONFIG).parameters())
    assert [m.name for m in spec.targets()] == ["q_proj", "v_proj"]
    assert estimate(spec, run).peak == traced(run)


@pytest.mark.parametrize("method, seq", [("full", 1), ("full", 32), ("lora", 1)])
def test_a_new_optimizer_is_priced_as_it_is_traced(extended, method, seq):
    run = Training(method, 4, "all-linear", seq=seq, optimizer="signs")
    assert estimate(ModelSpec.from_config(CONFIG), run).peak == traced(run)
    ours = LlamaConfig(64, 64, 176, 2, 4, max_position_embeddings=64)
    with fake():
        step = training_step(ours, method, 4, "all-linear", 1, seq, "signs")
    assert estimate(ModelSpec.from_config(ours.to_hf()), run).peak == measure(step).peak


def test_the_rest_of_the_house_knows_them(extended):
    spec = ModelSpec.from_config(CONFIG)
    assert fit(spec, Training(seq=32, optimizer="signs"), "t4").verdicts[0].answer == "fits"
    assert "tiny" in FAMILIES and list(FAMILIES)[-1] == "tiny"
    with pytest.raises(ValueError, match="near it: tiny"):
        ModelSpec.from_config(CONFIG | {"model_type": "tinyy"})
    with pytest.raises(ValueError, match="a tiny config lacks width"):
        ModelSpec.from_config({k: v for k, v in CONFIG.items() if k != "width"})


def test_the_registries_are_as_before():
    """Runs after the tests above; and a family that registers itself can be taken away again."""
    assert "tiny" not in FAMILIES and "signs" not in OPTIMIZERS and "relu squared" not in ACTIVATIONS
    with pytest.raises(ValueError, match="model_type 'tiny'"):
        ModelSpec.from_config(CONFIG)
    with pytest.raises(ValueError, match="no optimizer 'signs'"):
        Training(optimizer="signs")
    before = len(FAMILIES)
    try:
        assert register(TinyFamily) is TinyFamily and "tiny" in FAMILIES
    finally:
        del FAMILIES["tiny"]
    assert len(FAMILIES) == len(list(FAMILIES)) == before and "tiny" not in FAMILIES
    assert {"gpt2", "llama"} <= set(FAMILIES) and "hugging_face" not in FAMILIES and "minilora" not in FAMILIES
    with pytest.raises(KeyError):
        FAMILIES["hugging_face"]


def test_a_new_stack_is_one_entry(monkeypatch):
    """Transformers' decoder with our adapters, under a name of its own."""
    monkeypatch.setitem(STACKS, "mixed", replace(
        STACKS["transformers"], linear="minilora", peft=False))
    spec = ModelSpec.preset("gpt2")
    peaks = SimpleNamespace(**{name: estimate(spec, Training(stack=name)).peak
                               for name in ("minilora", "transformers", "mixed")})
    assert peaks.mixed == peaks.minilora != peaks.transformers
