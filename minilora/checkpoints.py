"""Checkpoint files: safetensors, whole or in shards, and the JSON beside them; read with one clear error, written so
that a reader finds the old file or the new one and never a part of either.

No pickle is ever opened.
"""

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape as glob_escape
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nobody is told of a writer at work, so what a killed one left stays
    fcntl = None

import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from .config import require
from .tables import plain, quoted

CONFIG, MODEL, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


# ---------------------------------------------------------------- reading


def read_json(path: Path, expected: str = "a checkpoint folder") -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: no such file (`expected` says what its folder should have been), or one that cannot be read, is
            damaged or holds something else.
    """
    try:
        return parse_json(path.read_bytes(), path)
    except FileNotFoundError:
        raise ValueError(f"there is no {path.name} in {path.parent}; expected {expected}") from None
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror or e}") from None


def parse_json(data: bytes, path: Path) -> dict:
    """The object in the bytes of a JSON file; a ValueError, with its `path`, if they hold none."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged or not a JSON file: {plain(e, 300)}") from None
    require(isinstance(value, dict), f"{path} must hold an object", value)
    return value


@contextmanager
def opened(path: Path, kind: str = "not a safetensors file", advice: str = "") -> Iterator[safe_open]:
    """A safetensors file, mapped; closed after the `with`.

    Raises:
        ValueError: the file cannot be read, or is damaged or `kind`, also where what stands inside the `with` fails.
    """
    try:
        with open(path, "rb"):  # safetensors does not tell an unreadable file from a damaged one
            pass
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror or e}") from None
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except Exception as e:  # the reader's errors have no common class: SafetensorError, OSError, KeyError, ...
        raise ValueError(f"{path} is damaged or {kind}: {quoted(e, 300)}{advice}") from None


def read_safetensors(path: Path, **words: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one file, mapped, and its metadata; `words` and errors as of `opened`."""
    with opened(path, **words) as f:
        return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}


def copy_safetensors(path: Path, **words: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `read_safetensors`, copied into memory: with many small tensors that takes a third of the time, and nobody can
    cut the file short afterwards."""
    with opened(path, **words) as f:
        tensors = load(path.read_bytes())
        return {key: tensors[key] for key in f.keys()}, f.metadata() or {}


def read_tensor(path: Path, key: str) -> Tensor:
    """One tensor; the file is closed again, so that its pages do not add up."""
    with opened(path) as f:
        return f.get_tensor(key)


def files_of(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: ``model.safetensors``, or the shards that the index beside it names.

    Raises:
        ValueError: no such file, a shard missing, or a damaged index.
    """
    single, index, names = folder / MODEL, folder / INDEX, {MODEL}
    if index.exists() and not single.exists():
        shards = read_json(index).get("weight_map")
        require(shards and isinstance(shards, dict), f"{index} must map tensors to files under weight_map", shards)
        assert isinstance(shards, dict)
        names = set(map(str, shards.values()))
    files = [folder / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder} is no checkpoint: it holds no {file.name}"
                             + (f", which {INDEX} names" if file != single else f" and no {INDEX}"))
    return files


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder; errors as of `files_of` and `opened`."""
    tensors = {}
    for file in files_of(folder):
        tensors |= read_safetensors(file)[0]
    return tensors


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], folder: Path) -> None:
    """Raise a ValueError unless `folder` held exactly the `expected` names and shapes, in floating-point numbers."""
    for word, names in (("lacks", expected.keys() - tensors.keys()),
                        ("has the unknown", tensors.keys() - expected.keys())):
        if names:
            raise ValueError(f"checkpoint in {folder} {word} {', '.join(sorted(names)[:3])}"
                             + (f" and {len(names) - 3} more" if len(names) > 3 else ""))
    for name, want in expected.items():
        if tensors[name].shape != want.shape or not tensors[name].is_floating_point():
            raise ValueError(f"{name} in {folder} is {tuple(tensors[name].shape)} of {tensors[name].dtype}, "
                             f"config.json says {tuple(want.shape)} of a floating-point type")


