"""Variants of the LoRA layer, one file each: a subclass of `LoRALayer` that names itself; no other file knows it."""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__, f"{__name__}."):
    import_module(_file.name)
