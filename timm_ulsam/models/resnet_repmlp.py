"""ResNet-50 with RepMLP in the bottlenecks of its second and third stage.

Papers:
* `RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition`
  - https://arxiv.org/abs/2105.01883
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385
"""

from typing import Any

import torch
from timm.layers import LayerType, get_act_layer, get_norm_layer, to_2tuple
from timm.models import ResNet, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck
from torch import nn

from ..layers._checks import is_positive
from ..layers.conv_bn import ConvBN
from ..layers.rep_mlp_v1 import RepMLP
from ._build import build_model, check_fits, imagenet_cfg, renamed, unwrapped

__all__ = ["RepMLPResNet"]

# stages, from 0, whose blocks but the first have RepMLP
_STAGES = (1, 2)


def _pair_up(parent: nn.Module, conv: str, bn: str) -> None:
    """Make of a convolution and its batch norm, in place, one module that folds."""
    setattr(parent, conv, ConvBN.of(getattr(parent, conv), getattr(parent, bn)))
    setattr(parent, bn, nn.Identity())


class FoldableBottleneck(Bottleneck):
    """timm's bottleneck whose batch norms fold into its convolutions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for i in (1, 2, 3):
            _pair_up(self, f"conv{i}", f"bn{i}")
        if isinstance(self.downsample, nn.Sequential) and len(self.downsample) == 2:
            self.downsample = ConvBN.of(*self.downsample)

    def zero_init_last(self) -> None:
        """Let the block start as its shortcut."""
        if getattr(self.conv3.bn, "weight", None) is not None:
            nn.init.zeros_(self.conv3.bn.weight)


class RepMLPBottleneck(nn.Module):
    """RepMLP between convolutions that give it fewer channels, beside a shortcut.

    The light block has a 1x1 convolution on either side. The other has a 1x1 and a 3x3 convolution before, a 3x3 and a
    1x1 convolution after. Each convolution has a batch norm; an activation follows it, RepMLP too, and for the last
    convolution comes behind the sum with the shortcut.

    Shape: (N, channels, height, width) to the same.

    Args:
        channels: Number of channels of the input.
        mid_channels: Channels between the 1x1 and the 3x3 convolutions; None for the light block.
        rep_channels: Channels of RepMLP.
        height: Height of the input.
        width: Width of the input.
        dilation: Of the 3x3 convolutions.
        drop_path: Stochastic depth of the branch.
        act_layer: Activation.
        norm_layer: Batch norm, called with a number of channels.
        device: Device of the parameters.
        dtype: Data type of the parameters.
        **kwargs: Passed to `RepMLP`.
    """

    def __init__(
        self,
        channels: int,
        mid_channels: int | None,
        rep_channels: int,
        height: int,
        width: int,
        *,
        dilation: int = 1,
        drop_path: nn.Module | None = None,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        conv3x3 = dict(kernel_size=3, dilation=dilation, norm_layer=norm_layer, **dd)
        super().__init__()
        narrow = rep_channels if mid_channels is None else mid_channels
        self.conv1 = ConvBN(channels, narrow, 1, norm_layer=norm_layer, **dd)
        self.act1 = act_layer(inplace=True)
        light = mid_channels is None
        self.conv2 = nn.Identity() if light else ConvBN(narrow, rep_channels, **conv3x3)
        self.act2 = nn.Identity() if light else act_layer(inplace=True)
        self.rep_mlp = RepMLP(rep_channels, height, width, norm_layer=norm_layer, **kwargs, **dd)
        self.rep_act = act_layer(inplace=True)
        self.conv3 = nn.Identity() if light else ConvBN(rep_channels, narrow, **conv3x3)
        self.act3 = nn.Identity() if light else act_layer(inplace=True)
        self.conv4 = ConvBN(narrow, channels, 1, norm_layer=norm_layer, **dd)
        self.drop_path = nn.Identity() if drop_path is None else drop_path
        self.act4 = act_layer(inplace=True)

    def zero_init_last(self) -> None:
        """Let the block start as its shortcut."""
        if getattr(self.conv4.bn, "weight", None) is not None:
            nn.init.zeros_(self.conv4.bn.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act2(self.conv2(self.act1(self.conv1(x))))
        y = self.rep_act(self.rep_mlp(y))
        y = self.conv4(self.act3(self.conv3(y)))
        return self.act4(x + self.drop_path(y))


class RepMLPResNet(ResNet):
    """timm's ResNet with `RepMLPBottleneck` for all blocks but the first of the second and third stage.

    Batch norms fold (`reparameterize`, timm's `--reparam`), all of those of the published network; what `stem_type`,
    `avg_down` and `replace_stem_pool` bring in stays. RepMLP's global perceptron has weights for one size of
    images.

    Args:
        layers: Blocks of every stage.
        img_size: Size of the images, a number or (height, width).
        partition_size: Side of RepMLP's partitions.
        kernel_sizes: Kernels of RepMLP's convolutions.
        reduction: `reduction` of `RepMLP`.
        groups: `groups` of `RepMLP`.
        bottleneck_ratios: In each of the two stages, how many times fewer channels RepMLP has than the 3x3
            convolutions around it; None for light blocks.
        act_layer: Activation.
        norm_layer: Batch norm.
        drop_path_rate: As for `ResNet`, through all blocks.
        zero_init_last: As for `ResNet`.
        device: Device of the parameters.
        dtype: Data type of the parameters.
        **kwargs: As for `ResNet`; what is about blocks goes to those without RepMLP.

    Raises:
        ValueError: If `img_size` cannot be cut into partitions (the accepted sizes are named), or as `RepMLP`
            and `ConvBN`; in `forward`, if images are of another size.
    """

    def __init__(
        self,
        layers: tuple[int, ...] = (3, 4, 6, 3),
        *,
        img_size: int | tuple[int, int] = 224,
        partition_size: int = 7,
        kernel_sizes: tuple[int, ...] = (1, 3, 5),
        reduction: int = 1,
        groups: int = 4,
        bottleneck_ratios: tuple[int, int] | None = None,
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = nn.BatchNorm2d,
        zero_init_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)
        super().__init__(
            FoldableBottleneck,
            layers,
            act_layer=act_layer,
            norm_layer=norm_layer,
            zero_init_last=zero_init_last,
            **kwargs,
            **dd,
        )
        if isinstance(self.conv1, nn.Conv2d):
            _pair_up(self, "conv1", "bn1")
        # the first entry is of the stem
        strides = [self.feature_info[stage + 1]["reduction"] for stage in _STAGES]
        height, width = _check_img_size(img_size, partition_size, max(strides))
        ratios = (None, None) if bottleneck_ratios is None else tuple(bottleneck_ratios)
        if len(ratios) != len(_STAGES):
            raise ValueError(f"bottleneck_ratios={bottleneck_ratios!r}: accepted are two integers, or None")
        for stage, stride, ratio in zip(_STAGES, strides, ratios, strict=True):
            blocks = self.get_submodule(f"layer{stage + 1}")
            for i in range(1, len(blocks)):
                channels = blocks[i].conv3.conv.out_channels
                mid_channels = None if ratio is None else channels // FoldableBottleneck.expansion
                if mid_channels is not None and (not is_positive(ratio) or mid_channels % ratio != 0):
                    raise ValueError(
                        f"bottleneck_ratios={bottleneck_ratios!r}: {ratio!r} does not divide {mid_channels}"
                    )
                blocks[i] = RepMLPBottleneck(
                    channels,
                    mid_channels,
                    channels // 8 if mid_channels is None else mid_channels // ratio,
                    height // stride,
                    width // stride,
                    dilation=blocks[i].conv2.conv.dilation[0],
                    drop_path=blocks[i].drop_path,
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    h=partition_size,
                    w=partition_size,
                    kernel_sizes=kernel_sizes,
                    reduction=reduction,
                    groups=groups,
                    **dd,
                )
                if zero_init_last:
                    blocks[i].zero_init_last()


def _check_img_size(img_size: int | tuple[int, int], partition_size: int, stride: int) -> tuple[int, int]:
    if not is_positive(partition_size):
        raise ValueError(f"partition_size={partition_size!r} is not a positive integer")
    size, unit = to_2tuple(img_size), partition_size * stride
    if len(size) != 2 or not all(is_positive(side) and side % unit == 0 for side in size):
        raise ValueError(
            f"img_size={img_size!r} cannot be cut into partitions of partition_size={partition_size}: "
            f"accepted are multiples of {unit}, or another partition_size"
        )
    return size[0], size[1]


# published keys, and ours
RULES = [
    (r"^stage0\.0\.", "conv1."),
    (r"^stage(\d)\.", r"layer\1."),
    (r"\.shortcut\.", ".downsample."),
    (r"\.(?:light|btnk)_conv1\.", ".conv1."),
    (r"\.btnk_conv2\.", ".conv2."),
    (r"\.(?:light|btnk)_repmlp\.", ".rep_mlp."),
    (r"\.btnk_conv4\.", ".conv3."),
    (r"\.(?:light_conv3|btnk_conv5)\.", ".conv4."),
    (r"^linear\.", "fc."),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: RepMLPResNet) -> dict[str, torch.Tensor]:
    """The authors' checkpoint under our names, in training or deployed form; ours as it is.

    A checkpoint of the deployed form folds the model.

    Raises:
        RuntimeError: If the checkpoint is not of this model; names what does not fit.
    """
    state_dict = renamed(unwrapped(state_dict), RULES)
    for name, module in model.named_modules():
        if isinstance(module, ConvBN | RepMLP):
            module.fold_as(state_dict, f"{name}.")
    check_fits(state_dict, model, ["fc."], reshaped=["conv1.conv.weight"])
    return state_dict


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        fixed_input_size=True,
        first_conv="conv1.conv",
        classifier="fc",
        paper_ids="arXiv:2105.01883",
        paper_name="RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "resnet50_repmlp_light.untrained": _cfg(),
        "resnet50_repmlp.untrained": _cfg(),
    }
)


def _create_resnet_repmlp(variant: str, pretrained: bool, **kwargs: Any) -> RepMLPResNet:
    return build_model(RepMLPResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def resnet50_repmlp_light(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50 with light blocks (1x1 convolution, RepMLP with 4 groups, 1x1 convolution) in two stages."""
    return _create_resnet_repmlp("resnet50_repmlp_light", pretrained, **kwargs)


@register_model
def resnet50_repmlp(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50 with bottlenecks (RepMLP with 8 groups between 3x3 convolutions) in two stages."""
    model_args = dict(groups=8, bottleneck_ratios=(2, 4))
    return _create_resnet_repmlp("resnet50_repmlp", pretrained, **dict(model_args, **kwargs))
