"""The calculator's page as a folder of static files, Python for the browser among them: ``make page`` writes site/.

    python tools/page_site.py [FOLDER] [--node-modules FOLDER]
"""

import argparse
import io
import shutil
import sys
import zipfile
from pathlib import Path

from minilora.page.document import FILES, document, source
from minilora.shipped import PACKAGE

ROOT = Path(__file__).parents[1]
PYODIDE = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json")
# what of the package an answer needs; the calculator's second instrument needs torch, and a browser serves nobody
ROOMS = ("__init__.py", "tables.py", "refusals.py", "config.py", "patterns.py", "memory/**/*.py", "page/*.py")
LEFT_OUT = ("memory/tracer.py", "memory/cuda.py", "memory/traced_*.py", "memory/published.py", "memory/claims.py",
            "page/server.py", "page/document.py", "page/form.py")


def package() -> bytes:
    """The part of minilora that answers, as a zip; the same bytes whenever the files are the same."""
    left_out = {path for pattern in LEFT_OUT for path in PACKAGE.glob(pattern)}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        for path in sorted({path for pattern in ROOMS for path in PACKAGE.glob(pattern)} - left_out):
            entry = zipfile.ZipInfo(f"minilora/{path.relative_to(PACKAGE).as_posix()}")
            entry.compress_type = zipfile.ZIP_DEFLATED
            out.writestr(entry, path.read_bytes())
    return content.getvalue()


def write(folder: Path, pyodide: Path) -> None:
    """Write the site; a folder that is there is written anew."""
    if not (pyodide / PYODIDE[0]).is_file():
        raise SystemExit(f"there is no Pyodide in {pyodide}: npm install brings the one that package.json names")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pyodide").mkdir(parents=True)
    for name in PYODIDE:
        shutil.copyfile(pyodide / name, folder / "pyodide" / name)
    (folder / "minilora.zip").write_bytes(package())
    for name in (*FILES, "worker.js"):
        (folder / name).write_text(source(name), encoding="utf-8")
    loaded = sum(path.stat().st_size for path in folder.rglob("*") if path.parent.name == "pyodide"
                 or path.suffix == ".zip")
    (folder / "index.html").write_text(document("static", loaded), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "site")
    parser.add_argument("--node-modules", type=Path, default=ROOT / "node_modules")
    options = parser.parse_args()
    write(options.folder, options.node_modules / "pyodide")
    print(f"{options.folder}: {sum(p.stat().st_size for p in options.folder.rglob('*')):,} bytes")


if __name__ == "__main__":
    sys.exit(main())
