"""Predictions of a pretrained model on photographs, and pictures of where its ULSAM blocks looked."""

import difflib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn

from . import models  # noqa: F401  (registers them)
from .errors import InputError, WeightsError
from .layers import ULSAM
from .pictures import check_picture, write_figure
from .zoo import model_names

_DISPLAY_PIXELS = 256
_BATCH_SIZE = 32
_MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels


@dataclass(frozen=True)
class Prediction:
    """One class that a model sees in a photograph.

    Attributes:
        label: Label as the weights name it, such as an ImageNet synset.
        description: English name of the class.
        probability: Softmax probability, 0 to 1.
    """

    label: str
    description: str
    probability: float


def load_model(name: str) -> nn.Module:
    """Build a pretrained model by name (with or without a tag; `hf-hub:` and `local-dir:` names too), in eval mode.

    Raises:
        InputError: If the model is unknown (close names are given), has no pretrained weights or cannot be loaded.
        WeightsError: If its weights are truncated or altered.
    """
    if ":" not in name:
        arch, _, tag = name.partition(".")
        if not timm.is_model(arch):
            close = difflib.get_close_matches(arch, timm.list_models(), n=3)
            raise InputError(
                f"unknown model {name!r}"
                + (f"; did you mean {', '.join(close)}?" if close else "; see timm-ulsam list")
            )
        with_weights = timm.list_pretrained(arch)
        if tag and name not in with_weights:
            raise InputError(f"{arch} has no weights {tag!r}; it has: {', '.join(with_weights) or 'none'}")
        if not with_weights:
            ours = [n for n in model_names() if timm.is_model_pretrained(n)]
            raise InputError(f"{arch} has no pretrained weights; models of this zoo that have: {', '.join(ours)}")
        if not timm.is_model_pretrained(name):
            raise InputError(f"{name} without a tag has no weights; there are: {', '.join(with_weights)}")
    try:
        model = timm.create_model(name, pretrained=True).eval()
        class_names(model)
        create_transform(**resolve_model_data_config(model))
    except (InputError, WeightsError):
        raise
    except Exception as error:  # whatever a name points to may be broken in any way
        why = f"unknown {error}" if isinstance(error, KeyError) else error
        raise InputError(f"cannot load {name}: {why}") from error
    return model


