"""A frozen base that lives on disk or in host memory and visits the device layer by layer.

LoRA makes the base read-only: it has no gradient, no optimizer state, and is never written back. So it need not live
on the device. It passes through it, forwards and then backwards, and only the adapters, their gradients and one
activation a layer stay. ZeRO-Infinity (Rajbhandari et al. 2021, 2104.07857) and Fuyou (Liao et al. 2024, 2403.06504)
stream weights that train, and so must write them and their states back; here every byte goes one way.

    build_store("llama-2-7b", "store", quantise="nf4")        # once: one safetensors file a layer
    model = StreamedLlama(Store.open("store"), "cuda")
    inject(model, LoRAConfig()); train(model, ...)            # as ever

Two slots on the device hold all that visits: while layer i computes in one, layer i + 1 (in backward i - 1) is copied
into the other. Where the pass turns round, at the head and at the first layer, what is next is there already, so L
layers cost 2 L - 3 copies a training step, not 2 L.
"""

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from .adapters import fingerprint
from .config import need
from .insert import replace
from .llama import Block, Cache, Llama, LlamaConfig, read_json, rotary_tables
from .quant import LEVELS, Linear4bit, quantise_model, traced
from .tables import bytes_text

RECIPE = "store.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOSS_CHUNK = 512  # tokens whose logits stand at once; the planner's (memory/blocks.py) is the same
IGNORE = -100  # a target that does not count, as torch's cross_entropy has it
ALIGN = 512  # bytes, as CUDA's allocator


# ---------------------------------------------------------------- the store


