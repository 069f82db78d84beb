"""Models by family. Importing this package registers every one of them with timm."""

from .dbb import MobileNetDBB, MobileNetDBBFeatures, ResNetDBB
from .mobilenet_ulsam import MobileNetULSAM, MobileNetULSAMFeatures

__all__ = ["MobileNetDBB", "MobileNetDBBFeatures", "MobileNetULSAM", "MobileNetULSAMFeatures", "ResNetDBB"]
