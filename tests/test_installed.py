"""The package as a stranger has it: a wheel in an environment of its own, used from an empty folder, no checkout."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import minilora
from minilora import shipped

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "minilora", "data", "notebooks")

TUNE = """
import sys
from pathlib import Path
import minilora
from minilora import LoRAConfig, inject, load_adapter, save_adapter
from minilora.experiments import measured
from minilora.helpdesk import answer, batches, load_base, load_task, tokenizer
from minilora.memory import ModelSpec, Training, fit
from minilora.train import train
assert Path(minilora.__file__).is_relative_to(sys.prefix), minilora.__file__
assert len(measured("targets")["rows"]) > 10 and len(tokenizer()) > 500
assert "fits" in str(fit(ModelSpec.preset("llama-3-8b"), Training(method="qlora"), card="rtx-4090"))
message = "hello , my lamp k4827 is late ."
print("reply:", answer(load_base(), message))
model = inject(load_base("base_early"), LoRAConfig(rank=4, alpha=8, target_modules="all-linear"))
log = train(model, batches(load_task("tone").train, 8), steps=3, lr=1e-2, progress=False)
print("losses:", len(log.loss), log.loss[2] < log.loss[0])
save_adapter(model, "mine")
print("same:", answer(model, message) == answer(load_adapter(load_base("base_early"), "mine"), message))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A function that runs a command of an environment that holds the wheel, in an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    source, home, work = folder / "source", folder / "env", folder / "empty"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "figures"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source], check=True,
                   env=environment)
    venv.create(home, symlinks=os.name != "nt")
    scheme = {"base": str(home), "platbase": str(home)}
    site, scripts = (Path(sysconfig.get_path(what, "venv", scheme)) for what in ("purelib", "scripts"))
    python = scripts / "python"
    (wheel,) = folder.glob("minilora-*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True, env=environment)
    # torch and the rest come from the environment of the tests; its minilora stands behind ours on the path
    (site / "tests.pth").write_text(sysconfig.get_path("purelib"))
    shutil.rmtree(source)
    work.mkdir()

    def run(*words, code: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run([scripts / words[0], *words[1:]], cwd=work, env=environment,
                              capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done

    def files() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in site.rglob("*") if "__pycache__" not in path.parts
                and path.is_file()}

    run.work, run.files = work, files
    return run


def test_a_stranger_tunes_and_looks_inside(place):
    before = place.files()
    said = place("python", "-c", TUNE).stdout.splitlines()
    assert said[0].startswith("reply: ") and len(said[0].split()) > 4
    assert said[1:] == ["losses: 3 True", "same: True"]
    assert "self_attn.q_proj" in place("minilora", "inspect", "mine").stdout
    assert place.files() == before


def test_the_commands_that_need_no_torch(place):
    asked = ["--model", "llama-3-8b", "--method", "qlora"]
    assert "fits" in place("minilora", "memory", *asked, "--card", "rtx-4090").stdout
    assert "rtx-4090" in place("minilora", "fit", *asked).stdout
    for name in ("models", "cards", "claims"):
        assert place("python", "-m", "minilora", name).stdout.count("\n") > 5
    page = "from minilora.page.server import Page; page = Page(); print(*page.files); page.server_close()"
    assert place("python", "-c", page).stdout.split() == ["/", "/page.css", "/page.js", "/licences.txt"]
    assert place("minilora", "--version").stdout == f"minilora {minilora.__version__}\n"


def test_the_student_version_is_written_where_one_is(place):
    notebooks = len(list((ROOT / "notebooks").glob("*.ipynb")))
    assert place("python", "-m", "minilora.release").stdout == f"{notebooks} student notebooks in release\n"
    assert len(list((place.work / "release").glob("*.ipynb"))) == notebooks
    assert "no notebooks in nowhere" in place("python", "-m", "minilora.release", "nowhere", code=2).stderr


WRITE = """
import runpy, sys
for words in (["helpdesk"], ["helpdesk.pretraining", "--steps", "1"], ["experiments", "targets"],
              ["helpdesk", "--folder", "made"]):
    sys.argv = ["minilora", *words[1:]]
    try:
        runpy.run_module(f"minilora.{words[0]}", run_name="__main__")
    except SystemExit as end:
        print(end.code)
"""


def test_data_are_written_to_a_folder_that_is_given_and_nowhere_else(place):
    before = place.files()
    done = place("python", "-c", WRITE)
    assert done.stdout.split() == ["2", "2", "2", "0"] and place.files() == before
    said = [line for line in done.stderr.splitlines() if line.startswith("minilora.")]  # runpy warns of its own use
    assert len(said) == 3 and all(": minilora is installed in" in line for line in said)
    assert all("where nothing is written: name a folder for " in line for line in said)
    made = place.work / "made"
    written = [path.relative_to(made) for path in made.rglob("*.*")]
    assert len(written) == 16
    assert all((made / path).read_bytes() == (shipped.DATA / path).read_bytes() for path in written)


def test_here_the_data_of_the_checkout_are_read():
    assert shipped.CHECKOUT == ROOT and shipped.DATA == ROOT / "data" == shipped.written(None)
    assert shipped.written("out") == Path("out")


def test_one_version(place):
    said = place("python", "-c", "import importlib.metadata as m; print(m.version('minilora'))").stdout
    assert said.strip() == minilora.__version__
    assert importlib.metadata.version("minilora")  # and the one that is tested has one
