"""MobileNetV1 and MobileNetV2 with Ultra-Lightweight Subspace Attention in the place of heavy blocks.

Papers:
* `ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks`
  - https://arxiv.org/abs/2006.15102
* `MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications`
  - https://arxiv.org/abs/1704.04861
* `MobileNetV2: Inverted Residuals and Linear Bottlenecks` - https://arxiv.org/abs/1801.04381
"""

from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from numbers import Integral
from typing import Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import DropPath, LayerType, get_norm_layer
from timm.models import (
    EfficientNet,
    EfficientNetFeatures,
    generate_default_cfgs,
    register_model,
)
from torch import nn

from ..layers.ulsam import ULSAM, is_unchanged
from ..ops import attend
from ..pretrained import weights_cfg
from ._build import imagenet_cfg
from ._imagenet_init import checkpoint_filter_fn, init_cfg
from ._mobilenet import check_feature_location, create_mobilenet, hook_features

__all__ = ["MobileNetULSAM", "MobileNetULSAMFeatures"]

Blocks = int | Iterable[int]


class ULSAMBlock(ULSAM):
    """`ULSAM` as a block of timm's EfficientNet: it takes stochastic depth and tells its features.

    Shape: (N, channels, H, W) to the same.

    Args:
        channels: Number of channels of the input.
        num_splits: Number of subspaces.
        drop_path_rate: Rate at which a sample skips the attention in training.
        **kwargs: As for `ULSAM`.
    """

    def __init__(self, channels: int, num_splits: int = 4, drop_path_rate: float = 0.0, **kwargs: Any) -> None:
        super().__init__(channels, num_splits, **kwargs)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def feature_info(self, location: str) -> dict[str, Any]:
        # nothing is expanded inside, so every location is the output
        return dict(module="", hook_type="forward", num_chs=self.channels)

    def _is_fusable(self, x: torch.Tensor) -> bool:
        # what drops each sample's maps may as well drop a factor of them
        as_made = is_unchanged(self.drop_path, DropPath) or is_unchanged(self.drop_path, nn.Identity)
        return as_made and super()._is_fusable(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript drops what is inside
            if self._is_fusable(x):
                map_scale = None
                if type(self.drop_path) is DropPath and self.drop_path.training:
                    # made of a parameter, so that they are cast with it in an exported program
                    ones = torch.ones_like(self.conv_dw.weight[:1]).expand(x.shape[0], -1, -1, -1)
                    map_scale = self.drop_path(ones)
                return self._fused(x, map_scale)
        return attend(x, self.drop_path(self.attention(x)))


def _block_numbers(name: str, value: Blocks, accepted: list[int], why: str) -> list[int]:
    several = isinstance(value, Iterable) and not isinstance(value, str)
    numbers = list(value) if several else [value]
    for number in numbers:
        if not isinstance(number, Integral) or isinstance(number, bool) or number not in accepted:
            raise ValueError(f"{name}={value!r}: {number!r} is not a block that {why}; accepted: {accepted}")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{name}={value!r} names a block more than once")
    return numbers


def _place_ulsam(
    stages: nn.Sequential,
    block_args: list[list[dict[str, Any]]],
    num_splits: int,
    replace_blocks: Blocks,
    insert_after: Blocks,
    norm_layer: LayerType | None,
    **dd: Any,
) -> None:
    """Put ULSAM into the built stages of a MobileNet, in place. Blocks are numbered from 1 through all stages."""
    args = [a for stage in block_args for a in stage]  # in_chs, out_chs and stride as built
    numbers = list(range(1, len(args) + 1))
    same_shape = [n for n, a in zip(numbers, args, strict=True) if a["stride"] == 1 and a["in_chs"] == a["out_chs"]]
    replaced = _block_numbers("replace_blocks", replace_blocks, same_shape, "keeps the shape of its input")
    inserted = _block_numbers("insert_after", insert_after, numbers, "exists")

    # placed after timm's initialization, so the layers keep PyTorch's: a batch norm follows every convolution anyway
    try:
        norm_layer = get_norm_layer(norm_layer) or nn.BatchNorm2d
    except KeyError as error:  # timm's MobileNet takes norms that have an activation in them too
        raise ValueError(f"norm_layer={norm_layer!r}: accepted is a norm of timm without an activation") from error
    number = 0
    for stage_index, stage in enumerate(stages):
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for name, block in stage.named_children():
            number += 1
            make = partial(
                ULSAMBlock,
                args[number - 1]["out_chs"],
                num_splits,
                drop_path_rate=args[number - 1]["drop_path_rate"],
                norm_layer=norm_layer,
                **dd,
            )
            blocks[name] = make() if number in replaced else block
            if number in inserted:
                # a name of its own, so that the blocks behind it keep theirs
                blocks[f"{name}_ulsam"] = make()
        stages[stage_index] = nn.Sequential(blocks)


class MobileNetULSAM(EfficientNet):
    """timm's EfficientNet (which holds MobileNetV1 and V2) with ULSAM in the place of, or after, some blocks.

    Blocks are numbered from 1: 1 to 17 in MobileNetV2 (inverted residuals), 1 to 13 in MobileNetV1 (depthwise
    separable). All other blocks keep timm's parameter names.

    Args:
        block_args: Decoded architecture, as for `EfficientNet`.
        num_splits: Number of subspaces of every ULSAM.
        replace_blocks: Blocks in whose place a ULSAM goes; only blocks that keep the shape of their input.
        insert_after: Blocks after which a ULSAM goes.
        **kwargs: As for `EfficientNet`.

    Raises:
        ValueError: If a block does not exist or cannot be replaced (the accepted ones are listed), or `num_splits`
            does not divide its channels.
    """

    def __init__(
        self,
        block_args: list[list[dict[str, Any]]],
        *,
        num_splits: int = 4,
        replace_blocks: Blocks = (),
        insert_after: Blocks = (),
        norm_layer: LayerType | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(block_args, norm_layer=norm_layer, **kwargs, **dd)
        _place_ulsam(self.blocks, block_args, num_splits, replace_blocks, insert_after, norm_layer, **dd)


class MobileNetULSAMFeatures(EfficientNetFeatures):
    """`MobileNetULSAM` as a backbone that returns its feature maps (`features_only=True`).

    Args and raises as for `MobileNetULSAM`, and those of timm's `EfficientNetFeatures`.
    """

    def __init__(
        self,
        block_args: list[list[dict[str, Any]]],
        *,
        num_splits: int = 4,
        replace_blocks: Blocks = (),
        insert_after: Blocks = (),
        feature_location: str = "bottleneck",
        norm_layer: LayerType | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        check_feature_location(feature_location)
        dd = {"device": device, "dtype": dtype}
        super().__init__(block_args, norm_layer=norm_layer, **kwargs, **dd)
        _place_ulsam(self.blocks, block_args, num_splits, replace_blocks, insert_after, norm_layer, **dd)
        hook_features(self, feature_location)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        first_conv="conv_stem",
        classifier="classifier",
        paper_ids="arXiv:2006.15102",
        paper_name="ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
        **kwargs,
    )


def _trained_cfg(name: str, num_classes: int, image_size: int) -> dict[str, Any]:
    """The cfg of weights of the zoo's own; the network's stride is 32, and it saw the whole shorter side."""
    return _cfg(
        num_classes=num_classes,
        input_size=(3, image_size, image_size),
        pool_size=(image_size // 32, image_size // 32),
        crop_pct=1.0,
        **weights_cfg(name),
    )


default_cfgs = generate_default_cfgs(
    {
        "mobilenetv2_ulsam.tin200_96": _trained_cfg("mobilenetv2_ulsam.tin200_96", 200, 96),
        "mobilenetv2_ulsam.tin200": _trained_cfg("mobilenetv2_ulsam.tin200", 200, 64),
        "mobilenetv2_ulsam.tin200_ft_grocery81": _trained_cfg("mobilenetv2_ulsam.tin200_ft_grocery81", 81, 96),
        "mobilenetv2_ulsam.tin200_96_ft_grocery81": _trained_cfg("mobilenetv2_ulsam.tin200_96_ft_grocery81", 81, 128),
        "mobilenetv2_ulsam.ra_in1k_init": _cfg(**init_cfg("mobilenetv2_100.ra_in1k", "blocks 13 and 16")),
        "mobilenetv2_ulsam_s.tin200": _trained_cfg("mobilenetv2_ulsam_s.tin200", 200, 64),
        "mobilenetv2_ulsam_s.tin200_ft_grocery81": _trained_cfg("mobilenetv2_ulsam_s.tin200_ft_grocery81", 81, 96),
        # A name without a tag gives weights that classify as they are. Of the initializations only that of _l does, so
        # it is the default, trained ones of fewer classes or not; where blocks are gone and nothing was trained, a star
        # keeps the untrained one.
        "mobilenetv2_ulsam_s.ra_in1k_init": _cfg(**init_cfg("mobilenetv2_100.ra_in1k", "blocks 12, 13, 15 and 16")),
        "mobilenetv2_ulsam_l.ra_in1k_init": _cfg(**init_cfg("mobilenetv2_100.ra_in1k")),
        "mobilenetv2_ulsam_l.tin200": _trained_cfg("mobilenetv2_ulsam_l.tin200", 200, 64),
        "mobilenetv2_ulsam_l.tin200_ft_grocery81": _trained_cfg("mobilenetv2_ulsam_l.tin200_ft_grocery81", 81, 96),
        "mobilenetv2_ulsam_l.untrained": _cfg(),
        "mobilenetv2_ulsam_050.lamb_in1k_init": _cfg(**init_cfg("mobilenetv2_050.lamb_in1k", "blocks 13 and 16")),
        "mobilenetv2_ulsam_050.untrained*": _cfg(),
        "mobilenetv1_ulsam.tin200": _trained_cfg("mobilenetv1_ulsam.tin200", 200, 64),
        "mobilenetv1_ulsam.tin200_ft_grocery81": _trained_cfg("mobilenetv1_ulsam.tin200_ft_grocery81", 81, 96),
        "mobilenetv1_ulsam.ra4_e3600_r224_in1k_init": _cfg(
            mean=IMAGENET_INCEPTION_MEAN,
            std=IMAGENET_INCEPTION_STD,
            test_input_size=(3, 256, 256),
            test_crop_pct=0.95,
            **init_cfg("mobilenetv1_100.ra4_e3600_r224_in1k", "block 11"),
        ),
        "mobilenetv1_ulsam_075.untrained": _cfg(),
        "mobilenetv1_ulsam_050.untrained": _cfg(),
    }
)


def _create_mobilenet_ulsam(variant: str, pretrained: bool, **kwargs: Any) -> MobileNetULSAM | MobileNetULSAMFeatures:
    classes = MobileNetULSAM, MobileNetULSAMFeatures
    return create_mobilenet(*classes, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def mobilenetv2_ulsam(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNetV2, ULSAM (g = 4) in the place of blocks 13 and 16: the paper's headline, 13 % fewer multiply-adds."""
    model_args = dict(replace_blocks=(13, 16))
    return _create_mobilenet_ulsam("mobilenetv2_ulsam", pretrained, **dict(model_args, **kwargs))


@register_model
def mobilenetv2_ulsam_s(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNetV2, ULSAM (g = 4) in the place of blocks 12, 13, 15 and 16: 25 % fewer multiply-adds."""
    model_args = dict(replace_blocks=(12, 13, 15, 16))
    return _create_mobilenet_ulsam("mobilenetv2_ulsam_s", pretrained, **dict(model_args, **kwargs))


@register_model
def mobilenetv2_ulsam_l(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNetV2, ULSAM (g = 4) inserted after block 16, nothing replaced."""
    model_args = dict(insert_after=(16,))
    return _create_mobilenet_ulsam("mobilenetv2_ulsam_l", pretrained, **dict(model_args, **kwargs))


@register_model
def mobilenetv2_ulsam_050(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNetV2 at half width, ULSAM (g = 4) in the place of blocks 13 and 16."""
    model_args = dict(channel_multiplier=0.5, replace_blocks=(13, 16))
    return _create_mobilenet_ulsam("mobilenetv2_ulsam_050", pretrained, **dict(model_args, **kwargs))


@register_model
def mobilenetv1_ulsam(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNetV1, ULSAM (g = 4) in the place of block 11."""
    model_args = dict(replace_blocks=(11,))
    return _create_mobilenet_ulsam("mobilenetv1_ulsam", pretrained, **dict(model_args, **kwargs))


@register_model
def mobilenetv1_ulsam_075(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNetV1 at width 0.75, ULSAM (g = 4) in the place of block 11."""
    model_args = dict(channel_multiplier=0.75, replace_blocks=(11,))
    return _create_mobilenet_ulsam("mobilenetv1_ulsam_075", pretrained, **dict(model_args, **kwargs))


@register_model
def mobilenetv1_ulsam_050(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNetV1 at half width, ULSAM (g = 4) in the place of block 11."""
    model_args = dict(channel_multiplier=0.5, replace_blocks=(11,))
    return _create_mobilenet_ulsam("mobilenetv1_ulsam_050", pretrained, **dict(model_args, **kwargs))
