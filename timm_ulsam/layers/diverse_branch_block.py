"""Diverse Branch Block (DBB): a convolution trained as four branches, which fold into one for inference.

Paper: `Diverse Branch Block: Building a Convolution as an Inception-like Unit` - https://arxiv.org/abs/2103.13425
(CVPR 2021)
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import as_dtype
from ._activation import ActLayer, create_act
from ._checks import check_input, check_positive
from ._folding import Kernel, double, folded, folded_conv, has_hooks, is_foldable, is_plain
from .conv_bn import ConvBN, centred_geometry, check_sizes, every
from .replace import trained_as

torch.fx.wrap("check_input")
torch.fx.wrap("as_dtype")
torch.fx.wrap("_border")  # else statistics of the time of tracing would be constants of the graph


def _border(
    weight: torch.Tensor, bias: torch.Tensor, running_mean: torch.Tensor, running_var: torch.Tensor, eps: float
) -> torch.Tensor:
    """What a batch norm in evaluation makes of zero, without gradient."""
    # `no_grad` keeps nothing for a backward pass, wherever it is computed; in a trace, `detach` alone is left of both
    with torch.no_grad():
        return (bias - running_mean * weight * torch.rsqrt(running_var + eps)).detach()


def with_identity(offset: torch.Tensor) -> torch.Tensor:
    """Weight of a grouped 1x1 convolution, from its offset from the identity."""
    # made anew and no buffer: it would have to be filled again where a model comes from the meta device
    channels, per_group = offset.shape[:2]
    rows = torch.arange(channels, device=offset.device) % per_group
    own = rows[:, None] == torch.arange(per_group, device=offset.device)
    # no zeros and ones to add, whose dtype an exported program would keep where it is cast
    return torch.where(own[:, :, None, None], offset + 1, offset)


torch.fx.wrap("with_identity")  # symbolic tracing has no device to make tensors on


class IdentityConv2d(nn.Module):
    """A 1x1 convolution whose weight is stored as an offset from the identity, zero at the start.

    Published weights are such offsets.

    Shape: (N, channels, H, W) to the same.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(channels, channels // groups, 1, 1, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def full_weight(self) -> torch.Tensor:
        """The weight with the identity in it, (channels, channels // groups, 1, 1)."""
        return with_identity(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.full_weight(), groups=self.groups)


class BNAndPad(nn.Module):
    """Batch norm before a padding with what it makes of zero, given as two summands.

    That border keeps the branch a convolution: of an image padded with zeros, as the folded one sees. It comes from the
    running statistics in training mode too (those this step has updated), and no gradient flows through it: published
    weights were trained so.

    The padded map is (output - border), padded with zeros, plus the border everywhere. Next comes something linear,
    which takes the zeros as its own padding and the constant as a bias: nothing is copied into a larger map.

    Shape: (N, channels, H, W) to the same and (channels,).
    """

    def __init__(self, bn: nn.Module) -> None:
        super().__init__()
        self.bn = bn

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bn = self.bn
        is_recomputed = False
        if not torch.jit.is_scripting():
            is_recomputed = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if is_recomputed:
            # a checkpointed block within the backward pass: its statistics are already those of this step
            border = _border(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
            y = bn(x)
        else:
            y = bn(x)
            border = _border(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        border = as_dtype(border, y.dtype)
        return y - border[:, None, None], border


class AverageBranch(nn.Module):
    """1x1 convolution, batch norm, average pool, batch norm; a depthwise layer has the last two alone.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W').
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        depthwise: bool,
        step: int,
        norm_layer: Callable[..., nn.Module],
        **dd: Any,
    ) -> None:
        super().__init__()
        self.step = step
        self.kernel_size, self.stride, self.padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        self.dilation, self.channels = conv.dilation[0], conv.out_channels
        self.conv = self.bn = None
        if not depthwise:
            self.conv = nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=conv.groups, bias=False, **dd)
            self.bn = BNAndPad(norm_layer(conv.out_channels, **dd))
        self.avgbn = norm_layer(conv.out_channels, **dd)

    def _average(self, x: torch.Tensor) -> torch.Tensor:
        if self.dilation == 1:
            return F.avg_pool2d(x, self.kernel_size, self.stride, self.padding)
        area = self.kernel_size * self.kernel_size
        weight = x.new_full((self.channels, 1, self.kernel_size, self.kernel_size), 1 / area)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv is None or self.bn is None:
            return self.avgbn(self._average(every(x, self.step)))
        y, border = self.bn(self.conv(x))
        return self.avgbn(self._average(every(y, self.step)) + border[:, None, None])

    def can_fold(self) -> bool:
        first_folds = self.conv is None or (is_plain(self.conv) and is_foldable(self.bn.bn))
        return first_folds and is_foldable(self.avgbn)

    def folded_kernel(self) -> Kernel:
        if self.conv is None:
            weight, bias = double(self.avgbn.weight).new_ones(len(self.avgbn.weight), 1, 1, 1), None
        else:
            weight, bias = folded(double(self.conv.weight), None, self.bn.bn)
        size = self.kernel_size
        return folded((weight / (size * size)).expand(-1, -1, size, size), bias, self.avgbn)


class SequentialBranch(nn.Module):
    """1x1 convolution, batch norm, k x k convolution, batch norm.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W').
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        internal_channels: int,
        step: int,
        norm_layer: Callable[..., nn.Module],
        **dd: Any,
    ) -> None:
        super().__init__()
        self.step = step
        groups = conv.groups
        self.idconv1 = self.conv1 = None
        if internal_channels == conv.in_channels:
            self.idconv1 = IdentityConv2d(internal_channels, groups, **dd)
        else:
            self.conv1 = nn.Conv2d(conv.in_channels, internal_channels, 1, groups=groups, bias=False, **dd)
        self.bn1 = BNAndPad(norm_layer(internal_channels, **dd))
        geometry = conv.kernel_size, conv.stride, 0, conv.dilation, groups
        self.conv2 = nn.Conv2d(internal_channels, conv.out_channels, *geometry, bias=False, **dd)
        self.padding = conv.padding[0]
        self.bn2 = norm_layer(conv.out_channels, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.idconv1 is not None:
            x = self.idconv1(x)
        elif self.conv1 is not None:
            x = self.conv1(x)
        x, border = self.bn1(x)
        x = every(x, self.step)
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript drops what is inside
            if not is_plain(self.conv2):
                padded = F.pad(x, [self.padding] * 4) + border[:, None, None]
                return self.bn2(self.conv2(padded))
        conv = self.conv2
        of_ones = conv.weight.sum((2, 3)).view(conv.groups, -1, conv.weight.shape[1])
        bias = (of_ones * border.view(conv.groups, 1, -1)).sum(2).flatten()
        return self.bn2(F.conv2d(x, conv.weight, bias, conv.stride, self.padding, conv.dilation, conv.groups))

    def can_fold(self) -> bool:
        first = self.conv1 if self.idconv1 is None else self.idconv1
        first_folds = is_plain(first) or (type(first) is IdentityConv2d and not has_hooks(first))
        return first_folds and is_plain(self.conv2) and is_foldable(self.bn1.bn) and is_foldable(self.bn2)

    def folded_kernel(self) -> Kernel:
        first = self.conv1.weight if self.idconv1 is None else self.idconv1.full_weight()
        w1, b1 = folded(double(first), None, self.bn1.bn)
        w2 = double(self.conv2.weight)
        groups = self.conv2.groups
        in_groups = w2.view(groups, -1, *w2.shape[1:])
        weight = torch.einsum("gomhw,gmi->goihw", in_groups, w1.view(groups, -1, w1.shape[1]))
        bias = torch.einsum("gomhw,gm->go", in_groups, b1.view(groups, -1))
        return folded(weight.flatten(0, 1), bias.flatten(), self.bn2)


class DiverseBranchBlock(nn.Module):
    """A k x k convolution with batch norm, trained as the sum of four branches of different scale and complexity.

    The branches are a k x k convolution, a 1x1 convolution, a 1x1 convolution before an average pool, and a 1x1 before
    a k x k convolution, each with its batch norms. All are linear in evaluation, so `reparameterize()` (timm's
    `--reparam`) folds them into one k x k convolution with a bias, `dbb_reparam`. It takes the place of a convolution
    *and* the batch norm behind it. A depthwise layer has no 1x1 branch, and no 1x1 convolution before the pool.

    Keys of the state dict are the published ones. A folded state dict, published ones too, loads into an unfolded
    layer, which then is folded; a folded layer trains on.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), those of the k x k convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd size of the kernel.
        stride: Stride of the layer.
        padding: `dilation * (kernel_size // 2)` or None, which stands for it: it keeps the branches aligned.
        dilation: Distance of the kernel's elements; the average is taken over the same places. (The published code
            ignores it.)
        groups: Groups of all convolutions.
        internal_channels: Channels between the two convolutions of the last branch, a multiple of `groups`. None for
            `in_channels`, twice that in a depthwise layer. If it is `in_channels`, the 1x1 convolution is stored as an
            offset from the identity (`idconv1`).
        act_layer: Activation of the sum, a class or a name of timm's; None for none.
        norm_layer: Batch norm, called with a number of channels.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If an argument is none of those described, or `groups` does not divide both numbers of channels; in
            `forward`, if the input is not of shape (N, in_channels, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        *,
        internal_channels: int | None = None,
        act_layer: ActLayer | None = None,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_sizes(in_channels, out_channels, kernel_size, stride, dilation, groups)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even; accepted: odd sizes, whose branches share a centre")
        centred = dilation * (kernel_size // 2)
        if padding not in (None, centred):
            raise ValueError(f"padding={padding!r}; accepted: {centred}, which keeps the branches aligned")
        depthwise = groups == in_channels == out_channels
        if internal_channels is None:
            internal_channels = 2 * in_channels if depthwise else in_channels
        check_positive(internal_channels=internal_channels)
        if internal_channels % groups != 0:
            raise ValueError(f"internal_channels={internal_channels} is not a multiple of groups={groups}")
        self.in_channels = in_channels
        self.out_channels = out_channels

        # as ConvBN: a strided 1x1 convolution is none, but positions left out before it; inner batch norms see them all
        self.step = stride if kernel_size == 1 else 1
        stride //= self.step
        geometry = kernel_size, stride, centred, dilation, groups
        self.dbb_reparam = None
        self.dbb_origin = ConvBN(in_channels, out_channels, *geometry, norm_layer=norm_layer, **dd)
        self.dbb_avg = AverageBranch(self.dbb_origin.conv, depthwise, self.step, norm_layer, **dd)
        self.dbb_1x1 = None
        if not depthwise:
            pointwise = 1, stride, 0, 1, groups
            self.dbb_1x1 = ConvBN(in_channels, out_channels, *pointwise, norm_layer=norm_layer, **dd)
        self.dbb_1x1_kxk = SequentialBranch(self.dbb_origin.conv, internal_channels, self.step, norm_layer, **dd)
        self.act = nn.Identity() if act_layer is None else create_act(act_layer)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **kwargs: Any) -> "DiverseBranchBlock":
        """A layer in the place of `conv` that gives the same output in evaluation.

        The k x k branch carries the weight and bias: its batch norm starts as the identity of evaluation (mean 0,
        variance 1). The last batch norm of the other branches starts at weight 0, so that they join by training. In
        training mode the output is normalized by batch statistics, as of any batch norm, which `conv` did not do: the
        running statistics follow, and so does evaluation. What of `conv` is frozen, weight or bias, is so here: with
        the weight, all branches are.

        Args:
            conv: Odd, square kernel, padded by `dilation * (kernel_size // 2)` zeros, equal strides and dilations.
            **kwargs: `internal_channels`, `act_layer` and `norm_layer`, as for the class.

        Raises:
            ValueError: If `conv` is another one; names the setting and what is accepted.
        """
        layer = cls(**centred_geometry(conv), device=conv.weight.device, dtype=conv.weight.dtype, **kwargs)
        layer.zero_init_branches(origin=False)
        with torch.no_grad():
            origin = layer.dbb_origin
            origin.conv.weight.copy_(conv.weight)
            origin.bn.weight.copy_((origin.bn.running_var + origin.bn.eps).sqrt())
            if conv.bias is not None:
                origin.bn.bias.copy_(conv.bias)
        return trained_as(layer, conv, origin.bn.bias)

    def zero_init_branches(self, origin: bool = True) -> None:
        """Set the weight of the batch norm that ends a branch to zero, in all of them or all but the k x k branch."""
        if self.dbb_reparam is not None:
            return
        norms = [self.dbb_avg.avgbn, self.dbb_1x1_kxk.bn2]
        if origin:
            norms.append(self.dbb_origin.bn)
        if self.dbb_1x1 is not None:
            norms.append(self.dbb_1x1.bn)
        for bn in norms:
            nn.init.zeros_(bn.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_input(x, self.in_channels)
        kept = every(x, self.step)
        if self.dbb_reparam is not None:
            y = self.dbb_reparam(kept)
        else:
            y = self.dbb_origin(kept) + self.dbb_avg(x)
            if self.dbb_1x1 is not None:
                y += self.dbb_1x1(kept)
            y += self.dbb_1x1_kxk(x)
        return self.act(y)

    def reparameterize(self) -> None:
        """Fold all branches into one convolution, in place: `--reparam` of timm's scripts.

        Computed in float64. Running statistics become constants, in training mode too. A second call changes nothing,
        and neither does a first where a convolution or norm was replaced by something that does not fold.
        """
        branches = [self.dbb_origin, self.dbb_avg, self.dbb_1x1_kxk, *([] if self.dbb_1x1 is None else [self.dbb_1x1])]
        if self.dbb_reparam is not None or not all(branch.can_fold() for branch in branches):
            return
        weight, bias = self.dbb_origin.folded_kernel()
        centre = (weight.shape[-1] // 2,) * 4
        for branch in branches[1:]:
            w, b = branch.folded_kernel()
            weight = weight + (w if w.shape[-1] == weight.shape[-1] else F.pad(w, centre))
            bias = bias + b
        self.dbb_reparam = folded_conv(self.dbb_origin.conv, (weight, bias))
        self.dbb_origin = self.dbb_avg = self.dbb_1x1 = self.dbb_1x1_kxk = None

    def fold_as(self, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
        """Fold if that is the form of the state dict."""
        if f"{prefix}dbb_reparam.weight" in state_dict:
            self.reparameterize()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self.fold_as(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
