"""WeightNet: convolutions whose kernels are generated for every sample.

Paper: `WeightNet: Revisiting the Design Space of Weight Networks`
- https://arxiv.org/abs/2007.11823 (ECCV 2020)
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ._checks import check_input, check_positive, divisors, is_positive, pair
from ._folding import has_hooks
from .replace import trained_as

IntPair = int | tuple[int, int]

torch.fx.wrap("check_input")


@torch.fx.wrap
def check_condition(condition: torch.Tensor, x: torch.Tensor, channels: int) -> None:
    """Refuse a condition that is not of shape (N, channels, 1, 1), N that of the input.

    Raises:
        ValueError: Names the shape and the accepted one.
    """
    if torch.jit.is_tracing():
        return
    if list(condition.shape) != [x.shape[0], channels, 1, 1]:
        raise ValueError(
            f"condition of shape {list(condition.shape)}: accepted is ({x.shape[0]}, {channels}, 1, 1), "
            f"N as of the input"
        )


def _is_channels_last(x: torch.Tensor) -> bool:
    # by strides, so that every second channel of a tensor counts as the tensor does
    return x.stride(1) < x.stride(3)


@torch.fx.wrap
def conv2d_per_sample(
    x: torch.Tensor,
    kernel: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> torch.Tensor:
    """Convolve every sample with a kernel of its own.

    Args:
        x: Input, (N, in_channels, H, W).
        kernel: Kernels, (N, out_channels, in_channels // groups, kh, kw).
        stride: As for a convolution.
        padding: As for a convolution.
        dilation: As for a convolution.
        groups: As for a convolution.
    """
    n, out_channels, _, kh, kw = kernel.shape
    if kh == 1 and kw == 1 and groups == 1 and padding[0] == 0 and padding[1] == 0:
        if stride[0] != 1 or stride[1] != 1:
            x = x[:, :, :: stride[0], :: stride[1]]
        _, channels, h, w = x.shape
        kernel = kernel.reshape(n, out_channels, channels)
        if _is_channels_last(x):
            y = torch.bmm(x.permute(0, 2, 3, 1).reshape(n, h * w, channels), kernel.transpose(1, 2))
            return y.reshape(n, h, w, out_channels).permute(0, 3, 1, 2)
        return torch.bmm(kernel, x.reshape(n, channels, h * w)).reshape(n, out_channels, h, w)
    # the samples are groups of one convolution: a plain one where there is one sample
    x = x.reshape(1, n * x.shape[1], x.shape[2], x.shape[3])
    y = F.conv2d(x, kernel.flatten(0, 1), None, stride, padding, dilation, n * groups)
    return y.reshape(n, out_channels, y.shape[2], y.shape[3])


@torch.fx.wrap
def conv2d_scaled(
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> torch.Tensor:
    """Convolve with kernels that differ between samples by factors alone.

    Either the kernels are computed, or, as a convolution is linear, one convolution with the weight is followed by
    the factors: whichever is faster.

    Args:
        x: Input, (N, in_channels, H, W).
        scale: Factors, (N, out_channels * parts, 1, 1): each is for one of the equal, consecutive parts into which
            the flattened weight of an output channel is divided.
        weight: Weight of a convolution, (out_channels, in_channels // groups, kh, kw).
        stride: As for a convolution.
        padding: As for a convolution.
        dilation: As for a convolution.
        groups: As for a convolution.
    """
    n = x.shape[0]
    out_channels, channels, kh, kw = weight.shape
    parts = scale.shape[1] // out_channels
    per_sample = channels % parts != 0  # the parts are no whole channels
    if kh == 1 and kw == 1 and parts > 1 and groups == 1 and padding[0] == 0 and padding[1] == 0:
        per_sample = True
    elif x.device.type == "cpu" and not _is_channels_last(x):
        # measured: with fewer channels to sum over, the factors cost more than the kernels
        per_sample = per_sample or channels // parts < 64 or n == 1
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript drops what is inside
            # a number of groups that hangs on the batch would fix the size of the batch
            if torch.jit.is_tracing() or torch.compiler.is_compiling():
                per_sample = channels % parts != 0
    if not torch.jit.is_scripting() and not torch.jit.is_tracing() and not torch.compiler.is_compiling() and n == 0:
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)  # no sample, no group
    if per_sample:
        kernel = scale.reshape(n, out_channels * parts, 1) * weight.reshape(out_channels * parts, -1)
        kernel = kernel.reshape(n, out_channels, channels, kh, kw)
        return conv2d_per_sample(x, kernel, stride, padding, dilation, groups)
    if parts == 1:
        return F.conv2d(x, weight, None, stride, padding, dilation, groups) * scale
    group = out_channels // groups
    weight = weight.reshape(groups, group, parts, channels // parts, kh, kw).transpose(1, 2)
    weight = weight.reshape(out_channels * parts, channels // parts, kh, kw)
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups * parts)
    scale = scale.reshape(n, groups, group, parts).transpose(2, 3)
    if _is_channels_last(y):  # summed so that the sum is too
        y = y.permute(0, 2, 3, 1).unflatten(3, (groups, parts, group)) * scale[:, None, None]
        return y.sum(4).flatten(3).permute(0, 3, 1, 2)
    return (y.unflatten(1, (groups, parts, group)) * scale[..., None, None]).sum(2).flatten(1, 2)


@torch.fx.wrap
def conv2d_generated(
    x: torch.Tensor,
    units: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> torch.Tensor:
    """Convolve with kernels that are, part by part, sums of weights with factors of every sample.

    Args:
        x: Input, (N, in_channels, H, W).
        units: Factors, (N, out_channels * parts * M, 1, 1): M of them for each of the equal, consecutive parts into
            which the flattened kernel of an output channel is divided.
        weight: The M weights, (M, out_channels, in_channels // groups, kh, kw).
        stride: As for a convolution.
        padding: As for a convolution.
        dilation: As for a convolution.
        groups: As for a convolution.
    """
    n = x.shape[0]
    m, out_channels, channels, kh, kw = weight.shape
    any_batch = False
    if not torch.jit.is_scripting():
        # what is recorded has to hold for other batches too, and groups cannot be none
        any_batch = torch.jit.is_tracing() or torch.compiler.is_compiling() or n == 0
    if not any_batch:
        units = units.reshape(n, -1, m)
        kernel = torch.einsum("npm,mpo->npo", units, weight.reshape(m, units.shape[1], -1))
        kernel = kernel.reshape(n, out_channels, channels, kh, kw)
        return conv2d_per_sample(x, kernel, stride, padding, dilation, groups)
    y = conv2d_scaled(x, units[:, ::m], weight[0], stride, padding, dilation, groups)
    for i in range(1, m):
        y = y + conv2d_scaled(x, units[:, i::m], weight[i], stride, padding, dilation, groups)
    return y


class VectorConv2d(nn.Conv2d):
    """1x1 convolution of a 1x1 map, computed as a product of matrices, which has far less overhead.

    Shape: (N, in_channels, 1, 1) to (N, out_channels, 1, 1).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        if self.groups == 1:
            return F.linear(x, self.weight.flatten(1), self.bias)[:, :, None, None]
        weight = self.weight.reshape(self.groups, -1, self.in_channels // self.groups)
        y = torch.einsum("ngi,goi->ngo", x.unflatten(1, weight.shape[::2]), weight).flatten(1)
        bias = self.bias
        return (y if bias is None else y + bias.to(y.dtype))[:, :, None, None]


class PooledCondition(nn.Conv2d):
    """Condition of a `WeightNet`: the mean over all positions, and a 1x1 convolution of it, with bias.

    Shape: (N, in_channels, H, W) to (N, condition_channels(in_channels), 1, 1).

    Args:
        in_channels: Number of channels of the input.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(in_channels=in_channels)
        super().__init__(in_channels, condition_channels(in_channels), 1, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.mean((2, 3)), self.weight.flatten(1), self.bias)[:, :, None, None]


def condition_channels(in_channels: int) -> int:
    """Number of channels of the condition of a convolution of so many: a sixteenth, at least 16."""
    return max(16, in_channels // 16)


class WeightNet(nn.Module):
    """A convolution whose kernel is generated for every sample from a condition.

    Two 1x1 convolutions of the condition, a sigmoid between them, give all entries of the kernel. The first has
    M outputs for each output channel, the second is grouped, G groups for each output channel. As published, M = G = 2:
    then each sigmoid is a factor of one half of an output channel's weight. A kernel of a depthwise convolution
    is a single group, with M / G inputs.

    Parameters have the published names and, a reshape apart, layout. What is published has no bias, a padding of
    kernel_size // 2, a dilation of 1, and groups of 1 or in_channels.

    Shape: (N, in_channels, H, W) and (N, condition_channels(in_channels), 1, 1) to (N, out_channels, H', W'), as by a
    convolution.

    Args:
        in_channels: Number of channels of the input.
        out_channels: Number of channels of the output.
        kernel_size: Size of the kernel, or height and width.
        stride: Stride, or both.
        padding: Zeros added on each side, or for height and width. None adds kernel_size // 2.
        dilation: Dilation, or both.
        groups: Number of groups of channels. `in_channels` makes the convolution depthwise.
        bias: Whether a learned bias, the same for all samples, is added.
        expansion: M, the number of sigmoids for each output channel: a multiple of `num_groups`. M / G times the
            parameters of a plain convolution are in the second layer.
        num_groups: G, the number of groups for each output channel: a divisor of its number of weights.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If a number does not fit; in `forward`, if the input or the condition is of another shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        *,
        padding: IntPair | None = None,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = False,
        expansion: int = 2,
        num_groups: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels, expansion=expansion, num_groups=num_groups)
        common = divisors(math.gcd(in_channels, out_channels))
        if not is_positive(groups) or groups not in common:
            raise ValueError(
                f"groups={groups!r} does not divide in_channels={in_channels} and out_channels={out_channels}; "
                f"accepted: {common}"
            )
        if expansion % num_groups != 0:
            raise ValueError(f"expansion={expansion} is not a multiple of num_groups={num_groups}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair("kernel_size", kernel_size, 1)
        self.stride = pair("stride", stride, 1)
        default = (self.kernel_size[0] // 2, self.kernel_size[1] // 2)
        self.padding = default if padding is None else pair("padding", padding, 0)
        self.dilation = pair("dilation", dilation, 1)
        self.groups = groups
        self.expansion = expansion
        self.num_groups = num_groups
        self.kernel_shape = (out_channels, in_channels // groups, *self.kernel_size)
        entries = math.prod(self.kernel_shape[1:])
        # the few weights of a depthwise kernel are not divided further, whatever G
        parts = 1 if groups == in_channels > 1 else num_groups
        if entries % parts != 0:
            raise ValueError(
                f"num_groups={num_groups} does not divide the {entries} weights of an output channel; "
                f"accepted: {divisors(entries)}"
            )
        self.inputs_per_group = expansion // num_groups
        units = out_channels * parts * self.inputs_per_group
        self.condition_channels = condition_channels(in_channels)
        self.wn_fc1 = VectorConv2d(self.condition_channels, units, 1, **dd)
        self.wn_fc2 = VectorConv2d(units, out_channels * entries, 1, groups=out_channels * parts, bias=False, **dd)
        self.bias = nn.Parameter(torch.empty(out_channels, **dd)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters: kernels begin about as those of PyTorch's convolutions do."""
        self.wn_fc1.reset_parameters()
        # as by default there, counted in the fan-in of the kernel; the sigmoids, about 1/2 each, are made up for
        bound = 1 / math.sqrt(math.prod(self.kernel_shape[1:]))
        nn.init.uniform_(self.wn_fc2.weight, -2 * bound, 2 * bound)
        with torch.no_grad():
            self.wn_fc2.weight.div_(math.sqrt(self.inputs_per_group))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"expansion={self.expansion}, num_groups={self.num_groups}"
        )

    def kernel(self, condition: torch.Tensor) -> torch.Tensor:
        """Kernels generated for a batch.

        Shape: (N, condition_channels, 1, 1) to (N, out_channels, in_channels // groups, kh, kw).
        """
        return self.wn_fc2(self.wn_fc1(condition).sigmoid()).flatten(1).unflatten(1, self.kernel_shape)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        check_input(x, self.in_channels)
        check_condition(condition, x, self.condition_channels)
        must_call = False
        if not torch.jit.is_scripting():
            must_call = has_hooks(self.wn_fc2)
        scale = self.wn_fc1(condition).sigmoid()
        if must_call:
            kernel = self.wn_fc2(scale).flatten(1).unflatten(1, self.kernel_shape)
            y = conv2d_per_sample(x, kernel, self.stride, self.padding, self.dilation, self.groups)
        elif self.inputs_per_group == 1:
            weight = self.wn_fc2.weight.reshape(self.kernel_shape)
            y = conv2d_scaled(x, scale, weight, self.stride, self.padding, self.dilation, self.groups)
        else:
            weight = self.wn_fc2.weight.flatten(1).t().unflatten(1, self.kernel_shape)
            y = conv2d_generated(x, scale, weight, self.stride, self.padding, self.dilation, self.groups)
        bias = self.bias
        return y if bias is None else y + bias.to(y.dtype).reshape(-1, 1, 1)


class WeightNetConv2d(nn.Module):
    """A `WeightNet` that makes its condition from its own input, and so stands where a plain convolution stood.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), as by a convolution.

    Args:
        in_channels: Number of channels of the input.
        out_channels: Number of channels of the output.
        kernel_size: Size of the kernel, or height and width.
        stride: Stride, or both.
        device: Device of the parameters.
        dtype: Data type of the parameters.
        **kwargs: As for `WeightNet`.

    Raises:
        ValueError: As `WeightNet`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.wnet = WeightNet(in_channels, out_channels, kernel_size, stride, **kwargs, **dd)
        self.reduce = PooledCondition(in_channels, **dd)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, self.wnet.groups
        self.kernel_size, self.stride = self.wnet.kernel_size, self.wnet.stride
        self.padding, self.dilation = self.wnet.padding, self.wnet.dilation

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, expansion: int = 2, num_groups: int = 2) -> "WeightNetConv2d":
        """A layer in the place of `conv`, which at first computes what that did, for every sample.

        The condition begins at zero, so every sigmoid is 1/2, and the second layer holds the weight, doubled: the
        kernel is that of `conv`, and its bias is kept. From the first step of training on, kernels differ. What of
        `conv` is frozen, weight or bias, is so here.

        Args:
            conv: Convolution to be replaced.
            expansion: M of `WeightNet`.
            num_groups: G of `WeightNet`.

        Returns:
            The layer, on the device, of the dtype, and in the mode of `conv`.

        Raises:
            ValueError: If `conv` pads with something else than zeros, or not symmetrically, or `num_groups` does not
                divide the number of weights of an output channel (as for 3 channels and a kernel of 3 x 3).
        """
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding_mode={conv.padding_mode!r}; accepted: 'zeros'")
        padding = conv.padding
        if isinstance(padding, str):
            both = [
                d * (k - 1) if padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
            ]
            if any(p % 2 for p in both):
                raise ValueError(f"padding='same' with kernel_size={conv.kernel_size} is not the same on both sides")
            padding = (both[0] // 2, both[1] // 2)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            padding=padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            expansion=expansion,
            num_groups=num_groups,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        wnet = layer.wnet
        with torch.no_grad():
            for parameter in (layer.reduce.weight, layer.reduce.bias, wnet.wn_fc1.bias):
                parameter.zero_()
            weight = conv.weight.reshape(-1, 1, 1, 1) * (2 / wnet.inputs_per_group)
            wnet.wn_fc2.weight.copy_(weight.expand_as(wnet.wn_fc2.weight))
            if conv.bias is not None:
                wnet.bias.copy_(conv.bias)
        return trained_as(layer, conv, wnet.bias)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_input(x, self.in_channels)
        return self.wnet(x, self.reduce(x))
