"""What papers say of memory, each claim put to our arithmetic: reproduced, or not, and why."""

from dataclasses import dataclass, replace
from functools import cache

from .bill import estimate
from .costs import four_bit_bytes
from .models import ModelSpec
from .run import Training

GB, MIB, GIB, TB = 1e9, 2**20, 2**30, 1e12
QV = ("q_proj", "v_proj")
REPRODUCED, NOT = "reproduced", "not reproducible"


@dataclass(frozen=True)
class Claim:
    """source: paper and place. says: its words, with their number. ours: what the arithmetic gives, and how."""

    source: str
    says: str
    ours: str
    verdict: str


@cache
def claims() -> tuple[Claim, ...]:
    """All claims, judged by computation: a verdict changes if the accountant does."""
    gpt3 = ModelSpec.preset("gpt3-175b")
    weights = 2 * gpt3.parameters
    small = 2 * gpt3.lora_parameters(4, QV)
    lora = estimate(gpt3, Training("lora", 4, QV, batch=1, seq=2048, checkpointing=True)).peak
    full = {"fp32 AdamW, 16 bytes a parameter": 16 * gpt3.parameters,
            "16-bit AdamW, 8 bytes": 8 * gpt3.parameters,
            "16-bit weights and gradients, fp32 Adam, 12 bytes": 12 * gpt3.parameters}
    nearest = min(full, key=lambda recipe: abs(full[recipe] - 1.2 * TB))
    medium = ModelSpec.preset("gpt2-medium")
    pairs = 2 * 4 * 2 * medium.hidden * medium.layers  # rank 4 on q and v, (in + out) each
    bits = 8 * four_bit_bytes(2**20, True) / 2**20
    single = 8 * four_bit_bytes(2**20, False) / 2**20
    sixty_five = ModelSpec("llama-65b", "llama", 80, 8192, 64, 64, 128, 22016, 32000, 2048, False)
    adam = Training("qlora", 64, "all-linear", batch=1, seq=512, checkpointing=True)
    qlora, paged = (estimate(sixty_five, replace(adam, optimizer=name)).peak for name in ("adamw", "sgd"))
    full_65 = estimate(sixty_five, Training("full", batch=1, seq=512, checkpointing=True)).parts
    state_65 = sum(full_65.get(part, 0) for part in ("trainable weights", "gradients", "optimizer"))
    stream = estimate(gpt3, Training("qlora", 4, QV, seq=2048, checkpointing=True, base="host"))
    moved = sum(stream.moved.values())
    return (
        Claim("LoRA (2106.09685), 4.2", "training GPT-3 needs 1.2 TB with Adam",
              f"1.2 TB is {1.2 * TB / gpt3.parameters:.2f} bytes a parameter; the nearest recipe, {nearest}, gives "
              f"{full[nearest] / TB:.2f} TB; fp32 AdamW {16 * gpt3.parameters / TB:.1f} TB",
              judge(full[nearest], 1.2 * TB)),
        Claim("LoRA, 4.2", "LoRA brings it down to 350 GB",
              f"the 16-bit weights alone are {weights / GB:.1f} GB; a step with adapters on q and v (r = 4), one row "
              f"of 2,048 tokens, checkpointing, holds {lora / GB:.1f} GB: 350 GB is the weights, nothing else",
              judge(weights, 350 * GB)),
        Claim("LoRA, 4.2", "VRAM falls by up to two thirds",
              f"1 - 350 / 1200 = {1 - 350 / 1200:.0%} of the paper's own figures; of our 16-bit AdamW "
              f"{1 - lora / (8 * gpt3.parameters):.0%}", judge(1 - 350 / 1200, 2 / 3, 0.08)),
        Claim("LoRA, 4.2", "the checkpoint is 35 MB, 10,000 times smaller than 350 GB",
              f"r = 4 on q and v: {gpt3.lora_parameters(4, QV):,} parameters, {small / MIB:.1f} MiB in 16 bits, "
              f"{weights / small:,.0f} times smaller", judge(small, 35 * MIB)),
        Claim("LoRA, 4.2", "25% faster training: 32.5 against 43.1 tokens/s a card",
              f"43.1 / 32.5 is {43.1 / 32.5 - 1:.0%} more tokens a second; 25% it is only as time a token, "
              f"{1 - 32.5 / 43.1:.0%} less", judge(1 - 32.5 / 43.1, 0.25)),
        Claim("LoRA, table 3", "GPT-2 medium trains 0.35M parameters",
              f"r = 4 on q and v is {pairs:,}, and the released checkpoint of 1.5 MB is as many in "
              f"fp32, {4 * pairs:,} bytes", judge(pairs, 0.35e6)),
        Claim("QLoRA (2305.14314), 2 and 3",
              "NF4 with double quantisation costs 4.127 bits a parameter, 0.373 less than without",
              f"counted from stored bytes: {bits:.3f}, {single - bits:.3f} less", judge(bits, 4.127)),
        Claim("QLoRA, 1", "full 16-bit fine-tuning of a 65B model needs more than 780 GB",
              f"it is {780 * GB / sixty_five.parameters:.1f} bytes a parameter: 16-bit weights and gradients and fp32 "
              f"Adam states are 12, {12 * sixty_five.parameters / GB:.0f} GB; pure 16-bit AdamW is "
              f"{state_65 / GB:.0f} GB, fp32 {16 * sixty_five.parameters / GB:.0f} GB",
              judge(12 * sixty_five.parameters, 780 * GB)),
        Claim("QLoRA, 1", "QLoRA fine-tunes it on less than 48 GB",
              f"one row of 512 tokens, rank 64 on all linears, checkpointing: {qlora / GB:.1f} GB with fp32 adapters' "
              f"Adam states on the card, {paged / GB:.1f} GB with them paged out to the host, as QLoRA does",
              REPRODUCED if paged < 48 * GB else NOT),
        Claim("Fuyou (2403.06504)", "a model of 175B is fine-tuned on one card of 24 GB",
              f"not with its weights on the card ({stream.host / GIB:.1f} GiB in NF4); streamed layer by layer under "
              f"LoRA (r = 4, q and v, one row of 2,048 tokens) the card holds {stream.peak / GIB:.1f} GiB and "
              f"{moved / GIB:.0f} GiB cross the bus a step. Fuyou trains every weight and must write its states back: "
              f"12 bytes a parameter, {12 * gpt3.parameters / TB:.1f} TB",
              REPRODUCED if stream.peak < 24 * GB else NOT),
    )


def judge(ours: float, theirs: float, within: float = 0.05) -> str:
    """Reproduced if the two differ by at most 5%."""
    return REPRODUCED if abs(ours / theirs - 1) <= within else NOT
