"""Predictions of a pretrained model on photographs, and pictures of where its ULSAM blocks looked."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn

from . import models  # noqa: F401  (registers them)
from .layers import ULSAM
from .zoo import model_names

_DISPLAY_PIXELS = 256


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
        ValueError: If the model is unknown (close names are given) or has no pretrained weights.
        WeightsError: If its weights are truncated or altered.
    """
    if ":" not in name:
        arch, _, tag = name.partition(".")
        if not timm.is_model(arch):
            close = difflib.get_close_matches(arch, timm.list_models(), n=3)
            raise ValueError(
                f"unknown model {name!r}"
                + (f"; did you mean {', '.join(close)}?" if close else "; see timm-ulsam list")
            )
        with_weights = timm.list_pretrained(arch)
        if tag and name not in with_weights:
            raise ValueError(f"{arch} has no weights {tag!r}; it has: {', '.join(with_weights) or 'none'}")
        if not with_weights:
            ours = [n for n in model_names() if timm.is_model_pretrained(n)]
            raise ValueError(f"{arch} has no pretrained weights; models of this zoo that have: {', '.join(ours)}")
    return timm.create_model(name, pretrained=True).eval()


def read_image(path: str | Path) -> Image.Image:
    """Read a photograph as RGB.

    Raises:
        ValueError: If the file is missing or not an image; names the file.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that Pillow can read") from error
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def demo_images() -> list[tuple[str, Image.Image]]:
    """The photographs of the demonstration, by file name, carried by scikit-image: a tabby cat, an espresso, a rocket.

    Raises:
        ValueError: If scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise ValueError("the demonstration needs scikit-image: pip install 'timm-ulsam[demo]'") from error
    photographs = [("chelsea.png", data.chelsea), ("coffee.png", data.coffee), ("rocket.jpg", data.rocket)]
    return [(name, Image.fromarray(load())) for name, load in photographs]


def class_names(model: nn.Module) -> list[tuple[str, str]]:
    """Label and English description of every class, as the weights' card gives them; else ImageNet's, else numbers."""
    cfg = model.pretrained_cfg
    labels = cfg.get("label_names")
    if labels is not None:
        descriptions = cfg.get("label_descriptions") or {}
        return [(label, descriptions.get(label, label)) for label in labels]
    subset = infer_imagenet_subset(model)
    if subset is not None:
        info = ImageNetInfo(subset)
        return [(info.index_to_label_name(i), info.index_to_description(i)) for i in range(model.num_classes)]
    return [(str(i), f"class {i}") for i in range(model.num_classes)]


@torch.inference_mode()
def predict(
    model: nn.Module, images: Sequence[Image.Image], top: int = 5
) -> tuple[list[list[Prediction]], dict[str, torch.Tensor]]:
    """Classify photographs with the preprocessing of the model's weights.

    Args:
        model: A pretrained timm model.
        images: Photographs, RGB.
        top: Number of classes to return, most probable first.

    Returns:
        The predictions of every photograph, and the attention maps (N, g, h, w) that every ULSAM layer inferred on the
        way, by module name.
    """
    transform = create_transform(**resolve_model_data_config(model))
    maps: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: maps.update({name: layer.attention(args[0])}))
        for name, layer in model.named_modules()
        if isinstance(layer, ULSAM)
    ]
    try:
        probabilities = model(torch.stack([transform(image) for image in images])).softmax(-1)
    finally:
        for hook in hooks:
            hook.remove()
    names = class_names(model)
    best = probabilities.topk(min(top, probabilities.shape[1]))
    predictions = [
        [Prediction(*names[index], probability) for probability, index in zip(*row, strict=True)]
        for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return predictions, maps


def draw_attention(
    model: nn.Module,
    images: Sequence[Image.Image],
    predictions: Sequence[Sequence[Prediction]],
    maps: dict[str, torch.Tensor],
    out: str | Path,
) -> None:
    """Write one picture: a row a photograph, the crop that the model saw and then every attention map over it.

    Args:
        model: The model that made the maps.
        images: Photographs, RGB.
        predictions: Predictions of every photograph; the first is the title.
        maps: Attention maps (N, g, h, w) by module name.
        out: Picture to write; its suffix names the format.

    Raises:
        ValueError: If there are no maps, matplotlib is not installed, or the picture cannot be written.
    """
    if not maps:
        raise ValueError("the model has no ULSAM block, so there is no attention to draw")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("drawing needs matplotlib: pip install 'timm-ulsam[demo]'") from error

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
    _write_figure(figure, Path(out))


def _display_transform(model: nn.Module) -> Any:
    """The crop that the model sees, at a size fit for people."""
    cfg = resolve_model_data_config(model)
    channels, height, width = cfg["input_size"]
    scale = max(1.0, _DISPLAY_PIXELS / max(height, width))
    cfg["input_size"] = (channels, round(height * scale), round(width * scale))
    return create_transform(**{**cfg, "mean": (0.0,) * 3, "std": (1.0,) * 3})


def _write_figure(figure: Any, out: Path) -> None:
    accepted = figure.canvas.get_supported_filetypes()
    suffix = out.suffix.lstrip(".").lower()
    if suffix not in accepted:
        raise ValueError(f"cannot draw into {out}: accepted suffixes are {', '.join(sorted(accepted))}")
    temporary = out.with_name(f".{out.name}.part")
    try:
        figure.savefig(temporary, format=suffix, dpi=100)
        temporary.replace(out)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
