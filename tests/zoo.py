"""The zoo: small random models of many architectures, each under adapters, from birth to the merged checkpoint.

    python tests/zoo.py [NAME ...] [--compile] [--out table.md]     one line a case, as it goes, and a table

Each case is an architecture, targets ("usual", PEFT's own choice where it has one; "all-linear") and a dtype. A case is
right if every check holds, refused if minilora raised its own one-line ValueError; anything else is a failure.

How far outputs may lie apart is derived, not chosen. The reference is the plain model in fp64 with W + s B A as its
weights, worked out here from the adapter's file. `own` is how far the unmerged model lies from it: what its dtype's
roundings come to in this architecture. Merging, and PEFT's model, may differ by 2e-6 (1e-5) or by a few times that.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import re
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
from minilora import LoRAConfig, inject, load_adapter, lora_parameters, merge, remove, save_adapter, unmerge
from minilora.injection import adapter_layers, without_gradient

transformers.logging.set_verbosity_error()
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, "vocab_size": 64, "pad_token_id": 0,
       "bos_token_id": 1, "eos_token_id": 2}
MOE = SIZES | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
               "shared_expert_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
               "first_k_dense_replace": 1, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8,
               "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
IMAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
         "patch_size": 8, "num_labels": 3}
SPEECH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "vocab_size": 20,
          "conv_dim": (16, 16), "conv_kernel": (10, 4), "conv_stride": (5, 4), "num_feat_extract_layers": 2,
          "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "num_labels": 3,
          "classifier_proj_size": 16}
PAIR = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
SSM = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0,
       "bos_token_id": 1,
       "eos_token_id": 2}

DECODERS = {name: SIZES for name in (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox", "stablelm",
    "olmo",
    "olmo2", "cohere", "starcoder2", "granite", "smollm3", "glm", "helium", "nemotron", "persimmon")}
DECODERS |= {"helium": SIZES | {"head_dim": 8}, "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}, "bloom": SIZES | {"n_layer": 2, "n_head": 4},
             "falcon": SIZES | {"new_decoder_architecture": False, "ffn_hidden_size": 64}, "gpt2": GPT,
             "gptj": GPT | {"rotary_dim": 4}, "codegen": GPT | {"rotary_dim": 4}, "gpt_bigcode": GPT,
             "gpt_neo": SIZES | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
             "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64, "max_seq_len": 64},
             "mixtral": MOE, "qwen2_moe": MOE, "qwen3_moe": MOE, "olmoe": MOE, "deepseek_v3": MOE, "gpt_oss": MOE,
             "mamba": SSM, "falcon_mamba": SSM, "mamba2": 
             SSM | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
             "rwkv": SIZES | {"attention_hidden_size": 32}}
ENCODERS = {name: SIZES for name in ("bert", "roberta", "electra", "camembert", "xlm-roberta", "mpnet", "deberta",
                                     "deberta-v2",
                                     "squeezebert", "ernie")}
ENCODERS |= {"distilbert": {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
                            "max_position_embeddings": 64},
             "squeezebert": SIZES | {"embedding_size": 32}, "albert": SIZES | {"embedding_size": 16},
             "modernbert": SIZES | {"cls_token_id": 1, "sep_token_id": 2}}
PAIRS = {name: PAIR for name in ("bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot")}
PAIRS |= {name: {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4,
                 "pad_token_id": 0,
                 "decoder_start_token_id": 0} for name in ("t5", "mt5", "umt5")}
VISION = {name: IMAGE for name in ("vit", "beit", "dinov2", "vit_msn", "ijepa")}
VISION |= {name: {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "image_size": 32, "patch_size": 4,
                  "window_size": 4,
                  "num_labels": 3} for name in ("swin", "swinv2")}
# its blocks are added to the stream times 1e-6 at the start, which hides whatever is adapted in them
VISION["convnext"] = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": 3,
                      "layer_scale_init_value": 1.0}
AUDIO = {name: SPEECH for name in ("wav2vec2", "hubert", "wavlm", "unispeech", "data2vec-audio")}

IDS = torch.arange(2, 34).view(2, 16) * 7 % 61 + 3
KINDS = [(DECODERS, AutoModelForCausalLM, {"input_ids": IDS}), (ENCODERS, AutoModelForMaskedLM, {"input_ids": IDS}),
         (PAIRS, AutoModelForSeq2SeqLM, {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}),
         (VISION, AutoModelForImageClassification, {"pixel_values": torch.linspace(-1, 1, 6144).view(2, 3, 32, 32)}),
         (AUDIO, AutoModelForAudioClassification, {"input_values": torch.linspace(-1, 1, 1600).sin().view(2, 800)})]
ZOO = {name: (sizes, auto, inputs) for models, auto, inputs in KINDS for name, sizes in models.items()}
if importlib.util.find_spec("diffusers"):  # convolutions among its usual targets
    ZOO["unet"] = ({"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8,
                    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 8,
                    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32}, None,
                   {"sample": torch.linspace(-1, 1, 512).view(2, 4, 8, 8), "timestep": torch.tensor(7),
                    "encoder_hidden_states": torch.linspace(-1, 1, 320).sin().view(2, 5, 32)})
QUICK = ("llama", "gpt2", "mixtral", "mamba", "bert", "deberta", "t5", "vit", "swinv2", "wav2vec2", "wavlm")
FALLBACK = ("q_proj", "v_proj", "query", "value", "q", "v", "qkv_proj", "in_proj", "query_key_value", "q_lin", "v_lin")


def make(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """The same small model at every call."""
    sizes, auto, _ = ZOO[name]
    torch.manual_seed(0)
    if auto is None:
        model = importlib.import_module("diffusers").UNet2DConditionModel(**sizes).to(dtype)
    else:
        known = AutoConfig.for_model(name)
        sizes = {key: v for key, v in sizes.items() if hasattr(known, key) or key in known.attribute_map}
        model = auto.from_config(AutoConfig.for_model(name, **sizes), dtype=dtype)
    # away from the tiny start of most, so that a difference shows; T5's attention divides by no root of its width, and
    # three times its weights would make of a rounding in its scores a hundred
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and name not in ("t5", "mt5", "umt5"):
                p.mul_(3)
    return model.eval()


def outputs(model: torch.nn.Module, name: str) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    inputs = {key: t.to(dtype) if t.is_floating_point() else t for key, t in ZOO[name][2].items()}
    torch.manual_seed(3)
    if name == "unet":
        return model(**inputs).sample
    out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out[0]


def usual(model: torch.nn.Module) -> tuple[str, ...]:
    """PEFT's own targets for the architecture, or the attention's usual names."""
    if not hasattr(model.config, "model_type"):
        return "to_q", "to_v", "conv1", "conv_shortcut"
    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) or hasattr(m, "nf")]
    ends = {n.rpartition(".")[2] for n in linears}
    return tuple(t for t in known or FALLBACK if t.rpartition(".")[2] in ends) or tuple(sorted(ends))[:2]


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, as a share of the largest output."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-6))


def double(model: torch.nn.Module) -> torch.nn.Module:
    """In fp64; stacked experts one by one, since torch has no grouped product in fp64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.double()


