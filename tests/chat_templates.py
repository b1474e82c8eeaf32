"""Twelve chat templates in the manner of the usual families, each with ``{% generation %}`` around what the assistant
writes (up to and with the mark that ends its turn), as TRL's assistant-only loss wants it; conversations for them; and
a tokenizer that knows their special tokens."""

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

G, E = "{% generation %}", "{% endgeneration %}"
CALLS = ("{% for c in m.tool_calls or [] %}<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": "
         "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}")
CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASSISTANT = "<|im_start|>assistant\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LLAMA = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
LLAMA_ASK = "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
GEMMA_ASK = "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
EACH, SAME = "{% for m in messages %}", "{% endfor %}"

TEMPLATES = {
    "chatml": EACH + "{% if m.role == 'assistant' %}" + ASSISTANT + G + "{{ m.content }}<|im_end|>" + E + "{{ '\\n' }}{% else %}"
    + CHATML + "{% endif %}" + SAME + ASK,
    "chatml with a system turn of its own":
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a help desk.<|im_end|>\n{% endif %}" + EACH
    + "{% if m.role == 'assistant' %}" + ASSISTANT + G + "{{ m.content | trim }}<|im_end|>" + E + "{{ '\\n' }}{% else %}" + CHATML
    + "{% endif %}" + SAME + ASK,
    "chatml with tools":
    "{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    + EACH + "{% if m.role == 'assistant' %}" + ASSISTANT + G + "{{ m.content }}" + CALLS + "<|im_end|>" + E
    + "{{ '\\n' }}{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}" + CHATML + "{% endif %}" + SAME + ASK,
    "chatml with thoughts":  # of the last turn alone, as Qwen 3 has it
    EACH + "{% if m.role == 'assistant' %}" + ASSISTANT + G
    + "{% if loop.last and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>" + E + "{{ '\\n' }}{% else %}" + CHATML + "{% endif %}" + SAME + ASK,
    "llama 3": "{{ bos_token }}" + EACH + LLAMA + "{% if m.role == 'assistant' %}" + G
    + "{{ m.content | trim }}<|eot_id|>" + E + "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}" + SAME + LLAMA_ASK,
    "llama 3 with tools": "{{ bos_token }}" + EACH + "{% if m.role == 'tool' %}<|start_header_id|>ipython"
    "<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>{% elif m.role == 'assistant' %}" + LLAMA + G
    + "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}<|eot_id|>" + E
    + "{% else %}" + LLAMA + "{{ m.content }}<|eot_id|>{% endif %}" + SAME + LLAMA_ASK,
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + EACH + "{% if m.role == 'assistant' %}<start_of_turn>model\n" + G + "{{ m.content | trim }}<end_of_turn>" + E
    + "{{ '\\n' }}{% else %}<start_of_turn>user\n{{ m.content | trim }}<end_of_turn>\n{% endif %}" + SAME + GEMMA_ASK,
    "gemma with the system in the first turn": "{{ bos_token }}{% set s = messages[0].content + '\n\n' if "
    "messages[0].role == 'system' else '' %}" + EACH + "{% if m.role == 'assistant' %}<start_of_turn>model\n" + G
    + "{{ m.content }}<end_of_turn>" + E + "{{ '\\n' }}{% elif m.role == 'user' %}<start_of_turn>user\n"
    "{{ s if loop.index0 < 2 else '' }}{{ m.content }}<end_of_turn>\n{% endif %}" + SAME + GEMMA_ASK,
    "mistral": "{{ bos_token }}" + EACH + "{% if m.role == 'assistant' %}" + G + " {{ m.content }}{{ eos_token }}" + E
    + "{% elif m.role == 'user' %}[INST] {% if messages[0].role == 'system' and loop.index0 == 1 %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }} [/INST]{% endif %}" + SAME,
    "mistral with tools": "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    + EACH + "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}[TOOL_RESULTS]"
    "{{ m.content }}[/TOOL_RESULTS]{% elif m.role == 'assistant' %}" + G + "{% if m.tool_calls %}[TOOL_CALLS]"
    "{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}{{ eos_token }}" + E
    + "{% else %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% endif %}" + SAME,
    "phi": EACH + "<|{{ m.role }}|>\n{% if m.role == 'assistant' %}" + G + "{{ m.content }}<|end|>" + E
    + "{% else %}{{ m.content }}<|end|>{% endif %}{{ '\\n' }}" + SAME + "{% if add_generation_prompt %}<|assistant|>\n{% else %}"
    "{{ eos_token }}{% endif %}",
    "phi 4 with thoughts": EACH + "{% if m.role == 'assistant' %}<|im_start|>assistant<|im_sep|>" + G
    + "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>" + E
    + "{% else %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endif %}" + SAME
    + "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
}

SPECIAL = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|start_header_id|>", "<|eot_id|>",
           "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>",
           "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]",
           "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


SYSTEM = turn("system", "You are a help desk. Answer in one line.")
CALL = {"type": "function", "function": {"name": "find_order", "arguments": {"code": "k48"}}}
TOOLS = [{"type": "function", "function": {"name": "find_order", "parameters": {"type": "object"}}}]
PLAIN = [[turn("user", "hello"), turn("assistant", "hello again!")],
         [turn("user", "hello"), turn("assistant", "hello"), turn("user", "hello"), turn("assistant", "hello")],
         [turn("user", "order k48 is late .\n\nwhere is it?"), turn("assistant", "on its way,\nit seems: é 漢 🙂."),
          turn("user", "thanks"), turn("assistant", "x")]]
WITH_SYSTEM = [[SYSTEM, *turns] for turns in PLAIN]
WITH_TOOLS = [[turn("user", "where is k48?"), turn("assistant", "", tool_calls=[CALL]), turn("tool", "{\"late\": true}"),
               turn("assistant", "It is late."), turn("user", "thanks"), turn("assistant", "Sorry.")]]
WITH_THOUGHTS = [[turn("user", "2 + 2?"), turn("assistant", "4", reasoning_content="two and two"),
                  turn("user", "3 + 3?"), turn("assistant", "6", reasoning_content="three\nand three")]]


def conversations(name: str) -> list[tuple[list[dict], list | None]]:
    """(turns, tools) that a template of that name can write."""
    found = [(turns, None) for turns in PLAIN + (WITH_SYSTEM if name != "gemma" else [])]
    found += [(turns, TOOLS) for turns in WITH_TOOLS if "tools" in name]
    return found + [(turns, None) for turns in WITH_THOUGHTS if "thoughts" in name]


def unmarked(template: str) -> str:
    """The template as it is published: without the generation marks."""
    return re.sub(r"\{% (end)?generation %\}", "", template)


def byte_level(vocab: int = 400, texts: list[str] | None = None, **options) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, in the manner of GPT-2's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts or ["where is my order, hello again! it is late, and on its way \n\n"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                   additional_special_tokens=list(SPECIAL[3:]), **options)
