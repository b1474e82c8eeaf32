"""Python in WebAssembly against CPython: every preset by every method in every stack, to the byte of every item.

The ledger lives on when CPython lets go of what nobody holds, and each release of Python counts references in its way.
Needs node, and Pyodide from `npm ci`.

    PYTHONPATH=.:tools:tests python tests/bench/pyodide_equal.py
"""

import itertools
import sys
import time

from page_pyodide import differences

from minilora.memory.models import PRESETS
from minilora.memory.run import METHODS
from minilora.memory.stacks import STACKS


def every_state() -> list[dict[str, str]]:
    return [{"model": model, "method": method, "stack": stack, "targets": "all-linear", "seq": "512"}
            for model, method, stack in itertools.product(PRESETS, METHODS, STACKS)]


def main() -> int:
    start, states = time.perf_counter(), every_state()
    wrong = differences(states)
    for state in wrong:
        print("differs:", state)
    print(f"{len(states) - len(wrong)} of {len(states)} equal in {time.perf_counter() - start:.0f} s")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
