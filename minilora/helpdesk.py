"""The help-desk world: customers write, the desk answers. Everything here is made up, by this file and data/world.json.

A conversation is one line of tokens, and only the reply is learnt:

    <system> ticket : field name code ; join |  <customer> hello , mia here . it is about k4827 . <agent> name ...  <end>
    \\____________ prompt: read, never scored ________________________________________________________/ \\_ reply _/

`general` is the broad corpus the base is pretrained on: plain answers, answers in a house style that the system line
describes, tickets in a layout that it describes, and answers from facts that it lists. The four tasks adapt the base:

    tone       the same answers in one house style, which no system line asks for any more   (near)
    ticket     a ticket in one layout, likewise                                              (structured)
    catalogue  answers about products and policies the base has never seen                   (knowledge)
    cipher     the plain answer with every word exchanged for another, by one fixed table    (far)

The phrasings, the slot combinations and the target style, layout and products of the validation and test files never
occur in training. ``python -m minilora.helpdesk`` writes all files again, byte for byte the same.
"""

import argparse
import difflib
import json
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import require
from .llama import Llama
from .shipped import DATA, written

TASKS = ("general", "tone", "ticket", "catalogue", "cipher")
BASES = ("base", "base_early")
SPLITS = ("train", "validation", "test")
IGNORE = -100  # a target that the loss does not count


@cache
def world() -> dict:
    """The word lists, phrasings and answers of data/world.json."""
    return json.loads((DATA / "world.json").read_text())


# ---------------------------------------------------------------- tokenizer


class Tokenizer:
    """One token for each known word, digit or sign; an id is a place in `words`.

    >>> tokenizer.encode("order k48 is late .")       # order | k | 4 | 8 | is | late | .
    """

    PIECES = re.compile(r"<[a-z]+>|[a-z]+|[0-9]|[^\sa-z0-9]")

    def __init__(self, words: list[str]):
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.pad, self.end = self.ids["<pad>"], self.ids["<end>"]

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; capitals count as small letters.

        Raises:
            ValueError: a word or character outside the vocabulary, with the nearest known words.
        """
        pieces = self.PIECES.findall(text.lower())
        if unknown := [piece for piece in pieces if piece not in self.ids]:
            piece = min(unknown, key=str.isascii)  # of the parts of "spät", the letter that split it
            kind = "word" if piece.isalpha() and piece.isascii() else "character"
            near = difflib.get_close_matches(piece, self.words, n=3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ValueError(f"unknown {kind} {piece!r}, expected one of the {len(self)} known tokens{hint}")
        return [self.ids[piece] for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: digits are joined to each other and to the single letter of a code before them."""
        out = ""
        for word in (self.words[i] for i in ids):
            joined = word.isdigit() and re.search(r"([0-9]|(^| )[b-hj-z])$", out)
            out += word if joined or not out else " " + word
        return out

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.words, indent=0) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, or one that does not hold a list of words with <pad> and <end>, each once.
        """
        try:
            words = json.loads(path.read_text())
            sound = {"<pad>", "<end>"} <= set(words) and len(set(words)) == len(words) and "" not in words
        except (ValueError, OSError, TypeError, RecursionError) as e:
            raise ValueError(f"{path} is missing, damaged or no tokenizer: {e}") from None
        require(sound and isinstance(words, list) and all(isinstance(word, str) for word in words),
             f"{path} must hold a list of words with <pad> and <end>, each once", words)
        return cls(words)


def vocabulary() -> list[str]:
    """Every token of the world: special ones, digits, signs, letters of codes, then the words of world.json by name."""
    text = re.sub(r"{\w+}", " ", json.dumps(world() | {"letters": ""}))
    words = sorted({*re.findall("[a-z]+", text), *world()["letters"], "none", "high", "normal", "sorry", "know"})
    return ["<pad>", "<end>", "<system>", "<customer>", "<agent>", *"0123456789", *".,?!:;|/-=+[]()*#", *words]


@cache
def tokenizer() -> Tokenizer:
    """The tokenizer that every model of this world shares (data/base/tokenizer.json)."""
    return Tokenizer.load(DATA / "base" / "tokenizer.json")


# ---------------------------------------------------------------- the generator


class Example(NamedTuple):
    prompt: str
    reply: str


TONE = {"open": "ahoy", "call": "captain", "we": "the crew", "close": "fair winds", "sign": "harbour desk", "end": "!"}
PLAIN = {"open": "hello", "call": "", "we": "we", "close": "", "sign": "", "end": "."}
TICKET = {"field": ["code", "team", "issue", "item", "name", "city"], "join": "|", "mark": "=", "wrap": "[ ]"}


def conversation(message: str, system: str = "") -> str:
    """The prompt for a customer's message, with the markers the model knows."""
    return f"<system> {system} <customer> {message} <agent>" if system else f"<customer> {message} <agent>"


