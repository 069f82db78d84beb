"""ResNets with Shuffle Attention at the end of every residual branch (SA-Net).

Untrained, residual branches start at zero, as in timm's ResNet; the authors' do not: `zero_init_last=False`.

Paper: `SA-Net: Shuffle Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/2102.00240
"""

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from ..layers.shuffle_attention import ShuffleAttention
from ._build import build_model, check_fits, imagenet_cfg, renamed, unwrapped

__all__ = ["SANet"]


class SANet(ResNet):
    """timm's ResNet with Shuffle Attention; args and raises as for `ResNet`."""

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        # scales and shifts of the gates, which timm cannot tell by their shape (1, C, 1, 1) or by their names
        layers = {name: module for name, module in self.named_modules() if isinstance(module, ShuffleAttention)}
        return {f"{layer}.{name}" for layer, module in layers.items() for name, _ in module.named_parameters()}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """The authors' state dict under timm's keys; one of ours stays as it is.

    Raises:
        RuntimeError: If it does not fit; names all keys and shapes.
    """
    state_dict = renamed(unwrapped(state_dict), [(r"\.sa\.", ".se.")])
    check_fits(state_dict, model, ["fc."], reshaped=["conv1."])
    return state_dict


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        first_conv="conv1",
        classifier="fc",
        paper_ids="arXiv:2102.00240",
        paper_name="SA-Net: Shuffle Attention for Deep Convolutional Neural Networks",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "resnet50_sa.untrained": _cfg(),
        "resnet101_sa.untrained": _cfg(),
        "resnet152_sa.untrained": _cfg(),
    }
)


def _create_resnet_sa(variant: str, pretrained: bool, **kwargs: Any) -> SANet:
    model_args = dict(block=Bottleneck, block_args=dict(attn_layer=ShuffleAttention))
    kwargs = dict(model_args, **kwargs)
    return build_model(SANet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def resnet50_sa(pretrained: bool = False, **kwargs: Any) -> SANet:
    """ResNet-50 with Shuffle Attention (SA-Net50): 64 groups, before every residual addition."""
    model_args = dict(layers=(3, 4, 6, 3))
    return _create_resnet_sa("resnet50_sa", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet101_sa(pretrained: bool = False, **kwargs: Any) -> SANet:
    """ResNet-101 with Shuffle Attention (SA-Net101): 64 groups, before every residual addition."""
    model_args = dict(layers=(3, 4, 23, 3))
    return _create_resnet_sa("resnet101_sa", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet152_sa(pretrained: bool = False, **kwargs: Any) -> SANet:
    """ResNet-152 with Shuffle Attention: 64 groups, before every residual addition."""
    model_args = dict(layers=(3, 8, 36, 3))
    return _create_resnet_sa("resnet152_sa", pretrained, **dict(model_args, **kwargs))
