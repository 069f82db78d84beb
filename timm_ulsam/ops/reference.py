"""ULSAM's arithmetic, step by step: slow, obviously right, and what every other version is compared with.

Paper: `ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks`
- https://arxiv.org/abs/2006.15102
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .dtypes import as_dtype

torch.fx.wrap("as_dtype")


class Norm(NamedTuple):
    """What a batch norm over C channels holds.

    Attributes:
        weight: Scale, (C,).
        bias: Shift, (C,).
        running_mean: (C,), or None to use the statistics of the batch only.
        running_var: (C,), or None.
        training: Whether to use the statistics of the batch, and to update the running ones in place.
        momentum: Share of the batch in the updated running statistics.
        eps: Added to the variance.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    training: bool
    momentum: float
    eps: float


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether (N, C, H, W) lies channels last, and not contiguous as well."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def batch_norm(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """Batch norm of (N, C, H, W) over N, H and W; `x` itself if there is none, as in a folded layer."""
    if norm is None:
        return x
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
    )


def attend(x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """`x * A + x` with one map A for each of g consecutive groups of channels.

    Shape: (N, C, H, W) and (N, g, H, W) to (N, C, H, W), in the dtype and memory format of `x`.
    """
    batch, channels, height, width = x.shape
    splits = maps.shape[1]
    subspaces = x.view(batch, splits, channels // splits, height, width)
    # in one step: in half precision 1 + A, rounded by itself, would lose the attention
    return torch.addcmul(subspaces, subspaces, as_dtype(maps, x.dtype).unsqueeze(2)).flatten(1, 2)


def scores(
    x: torch.Tensor, weight_dw: torch.Tensor, bias_dw: torch.Tensor, norm_dw: Norm | None, weight_pw: torch.Tensor
) -> torch.Tensor:
    """What each position of each subspace weighs, before bias and batch norm.

    Shape: (N, C, H, W) to (N, g, H, W); arguments as for `ulsam`.
    """
    y = F.conv2d(x, weight_dw, bias_dw, groups=x.shape[1])
    y = F.max_pool2d(batch_norm(y, norm_dw).relu(), 3, stride=1, padding=1)
    return F.conv2d(y, weight_pw, groups=weight_pw.shape[0])


def attention(
    z: torch.Tensor, bias_pw: torch.Tensor, norm_pw: Norm | None, map_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention maps from what `scores` returns.

    Shape: (N, g, H, W) to the same; arguments as for `ulsam`.
    """
    z = batch_norm(z + bias_pw.view(1, -1, 1, 1), norm_pw).relu()
    maps = z.flatten(2).softmax(dim=-1).view(z.shape)
    return maps if map_scale is None else maps * map_scale


def ulsam(
    x: torch.Tensor,
    weight_dw: torch.Tensor,
    bias_dw: torch.Tensor,
    norm_dw: Norm | None,
    weight_pw: torch.Tensor,
    bias_pw: torch.Tensor,
    norm_pw: Norm | None,
    map_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Subspace attention, one PyTorch operation after the other.

    Args:
        x: Input, (N, C, H, W).
        weight_dw: Weight of the 1x1 depthwise convolution, (C, 1, 1, 1).
        bias_dw: Its bias, (C,).
        norm_dw: Batch norm behind it, over C channels.
        weight_pw: Weight of the 1x1 convolution from each of g subspaces to one channel, (g, C / g, 1, 1).
        bias_pw: Its bias, (g,).
        norm_pw: Batch norm behind it, over g channels.
        map_scale: Factor of each sample's maps, (N, 1, 1, 1): stochastic depth.

    Returns:
        (N, C, H, W), in the dtype and memory format of `x`.
    """
    z = scores(x, weight_dw, bias_dw, norm_dw, weight_pw)
    return attend(x, attention(z, bias_pw, norm_pw, map_scale))
