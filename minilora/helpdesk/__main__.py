"""``python -m minilora.helpdesk`` writes the tokenizer and the task files again."""

import argparse
import sys
from pathlib import Path

from ..shipped import written
from .tasks import write_files


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m minilora.helpdesk", description="Write tokenizer and tasks.")
    parser.add_argument("--folder", type=Path, help="where to; data/ of the checkout by default")
    try:
        write_files(written(parser.parse_args(arguments).folder, "--folder, for the tokenizer and the tasks"))
    except (ValueError, OSError) as error:
        print(f"minilora.helpdesk: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
