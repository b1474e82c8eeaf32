"""After a run: score a base beside its adapter, also on what it may have forgotten; talk to both; merge for good."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import CONFIG, load_adapter
from ..bank import AdapterBank
from ..checkpoints import read_json
from ..config import require
from ..injection import lora_layers, merge
from ..quant import Linear4bit, dequantise, quantise, quantise_model
from ..tables import table
from .batches import tokenised
from .data import read_rows
from .model import (
                    WithLoss,
                    load_model,
                    load_tokenizer,
                    missing_folder,
                    pick_device,
                    pick_dtype,
                    scores,
                    tokens_that_end,
)
from .run import pad_of
from .templates import Chat


def base_of(adapter: str | Path) -> str:
    """The base that an adapter's folder names."""
    base = read_json(Path(adapter) / CONFIG, "an adapter folder").get("base_model_name_or_path")
    require(isinstance(base, str) and base, f"{adapter} does not say which base it is for; expected --model, and it "
            "names", base)
    return base


def open_model(model: str | None, adapter: str | None, device: str | None = None, dtype: str | None = None,
               as_trained: bool = False):
    """(model, tokenizer): of the base, or of the base that an adapter names; `as_trained`: in 4 bits, if the adapter
    was trained on it so."""
    name = base_of(adapter) if model is None else model
    missing_folder(name)
    where = pick_device(device)
    net = load_model(name, pick_dtype(dtype, where), where)
    if as_trained and adapter is not None and was_four_bit(adapter):
        quantise_model(net)
    return net, load_tokenizer(name)


# ---------------------------------------------------------------- scores


@dataclass(frozen=True)
class Scores:
    """Loss and exact match of the base and of the adapter, file by file: `rows` (file, who, loss, exact, tokens)."""

    rows: tuple[tuple[str, str, float, float, int], ...]

    def __str__(self):
        return table(("file", "", "loss (nats a token)", "exact", "tokens"),
                     [(file, who, f"{loss:.4f}", f"{exact:.1%}", n) for file, who, loss, exact, n in self.rows])

    def to_dict(self) -> dict:
        names = ("file", "who", "loss", "exact", "tokens")
        return {"scores": [dict(zip(names, row)) for row in self.rows]}


def evaluate(model: nn.Module, tokenizer: Any, files: list[str], adapter: str | None = None, *, batch: int = 8,
             seq: int | None = None, any_base: bool = False, template: str | None = None) -> Scores:
    """Scores on each file of the base, and with its adapter; the model comes back as the base.

    A second file that has nothing to do with the adapter's task shows what was forgotten.
    """
    chat, pad = Chat(tokenizer, template), pad_of(tokenizer)
    rows = {file: tokenised(chat, read_rows(file), seq).rows for file in files}
    found = [(file, "base", *scores(WithLoss(model), rows[file], batch, pad).values()) for file in files]
    if adapter is not None:
        bank = AdapterBank(model)
        bank.load("adapter", adapter, any_base)
        bank.use("adapter")
        found += [(file, "adapter", *scores(WithLoss(model), rows[file], batch, pad).values()) for file in files]
        bank.use(None)
    return Scores(tuple(sorted(found, key=lambda row: files.index(row[0]))))


# ---------------------------------------------------------------- talk


