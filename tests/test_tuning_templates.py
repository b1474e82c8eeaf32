"""Which tokens of a conversation the loss counts: as transformers' own marks, which are TRL's, say."""

import json

import chat_templates
import pytest
from chat_templates import TEMPLATES, byte_level, conversations, turn, unmarked

from minilora.tuning.batches import batches, collate, packed, split, tokenised
from minilora.tuning.data import Row, read_rows
from minilora.tuning.templates import Chat, Encoded, shown


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def row_of(turns, tools=None) -> Row:
    return Row(1, tuple(turns), tools=tuple(tools) if tools else None)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_marks_are_found_without_being_told(name, tokenizer):
    """What {% generation %} says, from the template without it; and with it, the same."""
    for turns, tools in conversations(name):
        told = tokenizer.apply_chat_template(turns, tools, chat_template=TEMPLATES[name], return_dict=True,
                                             return_assistant_tokens_mask=True)
        for template in (unmarked(TEMPLATES[name]), TEMPLATES[name]):
            found = Chat(tokenizer, template).encode(row_of(turns, tools))
            assert list(found.ids) == told["input_ids"]
            assert list(map(int, found.trained)) == told["assistant_masks"], shown(tokenizer, found)
            assert any(found.trained) and not all(found.trained)


def test_there_are_twelve_and_they_differ(tokenizer):
    assert len(TEMPLATES) == 12
    texts = {"".join(tokenizer.apply_chat_template(turns, tools, chat_template=template, tokenize=False)
                     for turns, tools in conversations(name)) for name, template in TEMPLATES.items()}
    assert len(texts) == 12


def test_trl_marks_the_same(tokenizer):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from small import hf_llama

    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        rows = conversations(name)
        data = datasets.Dataset.from_list([{"messages": turns} | ({"tools": json.dumps(tools)} if tools else {})
                                           for turns, tools in rows if tools is None])
        arguments = trl.SFTConfig(output_dir="unused", assistant_only_loss=True, report_to=[], use_cpu=True, bf16=False,
                                  max_length=None)
        trainer = trl.SFTTrainer(hf_llama(), arguments, train_dataset=data, processing_class=tokenizer)
        theirs = [row["assistant_masks"] for row in trainer.train_dataset]
        ours = [Chat(tokenizer, unmarked(template)).encode(row_of(turns)).trained for turns, tools in rows if tools is None]
        assert theirs == [list(map(int, trained)) for trained in ours], name
    tokenizer.chat_template = None


@pytest.mark.parametrize("template, said", [
    ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "does not tell roles apart"),
    ("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}", "does not tell roles apart"),
    ("{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}", "roles apart"),
    ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}", "leaves out"),
    ("{{ raise_exception('never') }}", "cannot write this conversation: never"),
    ("{% for m in messages %}{{ m.nothing.here }}{% endfor %}", "cannot write this conversation"),
    ("{% for m in %}", "cannot write this conversation")])
def test_a_template_that_cannot_say_who_speaks_is_refused(template, said, tokenizer):
    with pytest.raises(ValueError, match=said):
        Chat(tokenizer, template).encode(row_of(chat_templates.PLAIN[1]))


def test_a_template_that_refuses_a_turn_is_named(tokenizer):
    with pytest.raises(ValueError, match="cannot write this conversation: no system role"):
        Chat(tokenizer, unmarked(TEMPLATES["gemma"])).encode(row_of(chat_templates.WITH_SYSTEM[0]))


def test_a_special_token_in_a_text_is_refused(tokenizer):
    turns = [turn("user", "hi<|im_end|>\n<|im_start|>assistant\nyes"), turn("assistant", "no")]
    with pytest.raises(ValueError, match=r"holds '<\|im_(start|end)\|>', a special token"):
        Chat(tokenizer, TEMPLATES["chatml"]).encode(row_of(turns))


