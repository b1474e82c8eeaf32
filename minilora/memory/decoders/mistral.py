"""Mistral (2310.06825): Llama without biases. Its sliding window is not priced."""

from ..models import register
from .llama import Llama


@register
class Mistral(Llama):
    model_type = "mistral"
    attention_bias_field = mlp_bias_field = ""
