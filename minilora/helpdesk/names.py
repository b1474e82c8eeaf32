"""Where the help-desk world's files lie, and what there is in it."""

from pathlib import Path

DATA = Path(__file__).parent.parent.parent / "data"
TASKS = ("general", "tone", "ticket", "catalogue", "cipher")
BASES = ("base", "base_early")
SPLITS = ("train", "validation", "test")
