"""Models by family. Importing this package registers every one of them with timm."""

from .mobilenet_ulsam import MobileNetULSAM, MobileNetULSAMFeatures

__all__ = ["MobileNetULSAM", "MobileNetULSAMFeatures"]
