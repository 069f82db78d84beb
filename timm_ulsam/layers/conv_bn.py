"""A convolution and its batch norm, which fold into one convolution."""

from collections.abc import Callable

import torch
from torch import nn

# known by name, several of them being torchvision's and timm's; all of them do the same on running statistics
_NORMS = ("BatchNorm1d", "BatchNorm2d", "SyncBatchNorm", "FrozenBatchNorm2d", "SplitBatchNorm2d")


def float64(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in float64, on the CPU where the device has no such numbers."""
    device = "cpu" if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device, torch.float64, copy=True)


def scale_and_shift(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What a batch norm on running statistics multiplies each channel with and then adds to it, in float64.

    Returns:
        Scale and shift, (C,) each; None if `norm` is no batch norm, or has no running statistics.
    """
    known = type(norm).__name__ in _NORMS and type(norm).__module__.split(".")[0] in ("torch", "torchvision", "timm")
    if not known or norm.running_mean is None:
        return None
    scale = torch.rsqrt(float64(norm.running_var) + norm.eps)
    if norm.weight is not None:
        scale *= float64(norm.weight)
    shift = -float64(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + float64(norm.bias)


class ConvBN(nn.Module):
    """A convolution without bias and a batch norm.

    A state dict saved after folding loads into a new layer, which then is folded too.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W').

    Args:
        in_channels: Number of channels of the input.
        out_channels: Number of channels of the output.
        kernel_size: Side of the kernel.
        stride: Stride of the convolution.
        padding: Zeros on every side; None keeps height and width at stride 1 and an odd kernel.
        groups: Groups of the convolution.
        norm_layer: Normalization, called with a number of channels.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        padding = kernel_size // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False, **dd)
        self.bn = norm_layer(out_channels, **dd)

    @classmethod
    def of(cls, conv: nn.Module, bn: nn.Module) -> "ConvBN":
        """The two modules as one."""
        pair = cls.__new__(cls)
        nn.Module.__init__(pair)
        pair.conv, pair.bn = conv, bn
        return pair.train(conv.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))

    def folded(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weight and bias of the one convolution, in float64.

        Returns:
            Both, or None where there is none: another norm, or a convolution that was replaced or computes its weight
            (parametrization, pruning).
        """
        conv = self.conv
        if type(conv) is not nn.Conv2d or conv._parameters.get("weight") is None:
            return None
        weight = float64(conv.weight)
        bias = weight.new_zeros(conv.out_channels) if conv.bias is None else float64(conv.bias)
        if type(self.bn) is nn.Identity:
            return weight, bias
        norm = scale_and_shift(self.bn)
        if norm is None:
            return None
        scale, shift = norm
        return weight * scale.view(-1, 1, 1, 1), bias * scale + shift

    def reparameterize(self) -> None:
        """Fold the batch norm into the convolution, in place, for inference; again, or where it cannot be: nothing."""
        folded = None if type(self.bn) is nn.Identity else self.folded()
        if folded is not None:
            with torch.no_grad():
                self.conv.weight.copy_(folded[0])
            self._take(folded[1])

    def _take(self, bias: torch.Tensor) -> None:
        weight = self.conv.weight
        self.conv.bias = nn.Parameter(bias.to(weight.device, weight.dtype), weight.requires_grad)
        self.bn = nn.Identity()

    def take_form(self, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
        """Become folded, with weights yet to load, if the layer was that `state_dict` was saved from."""
        if is_folded(state_dict, f"{prefix}conv", f"{prefix}bn") and type(self.bn) is not nn.Identity:
            self._take(torch.zeros(self.conv.out_channels, device=self.conv.weight.device))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        self.take_form(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)


def is_folded(state_dict: dict[str, torch.Tensor], linear: str, norm: str) -> bool:
    """Whether `linear` of a state dict has taken in the batch norm `norm`: it has a bias, and the norm is not there."""
    return f"{linear}.bias" in state_dict and not any(k.startswith(f"{norm}.") for k in state_dict)