def dense(name: str, dtype: torch.dtype, folder: str, dead: list[str]) -> torch.nn.Module:
    """The plain model of `dtype`, then in fp64, with W + s B A in the place of every weight that the file adapts, but
    for those that do nothing in the unmerged model."""
    model, values = double(make(name, dtype)), json.loads(Path(folder, "adapter_config.json").read_text())
    tensors, end = load_file(Path(folder, "adapter_model.safetensors")), ".lora_A.weight"
    for stem in [key.removesuffix(end) for key in tensors if key.endswith(end)]:
        A, B = (tensors[f"{stem}.lora_{which}.weight"].double() for which in "AB")
        if (path := stem.removeprefix("base_model.model.")) in dead:
            continue
        patterns = (values[p] or {} for p in ("rank_pattern", "alpha_pattern"))
        rank, alpha = (next((v for key, v in p.items() if re.fullmatch(rf"(.*\.)?({key})", path)), values[usual])
                       for p, usual in zip(patterns, ("r", "lora_alpha")))
        module, delta = model.get_submodule(path), alpha / rank * B.flatten(1) @ A.flatten(1)
        delta = (delta.T if hasattr(module, "nf") else delta).view(module.weight.shape)
        module.weight = torch.nn.Parameter(module.weight.detach() + delta)  # a new one: it may be tied to an embedding
    return model


