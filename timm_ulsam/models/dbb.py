"""ResNet and MobileNetV1 of Diverse Branch Blocks, which fold into the plain networks.

Papers:
* `Diverse Branch Block: Building a Convolution as an Inception-like Unit` - https://arxiv.org/abs/2103.13425
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385
* `MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications`
  - https://arxiv.org/abs/1704.04861

Untrained, residual branches start at zero, as in timm's ResNet; the authors' do not: `zero_init_last=False`.
"""

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from timm.layers import LayerType, get_norm_layer
from timm.models import (
    EfficientNet,
    EfficientNetFeatures,
    FeatureHooks,
    ResNet,
    generate_default_cfgs,
    register_model,
)
from timm.models._efficientnet_builder import (
    efficientnet_init_weights,
)
from timm.models._manipulate import adapt_input_conv
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from ..layers.conv_bn import ConvBN, centred_geometry, checked_norm
from ..layers.diverse_branch_block import DiverseBranchBlock, with_identity
from ._build import build_model, check_fits, imagenet_cfg, renamed, unwrapped
from ._mobilenet import MOBILENETV1, check_feature_location, create_mobilenet, places

__all__ = ["MobileNetDBB", "MobileNetDBBFeatures", "ResNetDBB"]


def _place_dbb(model: nn.Module, norm_layer: Callable[..., nn.Module], **dd: Any) -> None:
    """Merge every convolution of a built model with the batch norm behind it, in place; attention is left alone.

    One of 3x3 becomes a Diverse Branch Block, another a `ConvBN`. The norm's place keeps its activation, or nothing.
    """
    checked_norm(norm_layer, 64)
    modules = [(name, module) for name, module in model.named_modules() if "se" not in name.split(".")]
    for (name, conv), (norm_name, norm) in pairwise(modules):
        if not isinstance(conv, nn.Conv2d) or not hasattr(norm, "running_mean"):
            continue
        kwargs = dict(norm_layer=norm_layer, **centred_geometry(conv), **dd)
        if conv.kernel_size == (3, 3):
            # three channels inside the stem's last branch whatever the input has, so that published weights adapt
            layer = DiverseBranchBlock(**kwargs, internal_channels=3 if name == "conv_stem" else None)
        else:
            layer = ConvBN(**kwargs)
        model.set_submodule(name, layer)
        model.set_submodule(norm_name, getattr(norm, "act", nn.Identity()))


class BasicBlockDBB(BasicBlock):
    """timm's `BasicBlock`, knowing where its last norms are once Diverse Branch Blocks are placed in it."""

    def zero_init_last(self) -> None:
        self.conv2.zero_init_branches()


class BottleneckDBB(Bottleneck):
    """timm's `Bottleneck`, knowing where its last norm is once it is merged with the convolution."""

    def zero_init_last(self) -> None:
        if not isinstance(self.conv3.bn, nn.Identity):
            nn.init.zeros_(self.conv3.bn.weight)


