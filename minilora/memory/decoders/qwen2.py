"""Qwen2 and Qwen2.5 (2407.10671): Llama with biases on q, k and v."""

from ..models import register
from .llama import Llama


@register
class Qwen2(Llama):
    model_type = "qwen2"
    qkv_bias = True
    attention_bias_field = mlp_bias_field = ""
