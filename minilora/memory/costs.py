"""What follows from the shapes without playing a step: bytes of the weights as stored, bytes moved, operations."""

from .ledger import WIDTH
from .models import ModelSpec
from .run import Run, Training


def four_bit_bytes(count: int, double: bool) -> int:
    """A weight of so many elements as `quant.Linear4bit` stores it: 4.126953125 bits each, and 4 bytes (QLoRA, 3)."""
    blocks = -(-count // 64)
    return blocks * 32 + (blocks + -(-blocks // 256) * 4 + 4 if double else blocks * 4)


def gptq_bytes(out: int, inp: int, group: int, zeros: bool = False) -> int:
    """A weight as GPTQ stores it; with `zeros` its zero points alone."""
    groups = -(-inp // (group or inp))
    return groups * out // 2 if zeros else out * inp // 2 + groups * out // 2 + 2 * groups * out + 4 * inp


def weight_bytes(spec: ModelSpec, run: Run) -> tuple[int, int]:
    """The model's weights as stored, without adapters: of a layer, the largest if they differ, and of what stands
    outside the layers."""
    return max(layer_bytes(kind, run) for kind, _ in spec.kinds()), spec.outer_parameters * WIDTH[run.outer_dtype]


def all_layers_bytes(spec: ModelSpec, run: Run) -> int:
    """Of all layers' weights as stored, without adapters."""
    return sum(len(layers) * layer_bytes(kind, run) for kind, layers in spec.kinds())


def layer_bytes(kind: ModelSpec, run: Run) -> int:
    """Of one layer's weights as stored, without adapters."""
    width, matrices = WIDTH[run.outer_dtype], kind.linears()
    if run.method != "qlora":
        return kind.layer_parameters * width
    biases, norms = sum(m.out * m.bias for m in matrices), kind.layout.norms * kind.norm_parameters
    if run.quantisation == "gptq":
        four_bit = sum(gptq_bytes(m.out, m.inp, run.group) for m in matrices)
    else:
        four_bit = sum(four_bit_bytes(m.out * m.inp, run.double_quant) for m in matrices)
    rest = norms + sum(s.parameters for s in kind.bare())
    return four_bit + biases * WIDTH[run.dtype] + rest * width


def adapter_parameters(spec: ModelSpec, run: Run) -> int:
    """Of the adapters of a layer, the one with most of them if layers differ."""
    return max(sum(m.adapter(run.rank) for m in run.targets(spec, layers[0])) for _, layers in spec.kinds())


def preparation(spec: ModelSpec, run: Run) -> int:
    """What `prepare_model_for_kbit_training` holds at most: parameter after parameter becomes fp32, and at the last
    table both versions of it are there. 0 where nothing is prepared."""
    if not run.upcasts or run.upcast != "all":
        return 0
    return all_layers_bytes(spec, run) + weight_bytes(spec, run)[1] + spec.vocab * spec.embedding * WIDTH[run.dtype]


def visitors(spec: ModelSpec, run: Training) -> list[tuple[str, int]]:
    """Weights that are on the device for a while: of a streamed base, or of one that is sharded, gathered from all
    cards. While a layer computes, the next one is fetched."""
    layer, outer = weight_bytes(spec, run)
    adapters = 4 * adapter_parameters(spec, run)
    if run.streamed:
        return [("a layer", layer), ("the next layer, or the head", max(layer, head_bytes(spec, run)))]
    if run.zero == 3 and run.software.fsdp1:
        return [("what is no layer", outer)]
    if run.zero == 3 and run.cards > 1:
        return [("a layer", layer + adapters), ("the next layer", layer + adapters), ("what is no layer", outer)]
    return []


def gathered_layer(spec: ModelSpec, run: Training) -> int:
    """What torch's first FSDP gathers of a layer: its parameters, adapters in their dtype; of a 4-bit base the codes
    alone, as the rest of it are no parameters."""
    adapters = WIDTH[run.adapter_dtype] * adapter_parameters(spec, run)
    norms, matrices = spec.layout.norms * spec.norm_parameters, sum(m.out * m.inp for m in spec.linears())
    if run.method != "qlora":
        return spec.layer_parameters * WIDTH[run.dtype] + adapters
    zeros = sum(gptq_bytes(m.out, m.inp, run.group, zeros=True) for m in spec.linears()
                if run.quantisation == "gptq")
    return matrices // 2 + zeros + norms * WIDTH[run.norm_dtype] + adapters


def head_bytes(spec: ModelSpec, run: Run) -> int:
    """Of the output head."""
    return spec.vocab * spec.embedding * WIDTH[run.outer_dtype]


def moved(spec: ModelSpec, run: Run) -> dict[str, int]:
    """Bytes that go over the wire to other cards (each sends as many), or over the bus from the host, in a step.

    By a ring (Patarasuk & Yuan 2009). As `train` under torchrun, counted: what is no layer stays from forward to
    backward, and gradients travel once, after the last forward and backward that add to them.
    """
    if not isinstance(run, Training):
        return {}
    layer, outer = weight_bytes(spec, run)
    weights = all_layers_bytes(spec, run) + outer
    trained = (weights if run.method == "full"
               else 4 * spec.lora_parameters(run.rank, run.target_modules, run.software.peft))
    if run.streamed:
        rows = run.batch * run.seq * spec.embedding * WIDTH[run.dtype]
        # two layers stay where the pass turns round: the last one at the head, the first two between steps
        once = {"layers, forward and backward": max(2 * spec.layers - 3, 0) * layer,
                "head": head_bytes(spec, run) * (spec.layers > 1), "rows of the embedding": rows,
                "saved inputs, away and back": 2 * run.offload * spec.layers * rows}
        return {what: size * run.accumulation for what, size in once.items() if size}
    if run.cards == 1:
        return {}
    others = lambda size: size * (run.cards - 1) // run.cards
    if run.zero < 3:
        return {"gradients, summed": others(trained), "gradients or weights, handed round": others(trained)}
    every = weights + (trained if run.method != "full" else 0)
    return {"weights, gathered in forward": others(every) * run.accumulation,
            "layers, gathered in backward": others(every - outer) * run.accumulation,
            "gradients, summed": others(trained)}


def flops(spec: ModelSpec, run: Training) -> int:
    """Floating-point operations of a step's matrix products and attention, those of adapters left out: two a
    multiply-and-add. Forward, again if recomputed, the inputs' gradients, and if they train the weights'."""
    full = run.method == "full"
    passes, tokens = 2 + run.checkpointing + full, run.batch * run.seq
    layers = sum(len(layers) * active(kind) for kind, layers in spec.kinds())
    # scores and their product with the values, half of them masked; backward makes five products of two
    attention = spec.layers * 2 * run.seq * spec.heads * spec.head_dim * (1 + run.checkpointing + 2.5)
    head = 2 * spec.vocab * spec.embedding * (2 + full)
    return int(tokens * (2 * layers * passes + attention + head)) * run.accumulation


def active(kind: ModelSpec) -> int:
    """Weights of a layer's matrices that a token goes through."""
    experts = sum(s.out * s.inp * min(s.count, kind.experts_a_token or 1) for s in kind.bare())
    return sum(m.out * m.inp for m in kind.linears()) + experts
