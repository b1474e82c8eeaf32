"""Fully sharded data parallel as torch's first version does it (`torch.distributed.fsdp`), event by event.

A layer's weights are gathered while it computes, in forward, in the run again and in its backward; what is no layer
stays gathered. Source: torch 2.4, ``distributed/fsdp/_runtime_utils.py``. Held against published measurements
(`published.py`), which also tell: under reentrant checkpointing the next layer is not fetched ahead.
"""

from .ledger import Ledger, Tensor


class Gathering:
    """What one card holds of the others' shares, as layers come and go.

    Args:
        layer: bytes of a layer's weights, gathered in the dtype in which it computes. flat: the layer's weights
            all train, as one flat parameter, so that their gradients become one flat tensor before they are shared out.
    """

    def __init__(self, ledger: Ledger, layer: int, flat: bool):
        self.ledger, self.layer, self.flat = ledger, layer, flat
        self.there: dict[int, Tensor] = {}
        self.whole: list[tuple[Tensor, Tensor]] = []  # weights and gradients, of the layer whose backward runs
        self.held: list[tuple[Tensor, Tensor]] = []

    def enter(self, layer: int) -> None:
        if layer not in self.there:
            self.there[layer] = self.ledger.new(self.layer, 1, "a layer", part="visiting weights")

    def leave(self, layer: int) -> None:
        self.there.pop(layer, None)

    def collects(self, leaf: Tensor, grad: Tensor) -> bool:
        """Keep a weight's gradient until its layer's are there."""
        if self.flat:
            self.whole.append((leaf, grad))
        return self.flat

    def after_backward(self, layer: int, leaf: Tensor, grad: Tensor) -> None:
        """A layer with frozen weights watches its input by a hook (`_register_post_backward_reshard_only_hook`), which
        lives to the end of backward and with it the input and the gradient of every checkpointed layer."""
        self.leave(layer)
        if self.flat:
            self.share_out()
        else:
            self.held.append((leaf, grad))

    def share_out(self) -> None:
        """One flat gradient is made of all, and this card's share of its sum."""
        if not self.whole:
            return
        count, width = sum(grad.count for _, grad in self.whole), self.whole[0][1].width
        flat = self.ledger.new(count, width, "flat gradient", part="temporaries")
        leaves = [leaf for leaf, _ in self.whole]
        for leaf in leaves:
            leaf.grad = None
        self.whole.clear()
        shard = self.ledger.new(count, width, "share of the flat gradient", part="gradients")
        del flat
        for leaf in leaves:
            leaf.grad = shard

    def finish(self) -> None:
        """The end of backward."""
        self.share_out()
        self.held.clear()
