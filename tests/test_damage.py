"""2,000 damaged, foreign and hostile adapter folders: one clear error each, the model untouched, no pickle opened."""

import json
import pickle
import random
import struct
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from small import same, state
from torch import nn

from minilora import LoRAConfig, inject, load_adapter, lora_parameters, remove, save_adapter

CASES, SEED = 2000, 0
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
JUNK = [
    None,
    True,
    -1,
    0,
    3.5,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\n",
    "(",
    "\ud800",
    [],
    ["x"],
    [[]],
    [None],
    {},
    {"x": 1},
    {"(": 1},
]


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Embedding(7, 3))


class Damage:
    """One adapter, its files as bytes, and ways to spoil them. A way returns the files, or None."""

    def __init__(self, folder: Path, use_dora: bool):
        model = inject(base(), LoRAConfig(2, 4, ("0", "1", "2"), use_dora=use_dora, rank_pattern={"1": 3}))
        with torch.no_grad():
            for p in lora_parameters(model):
                p.normal_()
        save_adapter(model, folder)
        self.files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        self.tensors, self.config = load_file(folder / WEIGHTS), json.loads(self.files[CONFIG])

    # Damage to bytes

    def truncated(self, draw):
        name = draw.choice((CONFIG, WEIGHTS))
        end = len(self.files[name].rstrip())  # the config's last line end does not count
        return {**self.files, name: self.files[name][: draw.randrange(end)]}

    def grown(self, draw):
        return {**self.files, WEIGHTS: self.files[WEIGHTS] + draw.randbytes(draw.randint(1, 40))}

    def length_spoiled(self, draw):
        size = struct.unpack("<Q", self.files[WEIGHTS][:8])[0]
        other = draw.choice([0, 1, size - 1, size + 1, size + 8, 2**31, 2**63, 2**64 - 1])
        return {**self.files, WEIGHTS: struct.pack("<Q", other) + self.files[WEIGHTS][8:]}

    def noise(self, draw):
        name = draw.choice((CONFIG, WEIGHTS))
        return {**self.files, name: draw.randbytes(draw.randint(0, 400))}

    def header_byte_spoiled(self, draw):
        data = bytearray(self.files[WEIGHTS])
        size = struct.unpack("<Q", data[:8])[0]
        data[draw.randrange(8, 8 + len(data[8 : 8 + size].rstrip()))] = draw.choice(b'\x00\xff"{[}')
        header, before = self.header(bytes(data)), self.header(self.files[WEIGHTS])
        if isinstance(header, dict):  # a file that says the same, or whose fingerprint lost its name, is a good file
            mark, mark_before = (h.pop("__metadata__", {}).get("minilora.base") for h in (header, before))
            if header == before and mark in (mark_before, None):
                return None
        return {**self.files, WEIGHTS: bytes(data)}

    def header_rewritten(self, draw):
        header = self.header(self.files[WEIGHTS])
        entry = header[draw.choice([k for k in header if k != "__metadata__"])]
        field = draw.choice(["dtype", "shape", "data_offsets"])
        value = draw.choice(
            ["I32", "BOOL", "X", None, [], [0, 0], [-1, 2], [2**62, 2**62], [5, 1], "F64", "F8_E4M3", "U64", "C64"]
        )
        if value == entry[field]:
            return None
        entry[field] = value
        text = json.dumps(header).encode()
        body = self.files[WEIGHTS][8 + struct.unpack("<Q", self.files[WEIGHTS][:8])[0] :]
        return {**self.files, WEIGHTS: struct.pack("<Q", len(text)) + text + body}

    # Damage to tensors

    def with_tensors(self, tensors):
        return {**self.files, WEIGHTS: save(tensors, {"format": "pt"})}

    def poisoned(self, draw):
        tensors = {k: t.clone() for k, t in self.tensors.items()}
        t = tensors[draw.choice(list(tensors))]
        t.view(-1)[draw.randrange(t.numel())] = draw.choice([float("nan"), float("inf"), -float("inf")])
        return self.with_tensors(tensors)

    def key_lost(self, draw):
        return self.with_tensors(
            {k: self.tensors[k] for k in draw.sample(list(self.tensors), draw.randrange(len(self.tensors)))}
        )

    def key_renamed(self, draw):
        tensors, key = dict(self.tensors), draw.choice(list(self.tensors))
        new = draw.choice(
            [
                key + "x",
                key[1:],
                key.replace("lora_A", "lora_B"),
                key.replace("base_model.", ""),
                "",
                "a\nb",
                key.replace(".weight", ".other.weight"),
                key.replace("model.0", "model.9"),
                key.upper(),
            ]
        )
        if new in tensors:
            return None
        tensors[new] = tensors.pop(key)
        return self.with_tensors(tensors)

    def key_added(self, draw):
        key = draw.choice(
            [
                "x",
                "base_model.model.3.lora_A.weight",
                "base_model.model.0.lora_B.bias",
                "base_model.model.0.weight",
                "base_model.model.0.base_layer.weight",
                "base_model.model.0.lora_magnitude_vector.weight",
            ]
        )
        return self.with_tensors(self.tensors | {key: torch.ones(draw.choice([(), (1,), (5, 6)]))})

    def reshaped(self, draw):
        key = draw.choice(list(self.tensors))
        t = self.tensors[key]
        new = draw.choice(
            [t.flatten()[:-1], t[None], t[:0], torch.cat((t, t)), t[..., None], t.flatten().repeat(2)]
        ).contiguous()
        return None if new.shape == t.shape else self.with_tensors(self.tensors | {key: new})

    def transposed(self, draw):
        return self.with_tensors({k: t.T.contiguous() if t.dim() == 2 else t for k, t in self.tensors.items()})

    def retyped(self, draw):
        key = draw.choice(list(self.tensors))
        return self.with_tensors(
            self.tensors
            | {key: self.tensors[key].to(draw.choice([torch.int32, torch.bool, torch.uint8, torch.complex64]))}
        )

    # Damage to the settings

    def with_config(self, config):
        return {**self.files, CONFIG: json.dumps(config).encode()}

    def setting_spoiled(self, draw):
        key = draw.choice(
            ["r", "target_modules", "peft_type", "bias", "init_lora_weights", "rank_pattern", "lora_dropout"]
        )
        value = draw.choice(JUNK)
        fine = {
            "r": [None],
            "target_modules": [],
            "peft_type": [],
            "bias": [],
            "init_lora_weights": [None, True, 0],
            "rank_pattern": [],
            "lora_dropout": [None, 0],
        }[key]  # what means the same, or as much
        if any(value is f or (value == f and type(value) is type(f)) for f in fine) and key != "r":
            return None
        if key == "init_lora_weights" and value in (True, False):
            return None
        return self.with_config(self.config | {key: value})

    def setting_lost(self, draw):
        key = draw.choice(["r", "target_modules", "rank_pattern"] + ["use_dora"] * self.config["use_dora"])
        return self.with_config({k: v for k, v in self.config.items() if k != key})

    def rank_changed(self, draw):
        return self.with_config(self.config | {"r": draw.choice([1, 3, 4, 7, 64, 2**40])})

    def dora_flipped(self, draw):
        return self.with_config(self.config | {"use_dora": not self.config["use_dora"]})

    def alpha_spoiled(self, draw):
        bad = [v for v in JUNK if v is not None and v not in (-1, 3.5, 10**30) or v is True]
        return self.with_config(self.config | {"lora_alpha": draw.choice(bad)})

    def targets_changed(self, draw):
        targets = draw.choice(
            [["0"], ["0", "1"], ["0", "1", "2", "3"], ["q_proj"], "0", "[01]", "all-linear", ["0", "1", "2", "a\nb"]]
        )
        return self.with_config(self.config | {"target_modules": targets})

    def unsupported(self, draw):
        return self.with_config(
            self.config
            | draw.choice(
                [
                    {"modules_to_save": ["2"]},
                    {"lora_bias": True},
                    {"bias": "all"},
                    {"init_lora_weights": "pissa"},
                    {"peft_type": "IA3"},
                    {"use_qalora": True},
                    {"target_parameters": ["0"]},
                    {"trainable_token_indices": [1]},
                ]
            )
        )

    def not_an_object(self, draw):
        return {**self.files, CONFIG: json.dumps(draw.choice(JUNK[:17])).encode()}

    # Foreign folders

    def file_lost(self, draw):
        name = draw.choice((CONFIG, WEIGHTS))
        return {k: v for k, v in self.files.items() if k != name}

    def pickled(self, draw):
        """Pickles that would run code, in the place of the weights, of the config, or beside them."""
        bomb = pickle.dumps(Bomb())
        return draw.choice(
            [
                {**self.files, WEIGHTS: bomb},
                {**self.files, CONFIG: bomb},
                {CONFIG: self.files[CONFIG], "adapter_model.bin": bomb},
                {"adapter_model.pt": bomb},
            ]
        )

    def other_model(self, draw):
        tensors = {"model.layers.0.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(3, 2)}
        return draw.choice(
            [
                self.with_tensors(tensors),
                {"config.json": b"{}", "model.safetensors": save(tensors)},
                {},
                {**self.with_tensors(tensors), CONFIG: b"{}"},
            ]
        )

    def wrong_base(self, draw):
        mark = draw.choice(["", "x", "0" * 12 + "-" + "0" * 12, "-", "\n"])
        return {**self.files, WEIGHTS: save(self.tensors, {"format": "pt", "minilora.base": mark})}

    @staticmethod
    def header(data: bytes):
        try:
            return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        except ValueError:
            return None

    WAYS = (
        truncated,
        grown,
        length_spoiled,
        noise,
        header_byte_spoiled,
        header_rewritten,
        poisoned,
        key_lost,
        key_renamed,
        key_added,
        reshaped,
        transposed,
        retyped,
        setting_spoiled,
        setting_lost,
        rank_changed,
        dora_flipped,
        alpha_spoiled,
        targets_changed,
        unsupported,
        not_an_object,
        file_lost,
        pickled,
        other_model,
        wrong_base,
    )


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


@pytest.fixture
def no_pickle(monkeypatch):
    def opened(*args, **kwargs):
        raise SystemExit("a pickle was opened")

    for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
        monkeypatch.setattr(pickle, name, opened)
    monkeypatch.setattr(torch, "load", opened)
    monkeypatch.setattr(torch.serialization, "load", opened)


def test_damage_is_told_and_changes_nothing(tmp_path, no_pickle):
    draw, model = random.Random(SEED), base()
    before, damages = state(model), [Damage(tmp_path / "lora", False), Damage(tmp_path / "dora", True)]
    done, messages = dict.fromkeys((way.__name__ for way in Damage.WAYS), 0), set()
    while sum(done.values()) < CASES:
        way = Damage.WAYS[sum(done.values()) % len(Damage.WAYS)]
        files = way(draw.choice(damages), draw)
        if files is None or any(files == d.files for d in damages):
            continue
        folder = tmp_path / "case"
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        case = f"{way.__name__} #{done[way.__name__]}"
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                load_adapter(model, folder)
        except ValueError as e:
            message = str(e)
        except BaseException as e:
            pytest.fail(f"{case}: {type(e).__name__}: {e}")
        else:  # a name that neither a tensor nor a module bears is left out, and said
            message = " ".join(str(w.message) for w in said)
            assert "no tensor of the adapter is meant by" in message, f"{case}: loaded without a word"
            assert way in (Damage.targets_changed, Damage.setting_spoiled), case
            remove(model)
        assert str(folder) in message and "\n" not in message and 30 < len(message) - len(str(folder)) < 2000, (
            case,
            message,
        )
        assert [type(m) for m in model] == [nn.Linear, nn.Linear, nn.Embedding], case
        assert same(state(model), before), case
        done[way.__name__] += 1
        messages.add(message.split(":")[1][:40] if ":" in message else message[:40])
    assert same(state(model), before)
    assert min(done.values()) == CASES // len(Damage.WAYS) and len(messages) > 10
    for d in damages:  # the control: undamaged, both load
        for name, data in d.files.items():
            (tmp_path / "case" / name).write_bytes(data)
        assert len(lora_parameters(load_adapter(base(), tmp_path / "case"))) in (6, 9)
