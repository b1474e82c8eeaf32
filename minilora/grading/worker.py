"""The student's process: runs the cells of one notebook and calls what they define, as it is told.

Nothing here is secret and nothing is believed: a student's line may replace any part of it. What it sends is an answer
to inputs that it was sent, so the only forgery that earns a point is the right answer.
"""

import ast
import base64
import importlib.abc
import importlib.util
import json
import pickle
import sys
import types
from typing import Any, BinaryIO

from .calls import call, short
from .wire import encode, encode_call

HIDDEN = "minilora.check"


class Silent(types.ModuleType):
    """Stands for the checkers, which are not here: whatever is asked of it, it gives itself and says nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Silent(name)

    def __call__(self, *arguments, **options):
        return self

    def __getitem__(self, key):
        return self

    def __iter__(self):
        return iter(())


class Silencer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a silent module for each of the checkers'."""

    def find_spec(self, name, path=None, target=None):
        if name == HIDDEN or name.startswith(HIDDEN + "."):
            return importlib.util.spec_from_loader(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Silent(spec.name)

    def exec_module(self, module):
        pass


def definitions(source: str) -> str:
    """The imports, functions and classes of a cell; nothing of a broken one."""
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
    try:
        return "\n".join(ast.unparse(node) for node in ast.parse(source).body if isinstance(node, kinds))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""


def new_shell():
    """IPython without a history file: a cell may hold a magic."""
    from IPython.terminal.interactiveshell import TerminalInteractiveShell
    from traitlets.config import Config

    return TerminalInteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))


def answer(request: dict, shell) -> dict:
    """What comes of one request: a cell to run, or a function to call on each of the cases."""
    if request["do"] == "cell":
        source = request["source"]
        shell.run_cell(source if request["whole"] else definitions(shell.transform_cell(source)))
        return {}
    names = shell.user_ns
    if request["name"] not in names:
        return {"missing": True}
    function = names[request["name"]]
    if not callable(function):
        return {"uncalled": short(function)}
    calls = []
    for arguments in pickle.loads(base64.b64decode(request["cases"])):
        done = call(function, arguments, request["recorded"], request["listed"])
        try:
            calls.append(encode_call(done, arguments))
        except Exception as error:  # a value that refuses to be looked at
            calls.append({"value": encode(None), "failure": [type(error).__name__, [], short(error), ""],
                          "after": [], "printed": done.printed})
    return {"calls": calls}


def serve(requests: BinaryIO, replies: BinaryIO, shell) -> None:
    """Answers one request a line until there are no more."""
    sys.meta_path.insert(0, Silencer())
    for line in requests:
        request = json.loads(line)
        reply = answer(request, shell) | {"id": request["id"]}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
