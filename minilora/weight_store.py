"""A decoder's weights at rest, layer by layer: in files that are mapped into memory, or in host memory.

    build_store("llama-2-7b", "store", quantise="nf4")        # once: one safetensors file a layer
    store = Store.open("store")                               # mapped; stream.py lets it visit the device
"""

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .adapters import fingerprint
from .checkpoints import checksum, lock, read_json, read_safetensors, save_tensors, write_file
from .config import require
from .injection import replace
from .llama import Block, Llama, LlamaConfig
from .quant import LEVELS, Linear4bit, quantise_model
from .tables import bytes_text

RECIPE = "store.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALIGN = 512  # bytes, as CUDA's allocator


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
        files: where each tensor is mapped from, and that file's bytes; empty for a store in host memory.
    """

    config: LlamaConfig
    quantise: str | None
    dtype: torch.dtype
    tensors: dict[str, Tensor]
    files: dict[str, tuple[Path, int]] = field(default_factory=dict)

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
        recipe = read_json(folder / RECIPE, "a store")
        try:
            config, kind, dtype = LlamaConfig.from_hf(recipe["config"]), recipe["quantise"], DTYPES[recipe["dtype"]]
            shards = shards_of(skeleton(config, kind, dtype))
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{folder / RECIPE} is damaged: {e!r}") from None
        if missing := [name for name in shards if not (folder / f"{name}.safetensors").is_file()]:
            raise ValueError(f"the store in {folder} is not complete: it lacks {missing[0]}.safetensors"
                             + f" and {len(missing) - 1} more" * (len(missing) > 1) + "; build it again, it goes on")
        tensors, files = {}, {}
        for name, expected in shards.items():
            file = folder / f"{name}.safetensors"
            size = file.stat().st_size
            found = read_shard(file, recipe, expected, verify)
            tensors |= held(found) if hold else found
            files |= dict.fromkeys(found, (file, size))
        return cls(config, kind, dtype, tensors, {} if hold else files)

    def check_files(self, names: Iterable[str]) -> None:
        """Look whether the files of these tensors are still as long as they were. Where a mapped file has been cut,
        reading it kills the process (SIGBUS), and no Python is asked; a cut within the instant after this still does.

        Raises:
            ValueError: a file is gone, or has another size.
        """
        for file, size in {self.files[name] for name in names if name in self.files}:
            now = file.stat().st_size if file.is_file() else None
            require(now == size, f"{file} has changed under the run: it had {size:,} bytes; its bytes now", now)

    @classmethod
    def make(cls, source: "Source", quantise: str | None = None, device: str | torch.device = "cpu") -> "Store":
        """A store in host memory alone. What is computed for it (random numbers, codes) is computed on `device`."""
        tensors = {}
        for name, expected in tqdm(shards_of(source.plain).items(), "store", leave=False, disable=None):
            tensors |= held(source.shard(name, expected, quantise, device))
        return cls(source.config, quantise, source.dtype, tensors)

    @classmethod
    def hollow(cls, config: LlamaConfig, quantise: str | None = None, dtype: torch.dtype = torch.bfloat16) -> "Store":
        """Shapes alone, every tensor one number seen many times over: to trace a step inside `memory.fake()`."""
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
        require(dtype in DTYPES.values(), f"dtype must be one of {', '.join(DTYPES)}", dtype)
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
    same call goes on where the last one stopped. One process at a time builds in a folder.

    Args:
        source: a checkpoint folder of the Llama family; or a shape, for random weights, to measure with.
        quantise: None, or "nf4" or "int4" for the layers' linears, double quantised (QLoRA, section 3).
        dtype: of the weights that stay dense. device: where random numbers and codes are computed.

    Raises:
        ValueError: as `Source`, an unknown quantisation, a folder that holds another store or in which another process
            builds, or too small a disk.
        OSError: a file could not be written; none is half written under its final name.
    """
    require(quantise is None or quantise in LEVELS, f"quantise must be None or one of {', '.join(LEVELS)}", quantise)
    source, folder = Source(source, dtype, seed), Path(folder)
    name_of_dtype = next(name for name, d in DTYPES.items() if d == dtype)
    recipe = {"config": source.config.to_hf(), "quantise": quantise, "dtype": name_of_dtype, "source": source.name}
    folder.mkdir(parents=True, exist_ok=True)
    with builder_of(folder):
        finish_store(source, folder, recipe, quantise, dtype, device, progress)


@contextmanager
def builder_of(folder: Path) -> Iterator[None]:
    """Inside it no other process builds in `folder`, on systems that have locks; a lock ends with its process."""
    try:
        held = lock(folder)
    except BlockingIOError:
        raise ValueError(f"another process is building a store in {folder}: wait for it, or name another "
                         "folder") from None
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def finish_store(source: Source, folder: Path, recipe: dict, quantise: str | None, dtype: torch.dtype,
                 device: str | torch.device, progress: bool) -> None:
    """Write what is not there yet of the store that the recipe describes."""
    if not (folder / RECIPE).exists():
        write_file(folder / RECIPE, lambda path: path.write_text(json.dumps(recipe, indent=2) + "\n"))
    elif (there := read_json(folder / RECIPE, "a store")) != recipe:
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
        write_file(folder / f"{name}.safetensors", partial(save_tensors, tensors, metadata=metadata))
        del tensors


def read_shard(path: Path, recipe: dict, expected: dict[str, Tensor], verify: bool = True) -> dict[str, Tensor]:
    """The tensors of a shard, mapped; a ValueError if it is not what the recipe made."""
    tensors, metadata = read_safetensors(path, advice="; delete it and build the store again")
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


def held(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in one piece of host memory. CUDA is told of it, which then copies without a detour (pinned memory).

    Not by torch's `pin_memory`: its allocator rounds every size up to a power of two.
    """
    flat, copies = lay_out(tensors, "cpu")
    for name, t in tensors.items():
        copies[name].copy_(t)
    if torch.cuda.is_available():
        error = torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)
        require(int(error) == 0, f"CUDA cannot pin {bytes_text(flat.nbytes)} of host memory: error", int(error))
    return copies


def lay_out(tensors: dict, device: str | torch.device, flat: Tensor | None = None) -> tuple[Tensor, dict]:
    """Room for all tensors in one piece of memory, and the piece of it that is each one's; by whatever keys."""
    ends, end = {}, 0
    for key, t in tensors.items():
        ends[key] = end, end + t.nbytes
        end += -(-t.nbytes // ALIGN) * ALIGN
    flat = torch.empty(end, dtype=torch.uint8, device=device) if flat is None else flat
    return flat, {key: flat[a:b].view(tensors[key].dtype).view(tensors[key].shape) for key, (a, b) in ends.items()}
