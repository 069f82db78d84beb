"""Drop-in layers, one system a file."""

from .ulsam import ULSAM

__all__ = ["ULSAM"]
