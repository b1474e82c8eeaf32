"""GPT-BigCode (2301.03988; SantaCoder, StarCoder): GPT-2 whose heads share one key and one value."""

from typing import Any

from ..ledger import Tensor
from ..models import Fields, ModelSpec, NotPriced, register
from ..ops import Ops
from ..run import Run
from .decoder import Layer
from .gpt2 import GPT2, GPT2Decoder
from .hugging_face import Matrices


class GPTBigCodeDecoder(GPT2Decoder):
    """`GPTBigCodeForCausalLM`."""

    layers_see_positions = old_loss_in_fp32 = False

    def __init__(self, ops: Ops, spec: ModelSpec, run: Run, layers: int):
        super().__init__(ops, spec, run, layers)
        self.lower = ops.state(spec.context**2, 1, "buffers", "lower triangle")

    def block(self, x: Tensor, layer: Layer, tables: list) -> Tensor:
        ops = self.ops
        m, norms = layer
        residual = x
        h = self.norm(x, norms[0])
        out, weights = self.attention(h, m, tables)  # held to the end
        h = ops.add(out, residual, "residual sum")
        residual = h
        h = self.norm(h, norms[1])
        return ops.add(residual, self.mlp(h, m), "residual sum")

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        ops = self.ops
        qkv = ops.view(m[self.spec.layout.qkv[0]](x))
        q, k, v = ops.split(qkv, self.sizes_of_q_k_v(qkv))
        return ops.view(q), k, v


@register
class GPTBigCode(GPT2):
    model_type = "gpt_bigcode"
    decoder = GPTBigCodeDecoder
    activation = "gelu_pytorch_tanh"

    def read(self, config: Fields) -> dict[str, Any]:
        if not config.flag("multi_query", True):
            raise NotPriced(f"{config.name}: multi_query is false, which is not priced in closed form")
        return super().read(config) | {"kv_heads": 1}
