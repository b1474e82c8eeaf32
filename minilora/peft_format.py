"""What PEFT calls things: keys of tensors, settings of ``adapter_config.json``, and which can be followed here."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .config import LoRAConfig, entry_matches, variants
from .injection import adapter_layers, lora_layers
from .layers import LoRALayer
from .naming import bare, plain_modules
from .tables import quoted
from .trained_copy import TrainedCopy

PREFIX = "base_model.model."

# settings that make an adapter more than A and B on whole layers
UNSUPPORTED = ("trainable_token_indices", "target_parameters", "layer_replication", "lora_bias",
               "alora_invocation_tokens", "use_qalora",
               "arrow_config", "use_bdlora", "kasa_config", "monteclora_config", "velora_config", "megatron_config")
# settings that choose among the layers: the file's tensors name those that were chosen
CHOOSING = ("layers_to_transform", "layers_pattern", "exclude_modules")
# starts that leave the base's weights alone; the others (pissa, olora, corda, loftq, lora_ga) subtract from them
KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from disk: its settings, its tensors by their keys, and its base's fingerprint or None.

    `config` is a `LoRAConfig`, or that of a relative.
    """

    folder: Path
    config: Any
    tensors: dict[str, Tensor]
    base: str | None


@dataclass(frozen=True)
class Format:
    """How the adapters of one method stand in a folder.

    Attributes:
        prefix: of every key, before the module's name.
        write: what ``adapter_config.json`` says of a model's adapters.
        read: the config that it means; a ValueError if it means none.
    """

    prefix: str
    write: Callable[[nn.Module], dict]
    read: Callable[[dict], Any]


FORMATS: dict[str, Format] = {}  # by peft_type: those of the relatives, who enter their own


def format_of(peft_type: str) -> Format:
    """The format of a type of adapter; a ValueError if it is unknown here."""
    for room in ("variants", "peft_methods"):  # those that nobody has asked for yet make themselves known now
        import_module(f"{__package__}.{room}")
    forms = {layer.peft_type: Format(PREFIX, written, read_lora) for layer in variants().values()} | FORMATS
    if peft_type not in list(forms):  # a file may say what has no hash
        raise ValueError(f"is of peft_type {quoted(peft_type)}; only {' or '.join(map(repr, forms))} can be loaded")
    return forms[peft_type]


def keys_of(name: str, kind: str, layer: type[LoRALayer] = LoRALayer) -> dict[str, str]:
    """Our tensor -> PEFT's key, for the module called `name` under this variant's layer."""
    return {own: f"{PREFIX}{name}.{key}" for own, key in layer.keys_of(kind).items()}


