"""What every decoder has: embedding, layers, last norm, head and loss, played on a ledger.

In the shape comments N is batch x tokens, T tokens, C the hidden size, H query heads, K key/value heads, D head size,
F the MLP's width, V the vocabulary, r the rank; sizes are element counts.
"""

from functools import partial
from typing import Any

from ..activations import POWER
from ..families import Bare
from ..ledger import WIDTH, Tensor
from ..linears import LINEARS, BareParameter, OurLinear
from ..models import ModelSpec
from ..ops import Ops
from ..run import Run

PLUS_EPS, INVERSE_ROOT = ("mean + eps", "", ()), ("1 / rms", "output", POWER)
LOSS_CHUNK = 512  # tokens
Matrices = dict[str, Any]  # a layer's linears, stacks and norms of another width than the layer's, by name
Layer = tuple[Matrices, list[tuple[Tensor, ...]]]  # and its norms


class Decoder:
    """A decoder of `layers` layers on a ledger: its weights are there once it is made, and `loss` plays the forward.

    A kind of decoder says how it embeds, what its layers share (`tables`), its block, its norm and its loss.
    """

    phase = "forward"  # what moments are called
    layers_see_positions = True  # their numbers are an argument of each layer, so a checkpointed one holds them

    def __init__(self, ops: Ops, spec: ModelSpec, run: Run, layers: int):
        self.ops, self.spec, self.run = ops, spec, run
        linear = LINEARS[run.software.linear]
        self.cache: list[Tensor] | None = None  # of keys and values, when serving
        self.embedding = self.weight(spec.vocab * spec.embedding, "embed_tokens", spec.vocab)
        if spec.positions:
            self.positions = self.weight(spec.positions * spec.hidden, "positions", spec.positions)
        if spec.layout.embedding_norm:
            self.embedding_norm = self.norm_weight()
        if spec.embedding != spec.hidden:
            self.projections = [self.weight(spec.hidden * spec.embedding, "projection", spec.hidden) for _ in range(2)]
        self.layers: list[Layer] = []
        for i in range(layers):
            ops.place = ("start", i)
            here, adapted = spec.at(i), run.targets(spec, i)
            matrices: Matrices = {m.name: (BareParameter if isinstance(m, Bare) else linear)(ops, m, run, m in adapted)
                                  for m in spec.layout.matrices(here)}
            matrices |= {name: partial(self.norm, weights=self.norm_weight(width))
                         for name, width in spec.layout.extra_norms(here).items()}
            self.layers.append((matrices, [self.norm_weight() for _ in range(spec.layout.norms)]))
        ops.place = ("start", None)
        self.last_norm = self.norm_weight() if spec.last_norm else None
        self.head = self.embedding if spec.tied else self.weight(spec.vocab * spec.embedding, "lm_head", spec.vocab)
        self.ids = ops.state(run.batch * run.seq, 8, "inputs", "ids")
        self.targets: Tensor | None = None  # when training

    def embed(self) -> list[Tensor]:
        """The first layer's input, N C, and what the model's forward holds beside it."""
        raise NotImplementedError

    def tables(self, x: Tensor) -> list:
        """What all layers share: rotary tables, masks."""
        raise NotImplementedError

    def block(self, x: Tensor, layer: Layer, tables: list) -> Tensor:
        """One layer, N C -> N C."""
        raise NotImplementedError

    def norm(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        raise NotImplementedError

    def whole_loss(self) -> Tensor:
        """The forward and the loss, all logits at once."""
        raise NotImplementedError

    def weight(self, count: int, name: str, rows: int = 0) -> Tensor:
        return self.ops.weight(count, WIDTH[self.run.outer_dtype], name, self.run.method == "full", rows)

    def norm_weight(self, width: int = 0) -> tuple[Tensor, ...]:
        """Weight, and LayerNorm's bias. unsloth's kernel for RMSNorm gives the weight no gradient, so it stays."""
        rms, run = self.spec.layout.rms, self.run
        trains = run.method == "full" and not (rms and run.kernels == "unsloth")
        return tuple(self.ops.weight(width or self.spec.hidden, WIDTH[run.norm_dtype], "norm", trains)
                     for _ in range(1 if rms else 2))

    def decode(self) -> Tensor:
        """What the head sees, N C."""
        ops = self.ops
        ops.place = (self.phase, None)
        x, *held = self.embed()  # some code holds on to what x was made of
        tables = self.tables(x)
        for i, layer in enumerate(self.layers):
            ops.place = (self.phase, i)

            numbers = held[1:2] if self.layers_see_positions else []

            def run(x: Tensor, layer=layer, tables=self.tables_of(tables, i), held=numbers) -> Tensor:  # noqa: B008
                return self.block(x, layer, tables)

            x = ops.checkpoint(run, x) if self.run.checkpointing and ops.recording else run(x)
        ops.place = (self.phase, None)
        return self.norm(x, self.last_norm) if self.last_norm else x

    def loss(self) -> Tensor:
        """The whole forward: the scalar from which backward starts."""
        if self.run.streamed:
            return self.chunked_loss(self.decode())
        return {"whole": self.whole_loss, "chunked": lambda: self.chunked_loss(self.decode()),
                "fused": self.fused_loss}[self.run.loss]()

    def as_reference(self) -> Tensor:
        """A forward and its scores without adapters, for which no backward comes."""
        matrices = [m for here, _ in self.layers for m in here.values() if isinstance(m, (OurLinear, BareParameter))]
        self.phase = "reference"
        for m in matrices:
            m.off = True
        with self.ops.unrecorded():
            scores = self.loss()
        self.phase = "forward"
        for m in matrices:
            m.off = False
        return scores

    def fused_loss(self) -> Tensor:
        """The forward and the loss, fused with the head."""
        raise NotImplementedError

    def head_of(self, y: Tensor) -> Tensor:
        """Logits, N V."""
        with self.ops.inside("lm_head"):
            return self.ops.linear(y, self.head, self.spec.vocab)

    def chunked_loss(self, y: Tensor) -> Tensor:
        """The loss of so many tokens at a time and the gradient of y with it: logits, log-softmax and their gradient
        are there of one chunk alone, and the head is needed once."""
        ops, count, width = self.ops, y.count, y.width
        ops.module = "loss"
        node = ops.node("loss in chunks", [y], [], lambda s, g, n: [s[0]], late=True)
        gradient = ops.new(count, width, "input gradient")
        size = min(LOSS_CHUNK, self.run.batch * self.run.seq) * self.spec.vocab
        chunk = [ops.new(size, width, name) for name in ("logits", "log-softmax", "gradient of the logits")]
        del chunk
        loss = ops.new(1, width, "loss", node=node)
        ops.keep(node, [gradient])
        return loss

    def cached(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """When serving, keys and values are written to the cache, which has room for all that will come."""
        if self.cache is None:
            return k, v
        spec, run = self.spec, self.run
        size = run.batch * run.tokens * spec.kv_heads * spec.head_dim
        room = [self.ops.new(size, k.width, name, part="KV cache") for name in ("keys", "values")]
        self.cache += room
        return tuple(Tensor(t.count, t.width, r.storage) for t, r in zip((k, v), room))

    def tables_of(self, tables: list, layer: int) -> list:
        """Those that this layer holds."""
        return tables

    def mean_square(self, wide: Tensor, row: int = 0) -> Tensor:
        """Of every row, (N,); of `row` elements, else of C."""
        square = self.ops.unary(wide, "square", "input", POWER)
        return self.ops.unary(square, "mean", count=wide.count // (row or self.spec.hidden))

    def kernel(self, q: Tensor, k: Tensor, mask: Tensor | None) -> str:
        """Which one `scaled_dot_product_attention` takes (sdp_utils.cpp). Flash attention wants 16 bits, no mask, and a
        card from sm80 on; memory-efficient attention no grouped heads; the plain one takes all."""
        attention, narrow = self.run.attention, min(self.ops.amp_width(t) for t in (q, k)) == 2
        alike = self.spec.head_dim <= 256 and not self.spec.value_dim  # heads of v are as wide as those of q
        if attention == "fused" and mask is None and narrow and alike:
            return "flash"
        return "plain" if attention == "plain" or q.count != k.count else "efficient"

    def fused_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """`scaled_dot_product_attention`, causal or by a mask, or the package flash-attn."""
        ops, spec, run = self.ops, self.spec, self.run
        rows = run.batch * spec.heads
        if run.attention == "flash":
            q, k, v = (ops.cast(t, 2) for t in (q, k, v))
            return ops.flash_attention(q, k, v, rows, run.seq, spec.head_dim)
        kernel = self.kernel(q, k, mask)
        if kernel == "plain":
            return ops.plain_attention(q, k, v, run.batch, run.seq, spec.heads)
        if kernel == "efficient":
            return ops.fused_attention(q, k, v, rows * -(-run.seq // 32) * 32,
                                       (run.batch, run.seq) if mask is not None else None, v.count)
        if not spec.head_dim % 8:
            return ops.fused_attention(q, k, v, rows * run.seq)
        padded = lambda t: ops.unary(t, "padded", count=t.count // spec.head_dim * (-(-spec.head_dim // 8) * 8))
        y = ops.fused_attention(*(padded(ops.amp(t)) for t in (q, k, v)), rows * run.seq)
        y = ops.slice(y, q.count)
        return ops.copy(y) if spec.heads > 1 else y  # a single head's rows need not be laid out anew
