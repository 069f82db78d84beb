"""What RepMLPNet is built of.

Paper: `RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality`
- https://arxiv.org/abs/2112.11081 (CVPR 2022)
"""

from typing import Any

import torch
from timm.layers import ConvNormAct, DropPath, LayerType
from timm.models import checkpoint_seq
from torch import nn

from ..layers.rep_mlp import RepMLPBlock


class FFN(nn.Module):
    """Two 1x1 convolutions, each with batch norm, and an activation between them.

    Shape: (N, channels, H, W) to the same.
    """

    def __init__(self, channels: int, expand: int, act_layer: LayerType, norm_layer: LayerType, **dd: Any) -> None:
        super().__init__()
        hidden = channels * expand
        self.fc1 = ConvNormAct(channels, hidden, 1, act_layer=act_layer, norm_layer=norm_layer, **dd)
        self.fc2 = ConvNormAct(hidden, channels, 1, apply_act=False, norm_layer=norm_layer, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x))


class RepMLPNetUnit(nn.Module):
    """A `RepMLPBlock` over positions and a `FFN` over channels, each behind a batch norm and beside a shortcut.

    Shape: (N, channels, H, W) to the same; H and W are multiples of h and w.

    Args:
        channels: Number of channels of the input.
        h: Height of a partition.
        w: Width of a partition.
        kernel_sizes: As for `RepMLPBlock`.
        gp_reduction: `reduction` of `RepMLPBlock`.
        ffn_expand: The FFN has `ffn_expand * channels` hidden channels.
        num_sharesets: As for `RepMLPBlock`.
        drop_path: Rate of stochastic depth, of both branches.
        act_layer: Activation of the FFN.
        norm_layer: Batch norm, called with a number of channels.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        channels: int,
        h: int,
        w: int,
        *,
        kernel_sizes: tuple[int, ...] = (1, 3),
        gp_reduction: int = 4,
        ffn_expand: int = 4,
        num_sharesets: int = 1,
        drop_path: float = 0.0,
        act_layer: LayerType = nn.GELU,
        norm_layer: LayerType = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = norm_layer(channels, **dd)
        self.rep_mlp = RepMLPBlock(
            channels,
            h,
            w,
            kernel_sizes=kernel_sizes,
            reduction=gp_reduction,
            num_sharesets=num_sharesets,
            norm_layer=norm_layer,
            **dd,
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(channels, **dd)
        self.ffn = FFN(channels, ffn_expand, act_layer, norm_layer, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.rep_mlp(self.norm1(x)))
        return x + self.drop_path2(self.ffn(self.norm2(x)))


class RepMLPNetStage(nn.Module):
    """A 2x2 convolution with stride 2 (from the second stage on), then units of one size.

    Shape: (N, in_channels, H, W) to (N, out_channels, H / 2, W / 2), or H, W in the first stage.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        downsample: bool,
        partition: tuple[int, int],
        drop_paths: list[float],
        norm_layer: LayerType,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = (
            ConvNormAct(in_channels, out_channels, 2, stride=2, padding=0, norm_layer=norm_layer, **dd)
            if downsample
            else nn.Identity()
        )
        self.blocks = nn.Sequential(
            *(
                RepMLPNetUnit(out_channels, *partition, drop_path=rate, norm_layer=norm_layer, **kwargs, **dd)
                for rate in drop_paths
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)
