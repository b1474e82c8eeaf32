"""What PEFT calls things: keys of tensors, settings of ``adapter_config.json``, and which can be followed here."""

import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .config import LoRAConfig, ends, entry_matches, variants
from .hub_names import is_hub_model, names_here
from .injection import adapter_layers, lora_layers
from .layers import LoRALayer
from .naming import bare, plain_modules
from .parameters import StackedLoRA, TrainedRows
from .tables import quoted
from .trained_copy import TrainedCopy

PREFIX = "base_model.model."

# settings that make an adapter more than A and B on whole layers
UNSUPPORTED = ("layer_replication", "lora_bias", "alora_invocation_tokens", "use_qalora", "arrow_config",
               "use_bdlora", "kasa_config", "monteclora_config", "velora_config", "megatron_config")
# settings that choose among the layers: the file's tensors name those that were chosen
CHOOSING = ("layers_to_transform", "layers_pattern", "exclude_modules")
# starts that leave the base's weights alone; the others (pissa, olora, corda, loftq, lora_ga) subtract from them
KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from disk: its settings, its tensors by their keys, and its base's fingerprint or None.

    `config` is a `LoRAConfig`, or that of a relative. `half`: the fingerprint's weights, rounded to float16.
    `unused`: what its settings name and no tensor bears out.
    """

    folder: Path
    config: Any
    tensors: dict[str, Tensor]
    base: str | None
    half: str | None = None
    unused: tuple[str, ...] = ()


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
    layers, every = lora_layers(model), adapter_layers(model)
    stacked = {name: layer for name, layer in every.items() if isinstance(layer, StackedLoRA)}
    flags = {(layer.use_rslora, *layer.chosen().items(), layer.dropout) for layer in layers.values()}
    flags |= {(layer.use_rslora, 0.0) for layer in stacked.values()} if not layers else set()
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
    for name, layer in stacked.items():
        ranks |= {f"{name}.{key}": rank for key, rank in layer.ranks.items()}
        alphas |= {f"{name}.{key}": alpha for key, alpha in layer.alphas.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    whole = tuple(name for name, layer in every.items() if isinstance(layer, TrainedCopy))
    rows = {name: tuple(layer.tokens.tolist()) for name, layer in every.items()
            if isinstance(layer, TrainedRows) and not layer.tied}
    # anchored: a pattern's key would also match the end of a longer name
    parameters = tuple(f"{name}.{key}" for name, layer in stacked.items() for key in layer.ranks)
    return LoRAConfig(rank, alpha, tuple(sorted(targets)), dropout, use_rslora, **dict(chosen), modules_to_save=whole,
                      trainable_tokens=rows, target_parameters=parameters,
                      rank_pattern={f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
                      alpha_pattern={f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha})


def peft_config(config: LoRAConfig, fan_in_fan_out: bool = False) -> dict:
    """The ``adapter_config.json`` of a config."""
    layer = variants()[config.variant]
    settings = {theirs: getattr(config, ours) for ours, theirs in settings_of(layer.peft_type).items()}
    rows = {name: list(tokens) for name, tokens in config.trainable_tokens.items()}
    settings |= {"trainable_token_indices": rows} if rows else {}
    settings |= {"target_parameters": list(config.target_parameters)} if config.target_parameters else {}
    return settings | layer.constants | {
        "peft_type": layer.peft_type, "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
        "bias": "none", "fan_in_fan_out": fan_in_fan_out, "modules_to_save": list(config.modules_to_save) or None,
    }


def is_set(value) -> bool:
    """Whether a setting asks for something; 0 does (the first layer, say), as in PEFT."""
    return value not in (None, False, [], {}, "") or type(value) is int


def usual_key(key: str) -> str:
    """A tensor's key without the adapter's name in it ("default"), which some tools leave there."""
    return re.sub(r"\.default(?=$|\.weight$)", "", key) if ".default" in key else key


def modules_of(adapter: AdapterFile) -> list[str]:
    """The modules that a file's keys name as adapted; not those of stacked experts."""
    layer = variants()[adapter.config.variant]
    key_ends = {f".{end}" for kind in ("linear", "embedding") for end in layer.keys_of(kind).values()}
    names = dict.fromkeys(key[len(PREFIX):-len(end)] for key in adapter.tensors for end in key_ends
                          if key.startswith(PREFIX) and key.endswith(end))
    holders = {entry.rpartition(".")[0] for entry in adapter.config.target_parameters}
    if not holders:
        return list(names)
    return [name for name in names if holders.isdisjoint(ends(re.sub(r"(\.base_layer)+$", "", name)))]


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
    """The adapter by the names of this model, where a version of the architecture has put its modules elsewhere or
    calls them otherwise.

    Raises:
        ValueError: a module that the architecture has fused with others since.
    """
    names, here = modules_of(adapter), {name for name, _ in plain_modules(model)}
    if all(name in here for name in names):
        return adapter
    if is_hub_model(bare(model)):
        new = names_here(bare(model), names)
        if fused := [name for name, now in new.items() if now is None and name not in here]:
            raise ValueError(f"{adapter.folder} adapts {', '.join(fused[:3])}{', ...' * (len(fused) > 3)}, which this "
                             f"version of {type(bare(model)).__name__} fuses with others into one parameter: no module "
                             "to put the adapter around. Load it with the version that it was made with")
        if all(now in here for now in new.values()):
            changed = next(name for name, now in new.items() if now != name)
            return by_other_names(adapter, new, f"{changed}, say", f"{new[changed]}")
    if any(name in here for name in names) or not (change := moved(names, here)):
        return adapter
    old, new = (f"{name or '(nothing)'}. ..." for name in change)
    return by_other_names(adapter, {name: renamed(name, *change) for name in names}, old, new)