class ResNetDBB(ResNet):
    """timm's ResNet whose 3x3 convolutions are Diverse Branch Blocks, all others with their batch norms `ConvBN`.

    Folded (`--reparam` of timm's scripts), it is the plain ResNet without batch norms; one that an `aa_layer` parts
    from its convolution stays.

    Args:
        block: `BasicBlockDBB` or `BottleneckDBB`.
        **kwargs: As for `ResNet`.

    Raises:
        ValueError: If `norm_layer` makes no batch norm with running statistics.
    """

    def __init__(
        self,
        block: type[BasicBlockDBB | BottleneckDBB],
        layers: tuple[int, ...],
        *,
        norm_layer: LayerType = nn.BatchNorm2d,
        zero_init_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(block, layers, norm_layer=norm_layer, zero_init_last=False, **kwargs, **dd)
        _place_dbb(self, get_norm_layer(norm_layer), **dd)
        self.init_weights(zero_init_last=zero_init_last)


class MobileNetDBB(EfficientNet):
    """timm's MobileNetV1 (an `EfficientNet`) of Diverse Branch Blocks (stem, depthwise) and `ConvBN` (pointwise).

    Folded (`--reparam` of timm's scripts), it is the plain MobileNetV1, without any batch norm.

    Args:
        block_args: Decoded architecture, as for `EfficientNet`.
        **kwargs: As for `EfficientNet`.

    Raises:
        ValueError: If `norm_layer` makes no batch norm with running statistics, or `pad_type` pads unevenly.
    """

    def __init__(
        self,
        block_args: list[list[dict[str, Any]]],
        *,
        norm_layer: LayerType | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(block_args, norm_layer=norm_layer, **kwargs, **dd)
        _place_dbb(self, get_norm_layer(norm_layer) or nn.BatchNorm2d, **dd)
        efficientnet_init_weights(self)


class MobileNetDBBFeatures(EfficientNetFeatures):
    """`MobileNetDBB` as a backbone that returns its feature maps (`features_only=True`).

    Args and raises as for `MobileNetDBB`, and those of timm's `EfficientNetFeatures`.
    """

    def __init__(
        self,
        block_args: list[list[dict[str, Any]]],
        *,
        feature_location: str = "bottleneck",
        norm_layer: LayerType | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        check_feature_location(feature_location)
        dd = {"device": device, "dtype": dtype}
        super().__init__(block_args, feature_location=feature_location, norm_layer=norm_layer, **kwargs, **dd)
        _place_dbb(self, get_norm_layer(norm_layer) or nn.BatchNorm2d, **dd)
        efficientnet_init_weights(self)
        if self.feature_hooks is not None:
            # the parent's are on modules that are no longer there
            hooks = self.feature_info.get_dicts(keys=("module", "hook_type"))
            self.feature_hooks = FeatureHooks(hooks, self.named_modules())


_RESNET_KEYS = (
    (r"^stage0\.conv1\.", "conv1."),
    (r"^stage(\d)\.(\d+)\.shortcut\.", r"layer\1.\2.downsample.0."),
    (r"^stage(\d)\.", r"layer\1."),
    (r"^linear\.", "fc."),
)
_MOBILENET_PLACES = places(MOBILENETV1)
_MOBILENET_KEYS = (
    (r"^conv1\.", "conv_stem."),
    *((rf"^stem\.{n}\.depthwise\.", f"blocks.{s}.{b}.conv_dw.") for n, (s, b) in enumerate(_MOBILENET_PLACES)),
    *((rf"^stem\.{n}\.pointwise\.", f"blocks.{s}.{b}.conv_pw.") for n, (s, b) in enumerate(_MOBILENET_PLACES)),
    (r"^linear\.", "classifier."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """A published checkpoint, of the training or the folded form, under our keys; ours as it is.

    Where the model reads other than three channels, timm adapts the first convolutions; here follow those of a
    MobileNet's stem that timm cannot know: the one stored as an offset from the identity, and the folded one. Repeated
    to three channels, a grey image gives the same logits as the grey model.

    Raises:
        RuntimeError: If the checkpoint is of another model; names keys and shapes.
    """
    is_resnet = isinstance(model, ResNet)
    state_dict = renamed(unwrapped(state_dict), _RESNET_KEYS if is_resnet else _MOBILENET_KEYS)
    adapted = ["fc." if is_resnet else "classifier."]
    trained = model.pretrained_cfg["input_size"][0]  # channels of the weights
    if model.in_chans != trained:
        branch, folded = "conv_stem.dbb_1x1_kxk.", "conv_stem.dbb_reparam.weight"
        offset, plain = f"{branch}idconv1.weight", f"{branch}conv1.weight"
        if offset in state_dict and state_dict[offset].shape[1] == trained:
            state_dict[plain] = with_identity(state_dict.pop(offset))
        if plain in state_dict and state_dict[plain].shape[1] == trained:
            weight = adapt_input_conv(model.in_chans, state_dict.pop(plain), trained)
            if weight.shape[0] == weight.shape[1]:  # as many channels inside as come in
                state_dict[offset] = weight - with_identity(torch.zeros_like(weight))
            else:
                state_dict[plain] = weight
        if folded in state_dict and state_dict[folded].shape[1] == trained:
            state_dict[folded] = adapt_input_conv(model.in_chans, state_dict[folded], trained)
        first = (f"{name}.weight" for name in (_RESNET_FIRST if is_resnet else _MOBILENET_FIRST))
        adapted += [key for key in first if key in state_dict]
    twin = deepcopy(model).to("meta")
    for name, module in list(twin.named_modules()):
        if isinstance(module, (ConvBN, DiverseBranchBlock)):
            module.fold_as(state_dict, f"{name}.")
    check_fits(state_dict, twin, adapted)
    return state_dict


_RESNET_FIRST = ("conv1.conv",)
_MOBILENET_FIRST = ("conv_stem.dbb_origin.conv", "conv_stem.dbb_avg.conv", "conv_stem.dbb_1x1.conv")


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        paper_ids="arXiv:2103.13425",
        paper_name="Diverse Branch Block: Building a Convolution as an Inception-like Unit",
        **kwargs,
    )


_RESNET_CFG = _cfg(first_conv=_RESNET_FIRST[0], classifier="fc")

default_cfgs = generate_default_cfgs(
    {
        "resnet18_dbb.untrained": _RESNET_CFG,
        "resnet50_dbb.untrained": _RESNET_CFG,
        "mobilenetv1_dbb.untrained": _cfg(first_conv=_MOBILENET_FIRST, classifier="classifier"),
    }
)


def _create_resnet_dbb(variant: str, pretrained: bool, **kwargs: Any) -> ResNetDBB:
    return build_model(ResNetDBB, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


def _create_mobilenet_dbb(variant: str, pretrained: bool, **kwargs: Any) -> MobileNetDBB | MobileNetDBBFeatures:
    kwargs |= dict(default_act="relu", pretrained_filter_fn=checkpoint_filter_fn)
    return create_mobilenet(MobileNetDBB, MobileNetDBBFeatures, variant, pretrained, **kwargs)


@register_model
def resnet18_dbb(pretrained: bool = False, **kwargs: Any) -> ResNetDBB:
    """ResNet-18 whose 3x3 convolutions are Diverse Branch Blocks; folds into the plain ResNet-18."""
    model_args = dict(block=BasicBlockDBB, layers=(2, 2, 2, 2))
    return _create_resnet_dbb("resnet18_dbb", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_dbb(pretrained: bool = False, **kwargs: Any) -> ResNetDBB:
    """ResNet-50 whose 3x3 convolutions are Diverse Branch Blocks; folds into the plain ResNet-50."""
    model_args = dict(block=BottleneckDBB, layers=(3, 4, 6, 3))
    return _create_resnet_dbb("resnet50_dbb", pretrained, **dict(model_args, **kwargs))


@register_model
def mobilenetv1_dbb(pretrained: bool = False, **kwargs: Any) -> MobileNetDBB:
    """MobileNetV1 whose stem and depthwise convolutions are Diverse Branch Blocks; folds into the plain MobileNetV1."""
    return _create_mobilenet_dbb("mobilenetv1_dbb", pretrained, **kwargs)
