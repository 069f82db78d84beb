"""Models by family. Importing this package registers every one of them with timm."""

from . import resnet_sa
from .mobilenet_ulsam import MobileNetULSAM, MobileNetULSAMFeatures
from .resnet_psconv import ResNetPSConv

__all__ = ["MobileNetULSAM", "MobileNetULSAMFeatures", "ResNetPSConv", "resnet_sa"]