def tensor_files(path: Path) -> dict[str, Path]:
    """The file in which each tensor of a checkpoint lies: a folder, or one safetensors file.

    Raises:
        ValueError: as `files_of` and `opened`.
    """
    found = {}
    for file in [path] if path.is_file() else files_of(path):
        with opened(file) as f:
            found |= dict.fromkeys(f.keys(), file)
    return found


def checksum(tensors: dict[str, Tensor]) -> str:
    """sha256 of all names and bytes."""
    total = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        total.update(name.encode())
        total.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


# ---------------------------------------------------------------- writing


def write_file(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a file that then takes the name of `path`: never a half-written one, also of two writers.

    Raises:
        OSError: the disk said no. What stood at `path` still stands there.
    """
    with writing(path.parent, path.name) as fresh:
        save(fresh / path.name)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file whose bytes the tensors and the metadata alone decide: the library's own order of the metadata
    differs from one process to the next."""
    save_file(tensors, path, metadata)
    with open(path, "r+b") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        require(len(text) <= size, "a header that is put in order must not become longer", len(text))
        f.seek(8)
        f.write(text.ljust(size))


@contextmanager
def writing(folder: Path, *names: str) -> Iterator[Path]:
    """A new folder inside `folder`, to write files of these names to; after the `with` they stand in `folder`, having
    taken their places one after the other, in this order.

    Raises:
        OSError: one could not be written. What stood in `folder` still stands there.
    """
    with staged(folder, *names) as fresh:
        yield fresh
        settle(fresh, folder, *names)
        for name in names:
            os.replace(fresh / name, folder / name)


@contextmanager
def staged(folder: Path, *names: str) -> Iterator[Path]:
    """A new folder inside `folder`, that goes at the end with what is still in it.

    Its name is unique, so writers do not disturb each other. What a killed writer of the first name left is removed,
    for a living one holds a lock on its folder. Any error inside is an OSError that says what could not be written.
    """
    fresh, held = None, None
    try:
        fresh, held = new_folder(folder, names[0])
        yield fresh
    except Exception as e:  # safetensors has an error of its own for a full disk
        raise OSError(f"could not write {' and '.join(names)} to {folder}: {e}") from None
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        if held is not None:
            os.close(held)


def settle(fresh: Path, folder: Path, *names: str) -> None:
    """Make new files ready to take the places of those in `folder`: on the disk, with the mode and owner of the old.

    A hard link to an old file keeps the old content.
    """
    for name in names:
        take_after(folder / name, fresh / name)
        with open(fresh / name, "rb") as f:
            os.fsync(f.fileno())  # so that a power cut after the renaming finds the bytes


def new_folder(folder: Path, name: str) -> tuple[Path, int | None]:
    """An empty folder for a writer of `name`, and the descriptor that holds its lock; removes those of dead writers."""
    for left in folder.glob(f".{glob_escape(name)}.*.tmp"):
        with suppress(BlockingIOError):
            if (held := lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(held)
    while True:
        fresh = folder / f".{name}.{secrets.token_hex(4)}.tmp"
        fresh.mkdir()
        with suppress(BlockingIOError):
            held = lock(fresh)
            if fresh.exists():
                return fresh, held
        # another writer took it for a dead one's in the instant before the lock


def lock(path: Path) -> int | None:
    """The descriptor that holds a lock on a file or folder; None where the system has none.

    Raises:
        BlockingIOError: another holds it.
    """
    if fcntl is None:
        return None
    held = None
    try:
        held = os.open(path, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return held
    except (OSError, AttributeError) as e:
        if held is not None:
            os.close(held)
        if isinstance(e, BlockingIOError):
            raise
        return None


def take_after(old: Path, new: Path) -> None:
    """Give a new file the mode and owner of the one it will replace; without one, the mode that is usual here (the
    safetensors library makes files that only their owner can read)."""
    os.chmod(new, stat.S_IMODE(os.stat(new.parent).st_mode) & 0o666)
    with suppress(OSError, AttributeError):  # Windows has no owners
        was = os.lstat(old)
        if stat.S_ISREG(was.st_mode):
            os.chmod(new, stat.S_IMODE(was.st_mode))
            if (was.st_uid, was.st_gid) != (os.geteuid(), os.getegid()):
                os.chown(new, was.st_uid, was.st_gid)
