"""Drop-in layers, one system a file, and what puts them into a model."""

from .do_conv import DOConv2d
from .ps_conv import PSConv2d
from .replace import replace_convs
from .scale_aware_modulation import ScaleAwareModulation
from .shuffle_attention import ShuffleAttention
from .ulsam import ULSAM

__all__ = ["ULSAM", "DOConv2d", "PSConv2d", "ScaleAwareModulation", "ShuffleAttention", "replace_convs"]