def skeleton(config: LlamaConfig, quantise: str | None, dtype: torch.dtype) -> Llama:
    """The decoder of a store without weights, on torch's meta device."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    if quantise:
        linears = [m for block in model.model.layers for m in block.modules() if isinstance(m, nn.Linear)]
        replace(model, {m: Linear4bit(m.in_features, m.out_features, m.bias is not None, "meta", dtype, quantise)
                        for m in linears})
    return model


def shards_of(model: Llama) -> dict[str, dict[str, Tensor]]:
    """Shard -> its tensors by their names in the state_dict: the embedding, each layer, the head with the last norm.

    A tied head has no weight of its own.
    """
    shards = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")
        shard = f"layer_{int(part[2]):05}" if part[1] == "layers" else \
            "embedding" if part[1] == "embed_tokens" else "head"
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            shards.setdefault(shard, {})[name] = tensor
    return shards


@dataclass(frozen=True)
class Store:
    """A decoder's weights in host memory, or in files that are mapped into it.

    Attributes:
        config: the decoder's shape. quantise: None, or what its layers' linears are stored in ("nf4", "int4").
        dtype: of everything else. tensors: by their names in the state_dict.
    """

    config: LlamaConfig
    quantise: str | None
    dtype: torch.dtype
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @classmethod
    def open(cls, folder: str | Path, hold: bool = False, verify: bool = True) -> "Store":
        """Open what `build_store` made; the files are mapped, and read when a layer visits.

        Args:
            hold: read it all into host memory now, where there is CUDA into pinned memory.
            verify: compare every byte with its checksum, which takes a second or two a GiB.

        Raises:
            ValueError: no store, one that is not complete (the first missing shard is named), a shard that is
                truncated or damaged or another store's.
        """
        folder = Path(folder)
        if not (folder / RECIPE).is_file():
            raise ValueError(f"{folder} is no store: it holds no {RECIPE}; build_store makes one")
        recipe = read_json(folder / RECIPE)
        try:
            config, kind, dtype = LlamaConfig.from_hf(recipe["config"]), recipe["quantise"], DTYPES[recipe["dtype"]]
            shards = shards_of(skeleton(config, kind, dtype))
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{folder / RECIPE} is damaged: {e!r}") from None
        if missing := [name for name in shards if not (folder / f"{name}.safetensors").is_file()]:
            raise ValueError(f"the store in {folder} is not complete: it lacks {missing[0]}.safetensors"
                             + f" and {len(missing) - 1} more" * (len(missing) > 1) + "; build it again, it goes on")
        tensors = {}
        for name, expected in shards.items():
            found = read_shard(folder / f"{name}.safetensors", recipe, expected, verify)
            tensors |= held(found) if hold else found
        return cls(config, kind, dtype, tensors)

    @classmethod
    def make(cls, source: "Source", quantise: str | None = None, device: str | torch.device = "cpu") -> "Store":
        """A store in host memory alone. What is computed for it (random numbers, codes) is computed on `device`."""
        tensors = {}
        for name, expected in tqdm(shards_of(source.plain).items(), "store", leave=False, disable=None):
            tensors |= held(source.shard(name, expected, quantise, device))
        return cls(source.config, quantise, source.dtype, tensors)

    @classmethod
    def hollow(cls, config: LlamaConfig, quantise: str | None = None, dtype: torch.dtype = torch.bfloat16) -> "Store":
        """Shapes alone, every tensor one number seen many times over: to trace a step inside `memory.trace.fake()`."""
        shards = shards_of(skeleton(config, quantise, dtype)).values()
        return cls(config, quantise, dtype, {name: torch.zeros(1, dtype=t.dtype).expand(t.shape)
                                             for shard in shards for name, t in shard.items()})


class Source:
    """Where a store's weights come from: a checkpoint folder, of which only what is asked for is read, or a shape,
    whose weights are then drawn at random, as `Llama` does, each tensor from a seed of its own.

    Raises:
        ValueError: a folder that is no checkpoint of a supported family, or a dtype that is no floating-point type.
    """

    def __init__(self, source: str | Path | LlamaConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0):
        need(dtype in DTYPES.values(), f"dtype must be one of {', '.join(DTYPES)}", dtype)
        self.dtype, self.seed, self.weights = dtype, seed, None
        if isinstance(source, LlamaConfig):
            self.config, self.name = source, f"random, seed {seed}"
        else:
            model = Llama.from_pretrained(source)  # mapped, not read
            self.config, self.weights, self.name = model.config, model.state_dict(), fingerprint(model)
        self.plain = skeleton(self.config, None, dtype)

    def weight(self, name: str, like: Tensor, device: str | torch.device) -> Tensor:
        if self.weights is not None:
            return self.weights[name].to(device, self.dtype)
        fresh = torch.empty(like.shape, dtype=self.dtype, device=device)
        if fresh.dim() == 1:
            return fresh.fill_(0 if name.endswith("bias") else 1)
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers) if residual else 0.02
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return fresh.normal_(0, std, generator=generator)

    def shard(self, shard: str, plain: dict[str, Tensor], quantise: str | None,
              device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The tensors of one shard, in 4 bits if asked for; `plain` has the names and shapes of the dense ones."""
        weights = {name: self.weight(name, like, device) for name, like in plain.items()}
        if not quantise or not shard.startswith("layer"):
            return weights
        prefix = f"model.layers.{int(shard[6:])}."
        with torch.device("meta"):
            block = Block(self.config)
        block.load_state_dict({name[len(prefix):]: w for name, w in weights.items()}, assign=True)
        del weights
        quantise_model(block, kind=quantise)
        return {prefix + name: t for name, t in block.state_dict().items()}


