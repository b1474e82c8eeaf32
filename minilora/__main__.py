"""``python -m minilora COMMAND ...``: the command line where the word ``minilora`` is not on the path."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
