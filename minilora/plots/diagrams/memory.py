"""Drawings of memory: what is kept for backward, the two slots of the streamed base, a ring and shards."""

import math

from matplotlib.figure import Figure

from ..sheet import Sheet

Drawing = tuple[Figure, str]


def kept_for_backward(layers: int = 3) -> Drawing:
    """A chain of linears, forward: what must be kept for backward when all train, and with LoRA."""
    sheet = Sheet(14, 8.2)
    for y, title, trained in ((5.0, "full fine-tuning", True), (1.0, "LoRA", False)):
        sheet.words(0.3, y + 2.5, title, 10, ha="left", bold=True)
        for n in range(layers):
            x = 1.0 + 4.0 * n
            sheet.box(x, y, 1.0, 1.0, f"x{n}", "held")
            sheet.box(x + 1.7, y, 1.3, 1.0, f"W{n}", "trains" if trained else "frozen")
            sheet.arrow((x + 1.0, y + 0.5), (x + 1.7, y + 0.5))
            sheet.arrow((x + 3.0, y + 0.5), (x + 4.0, y + 0.5))
            if trained:
                sheet.box(x + 1.7, y + 1.15, 1.3, 0.5, "gradient", "held", 7)
                sheet.box(x + 1.7, y + 1.7, 1.3, 0.5, "Adam: 2 x", "held", 7)
            else:
                sheet.box(x + 1.7, y - 0.55, 1.3, 0.42, "A, B", "trains", 7)
                sheet.box(x + 1.7, y + 1.15, 1.3, 0.3, "", "held", 6)
                sheet.words(x + 2.35, y + 1.65, "their gradient, Adam", 7)
        sheet.words(13.4, y + 0.5, "loss", 9)
    sheet.words(7.0, 0.2, "x0, x1, x2: inputs, held until backward has used them; a dashed border: trains")
    return sheet.fig, ("What one step keeps. Full fine-tuning keeps every layer's input, and for every weight "
                       "a gradient "
                       "and two numbers of Adam's. LoRA keeps the inputs too, because A and B need them; gradients and "
                       "Adam's numbers shrink to those of A and B.")


def two_slots(layers: int = 4) -> Drawing:
    """The streamed base: which shard lies in which of two slots, visit by visit."""
    sheet = Sheet(15, 6.6)
    forward = [*range(layers + 1)]
    visits = forward + forward[-2::-1]
    slots, moved = [0, 1], 0  # the step before has left the first two there
    names = [f"L{n}" for n in range(layers)] + ["head"]
    sheet.words(1.0, 4.6, "slot 1", bold=True)
    sheet.words(1.0, 3.1, "slot 2", bold=True)
    sheet.words(1.0, 1.6, "the bus", bold=True)
    width = 12.6 / len(visits)
    for turn, (now, ahead) in enumerate(zip(visits, visits[1:] + [1])):
        x, coming = 2.0 + turn * width, []
        for shard in (now, ahead):
            if slots[shard % 2] != shard:
                slots[shard % 2] = shard
                coming.append(names[shard])
                moved += 1
        for slot, y in ((0, 4.1), (1, 2.6)):
            computes = slots[slot] == now
            words = names[slots[slot]] + ("\ncomputes" if computes else "")
            sheet.box(x, y, width * 0.92, 1.0, words, "held" if computes else "frozen", 8)
        for n, name in enumerate(coming):
            sheet.box(x, 1.3 - 0.55 * n, width * 0.92, 0.5, name, "data", 7)
    turn_at = 2.0 + (layers + 1) * width
    sheet.line([(turn_at - 0.04, 0.5), (turn_at - 0.04, 5.3)], dashed=True)
    sheet.words((2.0 + turn_at) / 2, 5.7, "forward", bold=True)
    sheet.words((turn_at + 14.6) / 2, 5.7, "backward", bold=True)
    sheet.words(7.5, 0.25, "while one slot computes, the other waits or is being filled")
    return sheet.fig, (f"The streamed base with {layers} layers and a head: never more than two of its {layers + 1} "
                       f"shards are on the card. One computes while the next comes over the bus. At the turn "
                       f"the head and "
                       f"the last layer are there already, and at the start the first two. In a step {moved} "
                       f"shards come.")


def ring_and_shards(workers: int = 4) -> Drawing:
    """Left: all-reduce in a ring. Right: fully sharded training, where every worker keeps a part of each weight."""
    sheet = Sheet(15, 7.4)
    for worker in range(workers):
        angle = math.pi / 2 - 2 * math.pi * worker / workers
        x, y = 3.4 + 2.2 * math.cos(angle), 3.7 + 2.2 * math.sin(angle)
        after = math.pi / 2 - 2 * math.pi * (worker + 1) / workers
        sheet.box(x - 0.75, y - 0.45, 1.5, 0.9, f"worker {worker}\nall weights", "frozen", 7)
        start, end = (3.4 + 2.2 * math.cos(angle - 0.45), 3.7 + 2.2 * math.sin(angle - 0.45)), (
            3.4 + 2.2 * math.cos(after + 0.45), 3.7 + 2.2 * math.sin(after + 0.45))
        sheet.arrow(start, end, bend=-0.12)
    sheet.words(3.4, 7.0, "DDP: a ring of gradients", 10, bold=True)
    sheet.words(3.4, 3.7, f"each sends 1/{workers} of the\ngradients a round,\n{2 * (workers - 1)} rounds", 8)
    sheet.words(11.0, 7.0, "FSDP: every weight in shards", 10, bold=True)
    for worker in range(workers):
        y = 5.4 - 1.25 * worker
        sheet.box(8.0, y, 1.7, 0.9, f"worker {worker}", "quiet", 8)
        for part in range(workers):
            mine = part == worker
            sheet.box(10.0 + part * 1.05, y, 0.95, 0.9, f"part {part}" if mine else "", "frozen" if mine else "data", 7)
    sheet.words(11.0, 0.6, "to compute a block, its parts are gathered:\nin forward, and again in backward", 8)
    return sheet.fig, (f"Two ways to share the work of {workers} workers. DDP: everybody has all weights, and the "
                       f"gradients travel round a ring in {2 * (workers - 1)} rounds; with LoRA only the adapter's do. "
                       f"FSDP: everybody keeps 1/{workers} of each weight, and a block's parts are gathered before it "
                       f"computes, forward and backward, frozen or not.")
