"""ResNets and ResNeXts with poly-scale convolutions (PSConv) in the place of all 3x3 convolutions of the bottlenecks.

Paper: `PSConv: Squeezing Feature Pyramid into One Compact Poly-Scale Convolutional Layer`
- https://arxiv.org/abs/2007.06191
"""

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from ..layers.ps_conv import PSConv2d
from ._build import build_model, check_fits, imagenet_cfg, unwrapped

__all__ = ["ResNetPSConv"]


class PSBottleneck(Bottleneck):
    """timm's bottleneck with a poly-scale convolution, of dilations 1, 2 and 4 over four parts.

    Args and shapes as for `Bottleneck`.

    Raises:
        ValueError: If the width does not divide by the parts, or the block is dilated (`output_stride` below 32).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.conv2.dilation != (1, 1):
            raise ValueError(
                "output_stride below 32 dilates the 3x3 convolutions, and PSConv has dilations of its own; "
                "accepted: output_stride=32"
            )
        self.conv2 = PSConv2d.from_conv(self.conv2, dilation=2, parts=4)


class ResNetPSConv(ResNet):
    """timm's ResNet of `PSBottleneck`s.

    Args and raises as for `ResNet` and `PSBottleneck`.
    """

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        super().init_weights(zero_init_last=zero_init_last)
        for module in self.modules():
            if hasattr(module, "zero_masked"):
                module.zero_masked()  # timm draws the weights of every convolution, masked or not


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """The authors' state dict, whose keys are ours; of a reparameterized one the model takes the form.

    Raises:
        RuntimeError: If it does not fit; names all keys and shapes.
    """
    state_dict = unwrapped(state_dict)
    for name, module in model.named_modules():
        if isinstance(module, PSConv2d):
            module.fold_as(state_dict, f"{name}.")
    check_fits(state_dict, model, ["fc."], reshaped=["conv1."])
    return state_dict


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        first_conv="conv1",
        classifier="fc",
        paper_ids="arXiv:2007.06191",
        paper_name="PSConv: Squeezing Feature Pyramid into One Compact Poly-Scale Convolutional Layer",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "resnet50_psconv.untrained": _cfg(),
        "resnet101_psconv.untrained": _cfg(),
        "resnext50_32x4d_psconv.untrained": _cfg(),
        "resnext101_32x4d_psconv.untrained": _cfg(),
    }
)


def _create_resnet_psconv(variant: str, pretrained: bool, **kwargs: Any) -> ResNetPSConv:
    kwargs = dict(dict(block=PSBottleneck), **kwargs)
    return build_model(ResNetPSConv, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def resnet50_psconv(pretrained: bool = False, **kwargs: Any) -> ResNetPSConv:
    """ResNet-50 with poly-scale convolutions (PS-ResNet-50): dilations 1, 2, 1, 4 over four parts."""
    model_args = dict(layers=(3, 4, 6, 3))
    return _create_resnet_psconv("resnet50_psconv", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet101_psconv(pretrained: bool = False, **kwargs: Any) -> ResNetPSConv:
    """ResNet-101 with poly-scale convolutions (PS-ResNet-101): dilations 1, 2, 1, 4 over four parts."""
    model_args = dict(layers=(3, 4, 23, 3))
    return _create_resnet_psconv("resnet101_psconv", pretrained, **dict(model_args, **kwargs))


@register_model
def resnext50_32x4d_psconv(pretrained: bool = False, **kwargs: Any) -> ResNetPSConv:
    """ResNeXt-50 32x4d with poly-scale convolutions (PS-ResNeXt-50): four parts in each group."""
    model_args = dict(layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_resnet_psconv("resnext50_32x4d_psconv", pretrained, **dict(model_args, **kwargs))


@register_model
def resnext101_32x4d_psconv(pretrained: bool = False, **kwargs: Any) -> ResNetPSConv:
    """ResNeXt-101 32x4d with poly-scale convolutions (PS-ResNeXt-101): four parts in each group."""
    model_args = dict(layers=(3, 4, 23, 3), cardinality=32, base_width=4)
    return _create_resnet_psconv("resnext101_32x4d_psconv", pretrained, **dict(model_args, **kwargs))
