"""One run on several processes, started by torchrun: how a model is shared out, what it sends, how the run ends as one.

The work is torch.distributed's; here is what `train` needs around it. Without torchrun there is one process, and
everything here leaves model and tensors as they are.
"""

import atexit
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from .config import require

WAYS = ("ddp", "fsdp")
TIMEOUT = "MINILORA_TIMEOUT"  # environment variable: seconds that a process waits for the others in an exchange
PATIENCE = 600.0  # seconds, where it says nothing: long enough for the first process to evaluate or to save


def many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_main_process() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return not many() or dist.get_rank() == 0


def init(parallel: str | None) -> tuple[int, int]:
    """This process's rank and the number of processes; joins the others that torchrun started: by nccl where there is
    a GPU, which is then this process's own, else by gloo. A group that is there already is taken as it is.

    A process that hears nothing of the others for ``MINILORA_TIMEOUT`` seconds (an environment variable; 600 by
    default) ends: one of them may be paused, or the network gone.

    Raises:
        ValueError: several processes, and no word on how they should share the model; a time-out that is no number.
    """
    if parallel not in (None, *WAYS):
        raise ValueError(f"parallel must be None or one of {', '.join(WAYS)}, got {parallel!r}")
    processes = dist.get_world_size() if many() else int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        return 0, 1
    if parallel is None:
        raise ValueError(f"there are {processes} processes: say how they share the model, parallel='ddp' (each has all "
                         "of it) or 'fsdp' (each keeps a part)")
    if not many():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=patience()))
        atexit.register(shutdown)
    return dist.get_rank(), processes


