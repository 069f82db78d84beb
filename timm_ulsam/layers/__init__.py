"""Drop-in layers, one system a file, and what puts them into a model."""

from .diverse_branch_block import ConvBN, DiverseBranchBlock
from .replace import replace_convs
from .ulsam import ULSAM

__all__ = ["ULSAM", "ConvBN", "DiverseBranchBlock", "replace_convs"]