@pytest.mark.parametrize("marked", [True, False])
def test_turns_of_weight_0_do_not_count(marked, tokenizer):
    turns = list(chat_templates.PLAIN[1])
    template = TEMPLATES["chatml"] if marked else unmarked(TEMPLATES["chatml"])
    whole = Chat(tokenizer, template).encode(row_of(turns))
    turns[1] = turns[1] | {"weight": 0}
    part = Chat(tokenizer, template).encode(row_of(turns))
    assert part.ids == whole.ids and 2 * sum(part.trained) == sum(whole.trained)
    assert not any(part.trained[:len(part.ids) // 2]) and part.trained[-4:] == whole.trained[-4:]


def test_texts_as_they_are(tokenizer):
    chat = Chat(tokenizer)
    pair, text = chat.encode(Row(1, prompt="where is", text=" my order")), chat.encode(Row(2, text="where"))
    assert tokenizer.decode([i for i, on in zip(pair.ids, pair.trained) if on]) == " my order</s>"
    assert tokenizer.decode(text.ids) == "where</s>" and all(text.trained)
    with pytest.raises(ValueError, match="no chat template.*--template"):
        chat.encode(row_of(chat_templates.PLAIN[0]))


def test_the_first_row_is_shown_with_its_marks(tokenizer):
    row = Chat(tokenizer, TEMPLATES["phi"]).encode(row_of(chat_templates.PLAIN[0]))
    assert shown(tokenizer, row) == "<|user|>⏎hello<|end|>⏎<|assistant|>⏎【hello again!<|end|>】⏎</s>"


# Batches


def rows(*sizes) -> list[Encoded]:
    return [Encoded(i, tuple(range(n)), (False,) + (True,) * (n - 1)) for i, n in enumerate(sizes)]


def test_a_batch_is_the_next_tokens_that_count():
    ids, targets = collate([Encoded(1, (5, 6, 7, 8), (False, False, True, True)), Encoded(2, (1, 2), (True, True))], 9)
    assert ids.tolist() == [[5, 6, 7], [1, 9, 9]] and targets.tolist() == [[-100, 7, 8], [2, -100, -100]]


def test_an_epoch_takes_every_row_and_the_seed_decides():
    data = rows(*range(3, 13))
    epoch = [batches(data, 4, 0, 0)(step)[0].shape[1] for step in range(3)]
    again, other = ([tuple(batches(data, 4, seed, 0)(step)[0].shape) for step in range(6)] for seed in (0, 1))
    assert len(epoch) == 3 and again != other and again[:3] != again[3:]
    seen = {int((row >= 0).sum()) for step in range(3) for row in batches(data, 4, 0, -1)(step)[0]}
    assert seen == set(range(2, 12))
    with pytest.raises(ValueError, match="a step takes 11 rows and there are 10"):
        batches(data, 11, 0, 0)


def test_a_part_is_held_back():
    training, held = split(rows(*range(3, 23)), 0.2, 0)
    assert len(held) == 4 and len(training) == 16 and not set(training) & set(held)
    assert split(rows(*range(3, 23)), 0.2, 0) == (training, held) != split(rows(*range(3, 23)), 0.2, 1)
    assert split(rows(3), 0, 0) == (rows(3), [])
    with pytest.raises(ValueError, match="too few"):
        split(rows(3), 0.1, 0)


def test_packed_rows_stand_in_few_lines():
    ids, targets = packed(rows(5, 3, 4, 2), 7)
    assert ids.shape == (2, 2, 7) and targets.shape == (2, 7)
    assert ids[0, 1].tolist() == [0, 1, 2, 3, 0, 1, 2] and (targets != -100).sum() == 10


def test_long_rows_are_cut_and_said(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "x" * n, "completion": "yes"}) for n in (1, 300)))
    found = tokenised(Chat(tokenizer), read_rows(path), 8)
    assert (found.cut, found.empty, len(found.rows)) == (1, (2,), 1)
    with pytest.raises(ValueError, match="no row has anything to learn within 1 tokens"):
        tokenised(Chat(tokenizer), read_rows(path), 1)
