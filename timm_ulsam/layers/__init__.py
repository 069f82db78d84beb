"""Drop-in layers, one system a file, and what puts them into a model."""

from .conv_bn import ConvBN
from .diverse_branch_block import DiverseBranchBlock
from .replace import replace_convs
from .ulsam import ULSAM

__all__ = ["ULSAM", "ConvBN", "DiverseBranchBlock", "replace_convs"]
