"""ULSAM's arithmetic: one function, `ulsam`, and beside it the plain version that every other is compared with."""

from .reference import Norm, attend, ulsam

__all__ = ["Norm", "attend", "ulsam"]
