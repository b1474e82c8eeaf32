"""``python -m minilora.helpdesk`` writes the tokenizer and the task files again."""

from .tasks import write_files

if __name__ == "__main__":
    write_files()
