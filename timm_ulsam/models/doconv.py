"""ResNet, ResNeXt, MobileNetV1 and MobileNetV2 of depthwise over-parameterized convolutions (DO-Conv).

Every convolution is one; folded, they are timm's own networks with the same parameters, state dict and speed.

Papers:
* `DO-Conv: Depthwise Over-parameterized Convolutional Layer` - https://arxiv.org/abs/2006.12030
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385
* `Aggregated Residual Transformations for Deep Neural Networks` - https://arxiv.org/abs/1611.05431
* `MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications`
  - https://arxiv.org/abs/1704.04861
* `MobileNetV2: Inverted Residuals and Linear Bottlenecks` - https://arxiv.org/abs/1801.04381
"""

from typing import Any

import torch
from timm.models import (
    EfficientNet,
    EfficientNetFeatures,
    ResNet,
    adapt_input_conv,
    generate_default_cfgs,
    register_model,
)
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from ..layers.do_conv import DOConv2d, fold_state_dict
from ..layers.replace import replace_convs
from ._build import build_model, check_fits, imagenet_cfg, renamed, unwrapped
from ._mobilenet import MOBILENETV2, check_feature_location, create_mobilenet, hook_features, places

__all__ = ["DOConvEfficientNet", "DOConvEfficientNetFeatures", "DOConvResNet"]


def _over_parameterize(model: nn.Module) -> None:
    """Replace every convolution, in place, after timm has initialized it: W starts as its weight did."""
    replace_convs(model, DOConv2d)
    left = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if left:
        raise ValueError(f"convolutions that DO-Conv cannot replace: {left}; accepted are arguments that build none")


class DOConvResNet(ResNet):
    """timm's ResNet, every convolution a `DOConv2d`. Args as for `ResNet`.

    Raises:
        ValueError: If the arguments build convolutions other than `nn.Conv2d`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _over_parameterize(self)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        super().init_weights(zero_init_last=zero_init_last)
        for module in self.modules():
            if isinstance(module, DOConv2d):  # no nn.Conv2d, so timm passes it by
                module.reset_parameters()
                kernel = module.weight if module.W is None else module.W
                nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")


class DOConvEfficientNet(EfficientNet):
    """timm's EfficientNet (which holds MobileNetV1 and V2), every convolution a `DOConv2d`. Args as for `EfficientNet`.

    Raises:
        ValueError: If the arguments build convolutions other than `nn.Conv2d`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _over_parameterize(self)


class DOConvEfficientNetFeatures(EfficientNetFeatures):
    """`DOConvEfficientNet` as a backbone that returns its feature maps (`features_only=True`).

    Args and raises as for timm's `EfficientNetFeatures`, and:

    Raises:
        ValueError: If `feature_location` is not one of timm's, or the arguments build convolutions other than
            `nn.Conv2d`.
    """

    def __init__(self, *args: Any, feature_location: str = "bottleneck", **kwargs: Any) -> None:
        check_feature_location(feature_location)
        super().__init__(*args, **kwargs)
        _over_parameterize(self)
        hook_features(self, feature_location)


