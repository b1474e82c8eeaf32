"""Packages that only some questions need."""

from importlib import import_module
from typing import Any


def require_package(name: str, why: str) -> Any:
    """The package; if it is not installed a ValueError that says what needs it (`why`) and how to get it."""
    try:
        return import_module(name)
    except ImportError:
        raise ValueError(f"{why}, and {name} is not installed: pip install {name}") from None