def phrasing(rng: random.Random, phrasings: list[str], split: str) -> str:
    """One phrasing: the last is the test's, the one before it the validation's, the others are for training."""
    return {"train": rng.choice(phrasings[:-2]), "validation": phrasings[-2], "test": phrasings[-1]}[split]


def owner(*slots: str) -> str:
    """Which split a combination of slot values belongs to: 8 in 10 are for training."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(" ".join(slots).encode()) % 10, "train")


def draw_slots(rng: random.Random, split: str) -> dict[str, str]:
    """Values for the slots of one message; the split owns the combination of name, item and city."""
    w = world()
    while True:
        team = rng.choice(list(w["lines"]))
        slots = {"team": team, "item": rng.choice(w["lines"][team]["items"]), "city": rng.choice(w["cities"]),
                 "issue": rng.choice(list(w["lines"][team]["intents"])), "day": rng.choice(w["days"]),
                 "amount": str(rng.randint(10, 99)), "code": rng.choice(w["letters"]) + str(rng.randint(100, 999))}
        slots["name"], slots["other"] = rng.sample(w["names"], 2)
        if owner(slots["name"], slots["item"], slots["city"]) == split:
            return slots


def frame(rng: random.Random, core: list[str], extra: list[str]) -> str:
    """A greeting, the core sentences in any order, then up to one of the `extra` ones."""
    opening, core = rng.choice(world()["open"]), rng.sample(core, len(core))
    return " ".join(s for s in (opening, *core, rng.choice(["", *extra])) if s)


def draw_message(rng: random.Random, split: str) -> tuple[str, str, dict[str, str]]:
    """A customer's message, the desk's answer with its slots still open, and the slots that the message mentions."""
    w, slots = world(), draw_slots(rng, split)
    answer, *phrasings = w["lines"][slots["team"]]["intents"][slots["issue"]]
    said = phrasing(rng, phrasings, split)
    core = [said, rng.choice(w["identity"])]
    for slot in ("code", "city"):
        if "{" + slot + "}" in answer or rng.random() < 0.4:
            core.append(rng.choice(w[slot]))
    slots["rank"] = "high" if rng.random() < 0.2 else "normal"
    text = frame(rng, core, w["urgent"] * 4 if slots["rank"] == "high" else w["filler"])
    if slots["rank"] == "high" and not any(s in text for s in w["urgent"]):
        slots["rank"] = "normal"
    known = {k: v for k, v in slots.items() if k in ("team", "issue", "rank") or "{" + k + "}" in text}
    return text.format(**slots), answer, known


def style_reply(answer: str, slots: dict[str, str], style: dict[str, str]) -> str:
    """The answer in a house style: greeting, form of address, name of the desk, closing, signature, end of sentence."""
    body = re.sub(r"\bwe\b", style["we"], answer.format(**slots)).removesuffix(" .")
    parts = [f"{style['open']} {style['call']} {slots['name']}", body, style["close"], style["sign"]]
    return " ".join(f"{part} {style['end']}" for part in parts if part).replace("  ", " ")


def ticket_reply(slots: dict[str, str], layout: dict) -> str:
    """The message as a ticket: the fields in order, what the message does not say as none."""
    left, right = layout["wrap"].split() if layout["wrap"] else ("", "")
    cells = [f"{field} {layout['mark']} {slots.get(field, 'none')}" for field in layout["field"]]
    joined = f" {layout['join']} ".join(cells)
    return f"{left} {joined} {right}".strip()


def draw_style(rng: random.Random) -> tuple[str, dict[str, str]]:
    """A house style that shares at most two values with the one of `tone`, and the system line that asks for it."""
    while True:
        asked = rng.sample(list(PLAIN), rng.randint(1, len(PLAIN)))
        style = PLAIN | {key: rng.choice(world()["style"][key]) for key in asked}
        if sum(style[key] == TONE[key] for key in TONE if key != "end") <= 2:
            return "style : " + " ; ".join(f"{key} {style[key] or 'none'}" for key in asked), style


def draw_layout(rng: random.Random) -> tuple[str, dict]:
    """A ticket layout without the join and mark, or the first two fields, of `ticket`, and its system line."""
    w = world()["ticket"]
    while True:
        layout = {key: rng.choice(w[key]) for key in ("join", "mark", "wrap")}
        layout["field"] = rng.sample(w["field"], rng.randint(2, len(w["field"])))
        if ((layout["join"], layout["mark"]) != (TICKET["join"], TICKET["mark"])
                and layout["field"][:2] != TICKET["field"][:2]):
            line = f"ticket : field {' '.join(layout['field'])} ; join {layout['join']} ; mark {layout['mark']}"
            return line + (f" ; wrap {layout['wrap']}" if layout["wrap"] else ""), layout


@cache
def catalogue() -> tuple[tuple[str, dict[str, str]], ...]:
    """The shop's own products and policies: (kind, fact slots) pairs. The general corpus never names these."""
    f, rng = world()["facts"], random.Random("catalogue")
    products = [("ask", {"thing": f"{brand} {thing}"}) for brand, thing in zip(f["brand"], f["thing"])]
    policies = [("policy", {"plan": plan, "service": service}) for plan, service in zip(f["plan"], f["service"])]
    return tuple((kind, name | draw_values(rng)) for kind, name in products + policies)


