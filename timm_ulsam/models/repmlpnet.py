"""RepMLPNet, a hierarchical vision MLP whose layers over positions take in convolutions after training.

Paper: `RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality`
- https://arxiv.org/abs/2112.11081 (CVPR 2022)
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, LayerType, SelectAdaptivePool2d, get_act_layer, get_norm_layer, to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from ..layers._checks import is_positive
from ..layers.rep_mlp import RepMLPBlock, check_partitions
from ._build import build_model, check_fits, imagenet_cfg, renamed, unwrapped
from ._repmlpnet_blocks import RepMLPNetStage

__all__ = ["RepMLPNet"]

Size = int | tuple[int, int]

torch.fx.wrap("check_partitions")


class RepMLPNet(nn.Module):
    """A stem that cuts the image into patches, four stages of `RepMLPNetUnit`, batch norm and a linear classifier.

    The weights hold for one size of partitions in each stage: images may be larger in multiples of what the
    partitions cover (224 or 256 pixels in the published networks). For other sizes give other `partition_sizes`.

    Shape: (N, in_chans, H, W) to (N, num_classes).

    Args:
        channels: Channels of every stage.
        depths: Units of every stage.
        num_sharesets: Number of matrices of the units of every stage, see `RepMLPBlock`.
        img_size: Size of the images, a number or (height, width).
        partition_sizes: Partitions of every stage, numbers or (height, width); None makes one partition of an image of
            `img_size` in every stage.
        patch_size: Size and stride of the patches of the stem.
        kernel_sizes: Kernels of the convolutions that are folded away.
        gp_reduction: `reduction` of `RepMLPBlock`.
        ffn_expand: Hidden channels of a FFN for each channel of its input.
        in_chans: Channels of the images.
        num_classes: Number of classes, 0 for no classifier.
        global_pool: Pooling before the classifier, as timm names it.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last unit; grows linearly from 0.
        act_layer: Activation of the FFNs.
        norm_layer: Batch norm, called with a number of channels.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If arguments of stages differ in length, `img_size` cannot be cut into partitions (the accepted
            sizes are named), or as `RepMLPBlock`; in `forward`, if an image has another number of channels, or a size
            that cannot be cut.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_sharesets: tuple[int, ...] = (1, 4, 16, 128),
        *,
        img_size: Size = 224,
        partition_sizes: tuple[Size, ...] | None = None,
        patch_size: Size = 4,
        kernel_sizes: tuple[int, ...] = (1, 3),
        gp_reduction: int = 4,
        ffn_expand: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: LayerType = nn.GELU,
        norm_layer: LayerType = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)
        patch = _pair("patch_size", patch_size)
        stages = len(channels)
        self.partition_sizes = _partition_sizes(partition_sizes, _pair("img_size", img_size), patch, stages)
        for name, value in (("depths", depths), ("num_sharesets", num_sharesets)):
            if len(value) != stages:
                raise ValueError(f"{name}={value!r}: accepted is one for each of the {stages} stages")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        # what height and width of an image have to be multiples of
        self.unit_h, self.unit_w = (
            math.lcm(*(size[side] * patch[side] * 2**i for i, size in enumerate(self.partition_sizes)))
            for side in (0, 1)
        )
        _check_img_size(_pair("img_size", img_size), self.unit_h, self.unit_w, patch, stages)

        self.stem = ConvNormAct(in_chans, channels[0], patch, stride=patch, padding=0, norm_layer=norm_layer, **dd)
        blocks = sum(depths)
        drop_paths = [drop_path_rate * i / max(blocks - 1, 1) for i in range(blocks)]
        self.stages = nn.Sequential(
            *(
                RepMLPNetStage(
                    channels[max(i - 1, 0)],
                    channels[i],
                    i > 0,
                    self.partition_sizes[i],
                    drop_paths[sum(depths[:i]) : sum(depths[: i + 1])],
                    norm_layer,
                    kernel_sizes=kernel_sizes,
                    gp_reduction=gp_reduction,
                    ffn_expand=ffn_expand,
                    num_sharesets=num_sharesets[i],
                    act_layer=act_layer,
                    **dd,
                )
                for i in range(stages)
            )
        )
        self.feature_info = [
            dict(num_chs=channels[i], reduction=max(patch) * 2**i, module=f"stages.{i}") for i in range(stages)
        ]
        self.num_features = self.head_hidden_size = channels[-1]
        self.norm = norm_layer(self.num_features, **dd)
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters for layer-wise rates, as timm's."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep activations of units only in part, and compute them again for gradients."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place of the present one; None keeps the pooling."""
        weight = self.stem.conv.weight
        dd = {"device": weight.device, "dtype": weight.dtype}
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
            self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.global_pool.train(self.training)
        self.head.train(self.training)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Outputs of stages on the way to the last.

        Args:
            x: Images, (N, in_chans, H, W).
            indices: Last n stages if an integer, all if None.
            norm: Whether the last stage's output is taken behind the final norm.
            stop_early: Whether to stop at the last stage asked for.
            output_fmt: Only "NCHW".
            intermediates_only: Whether to return nothing else.

        Returns:
            Final features and intermediate ones, or these alone.

        Raises:
            ValueError: If `output_fmt` is another, or as `forward`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt}; accepted: NCHW")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        check_partitions(x, self.in_chans, self.unit_h, self.unit_w)
        intermediates = []
        last = len(self.stages) - 1
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if not stop_early or i <= max_index:
                x = stage(x)
                if i in take_indices:
                    intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        if not stop_early or max_index == last:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features asked for do not need."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        cut = max_index < len(self.stages) - 1
        if prune_norm or cut:
            self.norm = nn.Identity()  # it is of the last stage's size
        self.stages = self.stages[: max_index + 1]
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Features of images, (N, in_chans, H, W) to (N, num_features, H', W')."""
        check_partitions(x, self.in_chans, self.unit_h, self.unit_w)
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits of features, or what the classifier gets."""
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _pair(name: str, value: Size) -> tuple[int, int]:
    pair = to_2tuple(value)
    if len(pair) != 2 or not all(is_positive(side) for side in pair):
        raise ValueError(f"{name}={value!r}: accepted is a positive integer, or a pair of them")
    return tuple(pair)


