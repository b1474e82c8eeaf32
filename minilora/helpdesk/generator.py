"""The help-desk world's generator: slots, phrasings, styles, layouts and facts, and what is drawn from them."""

import json
import random
import re
import zlib
from functools import cache
from typing import NamedTuple

from ..shipped import DATA


@cache
def world() -> dict:
    """The word lists, phrasings and answers of data/world.json."""
    return json.loads((DATA / "world.json").read_text())


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


def vocabulary() -> list[str]:
    """Every token of the world: special ones, digits, signs, letters of codes, then the words of world.json by name."""
    text = re.sub(r"{\w+}", " ", json.dumps(world() | {"letters": ""}))
    words = sorted({*re.findall("[a-z]+", text), *world()["letters"], "none", "high", "normal", "sorry", "know"})
    return ["<pad>", "<end>", "<system>", "<customer>", "<agent>", *"0123456789", *".,?!:;|/-=+[]()*#", *words]
