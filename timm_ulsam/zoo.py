"""What the zoo holds: every model with its cost, its weights and their measured accuracy."""

from dataclasses import dataclass

import timm
from timm.models import model_entrypoint

from .pretrained import card_metrics, file_size, weights_dir
from .records import recipe_file
from .systems import system_of, trained_cost
from .tables import markdown, text


@dataclass(frozen=True)
class Weights:
    """A set of weights of a model.

    Attributes:
        image_size: Side in pixels of the images that they are for.
        top1: Top-1 accuracy in percent as their model card states it, None without a card.
        top5: Top-5 accuracy in percent, the same.
        bytes: Size of their file, None if it is not at hand.
        recipe: Options of train.py that made them, a path in the checkout; None outside of it.
    """

    image_size: int
    top1: float | None
    top5: float | None
    bytes: int | None
    recipe: str | None


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: Name of the architecture, as `timm.create_model` takes it.
        system: Key of its system.
        parameters: Number of parameters with 1000 classes.
        macs: Multiply-adds of one image with 1000 classes.
        image_size: Side of that image in pixels: 224, or the model's own if it takes no other.
        weights: Its sets of weights, by tag; the default tag first.
    """

    name: str
    system: str
    parameters: int
    macs: int
    image_size: int
    weights: dict[str, Weights]


def model_names() -> list[str]:
    """Names of all models that this package registers with timm."""
    package = __name__.rpartition(".")[0]
    return [n for n in timm.list_models() if model_entrypoint(n).__module__.startswith(f"{package}.")]


def entries(system: str | None = None) -> list[Entry]:
    """Measure every model of the zoo, or of one system. Nothing is allocated: they are built on the meta device."""
    return [_entry(name) for name in model_names() if system in (None, system_of(name).key)]


def _entry(name: str) -> Entry:
    cost = trained_cost(name)
    tagged = timm.list_pretrained(name)
    default = timm.get_pretrained_cfg(name).tag
    tags = sorted((n.partition(".")[2] for n in tagged), key=lambda tag: (tag != default, tag))
    return Entry(
        name=name,
        system=system_of(name).key,
        parameters=cost.parameters,
        macs=cost.macs,
        image_size=cost.image_size,
        weights={tag: _weights(f"{name}.{tag}") for tag in tags},
    )


def _weights(name: str) -> Weights:
    metrics, recipe = card_metrics(name), recipe_file(name)
    return Weights(
        image_size=timm.get_pretrained_cfg(name).input_size[-1],
        top1=metrics.get("top-1"),
        top5=metrics.get("top-5"),
        bytes=file_size(name),
        recipe=recipe.relative_to(weights_dir().parent).as_posix() if recipe.is_file() else None,
    )


_OF_MODELS = ("model", "system", "parameters", "MACs", "MACs at px")
_OF_WEIGHTS = ("weights", "weights px", "top-1", "top-5", "MB", "recipe")
_HEAD = (*_OF_MODELS, *_OF_WEIGHTS)
_NUMBERS = {*_HEAD} - {"model", "system", "weights", "recipe"}


def _rows(zoo: list[Entry]) -> list[tuple[str, ...]]:
    """Printable rows under `_HEAD`, one a set of weights."""
    found = []
    for entry in zoo:
        model = (entry.name, entry.system, f"{entry.parameters:,}", f"{entry.macs / 1e6:,.2f}M", str(entry.image_size))
        for tag, weights in entry.weights.items():
            accuracy = ("" if value is None else f"{value:.2f} %" for value in (weights.top1, weights.top5))
            size = "" if weights.bytes is None else f"{weights.bytes / 1e6:.1f}"
            found.append((*model, tag, str(weights.image_size), *accuracy, size, weights.recipe or ""))
        if not entry.weights:
            found.append((*model, "none yet", *[""] * (len(_OF_WEIGHTS) - 1)))
    return found


def markdown_table(zoo: list[Entry]) -> str:
    """The README's table of the zoo."""
    lines = [(f"`{name}`", *rest, f"[yaml]({recipe})" if recipe else "") for name, *rest, recipe in _rows(zoo)]
    return markdown(_HEAD, lines, numbers=_NUMBERS)


def text_table(zoo: list[Entry]) -> str:
    """The same for a terminal, without the recipes."""
    return text(_HEAD[:-1], [row[:-1] for row in _rows(zoo)], numbers=_NUMBERS)
