"""A frozen base that lives on disk or in host memory and visits the device layer by layer.

LoRA makes the base read-only: it has no gradient, no optimizer state, and is never written back. So it need not live
on the device. It passes through it, forwards and then backwards, and only the adapters, their gradients and one
activation a layer stay. ZeRO-Infinity (Rajbhandari et al. 2021, 2104.07857) and Fuyou (Liao et al. 2024, 2403.06504)
stream weights that train, and so must write them and their states back; here every byte goes one way.

    build_store("llama-2-7b", "store", quantise="nf4")        # once: one safetensors file a layer
    model = StreamedLlama(Store.open("store"), "cuda")
    inject(model, LoRAConfig())
    train(model, ..., loss=StreamedLlama.loss)                # else as ever

Two slots on the device hold all that visits: while layer i computes in one, layer i + 1 (in backward i - 1) is copied
into the other. Where the pass turns round, at the head and at the first layer, what is next is there already, so L
layers cost 2 L - 3 copies a training step, not 2 L.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .llama import Cache, Llama
from .losses import IGNORE, ChunkedCrossEntropy
from .quant import Linear4bit, traced
from .rotary import rotary_tables
from .weight_store import ALIGN, Store, lay_out, skeleton

# ---------------------------------------------------------------- what moves


@dataclass
class Traffic:
    """What has crossed the bus: copies, their bytes, seconds spent on them, and seconds for which computing waited."""

    visits: int = 0
    bytes: int = 0
    copying: float = 0.0
    waiting: float = 0.0


@dataclass
class Weight:
    """One weight of a visitor: where in which module it stands, its tensor at rest, and its place in a slot."""

    module: nn.Module
    table: str  # "_parameters" or "_buffers"
    name: str
    rest: Tensor
    place: Tensor


class LayerPrefetcher:
    """Brings shards 0, 1, 2, ... to the device and prefetches: shard i into slot i mod 2.

    A shard's modules hold its tensors on the device until another takes the slot, and those at rest from then on.
    `fetch` is called in the order of a forward pass, 0 1 2 ..., or of a backward pass, ... 2 1 0.
    """

    def __init__(self, shards: list[list[tuple[nn.Module, str, str]]], device: torch.device, dtype: torch.dtype,
                 prefetch: bool = True):
        self.device, self.traffic, self.last = device, Traffic(), -1
        self.holds: list[int | None] = [None, None]  # which shard is in a slot, or on its way there
        self.coming: list[Future | None] = [None, None]
        self.on_fetch: Callable[[int], None] | None = None  # called with the number of the shard that is there
        self.before_copy: Callable[[int], None] | None = None  # called with the number of the shard that is to come
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        rests = [{(module, table, name): getattr(module, table)[name] for module, table, name in shard}
                 for shard in shards]
        # a dense weight computes in `dtype` whatever it is stored in; codes and their constants stay as they are
        likes = [{key: torch.empty_like(t, dtype=dtype if key[1] == "_parameters" else t.dtype, device="meta")
                  for key, t in rest.items()} for rest in rests]
        sizes = [sum(-(-t.nbytes // ALIGN) * ALIGN for t in like.values()) for like in likes]
        self.slots = [torch.empty(max(sizes[i::2], default=0), dtype=torch.uint8, device=device) for i in (0, 1)]
        self.shards = []
        for i, (rest, like) in enumerate(zip(rests, likes)):
            places = lay_out(like, device, self.slots[i % 2])[1]
            self.shards.append([Weight(*key, rest[key], frozen(places[key]) if key[1] == "_parameters" else places[key])
                                for key in rest])
        self.pool = ThreadPoolExecutor(1) if prefetch and not traced(self.slots[0]) else None

    def fetch(self, i: int) -> None:
        """Have shard i on the device, and start to bring the one that will be asked for next."""
        slot = i % 2
        if trained := [w for w in self.shards[i] if w.rest.requires_grad or w.place.requires_grad]:
            raise ValueError(f"{trained[0].name} of a {type(trained[0].module).__name__} has requires_grad: a streamed "
                             "base is read-only, and only adapters on it train")
        if self.holds[slot] != i:
            self.start(i)
        if self.coming[slot]:
            self.arrive(slot)
        ahead = i + 1 if i == 0 or i > self.last else i - 1
        if self.pool and 0 <= ahead < len(self.shards) and self.holds[ahead % 2] != ahead:
            self.start(ahead)
        self.last = i
        if self.on_fetch:
            self.on_fetch(i)

    def start(self, i: int) -> None:
        """Send shard i on its way into its slot, whose last guest goes back to rest."""
        slot = i % 2
        if self.coming[slot]:
            self.arrive(slot)
        if (guest := self.holds[slot]) is not None:
            for w in self.shards[guest]:
                getattr(w.module, w.table)[w.name] = w.rest
        # what was launched so far may still read the slot
        free = torch.cuda.current_stream(self.device).record_event() if self.side else None
        self.coming[slot] = self.pool.submit(self.copy, i, free) if self.pool else Future()
        if not self.pool:
            self.coming[slot].set_result(self.copy(i, free))
        self.holds[slot] = i

    @torch.no_grad()
    def copy(self, i: int, free: "torch.cuda.Event | None") -> "tuple[torch.cuda.Event | None, float]":
        """Copy shard i into its slot; what tells that it is there, and the seconds it took."""
        start = perf_counter()
        if self.before_copy:
            self.before_copy(i)
        with torch.cuda.stream(self.side) if self.side else nullcontext():
            if self.side:
                self.side.wait_event(free)
            for w in self.shards[i]:
                w.place.copy_(w.rest, non_blocking=True)
            there = self.side.record_event() if self.side else None
        return there, perf_counter() - start

    def arrive(self, slot: int) -> None:
        """Wait for what comes into the slot and hand it to its modules."""
        start, future, weights = perf_counter(), self.coming[slot], self.shards[self.holds[slot]]
        here, self.coming[slot], self.holds[slot] = self.holds[slot], None, None  # empty, should anything go wrong
        there, copying = future.result()
        if there is not None:
            torch.cuda.current_stream(self.device).wait_event(there)
        for w in weights:
            getattr(w.module, w.table)[w.name] = w.place
        self.holds[slot] = here
        self.traffic.visits += 1
        self.traffic.bytes += sum(w.rest.nbytes for w in weights)
        self.traffic.copying += copying
        self.traffic.waiting += perf_counter() - start


def weights_of(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str, str]]]:
    """The name of every tensor of the state_dict, and where it stands: the module, its table, its name there."""
    for prefix, module in model.named_modules():
        for table in ("_parameters", "_buffers"):
            for name, t in list(getattr(module, table).items()):
                if t is not None and name not in module._non_persistent_buffers_set:
                    yield f"{prefix}.{name}", (module, table, name)


def frozen(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)


# ---------------------------------------------------------------- the decoder


class StreamedLlama(Llama):
    """`Llama` over a store: the same numbers, with two layers' weights on the device at a time.

    inject, save_adapter, load_adapter, train, generate are used as on any decoder. In training every layer is run
    again in backward, from its saved input. What cannot be done: train the base, merge into it, move or cast it.

    Args:
        device: where it computes; the store's tensors stay where they are.
        dtype: in which it computes; None: the store's.
        offload: keep the layers' saved inputs in host memory too, between forward and backward.
        prefetch: copy the next layer while the present one computes.

    Attributes:
        visits: the `LayerPrefetcher`; ``model.visits.traffic`` tells what has moved.
    """

    def __init__(self, store: Store, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
                 offload: bool = False, prefetch: bool = True):
        nn.Module.__init__(self)
        bare, self.config, self.offload = skeleton(store.config, store.quantise, store.dtype), store.config, offload
        self.model, self.lm_head = bare.model, bare.lm_head
        dtype, device, decoder = dtype or store.dtype, torch.device(device), self.model
        shards = [[] for _ in range(store.config.num_hidden_layers + 1)]  # the layers, then the head
        names = [[] for _ in shards]
        for name, (module, table, own) in weights_of(self):
            tied = module is self.lm_head and store.config.tie_word_embeddings
            at_rest = "model.embed_tokens.weight" if tied else name
            rest = store.tensors[at_rest]
            if module is decoder.norm:  # stays on the device
                rest = rest.to(device, dtype, copy=True)  # no piece of a mapped file
            elif module is not decoder.embed_tokens:
                i = -1 if module is self.lm_head else int(name.split(".")[2])
                shards[i].append((module, table, own))
                names[i].append(at_rest)
            getattr(module, table)[own] = frozen(rest) if table == "_parameters" else rest
            module.compute_device = device  # where an adapter on it must be
            if isinstance(module, Linear4bit):
                module.dtype = dtype
        decoder.cos, decoder.sin = (t.to(device, dtype) for t in rotary_tables(store.config))
        decoder.checkpointing = True
        self.visits = LayerPrefetcher(shards, device, dtype, prefetch)
        self.visits.before_copy = lambda i: store.check_files(names[i])
        # hooks, not modules of our own: whatever looks for a Linear or an Embedding still finds one
        for i, block in enumerate(decoder.layers):
            block.register_forward_pre_hook(lambda block, args, i=i: self.visits.fetch(i))
        decoder.register_forward_hook(lambda *_: self.visits.fetch(len(decoder.layers)))  # the head comes next

        def rows_to_device(embedding: nn.Embedding, args: tuple, rows: Tensor) -> Tensor:
            self.visits.traffic.bytes += rows.nbytes
            return rows.to(device, dtype)  # (B, T, C)

        # the embedding stays at rest: a step needs but a row a token
        def ids_to_rest(embedding: nn.Embedding, args: tuple) -> tuple[Tensor]:
            store.check_files(["model.embed_tokens.weight"])
            return (args[0].to(embedding.weight.device),)

        decoder.embed_tokens.register_forward_pre_hook(ids_to_rest)
        decoder.embed_tokens.register_forward_hook(rows_to_device)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        y = self.decode(ids, cache)
        return checkpoint(self.run_head, y, use_reentrant=False) if torch.is_grad_enabled() else self.lm_head(y)

    def decode(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """What the head sees, (B, T, C)."""
        away = self.offload and self.visits.device.type != "cpu" and torch.is_grad_enabled()
        with torch.autograd.graph.save_on_cpu(pin_memory=True) if away else nullcontext():
            return self.model(ids, cache)

    def run_head(self, y: Tensor) -> Tensor:
        self.visits.fetch(len(self.model.layers))  # in backward others have been here since
        return self.lm_head(y)

    def loss(self, ids: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """`masked_cross_entropy`, a chunk of tokens at a time; for ``train(..., loss=StreamedLlama.loss)``."""
        counted = (targets != IGNORE).sum() if counted is None else counted
        y = self.decode(ids).flatten(0, 1)  # (B T, C)
        trained = [p for p in self.lm_head.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
        return ChunkedCrossEntropy.apply(y, targets.flatten(), counted, self.lm_head, torch.is_grad_enabled(), *trained)

    def _apply(self, fn, recurse=True):
        raise ValueError("a streamed decoder's weights stay where they are: say device and dtype when you make it, "
                         "StreamedLlama(store, device, dtype)")