def _torchvision_names() -> list[tuple[str, str]]:
    """Rules from torchvision's names in mobilenet_v2 to timm's in mobilenetv2_100."""
    rules = [
        (r"^features\.0\.0\.", "conv_stem."),
        (r"^features\.0\.1\.", "bn1."),
        (r"^features\.18\.0\.", "conv_head."),
        (r"^features\.18\.1\.", "bn2."),
        (r"^classifier\.1\.", "classifier."),
    ]
    separable = (("0.0", "conv_dw"), ("0.1", "bn1"), ("1", "conv_pw"), ("2", "bn2"))
    inverted = (
        ("0.0", "conv_pw"),
        ("0.1", "bn1"),
        ("1.0", "conv_dw"),
        ("1.1", "bn2"),
        ("2", "conv_pwl"),
        ("3", "bn3"),
    )
    for number, (stage, block) in enumerate(places(MOBILENETV2), start=1):
        for theirs, ours in separable if stage == 0 else inverted:
            # of a block's convolution or norm comes the last part of the key alone
            rules.append((rf"^features\.{number}\.conv\.{theirs}\.(?=\w+$)", f"blocks.{stage}.{block}.{ours}."))
    return rules


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Bring a checkpoint into the form of `model`.

    Args:
        state_dict: Of DO-Convs, published or ours, or of the plain network by timm's or torchvision's names, whose
            kernels become W with D = 0; as it is, or wrapped.
        model: One of this file's, to be loaded. For other input channels than those of the weights its stem is adapted
            as timm does.

    Raises:
        RuntimeError: If the checkpoint is not one of `model`; names keys and shapes.
    """
    state_dict = unwrapped(state_dict)
    is_resnet = isinstance(model, ResNet)
    if not is_resnet:
        state_dict = renamed(state_dict, _torchvision_names())
    convs = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, DOConv2d)}

    # timm knows only a stem's `weight`, so it is not left to it
    prefix, stem = next(iter(convs.items()))
    kernel = state_dict.get(f"{prefix}W", state_dict.get(f"{prefix}weight"))
    trained = model.pretrained_cfg["input_size"][0]  # channels of the weights
    if stem.in_channels != trained and kernel is not None and kernel.dim() > 2 and kernel.shape[1] == trained:
        fold_state_dict(state_dict, prefix, stem.kernel_size)
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}weight"] = adapt_input_conv(stem.in_channels, state_dict[f"{prefix}weight"], trained)
    for prefix, module in convs.items():
        module.convert_state_dict(state_dict, prefix)

    adapted = ("fc.",) if is_resnet else ("classifier.",)
    if isinstance(model, EfficientNetFeatures):
        adapted += ("conv_head.", "bn2.")  # has no head
    check_fits(state_dict, model, adapted)
    return state_dict


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        # none for timm to adapt, which looks for its `weight`: see `checkpoint_filter_fn`
        first_conv=(),
        paper_ids="arXiv:2006.12030",
        paper_name="DO-Conv: Depthwise Over-parameterized Convolutional Layer",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "resnet18_doconv.untrained": _cfg(classifier="fc"),
        "resnet50_doconv.untrained": _cfg(classifier="fc"),
        "resnet101_doconv.untrained": _cfg(classifier="fc"),
        "resnext50_32x4d_doconv.untrained": _cfg(classifier="fc"),
        "mobilenetv1_doconv.untrained": _cfg(classifier="classifier"),
        "mobilenetv2_doconv.untrained": _cfg(classifier="classifier"),
    }
)


def _create_resnet_doconv(variant: str, pretrained: bool, **kwargs: Any) -> DOConvResNet:
    return build_model(DOConvResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


def _create_mobilenet_doconv(
    variant: str, pretrained: bool, **kwargs: Any
) -> DOConvEfficientNet | DOConvEfficientNetFeatures:
    classes = DOConvEfficientNet, DOConvEfficientNetFeatures
    return create_mobilenet(*classes, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def resnet18_doconv(pretrained: bool = False, **kwargs: Any) -> DOConvResNet:
    """ResNet-18, every convolution a DO-Conv."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_resnet_doconv("resnet18_doconv", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_doconv(pretrained: bool = False, **kwargs: Any) -> DOConvResNet:
    """ResNet-50, every convolution a DO-Conv."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_resnet_doconv("resnet50_doconv", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet101_doconv(pretrained: bool = False, **kwargs: Any) -> DOConvResNet:
    """ResNet-101, every convolution a DO-Conv."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3))
    return _create_resnet_doconv("resnet101_doconv", pretrained, **dict(model_args, **kwargs))


@register_model
def resnext50_32x4d_doconv(pretrained: bool = False, **kwargs: Any) -> DOConvResNet:
    """ResNeXt-50 (32 groups of width 4), every convolution a DO-Conv."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_resnet_doconv("resnext50_32x4d_doconv", pretrained, **dict(model_args, **kwargs))


@register_model
def mobilenetv1_doconv(pretrained: bool = False, **kwargs: Any) -> DOConvEfficientNet:
    """MobileNetV1, every convolution a DO-Conv."""
    return _create_mobilenet_doconv("mobilenetv1_doconv", pretrained, **kwargs)


@register_model
def mobilenetv2_doconv(pretrained: bool = False, **kwargs: Any) -> DOConvEfficientNet:
    """MobileNetV2, every convolution a DO-Conv."""
    return _create_mobilenet_doconv("mobilenetv2_doconv", pretrained, **kwargs)
