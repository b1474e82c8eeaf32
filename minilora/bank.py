"""Many adapters on one base: switch between them, combine them, route each row of a batch through its own."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate, chain
from typing import cast

import torch
from torch import Tensor, nn

from .adapters import insert_adapter, read_adapter
from .bases import kind_of, output_scale, widest
from .config import is_number, require, variants
from .injection import Mergeable, mergeable_layers, need_whole, put_back, remove, unwrap, wrap
from .layers import AdapterLayer, LoRALayer, Wrapper
from .spectrum import product_svd
from .tables import table


@dataclass(frozen=True)
class Entry:
    """An adapter of a bank: its layers by module, the fingerprint of the base it was trained on (None: its file, as
    PEFT's, does not say), and where it comes from."""

    layers: Mapping[str, Mergeable]
    base: str | None
    source: str


@dataclass(frozen=True)
class ListedAdapter:
    """A line of `AdapterBank.list`. `version` is a hash of what the adapter computes: training changes it."""

    name: str
    version: str
    base: str | None
    ranks: tuple[int, ...]
    modules: int
    parameters: int
    in_use: bool
    source: str


class Listing(tuple):
    """`ListedAdapter`s; printing gives a table."""

    def __str__(self):
        rows = [(a.name, a.version, a.base or "not said", ", ".join(map(str, a.ranks)), a.modules, a.parameters,
                 "yes" if a.in_use else "", a.source) for a in self]
        return table(("name", "version", "base", "rank", "modules", "parameters", "in use", "source"), rows)


class AdapterBank:
    """Adapters that share one model. At most one is in use, and then the model is as `load_adapter` leaves it, to be
    trained, merged, reported or saved. With none in use it is the plain model.

    All calls are all-or-nothing: after an error the model and the bank are as before.

    Raises:
        ValueError: the model has adapters already; in all that follows also when the model's adapters are no longer
            those that the bank put there.
    """

    def __init__(self, model: nn.Module):
        if any(isinstance(m, AdapterLayer) for m in model.modules()):
            raise ValueError("the model has adapters already: remove(model) first, then load them from their folders")
        need_whole(model)
        self.model = model
        self.entries: dict[str, Entry] = {}
        self.placed: Mapping[str, Mergeable | RoutedLayer] = {}  # what stands in the model now, by module

    @property
    def in_use(self) -> str | None:
        return next((name for name, entry in self.entries.items() if entry.layers is self.placed), None)

    def load(self, name: str, folder: str | os.PathLike, any_base: bool = False) -> None:
        """Load the adapter in `folder` as `name`; it is not yet in use.

        Raises:
            ValueError: the name is taken, or what `load_adapter` raises.
        """
        self.need_new(name)
        adapter = read_adapter(folder, only=dict.fromkeys(layer.peft_type for layer in variants().values()))
        with self.instead({}):
            layers = mergeable_layers(insert_adapter(self.model, adapter, any_base))
            remove(self.model)
        self.entries[name] = Entry(layers, adapter.base, str(folder))

    def use(self, name: str | None) -> None:
        """Put adapter `name` in the model, in the place of the one in use; None gives the plain model."""
        self.place({} if name is None else self.entry(name).layers)

    def unload(self, name: str) -> None:
        """Forget adapter `name`.

        Raises:
            ValueError: there is none, or it is in use.
        """
        self.entry(name)
        require(name != self.in_use, "an adapter in use cannot be unloaded: use(None) or another one first", name)
        del self.entries[name]

    def list(self) -> Listing:
        """What the bank holds, by name, with versions and the fingerprints of the bases."""
        rows = []
        for name, entry in self.entries.items():
            layers = entry.layers.values()
            ranks = tuple(sorted({layer.rank for layer in layers if isinstance(layer, LoRALayer)}))
            parameters = sum(p.numel() for layer in layers for p in layer.own().values())
            rows.append(ListedAdapter(name, version(entry.layers), entry.base, ranks, len(layers), parameters,
                                      name == self.in_use, entry.source))
        return Listing(rows)

    @torch.no_grad()
    def combine(self, name: str, weights: Mapping[str, float], rank: int | None = None) -> dict[str, float]:
        """A new adapter `name` whose update is the weighted sum of others', cut to `rank` (None: not cut).

        sum_k w_k s_k B_k A_k = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]: no product of one adapter's B with
        another's A, which adding up the factors would bring. Its best approximation of that rank (Eckart and Young
        1936) is the leading part of the product's SVD.

        Returns:
            Per module, what was cut away: ||sum - update|| / ||sum||.

        Raises:
            ValueError: the name is taken, an adapter unknown or with DoRA, a weight that is no finite number or makes
                the sum overflow, or a rank below 1.
        """
        self.need_new(name)
        require(isinstance(weights, Mapping) and weights, "weights must map names of adapters to numbers", weights)
        require(rank is None or type(rank) is int and rank > 0, "rank must be a positive integer or None", rank)
        for part, weight in weights.items():
            require(is_number(weight), f"the weight of {part!r} must be a finite number", weight)
        parts = {part: self.entry(part) for part in weights}
        plain = {part: need_lora(part, entry) for part, entry in parts.items()}
        layers, lost = {}, {}
        for module in dict.fromkeys(module for own in plain.values() for module in own):
            summands = [(weights[part], own[module]) for part, own in plain.items() if module in own]
            require(not any(layer.row_scale() is not None for _, layer in summands),
                 "DoRA's lengths are no part of a sum of updates: merge such adapters, or combine plain ones", module)
            base = summands[0][1].base_layer
            wide = widest(summands[0][1].factors()[0])
            # (out, R)
            B = torch.cat([weight * layer.scaling * layer.factors()[1].to(wide) for weight, layer in summands], 1)
            A = torch.cat([layer.factors()[0].to(wide) for _, layer in summands])  # (R, in)
            require(B.float().isfinite().all(), f"the sum at {module} overflows: the weights are too large",
                    dict(weights))
            U, S, Vh = product_svd(B, A)
            kept = min(rank or len(S), len(S))
            root = S[:kept].sqrt()  # (kept,)
            layers[module] = layer = LoRALayer(base, kept, alpha=kept)  # scaling 1
            layer.lora_A.copy_(root[:, None] * Vh[:kept])
            layer.lora_B.copy_(U[:, :kept] * root)
            lost[module] = float(S[kept:].norm() / S.norm()) if S.norm() > 0 else 0.0
        bases = {e.base for e in parts.values()}
        self.entries[name] = Entry(layers, bases.pop() if len(bases) == 1 else None,
                                   " + ".join(f"{weight:g} {part}" for part, weight in weights.items()))
        return lost

    @contextmanager
    def route(self, names: Iterable[str | None]) -> Iterator[nn.Module]:
        """While it lasts, row i of every batch goes through adapter ``names[i]``, None meaning the base alone.

        For inference: the adapters are taken as they are on entry, without gradient and without dropout.

        Raises:
            ValueError: an unknown name; in the model's forward, an input whose first dimension is neither the number of
                names nor 1.
        """
        require(not isinstance(names, str) and isinstance(names, Iterable), "names must be one per row", names)
        rows = [{} if name is None else need_lora(name, self.entry(name)) for name in names]
        require(rows, "names must be one per row", rows)
        used = {id(layers): layers for layers in rows}.values()
        bases = {module: layer.base_layer for layers in used for module, layer in layers.items()}
        for name, m in self.model.named_modules():
            if getattr(m, "batch_first", True) is False and any(module.startswith(f"{name}.") for module in bases):
                raise ValueError(f"{name} is a {type(m).__name__} with batch_first=False: rows of a batch come second "
                                 "in it, and a route goes by the first dimension")
        with self.instead({}):
            self.place({module: RoutedLayer(module, base, [layers.get(module) for layers in rows])
                        for module, base in bases.items()})
            yield self.model

    # What stands in the model

    def place(self, layers: "Mapping[str, Mergeable | RoutedLayer]") -> None:
        """Take out of the model what stands in it, and put `layers` in."""
        inside = [m for m in self.model.modules() if isinstance(m, (AdapterLayer, RoutedLayer))]
        if {id(m) for m in inside} != {id(layer) for layer in self.placed.values()}:
            raise ValueError("the model's adapters are not those that the bank put there: it was changed by inject, "
                             "remove or merge(permanent=True). Make a new AdapterBank of a plain model")
        for layer in layers.values():  # the model may have changed mode, or moved, in the meantime
            layer.training = layer.base_layer.training
            device = next(chain(layer.base_layer.parameters(), layer.base_layer.buffers())).device
            if isinstance(layer, AdapterLayer) and next(iter(layer.own().values())).device != device:
                layer.to(device)
        put_back(self.model, [layer for layer in inside if isinstance(layer, AdapterLayer)])
        unwrap(self.model, inside)
        if layers:
            wrap(self.model, {layer.base_layer: layer for layer in layers.values()})
        self.placed = layers

    @contextmanager
    def instead(self, layers: "Mapping[str, Mergeable | RoutedLayer]") -> Iterator[None]:
        """`layers` in the model for a while; then what stood there, merged where it was."""
        before = self.placed
        merged = [layer for layer in before.values() if not isinstance(layer, RoutedLayer) and layer.merged]
        self.place(layers)
        try:
            yield
        finally:
            self.place(before)
            for layer in merged:
                layer.merge()

    def entry(self, name: str) -> Entry:
        require(isinstance(name, str), "an adapter's name must be a string", name)
        if name not in self.entries:
            close = get_close_matches(name, self.entries) or list(self.entries)[:12]
            raise ValueError(f"no adapter {name!r} in the bank; it has {', '.join(close) or 'none'}")
        return self.entries[name]

    def need_new(self, name: str) -> None:
        require(isinstance(name, str) and name, "an adapter's name must be a string", name)
        require(name not in self.entries, "the bank has an adapter of this name: unload it first, or choose another",
                    name)


class RoutedLayer(Wrapper):
    """A frozen layer whose input's row i goes through ``layers[i]``, or through the base alone where that is None.

    The A of all adapters stand under one another, (R + 1, in), as do the B^T, (R + 1, out), with each adapter's scaling
    in them; the last row of both is zero. `index` (batch, r) says which r of them are row i's, r being the largest
    rank: lower ranks, and None, are filled up with the zero row. So a mixed batch is two batched products, however
    many adapters there are.
    """

    def __init__(self, name: str, base_layer: nn.Module, layers: list[LoRALayer | None]):
        super().__init__()
        self.name, self.base_layer, self.kind = name, base_layer, kind_of(base_layer)
        if self.kind == "conv2d":
            raise ValueError(f"{name} is a Conv2d: a route goes through Linear, Conv1D and Embedding alone")
        used = list(dict.fromkeys(layer for layer in layers if layer is not None))
        ranks = [layer.rank for layer in used]
        total, most = sum(ranks), max(ranks)
        places = [[*range(end - rank, end), *[total] * (most - rank)] for rank, end in zip(ranks, accumulate(ranks))]
        scalings = [layer.scaling for layer in used for _ in range(layer.rank)] + [0]
        numbers = {layer: i for i, layer in enumerate(used)} | {None: len(used)}
        rows, device = [numbers[layer] for layer in layers], used[0].factors()[0].device
        self.index = torch.tensor([*places, [total] * most], device=device)[rows]  # (batch, r)
        self.scale = None  # DoRA's c - 1 of each row of the batch, (batch, 1, out)
        with torch.no_grad():
            A, B = (list(factors) for factors in zip(*(layer.factors() for layer in used)))
            c = [layer.row_scale() for layer in used]  # (out,), or None
            if any(scale is not None for scale in c):
                c = [torch.ones_like(B[0][:, 0]) if scale is None else scale for scale in c]
                B = [scale[:, None] * b for scale, b in zip(c, B)]
                self.scale = torch.stack([*c, torch.ones_like(c[0])])[rows, None] - 1
            self.A = torch.cat([*A, torch.zeros_like(A[0][:1])])  # (R + 1, in)
            self.B = torch.cat([*B, B[0][:, :1]], 1) * torch.tensor(scalings, dtype=B[0].dtype, device=device)
            self.B = self.B.T.contiguous()  # (R + 1, out)

    def forward(self, x: Tensor) -> Tensor:
        batch = len(self.index)
        if len(x) == 1:  # one input for all rows, such as positions
            x = x.expand(batch, *x.shape[1:])
        if len(x) != batch:
            raise ValueError(f"{self.name}: the route names {batch} rows, the input has {len(x)} (of shape "
                             f"{tuple(x.shape)}); rows must come first and whole")
        y = self.base_layer(x)  # (batch, ..., out)
        rows = y.view(batch, -1, y.shape[-1])  # (batch, T, out)
        if self.scale is not None:  # DoRA: c (W x) + b = y + (c - 1) (y - b)
            bias = getattr(self.base_layer, "bias", None)
            rows.add_(self.scale.to(y.dtype) * (rows if bias is None else rows - bias.to(y.dtype)))
        if self.kind == "embedding":
            inner = self.A[self.index[:, None], x.reshape(batch, -1, 1)] * output_scale(self.base_layer)  # (b, T, r)
            inner = inner.to(y.dtype)
        else:
            inner = x.reshape(batch, -1, x.shape[-1]).to(y.dtype) @ self.A[self.index].to(y.dtype).mT  # (batch, T, r)
        rows.baddbmm_(inner, self.B[self.index].to(y.dtype))
        return y


def need_lora(name: str, entry: Entry) -> Mapping[str, LoRALayer]:
    """The layers of an adapter that has nothing but LoRA layers."""
    for module, layer in entry.layers.items():
        if not isinstance(layer, LoRALayer):
            raise ValueError(f"adapter {name!r} trains {module} {layer.how}, which can be used, merged and saved, but "
                             "neither combined nor routed")
    return cast("Mapping[str, LoRALayer]", entry.layers)  # as was just looked at


def version(layers: Mapping[str, AdapterLayer]) -> str:
    """A short hash of an adapter: modules, scalings and every bit of the parameters."""
    digest = hashlib.sha256()
    for module, layer in sorted(layers.items()):
        digest.update(f"{module} {getattr(layer, 'scaling', 1)!r}\n".encode())
        for name, p in layer.own().items():
            digest.update(name.encode() + p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
