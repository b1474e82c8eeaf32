"""Small models with random weights, and what the tests do to their adapters."""

import torch
from torch import Tensor, nn

from minilora import LoRAConfig, lora_parameters
from minilora.config import variants
from minilora.llama import Llama, LlamaConfig

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(24).view(3, 8) * 7 % 64


class MLP(nn.Module):
    """What a user might write."""

    def __init__(self, inp: int = 12, hidden: int = 20, out: int = 6):
        super().__init__()
        self.up, self.down = nn.Linear(inp, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Conv1D(nn.Module):
    """GPT-2's linear, written apart from transformers: the weight is (in, out)."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.1), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class Codes(nn.Module):
    """A linear that keeps its weight as int8 codes."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max() / 127)
        self.register_buffer("codes", (linear.weight / self.scale).round().to(torch.int8))

    def dequantize(self):
        return self.codes.float() * self.scale

    def forward(self, x):
        return x @ self.dequantize().T.to(x.dtype)


def our_llama() -> nn.Module:
    return Llama(LlamaConfig(num_key_value_heads=2, **SIZES), seed=0).eval()


def hf_llama() -> nn.Module:
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(Config(num_key_value_heads=2, **SIZES)).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(max_position_embeddings=32, **SIZES)).eval()


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def roundings(got, expected) -> float:
    """How far two tensors (or lists of them) lie apart: the largest difference, in units of what
    one rounding to their dtype may change the largest value expected.

    Two orders of one sum differ by a few; what is computed from it by some more. A wrong formula is off by thousands.
    """
    got, expected = (list(x) if isinstance(x, (list, tuple)) else [x] for x in (got, expected))
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in expected]
    apart = max((a.double() - b.double()).abs().max().item() for a, b in zip(got, expected, strict=True))
    one = torch.finfo(expected[0].dtype).eps * max(t.abs().max().item() for t in expected)
    return apart / one if apart else 0.0


@torch.no_grad()
def shake(model: nn.Module, size: float = 0.1) -> None:
    """Move every adapter parameter away from its start, as training would."""
    for p in lora_parameters(model):
        p.add_(torch.randn_like(p) * size)


def state(model: nn.Module) -> dict:
    """Everything of a model that a failed call must leave alone: modules, tensors by identity and value, flags."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {
        "modules": [(name, id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)],
        "tensors": {name: (id(t), t.requires_grad, t.detach().clone()) for name, t in tensors.items()},
        "attributes": sorted(model.__dict__),
    }


def same(a: dict, b: dict) -> bool:
    """Whether two states are equal, bit for bit."""

    def bits(t: Tensor) -> bytes:
        return t.contiguous().view(torch.uint8).numpy().tobytes()

    return (
        a["modules"] == b["modules"]
        and a["attributes"] == b["attributes"]
        and a["tensors"].keys() == b["tensors"].keys()
        and all(
            x[:2] == y[:2] and x[2].dtype == y[2].dtype and bits(x[2]) == bits(y[2])
            for x, y in ((a["tensors"][k], b["tensors"][k]) for k in a["tensors"])
        )
    )


def lora_layer(base: nn.Module, rank: int = 8, alpha: float = 16, dropout: float = 0.0, use_rslora: bool = False,
               **variant):
    """A layer of the variant that a config with these settings would choose."""
    layer = variants()[LoRAConfig(**variant).variant]
    return layer(base, rank, alpha, dropout, use_rslora)
