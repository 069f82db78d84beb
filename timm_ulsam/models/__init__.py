"""Models by family. Importing this package registers every one of them with timm."""

from .doconv import DOConvEfficientNet, DOConvEfficientNetFeatures, DOConvResNet
from .mobilenet_ulsam import MobileNetULSAM, MobileNetULSAMFeatures
from .smt import SMT

__all__ = [
    "SMT",
    "DOConvEfficientNet",
    "DOConvEfficientNetFeatures",
    "DOConvResNet",
    "MobileNetULSAM",
    "MobileNetULSAMFeatures",
]
