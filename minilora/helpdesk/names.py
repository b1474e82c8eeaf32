"""What there is in the help-desk world, by name."""

TASKS = ("general", "tone", "ticket", "catalogue", "cipher")
BASES = ("base", "base_early")
SPLITS = ("train", "validation", "test")
