"""A Hugging Face ``config.json``, read strictly: every error names the field."""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..config import is_number
from ..tables import plain, quoted

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

    def either(self, field: str, other: str, default: int) -> int:
        """A size that stands under one of two names."""
        return self.size(field if self.config.get(field) is not None else other, default)

    def numbers(self, field: str, below: int) -> tuple[int, ...]:
        """A list of layers' numbers; none if it is not there."""
        value = self.config.get(field)
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)) or not all(type(n) is int and 0 <= n < below for n in value):
            raise ValueError(f"{self.name}: {field} must be a list of numbers from 0 to {below - 1}, got "
                             f"{quoted(value)}")
        return tuple(value)

    def window(self, default: int) -> int:
        """Tokens that attention looks back, 0: to the first, which is what null says."""
        return 0 if "sliding_window" in self.config and self.config["sliding_window"] is None else self.size(
            "sliding_window", default)

    def rotary(self, default: float) -> float:
        """The share of each head that turns."""
        inside = self.config.get("rope_parameters")
        inside = inside if isinstance(inside, Mapping) and "partial_rotary_factor" in inside else self.config
        value = inside.get("partial_rotary_factor", default)
        if not is_number(value) or not 0 < value <= 1:
            raise ValueError(f"{self.name}: partial_rotary_factor must be in (0, 1], got {quoted(value)}")
        return float(value)

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


def in_hub_cache(path: Path) -> Path | None:
    """The config.json of a model on the hub (owner/name) that was downloaded before, if it was."""
    above = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    home = os.environ.get("HF_HUB_CACHE") or above / "hub"
    if len(path.parts) != 2 or ".." in path.parts or path.is_absolute():
        return None
    folder = Path(home) / f"models--{path.parts[0]}--{path.parts[1]}"
    revision = folder / "refs" / "main"
    if not revision.is_file():
        return None
    file = folder / "snapshots" / revision.read_text().strip() / "config.json"
    return file if file.is_file() else None


# fields of any config that, where they are there, are sizes; the least that each may be
SIZES = dict.fromkeys((
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
    "max_position_embeddings", "n_embd", "n_head", "n_positions", "d_model", "d_ff", "d_kv", "num_heads",
    "moe_intermediate_size", "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
    "decoder_layers", "num_decoder_layers", "image_size", "patch_size", "q_lora_rank", "kv_lora_rank", "v_head_dim",
    "qk_nope_head_dim", "qk_rope_head_dim", "kernel_size", "state_size", "num_labels"), 1) | dict.fromkeys((
        "num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "n_shared_experts"), 0)


def check_sizes(config: Mapping, name: str) -> None:
    """Refuse numbers that make no sense wherever they stand in a config: before transformers builds on them.

    Raises:
        ValueError: the field, its value, and what was expected.
    """
    for field, value in config.items():
        if isinstance(value, Mapping):
            check_sizes(value, f"{name}, {field}")
        elif isinstance(value, float) and not abs(value) < 1e39:  # NaN too
            raise ValueError(f"{name}: {field} must be a sensible number, got {quoted(value)}")
        elif field in SIZES and value is not None:
            values = value if isinstance(value, list) and value else [value]
            most = MOST["num_hidden_layers"] if "layer" in field else 2**31
            if not all(type(n) is int and SIZES[field] <= n < most for n in values):
                raise ValueError(f"{name}: {field} must be an integer from {SIZES[field]} on, of a sensible size, got "
                                 f"{quoted(value)}")


def read_config(path: Path) -> tuple[dict, str]:
    """The JSON object in a folder's ``config.json``, or in a file, and a name for it."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        file = in_hub_cache(path)
    if file is None:
        raise ValueError(f"there is no {path}; expected a folder with a config.json, the file itself, or the name of a "
                         "model whose config is in the hub's local cache")
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
        config = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, expected an object with fields")
    return config


def read_quantisation(config: object, name: str) -> dict[str, Any]:
    """What a config.json says of how its weights are stored, or the reason why that is not priced."""
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        raise ValueError(f"{name}: quantization_config must be an object with fields, got {quoted(config)}")
    method = config.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in config else None)
    if method == "bitsandbytes" and config.get("load_in_4bit"):
        return {"quantised": "nf4"}
    if method == "gptq" and config.get("bits") == 4:
        group = config.get("group_size", -1)
        if type(group) is not int or group < -1 or not group:
            raise ValueError(f"{name}: quantization_config's group_size must be -1 or a positive integer, got "
                             f"{quoted(group)}")
        return {"quantised": "gptq", "group": max(group, 0)}
    bits = f" in {config.get('bits') or ('8' if config.get('load_in_8bit') else 'unknown')} bits"
    stored = plain(method or "quantization_config", 80) + plain(bits, 80)
    raise ValueError(f"{name}: its weights are stored as {stored}, which is not priced; priced are "
                     "bitsandbytes in 4 bits, gptq in 4 bits, and weights in 16 or 32")


def suggest(wanted: str, names: Iterable[str]) -> str:
    """The names a mistyped one may have meant, for an error message."""
    names = list(names)
    wanted = wanted[:100].lower()  # comparing takes the square of the length
    close = list(dict.fromkeys([n for n in names if wanted in n] + get_close_matches(wanted, names, 3, 0.5)))[:3]
    return f"near it: {', '.join(close)}" if close else f"there are: {', '.join(names)}"
