"""SMT, Scale-Aware Modulation Transformer.

Paper: `Scale-Aware Modulation Meet Transformer` - https://arxiv.org/abs/2307.08579 (ICCV 2023)

Configurations are those of https://github.com/AFeng-x/SMT.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    LayerNorm2d,
    LayerType,
    calculate_drop_path_rates,
    create_classifier,
    get_act_layer,
    get_norm_layer,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from ..layers._checks import check_positive
from ..layers.scale_aware_modulation import ScaleAwareModulation, init_linear_or_conv
from ._build import build_model, check_fits, imagenet_cfg, renamed, unwrapped
from ._smt_blocks import Block, Downsample, SelfAttention, Stem

__all__ = ["SMT"]


class Stage(nn.Module):
    """Downsampling, blocks, norm."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)


def _check_stages(depths: Sequence[int], **settings: Sequence[float]) -> None:
    check_positive(**{f"depths[{i}]": depth for i, depth in enumerate(depths)})
    for name, values in settings.items():
        if len(values) != len(depths):
            raise ValueError(f"{name}={values!r}: accepted is one for each of the {len(depths)} stages of depths")
    heads = zip(settings["modulation_heads"], settings["attention_heads"], strict=True)
    for i, (modulation, attention) in enumerate(heads):
        if not modulation and not attention:
            raise ValueError(f"modulation_heads and attention_heads are both 0 in stage {i}: accepted is one or both")


class SMT(nn.Module):
    """Scale-Aware Modulation Transformer: modulation in early stages, self-attention in the last.

    A stage has modulation where only its `modulation_heads` are not 0, self-attention where only its `attention_heads`
    are not, and where both are, its blocks alternate, beginning with modulation. Feature maps are (N, C, H, W) in
    channels_last from the stem on, whatever the memory format of the input: what norms write, and linear layers read.

    The authors train with `drop_path_rate` 0.1 (tiny), 0.2 (small), 0.3 (base) and 0.4 (large).

    Args:
        in_chans: Number of channels of the input.
        num_classes: Number of classes, 0 for no classifier.
        global_pool: Type of pooling before the classifier.
        depths: Number of blocks of each stage.
        embed_dims: Number of channels of each stage.
        modulation_heads: Number of heads of each stage's modulation.
        attention_heads: Number of heads of each stage's self-attention.
        mlp_ratios: Width of each stage's MLPs, relative to its channels.
        expand_ratio: As for `ScaleAwareModulation`.
        stem_kernel: Size of the first convolution, odd.
        qkv_bias: Whether the maps to v and s, and to q, k and v, have a bias.
        init_values: Initial value of layer scale, None for no layer scale.
        drop_rate: Rate of dropout before the classifier.
        proj_drop_rate: Rate of dropout after modulation, self-attention, and both layers of MLPs.
        attn_drop_rate: Rate of dropout of attention weights.
        drop_path_rate: Rate of stochastic depth of the last block; it rises from 0 at the first.
        act_layer: Activation of modulators and MLPs.
        norm_layer: Normalization over the channels of (N, C, H, W), called with their number and `eps`.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If settings of stages are not equally many, heads do not divide a stage's channels, a stage has no
            heads, or `stem_kernel` is not odd.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 2, 8, 1),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        modulation_heads: Sequence[int] = (4, 4, 4, 0),
        attention_heads: Sequence[int] = (0, 0, 8, 16),
        mlp_ratios: Sequence[float] = (4, 4, 4, 2),
        expand_ratio: int = 2,
        stem_kernel: int = 3,
        qkv_bias: bool = True,
        init_values: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: LayerType = nn.GELU,
        norm_layer: LayerType = LayerNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)
        _check_stages(
            depths,
            embed_dims=embed_dims,
            modulation_heads=modulation_heads,
            attention_heads=attention_heads,
            mlp_ratios=mlp_ratios,
        )
        check_positive(in_chans=in_chans, stem_kernel=stem_kernel)
        if stem_kernel % 2 == 0:
            raise ValueError(f"stem_kernel={stem_kernel}: accepted are odd sizes")
        self.num_classes = num_classes
        self.in_chans = in_chans

        self.stem = Stem(in_chans, embed_dims[0], stem_kernel, norm_layer=norm_layer, **dd)
        self.feature_info = []
        rates = calculate_drop_path_rates(drop_path_rate, sum(depths))
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, embed_dims, strict=True)):
            mixers = []
            if modulation_heads[i]:
                modulation = dict(expand_ratio=expand_ratio, act_layer=act_layer)
                mixers.append(partial(ScaleAwareModulation, dim, modulation_heads[i], **modulation))
            if attention_heads[i]:
                mixers.append(partial(SelfAttention, dim, attention_heads[i], attn_drop=attn_drop_rate))
            blocks = [
                Block(
                    dim,
                    mixers[j % len(mixers)](qkv_bias=qkv_bias, proj_drop=proj_drop_rate, **dd),
                    mlp_ratio=mlp_ratios[i],
                    init_values=init_values,
                    proj_drop=proj_drop_rate,
                    drop_path=rates.pop(0),
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    **dd,
                )
                for j in range(depth)
            ]
            downsample = Downsample(embed_dims[i - 1], dim, norm_layer=norm_layer, **dd) if i else nn.Identity()
            stages.append(Stage(downsample, blocks, norm_layer(dim, eps=1e-6, **dd)))
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)

        self.num_features = embed_dims[-1]
        self.global_pool, self.head = create_classifier(self.num_features, num_classes, global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(init_linear_or_conv)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
        ]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        weight = self.stem.conv1.weight
        dd = {"device": weight.device, "dtype": weight.dtype}
        self.global_pool, self.head = create_classifier(self.num_features, num_classes, pool, **dd)
        self.global_pool.train(self.training)
        self.head.train(self.training)
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
        """Features and, on the way, what stages give.

        Args:
            x: Images.
            indices: Stages to take: the last ones if an integer, all if None.
            norm: Nothing changes: every stage ends in its norm, of which the next one is fed.
            stop_early: Whether to stop behind the last stage taken.
            output_fmt: "NCHW".
            intermediates_only: Whether to return the intermediates alone.

        Returns:
            The last features computed, and the intermediates.

        Raises:
            ValueError: If `output_fmt` is another.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}; accepted: 'NCHW'")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.stem(x)
        # TorchScript cannot slice modules
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[: max_index + 1]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the stages taken do not need; every stage keeps its norm."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.stages(self.stem(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


