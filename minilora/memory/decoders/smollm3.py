"""SmolLM3: Llama in which each fourth layer has no rotary positions (NoPE, 2501.18795)."""

from typing import Any

from ..ledger import Tensor
from ..models import Fields, NotPriced, register
from .decoder import Layer
from .hugging_face import Matrices
from .llama import Llama, LlamaDecoder

TURNED, NOT_TURNED = "rotary", "no positions"


class SmolLM3Decoder(LlamaDecoder):
    """`SmolLM3ForCausalLM`."""

    turns = True

    def tables_of(self, tables: list, layer: int) -> list:
        return tables if self.spec.pattern[layer] == TURNED else [None, *tables[1:]]

    def block(self, x: Tensor, layer: Layer, tables: list) -> Tensor:
        self.turns = tables[0] is not None
        return super().block(x, layer, tables)

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        if self.turns:
            return super().queries_keys_values(x, m)
        q, k, v = (self.ops.view(m[name](x)) for name in self.spec.layout.qkv)
        return q, k, v

    def turned(self, q: Tensor, k: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
        return super().turned(q, k, tables) if self.turns else (q, k)


@register
class SmolLM3(Llama):
    model_type = "smollm3"
    decoder, own_decoder = SmolLM3Decoder, None
    tied = True

    def read(self, config: Fields) -> dict[str, Any]:
        if config.flag("use_sliding_window", False):
            raise NotPriced(f"{config.name}: use_sliding_window is true, which is not priced in closed form")
        sizes = super().read(config)
        every, layers = config.size("no_rope_layer_interval", 4), sizes["layers"]
        turned = config.config.get("no_rope_layers")
        turned = [(i + 1) % every for i in range(layers)] if turned is None else turned
        if not isinstance(turned, list) or len(turned) != layers:
            raise ValueError(f"{config.name}: no_rope_layers must be a list of {layers} numbers")
        return sizes | {"pattern": tuple(TURNED if there else NOT_TURNED for there in turned)}
