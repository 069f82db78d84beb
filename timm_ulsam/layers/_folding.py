"""What folding batch norms into the convolutions before them takes. All of it computes in float64."""

import torch
from torch import nn
from torch.nn.utils import skip_init

from ..ops import Norm, fold

Kernel = tuple[torch.Tensor, torch.Tensor]  # weight and bias of a convolution, in float64

# Known by name, some being torchvision's and timm's; all of them do the same on running statistics.
_NORMS = ("BatchNorm1d", "BatchNorm2d", "SyncBatchNorm", "FrozenBatchNorm2d", "SplitBatchNorm2d")


def double(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, without gradient; on the CPU where the device has no such numbers."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward: pruning, for one, makes the weight in a hook."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_foldable(norm: nn.Module) -> bool:
    """Whether a module is a batch norm with weight, bias and running statistics, without hooks."""
    known = type(norm).__name__ in _NORMS and type(norm).__module__.split(".")[0] in ("torch", "torchvision", "timm")
    return (
        known
        and norm.weight is not None
        and norm.bias is not None
        and norm.running_mean is not None
        and not has_hooks(norm)
    )


def is_plain(conv: nn.Module) -> bool:
    """Whether a module is a convolution of its weight, which hooks (pruning, for one) may make stale or change."""
    return (
        isinstance(conv, nn.Conv2d)
        and type(conv).forward is nn.Conv2d.forward
        and type(conv)._conv_forward is nn.Conv2d._conv_forward
        and not has_hooks(conv)
    )


def scale_and_shift(norm: nn.Module) -> Kernel:
    """What a foldable batch norm multiplies each channel with and then adds to it, (C,) each."""
    of_statistics = double(norm.running_var)
    return folded(torch.ones_like(of_statistics), None, norm)


def folded(weight: torch.Tensor, bias: torch.Tensor | None, norm: nn.Module) -> Kernel:
    """One convolution in the place of a convolution (weight and bias in float64) and the norm behind it, if any."""
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])
    if isinstance(norm, nn.Identity):
        return weight, bias
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    return fold(weight, bias, Norm(*map(double, tensors), False, 0.0, norm.eps))


def folded_conv(conv: nn.Conv2d, kernel: Kernel) -> nn.Conv2d:
    """A convolution with a bias of the geometry, device, dtype and memory format of `conv`."""
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    dd = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    new = skip_init(nn.Conv2d, conv.in_channels, conv.out_channels, *geometry, padding_mode=conv.padding_mode, **dd)
    with torch.no_grad():
        new.weight = nn.Parameter(torch.empty_like(conv.weight).copy_(kernel[0]))
        new.bias.copy_(kernel[1])
    return new.requires_grad_(conv.weight.requires_grad).train(conv.training)


def is_folded(state_dict: dict[str, torch.Tensor], linear: str, norm: str) -> bool:
    """Whether `linear` of a state dict has taken in the batch norm `norm`: it has a bias, and the norm is not there."""
    return f"{linear}.bias" in state_dict and not any(key.startswith(f"{norm}.") for key in state_dict)
