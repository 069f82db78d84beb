"""Drop-in layers, one system a file, and what puts them into a model."""

from .ps_conv import PSConv2d
from .replace import replace_convs
from .shuffle_attention import ShuffleAttention
from .ulsam import ULSAM

__all__ = ["ULSAM", "PSConv2d", "ShuffleAttention", "replace_convs"]