def _partition_sizes(
    sizes: tuple[Size, ...] | None, img_size: tuple[int, int], patch: tuple[int, int], stages: int
) -> tuple[tuple[int, int], ...]:
    """Height and width of the partitions of every stage."""
    if sizes is None:
        _check_img_size(img_size, patch[0] * 2 ** (stages - 1), patch[1] * 2 ** (stages - 1), patch, stages)
        return _one_partition(img_size, patch, stages)
    if len(sizes) != stages:
        raise ValueError(f"partition_sizes={sizes!r}: accepted is one for each of the {stages} stages")
    return tuple(_pair("partition_sizes", size) for size in sizes)


def _one_partition(img_size: tuple[int, int], patch: tuple[int, int], stages: int) -> tuple[tuple[int, int], ...]:
    return tuple((img_size[0] // (patch[0] * 2**i), img_size[1] // (patch[1] * 2**i)) for i in range(stages))


def _check_img_size(img_size: tuple[int, int], unit_h: int, unit_w: int, patch: tuple[int, int], stages: int) -> None:
    if img_size[0] % unit_h == 0 and img_size[1] % unit_w == 0:
        return
    message = (
        f"img_size={img_size!r} cannot be cut into the partitions of every stage: accepted are multiples of "
        f"{unit_h} for the height and of {unit_w} for the width"
    )
    least_h, least_w = (side * 2 ** (stages - 1) for side in patch)
    if img_size[0] % least_h == 0 and img_size[1] % least_w == 0:
        sizes = [h if h == w else (h, w) for h, w in _one_partition(img_size, patch, stages)]
        message += f", or partition_sizes={tuple(sizes)}"
    elif (unit_h, unit_w) != (least_h, least_w):
        message += f", or of {least_h} and of {least_w} with other partition_sizes"
    raise ValueError(message)


# published keys, and ours
RULES = [
    (r"^conv_embedding\.", "stem."),
    *((rf"^embeds\.{i}\.", f"stages.{i + 1}.downsample.") for i in range(3)),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\bprebn([12])\.", r"norm\1."),
    (r"\brepmlp_block\.", "rep_mlp."),
    (r"\bffn_block\.ffn_fc([12])\.", r"ffn.fc\1."),
    (r"^head_norm\.", "norm."),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: RepMLPNet) -> dict[str, torch.Tensor]:
    """The authors' checkpoint under our names, in training or deployed form; ours as it is.

    A checkpoint of the deployed form folds the model.

    Raises:
        RuntimeError: If the checkpoint is not of this model; names what does not fit.
    """
    state_dict = renamed(unwrapped(state_dict), RULES)
    for name, module in model.named_modules():
        if isinstance(module, RepMLPBlock):
            module.fold_as(state_dict, f"{name}.")
    check_fits(state_dict, model, ["head."], reshaped=["stem.conv."])
    return state_dict


def _cfg(size: int, **kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        input_size=(3, size, size),
        pool_size=(size // 32, size // 32),
        fixed_input_size=True,
        first_conv="stem.conv",
        classifier="head",
        paper_ids="arXiv:2112.11081",
        paper_name="RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "repmlpnet_t224.untrained": _cfg(224),
        "repmlpnet_t256.untrained": _cfg(256),
        "repmlpnet_b224.untrained": _cfg(224),
        "repmlpnet_b256.untrained": _cfg(256),
        "repmlpnet_d256.untrained": _cfg(256),
        "repmlpnet_l256.untrained": _cfg(256),
    }
)


def _create_repmlpnet(variant: str, pretrained: bool, size: int, width: int, depth: int, **kwargs: Any) -> RepMLPNet:
    model_args = dict(
        channels=tuple(width * 2**i for i in range(4)),
        depths=(2, 2, depth, 2),
        partition_sizes=tuple(size // (4 * 2**i) for i in range(4)),
    )
    return build_model(
        RepMLPNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **dict(model_args, **kwargs),
    )


@register_model
def repmlpnet_t224(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-T at 224 px: 38.3 M parameters, 2.8 G multiply-adds."""
    model_args = dict(num_sharesets=(1, 4, 16, 128))
    return _create_repmlpnet("repmlpnet_t224", pretrained, 224, 64, 6, **dict(model_args, **kwargs))


@register_model
def repmlpnet_t256(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-T at 256 px: 58.7 M parameters, 4.3 G multiply-adds."""
    model_args = dict(num_sharesets=(1, 4, 16, 128))
    return _create_repmlpnet("repmlpnet_t256", pretrained, 256, 64, 6, **dict(model_args, **kwargs))


@register_model
def repmlpnet_b224(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-B at 224 px: 68.2 M parameters, 6.7 G multiply-adds."""
    model_args = dict(num_sharesets=(1, 4, 32, 128))
    return _create_repmlpnet("repmlpnet_b224", pretrained, 224, 96, 12, **dict(model_args, **kwargs))


@register_model
def repmlpnet_b256(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-B at 256 px: 96.4 M parameters, 9.6 G multiply-adds."""
    model_args = dict(num_sharesets=(1, 4, 32, 128))
    return _create_repmlpnet("repmlpnet_b256", pretrained, 256, 96, 12, **dict(model_args, **kwargs))


@register_model
def repmlpnet_d256(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-D (deeper, narrower than B) at 256 px: 86.9 M parameters, 8.6 G multiply-adds."""
    model_args = dict(num_sharesets=(1, 4, 16, 128))
    return _create_repmlpnet("repmlpnet_d256", pretrained, 256, 80, 18, **dict(model_args, **kwargs))


@register_model
def repmlpnet_l256(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-L at 256 px: 117.6 M parameters, 11.6 G multiply-adds."""
    model_args = dict(num_sharesets=(1, 4, 32, 256))
    return _create_repmlpnet("repmlpnet_l256", pretrained, 256, 96, 18, **dict(model_args, **kwargs))
