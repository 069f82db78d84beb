"""What the families on timm's MobileNetV1 and V2 share; both are an `EfficientNet` of timm.

Papers:
* `MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications`
  - https://arxiv.org/abs/1704.04861
* `MobileNetV2: Inverted Residuals and Linear Bottlenecks` - https://arxiv.org/abs/1801.04381
"""

from functools import partial
from typing import Any

from timm.models import EfficientNet, EfficientNetFeatures, FeatureHooks
from timm.models._builder import pretrained_cfg_for_features
from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args, round_channels
from torch import nn

from ._build import build_model

# A stage is (expansion, channels, blocks, stride of the first block), as in the papers' tables.
MOBILENETV1 = ((1, 64, 1, 1), (1, 128, 2, 2), (1, 256, 2, 2), (1, 512, 6, 2), (1, 1024, 2, 2))
MOBILENETV2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_KINDS = {"mobilenetv1": (MOBILENETV1, "dsa", "dsa", 0), "mobilenetv2": (MOBILENETV2, "ds", "ir", 1280)}


def places(stages: tuple[tuple[int, int, int, int], ...]) -> list[tuple[int, int]]:
    """Stage and block, from 0, of every block in order."""
    return [(stage, block) for stage, (_, _, blocks, _) in enumerate(stages) for block in range(blocks)]


def check_feature_location(feature_location: str) -> None:
    """Refuse another place of features than timm has.

    Raises:
        ValueError: Names it and the accepted ones.
    """
    if feature_location not in ("bottleneck", "expansion"):
        raise ValueError(f"feature_location={feature_location!r}; accepted: 'bottleneck', 'expansion'")


def hook_features(model: EfficientNetFeatures, feature_location: str) -> None:
    """Register the hooks that take features inside blocks: on the modules as placed, which the parent has not seen."""
    if feature_location == "bottleneck":
        return
    for info in model.feature_info.info:
        if info["stage"] > 0:
            stage = info["stage"] - 1
            name, block = list(model.blocks[stage].named_children())[-1]
            info.update(block.feature_info(feature_location))
            info["module"] = f"blocks.{stage}.{name}.{info['module']}".rstrip(".")
    hooks = model.feature_info.get_dicts(keys=("module", "hook_type"))
    model.feature_hooks = FeatureHooks(hooks, model.named_modules())


def create_mobilenet(
    model_cls: type[EfficientNet],
    features_cls: type[EfficientNetFeatures],
    variant: str,
    pretrained: bool,
    *,
    channel_multiplier: float = 1.0,
    default_act: str = "relu6",
    **kwargs: Any,
) -> EfficientNet | EfficientNetFeatures:
    """Build a MobileNet, V1 or V2 by the beginning of its name.

    Args:
        model_cls: Class of the model.
        features_cls: Class of the model without a head, for `features_only=True`.
        variant: Name of the model.
        pretrained: Whether to load weights.
        channel_multiplier: Width.
        default_act: Activation, unless `act_layer` names another.
        **kwargs: As for `build_model` and the class.
    """
    stages, without_expansion, with_expansion, num_features = _KINDS[variant.partition("_")[0]]
    # a block that does not expand has no first 1x1 convolution: depthwise separable
    arch_def = [[f"{with_expansion if e > 1 else without_expansion}_r{n}_k3_s{s}_e{e}_c{c}"] for e, c, n, s in stages]
    round_chs_fn = partial(round_channels, multiplier=channel_multiplier)
    kwargs_filter = None
    features_only = kwargs.pop("features_only", False)
    # features come from a class of their own, unless another way to extract them is asked for
    of_own_class = features_only and "feature_cfg" not in kwargs and "feature_cls" not in kwargs
    if of_own_class:
        model_cls = features_cls
        kwargs_filter = ("num_classes", "num_features", "head_conv", "global_pool")
    model = build_model(
        model_cls,
        variant,
        pretrained,
        headless=of_own_class,
        kwargs_filter=kwargs_filter,
        features_only=features_only and not of_own_class,
        block_args=decode_arch_def(arch_def),
        num_features=max(num_features, round_chs_fn(num_features)) if num_features else 0,
        stem_size=32,
        round_chs_fn=round_chs_fn,
        norm_layer=kwargs.pop("norm_layer", None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
        act_layer=resolve_act_layer(kwargs, default_act),
        **kwargs,
    )
    if of_own_class:
        model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(model.pretrained_cfg)
    return model
