"""RepMLPBlock, a fully connected layer over positions that is trained beside convolutions and takes them in.

Paper: `RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality`
- https://arxiv.org/abs/2112.11081 (CVPR 2022)

The block of the first paper is in `rep_mlp_v1.py`.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import nn

from ._activation import ActLayer, create_act
from ._checks import check_input, check_positive, divisors, is_positive
from ._folding import double, is_foldable, is_folded, scale_and_shift
from .conv_bn import ConvBN

torch.fx.wrap("check_partitions")


def check_partitions(x: torch.Tensor, channels: int, h: int, w: int) -> None:
    """Refuse what is not of shape (N, channels, a multiple of h, a multiple of w).

    Raises:
        ValueError: Names the shape and the accepted one.
    """
    check_input(x, channels)
    if torch.jit.is_tracing():
        return  # as in `check_input`
    if x.shape[2] % h != 0 or x.shape[3] % w != 0:
        raise ValueError(
            f"input x of height {x.shape[2]} and width {x.shape[3]} cannot be cut into partitions: "
            f"accepted are multiples of h={h} and of w={w}"
        )


def check_kernel_sizes(kernel_sizes: Iterable[int]) -> tuple[int, ...]:
    """Refuse kernels that would not keep the size of a partition.

    Raises:
        ValueError: Names the argument and the accepted values.
    """
    sizes = tuple(kernel_sizes) if isinstance(kernel_sizes, Iterable) else (None,)
    if not all(is_positive(k) and k % 2 == 1 for k in sizes) or len(set(sizes)) != len(sizes):
        raise ValueError(f"kernel_sizes={kernel_sizes!r}: accepted are different odd positive integers")
    return sizes


class GroupedFC(nn.Module):
    """A fully connected layer in each of a number of groups of features.

    Weight and bias are those of a 1x1 convolution with groups, whose names and shapes published weights have. One
    product of matrices for all groups computes the same, on a CPU 2 to 20 times as fast.

    Shape: (R, ...) with `features` values in each of the R rows to (R, groups, features / groups).

    Args:
        features: Number of features, in and out.
        groups: Number of groups, a divisor of `features`.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        features: int,
        groups: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(features, features // groups, 1, 1, device=device, dtype=dtype))
        self.register_parameter("bias", None)  # until something is folded into it
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.features}, groups={self.groups}, bias={self.bias is not None}"

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Conv2d and nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = self.features // self.groups
        x = x.reshape(x.shape[0], self.groups, width).transpose(0, 1)
        weight = self.weight.view(self.groups, width, width).transpose(1, 2)
        if self.bias is None:
            x = torch.bmm(x, weight)
        else:
            x = torch.baddbmm(self.bias.view(self.groups, 1, width), x, weight)
        return x.transpose(0, 1)


