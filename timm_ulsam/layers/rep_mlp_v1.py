"""RepMLP, the block of the first paper: a fully connected layer over channels and positions of a partition.

Paper: `RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition`
- https://arxiv.org/abs/2105.01883
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import nn

from ._activation import ActLayer, create_act
from ._checks import check_positive, divisors, is_positive
from ._folding import double, is_foldable, scale_and_shift
from .rep_mlp import FoldsIntoFC, GroupedFC, check_kernel_sizes

torch.fx.wrap("check_size")


def check_size(x: torch.Tensor, channels: int, height: int, width: int) -> None:
    """Refuse what is not of shape (N, channels, height, width).

    Raises:
        ValueError: Names the shape and the accepted one.
    """
    if torch.jit.is_tracing():
        return  # as in `check_input`
    if x.dim() != 4 or x.shape[1] != channels or x.shape[2] != height or x.shape[3] != width:
        raise ValueError(
            f"input x of shape {list(x.shape)}: accepted is (N, {channels}, {height}, {width}), "
            "the one size that this layer has weights for"
        )


class RepMLP(FoldsIntoFC):
    """A fully connected layer over all channels and positions of a partition, with convolutions beside it.

    The image is cut into partitions of h x w positions. If there are several, two fully connected layers (`fc1_fc2`)
    over the averages of all partitions (`avg`, with batch norm) give a value for each channel of each partition, added
    to its positions. Each partition then is mapped by `fc3` (groups over the channels, then batch norm), and
    convolutions (`repconv<k>`, then batch norm) that see the same partition, padded with zeros, are added.

    `reparameterize` folds batch norms and convolutions into `fc1_fc2` and `fc3`. State dicts of the published code, in
    both forms, load as they are; what was saved after folding loads into a new layer, which then is folded too.

    Shape: (N, channels, height, width) to the same.

    Args:
        channels: Number of channels of the input.
        height: Height of the input, a multiple of `h`.
        width: Width of the input, a multiple of `w`.
        h: Height of a partition.
        w: Width of a partition.
        out_channels: None, or `channels`: the published folding is right only there.
        kernel_sizes: Kernels of the convolutions, odd; none if empty.
        reduction: The global perceptron's hidden layer is that many times narrower.
        groups: Groups of `fc3` and of the convolutions, a divisor of `channels`.
        act_layer: Activation of the global perceptron, a class or a name of timm's.
        norm_layer: Batch norm, called with a number of channels.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If a number is not positive, partitions do not divide the input, `groups` does not divide
            `channels`, a kernel is even or named twice, `reduction` leaves no feature, or `out_channels` is another
            number than `channels`; in `forward`, if the input is not of shape (N, channels, height, width).
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        h: int,
        w: int,
        *,
        out_channels: int | None = None,
        kernel_sizes: Iterable[int] = (1, 3),
        reduction: int = 1,
        groups: int = 1,
        act_layer: ActLayer = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_positive(channels=channels, height=height, width=width)
        if out_channels is not None and out_channels != channels:
            raise ValueError(f"out_channels={out_channels!r}: accepted is channels={channels}")
        for name, part, whole_name, whole in (("h", h, "height", height), ("w", w, "width", width)):
            if not is_positive(part) or whole % part != 0:
                raise ValueError(f"{name}={part!r} does not divide {whole_name}={whole}; accepted: {divisors(whole)}")
        if not is_positive(groups) or channels % groups != 0:
            raise ValueError(f"groups={groups!r} does not divide channels={channels}; accepted: {divisors(channels)}")
        kernel_sizes = check_kernel_sizes(kernel_sizes)
        self.channels = channels
        self.height = height
        self.width = width
        self.h = h
        self.w = w
        features = channels * (height // h) * (width // w)
        if not is_positive(reduction) or reduction > features:
            raise ValueError(f"reduction={reduction!r}: accepted is an integer from 1 to {features}")
        self.has_global = (height, width) != (h, w)
        if self.has_global:
            self.fc1_fc2 = nn.Sequential(
                OrderedDict(
                    fc1=nn.Linear(features, features // reduction, **dd),
                    act=create_act(act_layer),
                    fc2=nn.Linear(features // reduction, features, **dd),
                )
            )
            self.avg = nn.Sequential(OrderedDict(pool=nn.AvgPool2d((h, w)), bn=norm_layer(channels, **dd)))
        else:
            self.fc1_fc2 = nn.Identity()
            self.avg = nn.Identity()
        self.fc3 = GroupedFC(channels * h * w, groups, **dd)
        self.fc3_bn = norm_layer(channels * h * w, **dd)
        self._add_local_perceptron(channels, groups, kernel_sizes, norm_layer, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give `fc3` the published initialization, an orthogonal matrix; all other layers have their own."""
        weight = torch.empty_like(self.fc3.weight, dtype=torch.float32)  # there is no decomposition in half precision
        with torch.no_grad():
            self.fc3.weight.copy_(nn.init.orthogonal_(weight))

    def extra_repr(self) -> str:
        return f"{self.channels}, height={self.height}, width={self.width}, h={self.h}, w={self.w}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_size(x, self.channels, self.height, self.width)
        n, c, h, w = x.shape[0], self.channels, self.h, self.w
        h_parts, w_parts = self.height // h, self.width // w
        parts = x.reshape(n, c, h_parts, h, w_parts, w)
        if self.has_global:
            parts = parts + self.fc1_fc2(self.avg(x).flatten(1)).reshape(n, c, h_parts, 1, w_parts, 1)
        rows = parts.permute(0, 2, 4, 1, 3, 5).reshape(n * h_parts * w_parts, c, h, w)

        y = self.fc3(rows).reshape(n * h_parts * w_parts, c * h * w, 1, 1)
        y = self.fc3_bn(y).reshape(rows.shape)
        for name, branch in self.named_children():
            if name.startswith("repconv"):
                y = y + branch(rows)
        y = y.reshape(n, h_parts, w_parts, c, h, w).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(n, c, self.height, self.width)

    def reparameterize(self) -> None:
        """Fold all batch norms and the convolutions, in place, for inference: `--reparam` of timm's scripts.

        Computed in float64; the running statistics become constants, in training mode too. A second call changes
        nothing, and neither does a first where a norm has no running statistics or is no batch norm, or where a layer
        was replaced or computes its weight (parametrization, pruning).
        """
        folded = self._folded(self.h, self.w)
        folded_fc1 = self._folded_fc1() if self.has_global else (None, None)
        if folded is None or folded_fc1 is None:
            return
        with torch.no_grad():
            self.fc3.weight.copy_(folded[0])
            if self.has_global:
                self.fc1_fc2.fc1.weight.copy_(folded_fc1[0])
                self.fc1_fc2.fc1.bias.copy_(folded_fc1[1])
        self._take(folded[1])

    def _folded_fc1(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        fc1 = self.fc1_fc2.fc1
        plain = type(fc1) is nn.Linear and all(fc1._parameters.get(name) is not None for name in ("weight", "bias"))
        if not plain or not is_foldable(self.avg.bn):
            return None
        scale, shift = (t.repeat_interleave(fc1.in_features // self.channels) for t in scale_and_shift(self.avg.bn))
        weight = double(fc1.weight)
        # no product of matrices, which autocast would round
        return weight * scale, double(fc1.bias) + (weight * shift).sum(1)

    def _take(self, bias: torch.Tensor) -> None:
        super()._take(bias)
        if self.has_global:
            self.avg.bn = nn.Identity()