def build_store(source: str | Path | LlamaConfig, folder: str | Path, quantise: str | None = None,
                dtype: torch.dtype = torch.bfloat16, seed: int = 0, device: str | torch.device = "cpu",
                progress: bool = False) -> None:
    """Write a store: one safetensors file for the embedding, for each layer and for the head.

    One shard at a time is in memory. A file has its final name only when it is whole, so after an interruption the
    same call goes on where the last one stopped.

    Args:
        source: a checkpoint folder of the Llama family; or a shape, for random weights, to measure with.
        quantise: None, or "nf4" or "int4" for the layers' linears, double quantised (QLoRA, section 3).
        dtype: of the weights that stay dense. device: where random numbers and codes are computed.

    Raises:
        ValueError: as `Source`, an unknown quantisation, a folder that holds another store, or too small a disk.
        OSError: a file could not be written; none is half written under its final name.
    """
    need(quantise is None or quantise in LEVELS, f"quantise must be None or one of {', '.join(LEVELS)}", quantise)
    source, folder = Source(source, dtype, seed), Path(folder)
    name_of_dtype = next(name for name, d in DTYPES.items() if d == dtype)
    recipe = {"config": source.config.to_hf(), "quantise": quantise, "dtype": name_of_dtype, "source": source.name}
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / RECIPE).exists():
        write(folder / RECIPE, lambda path: path.write_text(json.dumps(recipe, indent=2) + "\n"))
    elif (there := read_json(folder / RECIPE)) != recipe:
        other = ", ".join(f"{k} {there.get(k)!r} there, {v!r} here" for k, v in recipe.items() if there.get(k) != v)
        raise ValueError(f"{folder} holds another store ({other}): choose another folder, or delete it")
    wanted, plain = shards_of(skeleton(source.config, quantise, dtype)), shards_of(source.plain)
    todo = [name for name, expected in wanted.items() if not whole(folder / f"{name}.safetensors", recipe, expected)]
    size = sum(t.nbytes for name in todo for t in wanted[name].values())
    if size > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"the store needs {bytes_text(size)} more, and the disk of {folder} has {bytes_text(free)} "
                         "free")
    for name in tqdm(todo, "store", leave=False, disable=not progress):
        tensors = {key: t.cpu().contiguous() for key, t in
                   source.shard(name, plain[name], quantise, device).items()}
        metadata = {"format": "pt", "store": digest_of(recipe), "sha256": checksum(tensors)}
        write(folder / f"{name}.safetensors", lambda path: save_file(tensors, path, metadata))
        del tensors


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a file beside `path`, then give it its name; an OSError says why it could not."""
    fresh = path.with_name(path.name + ".tmp")
    try:
        save(fresh)
        with open(fresh, "rb") as f:
            os.fsync(f.fileno())  # so that a power cut after the renaming finds the bytes
        os.replace(fresh, path)
    except Exception as e:  # safetensors has an error of its own for a full disk
        raise OSError(f"could not write {path}: {e}") from None
    finally:
        fresh.unlink(missing_ok=True)


def read_shard(path: Path, recipe: dict, expected: dict[str, Tensor], verify: bool = True) -> dict[str, Tensor]:
    """The tensors of a shard, mapped; a ValueError if it is not what the recipe made."""
    try:
        with safe_open(path, framework="pt") as f:
            tensors, metadata = {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}
    except Exception as e:  # the reader's errors have no common class: SafetensorError, OSError, KeyError, ...
        raise ValueError(f"{path} is truncated, damaged or no safetensors file: {e!r}; delete it and build the store "
                         "again") from None
    if metadata.get("store") != digest_of(recipe):
        raise ValueError(f"{path} is a shard of another store than {RECIPE} beside it")
    shapes = lambda ts: {name: (t.shape, t.dtype) for name, t in ts.items()}
    if shapes(tensors) != shapes(expected) or (verify and checksum(tensors) != metadata.get("sha256")):
        raise ValueError(f"{path} is damaged: its bytes are not those that were written; delete it and build the store "
                         "again")
    return tensors


def whole(path: Path, recipe: dict, expected: dict[str, Tensor]) -> bool:
    """Whether an earlier build finished this shard."""
    return path.is_file() and bool(read_shard(path, recipe, expected))


def digest_of(recipe: dict) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def checksum(tensors: dict[str, Tensor]) -> str:
    """Of all names and bytes."""
    total = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        total.update(name.encode())
        total.update(t.flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def held(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in one piece of host memory. CUDA is told of it, which then copies without a detour (pinned memory).

    Not by torch's `pin_memory`: its allocator rounds every size up to a power of two.
    """
    flat, copies = lay_out(tensors, "cpu")
    for name, t in tensors.items():
        copies[name].copy_(t)
    if torch.cuda.is_available():
        error = torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)
        need(int(error) == 0, f"CUDA cannot pin {bytes_text(flat.nbytes)} of host memory: error", int(error))
    return copies


