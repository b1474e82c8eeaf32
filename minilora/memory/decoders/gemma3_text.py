"""Gemma 3 (2503.19786), its text model: Gemma 2 with a norm over each head of q and of k in the place of caps.

Five layers of a window take turns with one of all tokens, each kind with rotary tables of its own.
"""

from typing import Any

from ..ledger import Tensor
from ..models import Fields, ModelSpec, register
from .gemma2 import Gemma2, Gemma2Decoder
from .hugging_face import SCALED, Matrices
from .qwen3 import HEAD_NORMS
from .several_kinds import SeveralKinds, read_pattern


class Gemma3Decoder(SeveralKinds, Gemma2Decoder):
    """`Gemma3ForCausalLM`."""

    always_eager = False
    windows = ("", "window")
    score_steps, logit_steps = SCALED, ()

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        ops, (q, k, v) = self.ops, self.spec.layout.qkv
        q, k = (m[norm](ops.view(m[name](x))) for name, norm in zip((q, k), HEAD_NORMS))
        return q, k, ops.view(m[v](x))


@register
class Gemma3Text(Gemma2):
    model_type = "gemma3_text"
    decoder = Gemma3Decoder
    window = 4096

    def extra_norms(self, spec: ModelSpec) -> dict[str, int]:
        return dict.fromkeys(HEAD_NORMS, spec.head_dim)

    def read(self, config: Fields) -> dict[str, Any]:
        sizes = super().read(config)
        return sizes | {"pattern": read_pattern(config, sizes["layers"], config.size("sliding_window_pattern", 6))}
