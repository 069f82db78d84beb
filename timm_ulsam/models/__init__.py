"""Models by family. Importing this package registers every one of them with timm."""

from .mobilenet_ulsam import MobileNetULSAM, MobileNetULSAMFeatures
from .smt import SMT

__all__ = ["SMT", "MobileNetULSAM", "MobileNetULSAMFeatures"]