def lay_out(tensors: dict, device: str | torch.device, flat: Tensor | None = None) -> tuple[Tensor, dict]:
    """Room for all tensors in one piece of memory, and the piece of it that is each one's; by whatever keys."""
    ends, end = {}, 0
    for key, t in tensors.items():
        ends[key] = end, end + t.nbytes
        end += -(-t.nbytes // ALIGN) * ALIGN
    flat = torch.empty(end, dtype=torch.uint8, device=device) if flat is None else flat
    return flat, {key: flat[a:b].view(tensors[key].dtype).view(tensors[key].shape) for key, (a, b) in ends.items()}


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


class Visits:
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
        visits: the `Visits`; ``model.visits.traffic`` tells what has moved.
    """

    def __init__(self, store: Store, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
                 offload: bool = False, prefetch: bool = True):
        nn.Module.__init__(self)
        bare, self.config, self.offload = skeleton(store.config, store.quantise, store.dtype), store.config, offload
        self.model, self.lm_head = bare.model, bare.lm_head
        dtype, device, decoder = dtype or store.dtype, torch.device(device), self.model
        shards = [[] for _ in range(store.config.num_hidden_layers + 1)]  # the layers, then the head
        for name, (module, table, own) in weights_of(self):
            tied = module is self.lm_head and store.config.tie_word_embeddings
            rest = store.tensors["model.embed_tokens.weight" if tied else name]
            if module is decoder.norm:  # stays on the device
                rest = rest.to(device, dtype)
            elif module is not decoder.embed_tokens:
                shards[-1 if module is self.lm_head else int(name.split(".")[2])].append((module, table, own))
            getattr(module, table)[own] = frozen(rest) if table == "_parameters" else rest
            module.visits_on = device  # where an adapter on it must be
            if isinstance(module, Linear4bit):
                module.dtype = dtype
        decoder.cos, decoder.sin = (t.to(device, dtype) for t in rotary_tables(store.config))
        decoder.checkpointing = True
        self.visits = Visits(shards, device, dtype, prefetch)
        # hooks, not modules of our own: whatever looks for a Linear or an Embedding still finds one
        for i, block in enumerate(decoder.layers):
            block.register_forward_pre_hook(lambda block, args, i=i: self.visits.fetch(i))
        decoder.register_forward_hook(lambda *_: self.visits.fetch(len(decoder.layers)))  # the head comes next

        def rows_to_device(embedding: nn.Embedding, args: tuple, rows: Tensor) -> Tensor:
            self.visits.traffic.bytes += rows.nbytes
            return rows.to(device, dtype)  # (B, T, C)

        # the embedding stays at rest: a step needs but a row a token
        decoder.embed_tokens.register_forward_pre_hook(lambda embedding, args: (args[0].to(embedding.weight.device),))
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

    def chunked_loss(self, ids: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """`reply_loss`, `LOSS_CHUNK` tokens' logits at a time, so that the (B T, V) of all never stand."""
        counted = (targets != IGNORE).sum() if counted is None else counted
        y = self.decode(ids).flatten(0, 1)  # (B T, C)
        trained = [p for p in self.lm_head.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
        return ChunkedLoss.apply(y, targets.flatten(), counted, self.lm_head, torch.is_grad_enabled(), *trained)

    def _apply(self, fn, recurse=True):
        raise ValueError("a streamed decoder's weights stay where they are: say device and dtype when you make it, "
                         "StreamedLlama(store, device, dtype)")


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of head(y), summed and divided by `counted`, chunk by chunk. The gradients of y and of what trains
    in the head are made in forward, while the head is there: neither it nor any logits are needed in backward."""

    @staticmethod
    def forward(ctx, y: Tensor, targets: Tensor, counted: Tensor, head: nn.Module, wanted: bool,
                *trained: Tensor) -> Tensor:
        dy = torch.empty_like(y) if wanted and ctx.needs_input_grad[0] else None  # (N, C)
        sums, loss = [torch.zeros_like(p) for p in trained], torch.zeros((), device=y.device)
        for start in range(0, len(y), LOSS_CHUNK):
            piece = slice(start, start + LOSS_CHUNK)
            rows = y[piece].detach().requires_grad_(dy is not None)  # (n, C)
            with torch.set_grad_enabled(dy is not None or bool(trained)):
                part = F.cross_entropy(head(rows), targets[piece], ignore_index=IGNORE, reduction="sum") / counted
            loss += part.detach()
            leaves = [rows] * (dy is not None) + list(trained)
            grads = list(torch.autograd.grad(part, leaves)) if leaves else []
            if dy is not None:
                dy[piece] = grads.pop(0)
            for total, grad in zip(sums, grads):
                total += grad
        ctx.save_for_backward(dy, *sums)
        return loss.to(y.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        dy, *sums = ctx.saved_tensors
        return None if dy is None else dy * grad, None, None, None, None, *(total * grad for total in sums)