def patience() -> float:
    """Seconds that a process waits for the others.

    Raises:
        ValueError: the environment variable holds something else.
    """
    text = os.environ.get(TIMEOUT, str(PATIENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    require(0 < seconds <= 10**6, f"{TIMEOUT} must be seconds, from above 0 to 1,000,000", text)
    return seconds


def shutdown() -> None:
    """Give the group up at the end of the process, in good order."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # gloo's threads may still be letting go of the last exchange's tensors, and need the interpreter for that: were
        # it torn down under them, a process that has done its work would end with an abort
        time.sleep(0.2)


def device() -> torch.device:
    """Where this process computes when there are several."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


# ---------------------------------------------------------------- the model


def share_out(model: nn.Module, parallel: str, trained: list[Tensor]) -> tuple[nn.Module, list[Tensor]]:
    """Give every process its part of the model, and process 0's values of what trains to all.

    Args:
        parallel: "ddp": each process has the whole model; gradients are averaged by all-reduce
            (`DistributedDataParallel`). "fsdp": each keeps 1/n of every parameter, frozen ones too; a layer is gathered
            when it computes, in forward and again in backward, and gradients are summed by reduce-scatter
            (`fully_shard`, FSDP2). The units are the members of the model's outermost `nn.ModuleList`s, and what is
            left.
        trained: parameters of `model`.

    Returns:
        The module whose forward to call, and what now stands in the place of each of `trained`. Under "fsdp" the
        module is `model` itself, its parameters DTensors from now on.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    if any(id(p) not in names for p in trained):
        raise ValueError("with several processes, all that trains must be parameters of the model")
    if sharded(model):  # by a run before this one
        return model, trained
    for p in trained:
        with torch.no_grad():
            p.copy_(from_first(p))
    if parallel == "ddp":
        # the rest is the same everywhere: the same files were read. Nor do buffers (rotary tables, 4-bit codes) change
        net = DistributedDataParallel(model.to(device()), init_sync=False)
        net.broadcast_buffers = False
        return net, trained
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    for unit in units(model):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    now = dict(model.named_parameters())
    return model, [now[names[id(p)]] for p in trained]


def from_first(t: Tensor) -> Tensor:
    """Process 0's value of `t`, on the device of t."""
    sent = t.detach().to(device(), copy=True)
    dist.broadcast(sent, 0)
    return sent.to(t.device)


def units(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost `nn.ModuleList`s: a decoder's layers."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else units(child)


def sharded(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")  # what fully_shard gives a module


@contextmanager
def syncing(net: nn.Module, now: bool) -> Iterator[None]:
    """Forward and backward in here exchange gradients only if `now`; else they add up in each process.

    Under "fsdp" these sums are of whole gradients: less on the wire, for a gradient's memory of all that trains.
    """
    if isinstance(net, DistributedDataParallel) and not now:
        with net.no_sync():
            yield
        return
    if sharded(net):
        net.set_requires_gradient_sync(now)
        net.reshard()  # a forward without backward, in `on_step` say, may have left weights of an earlier step gathered
    yield


def flat(model: nn.Module) -> bool:
    """Whether FSDP 1 has laid a model's parameters out in flat shares: on each process a piece of them is left."""
    return any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())


@contextmanager
def gathered_whole(model: nn.Module) -> Iterator[None]:
    """Under FSDP 1 the model's parameters are whole in here, on every process, each of which must call this."""
    if not flat(model):
        yield
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        yield


def full_tensor(t: Tensor) -> Tensor:
    """The tensor of which this is a share, on every process, each of which must call this; any other as it is."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def collect(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whole, detached and contiguous, on the first process; nothing on the others, which must call this
    too. One after the other, so that no card holds more than one."""
    found = {}
    for name, t in tensors.items():
        t = full_tensor(t.detach())
        if is_main_process():
            found[name] = (t.cpu() if many() else t).contiguous()
    return found


def like(value: Tensor, p: Tensor) -> Tensor:
    """This process's share of a whole tensor, cut as `p` is; where `p` is not cut, the tensor."""
    if not hasattr(p, "full_tensor") or value.shape != p.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


# ---------------------------------------------------------------- the run


def piece(batch: tuple[Tensor, ...], i: int, pieces: int) -> tuple[Tensor, ...]:
    """The i-th of `pieces` nearly equal parts of the rows of each tensor.

    Raises:
        ValueError: fewer rows than pieces.
    """
    if len(batch[0]) < pieces:
        raise ValueError(f"a batch of {len(batch[0])} rows cannot be split into {pieces} (processes x accumulation)")
    return tuple(t.tensor_split(pieces)[i] for t in batch)


def seed_step(seed: int, step: int) -> None:
    """Random numbers of each process's own in each step: a restart draws them again, from whatever step it goes on."""
    torch.manual_seed(random.Random(f"{seed} {step} {dist.get_rank()}").getrandbits(63))


def gathered(number: Tensor) -> Tensor:
    """A single number of each process, (processes,)."""
    if not many():
        return number[None]
    numbers = [torch.empty_like(number) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, number)
    return torch.stack(numbers)


def wait_for_all() -> None:
    if many():
        dist.barrier()


class Stopped(Exception):
    """SIGTERM: torchrun ends the processes of a run that has lost one."""


@contextmanager
def ending_as_one(advice: Callable[[], str]) -> Iterator[None]:
    """If another process of the run is lost, or silent for too long (`patience`), or the run is interrupted, end this
    one: with one line on stderr from whichever notices first.

    On gloo a lost process is noticed at the next exchange, and torchrun ends the others besides. On nccl, which cannot
    be interrupted from Python, it is left to nccl's own time-out and to torchrun.

    Raises:
        SystemExit: another process is gone. `advice()` is added to the line.
    """
    if not many() or dist.get_backend() == "nccl":
        yield
        return
    ending = False

    def stop(*_) -> None:
        nonlocal ending
        if not ending:
            ending = True
            raise Stopped

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        before = None
    try:
        yield
    except (Stopped, KeyboardInterrupt, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        ending = True
        said = announced()
        sys.exit(1 if said else f"minilora: {reason(e)}, so process {dist.get_rank()} and all others end. {advice()}")
    finally:
        if not ending and before is not None:
            signal.signal(signal.SIGTERM, before)


def reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if re.search(r"timed out|timeout", str(error), re.IGNORECASE):
        return (f"another process of this run has not answered for {patience():g} s (it is paused, slow or cut off; "
                f"{TIMEOUT} sets how long to wait)")
    return "another process of this run is gone"


def announced() -> bool:
    """Whether another process has called this already, as far as can be known."""
    try:
        return dist.distributed_c10d._get_default_store().add("minilora/ended", 1) > 1
    except RuntimeError:  # the store went with the lost process
        return False


# ---------------------------------------------------------------- the wire

# operator -> kind, and the argument that has the size of the whole; what is not here goes by its own name
OPERATORS: dict[str, tuple[str, int]] = {
    "allreduce_": ("all-reduce", 0), "all_reduce": ("all-reduce", 0), "all_reduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "allgather_": ("all-gather", 0), "_allgather_base_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1), "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1), "reduce_scatter_tensor": ("reduce-scatter", 0),
    "broadcast_": ("broadcast", 0), "broadcast": ("broadcast", 0),
}
SILENT = ("barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")


class Wire(TorchDispatchMode):
    """Counts the bytes that this process sends to others, by kind of exchange. Small steps get slower.

    An exchange of S bytes among n processes costs each (n - 1) / n S, twice that for an all-reduce: what a ring sends,
    and the least that any algorithm can (Patarasuk & Yuan 2009). gloo's reduce-scatter is not a ring: it sends twice as
    much as is counted (tests/bench/wire.py). The group is the default one, of all processes.

    >>> with Wire() as wire:
    ...     train(model, batches, ..., parallel="ddp", on_step=lambda *_: steps.append(wire.take()))
    """

    def __init__(self):
        super().__init__()
        self.sizes: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if any(hasattr(t, "full_tensor") for t in types):
            return NotImplemented  # a DTensor first turns itself into exchanges of plain ones
        name = operator.overloadpacket.__name__
        if operator.namespace in ("c10d", "_c10d_functional") and name not in SILENT:
            if name.startswith("all_gather_into_tensor"):  # it makes its result: the input, once from each process
                kind, size = "all-gather", nbytes(args[0]) * args[1]
            else:
                kind, place = OPERATORS.get(name, (name, 0))
                size = nbytes(args[place])
            self.sizes[kind] += size
        return operator(*args, **kwargs or {})

    def take(self) -> dict[str, int]:
        """Bytes sent since the last call: {"all-reduce": ..., "all-gather": ..., "reduce-scatter": ...}."""
        n = dist.get_world_size() if many() else 1
        sent = {kind: (1 + (kind == "all-reduce")) * size * (n - 1) // n for kind, size in self.sizes.items()}
        self.sizes.clear()
        return sent


def nbytes(tensors: Any) -> int:
    """Bytes of a tensor or of nested lists of them."""
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(nbytes(t) for t in tensors)
