"""`memory --config` on the default config of many architectures: an answer or one line, how long, and how much memory.

Each runs as a whole command on one core. The configs are those that transformers makes when asked for nothing, so their
sizes are those of a released model. "off" is the difference of our total from transformers' own on the meta device.

    python tests/bench/current_configs.py [TYPE ...]        (some six minutes for all)
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TYPES = """llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next gemma gemma2 gemma3_text gemma3 gemma3n phi phi3
phimoe gpt2 gpt_neo gpt_neox gpt_bigcode gptj opt bloom falcon falcon_mamba mamba mamba2 bamba jamba olmo olmo2 olmo3 olmoe
granite granitemoe glm glm4 glm4_moe smollm3 cohere cohere2 starcoder2 stablelm deepseek_v2 deepseek_v3 gpt_oss llama4
llama4_text nemotron helium ernie4_5 exaone4 minimax lfm2 dots1 hunyuan_v1_dense arcee seed_oss apertus t5 bart bert roberta
modernbert deberta-v2 vit qwen2_vl qwen2_5_vl llava whisper clip""".split()


def total_on_meta(kind: str) -> int:
    """transformers' own count of the class that a config of this type means."""
    import torch
    from transformers import AutoConfig

    from minilora.memory.traced_models import class_of

    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = class_of(config)[0]._from_config(config)
    return sum(p.numel() for p in model.parameters())


def command(folder: str) -> tuple[int, str, str, float, float, float]:
    """Exit code, what was printed, what was said on stderr, seconds by the clock and of the core, and the most memory
    in GiB of any command so far."""
    start, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.Popen(
        [sys.executable, "-m", "minilora", "memory", "--config", folder, "--targets", "all-linear", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    out, err = run.communicate(timeout=600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    core = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return run.returncode, out, err, time.time() - start, core, after.ru_maxrss / 2**20


def row(kind: str) -> str:
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.for_model(kind)
        (Path(folder) / "config.json").write_text(json.dumps(config.to_dict(), default=str))
        code, out, err, seconds, core, most = command(folder)
    cost = f"{code} {seconds:5.1f} s ({core:4.1f} s of the core)  up to {most:4.2f} GiB"
    if code:
        what = err.strip().splitlines()
        return f"{kind:18} {cost}  lines {len(what)}: {what[-1][:140]}"
    answer = json.loads(out)
    how = "trace" if "depths" in answer else "closed form"
    return f"{kind:18} {cost}  {how}, peak {answer['peak'] / 2**30:.2f} GiB"


if __name__ == "__main__":
    for kind in sys.argv[1:] or TYPES:
        print(row(kind), flush=True)
