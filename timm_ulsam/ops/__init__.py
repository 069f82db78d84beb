"""ULSAM's arithmetic: one function, `ulsam`, and beside it the plain version that every other is compared with."""

from .dispatch import ulsam
from .dtypes import as_dtype, is_autocast
from .fold import fold
from .reference import Norm, attend

__all__ = ["Norm", "as_dtype", "attend", "fold", "is_autocast", "ulsam"]