class Failure(Exception):
    pass


def need(ok, what: str) -> None:
    if not ok:
        raise Failure(what)


def case(name: str, targets: str, dtype: torch.dtype, compiled: bool = False) -> str:
    """"right", with what was named; a ValueError of minilora's passes; a `Failure` says which check did not hold."""
    model, eps = make(name, dtype), torch.finfo(dtype).eps
    before = {key: t.clone() for key, t in model.state_dict().items()}
    try:
        with torch.no_grad():
            plain, again = outputs(model, name), outputs(model, name)
            # torch's matmul may take another kernel where a weight requires a gradient: compare with the frozen base
            frozen = outputs(make(name, dtype).requires_grad_(False), name)
    except Exception as e:
        return f"base fails by itself: {type(e).__name__}"
    if not torch.equal(plain, again):
        return "base differs from itself in two forwards"
    inject(model, LoRAConfig(2, 4, usual(model) if targets == "usual" else "all-linear"))
    with torch.no_grad():
        born = outputs(model, name)
        need(torch.equal(born, frozen), f"not equal at birth, off by {far(born, frozen):.1e}")
    named = []
    for checkpointing in (False, True):
        if checkpointing:
            if not getattr(model, "supports_gradient_checkpointing", name == "unet"):
                break
            if name == "unet":
                model.enable_gradient_checkpointing()
            else:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        optimizer = torch.optim.SGD(lora_parameters(model), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            outputs(model, name).float().square().mean().backward()
            torch.nn.utils.clip_grad_norm_(lora_parameters(model), 1.0)
            optimizer.step()
        named = list(without_gradient(model, after_backward=True))
    if checkpointing and model.is_gradient_checkpointing:
        (model.disable_gradient_checkpointing if name == "unet" else model.gradient_checkpointing_disable)()
    model.eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for p in lora_parameters(model):
            p.add_(torch.randn_like(p) * 0.02)
        trained = outputs(model, name)
    if len(named) == len(adapter_layers(model)):
        return "right; all adapters dead, and named"
    need(trained.isfinite().all() and far(trained, plain) > 1e-5, "the adapters change nothing")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_adapter(model, f"{folder}/a")
        own = load_adapter(make(name, dtype), f"{folder}/a")
        need(far(outputs(own, name), trained) <= 1e-5, "our own reload differs")
        exact, base = outputs(dense(name, dtype, f"{folder}/a", named), name), outputs(double(make(name, dtype)), name)
        own, usually = far(trained, exact), far(plain, base)  # what rounding does to it, and to the base
        need(own <= 8 * max(usually, eps), f"off by {own:.1e} from the dense computation, the base by {usually:.1e}")
        try:
            theirs = outputs(peft.PeftModel.from_pretrained(make(name, dtype), f"{folder}/a"), name)
        except Exception as e:
            need("minilora" not in str(e), f"PEFT's reload: {e}")
            named.append(f"(PEFT refuses such an adapter: {type(e).__name__})")
        else:
            apart, off = far(theirs, trained), far(theirs, exact)
            if apart > max(1e-5 if dtype == torch.float32 else eps, 4 * own):
                need(off > 4 * max(own, eps), f"PEFT's reload differs by {apart:.1e}, and is nearer to the dense one")
                named.append(f"(PEFT is off by {off:.1e} from the dense computation, we by {own:.1e})")
        if compiled:
            torch._dynamo.reset()
            fast = torch.compile(model, backend="aot_eager")
            off = far(outputs(fast, name), trained)
            need(off <= max(1e-5 if dtype == torch.float32 else eps, 4 * own), f"compiled it differs by {off:.1e}")
        merge(model)
        merged = outputs(model, name)
        if not any(n for n in named if not n.startswith("(")):  # merged, a dead adapter comes to life
            off, most = far(merged, trained), max(2e-6 if dtype == torch.float32 else eps, 4 * own)
            need(off <= most, f"merging differs by {off:.1e}, the dtype allows {most:.1e}")
        unmerge(model)
        need(torch.equal(outputs(model, name), trained), "unmerge is not exact")
        try:
            twin = load_adapter(make(name, dtype), f"{folder}/a")
            merge(twin, permanent=True)
        except ValueError as e:  # a tied weight, say
            named.append(f"(no permanent merge: {str(e)[:40]})")
        else:
            twin.save_pretrained(f"{folder}/m")
            here = {"torch_dtype" if name == "unet" else "dtype": dtype}
            back = type(twin).from_pretrained(f"{folder}/m", **here).eval()
            if far(outputs(back, name), merged) > 1e-5:
                make(name, dtype).save_pretrained(f"{folder}/b")
                base = type(twin).from_pretrained(f"{folder}/b", **here).eval()
                need(not torch.equal(outputs(base, name), plain), "the merged checkpoint differs")
                named.append("(the base itself comes back otherwise from its checkpoint: a table that it makes anew)")
        remove(model)
        after = model.state_dict()
        same = after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
        need(same, "remove is not exact")
        need(torch.equal(outputs(model, name), plain), "after remove the outputs differ")
    notes = [n for n in named if n.startswith("(")]
    count = len(named) - len(notes)
    return "right" + (f"; no gradient: {count} named" if count else "") + "".join(f" {n}" for n in notes)


def result(name: str, targets: str, dtype: torch.dtype, compiled: bool = False) -> tuple[str, list[str]]:
    """One case in words, and what was warned of."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(record=True) as said, contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("always")
        try:
            words = case(name, targets, dtype, compiled)
        except Failure as e:
            words = f"FAILED: {e}"
        except ValueError as e:
            ours = "minilora" in str(e.__traceback__.tb_next.tb_frame.f_code.co_filename) or _from_us(e)
            words = ("refused: " if ours and "\n" not in str(e) else "TRACEBACK: ValueError: ") + str(e)[:90]
        except Exception as e:
            words = f"TRACEBACK: {type(e).__name__}: {str(e).splitlines()[0][:90] if str(e) else ''}"
    ours = [str(w.message) for w in said if "reads its weight and does not call" in str(w.message)]
    return words + (f"; {len(ours)} dead named" if ours else ""), ours


def _from_us(e: BaseException) -> bool:
    last = e.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    return f"{Path(__file__).resolve().parents[1] / 'minilora'}" in last.tb_frame.f_code.co_filename


def main(names: list[str], compiled: bool, out: Path | None) -> None:
    rows, counts = [], Counter()
    for name in names or ZOO:
        for targets in ("usual", "all-linear"):
            for dtype in (torch.float32, torch.bfloat16):
                words, _ = result(name, targets, dtype, compiled)
                counts[re.split("[:;(]", words)[0].strip()] += 1
                rows.append(f"| {name} | {targets} | {str(dtype)[6:]} | {words} |")
                print(rows[-1], flush=True)
    summary = ", ".join(f"{n} {what}" for what, n in counts.items())
    print(summary)
    if out:
        out.write_text("\n".join(["| model | targets | dtype | result |", "|---|---|---|---|", *rows, "", summary, ""]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *ZOO], metavar="NAME")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    main(args.names, args.compile, args.out)
