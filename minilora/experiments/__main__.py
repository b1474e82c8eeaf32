"""``python -m minilora.experiments NAME``: run a sweep and record it."""

import argparse
import sys
from pathlib import Path

from ..shipped import written
from . import SWEEPS, record


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m minilora.experiments", description="Run a sweep and record it.")
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--folder", type=Path, help="record into measured/ of it; data/ of the checkout by default")
    options = parser.parse_args(arguments)
    try:
        folder = written(options.folder, "--folder, for the record")  # before hours of training, not after
    except ValueError as error:
        print(f"minilora.experiments: {error}", file=sys.stderr)
        return 2
    rows = SWEEPS[options.sweep](folder) if options.sweep == "adapters" else SWEEPS[options.sweep]()
    record(options.sweep, rows, f"python -m minilora.experiments {options.sweep}", folder / "measured")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