class FoldsIntoFC(nn.Module):
    """What the blocks of both papers share: `fc3`, `fc3_bn` and `repconv<k>` that fold into one `fc3` with a bias."""

    def _add_local_perceptron(
        self, channels: int, groups: int, kernel_sizes: tuple[int, ...], norm_layer: Callable[..., nn.Module], **dd
    ) -> None:
        for k in kernel_sizes:
            self.add_module(f"repconv{k}", ConvBN(channels, channels, k, groups=groups, norm_layer=norm_layer, **dd))

    def _branches(self) -> list[str]:
        return [name for name, _ in self.named_children() if name.startswith("repconv")]

    def _folded(self, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weight and bias of the one layer, in float64; None if there is something that does not fold."""
        branches = [getattr(self, name) for name in self._branches()]
        plain = type(self.fc3) is GroupedFC and self.fc3._parameters.get("weight") is not None
        if not plain or not is_foldable(self.fc3_bn) or not all(branch.can_fold() for branch in branches):
            return None
        weight = double(self.fc3.weight).clone().flatten(1)
        rows = weight.shape[0]
        # one scale for each share-set in one paper, for each row in the other
        scale, bias = (t.repeat_interleave(rows // t.numel()) for t in scale_and_shift(self.fc3_bn))
        weight *= scale.unsqueeze(1)
        for kernel, shift in (branch.folded_kernel() for branch in branches):
            add_conv(weight.view(kernel.shape[0], h * w, kernel.shape[1], h * w), kernel, w)
            bias = bias + shift.repeat_interleave(h * w)
        return weight.view(rows, -1, 1, 1), bias

    def _take(self, bias: torch.Tensor) -> None:
        weight = self.fc3.weight
        self.fc3.bias = nn.Parameter(bias.to(weight.device, weight.dtype), weight.requires_grad)
        self.fc3_bn = nn.Identity()
        for name in self._branches():
            delattr(self, name)

    def fold_as(self, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
        """Become folded, with weights yet to load, if the layer was that `state_dict` was saved from."""
        if is_folded(state_dict, f"{prefix}fc3", f"{prefix}fc3_bn") and self.fc3.bias is None:
            self._take(torch.zeros(self.fc3.features, device=self.fc3.weight.device))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        self.fold_as(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)


def add_conv(matrix: torch.Tensor, kernel: torch.Tensor, w: int) -> None:
    """Add to a matrix over all positions of a partition, in place, what a convolution of the partition does.

    Only the entries that a kernel reaches are touched: nothing of the size of the matrix is made.

    Args:
        matrix: (channels out, h * w positions out, channels in of a group, h * w positions in).
        kernel: (channels out, channels in of a group, k, k), for stride 1 and k // 2 zeros on every side.
        w: Width of the partition.
    """
    k = kernel.shape[-1]
    h = matrix.shape[1] // w
    ky, kx, y, x = torch.meshgrid(*(torch.arange(n, device="cpu") for n in (k, k, h, w)), indexing="ij")
    y_in, x_in = y + ky - k // 2, x + kx - k // 2
    inside = (y_in >= 0) & (y_in < h) & (x_in >= 0) & (x_in < w)
    position_out, position_in = (y * w + x)[inside], (y_in * w + x_in)[inside]
    matrix[:, position_out, :, position_in] += kernel[:, :, ky[inside], kx[inside]].permute(2, 0, 1)


class RepMLPBlock(FoldsIntoFC):
    """A fully connected layer over all positions of a partition, shared by channels, with convolutions beside it.

    The image is cut into partitions of h x w positions. In each, channel c is mapped by the (h * w) x (h * w) matrix
    number c mod `num_sharesets` (`fc3`, then batch norm); depthwise convolutions (`repconv<k>`, then batch norm) that
    see the same partition, padded with zeros, are added. The result is scaled by one factor for each channel that
    follows from the global average of the input (`gp`).

    `reparameterize` folds batch norms and convolutions into `fc3`. State dicts of the published code, in both forms,
    load as they are; what was saved after folding loads into a new layer, which then is folded too.

    Shape: (N, channels, H, W) to the same; H and W are multiples of h and w.

    Args:
        channels: Number of channels of the input.
        h: Height of a partition.
        w: Width of a partition.
        kernel_sizes: Kernels of the convolutions, odd; none if empty.
        reduction: The global perceptron has `channels // reduction` hidden channels.
        num_sharesets: Number of matrices, a divisor of `channels`.
        act_layer: Activation of the global perceptron, a class or a name of timm's.
        norm_layer: Batch norm, called with a number of channels.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If a number is not positive, `num_sharesets` does not divide `channels`, a kernel is even or named
            twice, or `reduction` leaves no channel; in `forward`, if the input is not of shape (N, channels, H, W)
            with multiples of h and w.
    """

    def __init__(
        self,
        channels: int,
        h: int,
        w: int,
        *,
        kernel_sizes: Iterable[int] = (1, 3),
        reduction: int = 4,
        num_sharesets: int = 1,
        act_layer: ActLayer = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_positive(channels=channels, h=h, w=w)
        # the published code takes others, and mixes samples
        if not is_positive(num_sharesets) or channels % num_sharesets != 0:
            accepted = divisors(channels)
            raise ValueError(
                f"num_sharesets={num_sharesets!r} does not divide channels={channels}; accepted: {accepted}"
            )
        if not is_positive(reduction) or reduction > channels:
            raise ValueError(f"reduction={reduction!r}: accepted is an integer from 1 to channels={channels}")
        kernel_sizes = check_kernel_sizes(kernel_sizes)
        self.channels = channels
        self.h = h
        self.w = w
        self.num_sharesets = num_sharesets
        hidden = channels // reduction
        self.gp = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                fc1=nn.Conv2d(channels, hidden, 1, **dd),
                act=create_act(act_layer),
                fc2=nn.Conv2d(hidden, channels, 1, **dd),
                gate=nn.Sigmoid(),
            )
        )
        self.fc3 = GroupedFC(num_sharesets * h * w, num_sharesets, **dd)
        self.fc3_bn = norm_layer(num_sharesets, **dd)
        self._add_local_perceptron(num_sharesets, num_sharesets, kernel_sizes, norm_layer, **dd)

    def extra_repr(self) -> str:
        return f"{self.channels}, h={self.h}, w={self.w}, num_sharesets={self.num_sharesets}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_partitions(x, self.channels, self.h, self.w)
        n, c, height, width = x.shape
        s, h, w = self.num_sharesets, self.h, self.w
        h_parts, w_parts = height // h, width // w
        rows = x.reshape(n, c, h_parts, h, w_parts, w).permute(0, 2, 4, 1, 3, 5)
        rows = rows.reshape(n * h_parts * w_parts * (c // s), s, h, w)

        y = self.fc3_bn(self.fc3(rows).reshape(rows.shape))
        for name, branch in self.named_children():
            if name.startswith("repconv"):
                y = y + branch(rows)

        # Not the inverse of the above: with several partitions and several channels of a share-set, published weights
        # expect rows, which go by partition first, to be read by channel first.
        y = y.reshape(n * (c // s), h_parts, w_parts, s, h, w).permute(0, 3, 1, 4, 2, 5).reshape(n, c, height, width)
        return y * self.gp(x)

    def reparameterize(self) -> None:
        """Fold batch norms and convolutions into `fc3`, in place, for inference: `--reparam` of timm's scripts.

        Computed in float64; the running statistics become constants, in training mode too. A second call changes
        nothing, and neither does a first where a norm has no running statistics or is no batch norm, or where a layer
        was replaced or computes its weight (parametrization, pruning).
        """
        folded = self._folded(self.h, self.w)
        if folded is not None:
            with torch.no_grad():
                self.fc3.weight.copy_(folded[0])
            self._take(folded[1])
