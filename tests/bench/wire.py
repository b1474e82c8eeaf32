"""Do the counted bytes go over the wire? What the loopback device carried, beside what `distributed.Wire` counted.

    unshare -rn sh -c 'ip link set lo up && python tests/bench/wire.py'       (Linux; a loopback of our own)

Every process of the run talks to the others over it, so it carries what all send, packet headers (1 to 2%) included.
"""

import json
import subprocess
import sys
from pathlib import Path

STEPS = range(5, 15)


def carried() -> int:
    """Bytes that the loopback device has sent so far."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def worker(method: str, parallel: str) -> None:
    import torch.distributed as dist

    from minilora import LoRAConfig, inject
    from minilora.distributed import Wire, is_main_process
    from minilora.helpdesk import batches, load_base, load_task
    from minilora.train import train

    model, seen, counted = load_base(), [], []
    if method == "lora":
        inject(model, LoRAConfig(8, 16, "all-linear"))

    def on_step(step, model, log):
        dist.barrier()
        counted.append(sum(wire.take().values()))
        seen.append(carried())
        dist.barrier()

    with Wire() as wire:
        train(model, batches(load_task("tone").train, 8), steps=STEPS.stop, lr=1e-3, parallel=parallel, progress=False,
              on_step=on_step)
    if is_main_process():
        there = sum(counted[step] for step in STEPS) * dist.get_world_size()
        print(json.dumps({"counted": there, "carried": seen[STEPS.stop - 1] - seen[STEPS.start - 1]}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(*sys.argv[1:])
        sys.exit()
    for method in ("lora", "full"):
        for parallel in ("ddp", "fsdp"):
            for processes in (2, 4):
                done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                       "--nproc-per-node",
                                       str(processes), __file__, method, parallel], capture_output=True, text=True)
                found = json.loads(done.stdout)
                print(f"{method:4} {parallel:4} {processes} processes: counted {found['counted']:12,} bytes in "
                      f"{len(STEPS)} steps, carried {found['carried'] / found['counted']:.3f} times that", flush=True)
