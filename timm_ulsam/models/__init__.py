"""Models by family. Importing this package registers every one of them with timm."""

from . import resnet_sa
from .dbb import MobileNetDBB, MobileNetDBBFeatures, ResNetDBB
from .doconv import DOConvEfficientNet, DOConvEfficientNetFeatures, DOConvResNet
from .mobilenet_ulsam import MobileNetULSAM, MobileNetULSAMFeatures
from .repmlpnet import RepMLPNet
from .resnet_psconv import ResNetPSConv
from .resnet_repmlp import RepMLPResNet
from .shufflenetv2_weightnet import ShuffleNetV2
from .smt import SMT

__all__ = [
    "SMT",
    "DOConvEfficientNet",
    "DOConvEfficientNetFeatures",
    "DOConvResNet",
    "MobileNetDBB",
    "MobileNetDBBFeatures",
    "MobileNetULSAM",
    "MobileNetULSAMFeatures",
    "RepMLPNet",
    "RepMLPResNet",
    "ResNetDBB",
    "ResNetPSConv",
    "ShuffleNetV2",
    "resnet_sa",
]
