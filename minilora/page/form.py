"""The form: a control for every option that the command line has."""

from collections.abc import Mapping

from ..memory.models import PRESETS
from .html import Html, joined, tag
from .options import FIRST, Option, State, options

LABELS = {"model": "Model", "config": "or a config.json", "card": "Card", "cards": "How many cards",
          "zero": "ZeRO stage", "method": "Method", "rank": "Rank", "targets": "Targets", "batch": "Batch",
          "seq": "Sequence, tokens", "stack": "Stack", "serve": "Answer prompts instead of training"}
CHOICES = {"full": "full: every weight trains", "lora": "lora: adapters on a 16-bit base",
           "qlora": "qlora: adapters on a 4-bit base"}
TARGETS = ("all-linear", "q_proj,v_proj", "q_proj,k_proj,v_proj,o_proj")
YES_NO = ("yes", "no")
GROUPS = {"": "Both", "training": "Training", "serving": "Answering prompts"}


def form(filled: State, holds: Mapping[str, str]) -> Html:
    """The whole form. `filled`: what stands in it. `holds`: what holds for what is left empty."""
    controls = {name: control(option, filled.get(name, ""), holds.get(name, ""))
                for name, option in options().items()}
    first = [controls[name] for name in FIRST if name != "config"]
    rest = [tag("fieldset", tag("legend", title), *(
        controls[option.name] for option in options().values() if option.name not in FIRST and option.only == only))
        for only, title in GROUPS.items()]
    names = tag("datalist", *(tag("option", value=name) for name in PRESETS), id="known-models")
    targets = tag("datalist", *(tag("option", value=name) for name in TARGETS), id="known-targets")
    own = tag("details", tag("summary", "or a config.json of your own"),
              tag("p", "Drop the file anywhere on this page, choose it, or paste it. It does not leave this machine.",
                  class_="quiet"),
              tag("input", type="file", id="file", accept=".json,application/json", aria_label="choose a config.json"),
              controls["config"], tag("button", "clear", type="button", id="clear"), id="own")
    return tag("form", tag("div", *first, class_="first"), own,
               tag("details", tag("summary", "All other options"), *rest, id="more"), names, targets,
               id="run", aria_label="the run", autocomplete="off")


def control(option: Option, value: str, holds: str) -> Html:
    """One option: its label, its control, and what it means where that is not plain."""
    name = option.name
    label, told = LABELS.get(name, name.replace("_", " ")), option.about if name not in FIRST else ""
    shared = {"name": name, "id": f"o-{name}", "data_only": option.only or None, "data_kind": option.kind,
              "aria_describedby": f"a-{name}" if told else None}
    if option.kind == "switch":
        made = tag("label", tag("input", type="checkbox", value="yes", checked=value == "yes", **shared), " ", label)
        return tag("div", made, about(name, told), class_="control switch")
    if option.kind in ("choice", "flag"):
        known = option.choices or YES_NO
        made = tag("select", unsaid(option, holds, not value), *(
            tag("option", CHOICES.get(text, text), value=text, selected=text == value) for text in known), **shared)
    elif name == "config":
        made = tag("textarea", value, rows=6, spellcheck="false", placeholder='{"model_type": "llama", …}', **shared)
    else:
        listed = {"model": "known-models", "targets": "known-targets"}.get(name)
        made = tag("input", type="text", value=value, placeholder=holds or None, list=listed, spellcheck="false",
                   autocapitalize="off", inputmode="numeric" if option.kind == "number" else None, **shared)
    return tag("div", tag("label", label, for_=f"o-{name}"), made, about(name, told), class_=f"control c-{name}",
               data_only=option.only or None)


def unsaid(option: Option, holds: str, selected: bool) -> Html:
    """The first choice: nothing said. page.js writes there what then holds."""
    if option.name == "card":
        return tag("option", "any: ask which it fits", value="", selected=selected)
    return tag("option", f"default: {holds}" if holds else "default", value="", selected=selected)


def about(name: str, told: str) -> Html:
    return tag("small", told, id=f"a-{name}") if told else joined()
