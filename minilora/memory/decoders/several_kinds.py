"""Decoders with two kinds of layer: those that see a window of tokens, and those that see all."""

from ..ledger import Tensor
from ..models import Fields, ModelSpec
from ..ops import Ops
from ..run import Run
from .hugging_face import HuggingFaceDecoder

SLIDING, FULL = "sliding_attention", "full_attention"


class SeveralKinds(HuggingFaceDecoder):
    """Each of the two kinds has its mask, and rotary tables of its own where ``own_tables``."""

    windows = ("", "window")
    own_tables = True

    def __init__(self, ops: Ops, spec: ModelSpec, run: Run, layers: int):
        self.kinds = sorted(set(spec.pattern)) if self.own_tables else [""]
        super().__init__(ops, spec, run, layers)
        for _ in self.kinds[1:]:
            self.more = [ops.state(spec.head_dim // 2, 4, "buffers", "rotary frequencies") for _ in range(2)]

    def tables(self, x: Tensor) -> list:
        """For each kind of the layers played its rotary tables; then the mask of all tokens, and that of the window."""
        with self.ops.inside("positions"):
            masks = [self.mask(x, window) for window in self.windows]
            return [*(t for _ in self.kinds for t in self.position_tables(x)), *masks]

    def tables_of(self, tables: list, layer: int) -> list:
        kind = self.spec.pattern[layer]
        first = 2 * self.kinds.index(kind) if self.own_tables else 0
        return [*tables[first:first + 2], tables[-1] if kind == SLIDING else tables[-2]]


def read_pattern(config: Fields, layers: int, every: int) -> tuple[str, ...]:
    """The kind of each layer, by ``layer_types``; without it each so-manieth layer sees all tokens."""
    pattern = config.config.get("layer_types")
    if pattern is None:
        return tuple(FULL if (i + 1) % every == 0 else SLIDING for i in range(layers))
    if (not isinstance(pattern, (list, tuple)) or len(pattern) != layers
            or any(kind not in (SLIDING, FULL) for kind in pattern)):
        raise ValueError(f"{config.name}: layer_types must be a list of {layers} times {SLIDING} or {FULL}")
    return tuple(pattern)
