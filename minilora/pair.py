"""Two files that belong together, a config and weights, replaced as one.

No file system renames two files at once. What is done instead, in `write_pair`:

1. Both new files are written under names of their own. If the config is the one that is there, the weights take their
   place and that is all. Else
2. a note is put into the folder, with both configs and the checksum of the new weights;
3. the old config is removed: from here on the note says which config is true;
4. the new weights take their place, and with them the pair has changed;
5. the new config takes its place;
6. the note is removed.

`read_pair` sees the old two or the new two at any moment, also after a kill at any moment: where the config is missing
and there is a note, the weights' checksum tells which of its configs is theirs. It reads again if a file was replaced
while it read. A program that does not know of the note (PEFT) finds no config between 3 and 5, or after a kill just
there, and says so, until the next save: it is not given weights with another's config.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from .checkpoints import lock, parse_json, read_json, settle, staged

PATIENCE = 600.0  # seconds that a writer waits for others of the same folder
T = TypeVar("T")


def note_of(folder: Path, config: str) -> Path:
    return folder / f".{config}.pending"


def write_pair(folder: Path, config: str, weights: str, text: bytes, save: Callable[[Path], object]) -> None:
    """Replace the files of these names by `text` and by what `save` writes to a path, as one; make the folder too.

    Other files in the folder, the folder itself and the links that lead to it stay. Writers of one folder take turns.

    Raises:
        OSError: the disk said no, or another writer did not finish in ten minutes. The old two still stand there.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with staged(folder, weights, config) as fresh:
            (fresh / config).write_bytes(text)
            save(fresh / weights)
            settle(fresh, folder, weights, config)
            with turn(folder):
                replace_pair(fresh, folder, config, weights, text)
    except OSError:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise


def replace_pair(fresh: Path, folder: Path, config: str, weights: str, text: bytes) -> None:
    """Steps 2 to 6."""
    old, note = None, note_of(folder, config)
    with suppress(ValueError):  # what cannot be read need not be kept
        old = config_there(folder, config, weights)
    same = old == text and (folder / config).exists()
    if not same and old is not None:
        sides = {"weights": checksum_of(fresh / weights), "new": text.decode(), "old": old.decode("utf-8", "replace")}
        (fresh / note.name).write_text(json.dumps(sides), encoding="utf-8")
        settle(fresh, folder, note.name)
        os.replace(fresh / note.name, note)
        with suppress(FileNotFoundError):
            (folder / config).unlink()
    os.replace(fresh / weights, folder / weights)
    if not same:
        os.replace(fresh / config, folder / config)
    with suppress(FileNotFoundError):
        note.unlink()


def config_there(folder: Path, config: str, weights: str) -> bytes | None:
    """The bytes of the config, also of a pair that a killed writer left between two steps; None if there is none.

    Raises:
        ValueError: it cannot be read, or the note of the killed writer is damaged.
    """
    path = folder / config
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for somebody who writes to it
            raise ValueError(f"{path} is no file")
        return path.read_bytes()
    except FileNotFoundError:
        pass
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror or e}") from None
    note = note_of(folder, config)
    if not note.is_file() or not (folder / weights).is_file():
        return None
    sides = read_json(note)
    if not all(isinstance(sides.get(key), str) for key in ("weights", "new", "old")):
        raise ValueError(f"{note} is damaged: it must name the weights, and the config before and after")
    return sides["new" if checksum_of(folder / weights) == sides["weights"] else "old"].encode()


def read_config_of_pair(folder: Path, config: str, weights: str) -> dict | None:
    """The config's JSON object, as `config_there`; None if there is none, a ValueError if it is damaged."""
    data = config_there(folder, config, weights)
    return None if data is None else parse_json(data, folder / config)


def read_pair(folder: Path, config: str, weights: str, read: Callable[[], T]) -> T:
    """What `read` makes of the two files, both of one save: it is called again if one of them was replaced meanwhile.

    Raises:
        ValueError: that of `read`, or the files change all the time.
    """
    paths = [folder / config, folder / weights, note_of(folder, config)]
    for _ in range(1000):
        with ExitStack() as held:
            before = [identity(path, held) for path in paths]
            try:
                found = read()
            except ValueError:
                if [identity(path) for path in paths] == before:
                    raise
                continue
            if [identity(path) for path in paths] == before:
                return found
    raise ValueError(f"the files in {folder} are replaced all the time: they could not be read together")


def identity(path: Path, held: ExitStack | None = None) -> tuple[int, int] | None:
    """Device and number of a file, None if there is none; kept open in `held`, so that no other gets its number."""
    with suppress(OSError):  # it may be there and closed to us
        if held is not None:
            number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            held.callback(os.close, number)
            found = os.fstat(number)
            return found.st_dev, found.st_ino
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def checksum_of(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Wait for the folder's lock, hold it, and let it go. Where the system has no locks, nobody waits."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            held = lock(folder)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                raise OSError(f"another process has been saving to {folder} for {PATIENCE:.0f} seconds") from None
            time.sleep(0.002)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)
