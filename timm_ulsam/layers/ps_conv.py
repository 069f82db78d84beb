"""Poly-Scale Convolution (PSConv).

Paper: `PSConv: Squeezing Feature Pyramid into One Compact Poly-Scale Convolutional Layer`
- https://arxiv.org/abs/2007.06191 (ECCV 2020)
"""

from typing import Any

import torch
from torch import nn

from ._checks import check_input, check_positive, is_positive, pair
from ._folding import has_hooks
from .replace import trained_as

torch.fx.wrap("check_input")


class _ShiftedConv2d(nn.Conv2d):
    """A grouped convolution in which the halves of the channels of each of `wholes` groups of groups are swapped first.

    Swapped are the weights, before, and the outputs, after: the same numbers as with swapped inputs, of which a copy
    would be made, and kept for the gradient.
    """

    def __init__(self, *args: Any, wholes: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.wholes = wholes

    def _swap(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        if self.wholes == 1:  # the same, faster
            first, second = x.chunk(2, dim)
            return torch.cat((second, first), dim)
        return x.unflatten(dim, (self.wholes, 2, -1)).flip(dim + 1).flatten(dim, dim + 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias
        if bias is not None:
            bias = self._swap(bias, 0)
        return self._swap(self._conv_forward(x, self._swap(self.weight, 0), bias), 1)


class _MaskedConv2d(nn.Conv2d):
    """A convolution that starts with zeros where others act, and does not train there.

    Of `parts` blocks of rows and of columns in each group, masked are the row blocks r and column blocks c with
    c = r or c = r + parts / 2 (modulo `parts`).
    """

    def __init__(self, *args: Any, parts: int, **kwargs: Any) -> None:
        self.parts = parts  # the parent resets the parameters
        super().__init__(*args, **kwargs)

    def _blocks(self, weight: torch.Tensor) -> torch.Tensor:
        blocks = weight.unflatten(0, (self.groups, self.parts, -1))
        return blocks.unflatten(3, (self.parts, -1))

    def _mask(self) -> torch.Tensor:
        # Computed, not stored: nothing to lose where modules are copied, materialized or saved. Made of the weight, as
        # torch.fx of PyTorch 2.8 cannot trace torch.arange on the device of one.
        part = self.weight.new_ones(self.parts, dtype=torch.long).cumsum(0)
        return (part.view(-1, 1, 1, 1, 1, 1) - part.view(-1, 1, 1, 1)) % (self.parts // 2) == 0

    @torch.no_grad()
    def zero_masked(self) -> None:
        """Set all masked weights to zero."""
        self._blocks(self.weight).masked_fill_(self._mask(), 0)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.zero_masked()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if torch.is_grad_enabled() or torch.jit.is_tracing():
            # Values go through as they are: with the published code, what is loaded at masked positions takes part.
            # Their gradient is exactly zero, so optimizers that work by element leave zeros zero.
            blocks = self._blocks(weight)
            weight = torch.where(self._mask(), blocks.detach(), blocks).reshape(weight.shape)
        return self._conv_forward(x, weight, self.bias)


class _HalvedConv2d(nn.Conv2d):
    """A dense convolution of four parts without its masked half: two groups, once the parts are sorted by parity.

    Even row blocks see the odd column blocks, odd row blocks the even ones.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x0, x1, x2, x3 = x.chunk(4, 1)
        y0, y2, y1, y3 = self._conv_forward(torch.cat((x1, x3, x0, x2), 1), self.weight, self.bias).chunk(4, 1)
        return torch.cat((y0, y1, y2, y3), 1)


class PSConv2d(nn.Module):
    """A 3x3 convolution whose dilation alternates over blocks of input and output channels.

    Input and output channels are cut into P = `parts` equal, consecutive blocks. Output block r sees input block c
    with the dilation d = `dilation` if c = r, with 2d if c = r + P / 2 (modulo P), otherwise with 1. Three convolutions
    are added, each with a bias if there is one: `gwconv` with P groups and dilation d, `gwconv_shift` with P groups and
    dilation 2d on the input with its halves swapped, and the dense `conv`, whose weights are zero where the other two
    act. These zeros are stored, counted as parameters and multiplied; their gradient is zero.

    With `groups` > 1 every group is such a convolution of its own (the published PSGConv2d). The published code leaves
    part of the weights of `conv` unmasked where `groups` differs from `parts`; here all groups have the same mask.
    What is in such a state dict takes part in the output, as there.

    State dicts have the keys of the published code. `reparameterize()` leaves the zeros out, for inference.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), of the size of a 3x3 convolution with padding 1.

    Args:
        in_channels: Number of channels of the input, a multiple of `groups * parts`.
        out_channels: Number of channels of the output, a multiple of `groups * parts`.
        kernel_size: 3; with others the three convolutions have outputs of unequal sizes.
        stride: Stride.
        padding: 1, for the same reason.
        dilation: Dilation d; the paper's networks have 2.
        groups: Number of groups.
        bias: Whether the three convolutions have a bias.
        parts: Number of blocks P in each group, even.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If an argument is not as said; in `forward`, if the input is not of shape (N, in_channels, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        parts: int = 4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels, groups=groups)
        if kernel_size not in (3, (3, 3), [3, 3]) or padding not in (1, (1, 1), [1, 1]):
            raise ValueError(
                f"kernel_size={kernel_size!r}, padding={padding!r}; accepted: kernel_size=3 with padding=1, as others "
                "give the three convolutions outputs of unequal sizes"
            )
        if not is_positive(parts) or parts % 2 != 0:
            raise ValueError(f"parts={parts!r}; accepted: even positive integers")
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % (groups * parts) != 0:
                raise ValueError(
                    f"{name}={channels} cannot be cut into groups={groups} of parts={parts} equal blocks; "
                    f"accepted: multiples of {groups * parts}"
                )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = (3, 3)
        self.stride = pair("stride", stride, 1)
        self.padding = (1, 1)
        self.dilation = d = pair("dilation", dilation, 1)
        self.groups = groups
        self.parts = parts
        channels = in_channels, out_channels
        kwargs = dict(kernel_size=3, stride=self.stride, bias=bias, device=device, dtype=dtype)
        blocks = groups * parts
        self.gwconv = nn.Conv2d(*channels, padding=d, dilation=d, groups=blocks, **kwargs)
        d = 2 * d[0], 2 * d[1]
        self.gwconv_shift = _ShiftedConv2d(*channels, padding=d, dilation=d, groups=blocks, wholes=groups, **kwargs)
        self.conv = _MaskedConv2d(*channels, padding=1, groups=groups, parts=parts, **kwargs)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **kwargs: Any) -> "PSConv2d":
        """A poly-scale convolution with the weights of a 3x3 convolution: each of them at its new dilation.

        The output is another one, except where only the centre of the kernel meets the input. What of `conv` is frozen,
        weight or bias, is so here.

        Args:
            conv: 3x3, with padding 1 and dilation 1.
            **kwargs: `dilation` and `parts`, as for `PSConv2d`.

        Raises:
            ValueError: If a setting of `conv` does not fit.
        """
        settings = dict(padding_mode="zeros", dilation=(1, 1))
        for name, accepted in settings.items():
            if getattr(conv, name) != accepted:
                raise ValueError(f"{name}={getattr(conv, name)!r}; accepted: {accepted!r}")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            1 if conv.padding == "same" else conv.padding,
            groups=conv.groups,
            bias=conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **kwargs,
        )
        with torch.no_grad():
            layer.conv.weight.copy_(conv.weight)
            blocks = layer.conv._blocks(conv.weight)
            for grouped, shift in ((layer.gwconv, 0), (layer.gwconv_shift, layer.parts // 2)):
                own = blocks.roll(-shift, 3).diagonal(0, 1, 3).movedim(-1, 1)
                grouped.weight.copy_(own.reshape(grouped.weight.shape))
            layer.conv.zero_masked()
            if conv.bias is not None:
                layer.conv.bias.copy_(conv.bias)
                layer.gwconv.bias.zero_()
                layer.gwconv_shift.bias.zero_()
        return trained_as(layer, conv, layer.conv.bias, layer.gwconv.bias, layer.gwconv_shift.bias)

    def reparameterize(self) -> None:
        """Leave out the zeros of `conv`, in place, for inference: `--reparam` of timm's scripts.

        For four parts in one group, where two thirds of the multiplications do it all. In other layers, or where
        weights were loaded at masked positions, nothing changes; neither does it by a second call.
        """
        conv = self.conv
        # hooks and computed weights (parametrization, pruning) would be lost
        is_plain = type(conv) is _MaskedConv2d and "weight" in conv._parameters
        if not is_plain or has_hooks(conv) or not self._can_be_halved():
            return
        with torch.no_grad():
            blocks = conv._blocks(conv.weight)
            if not conv.weight.is_meta and (blocks * conv._mask()).any():
                return
            blocks = blocks[0]
            even, odd = blocks[0::2, :, 1::2], blocks[1::2, :, 0::2]
            halved = self._halved()
            halved.weight.copy_(torch.cat((even, odd)).reshape(halved.weight.shape))
            if conv.bias is not None:
                halved.bias.copy_(conv.bias.unflatten(0, (2, 2, -1)).transpose(0, 1).flatten())
        self.conv = halved

    def fold_as(self, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
        """Take the reparameterized form if the state dict to be loaded, under `prefix`, has it."""
        weight = state_dict.get(f"{prefix}conv.weight")
        half = self.out_channels, self.in_channels // 2, *self.kernel_size
        is_halved = type(self.conv) is _HalvedConv2d
        if not is_halved and weight is not None and tuple(weight.shape) == half and self._can_be_halved():
            self.conv = self._halved()

    def _can_be_halved(self) -> bool:
        return self.parts == 4 and self.groups == 1  # grouped convolutions are no faster

    def _halved(self) -> _HalvedConv2d:
        halved = _HalvedConv2d(
            self.in_channels,
            self.out_channels,
            kernel_size=3,
            stride=self.stride,
            padding=1,
            groups=2,
            bias=self.conv.bias is not None,
            device=self.conv.weight.device,
            dtype=self.conv.weight.dtype,
        )
        return halved.requires_grad_(self.conv.weight.requires_grad).train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        self.fold_as(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_input(x, self.in_channels)
        return self.gwconv(x) + self.gwconv_shift(x) + self.conv(x)
