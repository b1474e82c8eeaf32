"""``python -m minilora.experiments NAME``: run a sweep and record it."""

import argparse

from . import SWEEPS, record

parser = argparse.ArgumentParser(prog="python -m minilora.experiments", description="Run a sweep and record it.")
parser.add_argument("sweep", choices=SWEEPS)
name = parser.parse_args().sweep
record(name, SWEEPS[name](), f"python -m minilora.experiments {name}")
