"""What the zoo holds: every model with its cost, its weights and their measured accuracy."""

from dataclasses import dataclass

import timm
from timm.models import model_entrypoint

from .pretrained import card_top1, file_size
from .systems import system_of, trained_cost


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: Name of the architecture, as `timm.create_model` takes it.
        system: Key of its system.
        parameters: Number of parameters with 1000 classes.
        macs: Multiply-adds of one image with 1000 classes.
        image_size: Side of that image in pixels: 224, or the model's own if it takes no other.
        weights: Top-1 accuracy in percent of every set of weights, by tag; the default tag first.
        sizes: Bytes of their files, by tag; None for those that are not at hand.
    """

    name: str
    system: str
    parameters: int
    macs: int
    image_size: int
    weights: dict[str, float | None]
    sizes: dict[str, int | None]


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
        weights={tag: card_top1(f"{name}.{tag}") for tag in tags},
        sizes={tag: file_size(f"{name}.{tag}") for tag in tags},
    )


def table_rows(zoo: list[Entry]) -> list[tuple[str, ...]]:
    """Printable rows, one a set of weights; the first row is the head."""
    rows = [("model", "system", "parameters", "MACs", "px", "weights", "MB", "top-1")]
    for entry in zoo:
        for tag, top1 in entry.weights.items() or [("", None)]:
            size = entry.sizes.get(tag)
            rows.append(
                (
                    entry.name,
                    entry.system,
                    f"{entry.parameters:,}",
                    f"{entry.macs / 1e6:,.2f}M",
                    str(entry.image_size),
                    tag or "none yet",
                    "" if size is None else f"{size / 1e6:.1f}",
                    "" if top1 is None else f"{top1:.2f} %",
                )
            )
    return rows


def markdown_table(zoo: list[Entry]) -> str:
    """The README's table of the zoo."""
    head, *rows = table_rows(zoo)
    lines = [" | ".join(head), "--- | --- | ---: | ---: | ---: | --- | ---: | ---:"]
    lines += [" | ".join((f"`{name}`", *rest)) for name, *rest in rows]
    return "\n".join(f"| {line} |" for line in lines)
