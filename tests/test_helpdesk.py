"""The help-desk world: files of fixed content, splits that share nothing, the tokenizer, scores, and bad input."""

import json
import random
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minilora import LoRAConfig, helpdesk, inject, lora_parameters
from minilora.helpdesk import (
    DATA,
    IGNORE,
    PLAIN,
    SPLITS,
    TASKS,
    TICKET,
    TONE,
    Example,
    Tokenizer,
    answer,
    batches,
    catalogue,
    cipher_table,
    collate,
    conversation,
    draw,
    encipher,
    endless_batches,
    evaluate,
    load_base,
    load_task,
    tokenizer,
    vocabulary,
    world,
    write_files,
)
from minilora.llama import Llama, LlamaConfig
from minilora.train import train


def small_model(**settings) -> Llama:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "max_position_embeddings": 96, "tie_word_embeddings": True}
    return Llama(LlamaConfig(len(tokenizer()), **(sizes | settings)), seed=0)


@pytest.fixture(scope="module")
def tasks():
    return {name: load_task(name) for name in TASKS}


@pytest.fixture(scope="module")
def drawn():
    """Two thousand examples such as the base is pretrained on."""
    rng = random.Random(0)
    return [draw(rng, "general", "train") for _ in range(2000)]


@pytest.fixture(scope="module")
def learnt(tasks):
    """A small model that has learnt some of the catalogue, and examples of which it knows a part."""
    model, examples = small_model(), tasks["catalogue"].train[:24] + tasks["catalogue"].test[:24]
    train(model, batches(examples[:24], 24), steps=60, lr=1e-2, progress=False)
    return model, examples


# Files


def test_the_files_are_written_again_byte_for_byte(tmp_path):
    write_files(tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert len(written) == 1 + len(TASKS) * len(SPLITS)
    for path in written:
        assert (tmp_path / path).read_bytes() == (DATA / path).read_bytes(), path


def test_sizes(tasks):
    for task in tasks.values():
        assert [len(examples) for examples in (task.train, task.validation, task.test)] == [800, 200, 200]


def test_the_generator_depends_on_nothing_but_its_random_numbers():
    for task in TASKS:
        first, again, other = (draw(random.Random(seed), task, "train") for seed in (7, 7, 8))
        assert first == again != other


# Splits


def test_no_prompt_of_one_split_is_in_another(tasks, drawn):
    prompts = {split: {e.prompt for task in tasks.values() for e in getattr(task, split)} for split in SPLITS}
    prompts["train"] |= {e.prompt for e in drawn}
    assert min(map(len, prompts.values())) > 900
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not prompts[a] & prompts[b]


def test_slot_combinations_belong_to_one_split(tasks):
    """Name, item and city together, as the tickets tell them."""

    def combinations(split):
        found = [re.search("item = (.*) . name = (.*) . city = (.*) ]", e.reply).groups()
                 for e in getattr(tasks["ticket"], split)]
        return {slots for slots in found if "none" not in slots}

    sets = [combinations(split) for split in SPLITS]
    assert min(map(len, sets)) > 60
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]


def finders() -> dict[str, re.Pattern]:
    """What finds the sentences of each split: the last of each list is the test's, the one before the validation's."""
    w, found = world(), {split: [] for split in SPLITS}
    facts = w["facts"]
    values = {"item": [item for line in w["lines"].values() for item in line["items"]], "city": w["cities"],
              "day": w["days"], "plan": facts["plan"], "service": facts["service"]}
    slots = {slot: "|".join(words) for slot, words in values.items()} | {"amount": "[0-9]+", "code": "[a-z][0-9]+"}
    slots["thing"] = f"(?:{'|'.join(facts['brand'])}) (?:{'|'.join(facts['thing'])})"
    lists = [intent[1:] for line in w["lines"].values() for intent in line["intents"].values()]
    lists += [fact[2:] for kind in ("ask", "policy") for fact in w["facts"][kind].values()]
    for sentences in lists:
        assert len(set(sentences)) == len(sentences) >= 5
        for split, sentence in zip(["train"] * (len(sentences) - 2) + ["validation", "test"], sentences, strict=True):
            found[split].append(re.sub(r"\\{(\w+)\\}", lambda slot: f"(?:{slots[slot[1]]})", re.escape(sentence)))
    return {split: re.compile(f"(?:^|[.,?] )(?:{'|'.join(sentences)})") for split, sentences in found.items()}


