"""Some 1,200 wrong inputs of memory, fit and trace: how each ends. Those that do not end in one line are printed.

    python tests/bench/wrong_inputs.py [FIRST [LAST]]         (ten minutes for all)
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))
from wrong_configs import cases, failure


class Captured:
    """What pytest's capsys does."""

    def __init__(self, err: io.StringIO):
        self.err = err

    def readouterr(self) -> SimpleNamespace:
        return SimpleNamespace(err=self.err.getvalue())


if __name__ == "__main__":
    first, last = (int(word) for word in (*sys.argv[1:3], 0, 10**9)[:2]) if len(sys.argv) > 2 else (0, 10**9)
    done = bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for line, content in list(cases())[first:last]:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                wrong = failure(line, content, Path(folder), Captured(err))
            done, bad = done + 1, bad + bool(wrong)
            if wrong:
                print(first + done - 1, line, content[:150], wrong, flush=True)
    print(f"{done} inputs, {bad} did not end in one line")
