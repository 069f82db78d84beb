"""ULSAM's arithmetic: one function, `ulsam`, and beside it the plain version that every other is compared with."""

from .dispatch import ulsam
from .fold import fold
from .reference import Norm, attend

__all__ = ["Norm", "attend", "fold", "ulsam"]
