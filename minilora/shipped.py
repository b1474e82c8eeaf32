"""Where the files that travel with the package lie: data/ (bases, tasks, adapters, records) and notebooks/.

In a checkout they stand beside the package, at the top of the repository; a wheel carries them inside the package. They
are read where they are. Only a checkout is ever written to: an installed package may be shared, or read-only.
"""

from importlib.resources import files
from pathlib import Path

PACKAGE = Path(str(files("minilora")))
CHECKOUT = None if (PACKAGE / "data").is_dir() else PACKAGE.parent  # None: installed from a wheel


def shipped(name: str) -> Path:
    """The folder `name`, "data" or "notebooks", to be read."""
    return (CHECKOUT or PACKAGE) / name


def written(folder: Path | str | None, what: str = "the data") -> Path:
    """The folder to write `what` to: the one that was given, else data/ of the checkout.

    Raises:
        ValueError: none was given, and minilora is installed without its checkout.
    """
    if folder is None and CHECKOUT is None:
        raise ValueError(f"minilora is installed in {PACKAGE}, where nothing is written: name a folder for {what}")
    return DATA if folder is None else Path(folder)


DATA = shipped("data")