def test_phrasings_belong_to_one_split(tasks, drawn):
    for split in SPLITS:
        examples = [e for task in tasks.values() for e in getattr(task, split)] + drawn * (split == "train")
        messages = [re.search("<customer> (.*) <agent>", e.prompt)[1] for e in examples]
        for other, finder in finders().items():
            found = [message for message in messages if finder.search(message)]
            assert found == (messages if other == split else []), (split, other, len(found), found[:3])


def test_the_general_corpus_never_shows_what_the_tasks_ask_for(drawn, tasks):
    general = drawn + tasks["general"].train + tasks["general"].test
    styles = [e.prompt for e in general if "<system> style" in e.prompt]
    layouts = [e.prompt for e in general if "<system> ticket" in e.prompt]
    assert len(styles) > 600 and len(layouts) > 600
    for prompt in styles:
        asked = dict(part.split(" ", 1) for part in
                     re.search("style : (.*?) <customer>", prompt)[1].replace("none", "").split(" ; "))
        style = PLAIN | asked
        assert sum(style[key] == TONE[key] for key in TONE if key != "end") <= 2, prompt
    for prompt in layouts:
        fields, join, mark = re.search("ticket : field (.*) ; join (.) ; mark (.)", prompt).groups()
        assert (join, mark) != (TICKET["join"], TICKET["mark"]) and fields.split()[:2] != TICKET["field"][:2], prompt
    subjects = [slots.get("thing") or f"{slots['plan']} {slots['service']}" for _, slots in catalogue()]
    text = "\n".join(e.prompt for e in general)
    assert len(set(subjects)) == len(catalogue()) > 20
    assert not any(re.search(rf"\b{subject}\b", text) for subject in subjects)
    # the control: in the catalogue's own task each of them is asked about
    text = "\n".join(e.prompt + e.reply for e in tasks["catalogue"].train)
    assert all(slots.get("thing", slots.get("service")) in text for _, slots in catalogue())


# Tasks


def test_replies_say_what_the_prompt_says(tasks):
    seen = {"none": 0, "said": 0}
    for split in SPLITS:
        for prompt, reply in getattr(tasks["ticket"], split):
            fields = dict(cell.split(" = ") for cell in reply.strip("[] ").split(" | "))
            assert list(fields) == TICKET["field"]
            for field in ("code", "item", "name", "city"):
                assert fields[field] == "none" or f" {fields[field]} " in prompt, (prompt, reply)
                seen["none" if fields[field] == "none" else "said"] += 1
            if fields["code"] == "none":
                assert not re.search("[a-z][0-9]", prompt), prompt
        for prompt, reply in getattr(tasks["tone"], split):
            name = re.fullmatch("ahoy captain ([a-z]+) ! .* ! fair winds ! harbour desk !", reply)[1]
            assert f" {name} " in prompt and not re.search(r"\bwe\b", reply)
    assert min(seen.values()) > 500


def test_the_catalogue_answers_one_way(tasks):
    """Every fact has one answer, and each that is tested is taught."""
    taught = {e.reply for e in tasks["catalogue"].train}
    assert {e.reply for e in tasks["catalogue"].test} <= taught
    assert len(taught) == sum(len(world()["facts"][kind]) for kind, _ in catalogue())


def test_the_cipher_is_a_bijection(tasks):
    table = cipher_table()
    assert sorted(table) == sorted(table.values()) and len(table) > 250
    assert sum(word == other for word, other in table.items()) <= 3
    back = {other: word for word, other in table.items()}
    for seed in range(300):  # the same random numbers draw the same message for both tasks
        plain, secret = (draw(random.Random(seed), task, "test") for task in ("tone", "cipher"))
        assert plain.prompt == secret.prompt
        pieces = Tokenizer.PIECES.findall(secret.reply)
        told = " ".join(back.get(piece, piece) for piece in pieces)
        assert encipher(told) == " ".join(pieces) and told.startswith("hello ")
        body = plain.reply.removeprefix("ahoy captain ").removesuffix(" ! fair winds ! harbour desk !")
        body = body.replace(" ! ", " . ", 1).replace("the crew", "we")
        assert told == "hello " + " ".join(Tokenizer.PIECES.findall(body)) + " ."


