"""ShuffleNetV2 whose blocks generate their kernels for every image.

Papers:
* `WeightNet: Revisiting the Design Space of Weight Networks` - https://arxiv.org/abs/2007.11823
* `ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design` - https://arxiv.org/abs/1807.11164
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, DropPath, LayerType, create_classifier, get_norm_act_layer
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import nn

from ..layers._checks import check_positive, is_positive
from ..layers.weight_net import PooledCondition, WeightNet
from ._build import build_model, check_fits, imagenet_cfg, renamed, unwrapped

__all__ = ["ShuffleNetV2"]


class PlainConv2d(nn.Conv2d):
    """A convolution that takes the place of a `WeightNet`, and needs no condition."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, **kwargs: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False, **kwargs)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight, self.bias)


class ShuffleBlock(nn.Module):
    """Half of the channels goes through three convolutions, the other half past them.

    With a stride of 1 the even channels pass and the odd ones are convolved: this shuffles what the block before has
    put side by side. With a stride of 2 both halves of the output are convolved from the whole input. One condition,
    of what is convolved, serves all generated kernels of a block.

    Shape: (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)).

    Args:
        in_channels: Number of channels of the input.
        out_channels: Number of channels of the output.
        stride: 1 or 2.
        conv_layer: `WeightNet`, or `PlainConv2d`.
        weightnet: Whether `conv_layer` needs a condition.
        drop_path: Rate at which a sample goes without its convolved half, in training.
        act_layer: Activation.
        norm_layer: Normalization.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        conv_layer: type[nn.Module] | partial = PlainConv2d,
        weightnet: bool = False,
        drop_path: float = 0.0,
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        norm_act = get_norm_act_layer(norm_layer, act_layer)
        channels = in_channels if stride == 2 else in_channels // 2
        mid_channels = out_channels // 2
        outputs = out_channels - channels
        self.stride = stride
        self.reduce = PooledCondition(channels, **dd) if weightnet else nn.Identity()
        self.conv1 = conv_layer(channels, mid_channels, 1, **dd)
        self.bn1 = norm_act(mid_channels, **dd)
        self.conv2 = conv_layer(mid_channels, mid_channels, 3, stride, groups=mid_channels, **dd)
        self.bn2 = norm_act(mid_channels, apply_act=False, **dd)
        self.conv3 = conv_layer(mid_channels, outputs, 1, **dd)
        self.bn3 = norm_act(outputs, **dd)
        self.drop_path = DropPath(drop_path) if drop_path and stride == 1 else nn.Identity()
        self.conv_proj_1 = self.bn_proj_1 = self.conv_proj_2 = self.bn_proj_2 = None
        if stride == 2:
            self.conv_proj_1 = conv_layer(channels, channels, 3, stride, groups=channels, **dd)
            self.bn_proj_1 = norm_act(channels, apply_act=False, **dd)
            self.conv_proj_2 = conv_layer(channels, channels, 1, **dd)
            self.bn_proj_2 = norm_act(channels, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        if self.stride == 1:
            shortcut, x = x[:, ::2], x[:, 1::2]
        condition = self.reduce(x)
        x = self.bn1(self.conv1(x, condition))
        x = self.bn2(self.conv2(x, condition))
        x = self.drop_path(self.bn3(self.conv3(x, condition)))
        if self.conv_proj_1 is not None:
            shortcut = self.bn_proj_1(self.conv_proj_1(shortcut, condition))
            shortcut = self.bn_proj_2(self.conv_proj_2(shortcut, condition))
        return torch.cat((shortcut, x), dim=1)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2, its convolutions plain or generated.

    The published network pools with a window of 7 x 7, for images of 224 x 224; here pooling is global, the same for
    those, so images of any size are taken.

    Args:
        channels: Numbers of output channels of the stem and of all stages; those of stages are even and grow.
        depths: Number of blocks in each stage.
        num_features: Number of channels before pooling.
        weightnet: Whether the convolutions of blocks are `WeightNet`s.
        expansion: M of `WeightNet`.
        num_groups: G of `WeightNet`.
        num_classes: Number of classes; 0 leaves out the classifier.
        in_chans: Number of channels of the images.
        global_pool: Pooling, as timm names them.
        output_stride: 32 is accepted.
        drop_rate: Rate of dropout before the classifier.
        drop_path_rate: Rate at which, in the last block, a sample goes without its convolved half; it grows from 0.
        act_layer: Activation.
        norm_layer: Normalization.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If `channels`, `depths` or `output_stride` do not fit.
    """

    def __init__(
        self,
        channels: Sequence[int] = (24, 116, 232, 464),
        depths: Sequence[int] = (4, 8, 4),
        num_features: int = 1024,
        *,
        weightnet: bool = False,
        expansion: int = 2,
        num_groups: int = 2,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if output_stride != 32:
            raise ValueError(f"output_stride={output_stride!r}; accepted: 32")
        check_positive(in_chans=in_chans, num_features=num_features)
        if len(depths) < 1 or not all(map(is_positive, depths)):
            raise ValueError(f"depths={depths!r}; accepted: positive integers")
        growing = all(map(is_positive, channels)) and all(b > a and b % 2 == 0 for a, b in pairwise(channels))
        if len(channels) != len(depths) + 1 or not growing:
            raise ValueError(f"channels={channels!r}; accepted: {len(depths) + 1} that grow, even but for the first")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        norms = dict(norm_layer=norm_layer, act_layer=act_layer)

        # both convolutions outside of blocks have a bias, though batch norm follows: published weights do
        self.stem = ConvNormAct(in_chans, channels[0], 3, stride=2, bias=True, **norms, **dd)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.feature_info = [
            dict(num_chs=channels[0], reduction=2, module="stem"),
            dict(num_chs=channels[0], reduction=4, module="maxpool"),
        ]
        conv_layer = partial(WeightNet, expansion=expansion, num_groups=num_groups) if weightnet else PlainConv2d
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages = []
        for stage, (prev_chs, chs, depth) in enumerate(zip(channels, channels[1:], depths, strict=False)):
            blocks = [
                ShuffleBlock(
                    chs if block else prev_chs,
                    chs,
                    stride=1 if block else 2,
                    conv_layer=conv_layer,
                    weightnet=weightnet,
                    drop_path=next(rates),
                    **norms,
                    **dd,
                )
                for block in range(depth)
            ]
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=chs, reduction=8 * 2**stage, module=f"stages.{stage}"))
        self.stages = nn.Sequential(*stages)
        self.num_features = num_features
        self.conv_head = ConvNormAct(channels[-1], num_features, 1, bias=True, **norms, **dd)
        self.global_pool, self.classifier = create_classifier(num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = num_features * self.global_pool.feat_mult()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw new parameters, with the deviations that the authors of WeightNet took."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                # of grouped weights, MegEngine's second dimension is the number of outputs of a group
                fan = module.weight.shape[1] if module.groups == 1 else module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, 0.01 if name == "stem.conv" else 1 / fan)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d) and module.affine:
                module.reset_parameters()
                nn.init.constant_(module.bias, 1e-4)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^stem",
            blocks=[
                (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", None),
                (r"^conv_head", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        parameter = self.stem.conv.weight
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=parameter.device, dtype=parameter.dtype
        )
        self.global_pool.train(self.training)
        self.classifier.train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Features of the stem, of the pooling behind it, and of all stages; arguments as for timm's models.

        `norm` is of no effect, as every stage ends in a normalization.

        Raises:
            ValueError: If `output_fmt` is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt='{output_fmt}'; accepted: 'NCHW'")
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages) + 2, indices)
        x = self.stem(x)
        if 0 in take_indices:
            intermediates.append(x)
        x = self.maxpool(x)
        if 1 in take_indices:
            intermediates.append(x)
        if torch.jit.is_scripting() or not stop_early:  # noqa: SIM108 - TorchScript cannot slice
            stages = self.stages
        else:
            stages = self.stages[: max(max_index - 1, 0)]
        index = 1
        for index, stage in enumerate(stages, start=2):
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108 - as above
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if index in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        if index == len(self.stages) + 1:
            x = self.conv_head(x)
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Leave out what the features asked for do not need; arguments and result as for timm's models."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        prune_end = max_index < len(self.feature_info) - 1
        self.stages = self.stages[: max(max_index - 1, 0)]
        if max_index == 0:
            self.maxpool = nn.Identity()
        if prune_end or prune_norm or prune_head:
            self.conv_head = nn.Identity()
            self.num_features = self.feature_info[max_index]["num_chs"]
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.stem(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.conv_head(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


_PUBLISHED_NAMES = (
    (r"^first_conv\.0\.", "stem.conv."),
    (r"^first_conv\.1\.", "stem.bn."),
    (r"^conv_last\.0\.", "conv_head.conv."),
    (r"^conv_last\.1\.", "conv_head.bn."),
    (r"^classifier\.0\.", "classifier."),
    (r"\bwnet", "conv"),
)


def _published_names(stages: nn.Sequential) -> list[tuple[str, str]]:
    """Rules for `renamed`, from the names of the authors, who number blocks through all stages."""
    places = [(stage, block) for stage, blocks in enumerate(stages) for block in range(len(blocks))]
    blocks = [(rf"^features\.{n}\.", f"stages.{stage}.{block}.") for n, (stage, block) in enumerate(places)]
    return [*_PUBLISHED_NAMES, *blocks]


def _pytorch_layout(value: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    # MegEngine's weights of grouped convolutions are (groups, out / groups, in / groups, kh, kw), its biases of
    # convolutions and statistics of batch norms (1, C, 1, 1): the same numbers in the same order
    if value.dim() == 5:
        return value.flatten(0, 1)
    if own is not None and own.dim() == 1 and value.dim() == 4 and value.shape[1] == value.numel():
        return value.flatten()
    return value


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint of the authors, in MegEngine's layout or PyTorch's, as state dict of the model; ours as it is.

    The authors' test script feeds BGR images with values from 0 to 255, no mean subtracted: timm's transforms do not.

    Raises:
        RuntimeError: If it is not one of this model; names keys and shapes.
    """
    state_dict = unwrapped(state_dict)
    state_dict = renamed({k: torch.as_tensor(v) for k, v in state_dict.items()}, _published_names(model.stages))
    own = model.state_dict()
    state_dict = {k: _pytorch_layout(v, own.get(k)) for k, v in state_dict.items()}
    check_fits(state_dict, model, ["classifier."], reshaped=["stem.conv."])
    return state_dict


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        first_conv="stem.conv",
        classifier="classifier",
        paper_ids="arXiv:2007.11823",
        paper_name="WeightNet: Revisiting the Design Space of Weight Networks",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "shufflenetv2_050_weightnet.untrained": _cfg(),
        "shufflenetv2_100_weightnet.untrained": _cfg(),
        "shufflenetv2_150_weightnet.untrained": _cfg(),
        "shufflenetv2_200_weightnet.untrained": _cfg(),
    }
)


def _create_shufflenetv2(variant: str, pretrained: bool, **kwargs: Any) -> ShuffleNetV2:
    model_args = dict(weightnet=True, feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), flatten_sequential=True))
    kwargs = dict(model_args, **kwargs)
    return build_model(ShuffleNetV2, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


# The authors took slightly fewer channels than ShuffleNetV2 has, so that the multiply-adds stay about the same.


@register_model
def shufflenetv2_050_weightnet(pretrained: bool = False, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 0.5x with WeightNet (M = G = 2): 1.5 M parameters, 41 M multiply-adds."""
    model_args = dict(channels=(24, 48, 96, 192))
    return _create_shufflenetv2("shufflenetv2_050_weightnet", pretrained, **dict(model_args, **kwargs))


@register_model
def shufflenetv2_100_weightnet(pretrained: bool = False, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 1.0x with WeightNet (M = G = 2): 2.4 M parameters, 139 M multiply-adds."""
    model_args = dict(channels=(24, 112, 224, 448))
    return _create_shufflenetv2("shufflenetv2_100_weightnet", pretrained, **dict(model_args, **kwargs))


@register_model
def shufflenetv2_150_weightnet(pretrained: bool = False, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 1.5x with WeightNet (M = G = 2): 3.9 M parameters, 301 M multiply-adds."""
    model_args = dict(channels=(24, 176, 352, 704))
    return _create_shufflenetv2("shufflenetv2_150_weightnet", pretrained, **dict(model_args, **kwargs))


@register_model
def shufflenetv2_200_weightnet(pretrained: bool = False, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 2.0x with WeightNet (M = G = 2), dropout 0.2: 6.2 M parameters, 561 M multiply-adds."""
    model_args = dict(channels=(24, 248, 496, 992), drop_rate=0.2)
    return _create_shufflenetv2("shufflenetv2_200_weightnet", pretrained, **dict(model_args, **kwargs))
