"""Models by family. Importing this package registers every one of them with timm."""

from .mobilenet_ulsam import MobileNetULSAM, MobileNetULSAMFeatures
from .shufflenetv2_weightnet import ShuffleNetV2

__all__ = ["MobileNetULSAM", "MobileNetULSAMFeatures", "ShuffleNetV2"]
