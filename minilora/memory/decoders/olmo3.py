"""OLMo 3 (2512.13961): OLMo 2 with three layers of a window to one of all tokens."""

from typing import Any

from ..ledger import Tensor
from ..models import Fields, register
from .olmo2 import Olmo2, Olmo2Decoder
from .several_kinds import SeveralKinds, read_pattern


class Olmo3Decoder(SeveralKinds, Olmo2Decoder):
    """`Olmo3ForCausalLM`."""

    def position_tables(self, x: Tensor) -> list[Tensor]:
        return Olmo2Decoder.position_tables(self, x)


@register
class Olmo3(Olmo2):
    model_type = "olmo3"
    decoder = Olmo3Decoder
    window = 4096

    def read(self, config: Fields) -> dict[str, Any]:
        sizes = super().read(config)
        return sizes | {"pattern": read_pattern(config, sizes["layers"], 4)}
