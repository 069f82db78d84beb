"""A convolution and its batch norm, which fold into one convolution."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._checks import check_input, check_positive
from ._folding import Kernel, double, folded, folded_conv, is_foldable, is_folded, is_plain

torch.fx.wrap("check_input")


def checked_norm(norm_layer: Callable[..., nn.Module], channels: int, **dd: Any) -> nn.Module:
    bn = norm_layer(channels, **dd)
    if not is_foldable(bn):
        raise ValueError(
            f"norm_layer={norm_layer!r} makes a {type(bn).__name__}: accepted is a batch norm with weight and running "
            f"statistics, such as torch.nn.BatchNorm2d"
        )
    return bn


def check_sizes(in_channels: int, out_channels: int, kernel_size: int, stride: int, dilation: int, groups: int) -> None:
    check_positive(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        groups=groups,
    )
    if in_channels % groups != 0 or out_channels % groups != 0:
        raise ValueError(f"groups={groups} does not divide in_channels={in_channels} and out_channels={out_channels}")


def centred_geometry(conv: nn.Conv2d) -> dict[str, int]:
    """Arguments of a `ConvBN` or Diverse Branch Block in the place of a convolution.

    Raises:
        ValueError: If no layer can take its place.
    """
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode={conv.padding_mode!r}; accepted: 'zeros'")
    for name in ("kernel_size", "stride", "dilation"):
        if len(set(getattr(conv, name))) != 1:
            raise ValueError(f"{name}={getattr(conv, name)}; accepted: the same in both directions")
    kernel_size, stride, dilation = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
    centred = dilation * (kernel_size // 2)
    if conv.padding not in ("same", (centred, centred)) and (conv.padding, kernel_size) != ("valid", 1):
        raise ValueError(f"padding={conv.padding!r}; accepted: {centred}")
    return dict(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=centred,
        dilation=dilation,
        groups=conv.groups,
    )


def every(x: torch.Tensor, step: int) -> torch.Tensor:
    """Every `step`-th row and column, beginning with the first."""
    return x if step == 1 else x[:, :, ::step, ::step]


class ConvBN(nn.Module):
    """A convolution without bias and a batch norm; after `reparameterize()` one convolution with bias.

    Keys of its state dict: `conv`, `bn`; folded: `conv` alone. A folded state dict loads into an unfolded layer, which
    then is folded.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W').

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Of the convolution.
        stride: Of the convolution.
        padding: Of the convolution; None for `dilation * (kernel_size // 2)`.
        dilation: Of the convolution.
        groups: Of the convolution.
        norm_layer: Batch norm, called with a number of channels.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If a size is no positive integer, `groups` does not divide the channels, or `norm_layer` makes
            something that does not fold.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        *,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_sizes(in_channels, out_channels, kernel_size, stride, dilation, groups)
        self.in_channels = in_channels
        self.out_channels = out_channels
        padding = dilation * (kernel_size // 2) if padding is None else padding
        # oneDNN's gradient for a strided 1x1 convolution of fewer channels than its blocks hold writes past its memory
        # in channels_last (https://github.com/uxlfoundation/oneDNN/issues/6035): positions are left out before it
        self.step = stride if kernel_size == 1 and padding == 0 and in_channels // groups < 16 else 1
        geometry = kernel_size, stride // self.step, padding, dilation, groups
        self.conv = nn.Conv2d(in_channels, out_channels, *geometry, bias=False, **dd)
        self.bn = checked_norm(norm_layer, out_channels, **dd)

    @classmethod
    def of(cls, conv: nn.Conv2d, bn: nn.Module) -> "ConvBN":
        """The two modules as one."""
        pair = cls.__new__(cls)
        nn.Module.__init__(pair)
        pair.in_channels, pair.out_channels = conv.in_channels, conv.out_channels
        pair.conv, pair.bn, pair.step = conv, bn, 1
        return pair.train(conv.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_input(x, self.in_channels)
        return self.bn(self.conv(every(x, self.step)))

    def can_fold(self) -> bool:
        """Whether both parts still are what was built here, or something that computes as they do."""
        return is_plain(self.conv) and (isinstance(self.bn, nn.Identity) or is_foldable(self.bn))

    def folded_kernel(self) -> Kernel:
        """Weight and bias of the equivalent convolution, in float64."""
        bias = None if self.conv.bias is None else double(self.conv.bias)
        return folded(double(self.conv.weight), bias, self.bn)

    def reparameterize(self) -> None:
        """Fold the batch norm into the convolution, in place: `--reparam` of timm's scripts.

        Running statistics become constants, in training mode too. A second call changes nothing, and neither does a
        first where the norm was replaced by something that does not fold.
        """
        if self.can_fold() and not isinstance(self.bn, nn.Identity):
            self.conv, self.bn = folded_conv(self.conv, self.folded_kernel()), nn.Identity()

    def fold_as(self, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
        """Fold if that is the form of the state dict."""
        if is_folded(state_dict, f"{prefix}conv", f"{prefix}bn"):
            self.reparameterize()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self.fold_as(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
