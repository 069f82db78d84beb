"""What the zoo holds: every model with its cost, its weights and their measured accuracy."""

from dataclasses import dataclass

import timm
import torch
from timm.models import model_entrypoint
from torch.utils.flop_counter import FlopCounterMode

from . import models  # noqa: F401  (registers them)
from .pretrained import card_top1


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: Name of the architecture, as `timm.create_model` takes it.
        parameters: Number of parameters with 1000 classes.
        macs: Multiply-adds of convolutions and linear layers at 224x224 with 1000 classes.
        weights: Top-1 accuracy in percent of every set of weights, by tag; the default tag first.
    """

    name: str
    parameters: int
    macs: int
    weights: dict[str, float | None]


def model_names() -> list[str]:
    """Names of all models that this package registers with timm."""
    package = __name__.rpartition(".")[0]
    return [n for n in timm.list_models() if model_entrypoint(n).__module__.startswith(f"{package}.")]


def entries() -> list[Entry]:
    """Measure every model of the zoo."""
    return [measure(name) for name in model_names()]


def measure(name: str) -> Entry:
    """Measure a model of timm, ours or not, by name. Nothing is allocated: it is built on the meta device."""
    model = timm.create_model(name, num_classes=1000, device="meta").eval()
    with FlopCounterMode(display=False) as flops:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    tagged = timm.list_pretrained(name)
    default = timm.get_pretrained_cfg(name).tag
    tags = sorted((n.partition(".")[2] for n in tagged), key=lambda tag: (tag != default, tag))
    return Entry(
        name=name,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=flops.get_total_flops() // 2,
        weights={tag: card_top1(f"{name}.{tag}") for tag in tags},
    )


def table_rows(zoo: list[Entry]) -> list[tuple[str, str, str, str, str]]:
    """Printable rows, one a set of weights: name, parameters, MACs, weights, top-1. The first row is the head."""
    rows = [("model", "parameters", "MACs at 224", "weights", "top-1")]
    for entry in zoo:
        for tag, top1 in entry.weights.items() or [("", None)]:
            rows.append(
                (
                    entry.name,
                    f"{entry.parameters:,}",
                    f"{entry.macs / 1e6:.2f}M",
                    tag or "none yet",
                    "" if top1 is None else f"{top1:.2f} %",
                )
            )
    return rows


def markdown_table(zoo: list[Entry]) -> str:
    """The README's table of the zoo."""
    head, *rows = table_rows(zoo)
    lines = [" | ".join(head), "--- | ---: | ---: | --- | ---:"]
    lines += [" | ".join((f"`{name}`", *rest)) for name, *rest in rows]
    return "\n".join(f"| {line} |" for line in lines)
