"""LoRA's relatives on our decoder: other small things to train beside a frozen base, behind the same verbs.

    inject(model, IA3()); report(model); save_adapter(model, folder); load_adapter(model, folder); remove(model)

The config says which: PromptTuning, PrefixTuning, IA3, BottleneckAdapters or BitFit. Each wraps modules of the base,
whose own weights are never written: `remove` takes the wrappers off again. LoRA and (IA)3 and BitFit start as their
base does; virtual tokens and bottleneck adapters do not.

In shapes and counts B is batch, T tokens, C hidden size, L layers, K key/value heads, D head size, n virtual tokens.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bases import adapter_options, kind_of, shape_of
from .config import ALL_LINEAR, LoRAConfig, entry_matches, require
from .injection import METHODS, adapter_layers
from .layers import AdapterLayer, Wrapper
from .peft_format import FORMATS, Format
from .planning import choose


def relative(method: type) -> type:
    """Makes `inject` know a method: a dataclass whose ``wrap(model)`` gives {module: its adapter}."""
    METHODS[method] = lambda model, config, any_rank: config.wrap(model)
    return method


@dataclass(frozen=True)
class VirtualTokens:
    """n trained tokens that stand before every text and take the first n positions of the context.

    Args:
        tokens: n.
        init_ids: ids of the n words that they start as; empty: random words of the vocabulary.

    Raises:
        ValueError: a value outside its range.
    """

    tokens: int = 20
    init_ids: Sequence[int] = ()

    def __post_init__(self):
        object.__setattr__(self, "init_ids", tuple(self.init_ids))
        if self.init_ids:
            object.__setattr__(self, "tokens", len(self.init_ids))
        require(type(self.tokens) is int and self.tokens > 0, "tokens must be a positive integer", self.tokens)
        require(all(type(i) is int and i >= 0 for i in self.init_ids), "init_ids must be token ids", self.init_ids)

    def start(self, model: nn.Module) -> tuple[nn.Module, Tensor]:
        """The decoder inside our Llama, and the ids to start from, (n,).

        Raises ValueError if the model is another one, has no room for n tokens, or has no such ids.
        """
        decoder = getattr(model, "model", None)
        if not all(hasattr(decoder, part) for part in ("embed_tokens", "layers", "cos")):
            raise ValueError(f"virtual tokens need our own decoder, minilora.llama.Llama, got a {type(model).__name__}")
        if self.tokens >= len(decoder.cos):
            raise ValueError(f"{self.tokens} virtual tokens leave no room for text in a context of {len(decoder.cos)}")
        words, device = decoder.embed_tokens.num_embeddings, decoder.embed_tokens.weight.device
        if not self.init_ids:
            return decoder, torch.randint(words, (self.tokens,), device=device)
        if max(self.init_ids) >= words:
            raise ValueError(f"init_ids must be below the vocabulary's size of {words}, got {max(self.init_ids)}")
        return decoder, torch.tensor(self.init_ids, device=device)


@relative
@dataclass(frozen=True)
class PromptTuning(VirtualTokens):
    """Virtual tokens with trained embeddings (Lester et al. 2021, 2104.08691, section 2).

    Trains n C. Logits come for the text alone. Starting from words is the paper's section 2.1.
    """

    def wrap(self, model: nn.Module) -> dict[nn.Module, AdapterLayer]:
        decoder, ids = self.start(model)
        return {decoder: PromptedDecoder(decoder, ids)}


@relative
@dataclass(frozen=True)
class PrefixTuning(VirtualTokens):
    """Virtual tokens with trained keys and values in every layer (Li & Liang 2021, 2101.00190, section 4).

    Trains n L 2 K D. It starts as if the words of `init_ids` stood before every text (section 7.4).

    Args:
        hidden: width of the MLP (section 4.3) that makes the prefix from n vectors of size K D while it trains; what is
            saved is the prefix alone. It starts at random. 0: no MLP.

    Raises:
        ValueError: a value outside its range, or both an MLP and words to start from.
    """

    hidden: int = 0

    def __post_init__(self):
        super().__post_init__()
        require(type(self.hidden) is int and self.hidden >= 0, "hidden must be 0 or a positive integer", self.hidden)
        require(not (self.hidden and self.init_ids),
                "an MLP cannot start from words: init_ids must be empty, or hidden 0",
             self.init_ids)

    def wrap(self, model: nn.Module) -> dict[nn.Module, AdapterLayer]:
        decoder, ids = self.start(model)
        return {decoder: PrefixedDecoder(decoder, ids, self.hidden)}


@relative
@dataclass(frozen=True)
class IA3:
    """Trained factors on the keys, the values and the inside of the MLP (Liu et al. 2022, 2205.05638, section 3.3).

    Trains L (K D + K D + the MLP's width). All start at 1. A key is scaled before it is rotated, as in PEFT.
    """

    def wrap(self, model: nn.Module) -> dict[nn.Module, AdapterLayer]:
        # the inside of the MLP is what down_proj gets
        places = {"k_proj": False, "v_proj": False, "down_proj": True}
        return {m: Scaled(m, shape_of(m)[at_input], at_input)
                for end, at_input in places.items() for m in linears(model, end)}


@relative
@dataclass(frozen=True)
class BottleneckAdapters:
    """A small MLP with a skip around it, behind attention and behind the MLP of each block (Houlsby et al. 2019,
    1902.00751, section 2.1): h + up(gelu(down(h))).

    Trains 2 L (2 m C + C + m), and with `norms` 2 L C + C more. Weights start normal with deviation 0.01, cut off at
    0.02, so the model starts near its base, not equal to it.

    Args:
        size: m, the width inside.
        norms: also scale every norm's output by trained factors, which start at 1 (the paper trains the norms).

    Raises:
        ValueError: a size that is not a positive integer.
    """

    size: int = 64
    norms: bool = False

    def __post_init__(self):
        require(type(self.size) is int and self.size > 0, "size must be a positive integer", self.size)
        require(isinstance(self.norms, bool), "norms must be True or False", self.norms)

    def wrap(self, model: nn.Module) -> dict[nn.Module, AdapterLayer]:
        behind = [m for end in ("o_proj", "down_proj") for m in linears(model, end)]
        width = min(shape_of(m)[0] for m in behind)
        require(self.size < width, f"size must be below the width {width}", self.size)
        new = {m: Bottleneck(m, self.size) for m in behind}
        if self.norms:
            new |= {m: Scaled(m, len(m.weight)) for name, m in model.named_modules() if name.endswith("norm")}
        return new


@relative
@dataclass(frozen=True)
class BitFit:
    """Only the biases train (Ben Zaken et al. 2022, 2106.10199, section 3): each gets a trained change, 0 at first.

    Args:
        add: give a bias to every linear but the head, whether it had one or not. Llama has none, so there BitFit in the
            strict sense has nothing to train.

    Raises:
        ValueError: `add` is not a bool.
    """

    add: bool = False

    def __post_init__(self):
        require(isinstance(self.add, bool), "add must be True or False", self.add)

    def wrap(self, model: nn.Module) -> dict[nn.Module, AdapterLayer]:
        modules = dict(model.named_modules())
        biased = [m for m in modules.values() if isinstance(getattr(m, "bias", None), nn.Parameter)]
        for m in biased:
            require(kind_of(m) in ("linear", "conv1d") or isinstance(m, nn.LayerNorm),
                    "a bias must be a linear's or a LayerNorm's", m)
        if self.add:
            kinds = {name: kind for name, m in modules.items() if name and (kind := kind_of(m))}
            biased += [modules[n] for n in choose(model, modules, kinds, LoRAConfig(target_modules=ALL_LINEAR))]
        if not biased:
            raise ValueError("the model has no bias to train; BitFit(add=True) gives every linear one, zero at first")
        return {m: Biased(m) for m in biased}


Method = PromptTuning | PrefixTuning | IA3 | BottleneckAdapters | BitFit
BY_NAME = {method.__name__: method for method in Method.__args__}


# On disk


def written(model: nn.Module) -> dict:
    """The ``adapter_config.json`` of a model's adapters."""
    method = as_kept(next(iter(adapter_layers(model).values())).config)
    return {"peft_type": AdapterLayer.peft_type, "method": type(method).__name__,
            "settings": dataclasses.asdict(method)}


def read(stored: dict) -> Method:
    """The method that an ``adapter_config.json`` says."""
    try:
        return as_kept(BY_NAME[stored["method"]](**stored["settings"]))
    except (KeyError, TypeError) as e:
        raise ValueError(f"no method known here (one of {', '.join(BY_NAME)}): {e!r}") from None


FORMATS[AdapterLayer.peft_type] = Format("", written, read)


def as_kept(method: Method) -> Method:
    """The method that fits what is on disk: the prefix that an MLP made, without the MLP."""
    return dataclasses.replace(method, hidden=0) if isinstance(method, PrefixTuning) else method


def linears(model: nn.Module, end: str) -> list[nn.Module]:
    """All linears whose name ends in `end`."""
    found = [m for name, m in model.named_modules() if entry_matches(end, name) and kind_of(m) in ("linear", "conv1d")]
    if not found:
        raise ValueError(f"the model has no linear called {end}, which a Llama has in every block")
    return found


# What stands around a module of the base


class Scaled(AdapterLayer):
    """Input or output times trained factors, (size,)."""

    def __init__(self, base_layer: nn.Module, size: int, at_input: bool = False):
        super().__init__(base_layer)
        self.at_input = at_input
        self.scale = nn.Parameter(torch.ones(size, **adapter_options(base_layer)))

    def forward(self, x: Tensor) -> Tensor:
        if self.at_input:
            return self.base_layer(x * self.scale.to(x.dtype))
        y = self.base_layer(x)
        return y * self.scale.to(y.dtype)


class Biased(AdapterLayer):
    """Output plus a trained change of the bias, (out,)."""

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        size = shape_of(base_layer)[0] if kind_of(base_layer) else len(base_layer.bias)
        self.change = nn.Parameter(torch.zeros(size, **adapter_options(base_layer)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y + self.change.to(y.dtype)


class Bottleneck(AdapterLayer):
    """h + up(gelu(down(h))), h the output (..., C)."""

    def __init__(self, base_layer: nn.Module, size: int):
        super().__init__(base_layer)
        width, options = shape_of(base_layer)[0], adapter_options(base_layer)
        self.down, self.up = nn.Linear(width, size, **options), nn.Linear(size, width, **options)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base_layer(x)  # (..., C)
        down, up = ((p.weight.to(h.dtype), p.bias.to(h.dtype)) for p in (self.down, self.up))
        return h + F.linear(F.gelu(F.linear(h, *down)), *up)  # (..., C) -> (..., m) -> (..., C)


class WrappedDecoder(Wrapper, AdapterLayer):
    """The decoder with virtual tokens before its text; otherwise it looks as it did."""

    @property
    def checkpointing(self) -> bool:
        return self.base_layer.checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool):
        self.base_layer.checkpointing = on


class PromptedDecoder(WrappedDecoder):
    def __init__(self, decoder: nn.Module, ids: Tensor):
        super().__init__(decoder)
        self.prompt = nn.Parameter(decoder.embed_tokens(ids).detach().to(**adapter_options(decoder)))  # (n, C)

    def forward(self, ids: Tensor, cache=None) -> Tensor:
        if cache is not None and cache.length:
            return self.base_layer(ids, cache)  # the prompt has been seen
        if cache is not None:
            cache.size += len(self.prompt)
        x = self.base_layer.embed_tokens(ids)  # (B, T, C)
        x = torch.cat((self.prompt.to(x.dtype).expand(len(x), -1, -1), x), dim=1)  # (B, n + T, C)
        return self.base_layer(x, cache)[:, len(self.prompt):]  # (B, T, C)


class PrefixedDecoder(WrappedDecoder):
    def __init__(self, decoder: nn.Module, ids: Tensor, hidden: int = 0):
        super().__init__(decoder)
        options, taken = adapter_options(decoder), Recorder()
        with torch.no_grad():
            decoder(ids[None], taken)
        start = torch.stack(taken.kv).to(**options)  # (L, 2, K, n, D)
        self.shape, self.mlp = start.shape, None
        if hidden:
            L, two, K, n, D = start.shape
            self.prefix = nn.Parameter(torch.randn(n, K * D, **options))
            self.mlp = nn.Sequential(nn.Linear(K * D, hidden, **options), nn.Tanh(),
                                     nn.Linear(hidden, L * two * K * D, **options))
        else:
            self.prefix = nn.Parameter(start)

    def keys_values(self) -> Tensor:
        """(L, 2, K, n, D)"""
        if self.mlp is None:
            return self.prefix
        L, two, K, n, D = self.shape
        return self.mlp(self.prefix).view(n, L, two, K, D).permute(1, 2, 3, 0, 4)

    def saved(self) -> dict[str, Tensor]:
        return {"prefix": self.keys_values()}

    def forward(self, ids: Tensor, cache=None) -> Tensor:
        if cache is not None and cache.length:
            return self.base_layer(ids, cache)  # the prefix is in the cache
        prefix = Prefix(self.keys_values().to(self.base_layer.embed_tokens.weight.dtype), len(ids))
        if cache is None:
            return self.base_layer(ids, prefix)
        cache.size += prefix.length
        for layer, (k, v) in enumerate(prefix.kv):
            cache.append(layer, k, v)
        cache.length = prefix.length
        return self.base_layer(ids, cache)


class Prefix:
    """Stands in the place of a cache: the keys and values before the text, and nothing of the text itself, so that
    autograd can follow and a block can be computed twice."""

    def __init__(self, kv: Tensor, batch: int):
        self.kv = kv[:, :, None].expand(-1, -1, batch, -1, -1, -1)  # (L, 2, B, K, n, D)
        self.length = kv.shape[3]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        before = self.kv[layer].to(k.dtype)
        return torch.cat((before[0], k), dim=2), torch.cat((before[1], v), dim=2)  # (B, K, n + T, D)


class Recorder:
    """Stands in the place of an empty cache and takes down each layer's keys and values."""

    def __init__(self):
        self.kv, self.length = [], 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.kv.append(torch.cat((k, v)))  # (2, K, n, D) for one text
        return k, v
