"""The help-desk base as a Hugging Face folder, with a fast tokenizer and a chat template: a model to try all this on,
offline and in seconds. Nothing else here knows of it."""

from pathlib import Path

from ..helpdesk import load_base, tokenizer

# <system> s <customer> m <agent> reply <end>, as `helpdesk.conversation` writes it; white space does not matter
TEMPLATE = ("{% for m in messages %}{% if m.role == 'system' %}<system> {{ m.content }} "
            "{% elif m.role == 'user' %}<customer> {{ m.content }} <agent>"
            "{% elif m.role == 'assistant' %} {{ m.content }} <end>"
            "{% else %}{{ raise_exception('only system, user and assistant turns') }}{% endif %}{% endfor %}")
PIECES = r"<[a-z]+>|[a-z]+|[0-9]|[^\sa-z0-9]"  # as helpdesk.Tokenizer
SPECIAL = ("<pad>", "<end>", "<system>", "<customer>", "<agent>")


def save_help_desk(folder: str | Path, base: str = "base") -> Path:
    """Write a base of the help-desk world to `folder` in the form in which models stand on the hub."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder, words, ours = Path(folder), tokenizer().words, load_base(base)
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "removed", invert=True)
    # words with a space between; digits joined to each other and to the single letter of a code before them
    joined = (r"(?<=[0-9]) (?=[0-9])", r"(?<=(?:^| )[b-hj-z]) (?=[0-9])")
    fast.decoder = decoders.Sequence([decoders.WordPiece("##", cleanup=False), decoders.Fuse(),
                                      *(decoders.Replace(Regex(space), "") for space in joined)])
    there = [word for word in SPECIAL if word in words]
    chat = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>", pad_token="<pad>", chat_template=TEMPLATE,
                                   additional_special_tokens=[w for w in there if w not in ("<pad>", "<end>")],
                                   model_max_length=ours.config.max_position_embeddings,
                                   clean_up_tokenization_spaces=False)
    config = LlamaConfig(**ours.config.to_hf() | {"eos_token_id": words.index("<end>"), "bos_token_id": None,
                                                  "pad_token_id": words.index("<pad>")})
    model = LlamaForCausalLM(config)
    model.load_state_dict(ours.state_dict(), strict=False)
    model.tie_weights()
    model.save_pretrained(folder)
    chat.save_pretrained(folder)
    return folder