_PUBLISHED_NAMES = (
    (r"^patch_embed1\.conv\.0\.", "stem.conv1."),
    (r"^patch_embed1\.conv\.1\.", "stem.bn1."),
    (r"^patch_embed1\.conv\.3\.", "stem.conv2."),
    (r"^patch_embed1\.", "stem."),
    *((rf"^patch_embed{i + 1}\.", f"stages.{i}.downsample.") for i in range(1, 4)),
    *((rf"^block{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
    *((rf"^norm{i + 1}\.", f"stages.{i}.norm.") for i in range(4)),
    *((rf"\.local_conv_{i + 1}\.", f".local_convs.{i}.") for i in range(64)),  # more heads than any model has
    (r"\.attn\.dw_conv\.", ".attn.local_conv."),  # its name in one revision of the published code
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"\bgamma_(\d)$", r"ls\1.gamma"),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """A published checkpoint, or one of ours, as a state dict of `model`.

    Raises:
        RuntimeError: If it is not of this model; names all keys that do not fit, with their shapes.
    """
    state_dict = renamed(unwrapped(state_dict), _PUBLISHED_NAMES)
    adapted = ["head."]
    first = state_dict.get("stem.conv1.weight")
    if first is not None and first.dim() == 4 and first.shape[1] != model.in_chans:
        adapted.append("stem.conv1.")
    check_fits(state_dict, model, adapted)
    return state_dict


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        first_conv="stem.conv1",
        classifier="head",
        paper_ids="arXiv:2307.08579",
        paper_name="Scale-Aware Modulation Meet Transformer",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "smt_tiny.untrained": _cfg(),
        "smt_small.untrained": _cfg(),
        "smt_base.untrained": _cfg(),
        "smt_large.untrained": _cfg(),
    }
)


def _create_smt(variant: str, pretrained: bool, **kwargs: Any) -> SMT:
    return build_model(
        SMT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )


@register_model
def smt_tiny(pretrained: bool = False, **kwargs: Any) -> SMT:
    """SMT-T, Scale-Aware Modulation Transformer: 11.5 million parameters."""
    return _create_smt("smt_tiny", pretrained, **kwargs)


@register_model
def smt_small(pretrained: bool = False, **kwargs: Any) -> SMT:
    """SMT-S, Scale-Aware Modulation Transformer: 22.6 million parameters (20.5 in the paper, not in its code)."""
    model_args = dict(depths=(3, 4, 18, 2))
    return _create_smt("smt_small", pretrained, **dict(model_args, **kwargs))


@register_model
def smt_base(pretrained: bool = False, **kwargs: Any) -> SMT:
    """SMT-B, Scale-Aware Modulation Transformer: 32.0 million parameters."""
    model_args = dict(depths=(4, 6, 28, 2), mlp_ratios=(8, 6, 4, 2), stem_kernel=7)
    return _create_smt("smt_base", pretrained, **dict(model_args, **kwargs))


@register_model
def smt_large(pretrained: bool = False, **kwargs: Any) -> SMT:
    """SMT-L, Scale-Aware Modulation Transformer with layer scale: 81 million parameters."""
    model_args = dict(
        depths=(4, 6, 28, 4),
        embed_dims=(96, 192, 384, 768),
        mlp_ratios=(8, 6, 4, 2),
        stem_kernel=7,
        init_values=1e-4,
    )
    return _create_smt("smt_large", pretrained, **dict(model_args, **kwargs))
