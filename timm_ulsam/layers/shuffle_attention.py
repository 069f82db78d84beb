"""Shuffle Attention (SA).

Paper: `SA-Net: Shuffle Attention for Deep Convolutional Neural Networks`
- https://arxiv.org/abs/2102.00240 (ICASSP 2021)
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import as_dtype
from ._checks import check_input, check_positive, divisors, is_positive

torch.fx.wrap("check_input")
torch.fx.wrap("shuffle_attention")


def _with_group_norm(
    x: torch.Tensor,
    cweight: torch.Tensor,
    cbias: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    channels: int,
    groups: int,
    eps: float,
) -> torch.Tensor:
    n, _, height, width = x.shape
    a, b = x.reshape(n, groups, 2, channels // (2 * groups), height, width).unbind(2)
    channel_gate = torch.sigmoid(cweight * a.mean((3, 4), keepdim=True) + cbias)
    b = b.reshape(n, channels // 2, height, width)
    # not F.group_norm, which refuses to train on one image of one pixel
    normed = torch.group_norm(b, channels // 2, scale.repeat(groups), shift.repeat(groups), eps)
    return torch.stack((a * channel_gate, (b * normed.sigmoid_()).view_as(a)), 2).reshape(x.shape)


def _without_gradient(
    x: torch.Tensor,
    cweight: torch.Tensor,
    cbias: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    groups: int,
    eps: float,
) -> torch.Tensor:
    # both gates as sigmoid(slope * (x - mean) + offset), with one slope and offset per image and channel
    n, channels = x.shape[0], x.shape[1]
    split = (n, groups, 2, channels // (2 * groups))
    is_half = x.dtype == torch.float16 or x.dtype == torch.bfloat16
    exact = x.float() if is_half else x
    mean = exact.mean((2, 3), keepdim=True)
    centred = exact - mean
    variance = (centred * centred).mean((2, 3)).view(split).select(2, 1)
    slope = scale * torch.rsqrt(variance + eps)
    slope = torch.stack((torch.zeros_like(slope), slope), 2).view(n, channels, 1, 1)
    offset = cweight.flatten() * mean.view(split).select(2, 0) + cbias.flatten()
    offset = torch.stack((offset, shift.to(offset.dtype).expand_as(offset)), 2).view(n, channels, 1, 1)
    return centred.mul_(slope).add_(offset).sigmoid_().mul_(x)


def _shuffled(x: torch.Tensor) -> torch.Tensor:
    # over all channels, not within the groups: published weights depend on it
    if torch.jit.is_tracing():
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)  # in operators that ONNX has
    return F.channel_shuffle(x, 2)


def shuffle_attention(
    x: torch.Tensor,
    cweight: torch.Tensor,
    cbias: torch.Tensor,
    sweight: torch.Tensor,
    sbias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    channels: int,
    groups: int,
    eps: float,
) -> torch.Tensor:
    """What `ShuffleAttention` computes of its input and its parameters.

    `channels`, those of `x`, stays a number where the sizes of `x` are traced, as for ONNX with dynamic axes.
    """
    # the group norm and the affine map behind it are one affine map
    scale = sweight.flatten() * weight
    shift = sweight.flatten() * bias + sbias.flatten()
    # in this order, as torch.func.vmap knows of contiguous memory alone
    is_channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    if is_channels_last and not torch.is_grad_enabled() and not torch.jit.is_tracing():
        # about twice as fast; with a gradient, slower
        y = _without_gradient(x, cweight, cbias, scale, shift, groups, eps)
    else:
        y = _with_group_norm(x, cweight, cbias, scale, shift, channels, groups, eps)
    y = _shuffled(as_dtype(y, x.dtype))
    return y.contiguous(memory_format=torch.channels_last) if is_channels_last else y


class ShuffleAttention(nn.Module):
    """Channel attention on one half of every group of channels, spatial attention on the other, then a shuffle.

    Channels are split into `groups` equal, consecutive groups and each of them into two halves of
    k = channels / (2 * groups). The first half, a, becomes a * sigmoid(cweight * mean(a) + cbias), with the mean over
    H and W; the second, b, becomes b * sigmoid(sweight * gn(b) + sbias), where gn normalizes each channel of each image
    alone. All groups share the 6k parameters. At last the two halves of all channels are interleaved: channel i goes to
    2i, channel i + channels / 2 to 2i + 1.

    A state dict saved by the published code loads as it is.

    Shape: (N, channels, H, W) to the same shape, dtype and memory format.

    Args:
        channels: Number of channels of the input.
        groups: Number of groups G, a divisor of half the channels. The published 64 needs a multiple of 128 channels.
        act_layer: Not used, there is no activation but the gates: timm's CSPNet and EfficientNet pass theirs.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If `channels` is odd or `groups` does not divide half of it; in `forward`, if the input is not of
            shape (N, channels, H, W).
    """

    def __init__(
        self,
        channels: int,
        groups: int = 64,
        *,
        act_layer: object = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_positive(channels=channels)
        if channels % 2 != 0:
            raise ValueError(f"channels={channels} is odd; accepted: even numbers, as one half is attended by channel")
        if not is_positive(groups) or channels % (2 * groups) != 0:
            raise ValueError(
                f"groups={groups!r} does not divide half of channels={channels}; pass groups, "
                f"accepted: {divisors(channels // 2)}"
            )
        self.channels = channels
        self.groups = groups
        width = channels // (2 * groups)
        self.cweight = nn.Parameter(torch.zeros(1, width, 1, 1, **dd))
        self.cbias = nn.Parameter(torch.ones(1, width, 1, 1, **dd))
        self.sweight = nn.Parameter(torch.zeros(1, width, 1, 1, **dd))
        self.sbias = nn.Parameter(torch.ones(1, width, 1, 1, **dd))
        self.gn = nn.GroupNorm(width, width, **dd)

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}"

    def reset_parameters(self) -> None:
        for weight in (self.cweight, self.sweight):
            nn.init.zeros_(weight)
        for bias in (self.cbias, self.sbias):
            nn.init.ones_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_input(x, self.channels)
        gates = self.cweight, self.cbias, self.sweight, self.sbias
        return shuffle_attention(x, *gates, self.gn.weight, self.gn.bias, self.channels, self.groups, self.gn.eps)
