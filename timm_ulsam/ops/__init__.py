"""ULSAM's arithmetic: one function, `ulsam`, and beside it the plain version that every other is compared with."""

from .dispatch import ulsam
from .fold import fold
from .reference import Norm, as_dtype, attend

__all__ = ["Norm", "as_dtype", "attend", "fold", "ulsam"]
