"""The help-desk world: customers write, the desk answers. Everything here is made up, by this room and data/world.json.

A conversation is one line of tokens, and only the reply is learnt:

    <system> ticket : field name code ; join | <customer> hello , mia here . it is about k4827 . <agent> name ...  <end>
    \\____________ prompt: read, never scored _______________________________________________________/ \\_ reply _/

`general` is the broad corpus the base is pretrained on: plain answers, answers in a house style that the system line
describes, tickets in a layout that it describes, and answers from facts that it lists. The four tasks adapt the base:

    tone       the same answers in one house style, which no system line asks for any more   (near)
    ticket     a ticket in one layout, likewise                                              (structured)
    catalogue  answers about products and policies the base has never seen                   (knowledge)
    cipher     the plain answer with every word exchanged for another, by one fixed table    (far)

The phrasings, the slot combinations and the target style, layout and products of the validation and test files never
occur in training. ``python -m minilora.helpdesk`` writes all files again, byte for byte the same.
"""

from ..losses import IGNORE
from ..shipped import DATA
from .evaluation import Score, answer, evaluate, evaluating, load_base
from .generator import (
                        PLAIN,
                        TICKET,
                        TONE,
                        Example,
                        catalogue,
                        cipher_table,
                        conversation,
                        draw,
                        draw_message,
                        encipher,
                        style_reply,
                        ticket_reply,
                        vocabulary,
                        world,
)
from .names import BASES, SPLITS, TASKS
from .tasks import Task, batches, collate, endless_batches, load_task, read_examples, task_file, write_files
from .tokens import Tokenizer, tokenizer

__all__ = ["BASES", "DATA", "IGNORE", "PLAIN", "SPLITS", "TASKS", "TICKET", "TONE", "Example", "Score", "Task",
           "Tokenizer", "answer", "batches", "catalogue", "cipher_table", "collate", "conversation", "draw",
           "draw_message", "encipher", "endless_batches", "evaluate", "evaluating", "load_base", "load_task",
           "read_examples", "style_reply", "task_file", "ticket_reply", "tokenizer", "vocabulary", "world",
           "write_files"]