class Talk:
    """A conversation with a base and its adapters, greedy by default.

    Each of the voices hears the turns that it wrote itself; "base" is the model without any adapter.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, adapters: dict[str, str], *, system: str = "",
                 max_new: int = 256, temperature: float = 0.0, any_base: bool = False, template: str | None = None):
        require(type(max_new) is int and max_new > 0, "max_new must be a positive integer", max_new)
        require(0 <= temperature < 100, "temperature must be from 0 on", temperature)
        require("base" not in adapters, 'an adapter must have a name other than "base"', list(adapters))
        self.model, self.tokenizer, self.chat = model.eval(), tokenizer, Chat(tokenizer, template)
        self.max_new, self.temperature = max_new, temperature
        self.bank = AdapterBank(model) if adapters else None
        for name, folder in adapters.items():
            self.bank.load(name, folder, any_base)
        self.voices = ["base", *adapters]
        self.active = list(self.voices)
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns: dict[str, list[dict]] = {}
        self.reset()
        if self.chat.template is not None:
            self.chat.check_roles() if not self.chat.says_it_itself else None
        self.ends = tokens_that_end(tokenizer, self.chat.stop if self.chat.template else "", model)

    def reset(self) -> None:
        self.turns = {voice: list(self.system) for voice in self.voices}

    def say(self, text: str, voice: str, heard: Callable[[str], None] = lambda piece: None) -> str:
        """What a voice answers to `text`; `heard` is called with each piece of it as it comes."""
        turns = [*self.turns[voice], {"role": "user", "content": text}]
        if self.chat.template is None:
            prompt, special = text, True
        else:
            prompt, special = self.chat.render(turns, prompt=True), False
        ids = self.tokenizer(prompt, add_special_tokens=special, return_tensors="pt")["input_ids"]
        if self.bank:
            self.bank.use(None if voice == "base" else voice)
        out, said = [], ""
        for token in self.generated(ids.to(self.model.device)):
            out.append(token)
            whole = self.tokenizer.decode(out, skip_special_tokens=True)
            if whole.startswith(said) and not whole.endswith("\ufffd"):  # half a character waits for the other half
                heard(whole[len(said):])
                said = whole
        answer = self.tokenizer.decode(out, skip_special_tokens=True).strip()
        self.turns[voice] = [*turns, {"role": "assistant", "content": answer}]
        return answer

    @torch.no_grad()
    def generated(self, ids: Tensor) -> Iterator[int]:
        """Token after token, from ids (1, T), until one that ends the turn."""
        past, step = None, ids
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        if ids.shape[1] >= context:
            raise ValueError(f"the conversation has {ids.shape[1]} tokens and the model's context is {context}: "
                             "/reset begins a new one")
        for _ in range(min(self.max_new, context - ids.shape[1])):
            out = self.model(step, past_key_values=past, use_cache=True)
            past, logits = out.past_key_values, out.logits[0, -1].float()  # (V,)
            if self.temperature:
                step = torch.multinomial((logits / self.temperature).softmax(-1), 1)[None]
            else:
                step = logits.argmax()[None, None]
            if step.item() in self.ends:
                return
            yield step.item()


HELP = "/base, /NAME: only that voice; /all: side by side; /reset: begin again; /quit"


def spoken(text: str) -> None:
    print(text, end="", flush=True)


def converse(talk: Talk, lines: Iterator[str], write: Callable[[str], Any] = spoken) -> None:
    """A conversation by lines: what begins with / is for us, see `HELP`."""
    for line in lines:
        line = line.strip()
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            talk.reset()
        elif line == "/all":
            talk.active = list(talk.voices)
        elif line.startswith("/") and line[1:] in talk.voices:
            talk.active = [line[1:]]
        elif line.startswith("/"):
            write(HELP.replace("/NAME", ", ".join(f"/{voice}" for voice in talk.voices[1:]) or "/NAME") + "\n")
        elif line:
            for voice in talk.active:
                write(f"{voice}: ")
                talk.say(line, voice, write)
                write("\n")


# ---------------------------------------------------------------- merge


@dataclass(frozen=True)
class Merged:
    """What merging for good did. swallowed: the largest share of an update that rounding to the base's type took.

    requantised: None, or, for an adapter of a 4-bit base, (the median module's share of its update that quantising the
    merged weight again would lose, the largest); above 1 the error is larger than the update.
    """

    modules: int
    swallowed: float
    requantised: tuple[float, float] | None = None

    def __str__(self):
        said = f"{self.modules} modules merged; rounding took at most {self.swallowed:.2%} of an update"
        if self.requantised:
            said += (f"\nthe base is the 4-bit one, dequantised. In 4 bits again, a merged weight would be off by "
                     f"{self.requantised[0]:.0%} of its update (median; at most {self.requantised[1]:.0%})")
        return said


def merge_for_good(model: nn.Module, adapter: str, four_bit: bool = False, any_base: bool = False) -> Merged:
    """Put an adapter's updates into the weights of its base, in place; plain modules are left.

    With `four_bit` the adapter was trained on the base in NF4: it is merged into what those 4 bits say.
    """
    if four_bit:
        quantise_model(model)
        dequantise_model(model)
    load_adapter(model, adapter, any_base=four_bit or any_base)
    before = {name: layer.base_layer.weight.detach().clone() for name, layer in lora_layers(model).items()} \
        if four_bit else {}
    lost = merge(model, permanent=True)
    shares = []
    for name, old in before.items():
        new = model.get_submodule(name).weight.detach()
        update, again = (new - old).float(), dequantise(quantise(new), new.dtype)
        shares.append(((again - new).float().norm() / update.norm().clamp_min(1e-30)).item())
    shares.sort()
    return Merged(len(lost), max(lost.values()), (shares[len(shares) // 2], shares[-1]) if shares else None)


def dequantise_model(model: nn.Module) -> nn.Module:
    """Turn 4-bit linears into plain ones that hold what the 4 bits say, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta")
            plain.weight = nn.Parameter(module.dequantize(), requires_grad=False)
            plain.bias = module.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)
    return model


def was_four_bit(adapter: str | Path, folder_card: str = "README.md") -> bool:
    """Whether the card beside an adapter says that `minilora tune` made it on a 4-bit base."""
    card = Path(adapter) / folder_card
    return card.is_file() and '"method": "qlora"' in card.read_text(encoding="utf-8", errors="replace")