def draw_values(rng: random.Random) -> dict[str, str]:
    return {"amount": str(rng.randint(10, 99)), "colour": rng.choice(world()["facts"]["colour"]),
            "city": rng.choice(world()["cities"])}


def draw_subject(rng: random.Random) -> tuple[str, dict[str, str]]:
    """A product or policy that is not in the catalogue, with values made up on the spot."""
    f, taken = world()["facts"], [set(slots.items()) for _, slots in catalogue()]
    while True:
        kind = rng.choice(("ask", "ask", "policy"))
        name = ({"thing": f"{rng.choice(f['brand'])} {rng.choice(f['thing'])}"} if kind == "ask" else
                {"plan": rng.choice(f["plan"]), "service": rng.choice(f["service"])})
        if not any(name.items() <= slots for slots in taken):
            return kind, name | draw_values(rng)


def draw_facts(rng: random.Random, split: str) -> Example:
    """A question about one of the facts in the system line, or about one that is not there."""
    f = world()["facts"]
    subjects = [draw_subject(rng) for _ in range(rng.randint(1, 3))]
    picked = [(f[kind][rng.choice(list(f[kind]))], slots) for kind, slots in subjects]
    (fact, topic, *phrasings), slots = picked[0]
    known = rng.random() < 0.75
    listed = rng.sample(picked, len(picked)) if known else picked[1:]
    system = "" if not known and rng.random() < 0.5 else " ".join(["facts :"] + [p[0].format(**s) for p, s in listed])
    reply = (fact if known else f"sorry , i do not know {topic} .").format(**slots)
    return Example(conversation(question(rng, phrasing(rng, phrasings, split), slots), system), reply)


def question(rng: random.Random, asked: str, slots: dict[str, str]) -> str:
    slots = slots | dict(zip(("name", "other"), rng.sample(world()["names"], 2)))
    core = [asked] if rng.random() < 0.5 else [asked, rng.choice(world()["identity"])]
    return frame(rng, core, world()["filler"]).format(**slots)


@cache
def cipher_table() -> dict[str, str]:
    """Word for word: every word and digit that plain answers use, shuffled among themselves."""
    w = world()
    text = [intent[0] for line in w["lines"].values() for intent in line["intents"].values()]
    items = [item for line in w["lines"].values() for item in line["items"]]
    text = re.sub(r"{\w+}", " ", " ".join(text + items + w["names"] + w["cities"] + w["days"] + list(w["letters"])))
    plain = sorted(set(re.findall("[a-z]+", text)) | {"hello"} | set("0123456789"))
    return dict(zip(plain, random.Random("cipher").sample(plain, len(plain))))


