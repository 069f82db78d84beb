"""Drop-in layers, one system a file, and what puts them into a model."""

from .replace import replace_convs
from .ulsam import ULSAM
from .weight_net import WeightNet, WeightNetConv2d

__all__ = ["ULSAM", "WeightNet", "WeightNetConv2d", "replace_convs"]