# Tokenizer


def test_texts_survive_the_tokenizer(tasks, drawn):
    tok = tokenizer()
    for name, task in {**tasks, "drawn": helpdesk.Task("drawn", drawn, [], [])}.items():
        for text in (text for split in SPLITS for e in getattr(task, split) for text in e):
            ids = tok.encode(text)
            assert tok.encode(tok.decode(ids)) == ids
            # in the invented language a letter may stand before a digit without being a code
            assert tok.decode(ids) == text or name == "cipher"
            assert tok.pad not in ids and tok.end not in ids


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, len(vocabulary()) - 1), max_size=30))
def test_ids_survive_text(ids):
    assert tokenizer().encode(tokenizer().decode(ids)) == ids


def test_tokenizer_by_hand():
    tok = tokenizer()
    words = lambda text: [tok.words[i] for i in tok.encode(text)]
    assert words("Order K482 is LATE.") == ["order", "k", "4", "8", "2", "is", "late", "."]
    assert words("<customer>hello,mia") == ["<customer>", "hello", ",", "mia"]
    assert tok.decode(tok.encode("order k 4 8 2 is late")) == "order k482 is late" and tok.encode("  \n") == []
    for text in ("a 2 day wait", "i 2", "is it a 4 or b4 ?"):  # a and i are words, other single letters begin a code
        assert tok.decode(tok.encode(text)) == text
    assert tok.words == vocabulary() and len(set(tok.words)) == len(tok)


@pytest.mark.parametrize("text, said", [
    ("my laptpo is late", "unknown word 'laptpo', expected one of the [0-9]+ known tokens; near: laptop"),
    ("my laptop is späte", "unknown character 'ä'"),
    ("what now? \U0001f600", "unknown character '\U0001f600'"),
    ("50 % off", "unknown character '%'"),
    ("<robot> hello", "unknown character '<robot>'"),
    ("qqqqqqqq", "unknown word 'qqqqqqqq', expected one of the [0-9]+ known tokens$")])
def test_unknown_words_and_characters(text, said):
    with pytest.raises(ValueError, match=said):
        tokenizer().encode(text)


@pytest.mark.parametrize("data", [
    None, b"", b"[", b"\xff\xfe", b"{}", b"5", b"null", b'"<pad> <end>"', b"[]", b'["<pad>", "a"]',
    b'["<pad>", "<end>", 5]', b'["<pad>", "<end>", "a", "a"]', b'["<pad>", "<end>", [1]]', b'{"<pad>": 0, "<end>": 1}'])
def test_a_damaged_tokenizer(data, tmp_path):
    path = tmp_path / "tokenizer.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match="tokenizer.json (is missing, damaged or no tokenizer|must hold a list)"):
        Tokenizer.load(path)
    tokenizer().save(path)
    assert Tokenizer.load(path).words == tokenizer().words


# Batches


def test_collate_scores_the_reply_alone():
    tok, examples = tokenizer(), [Example("<customer> hello <agent>", "hello mia ."), Example("<agent>", "no")]
    ids, targets = collate(examples)
    reply = tok.encode("hello mia .")
    assert ids[0].tolist() == tok.encode("<customer> hello <agent>") + reply
    assert targets[0].tolist() == [IGNORE, IGNORE, *reply, tok.end]
    assert ids[1].tolist() == tok.encode("<agent> no") + [tok.pad] * 4
    assert targets[1].tolist() == [*tok.encode("no"), tok.end] + [IGNORE] * 4


def test_batches_show_every_example_once_an_epoch():
    examples = [Example("<agent>", word) for word in tokenizer().words[40:50]]
    at = batches(examples, 5, seed=1)
    epochs = [[row[1].item() for step in (2 * e, 2 * e + 1) for row in at(step)[0]] for e in range(3)]
    assert all(sorted(epoch) == list(range(40, 50)) for epoch in epochs) and epochs[0] != epochs[1]
    assert torch.equal(at(3)[0], batches(examples, 5, seed=1)(3)[0])
    assert any(not torch.equal(at(step)[0], batches(examples, 5, seed=2)(step)[0]) for step in range(2))