def encipher(text: str) -> str:
    """`text` in the invented language; signs stay."""
    pieces = re.findall(r"[a-z]+|[0-9]|\S", text)
    return " ".join(cipher_table().get(piece, piece) for piece in pieces)


def draw(rng: random.Random, task: str, split: str) -> Example:
    """One example of a task, from the part of the world that belongs to `split`."""
    if task == "catalogue":
        kind, slots = rng.choice(catalogue())
        fact, _, *phrasings = rng.choice(list(world()["facts"][kind].values()))
        return Example(conversation(question(rng, phrasing(rng, phrasings, split), slots)), fact.format(**slots))
    form = rng.choice(("plain", "plain", "style", "style", "style", "layout", "layout", "layout", "facts", "facts"))
    if task == "facts" or task == "general" and form == "facts":
        return draw_facts(rng, split)
    text, answer, slots = draw_message(rng, split)
    if task == "tone":
        return Example(conversation(text), style_reply(answer, slots, TONE))
    if task == "ticket":
        return Example(conversation(text), ticket_reply(slots, TICKET))
    if task == "cipher":
        return Example(conversation(text), encipher(style_reply(answer, slots, PLAIN)))
    if form == "layout":
        system, layout = draw_layout(rng)
        return Example(conversation(text, system), ticket_reply(slots, layout))
    system, style = draw_style(rng) if form == "style" else ("", PLAIN)
    return Example(conversation(text, system), style_reply(answer, slots, style))


# ---------------------------------------------------------------- tasks, batches, scores


@dataclass(frozen=True)
class Task:
    """A task's three lists of (prompt, reply)."""

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]


def load_task(name: str) -> Task:
    """The task called `name`, from its files of fixed content in data/tasks/.

    Raises:
        ValueError: no such task, or a file of it that is missing or damaged.
    """
    check_name("task", name, TASKS)
    return Task(name, *(read_examples(task_file(DATA, name, split)) for split in SPLITS))


def read_examples(path: Path) -> list[Example]:
    try:
        return [Example(**json.loads(line)) for line in path.read_text().splitlines()]
    except (ValueError, OSError, TypeError) as e:
        raise ValueError(f"{path} is missing, damaged or no task file: {e}") from None


def check_name(kind: str, name: str, names: Iterable[str]) -> None:
    """Raise a ValueError, with the nearest of the names there are, unless `name` is one of them."""
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"; near: {near[0]}" if near else ""
        raise ValueError(f"no {kind} {name!r}, expected one of {', '.join(names)}{hint}")


def task_file(folder: Path, name: str, split: str) -> Path:
    return folder / "tasks" / f"{name}_{split}.jsonl"


def collate(examples: Iterable[Example]) -> tuple[Tensor, Tensor]:
    """Examples as ids (B, T) and the next token at each place (B, T): -100 where it is not part of the reply.

    Short rows are filled up at the right, where causal attention cannot see it.
    """
    tok, rows = tokenizer(), []
    for prompt, reply in examples:
        head, tail = tok.encode(prompt), tok.encode(reply) + [tok.end]
        rows.append((head + tail[:-1], [IGNORE] * (len(head) - 1) + tail))
    longest = max(len(ids) for ids, _ in rows)
    pad = lambda row, filler: row + [filler] * (longest - len(row))
    return (torch.tensor([pad(ids, tok.pad) for ids, _ in rows]),
            torch.tensor([pad(targets, IGNORE) for _, targets in rows]))


