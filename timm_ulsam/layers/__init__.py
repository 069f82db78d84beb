"""Drop-in layers, one system a file, and what puts them into a model."""

from .replace import replace_convs
from .ulsam import ULSAM

__all__ = ["ULSAM", "replace_convs"]
