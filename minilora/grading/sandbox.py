"""A process that can read Python and its packages, write into one small folder of its own, and nothing else.

Linux offers all of this without a program to install: namespaces for mounts, network, processes and users (see
namespaces(7)). Where the kernel or a container forbids them only the limits hold; `possible` tells.
"""

import contextlib
import ctypes
import os
import resource
import signal
import site
import sys
from pathlib import Path

from ..shipped import CHECKOUT, DATA, PACKAGE

MEMORY, FILE, FILES, PROCESSES = 3 * 2**30, 16 * 2**20, 256, 64  # bytes, bytes, open files, processes and threads
ROOM = "size=64m,nr_inodes=2k,mode=1777"  # what a submission may write in all; it lies in memory
NOBODY, STRANGERS = 65534, 2**30  # a user without rights; the first of a range of users that nobody else is
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
BIND, REC, PRIVATE, NOSUID, NODEV, NOEXEC, DETACH = 4096, 16384, 1 << 18, 2, 4, 8, 2
PIVOT_ROOT, CAPSET, MOUNT_SETATTR = {"x86_64": (155, 126, 442), "aarch64": (41, 91, 442)}.get(
    os.uname().machine if hasattr(os, "uname") else "", (0, 0, 0))
SECRET = ("check", "notebooks")  # folders of this package in which the answers stand
BESIDE = ("notebooks", "tests", "tools", "release", "build", ".git")  # and those of the checkout, if it can be seen
COPIES = ("", "lib/python3*/*-packages/", "local/lib/python3*/*-packages/")  # where another copy of it may stand


class Refused(OSError):
    """The kernel does not allow it here."""


def libc(name: str, *arguments) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    given = [a.encode() if isinstance(a, str) else ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    if function(*given) == -1:
        raise Refused(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def limits(alone: bool) -> None:
    """Bounds memory, the size of a file, the number of open files, and cores; `alone` also the number of processes,
    which the kernel counts for a user, not for a submission."""
    bounds = {"RLIMIT_AS": in_use() + MEMORY, "RLIMIT_DATA": MEMORY, "RLIMIT_FSIZE": FILE, "RLIMIT_NOFILE": FILES,
              "RLIMIT_CORE": 0}
    if alone:
        bounds["RLIMIT_NPROC"] = PROCESSES
    for name, bound in bounds.items():
        kind = getattr(resource, name, None)
        with contextlib.suppress(ValueError, OSError, TypeError):  # not every system knows every limit
            _, hard = resource.getrlimit(kind)
            bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
            resource.setrlimit(kind, (bound, bound))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file too large is an error, not the end


def in_use() -> int:
    """Bytes of address space that this process has already, most of them libraries; a guess where /proc is missing."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 8 * 2**30


def readable() -> list[Path]:
    """What Python needs: itself, the system's libraries, the packages, this package and its data."""
    places = [Path(p) for p in ("/usr", "/lib", "/lib64", "/bin", "/etc", "/nix/store")]
    places += [Path(p) for p in (sys.prefix, sys.base_prefix, sys.exec_prefix, *site.getsitepackages())]
    places += [Path(p) for p in sys.path if p.endswith("-packages")]  # not a working folder, which may hold anything
    places += [PACKAGE, DATA]
    places += [p.resolve() for p in places]
    found = {Path(os.path.abspath(p)) for p in places if p.exists()} - {Path("/")}
    return sorted(p for p in found if not any(q in found for q in p.parents))


def secrets() -> list[Path]:
    """The folders with answers in all that is readable."""
    packages = {PACKAGE, *(package for place in readable() for where in COPIES
                           for package in place.glob(f"{where}{PACKAGE.name}"))}
    found = [package / name for package in packages for name in SECRET]
    found += [CHECKOUT / name for name in BESIDE] if CHECKOUT else []
    return [folder for folder in found if folder.is_dir()]


def separate() -> None:
    """Namespaces of its own for what this process starts next; as root with root's rights, else as a user's."""
    if os.geteuid() == 0:
        libc("unshare", NEWNS | NEWIPC | NEWPID | NEWNET)
        return
    user, group = os.geteuid(), os.getegid()
    libc("unshare", NEWUSER | NEWNS | NEWIPC | NEWPID | NEWNET)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"1000 {user} 1")
    Path("/proc/self/gid_map").write_text(f"1000 {group} 1")


def shut_in(root: Path, number: int = 0) -> None:
    """Makes `root`, an empty folder, the root of this process, fills it with what is readable, and drops every right.
    To be called by the first process in the namespaces of `separate`. Where the grader is root, the process becomes
    the user STRANGERS + number: the kernel counts processes for each user, and one must not use up another's."""
    libc("mount", "none", "/", None, REC | PRIVATE, None)
    libc("mount", "room", str(root), "tmpfs", NOSUID | NODEV, "size=4m,mode=755")
    for place in readable():
        target = root / place.relative_to("/")
        if place.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.readlink(place))
        else:
            target.mkdir(parents=True, exist_ok=True)
            libc("mount", str(place), str(target), None, BIND | REC, None)
    (root / "dev").mkdir(exist_ok=True)
    for name in ("null", "zero", "random", "urandom"):
        (root / "dev" / name).touch()
        libc("mount", f"/dev/{name}", str(root / "dev" / name), None, BIND, None)
    for name in ("proc", "room", "old"):
        (root / name).mkdir(exist_ok=True)
    if not (root / "tmp").exists():  # else Python or this package lies there
        (root / "tmp").symlink_to("/room")
    for folder in (root / secret.relative_to("/") for secret in secrets()):
        if folder.is_dir():
            libc("mount", "hidden", str(folder), "tmpfs", NOSUID | NODEV, "size=4k")
    read_only = (ctypes.c_uint64 * 4)(1 | NOSUID, 0, 0, 0)  # MOUNT_ATTR_RDONLY
    libc("syscall", MOUNT_SETATTR, -100, str(root), 0x8000, ctypes.byref(read_only), ctypes.sizeof(read_only))
    libc("mount", "room", str(root / "room"), "tmpfs", NOSUID | NODEV, ROOM)
    try:
        libc("mount", "proc", str(root / "proc"), "proc", NOSUID | NODEV | NOEXEC, None)
    except Refused:
        pass  # a container may forbid it; then there is no /proc, which Python can do without
    libc("syscall", PIVOT_ROOT, str(root), str(root / "old"))
    libc("umount2", "/old", DETACH)
    os.chdir("/room")
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        try:
            os.setresuid(*[STRANGERS + number] * 3)
        except OSError:  # a container that has few users
            os.setresuid(NOBODY, NOBODY, NOBODY)
    libc("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc("syscall", CAPSET, ctypes.byref(header), ctypes.byref(none))


def possible(root: Path) -> str:
    """"" where `separate` and `shut_in` work here, else why not. Tried in processes of their own."""
    if not MOUNT_SETATTR or not sys.platform.startswith("linux"):
        return "namespaces are a matter of Linux"
    reader, writer = os.pipe()
    outer = os.fork()
    if not outer:
        try:
            separate()
            if inner := os.fork():
                os.waitpid(inner, 0)
            else:
                shut_in(root)
                seen = os.access(PACKAGE / "__init__.py", os.R_OK) and DATA.is_dir()
                os.write(writer, b"yes" if seen else f"{PACKAGE} cannot be read from inside".encode())
        except BaseException as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(outer, 0)
    with os.fdopen(reader) as file:
        said = file.read()
    return "" if said == "yes" else said or "no answer"
