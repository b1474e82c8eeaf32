"""A Hugging Face ``config.json``, read strictly: every error names the field."""

import json
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path

from ..config import is_number
from ..tables import quoted

LARGEST = 2**20  # bytes of a config.json: one that names a thousand labels has a tenth
MOST = {"num_hidden_layers": 10_000}  # no model is deeper
# what a size is also called: new name where the old one is asked for, and the other way round
OTHER_NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "hidden_size": "n_embed",
               "n_positions": "n_ctx"}


class Fields:
    """The fields of one config.

    Args:
        config: what stands in the file. name: what to call it. family: its model_type.
        names: size -> what this family calls it, where it is not `hidden_size` and the like.
    """

    def __init__(self, config: Mapping, name: str, family: str, names: Mapping[str, str]):
        self.config, self.name, self.family, self.names = config, name, family, names

    def size(self, field: str, default: int | None = None, least: int = 1) -> int:
        """A positive integer; without a default it must be there."""
        config, key = self.config, self.names.get(field, field)
        key = OTHER_NAMES[key] if key not in config and OTHER_NAMES.get(key) in config else key
        value = config.get(key)
        if value is None and default is not None:
            return default
        if key not in config:
            raise ValueError(f"{self.name}: a {self.family} config lacks {key}")
        if type(value) is not int or not least <= value < MOST.get(field, 2**31):
            raise ValueError(f"{self.name}: {key} must be a positive integer of a sensible size, got {quoted(value)}")
        return value

    def flag(self, field: str, default: bool) -> bool:
        value = self.config.get(field)
        if value not in (True, False, None):
            raise ValueError(f"{self.name}: {field} must be true or false, got {quoted(value)}")
        return default if value is None else bool(value)

    def word(self, field: str, default: str, known: Collection[str]) -> str:
        value = self.config.get(field) or default
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{self.name}: {field} {quoted(value)} is not known; {suggest(str(value), known)}")
        return value

    def share(self, field: str, default: float) -> float:
        """A number in [0, 1)."""
        value = default if self.config.get(field) is None else self.config[field]
        if not is_number(value) or not 0 <= value < 1:
            raise ValueError(f"{self.name}: {field} must be in [0, 1), got {quoted(value)}")
        return float(value)


def read_config(path: Path) -> tuple[dict, str]:
    """The JSON object in a folder's ``config.json``, or in a file, and a name for it."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"there is no {file}; expected a folder with a config.json, or the file itself")
    try:
        check_size(file.stat().st_size, file)
        return parsed(file.read_bytes(), file), file.parent.name or file.name
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None


def check_size(size: int, file: Path | str) -> None:
    """Refuse what is no config.json by its bytes alone."""
    if size > LARGEST:
        raise ValueError(f"{file} has {size:,} bytes, expected a config.json of at most {LARGEST:,}")


def parsed(content: bytes, file: Path | str) -> dict:
    """The JSON object that a file called so holds."""
    try:
        config = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, expected an object with fields")
    return config


def suggest(wanted: str, names: Iterable[str]) -> str:
    """The names a mistyped one may have meant, for an error message."""
    names = list(names)
    wanted = wanted[:100].lower()  # comparing takes the square of the length
    close = list(dict.fromkeys([n for n in names if wanted in n] + get_close_matches(wanted, names, 3, 0.5)))[:3]
    return f"near it: {', '.join(close)}" if close else f"there are: {', '.join(names)}"
