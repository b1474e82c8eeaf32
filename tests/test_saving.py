"""Saving an adapter where saving is hard: mount points, the working directory, closed parents, several at once."""

import ctypes
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from small import MLP, shake

from minilora import LoRAConfig, checkpoints, inject, load_adapter, lora_parameters, pair, save_adapter
from minilora.__main__ import main
from minilora.adapters import CONFIG, WEIGHTS, read_adapter, write_adapter

CLONE_NEWNS, MS_REC, MS_PRIVATE, NOBODY = 0x20000, 0x4000, 0x40000, 65534


def adapted(rank: int, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = inject(MLP(), LoRAConfig(rank, 4, ("up", "down")))
    shake(model)
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    save_adapter(adapted(2), tmp_path / "a")
    return tmp_path / "a"


def saved_rank(folder: Path) -> int:
    return read_adapter(folder).config.rank


def in_a_child(work) -> None:
    """Run `work` in a process of its own, which may give up rights; its failure is ours."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# One process


def test_what_else_is_in_the_folder_stays(folder, tmp_path):
    number = os.stat(folder).st_ino
    (folder / "notes.md").write_text("mine")
    (folder / "runs").mkdir()
    (folder / "runs" / "state.pt").write_text("state")
    (folder / "latest").symlink_to("runs")
    os.link(folder / "notes.md", tmp_path / "notes again")
    os.chmod(folder / "notes.md", 0o600)
    before = {path.name: os.lstat(path) for path in folder.iterdir() if path.name not in (CONFIG, WEIGHTS)}
    with open(folder / "log.txt", "a") as log:
        log.write("before\n")
        save_adapter(adapted(3), folder)
        log.write("after\n")
    assert (folder / "log.txt").read_text() == "before\nafter\n" and saved_rank(folder) == 3
    assert os.stat(folder).st_ino == number  # the very folder
    for name, was in before.items():
        now = os.lstat(folder / name)
        assert (now.st_ino, now.st_nlink, now.st_mode, now.st_mtime_ns) == (
            was.st_ino, was.st_nlink, was.st_mode, was.st_mtime_ns), name
    assert {p.name for p in folder.iterdir()} == {*before, CONFIG, WEIGHTS, "log.txt"}


def test_a_hard_link_keeps_the_old_adapter_and_the_mode_goes_on(folder, tmp_path):
    old = tmp_path / "snapshot"
    old.mkdir()
    for name in (CONFIG, WEIGHTS):
        os.link(folder / name, old / name)
        os.chmod(folder / name, 0o640)
    save_adapter(adapted(3), folder)
    assert saved_rank(old) == 2 and saved_rank(folder) == 3
    assert {os.stat(folder / name).st_mode & 0o777 for name in (CONFIG, WEIGHTS)} == {0o640}


def test_new_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        save_adapter(adapted(2), tmp_path / "a")
    finally:
        os.umask(before)
    assert {os.stat(tmp_path / "a" / name).st_mode & 0o777 for name in (CONFIG, WEIGHTS)} == {0o640}


def test_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    save_adapter(adapted(3), ".")
    assert os.getcwd() == str(folder) and saved_rank(Path(".")) == 3 and sorted(os.listdir(".")) == [CONFIG, WEIGHTS]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount")
def test_a_mount_point(tmp_path):
    """As a volume in a container: its folder cannot be renamed (EBUSY)."""
    there = tmp_path / "volume"
    there.mkdir()

    def save_twice() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(CLONE_NEWNS) == 0 and libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        assert libc.mount(b"tmpfs", os.fsencode(there), b"tmpfs", 0, None) == 0
        with pytest.raises(OSError, match="busy"):
            there.rename(tmp_path / "elsewhere")
        for rank in (2, 3):
            save_adapter(adapted(rank), there)
            assert saved_rank(there) == rank

    in_a_child(save_twice)
    assert not list(there.iterdir())  # it was another file system


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such rights")
def test_a_folder_that_is_ours_in_one_that_is_not():
    with tempfile.TemporaryDirectory() as scratch:
        there = Path(scratch) / "parent" / "a"
        there.mkdir(parents=True)
        os.chmod(scratch, 0o755)
        ours = os.geteuid() == 0
        if ours:
            os.chown(there, NOBODY, NOBODY)
        os.chmod(there.parent, 0o555)

        def save_twice() -> None:
            if ours:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            with pytest.raises(PermissionError):
                (there.parent / "beside").mkdir()
            for rank in (2, 3):
                save_adapter(adapted(rank), there)
                assert saved_rank(there) == rank

        in_a_child(save_twice)
        assert saved_rank(there) == 3
        if ours:  # what root saves into somebody's folder stays theirs
            save_adapter(adapted(4), there)
            assert {os.stat(there / name).st_uid for name in (CONFIG, WEIGHTS)} == {NOBODY}
        os.chmod(there.parent, 0o755)


def test_a_folder_that_cannot_be_made_is_not_there_afterwards(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("minilora.adapters.save_tensors", full)
    with pytest.raises(OSError, match=f"could not write {WEIGHTS} and {CONFIG} to .*new: No space left"):
        save_adapter(adapted(2), tmp_path / "new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        save_adapter(adapted(2), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


EQUAL = """
import sys
sys.path.insert(0, sys.argv[2])
from test_saving import adapted, save_adapter
save_adapter(adapted(2), sys.argv[1])
"""


def test_equal_adapters_are_equal_bytes_from_any_process(folder, tmp_path):
    """safetensors puts the metadata in an order of its own in each process."""
    files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    subprocess.run([sys.executable, "-c", EQUAL, str(tmp_path / "b"), str(Path(__file__).parent)], check=True)
    for other in ("b", *"cdefghij"):
        if other != "b":
            save_adapter(adapted(2), tmp_path / other)
        assert {name: (tmp_path / other / name).read_bytes() for name in files} == files
    assert files[WEIGHTS][8:].startswith(b'{"__metadata__":{"format":"pt","minilora.base":"')


def test_metadata_in_any_order_and_alphabet_is_written_the_same(tmp_path):
    metadata = {"b": 'quote " and \\', "ä": "Grüße \U0001f600", "a": "\n\t\x01"}
    for name, order in (("x", metadata), ("y", dict(reversed(metadata.items())))):
        checkpoints.save_tensors({"t": torch.arange(5.0), "s": torch.ones(2, dtype=torch.int8)}, tmp_path / name, order)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    tensors, found = checkpoints.read_safetensors(tmp_path / "x")
    assert found == metadata and tensors["t"].tolist() == [0, 1, 2, 3, 4] and tensors["s"].tolist() == [1, 1]


# Kills between two steps


@pytest.mark.parametrize("done, rank", [("note", 2), ("no config", 2), ("weights", 3), ("config", 3)])
def test_a_pair_that_was_left_between_two_steps(folder, monkeypatch, done, rank):
    """The old adapter has rank 2, the new one rank 3; the writer dies after a step."""
    calls, replace, unlink = [], os.replace, Path.unlink

    class Killed(BaseException):
        pass

    def step(name: str) -> None:
        calls.append(name)
        if name == done:
            raise Killed

    def replaced(source, target):
        replace(source, target)
        step({WEIGHTS: "weights", CONFIG: "config"}.get(Path(target).name, "note"))

    def unlinked(path, **options):
        unlink(path, **options)
        step("no config" if path.name == CONFIG else "no note")

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replaced)
        patch.setattr(Path, "unlink", unlinked)
        save_adapter(adapted(3), folder)
    assert calls == ["note", "no config", "weights", "config"][:len(calls)] and calls[-1] == done
    assert all(map(torch.equal, lora_parameters(load_adapter(plain(), folder)), lora_parameters(adapted(rank))))
    save_adapter(adapted(4), folder)
    assert saved_rank(folder) == 4 and sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]


def plain() -> torch.nn.Module:
    torch.manual_seed(0)
    return MLP()


def test_a_damaged_note_is_named_and_saved_over(folder):
    (folder / CONFIG).unlink()
    note = pair.note_of(folder, CONFIG)
    for text, said in (("{", "is damaged or not a JSON file"), ("{}", "is damaged: it must name"), ("[]", "an object")):
        note.write_text(text)
        with pytest.raises(ValueError, match=f"{note.name}.*{said}"):
            read_adapter(folder)
    save_adapter(adapted(3), folder)
    assert saved_rank(folder) == 3 and sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]


def test_a_config_edited_by_hand_counts(folder):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"lora_alpha": 4', '"lora_alpha": 1'))
    assert read_adapter(folder).config.alpha == 1


# Several at once

SAVER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_saving import adapted, save_adapter
models = [adapted(int(rank), int(rank)) for rank in sys.argv[3:]]
print("go", flush=True)
sys.stdin.readline()
for i in range(30):
    save_adapter(models[i % len(models)], sys.argv[1])
"""


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_three_savers_and_two_readers(folder, tmp_path):
    """Readers always find an adapter, whole, and no saver fails."""
    ranks, expected = ((1, 3), (4, 5), (6, 3)), {2: read_adapter(folder).tensors}
    for rank in (1, 3, 4, 5, 6):
        save_adapter(adapted(rank, rank), tmp_path / str(rank))
        expected[rank] = read_adapter(tmp_path / str(rank)).tensors
    savers = [subprocess.Popen([sys.executable, "-c", SAVER, str(folder), str(Path(__file__).parent), *map(str, two)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for two in ranks]
    for saver in savers:
        assert saver.stdout.readline() == "go\n"
    seen, wrong = set(), []

    def read() -> None:
        while any(saver.poll() is None for saver in savers):
            try:
                found = read_adapter(folder)
                rank = found.config.rank
                if not equal(found.tensors, expected[rank]):
                    wrong.append(f"rank {rank} with other weights")
                seen.add(rank)
            except Exception as error:
                wrong.append(repr(error))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for saver in savers:
        saver.stdin.write("\n")
        saver.stdin.flush()
    for worker in (*readers, *savers):
        worker.join() if worker in readers else worker.wait()
    assert [saver.returncode for saver in savers] == [0, 0, 0] and wrong == [] and len(seen) > 2
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]


def test_a_saver_that_never_ends_is_named(folder, monkeypatch):
    monkeypatch.setattr(pair, "PATIENCE", 0.05)
    held = checkpoints.lock(folder)
    with pytest.raises(OSError, match="another process has been saving to .*a for 0 seconds"):
        save_adapter(adapted(3), folder)
    os.close(held)
    save_adapter(adapted(3), folder)
    assert saved_rank(folder) == 3


def test_a_reader_reads_again_what_was_replaced_meanwhile(folder):
    turns = []

    def read():
        turns.append(saved_config(folder))
        if len(turns) < 3:
            write_adapter(folder, {"k": torch.ones(len(turns))}, {"r": len(turns)})
        return turns[-1], read_tensors_of(folder)

    assert pair.read_pair(folder, CONFIG, WEIGHTS, read) == ({"r": 2}, 2) and len(turns) == 3


def saved_config(folder: Path) -> dict:
    return pair.read_config_of_pair(folder, CONFIG, WEIGHTS)


def read_tensors_of(folder: Path) -> int:
    return len(checkpoints.read_safetensors(folder / WEIGHTS)[0]["k"])


# Before the work, not after


@pytest.mark.parametrize("out, said", [("a", "a holds an adapter already: name another folder"),
                                       ("file", "file is a file: name a folder"),
                                       ("file/deeper", "file is a file: name a folder")])
def test_stream_refuses_a_place_for_its_adapter_before_it_trains(folder, tmp_path, monkeypatch, capsys, out, said):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert main(["stream", "--model", "llama-2-7b", "--seq", "64", "--out", out]) == 2
    assert capsys.readouterr() == ("", f"minilora stream: {said}\n") and time.monotonic() - start < 5
    assert (tmp_path / "file").read_text() == "mine" and saved_rank(folder) == 2