def config_of(model: nn.Module) -> LoRAConfig:
    """The config that describes the adapters of a model as they are saved; a ValueError if they disagree on rsLoRA, the
    variant or dropout.

    A target is named by its last part where every module of that name is adapted, by its whole name elsewhere.
    """
    layers = lora_layers(model)
    flags = {(layer.use_rslora, *layer.chosen().items(), layer.dropout) for layer in layers.values()}
    if len(flags) > 1:
        raise ValueError("the adapters differ in use_rslora, variant or dropout, which a file can only say once")
    (use_rslora, *chosen, dropout), = flags
    others = {name for name, _ in plain_modules(model)} - layers.keys()
    last = {name: name.rpartition(".")[2] for name in layers}
    targets = {name if any(entry_matches(end, other) for other in others) else end for name, end in last.items()}
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        form = layer.plain_form()
        ranks[name], alphas[name] = (layer.rank, layer.alpha) if form is None else (len(form[0]), form[2])
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    whole = tuple(name for name, layer in adapter_layers(model).items() if isinstance(layer, TrainedCopy))
    # anchored: a pattern's key would also match the end of a longer name
    return LoRAConfig(rank, alpha, tuple(sorted(targets)), dropout, use_rslora, **dict(chosen), modules_to_save=whole,
                      rank_pattern={f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
                      alpha_pattern={f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha})


def peft_config(config: LoRAConfig, fan_in_fan_out: bool = False) -> dict:
    """The ``adapter_config.json`` of a config."""
    layer = variants()[config.variant]
    settings = {theirs: getattr(config, ours) for ours, theirs in settings_of(layer.peft_type).items()}
    return settings | layer.constants | {
        "peft_type": layer.peft_type, "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
        "bias": "none", "fan_in_fan_out": fan_in_fan_out, "modules_to_save": list(config.modules_to_save) or None,
    }


def is_set(value) -> bool:
    """Whether a setting asks for something; 0 does (the first layer, say), as in PEFT."""
    return value not in (None, False, [], {}, "") or type(value) is int


def usual_key(key: str) -> str:
    """A tensor's key without the adapter's name in it ("default"), which some tools leave there."""
    return re.sub(r"\.default(?=$|\.weight$)", "", key)


def modules_of(keys: Iterable[str], layer: type[LoRALayer]) -> list[str]:
    """The modules that a file's keys name as adapted."""
    ends = {f".{end}" for kind in ("linear", "embedding") for end in layer.keys_of(kind).values()}
    return list(dict.fromkeys(key[len(PREFIX):-len(end)] for key in keys for end in ends
                              if key.startswith(PREFIX) and key.endswith(end)))


def moved(names: list[str], here: set[str]) -> tuple[str, str] | None:
    """(old, new): the beginning of a file's module names, and what a model has in its place ("language_model.model" is
    "model.language_model" since transformers 4.52). None if no single change, or more than one, gives every name a
    module of the model."""
    parts = names[0].split(".")
    for i in range(len(parts)):  # the smallest beginning first
        old, rest = ".".join(parts[:i]), "." + ".".join(parts[i:])
        news = {name.removesuffix(rest) for name in here if name.endswith(rest)} | ({""} if rest[1:] in here else set())
        fits = [new for new in news if all(renamed(name, old, new) in here for name in names)]
        if fits:
            return (old, fits[0]) if len(fits) == 1 else None
    return None


def renamed(name: str, old: str, new: str) -> str | None:
    """`name` with another beginning; None if it does not begin so."""
    if old and not name.startswith(f"{old}."):
        return None
    rest = name[len(old) + 1:] if old else name
    return f"{new}.{rest}" if new else rest


def by_names_here(adapter: AdapterFile, model: nn.Module) -> AdapterFile:
    """The adapter by the names of this model, where a version of the architecture has put its modules elsewhere."""
    names, here = modules_of(adapter.tensors, variants()[adapter.config.variant]), {n for n, _ in plain_modules(model)}
    if not names or any(name in here for name in names) or not (change := moved(names, here)):
        return adapter
    old, new = (name or "(nothing)" for name in change)
    warnings.warn(f"{adapter.folder} names its modules {old}. ...; taken for {new}. ... of this model", stacklevel=4)
    tensors = {PREFIX + renamed(key.removeprefix(PREFIX), *change): t for key, t in adapter.tensors.items()}
    config = replace(adapter.config, target_modules=tuple(renamed(name, *change) for name in names), rank_pattern={
        f"^{re.escape(renamed(n, *change))}": adapter.config.rank_of(n) for n in names}, alpha_pattern={
        f"^{re.escape(renamed(n, *change))}": adapter.config.alpha_of(n) for n in names})
    return replace(adapter, config=config, tensors=tensors)


def without(config: LoRAConfig, names: list[str], only: bool = False) -> LoRAConfig:
    """The config without the keys of patterns that match none of the modules `names`; `only` these are its targets."""
    unused = {"rank_pattern": set(config.rank_table.unused(names)),
              "alpha_pattern": set(config.alpha_table.unused(names))}
    left = {own: {k: v for k, v in getattr(config, own).items() if k not in keys} for own, keys in unused.items()}
    return replace(config, **left, target_modules=tuple(names) if only else config.target_modules)


def as_tensors_say(config: LoRAConfig, values: dict, tensors: dict[str, Tensor]) -> LoRAConfig:
    """The config of a file with what its tensors say better: which modules a setting such as `layers_to_transform`
    chose, and which keys of patterns are in use."""
    names = modules_of(tensors, variants()[config.variant])
    if not names:
        return config
    # PEFT names both "classifier" and "score" as a classifier's head
    whole = tuple(n for n in config.modules_to_save if any(f".{n}." in f".{key[len(PREFIX):]}" for key in tensors))
    config = replace(config, modules_to_save=whole)
    return without(config, names, any(is_set(values.get(setting)) for setting in CHOOSING))


def settings_of(peft_type: str) -> dict[str, str]:
    """Our name of a setting -> PEFT's, of all variants that share a type of file."""
    return {ours: theirs for layer in variants().values() if layer.peft_type == peft_type
            for ours, theirs in layer.settings.items()}


def written(model: nn.Module) -> dict:
    """The ``adapter_config.json`` of a model's LoRA layers; with it, ``AutoPeftModelForCausalLM`` finds the base."""
    config = config_of(model)
    settings = peft_config(config, all(layer.kind == "conv1d" for layer in lora_layers(model).values()))
    hub = getattr(bare(model), "config", None)
    return settings | {"base_model_name_or_path": getattr(hub, "name_or_path", None) or None,
                       "task_type": task_of(bare(model), bool(config.modules_to_save))}


def task_of(model: nn.Module, head: bool) -> str | None:
    """PEFT's name of what a Hugging Face model does. A classifier's goes with its head, which PEFT needs."""
    name, hub = type(model).__name__, getattr(model, "config", None)
    tasks = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}
    tasks |= {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"} if head else {}
    if getattr(hub, "is_encoder_decoder", False):
        tasks["ForConditionalGeneration"] = "SEQ_2_SEQ_LM"
    return next((task for end, task in tasks.items() if name.endswith(end)), None)


def read_lora(values: dict) -> LoRAConfig:
    """The config that PEFT's settings mean."""
    kind = values.get("peft_type", LoRALayer.peft_type)
    for setting in UNSUPPORTED:
        if is_set(values.get(setting)):
            raise ValueError(f"sets {setting}, which is not supported: an adapter here is A and B on whole "
                             "layers that target_modules names, nothing else")
    if (bias := values.get("bias", "none")) != "none":
        raise ValueError(f"sets bias={quoted(bias)}, which is not supported: it retrains the base's biases")
    if (start := values.get("init_lora_weights", True)) not in KEEPS_BASE:
        raise ValueError(f"was initialised by {quoted(start)}, which changes the base's weights: convert it to a "
                         "plain adapter first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)")
    found = {ours: values[theirs] for ours, theirs in settings_of(kind).items() if values.get(theirs) is not None}
    own = next((layer.choice for layer in variants().values() if layer.peft_type == kind != LoRALayer.peft_type), {})
    default = {"alpha": 8} if kind == LoRALayer.peft_type else {}
    whole = {"modules_to_save": values["modules_to_save"]} if values.get("modules_to_save") else {}
    return LoRAConfig(**default | {"target_modules": ()} | own | found | whole)
