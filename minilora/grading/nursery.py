"""Starts students' processes by forking, since importing torch again for each would take seconds.

Three processes stand between the grader and a student's line. The nursery has imported what notebooks import, and has
read no submission and no reference. For each submission it forks a keeper, which runs none of the student's lines and
ends the student's process with everything that it has started. The keeper forks the student's process.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..shipped import PACKAGE

REPLY = 16 * 2**20  # bytes; an honest reply has well under 1 MiB
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1",
         "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PASSED_ON = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR")


class Ended(Exception):
    """A student's process that answers no more, and why."""


def environment() -> dict[str, str]:
    """The environment of students' processes: the teacher's may hold keys and tokens."""
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ} | QUIET | {"PYTHONPATH": path}


class Student:
    """One student's process, from outside."""

    def __init__(self, requests: int, replies: int, leash: int):
        self.requests, self.replies, self.leash = requests, replies, leash
        self.asked, self.received = 0, b""
        for pipe in (requests, replies):
            os.set_blocking(pipe, False)

    def ask(self, request: dict, seconds: float) -> dict:
        """Sends a request and waits for its reply.

        Raises:
            Ended: there is none in time, or none that can be read.
        """
        self.asked += 1
        left = memoryview(json.dumps(request | {"id": self.asked}).encode() + b"\n")
        deadline = time.monotonic() + seconds
        while b"\n" not in self.received:
            patience = deadline - time.monotonic()
            if patience <= 0:
                raise Ended(f"takes longer than {seconds:g} s")
            ready, writable, _ = select.select([self.replies], [self.requests] if left else [], [], patience)
            try:
                if writable:
                    left = left[os.write(self.requests, left):]
                if ready:
                    piece = os.read(self.replies, 2**20)
                    if not piece:
                        raise Ended("ends the whole process")
                    self.received += piece
            except BrokenPipeError:
                raise Ended("ends the whole process") from None
            if len(self.received) > REPLY:
                raise Ended(f"sends more than {REPLY >> 20} MiB")
        line, _, self.received = self.received.partition(b"\n")
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict) or reply.get("id") != self.asked:
            raise Ended("sends what was not asked for")
        return reply

    def let_go(self) -> None:
        """Ends the process: whoever waits for a reply is told at once."""
        leash, self.leash = self.leash, -1
        if leash >= 0:
            os.close(leash)

    def close(self) -> None:
        self.let_go()
        os.close(self.requests)
        os.close(self.replies)


class Nursery:
    """A context: inside it, `student()` starts a process, and `partial` says why isolation is partial, or "".

    Args:
        alone: False does without namespaces, as where the kernel gives none.
    """

    def __init__(self, alone: bool = True):
        self.alone, self.students = alone, set()

    def __enter__(self) -> "Nursery":
        self.socket, theirs = socket.socketpair()
        self.room = tempfile.mkdtemp(prefix="grading-")
        os.chmod(self.room, 0o755)
        # -P: the working folder, which may hold the submissions, is no place to import from
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "minilora.grading.nursery", str(theirs.fileno()), self.room,
             "alone" if self.alone else "with others"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            env=environment() | {"HOME": self.room, "IPYTHONDIR": self.room})
        theirs.close()
        said = self.socket.recv(4096)
        if not said:
            self.__exit__()
            raise RuntimeError("the process that starts submissions ended before it had started one")
        self.partial = json.loads(said)
        return self

    def __exit__(self, *_) -> None:
        self.socket.close()
        self.process.wait()
        shutil.rmtree(self.room, ignore_errors=True)

    @contextlib.contextmanager
    def student(self):
        """A fresh process, ended with all that it started."""
        (requests, to), (replies_from, replies), (leash, held) = os.pipe(), os.pipe(), os.pipe()
        socket.send_fds(self.socket, [b"s"], [requests, replies, leash])
        for pipe in (requests, replies, leash):
            os.close(pipe)
        student = Student(to, replies_from, held)
        self.students.add(student)
        try:
            yield student
        finally:
            self.students.remove(student)
            student.close()


# ---------------------------------------------------------------- inside the nursery


def keep(requests: int, replies: int, leash: int, room: Path, isolated: bool, shell) -> None:
    """Forks the student's process, and kills it when the grader lets go of the leash."""
    from .sandbox import separate

    for descriptor in {*range(3, 4096)} - {requests, replies, leash}:  # above all the nursery's socket
        with contextlib.suppress(OSError):
            os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if isolated:
        separate()
    else:
        room = Path(tempfile.mkdtemp(dir=room))
    number, inner = os.getpid(), os.fork()
    if not inner:
        os.close(leash)
        live(requests, replies, room, number if isolated else None, shell)
    os.close(requests)
    os.close(replies)
    while os.waitpid(inner, os.WNOHANG) == (0, 0):
        if select.select([leash], [], [], 0.02)[0]:
            os.kill(inner, signal.SIGKILL)  # the first process of its namespace takes all others with it
            break
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(inner, signal.SIGKILL)
    if not isolated:
        shutil.rmtree(room, ignore_errors=True)


def live(requests: int, replies: int, room: Path, number: int | None, shell) -> None:
    """The student's process, from its birth to its end; `number`, if it is shut in, is that of its keeper."""
    from .sandbox import limits, shut_in
    from .worker import serve

    try:
        os.setsid()
        with contextlib.suppress(OSError):  # where memory runs out, this is what the kernel ends first
            Path("/proc/self/oom_score_adj").write_text("1000")
        if number is None:
            os.chdir(room)
        else:
            shut_in(room, number)
        os.environ.update(HOME=os.getcwd(), TMPDIR=os.getcwd(), IPYTHONDIR=os.getcwd())
        tempfile.tempdir = None
        limits(alone=number is not None)
        with os.fdopen(requests, "rb") as reader, os.fdopen(replies, "wb") as writer:
            serve(reader, writer, shell)
    finally:
        os._exit(0)


def main(descriptor: int, room: Path, alone: bool) -> None:
    import torch  # noqa: F401, what notebooks import is imported once

    import minilora  # noqa: F401

    with contextlib.suppress(ImportError):
        import matplotlib.pyplot  # noqa: F401
    from .sandbox import possible
    from .worker import new_shell

    shell = new_shell()
    assert not any(name.startswith("minilora.check") for name in sys.modules), "the nursery must know no checker"
    link = socket.socket(fileno=descriptor)
    partial = possible(room) if alone else "not asked for"
    link.send(json.dumps(partial).encode())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    while True:
        said, pipes, _, _ = socket.recv_fds(link, 1, 3)  # a byte a submission, so that no two run together
        if not said:
            return
        if not os.fork():
            try:
                keep(*pipes, room, not partial, shell)
            finally:
                os._exit(0)
        for pipe in pipes:
            os.close(pipe)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "alone")