def by_other_names(adapter: AdapterFile, new: dict[str, str], old: str, now: str) -> AdapterFile:
    """The adapter with its modules called otherwise, which is said: they are called `old`, taken for `now`."""
    warnings.warn(f"{adapter.folder} names its modules {old}; taken for {now} of this model", stacklevel=5)
    layer, config = variants()[adapter.config.variant], adapter.config
    keys = {keys_of(name, kind, layer)[own]: keys_of(here, kind, layer)[own] for name, here in new.items()
            for kind in ("linear", "embedding") for own in keys_of(name, kind, layer)}
    tensors = {keys.get(key, key): t for key, t in adapter.tensors.items()}
    config = replace(config, target_modules=tuple(new.values()),
                     rank_pattern={f"^{re.escape(here)}": config.rank_of(name) for name, here in new.items()},
                     alpha_pattern={f"^{re.escape(here)}": config.alpha_of(name) for name, here in new.items()})
    return replace(adapter, config=config, tensors=tensors)


def as_tensors_say(adapter: AdapterFile, values: dict) -> AdapterFile:
    """The adapter with what its tensors say better than its settings: which modules a setting such as
    `layers_to_transform` chose. Keys of patterns that match none of its modules come to `unused`."""
    config, names = adapter.config, modules_of(adapter)
    if not names:
        return adapter
    adapted = [*names, *config.target_parameters]
    unused = {"rank_pattern": config.rank_table.unused(adapted), "alpha_pattern": config.alpha_table.unused(adapted)}
    left = {own: {k: v for k, v in getattr(config, own).items() if k not in keys} for own, keys in unused.items()}
    # PEFT names both "classifier" and "score" as a classifier's head
    paths = [f".{key[len(PREFIX):]}" for key in adapter.tensors]
    whole = tuple(n for n in config.modules_to_save if any(f".{n}." in path for path in paths))
    chosen = any(is_set(values.get(setting)) for setting in CHOOSING)
    targets = tuple(names) if chosen else config.target_modules
    return replace(adapter, config=replace(config, **left, modules_to_save=whole, target_modules=targets),
                   unused=tuple(f"{own} {quoted(key)}" for own, keys in unused.items() for key in keys))


def in_use(adapter: AdapterFile, model: nn.Module) -> AdapterFile:
    """The adapter without the names that neither a tensor of the file nor a module of this model bears, which are said:
    keys of patterns, and targets (PEFT writes down what it was asked for, not what it found)."""
    config, unused = adapter.config, list(adapter.unused)
    if not isinstance(config.target_modules, str):
        own = [ends(name) for name in modules_of(adapter)]
        names = {end for module in (*own, *(ends(n) for n, _ in plain_modules(model))) for end in module}
        kept = tuple(entry for entry in config.target_modules if entry in names)
        if kept and all(not config.target_names.isdisjoint(module) for module in own):  # else one may be mistyped
            unused += [f"target_modules {quoted(entry)}" for entry in config.target_modules if entry not in names]
            config = replace(config, target_modules=kept)
    if unused:
        warnings.warn(f"{adapter.folder}: no tensor of the adapter is meant by {', '.join(unused[:6])}"
                      f"{', ...' * (len(unused) > 6)}: left out", stacklevel=4)
    return replace(adapter, config=config)


def settings_of(peft_type: str) -> dict[str, str]:
    """Our name of a setting -> PEFT's, of all variants that share a type of file."""
    return {ours: theirs for layer in variants().values() if layer.peft_type == peft_type
            for ours, theirs in layer.settings.items()}


def written(model: nn.Module) -> dict:
    """The ``adapter_config.json`` of a model's LoRA layers; with it, ``AutoPeftModelForCausalLM`` finds the base."""
    config = config_of(model)
    kinds = {layer.kind for layer in lora_layers(model).values()}
    settings = peft_config(config, kinds == {"conv1d"})
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
    beside = {"modules_to_save": values.get("modules_to_save"), "target_parameters": values.get("target_parameters"),
              "trainable_tokens": values.get("trainable_token_indices")}
    if isinstance(beside["trainable_tokens"], list):  # PEFT's word for whatever embeds the tokens
        beside["trainable_tokens"] = {"embed_tokens": beside["trainable_tokens"]}
    return LoRAConfig(**default | {"target_modules": ()} | own | found | {k: v for k, v in beside.items() if v})
