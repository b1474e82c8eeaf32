"""What one training step would allocate on a GPU, without one: `with trace() as t: step()`.

The step runs on fake tensors, which have a shape, a dtype and a storage of a known size but no data. Every operator
passes through a dispatch mode, which sees each storage born and, through a weak reference, sees it die. What PyTorch
would do otherwise on CUDA than on the CPU (cuda.py) is put in the CPU's place while the trace lasts.

    with fake():
        step = training_step(LlamaConfig(...), method="lora")  # or any model, optimizer and step of your own
    t = measure(step)  # traces the second step: optimizers make their state in the first
    print(t)

Bytes are counted three ways: `requested`; allocated, each storage rounded up to 512 bytes (`peak`); and `reserved`, by
a replay of the caching allocator. What no operator returns is in none of them: scratch that a kernel takes and gives
back (flash attention's backward takes 4 bytes an element of q, and grouped heads a dk and a dv for every query head),
cuBLAS's workspace (`CUBLAS_WORKSPACE`), the CUDA context, and fragmentation from before the step. Tensors that stay on
the host (but for an optimizer's count of steps) cannot be told apart from the others, and count.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple
from unittest.mock import patch
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from ..bases import quantised
from ..tables import table
from .cuda import CUBLAS_WORKSPACE, CachingAllocator, follow_cuda, rounded

aten = torch.ops.aten
KIND = {"forward": "activations", "recomputation": "recomputed activations", "backward": "backward temporaries",
        "optimizer": "optimizer temporaries"}  # what a storage is that was born there, until more is known
# what derivatives do in a tensor of zeros they just made, but for fake ones beside it (FunctionsManual.cpp,
# areAnyTensorSubclassLike)
SCATTERS = (aten.index_put.default, aten.scatter.src, aten.scatter_add.default)


class Fake(FakeTensorMode):
    """Fake tensors whose value, when a step asks for one (`loss.item()`, Adam's count of steps, a seed), is 1."""

    def dispatch(self, func, types, args=(), kwargs=None):
        try:
            out = super().dispatch(func, types, args, kwargs)
        except DataDependentOutputException:
            return 1
        except DynamicOutputShapeException:
            raise ValueError(f"{func} gives a shape that depends on data, and fake tensors have none: take it out of "
                             "the step, or trace a real run (real=True)") from None
        # torch's memo of conversions refers weakly to tensors, and `module.to(dtype)` swaps none that are
        self.fake_tensor_converter.meta_converter.tensor_memo.clear()
        return out

    def __deepcopy__(self, memo):
        return self  # a copy of a model refers to its tensors' mode


FAKE = Fake()  # one for all: fake tensors of two modes do not mix


def fake() -> Fake:
    """A context in which every new tensor is fake, so that a model of any size costs nothing."""
    return FAKE


@dataclass(eq=False, slots=True)
class Block:
    """One storage: what it is, which operator of which module made it, and when it lived (indices in the timeline)."""

    bytes: int
    kind: str
    op: str
    module: str
    born: int  # 0: before the trace
    died: int | None = None

    @property
    def allocated(self) -> int:
        return rounded(self.bytes)


class Moment(NamedTuple):
    """The bytes that are live after one storage was born or died, and where the step was: phase, module, operator."""

    requested: int
    allocated: int
    reserved: int
    phase: str
    module: str
    op: str

    def __str__(self):
        return f"{self.phase}, {self.module or 'outside the model'}, {self.op}"


class Trace(TorchDispatchMode):
    """Follows every storage of the operators that run inside it; `trace` makes one. After it:

    Attributes:
        peak, requested, reserved: the most bytes live at once: each storage rounded up to 512, as asked for, and as
            held by the caching allocator.
        moment: the `Moment` of the peak.
        parts: kind -> allocated bytes at the peak; they sum to `peak`.
        held: the `Block`s alive at the peak, the largest first.
        timeline: a `Moment` for every birth and death; the first is what was there before.
    """

    def __init__(self, kernels: str, real: bool):
        super().__init__()
        self.cuda, self.real = kernels == "cuda" and not real, real
        self.live: dict[int, tuple[Block, ref]] = {}  # a storage's address -> its block, and what tells of its death
        self.before: list[Block] = []
        self.events: list[tuple] = []  # block, 1 for born or -1 for died, phase, module, operator
        self.where = "forward", "", ""  # phase, module and operator of now
        self.modules: list[str] = []  # whose forward is running, the innermost last
        self.names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # some live only while they run
        self.owner: dict[Tensor, str] = {}  # parameter -> its module
        self.made_in: dict[int, str] = {}  # an autograd node's sequence number -> the module that made it
        self.optimizing = False

    def __enter__(self):
        sole_references()  # measured before anything is replaced
        with ExitStack() as stack:
            if not self.real:
                stack.enter_context(FAKE)
                # some code asks whether a tensor is fake, or of which type, and then does otherwise than in a real run
                for home in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
                    stack.enter_context(patch(f"{home}._foreach_supported_types", [Tensor, nn.Parameter, FakeTensor]))
                if "transformers.utils.import_utils" in sys.modules:
                    name = "transformers.utils.import_utils.is_fake_tensor"
                    stack.enter_context(patch(name, lambda x: False, create=True))
            if self.cuda:
                follow_cuda(stack)
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
        for p, module in self.owner.items():
            self.name(p.grad, "gradients", module)
        self.live, self.owner = {}, {}
        self.names.clear()
        self.finish()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        for t in tensors((args, kwargs)) if func is not aten.lift_fresh.default else ():  # torch.tensor's is born here
            if not (self.real or isinstance(t, FakeTensor)):
                raise ValueError(f"a real tensor of shape {tuple(t.shape)} met the fake ones in {func}: make model, "
                                 "data and optimizer inside `with fake():`, or trace a real run (real=True)")
            self.name(t)
        self.where = self.place(func)
        in_place = self.where[0] == "backward" and (func in SCATTERS and not self.real or func is aten.add.Tensor
                                                    and adds_up_gradients(*args))
        out = func(*args, **kwargs)
        if in_place and (block := self.block(args[0])):  # the first storage becomes the result's
            del self.live[args[0].untyped_storage()._cdata]
            self.follow(out, block)
        if self.cuda and func is aten.native_layer_norm.default:  # mean and 1 / std, on the CPU in the dtype of x
            out = out[0], *(t.float() for t in out[1:])
        phase, module, op = self.where
        for t in tensors(out):
            if self.block(t) is None and (size := t.untyped_storage().nbytes()):
                block = Block(size, KIND[phase], op, module, len(self.events) + 1)
                self.events.append((block, 1, *self.where))
                self.follow(t, block)
        return out

    def place(self, func) -> tuple[str, str, str]:
        """Phase, module and operator."""
        op, running = func.__name__.removesuffix(".default"), self.modules[-1] if self.modules else ""
        if torch._C._current_graph_task_id() == -1:  # not in backward
            if self.optimizing:
                return "optimizer", running, op
            # the node that will go back through this operator has just been made
            self.made_in.setdefault(torch._C._autograd._get_sequence_nr() - 1, running)
            return "forward", running, op
        if running:
            return "recomputation", running, op
        node = torch._C._current_autograd_node()
        if hasattr(node, "variable"):  # the node that adds to a parameter's gradient
            return "backward", self.owner.get(node.variable, ""), op
        return "backward", self.made_in.get(node._sequence_nr(), "") if node else "", op

    def block(self, t: Tensor) -> Block | None:
        return self.live.get(t.untyped_storage()._cdata, (None,))[0]

    def follow(self, t: Tensor, block: Block) -> None:
        storage = t.untyped_storage()
        key = storage._cdata

        def died(_) -> None:
            del self.live[key]
            self.events.append((block, -1, *self.where))
            block.died = len(self.events)

        self.live[key] = block, ref(storage, died)

    def name(self, t: Tensor | None, kind: str = "", module: str = "") -> Block | None:
        """Say what a storage is. One that no operator in here has made was there before."""
        if t is None or not (size := t.untyped_storage().nbytes()):
            return None
        if (block := self.block(t)) is None:
            block = Block(size, "inputs", "", "", 0)
            self.before.append(block)
            self.follow(t, block)
        if kind:
            block.kind, block.module = kind, module
        return block

    # Torch calls these around every module's forward and every optimizer's step

    def enter_module(self, module: nn.Module, args) -> None:
        if module not in self.names:  # a root, or one that another made while it ran: name all that is in it
            for name, m in module.named_modules():
                self.names[m] = name = self.modules[-1] if self.modules else name or type(module).__name__
                for p in m.parameters(recurse=False):
                    self.owner[p] = name
                    self.name(p, "trainable weights" if p.requires_grad else "frozen weights", name)
                    self.name(p.grad, "gradients", name)
                for b in m.buffers(recurse=False):
                    self.name(b, "quantised weights" if quantised(m) else "buffers", name)
        self.modules.append(self.names[module])

    def leave_module(self, module: nn.Module, args, output) -> None:
        self.modules.pop()

    def enter_optimizer(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        self.optimizing = True
        for group in optimizer.param_groups:
            for p in group["params"]:
                self.name(p.grad, "gradients", self.owner.get(p, ""))
        self.name_states(optimizer)

    def leave_optimizer(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        self.optimizing = False
        self.name_states(optimizer)

    def name_states(self, optimizer: torch.optim.Optimizer) -> None:
        counts_on_host = not (optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))
        for p, state in optimizer.state.items():
            for t in tensors(state):
                block = self.name(t, "optimizer states", self.owner.get(p, ""))
                if self.cuda and t.dim() == 0 and counts_on_host:
                    block.bytes = 0

    # After the step

    def finish(self) -> None:
        """Replay births and deaths through the allocator; find the peak."""
        allocator, places = CachingAllocator(), {}
        requested = allocated = 0
        self.timeline = [Moment(0, 0, 0, "start", "", "")]
        for block, sign, *where in [(b, 1, "start", "", "") for b in self.before] + self.events:
            requested, allocated = requested + sign * block.bytes, allocated + sign * block.allocated
            if sign > 0:
                places[block] = allocator.allocate(block.bytes) if block.bytes else None
            elif place := places.pop(block):
                allocator.release(place)
            if where[0] == "start":
                self.timeline.pop()
            self.timeline.append(Moment(requested, allocated, allocator.reserved, *where))
        self.moment = max(self.timeline, key=lambda moment: moment.allocated)  # the first of several
        at = self.timeline.index(self.moment)
        self.peak = self.moment.allocated
        self.requested, self.reserved = max(m.requested for m in self.timeline), self.timeline[-1].reserved
        blocks = self.before + [block for block, sign, *_ in self.events if sign > 0]
        self.held = sorted((b for b in blocks if b.bytes and b.born <= at and (b.died is None or b.died > at)),
                           key=lambda b: -b.bytes)
        self.parts = self.held_by(lambda b: b.kind)

    def held_by(self, key: Callable[[Block], object]) -> dict[object, int]:
        """Allocated bytes at the peak by any key, the largest first: ``t.held_by(lambda block: block.module)``."""
        sums = Counter()
        for block in self.held:
            sums[key(block)] += block.allocated
        return dict(sums.most_common())

    def to_dict(self) -> dict:
        """What JSON can hold: the counts, the moment and the parts."""
        return {"peak": self.peak, "requested": self.requested, "reserved": self.reserved,
                "moment": {"phase": self.moment.phase, "module": self.moment.module, "op": self.moment.op},
                "parts": self.parts, "not_counted": {"cublas_workspace": CUBLAS_WORKSPACE}}

    def __str__(self):
        def alike(b: Block) -> tuple[str, str, str]:  # the same place in every layer
            return b.kind, re.sub(r"\.\d+(?=\.|$)", ".*", b.module), b.op

        rows = [(kind, n, f"{n / 2**30:.2f} GiB", f"{n / self.peak:.1%}") for kind, n in self.parts.items()]
        most = [(*key, n) for key, n in list(self.held_by(alike).items())[:15]]
        return "\n\n".join((
            f"peak {self.peak:,} bytes = {self.peak / 2**30:.2f} GiB, at: {self.moment}",
            table(("held then", "bytes", "", ""), rows),
            table(("most of it", "module", "made by", "bytes"), most),
            f"requested {self.requested:,} bytes, reserved by the allocator {self.reserved:,}\n"
            f"not counted: scratch inside kernels, the CUDA context, cuBLAS's workspace "
            f"({', '.join(f'{n:,} bytes on {card}' for card, n in CUBLAS_WORKSPACE.items())})"))


def adds_up_gradients(a: Tensor, b: Tensor) -> bool:
    """Whether this sum would be in place if nobody watched.

    Where two gradients of one tensor meet, autograd adds the second to the first if nothing else holds that
    (torch/csrc/autograd/input_buffer.cpp). While a dispatch mode looks on it makes a new tensor for the sum.
    """
    frame = sys._getframe(2)
    while frame.f_code.co_filename.endswith(("_compile.py", "eval_frame.py")):  # torch's wrappers of dispatch modes
        frame = frame.f_back
    if frame.f_code is not torch.autograd.graph._engine_run_backward.__code__:  # a backward written in Python
        return False
    return a.nbytes == a.untyped_storage().nbytes() and references(a) == sole_references()


def references(t: Tensor) -> tuple[int, int]:
    """How many hold the tensor, and how many its storage."""
    return t._use_count(), torch._C._storage_Use_Count(t.untyped_storage()._cdata)


@cache
def sole_references() -> tuple[int, int]:
    """What `references` says in a dispatch mode of a gradient that only autograd holds: measured on one that is so."""
    found = []

    class Probe(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is aten.add.Tensor:
                found.append(references(args[0]))
            return func(*args, **kwargs or {})

    x = torch.ones(2, requires_grad=True) * 1
    y = (x.sin() * x.cos()).sum()
    with Probe():
        y.backward()
    return found[0]


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
