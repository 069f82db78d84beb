"""Models by family. Importing this package registers every one of them with timm."""

from .mobilenet_ulsam import MobileNetULSAM, MobileNetULSAMFeatures
from .repmlpnet import RepMLPNet
from .resnet_repmlp import RepMLPResNet

__all__ = ["MobileNetULSAM", "MobileNetULSAMFeatures", "RepMLPNet", "RepMLPResNet"]