def batches(examples: list[Example], batch: int = 32, seed: int = 0) -> Callable[[int], tuple[Tensor, Tensor]]:
    """step -> (ids, targets): every epoch a new order, which `seed` and the step alone decide."""
    if not 1 <= batch <= len(examples):
        raise ValueError(f"batch must be from 1 to the {len(examples)} examples there are, got {batch}")
    per_epoch = len(examples) // batch

    def at(step: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(step, per_epoch)
        order = random.Random(f"{seed} {epoch}").sample(range(len(examples)), len(examples))
        return collate(examples[i] for i in order[place * batch:(place + 1) * batch])

    return at


class Score(NamedTuple):
    loss: float  # mean nats per reply token
    exact: float  # share of replies that greedy generation gives word for word


def endless_batches(*tasks: str, batch: int = 64, seed: int = 0) -> Callable[[int], tuple[Tensor, Tensor]]:
    """step -> (ids, targets) of training examples of the tasks, in turn, drawn afresh without end; `seed` and the step
    alone decide. "facts" stands for that part of `general` alone.

    Sixteen batches are drawn together and cut by length, so that little of a batch is padding.

    Raises:
        ValueError: no such task, or a batch of no examples.
    """
    for task in tasks:
        check_name("task", task, (*TASKS, "facts"))
    require(tasks, "stream needs at least one task", tasks)
    require(type(batch) is int and batch > 0, "batch must be a positive integer", batch)

    @lru_cache(maxsize=1)
    def pool(number: int) -> list[list[Example]]:
        rng = random.Random(f"{' '.join(tasks)} stream {seed} {number}")
        drawn = [draw(rng, tasks[i % len(tasks)], "train") for i in range(16 * batch)]
        drawn.sort(key=lambda e: len(e.prompt + e.reply))
        return rng.sample([drawn[i:i + batch] for i in range(0, len(drawn), batch)], 16)

    return lambda step: collate(pool(step // 16)[step % 16])


@contextmanager
def evaluating(model) -> Iterator[None]:
    """The model in evaluation mode, without gradients; afterwards in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def evaluate(model, examples: list[Example], batch: int = 128) -> Score:
    """Loss and exact match on `examples`.

    Greedy generation gives the reply exactly if and only if each of its tokens, <end> included, is the most likely
    one after the tokens before it. One forward pass over prompt and reply checks that, so nothing is generated.

    Raises:
        ValueError: no examples, or one that is longer than the model's context.
    """
    require(examples and type(batch) is int and batch > 0, "evaluate needs examples and a positive batch", batch)
    loss, tokens, exact = 0.0, 0, 0
    order = sorted(examples, key=lambda e: len(e.prompt) + len(e.reply))
    with evaluating(model):
        for i in range(0, len(order), batch):
            ids, targets = collate(order[i:i + batch])
            logits, counted = model(ids), targets != IGNORE  # (B, T, V), (B, T)
            loss += F.cross_entropy(logits[counted], targets[counted], reduction="sum").item()
            tokens += counted.sum().item()
            exact += ((logits.argmax(-1) == targets) | ~counted).all(1).sum().item()
    return Score(loss / tokens, exact / len(examples))


def load_base(name: str = "base") -> Llama:
    """The pretrained base of this world from data/, in fp32: "base", or "base_early", the same run stopped early.

    Raises:
        ValueError: no such base, or a damaged one.
    """
    check_name("base", name, BASES)
    return Llama.from_pretrained(DATA / name)


def answer(model, message: str, system: str = "", max_new: int = 48) -> str:
    """What the model replies to a customer's message, greedily.

    Raises:
        ValueError: an empty message, unknown words or characters, or more tokens than the context holds.
    """
    if not message.strip():
        raise ValueError("the message is empty, expected at least one word")
    tok = tokenizer()
    ids = tok.encode(conversation(message, system))
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise ValueError(f"the prompt has {len(ids)} tokens, expected fewer than the context of "
                         f"{model.config.max_position_embeddings}")
    with evaluating(model):
        reply = model.generate(torch.tensor([ids]), min(max_new, room), stop=tok.end)[0].tolist()
    return tok.decode(reply[:reply.index(tok.end)] if tok.end in reply else reply)


def write_files(folder: Path) -> None:
    """Write the tokenizer and every task's files to `folder`."""
    for name in ("base", "tasks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Tokenizer(vocabulary()).save(folder / "base" / "tokenizer.json")
    for name in TASKS:
        for split, size in zip(SPLITS, (800, 200, 200)):
            rng = random.Random(f"{name} {split}")
            lines = [json.dumps(draw(rng, name, split)._asdict()) for _ in range(size)]
            task_file(folder, name, split).write_text("\n".join(lines) + "\n")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m minilora.helpdesk", description="Write the tokenizer and the tasks.")
    parser.add_argument("--folder", type=Path, help="where to; data/ of the checkout by default")
    try:
        write_files(written(parser.parse_args(arguments).folder, "--folder, for the tokenizer and the tasks"))
    except (ValueError, OSError) as error:
        print(f"minilora.helpdesk: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
