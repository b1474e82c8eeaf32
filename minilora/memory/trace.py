"""What one training step would allocate on a GPU, without one: `with trace() as t: step()`.

The step runs on fake tensors, which have a shape, a dtype and a storage of a known size but no data. Every operator
passes through a dispatch mode, which sees each storage born and, through a weak reference, sees it die. What PyTorch's
CUDA kernels would do otherwise than its CPU kernels (cuda.py) is put in the CPU's place while the trace lasts.

    with fake():
        step = training_step(LlamaConfig(...), method="lora")  # step.py's, or any model, optimizer and step of your own
    t = measure(step)  # traces the second step: optimizers make their state in the first
    print(t)

Bytes are counted three ways: `requested`; allocated, each storage rounded up to 512 bytes (`peak`); and `reserved`, by
a replay of the caching allocator's pools. Not in them, because no storage of an operator's result: scratch that a
kernel takes and gives back (flash attention's backward: 4 bytes an element of q, and per query head dk and dv when
heads are grouped), cuBLAS's workspace (`CUBLAS_WORKSPACE`), the CUDA context, and fragmentation from before the step.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple
from unittest.mock import patch
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (DataDependentOutputException, DynamicOutputShapeException, FakeTensor,
                                           FakeTensorMode)
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from ..insert import table
from .cuda import CUBLAS_WORKSPACE, CachingAllocator, follow_cuda, rounded

aten = torch.ops.aten


# ---------------------------------------------------------------- fake tensors


class Fake(FakeTensorMode):
    """Fake tensors whose value, when a step asks for one (`loss.item()`, Adam's step count, a seed), is 1."""

    def dispatch(self, func, types, args=(), kwargs=None):
        try:
            out = super().dispatch(func, types, args, kwargs)
            # torch's memo of conversions holds weak references, which would keep `module.to(dtype)` from swapping
            self.fake_tensor_converter.meta_converter.tensor_memo.clear()
            return out
        except DataDependentOutputException:
            return 1
        except DynamicOutputShapeException:
            raise ValueError(f"{func} gives a shape that depends on data, and fake tensors have none: take it out of "
                             "the step, or trace the real tensors (real=True)") from None


FAKE = Fake()  # one for all: fake tensors of two modes do not mix


def fake() -> Fake:
    """In this context every new tensor is fake: models of any size cost nothing."""
    return FAKE


# ---------------------------------------------------------------- the trace


@dataclass(eq=False, slots=True)
class Block:
    """One storage: what it is, which operator of which module made it, and from which moment to which it lived."""

    bytes: int
    kind: str
    op: str
    module: str
    born: int  # index in the timeline; 0: it was there before the trace
    died: int | None = None

    @property
    def allocated(self) -> int:
        return rounded(self.bytes)


class Moment(NamedTuple):
    """The live bytes after one storage was born or died, and where the step was: phase, module and operator."""

    requested: int
    allocated: int
    reserved: int
    phase: str
    module: str
    op: str

    def __str__(self):
        return f"{self.phase}, {self.module or 'outside the model'}, {self.op}"


class Trace(TorchDispatchMode):
    """Follows every storage of the operators that run inside it; see `trace`. After it:

    Attributes:
        peak, requested, reserved: the largest number of bytes live at once: rounded to 512, as asked for, and as held by
            the caching allocator.
        moment: the `Moment` of the peak.
        parts: kind -> allocated bytes at the peak; they sum to `peak`.
        held: the `Block`s alive at the peak, the largest first.
        timeline: a `Moment` for every birth and death; the first is what was there before.
    """

    def __init__(self, kernels: str, real: bool):
        super().__init__()
        self.cuda, self.real = kernels == "cuda" and not real, real
        self.blocks: dict[int, Block] = {}  # live storage -> block
        self.watch: dict[int, ref] = {}
        self.before: list[Block] = []
        self.events: list[tuple] = []  # (block, born or died, phase, module, op)
        self.where = "start", "", ""  # phase, module and operator of now
        self.modules: list[str] = []  # the modules whose forward is running, innermost last
        self.names: dict[nn.Module, str] = {}
        self.owner: dict[Tensor, str] = {}  # parameter -> its module
        self.made_in: dict[int, str] = {}  # an autograd node's sequence number -> module
        self.optimizing: list | None = None  # in an optimizer's step: what to put back after it

    def __enter__(self):
        with ExitStack() as stack:
            if not self.real:
                stack.enter_context(FAKE)
                if "transformers.utils.import_utils" in sys.modules:  # else it takes fake tensors for an export, and masks
                    stack.enter_context(patch("transformers.utils.import_utils.is_fake_tensor", lambda x: False, create=True))
            if self.cuda:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # three kernels are replaced, and torch says so
                    follow_cuda(stack.enter_context(torch.library._scoped_library("aten", "IMPL")))
            for hook in (register_module_forward_pre_hook(self.enter_module),
                         register_module_forward_hook(self.leave_module, always_call=True),
                         register_optimizer_step_pre_hook(self.enter_optimizer),
                         register_optimizer_step_post_hook(self.leave_optimizer)):
                stack.callback(hook.remove)
            super().__enter__()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()
        for p in self.owner:
            self.hold(p.grad, "gradients", self.owner[p])
        self.finish()
        self.blocks, self.watch, self.names, self.owner = {}, {}, {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        for t in tensors((args, kwargs)) if func is not aten.lift_fresh.default else ():  # its argument is born here
            if not (self.real or isinstance(t, FakeTensor)):
                raise ValueError(f"a real tensor of shape {tuple(t.shape)} met the fake ones in {func}: build the model, "
                                 "its data and its optimizer inside `with fake():`, or trace a real run (real=True)")
            self.hold(t)
        self.where = self.place(func)
        out = func(*args, **kwargs)
        if self.cuda and func is aten.native_layer_norm.default:  # the CPU keeps mean and 1 / std in x's dtype
            out = out[0], *(t.float() for t in out[1:])
        for t in tensors(out):
            self.see(t)
        return out

    def place(self, func) -> tuple[str, str, str]:
        """Phase, module and operator."""
        op, inside = func.__name__.removesuffix(".default"), self.modules[-1] if self.modules else ""
        if self.optimizing is not None:
            return "optimizer", inside, op
        if torch._C._current_graph_task_id() == -1:
            self.made_in.setdefault(torch._C._autograd._get_sequence_nr() - 1, inside)
            return "forward", inside, op
        if self.modules:
            return "recomputation", inside, op
        node = torch._C._current_autograd_node()
        if hasattr(node, "variable"):
            return "backward", self.owner.get(node.variable, ""), op
        return "backward", self.made_in.get(node._sequence_nr(), "") if node else "", op

    def see(self, t: Tensor, before: bool = False) -> None:
        """Start a block for the tensor's storage, if it is new."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self.blocks or not storage.nbytes():
            return
        phase, module, op = self.where
        if before:
            block = Block(storage.nbytes(), "inputs", "", "", 0)
            self.before.append(block)
        else:
            block = Block(storage.nbytes(), KIND[phase], op, module, len(self.events) + 1)
            self.events.append((block, 1, *self.where))
        self.blocks[key], self.watch[key] = block, ref(storage, lambda _: self.bury(key))

    def bury(self, key: int) -> None:
        block = self.blocks.pop(key)
        del self.watch[key]
        self.events.append((block, -1, *self.where))
        block.died = len(self.events)

    def hold(self, t: Tensor | None, kind: str = "", module: str = "") -> None:
        """See a tensor that was there before the trace, if it is new; say what it is."""
        if t is None:
            return
        self.see(t, before=True)
        if kind and (block := self.blocks.get(t.untyped_storage()._cdata)):
            block.kind, block.module = kind, module

    # Hooks: torch calls them around every module's forward and every optimizer's step

    def enter_module(self, module: nn.Module, args) -> None:
        if module not in self.names:  # a root
            for name, m in module.named_modules():
                self.names[m] = name or type(module).__name__
                for p in m.parameters(recurse=False):
                    self.owner[p] = self.names[m]
                    self.hold(p, "trainable weights" if p.requires_grad else "frozen weights", self.names[m])
                    self.hold(p.grad, "gradients", self.names[m])
                for b in m.buffers(recurse=False):
                    self.hold(b, "buffers", self.names[m])
        self.modules.append(self.names[module])

    def leave_module(self, module: nn.Module, args, output) -> None:
        self.modules.pop()

    def enter_optimizer(self, optimizer, args, kwargs) -> None:
        self.optimizing = []
        for group in optimizer.param_groups:
            for p in group["params"]:
                self.hold(p.grad, "gradients", self.owner.get(p, ""))
            if self.cuda and group.get("foreach", 0) is None and not group["fused"]:  # the default on CUDA
                group["foreach"] = True
                self.optimizing.append(group)
        self.hold_states(optimizer)

    def leave_optimizer(self, optimizer, args, kwargs) -> None:
        for group in self.optimizing:
            group["foreach"] = None
        self.optimizing = None
        self.hold_states(optimizer)

    def hold_states(self, optimizer) -> None:
        for p, state in optimizer.state.items():
            for t in tensors(state):
                self.hold(t, "optimizer states", self.owner.get(p, ""))
                if self.cuda and t.dim() == 0:  # the count of steps stays on the host
                    self.blocks[t.untyped_storage()._cdata].bytes = 0

    # After the run

    def finish(self) -> None:
        """Replay births and deaths through the allocator; find the peak."""
        allocator, places = CachingAllocator(), {}
        requested = allocated = 0
        self.timeline = []
        for block, sign, *where in [(b, 1, "start", "", "") for b in self.before] + self.events:
            requested, allocated = requested + sign * block.bytes, allocated + sign * block.allocated
            if sign > 0:
                places[block] = allocator.allocate(block.bytes) if block.bytes else None
            elif place := places.pop(block):
                allocator.release(place)
            self.timeline.append(Moment(requested, allocated, allocator.reserved, *where))
        self.timeline = self.timeline[max(len(self.before) - 1, 0):] if self.before else [
            Moment(0, 0, 0, "start", "", ""), *self.timeline]
        self.requested = max(m.requested for m in self.timeline)
        self.reserved = max(m.reserved for m in self.timeline)
        self.peak = max(m.allocated for m in self.timeline)
        at = next(i for i, m in enumerate(self.timeline) if m.allocated == self.peak)
        self.moment = self.timeline[at]
        alive = [b for b in self.before + [e[0] for e in self.events if e[1] > 0]
                 if b.bytes and b.born <= at and (b.died is None or b.died > at)]
        self.held = sorted(alive, key=lambda b: -b.bytes)
        self.parts = Counter()
        for block in alive:
            self.parts[block.kind] += block.allocated
        self.parts = dict(self.parts.most_common())

    def __str__(self):
        rows = [(kind, n, f"{n / 2**30:.2f} GiB", f"{n / max(self.peak, 1):.0%}") for kind, n in self.parts.items()]
        groups = Counter()
        for b in self.held:
            groups[b.kind, b.module, b.op] += b.allocated
        top = [(kind, module, op, n) for (kind, module, op), n in groups.most_common(12)]
        return "\n\n".join((
            f"peak {self.peak:,} bytes ({self.peak / 2**30:.2f} GiB) at: {self.moment}",
            table(("kind", "bytes", "", ""), rows),
            table(("held at the peak", "module", "made by", "bytes"), top),
            f"requested {self.requested:,}, reserved {self.reserved:,}. Not counted: kernels' scratch, cuBLAS's workspace "
            f"({CUBLAS_WORKSPACE['Hopper, Blackwell']:,} on Hopper), the CUDA context"))


KIND = {"start": "inputs", "forward": "activations", "recomputation": "recomputed activations",
        "backward": "backward temporaries", "optimizer": "optimizer temporaries"}


def tensors(x) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        for y in x.values() if isinstance(x, dict) else x:
            yield from tensors(y)


def trace(kernels: str = "cuda", real: bool = False) -> Trace:
    """A context that records what the operators inside it allocate.

    Args:
        kernels: whose kernels and dtypes fake tensors follow, "cuda" or "cpu".
        real: count the storages of a real run instead, on whatever device its tensors are.

    Raises:
        ValueError: other `kernels`; inside: a real tensor (unless `real`), or a shape that depends on data.
    """
    if kernels not in ("cuda", "cpu"):
        raise ValueError(f"kernels must be 'cuda' or 'cpu', got {kernels!r}")
    return Trace(kernels, real)


def measure(step: Callable[[], object], kernels: str = "cuda", real: bool = False) -> Trace:
    """Trace the second run of `step`: optimizers make their state in the first. Raises ValueError as `trace` does."""
    with trace(kernels, real):
        step()
    with trace(kernels, real) as t:
        step()
    return t