def test_a_stream_depends_on_seed_and_step_alone():
    one, other = endless_batches("tone", batch=8), endless_batches("tone", batch=8)
    forwards, backwards = [one(step) for step in range(20)], [other(step) for step in reversed(range(20))][::-1]
    assert all(torch.equal(a, b) for x, y in zip(forwards, backwards) for a, b in zip(x, y))
    assert len({ids.numpy().tobytes() for ids, _ in forwards}) == 20 and len(forwards[0][0]) == 8
    seeded = [endless_batches("tone", batch=8, seed=1)(step)[0].numpy().tobytes() for step in range(20)]
    assert not set(seeded) & {ids.numpy().tobytes() for ids, _ in forwards}


def test_a_stream_of_several_tasks_takes_them_in_turn():
    one_of_each = [endless_batches("tone", "ticket", batch=2)(step)[0] for step in range(16)]
    bracket = tokenizer().ids["["]
    tickets = sum((ids == bracket).any(1).sum().item() for ids in one_of_each)
    assert tickets == 16  # half of the 32 that are drawn together


@pytest.mark.parametrize("make, said", [
    (lambda: endless_batches(), "at least one task"),
    (lambda: batches([Example("a", "b")] * 3, 4), "batch must be from 1 to the 3 examples there are, got 4"),
    (lambda: batches([], 1), "the 0 examples there are"),
    (lambda: batches([Example("a", "b")], 0), "got 0"),
    (lambda: endless_batches("genral"), "no task 'genral'.*near: general"),
    (lambda: endless_batches("tone", batch=0), "batch must be a positive integer, got 0"),
    (lambda: evaluate(small_model(), []), "evaluate needs examples"),
    (lambda: evaluate(small_model(), [Example("<agent>", "no")], 0), "positive batch, got 0")])
