"""What all families share: how a model is built, and how a published checkpoint comes into it."""

import re
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from ..pretrained import checked_cfg, downloads_explained

# for `check_fits`, which runs in filters that timm calls without what the caller said
_must_fit = ContextVar("_must_fit", default=True)


def imagenet_cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's pretrained cfg of a network for ImageNet at 224 px; `kwargs` replace and add entries."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "license": "apache-2.0",
        **kwargs,
    }


def build_model(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_strict: bool = True,
    headless: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """timm's `build_model_with_cfg`, with the weights checked before they are loaded.

    Args and returns as there, but for `headless`: whether the class has no head for that of the checkpoint. With
    `pretrained_strict=False` a checkpoint may lack anything and hold more, as for any timm model.

    Raises:
        WeightsError: As `timm_ulsam.pretrained.checked_cfg` and `downloads_explained`.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    if overlay.get("url") or overlay.get("hf_hub_id"):
        # timm takes a file first, then the Hub, then a URL: ours must not stand before what the caller names
        overlay = {"file": None, "hf_hub_id": None, "hf_hub_filename": None, **overlay}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    with downloads_explained(cfg):
        if pretrained:
            cfg = checked_cfg(cfg, kwargs.get("cache_dir"))
        kwargs |= dict(pretrained_cfg=cfg.to_dict(), pretrained_strict=pretrained_strict and not headless)
        token = _must_fit.set(pretrained_strict)
        try:
            return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
        finally:
            _must_fit.reset(token)


def unwrapped(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint as authors save it: inside `state_dict` or `model`, each key after `module.`."""
    for key in ("state_dict", "model"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
    return {key.removeprefix("module."): value for key, value in checkpoint.items()}


def renamed(state_dict: dict[str, torch.Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """A state dict under other keys: every rule, a regular expression and its replacement, goes over every key."""
    rules = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def new(key: str) -> str:
        for pattern, replacement in rules:
            key = pattern.sub(replacement, key)
        return key

    return {new(key): value for key, value in state_dict.items()}


def check_fits(
    state_dict: dict[str, torch.Tensor], model: nn.Module, adapted: Iterable[str] = (), reshaped: Iterable[str] = ()
) -> None:
    """Refuse a converted checkpoint that is not of this model.

    timm loads what fits, and no more, as soon as a head is adapted; a checkpoint of something else must not pass so,
    unless the caller of `build_model` asked for what fits.

    Args:
        state_dict: Converted to the model's keys.
        model: To be loaded.
        adapted: Beginnings of keys that timm adapts afterwards and may do without (classifier): may be missing, and of
            other shapes.
        reshaped: Beginnings of keys that it adapts but needs (first convolution): may be of other shapes.

    Raises:
        RuntimeError: Names all keys that are missing, unexpected, or of another shape, with both shapes.
    """
    if not _must_fit.get():
        return
    adapted, reshaped = tuple(adapted), tuple(reshaped)
    own = model.state_dict()
    found = {k: tuple(v.shape) for k, v in state_dict.items() if not k.startswith(adapted)}
    needed = {k: tuple(v.shape) for k, v in own.items() if not k.startswith(adapted)}
    problems = []
    # counters of batches are not in every checkpoint, and nothing computed depends on them
    missing = [k for k in needed if k not in found and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in found if k not in needed]
    if missing:
        problems.append(f"missing: {', '.join(missing)}")
    if unexpected:
        problems.append(f"unexpected: {', '.join(unexpected)}")
    compared = [k for k in needed if k in found and not k.startswith(reshaped)]
    problems += [f"{k} is {found[k]}, accepted is {needed[k]}" for k in compared if found[k] != needed[k]]
    if problems:
        raise RuntimeError(f"this checkpoint is not one of {type(model).__name__}: {'; '.join(problems)}")
