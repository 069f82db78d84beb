"""Drop-in layers, one system a file, and what puts them into a model."""

from .rep_mlp import RepMLPBlock
from .rep_mlp_v1 import RepMLP
from .replace import replace_convs
from .ulsam import ULSAM

__all__ = ["ULSAM", "RepMLP", "RepMLPBlock", "replace_convs"]
