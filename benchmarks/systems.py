"""Rows of the other systems: their models beside the same network without the system.

A folded model must be as fast as that network. DO-Conv's then is that network, but for names; DBB's has no norms left.
"""

import copy
from functools import partial
from typing import Literal

import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from timm_ulsam.systems import image_size, system_of

from .model import TrainingStep, agree, forward
from .rows import Case, Comparison, Options, Row
from .timing import Run

WITHOUT, WITH, FOLDED = "without", "with", "folded"
_CLASSES = 1000
_QUICK_BATCH = 2

_MODELS = (
    "resnet50_sa",
    "resnet18_doconv",
    "mobilenetv2_doconv",
    "resnet50_psconv",
    "resnet18_dbb",
    "mobilenetv1_dbb",
    "resnet50_repmlp_light",
    "repmlpnet_t224",
    "shufflenetv2_100_weightnet",
)
# How many times the time of the network without it a folded model may take.
_FOLDING = {"doconv": 1.02, "dbb": 1.02, "repmlp": 1.02, "psconv": None}

How = Literal["infer", "train"]
_WORDS = {"infer": "inference", "train": "training step"}


def models(name: str) -> dict[str, nn.Module]:
    """A model with and without its system (where there is such a network), random weights, in evaluation mode."""
    torch.manual_seed(0)
    found = {WITH: timm.create_model(name, num_classes=_CLASSES)}
    plain = system_of(name).models[name]
    if isinstance(plain, str):
        found[WITHOUT] = timm.create_model(plain, num_classes=_CLASSES)
    elif plain is not None:
        found[WITHOUT] = timm.create_model(name, num_classes=_CLASSES, **plain)
    return {which: model.eval() for which, model in found.items()}


def _settle(model: nn.Module, x: torch.Tensor) -> None:
    """Give its norms statistics of their own, so that a fold that leaves them out is noticed."""
    model.train()
    with torch.no_grad():
        model(x)
    model.eval()


def build(options: Options, *, name: str, how: How, batch: int, channels_last: bool) -> Case:
    """Build the contenders of one row, and check the folded one; for the arguments see `rows`."""
    note = ""
    if options.quick and batch > _QUICK_BATCH:
        note, batch = f"batch {_QUICK_BATCH} in the place of {batch}", _QUICK_BATCH
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    size = image_size(name)
    x = torch.randn(batch, 3, size, size, generator=generator).contiguous(memory_format=memory_format)
    nets = {which: model.to(memory_format=memory_format) for which, model in models(name).items()}
    if how == "train":
        target = torch.randint(_CLASSES, (batch,), generator=generator)
        return Case({which: TrainingStep(model, x, target) for which, model in nets.items()}, note=note)
    _settle(nets[WITH], x[:2] if batch > 1 else torch.cat([x, x.flip(3)]))
    if system_of(name).key in _FOLDING:
        nets[FOLDED] = reparameterize_model(copy.deepcopy(nets[WITH])).to(memory_format=memory_format)
        with torch.inference_mode():
            agree(f"{name} folded", nets[FOLDED](x), nets[WITH](x), "cpu")
    contenders: dict[str, Run] = {which: partial(forward, model, x) for which, model in nets.items()}
    return Case(contenders, torch.inference_mode, note=note)


def _row(name: str, how: How, batch: int, channels_last: bool, seconds: float) -> Row:
    system = system_of(name)
    has_plain = system.models[name] is not None
    comparisons = [Comparison(WITH, WITHOUT, "times")] if has_plain else []
    if how == "infer" and system.key in _FOLDING:
        if has_plain:
            comparisons.append(Comparison(FOLDED, WITHOUT, "times", _FOLDING[system.key]))
        comparisons.append(Comparison(FOLDED, WITH, "times"))
    return Row(
        id="/".join(["cpu", "system", name, how, f"batch{batch}"] + ["channels_last"] * channels_last),
        what=f"`{name}`, {_WORDS[how]}, batch {batch}" + ", channels_last" * channels_last,
        build=partial(build, name=name, how=how, batch=batch, channels_last=channels_last),
        comparisons=tuple(comparisons),
        seconds=seconds,
    )


def rows() -> list[Row]:
    """Rows of the other systems."""
    made = []
    for name in _MODELS:
        made.append(_row(name, "infer", 1, False, seconds=6))
        made.append(_row(name, "infer", 8, True, seconds=12))
        made.append(_row(name, "train", 8, True, seconds=15))
    return [row for row in made if row.comparisons]
