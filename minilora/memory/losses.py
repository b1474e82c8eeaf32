"""The loss on the ledger: of all logits at once, by tiles as TRL has it, or fused with the head as Liger has it.

In the shape comments N is batch x tokens, T tokens, C the hidden size, V the vocabulary.
"""

from .ledger import Tensor, as_view
from .ops import Ops

TRL_TOKENS, TRL_WORDS = 4096, 32768  # of a tile: trl 1.16, kernels/chunked_logprob.py and trainer/utils.py


def of_shifted_logits(ops: Ops, wide: Tensor, batch: int, seq: int, vocab: int, fast: bool) -> Tensor:
    """`ForCausalLMLoss` until transformers 4.50: a copy of the fp32 logits without each row's last token."""
    size = batch * (seq - 1) * vocab
    logits = ops.unary(ops.slice(wide, size), "shifted logits", backward=())
    labels = ops.new(batch * (seq - 1), 8, "shifted labels")
    return fast_cross_entropy(ops, logits, labels) if fast else ops.cross_entropy(logits, labels)


def fast_cross_entropy(ops: Ops, logits: Tensor, labels: Tensor) -> Tensor:
    """unsloth's kernel: the gradient takes the place of the logits."""
    rows = labels.count
    node = ops.node("cross entropy", [logits], [], lambda s, g, n: [as_view(s[0])], late=True)
    losses = ops.new(rows, 4, "losses", node=node)
    log_sum = ops.new(rows, 4, "log-sum-exp")
    ops.keep(node, [logits, log_sum, labels])
    mean = ops.node("mean", [losses], [], lambda s, g, n: [ops.new(rows, 4, "gradient of the losses")])
    return ops.new(1, 4, "loss", node=mean)


def chunked(ops: Ops, y: Tensor, head: Tensor, labels: Tensor, vocab: int) -> Tensor:
    """TRL's `ChunkedLogProbFunction` (trl 1.16, kernels/chunked_logprob.py), every label counting: a tile of 4,096
    tokens and 32,768 words in forward and again in backward, where the gradients are summed in fp32."""
    rows, hidden = labels.count, head.count // vocab
    chosen = ops.new(rows, 1, "mask of labels")
    view = ops.slice(y, rows * hidden)
    x = gathered_rows(ops, view, chosen, rows)  # N C
    targets = ops.new(rows, 8, "targets")
    width = ops.amp_width(x)
    tile = min(rows, TRL_TOKENS) * TRL_WORDS, width
    casts = [(min(rows, TRL_TOKENS) * hidden, x.width), (min(vocab, TRL_WORDS) * hidden, head.width)]

    def projected() -> list[Tensor]:
        """Rows and words of a tile, where they are not of the tile's width."""
        return [ops.new(count, width, "cast") for count, of in casts if of != width]

    def backward(saved, grads, needs):
        dx = ops.new(rows * hidden, 4, "input gradient in fp32") if needs[0] else None
        dw = ops.new(vocab * hidden, 4, "head gradient in fp32") if needs[1] else None
        logits = ops.new(*tile, "tile of logits")
        parts = projected()
        del parts
        dx = dx and ops.cast(dx, x_width)
        dw = dw and ops.cast(dw, head_width)
        return [dx, dw]

    x_width, head_width = x.width, head.width
    node = ops.node("loss by tiles", [x, head], [], backward, late=True)
    sums = [ops.new(rows, 4, f"sum {i}") for i in range(7)]
    logits = ops.new(*tile, "tile of logits")
    parts = projected()
    del parts
    log_sum, out, entropy = (ops.new(rows, 4, name) for name in ("log-sum-exp", "log-probabilities", "entropy"))
    out.node = node
    ops.keep(node, [x, head, targets, log_sum, entropy])
    del sums, logits
    del chosen, entropy, log_sum
    placed = ops.unary(out, "in their places")
    total = ops.unary(placed, "sum", count=1, backward=())
    return ops.unary(total, "loss")


def gathered_rows(ops: Ops, x: Tensor, mask: Tensor, rows: int) -> Tensor:
    """``x[mask]``, all rows being chosen: a copy; the places of its rows are there in between."""
    count, width = x.count, x.width
    node = ops.node("rows by mask", [x], [mask], lambda s, g, n: [ops.new(count, width, "gradient of all rows")])
    places = ops.new(2 * rows, 8, "places of rows")
    out = ops.new(count, width, "rows", node=node)
    del places
    return out


def fused(ops: Ops, y: Tensor, head: Tensor, rows: int, vocab: int, old: bool) -> Tensor:
    """Liger's `LigerFusedLinearCrossEntropyFunction`: logits of as many tokens as take about the input's room, and the
    gradients with them in forward. `old` (2024, with a copy of a chunk's logits in fp32 and back)."""
    hidden = head.count // vocab
    x = ops.unary(ops.slice(y, rows * hidden), "shifted rows", backward=())  # N C
    labels = ops.new(rows, 8, "shifted labels")
    width = ops.amp_width(x)
    size = min(power_of_two(-(-rows // -(-vocab // hidden))), rows)
    node = ops.node("loss fused with the head", [x, head], [], lambda s, g, n: [as_view(t) if t else None for t in s],
                    late=True)
    dw = ops.new(vocab * hidden, head.width, "head gradient") if head.needs and old else None
    dx = ops.new(rows * hidden, x.width, "input gradient")
    dw = ops.new(vocab * hidden, head.width, "head gradient") if head.needs and not old else dw
    losses = ops.new(rows, 4, "losses")
    logits = ops.new(size * vocab, width, "logits of a chunk")
    if old:
        logits = ops.new(size * vocab, 4, "logits of a chunk in fp32")
        logits = ops.new(size * vocab, width, "gradient of a chunk's logits")
        scaled = ops.new(size * vocab, width, "scaled gradient")
        part = ops.new(size * hidden, x.width, "part of the input gradient")
        del scaled, part
    elif width != x.width:
        part = ops.new(size * hidden, width, "part of the input gradient")
        del part
    del logits
    loss = ops.new(1, 4, "loss", node=node)
    ops.keep(node, [dx, dw])
    del losses, labels
    return loss


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()
