"""Drop-in layers, one system a file, and what puts them into a model."""

from .conv_bn import ConvBN
from .diverse_branch_block import DiverseBranchBlock
from .do_conv import DOConv2d
from .ps_conv import PSConv2d
from .rep_mlp import RepMLPBlock
from .rep_mlp_v1 import RepMLP
from .replace import replace_convs
from .scale_aware_modulation import ScaleAwareModulation
from .shuffle_attention import ShuffleAttention
from .ulsam import ULSAM
from .weight_net import WeightNet, WeightNetConv2d

__all__ = [
    "ULSAM",
    "ConvBN",
    "DOConv2d",
    "DiverseBranchBlock",
    "PSConv2d",
    "RepMLP",
    "RepMLPBlock",
    "ScaleAwareModulation",
    "ShuffleAttention",
    "WeightNet",
    "WeightNetConv2d",
    "replace_convs",
]
