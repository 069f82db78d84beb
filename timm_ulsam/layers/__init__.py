"""Drop-in layers, one system a file, and what puts them into a model."""

from .do_conv import DOConv2d
from .replace import replace_convs
from .ulsam import ULSAM

__all__ = ["ULSAM", "DOConv2d", "replace_convs"]