def test_bad_batches(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# Scores


def said_right(model: Llama, example: Example) -> bool:
    """Whether greedy generation gives the reply, token by token."""
    tok = tokenizer()
    reply = model.generate(torch.tensor([tok.encode(example.prompt)]), 48, tok.end)[0].tolist()
    return tok.end in reply and tok.decode(reply[:reply.index(tok.end)]) == example.reply


def test_the_shipped_base_can_do_its_own_task_and_no_other(tasks):
    base, early = load_base(), load_base("base_early")
    assert base.config == early.config and sum(p.numel() for p in base.parameters()) == 1_388_000
    scores = {name: evaluate(base, task.test) for name, task in tasks.items()}
    assert scores.pop("general").exact >= 0.95 and max(score.exact for score in scores.values()) < 0.1
    assert evaluate(early, tasks["general"].test[:50]).exact < 0.5
    examples = tasks["general"].test[:40]
    right = [said_right(base, e) for e in examples]
    assert [evaluate(base, [e]).exact == 1 for e in examples] == right and 30 < sum(right) < 40
    sizes = [path.stat().st_size for name in helpdesk.BASES for path in (DATA / name).iterdir()]
    assert sum(sizes) < 12e6
    assert all((DATA / name / "tokenizer.json").read_text() == (DATA / "base" / "tokenizer.json").read_text()
               for name in helpdesk.BASES)


def test_exact_match_is_greedy_generation(learnt):
    model, examples = learnt
    right = [said_right(model, e) for e in examples]
    assert 10 <= sum(right) <= 40
    assert [evaluate(model, [e]).exact == 1 for e in examples] == right
    assert evaluate(model, examples).exact == sum(right) / len(right)


def test_one_wrong_token_anywhere_in_the_reply_is_a_miss():
    ids, targets = collate([Example("<customer> hello <agent>", "hello mia .")])

    class Sure(nn.Module):
        """Says the reply, but for the place `wrong`."""

        def forward(self, seen):
            assert torch.equal(seen, ids)
            said = targets.clone()
            said[0, self.wrong] += 1
            return nn.functional.one_hot(said.clamp_min(0), len(tokenizer())).float()

    model, exact = Sure(), []
    for model.wrong in range(ids.shape[1]):  # the prompt's two places do not count, the reply's four do, <end> included
        exact.append(evaluate(model, [Example("<customer> hello <agent>", "hello mia .")]).exact)
    assert exact == [1, 1, 0, 0, 0, 0]


def test_the_loss_is_the_mean_over_reply_tokens_however_they_are_batched(learnt):
    model, examples = learnt
    losses, counts = [], []
    for e in examples:
        ids, targets = collate([e])
        with torch.no_grad():
            losses.append(nn.functional.cross_entropy(model(ids)[0], targets[0], ignore_index=IGNORE, reduction="sum"))
        counts.append(len(tokenizer().encode(e.reply)) + 1)
    expected = sum(losses).item() / sum(counts)
    for batch in (1, 7, 128):
        assert evaluate(model, examples, batch).loss == pytest.approx(expected, rel=1e-5)


def test_evaluation_uses_no_dropout_and_leaves_the_mode(learnt):
    model, examples = learnt
    model = inject(small_model(), LoRAConfig(dropout=0.5))
    with torch.no_grad():
        for p in lora_parameters(model):
            p.normal_()
    for training in (True, False):
        model.train(training)
        assert evaluate(model, examples[:8]) == evaluate(model, examples[:8])
        assert answer(model, "hello") == answer(model, "hello")
        with pytest.raises(ValueError, match="more than the context"):
            evaluate(model, [Example("<customer> " + "hello " * 100, "no")])
        assert model.training is training and all(p.requires_grad for p in lora_parameters(model))


def test_an_answer_is_the_reply_in_words(learnt):
    model, examples = learnt
    for prompt, reply in examples[:24]:
        message = prompt.removeprefix("<customer> ").removesuffix(" <agent>")
        assert conversation(message) == prompt
        if evaluate(model, [Example(prompt, reply)]).exact:
            assert answer(model, message) == answer(model, message.upper()) == reply
            assert answer(model, message, max_new=2) == " ".join(reply.split()[:2])
    assert conversation("hello", "be brief") == "<system> be brief <customer> hello <agent>"


@pytest.mark.parametrize("message, said", [
    ("", "the message is empty"), (" \n\t ", "the message is empty"),
    ("hello wrold", "unknown word 'wrold'.*near: "), ("hello 漢", "unknown character '漢'"),
    ("hello " * 94, "the prompt has 96 tokens, expected fewer than the context of 96"),
    ("hello " * 500, "the prompt has 502 tokens")])
def test_bad_messages(message, said):
    with pytest.raises(ValueError, match=said):
        answer(small_model(), message)


def test_an_answer_ends_with_the_context():
    tok = tokenizer()
    assert len(tok.encode(answer(small_model(), "hello " * 93))) <= 1


# Names and files of tasks and bases


@pytest.mark.parametrize("name, said", [
    ("tonne", "no task 'tonne', expected one of general, tone, ticket, catalogue, cipher; near: tone"),
    ("catalog", "near: catalogue"), ("Tickets", "near: ticket"), ("", "no task '', expected one of"),
    (None, "no task None"), ("../tone", "near: tone")])
def test_no_such_task(name, said):
    with pytest.raises(ValueError, match=said):
        load_task(name)


@pytest.mark.parametrize("damage", [
    None, b"\xff", b'{"prompt": "a", "rep', b'{"prompt": "a"}', b'{"prompt": "a", "reply": "b", "c": 1}', b"[1]", b"5"])
def test_a_damaged_task(damage, tmp_path, monkeypatch):
    shutil.copytree(DATA / "tasks", tmp_path / "tasks")
    monkeypatch.setattr(helpdesk.tasks, "DATA", tmp_path)
    assert len(load_task("tone").test) == 200
    path = tmp_path / "tasks" / "tone_test.jsonl"
    path.write_bytes(path.read_bytes() + damage) if damage else path.unlink()
    with pytest.raises(ValueError, match="tone_test.jsonl is missing, damaged or no task file"):
        load_task("tone")


def test_bases(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no base 'base_erly', expected one of base, base_early; near: base_early"):
        load_base("base_erly")
    monkeypatch.setattr(helpdesk.evaluation, "DATA", tmp_path)
    with pytest.raises(ValueError, match="there is no config.json in .*base; expected a checkpoint folder"):
        load_base()
    small_model().save_pretrained(tmp_path / "base")
    assert torch.equal(load_base().lm_head.weight, small_model().lm_head.weight)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    with pytest.raises(ValueError, match="config.json says"):
        load_base()
