"""Convolutions to one value and the batch norm behind them, as one affine map per channel."""

import torch

from .reference import Norm


def fold(weight: torch.Tensor, bias: torch.Tensor, norm: Norm | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of a convolution and a batch norm on running statistics.

    Args:
        weight: Weight of the convolution, (C, ...).
        bias: Its bias, (C,).
        norm: Batch norm behind it, not in training; None leaves weight and bias as they are.

    Returns:
        Weight and bias of a convolution that gives what both gave, in the shapes of `weight` and `bias`.
    """
    if norm is None:
        return weight, bias
    scale = torch.rsqrt(norm.running_var + norm.eps) * norm.weight
    shift = torch.addcmul(norm.bias, bias - norm.running_mean, scale)
    return weight * scale.view(-1, *(1,) * (weight.dim() - 1)), shift
