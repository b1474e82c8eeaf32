"""What a command says of bad input: one line, the same on the command line and on the page."""

import argparse

from .tables import plain

# package that a command may do without until it is asked for -> the extra that brings it
EXTRAS = {"matplotlib": "notebooks", "IPython": "notebooks", "transformers": "hf", "peft": "hf", "gguf": "gguf",
          "nbgrader": "teach"}
# what a command raises where what it was given is bad, or what it needs is not there
REFUSED = (ValueError, OSError, ModuleNotFoundError, MemoryError, RecursionError)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is a ValueError: one line, no usage."""

    def error(self, message: str):
        raise ValueError(message)


def refusal(command: str, error: Exception) -> str:
    """The line that `minilora COMMAND` ends with."""
    return plain(f"minilora {command}: {' '.join(told(error).split())}")


def told(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return missing(error)
    if isinstance(error, RecursionError):
        return f"something is nested too deeply: {error}"
    return f"there is not enough memory: {error}" if isinstance(error, MemoryError) else str(error)


def missing(error: ModuleNotFoundError) -> str:
    """What to install for a package that is not there.

    Raises:
        ModuleNotFoundError: what is not there is a room of our own.
    """
    package = str(error.name).partition(".")[0]
    if package == __package__:
        raise error
    wanted = f"'minilora[{EXTRAS[package]}]'" if package in EXTRAS else package
    return f"this needs {package}, which is not installed: pip install {wanted}"
