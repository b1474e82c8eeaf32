"""One training step on the ledger: the model, its optimizer's state, forward, backward, the optimizer's step."""

from dataclasses import dataclass, fields

from .costs import gathered_layer, visitors
from .decoders.decoder import Decoder
from .fsdp import Gathering
from .ledger import Tensor
from .models import ModelSpec
from .ops import Ops
from .optimizers import OPTIMIZERS
from .run import Run, Serving, Training


def simulate_step(spec: ModelSpec, run: Training, layers: int) -> Ops:
    """A step of `layers` layers, from the second on: the optimizer has its state."""
    software = run.software
    ops = Ops(autocast=run.autocast, shares=run.shares, offload=run.offload or software.offloads and run.checkpointing,
              reentrant=software.reentrant, stored=run.stored)
    model, optimizer = decoder(ops, spec, run, layers), OPTIMIZERS[run.optimizer]
    model.targets = ops.state(run.batch * run.seq, 8, "inputs", "targets")
    state = [t for leaf, rows in ops.leaves for t in optimizer.state(ops, leaf, rows)]
    if run.cards > 1 and run.zero < 2:  # DistributedDataParallel sums gradients in buckets of its own
        state += [ops.state(leaf.count, leaf.width, "buckets", "gradients to be summed") for leaf, _ in ops.leaves]
    reference = reference_of(model, run, layers) if run.reference_model else None
    for _ in range(min(run.accumulation, 2)):  # from the second on gradients are there before the forward
        ops.place, ops.module = ("forward", None), ""
        guests = [ops.new(size, 1, name, also=True, part="visiting weights") for name, size in visitors(spec, run)]
        if software.fsdp1 and run.zero == 3:
            ops.gathering = Gathering(ops, gathered_layer(spec, run), flat=run.method == "full")
        loss = model.loss()
        scores = reference.as_reference() if reference else None
        ops.casts.clear()
        ops.backward(loss)
        if ops.gathering:
            ops.gathering.finish()
        del guests, scores
    ops.place, ops.module, ops.part = ("optimizer", None), run.optimizer, "optimizer temporaries"
    optimizer.update(ops, ops.leaves)
    return ops


@dataclass(frozen=True)
class Frozen(Training):
    """A run of which nothing trains."""

    @property
    def adapts(self) -> bool:
        return False


def reference_of(model: Decoder, run: Training, layers: int) -> Decoder:
    """The model that a reference forward goes through: with adapters the same one, else a frozen copy of it."""
    if run.method != "full":
        return model
    frozen = Frozen(**{f.name: getattr(run, f.name) for f in fields(run)} | {"method": "lora"})
    copy = decoder(model.ops, model.spec, frozen, layers)
    copy.ids, copy.targets = model.ids, model.targets
    return copy


def simulate_prefill(spec: ModelSpec, run: Serving, layers: int) -> Ops:
    """The forward over the prompts, with the cache and every adapter in place: when serving holds most."""
    ops = Ops()
    model = decoder(ops, spec, run, layers)
    others = [ops.state(t.count, t.width, "adapters", "the other adapters") for t, _ in ops.leaves
              for _ in range(run.adapters - 1)]
    ops.recording, model.cache = False, []
    y = model.decode()  # N C
    model.head_of(Tensor(run.batch * spec.hidden, y.width, y.storage))  # of the last position alone
    del others
    return ops


def decoder(ops: Ops, spec: ModelSpec, run: Run, layers: int) -> Decoder:
    """Ours or transformers', as the run's stack has it."""
    family = spec.layout
    own = family.own_decoder if run.own_decoder(spec) else None
    return (own or family.decoder)(ops, spec, run, layers)