def read_image(path: str | Path) -> Image.Image:
    """Read a photograph as RGB, the right way up.

    Raises:
        InputError: If the file is missing or not an image; names the file.
    """
    try:
        with Image.open(path) as image:
            return _upright(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image that Pillow can read") from error
    except Exception as error:  # a damaged file may fail anywhere
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (ValueError, SyntaxError, struct.error):
        return image  # damaged EXIF does not say which side is up


def demo_images() -> list[tuple[str, Image.Image]]:
    """The photographs of the demonstration, by file name, carried by scikit-image: a tabby cat, an espresso, a rocket.

    Raises:
        InputError: If scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise InputError("the demonstration needs scikit-image: pip install 'timm-ulsam[demo]'") from error
    photographs = [("chelsea.png", data.chelsea), ("coffee.png", data.coffee), ("rocket.jpg", data.rocket)]
    return [(name, Image.fromarray(load())) for name, load in photographs]


def class_names(model: nn.Module) -> list[tuple[str, str]]:
    """Label and English description of every class, as the weights' card gives them; else ImageNet's, else numbers.

    Raises:
        InputError: If the descriptions of the weights are not by label.
    """
    cfg = model.pretrained_cfg
    labels = cfg.get("label_names")
    if isinstance(labels, dict):  # by index, which JSON makes a string
        labels = [labels[index] for index in sorted(labels, key=int)]
    if labels is not None and len(labels) == model.num_classes:
        descriptions = cfg.get("label_descriptions") or {}
        if not isinstance(descriptions, dict):
            raise InputError(f"label_descriptions of the weights are a {type(descriptions).__name__}; accepted: a dict")
        return [(label, descriptions.get(label, label)) for label in labels]
    subset = infer_imagenet_subset(model)
    if subset is not None:
        info = ImageNetInfo(subset)
        return [(info.index_to_label_name(i), info.index_to_description(i)) for i in range(model.num_classes)]
    return [(str(i), f"class {i}") for i in range(model.num_classes)]


@torch.inference_mode()
def predict(model: nn.Module, images: Iterable[Image.Image], top: int = 5) -> list[list[Prediction]]:
    """Classify photographs with the preprocessing of the model's weights.

    Args:
        model: A pretrained timm model.
        images: Photographs, RGB.
        top: Number of classes to return, most probable first.

    Returns:
        The predictions of every photograph.

    Raises:
        InputError: If the model takes images of neither three channels nor one (gray).
    """
    names = class_names(model)
    predictions = []
    # only what the model takes is kept of each photograph
    for batch in _model_inputs(model, images).split(_BATCH_SIZE):
        best = model(batch).softmax(-1).topk(min(top, model.num_classes))
        for row in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            predictions.append([Prediction(*names[index], value) for value, index in zip(*row, strict=True)])
    return predictions


@torch.inference_mode()
def attention_maps(model: nn.Module, images: Iterable[Image.Image]) -> dict[str, torch.Tensor]:
    """The attention maps (N, g, h, w) of every ULSAM layer for N photographs, by module name; empty if it has none.

    Raises:
        InputError: As `predict`.
    """
    maps: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: maps.update({name: layer.attention(args[0])}))
        for name, layer in model.named_modules()
        if isinstance(layer, ULSAM)
    ]
    try:
        model(_model_inputs(model, images))
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def _model_inputs(model: nn.Module, images: Iterable[Image.Image]) -> torch.Tensor:
    cfg = resolve_model_data_config(model)
    channels = cfg["input_size"][0]
    if channels not in _MODES:
        raise InputError(f"photographs have three channels, or one in gray; this model takes {channels}")
    transform, mode = create_transform(**cfg), _MODES[channels]
    # Pillow copies what it converts, a photograph of this mode too
    return torch.stack([transform(image if image.mode == mode else image.convert(mode)) for image in images])


def draw_attention(
    model: nn.Module, images: Sequence[Image.Image], predictions: Sequence[Sequence[Prediction]], out: str | Path
) -> None:
    """Write one picture: a row a photograph, the crop that the model saw and then every attention map over it.

    Args:
        model: A pretrained timm model with ULSAM blocks.
        images: Photographs, RGB.
        predictions: Predictions of every photograph; the first is the title.
        out: Picture to write; its suffix names the format.

    Raises:
        InputError: If the model has no ULSAM block, or the picture cannot be written (see `check_picture`).
    """
    check_picture(out)
    from matplotlib.figure import Figure

    maps = attention_maps(model, images)
    if not maps:
        raise InputError("the model has no ULSAM block, so there is no attention to draw")

    panels = [(name, index) for name, m in maps.items() for index in range(m.shape[1])]
    columns = 1 + len(panels)
    figure = Figure(figsize=(1.8 * columns, 2.1 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), columns, squeeze=False)
    crop = _display_transform(model)
    for row, image in enumerate(images):
        photograph = crop(image).permute(1, 2, 0).clamp(0, 1).numpy()
        height, width = photograph.shape[:2]
        for ax in axes[row]:
            ax.imshow(photograph)
            ax.set_axis_off()
        axes[row][0].set_title(predictions[row][0].description.split(",")[0], fontsize=10)
        for ax, (name, index) in zip(axes[row][1:], panels, strict=True):
            weights = maps[name][row, index].float().cpu().numpy()
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            ax.imshow(weights, extent=extent, cmap="inferno", alpha=0.6, interpolation="bilinear", vmin=0)
            if row == 0:
                ax.set_title(f"{name} [{index}]", fontsize=9)
    write_figure(figure, Path(out))


def _display_transform(model: nn.Module) -> Any:
    """The crop that the model sees, in color and at a size fit for people."""
    cfg = resolve_model_data_config(model)
    _, height, width = cfg["input_size"]
    scale = max(1.0, _DISPLAY_PIXELS / max(height, width))
    cfg["input_size"] = (3, round(height * scale), round(width * scale))
    return create_transform(**{**cfg, "mean": (0.0,) * 3, "std": (1.0,) * 3})
