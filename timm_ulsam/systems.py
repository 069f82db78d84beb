"""The systems of the literature that the zoo holds: what each changes in a network, and what that costs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from . import models  # noqa: F401  (registers them)
from .layers import DOConv2d, WeightNet
from .tables import markdown

# How to build a network without its system: the name of timm's model, or arguments that leave the system out of ours.
Plain = str | Mapping[str, Any]


@dataclass(frozen=True)
class System:
    """A published system.

    Attributes:
        key: Its part in the names of its models.
        name: As the literature calls it.
        layers: Its classes in `timm_ulsam.layers`.
        models: Its models in the zoo, each with the same network without the system; None where the network is the
            system's own.
        changes: What it changes in a network.
        use: When to reach for it.
        papers: arXiv ids.
        repository: Of the published code, on GitHub.
        licence: Of the published code and weights.
    """

    key: str
    name: str
    layers: tuple[str, ...]
    models: Mapping[str, Plain | None]
    changes: str
    use: str
    papers: tuple[str, ...]
    repository: str
    licence: str


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: Number of parameters that train.
        macs: Multiply-adds of one image: convolutions and matrix products.
        image_size: Side of that image in pixels.
    """

    parameters: int
    macs: int
    image_size: int


_NO_ULSAM = {"replace_blocks": (), "insert_after": ()}
_NO_WEIGHTNET = {"weightnet": False}

SYSTEMS = (
    System(
        key="ulsam",
        name="ULSAM",
        layers=("ULSAM",),
        models={
            "mobilenetv1_ulsam": "mobilenetv1_100",
            "mobilenetv1_ulsam_050": _NO_ULSAM,
            "mobilenetv1_ulsam_075": _NO_ULSAM,
            "mobilenetv2_ulsam": "mobilenetv2_100",
            "mobilenetv2_ulsam_050": "mobilenetv2_050",
            "mobilenetv2_ulsam_l": "mobilenetv2_100",
            "mobilenetv2_ulsam_s": "mobilenetv2_100",
        },
        changes="one spatial attention map for each group of channels, in the place of heavy blocks, or after one",
        use="a MobileNet is to cost less",
        papers=("2006.15102",),
        repository="Nandan91/ULSAM",
        licence="none stated",
    ),
    System(
        key="sa",
        name="Shuffle Attention (SA-Net)",
        layers=("ShuffleAttention",),
        models={
            "resnet50_sa": "resnet50",
            "resnet101_sa": "resnet101",
            "resnet152_sa": "resnet152",
        },
        changes=(
            "each block's output is gated, half of every group by channel and half by position, and the halves "
            "are shuffled; next to no parameters"
        ),
        use="accuracy at no cost in parameters: 77.9 % on ImageNet with ResNet-50 (authors' repository)",
        papers=("2102.00240",),
        repository="wofmanaf/SA-Net",
        licence="none stated",
    ),
    System(
        key="smt",
        name="Scale-Aware Modulation Transformer (SMT)",
        layers=("ScaleAwareModulation",),
        models={
            "smt_tiny": None,
            "smt_small": None,
            "smt_base": None,
            "smt_large": None,
        },
        changes=(
            "a backbone: depthwise convolutions of growing kernel modulate features in early stages, "
            "self-attention takes over in late ones"
        ),
        use=("a hierarchical backbone for accuracy: 82.2 % on ImageNet (authors' repository) with 11.5M parameters"),
        papers=("2307.08579",),
        repository="AFeng-x/SMT",
        licence="MIT",
    ),
    System(
        key="doconv",
        name="Depthwise Over-parameterized Convolution (DO-Conv)",
        layers=("DOConv2d",),
        models={
            "resnet18_doconv": "resnet18",
            "resnet50_doconv": "resnet50",
            "resnet101_doconv": "resnet101",
            "resnext50_32x4d_doconv": "resnext50_32x4d",
            "mobilenetv1_doconv": "mobilenetv1_100",
            "mobilenetv2_doconv": "mobilenetv2_100",
        },
        changes="every kernel is a product of two while it trains, and one again when folded",
        use=(
            "0.7 to 0.8 points on ImageNet for ResNet-18, 0.3 to 0.4 for ResNet-50, -101 and ResNeXt-50, 0.0 to 0.2 "
            "for MobileNets (authors' repository), for longer training steps, nothing at inference"
        ),
        papers=("2006.12030",),
        repository="yangyanli/DO-Conv",
        licence="MIT",
    ),
    System(
        key="psconv",
        name="Poly-Scale Convolution (PSConv)",
        layers=("PSConv2d",),
        models={
            "resnet50_psconv": "resnet50",
            "resnet101_psconv": "resnet101",
            "resnext50_32x4d_psconv": "resnext50_32x4d",
            "resnext101_32x4d_psconv": "resnext101_32x4d",
        },
        changes="the 3x3 convolutions of the bottlenecks have dilations 1, 2, 1 and 4 over parts of their channels",
        use="objects of many scales: the authors' checkpoints are detection backbones",
        papers=("2007.06191",),
        repository="d-li14/PSConv",
        licence="MIT",
    ),
    System(
        key="dbb",
        name="Diverse Branch Block (DBB)",
        layers=("DiverseBranchBlock",),
        models={
            "resnet18_dbb": "resnet18",
            "resnet50_dbb": "resnet50",
            "mobilenetv1_dbb": "mobilenetv1_100",
        },
        changes="every 3x3 convolution trains as four branches, a depthwise one as three, and is one again when folded",
        use=(
            "0.6 to 1.5 points on ImageNet, nothing at inference: ResNet-50 76.14 to 76.71 %, MobileNet 71.89 to 72.88 "
            "%, ResNet-18 69.54 to 70.99 % (authors' repository)"
        ),
        papers=("2103.13425",),
        repository="DingXiaoH/DiverseBranchBlock",
        licence="Apache-2.0",
    ),
    System(
        key="repmlp",
        name="RepMLP",
        layers=("RepMLPBlock", "RepMLP"),
        models={
            "repmlpnet_t224": None,
            "repmlpnet_t256": None,
            "repmlpnet_b224": None,
            "repmlpnet_b256": None,
            "repmlpnet_d256": None,
            "repmlpnet_l256": None,
            "resnet50_repmlp_light": "resnet50",
            "resnet50_repmlp": "resnet50",
        },
        changes="fully connected layers over positions, with convolutions in parallel that fold into them",
        use="images of one size: 76.6 % (T224) to 81.7 % (L256) on ImageNet (authors' repository)",
        papers=("2112.11081", "2105.01883"),
        repository="DingXiaoH/RepMLP",
        licence="MIT",
    ),
    System(
        key="weightnet",
        name="WeightNet",
        layers=("WeightNet", "WeightNetConv2d"),
        models={
            "shufflenetv2_050_weightnet": _NO_WEIGHTNET,
            "shufflenetv2_100_weightnet": _NO_WEIGHTNET,
            "shufflenetv2_150_weightnet": _NO_WEIGHTNET,
            "shufflenetv2_200_weightnet": _NO_WEIGHTNET,
        },
        changes="the convolutions' kernels are made for every sample, by two small layers, from its pooled features",
        use=(
            "compact networks that may keep more weights for the same multiply-adds: ShuffleNetV2 0.5x from 60.3 "
            "to 63.3 % on ImageNet (authors' repository)"
        ),
        papers=("2007.11823",),
        repository="megvii-model/WeightNet",
        licence="MIT and Apache-2.0 (headers of one file)",
    ),
)


def system_of(model: str) -> System:
    """The system that a model of the zoo belongs to.

    Raises:
        ValueError: If the name is none of this zoo.
    """
    for system in SYSTEMS:
        if model in system.models:
            return system
    raise ValueError(f"{model!r} is no model of this zoo; accepted: {sorted(m for s in SYSTEMS for m in s.models)}")


def image_size(model: str) -> int:
    """Side of the images that a model is measured with: 224 pixels, or its own where it takes no other."""
    cfg = timm.get_pretrained_cfg(model)
    return cfg.input_size[-1] if cfg.fixed_input_size else 224


def cost(model: nn.Module, image_size: int, in_chans: int = 3) -> Cost:
    """Measure a network, which must be on the meta device: nothing is computed. It is put into evaluation mode."""
    with FlopCounterMode(display=False) as flops:
        model.eval()(torch.empty(1, in_chans, image_size, image_size, device="meta"))
    macs = flops.get_total_flops() // 2 + sum(map(_uncounted, model.modules()))
    return Cost(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        macs=macs,
        image_size=image_size,
    )


def _uncounted(module: nn.Module) -> int:
    """Multiply-adds of one image that make a kernel, where that is neither a convolution nor a matrix product."""
    if isinstance(module, WeightNet) and module.inputs_per_group == 1:
        return module.wn_fc2.weight.numel()  # one for each number of the kernel
    if isinstance(module, DOConv2d) and module.depthwise and module.D is not None:
        return module.D.numel()
    return 0


def trained_cost(model: str, **kwargs: Any) -> Cost:
    """Cost of a model of timm, ours or not, as it trains; with 1000 classes."""
    return cost(timm.create_model(model, num_classes=1000, device="meta", **kwargs), image_size(model))


def folded_cost(model: str) -> Cost:
    """Cost of a model of timm after `reparameterize_model`; with 1000 classes."""
    unfolded = timm.create_model(model, num_classes=1000, device="meta")
    return cost(reparameterize_model(unfolded.eval(), inplace=True), image_size(model))


def plain_cost(model: str) -> Cost | None:
    """Cost of the same network without the system; None where the network is the system's own."""
    plain = system_of(model).models[model]
    if plain is None:
        return None
    return trained_cost(plain) if isinstance(plain, str) else trained_cost(model, **plain)


def systems_table() -> str:
    """Markdown table of the systems, one a row."""
    head = ("system", "layer", "what it changes", "when to reach for it", "paper", "published code, its licence")
    rows = [
        (
            system.name,
            ", ".join(f"`{layer}`" for layer in system.layers),
            system.changes,
            system.use,
            ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in system.papers),
            f"[{system.repository}](https://github.com/{system.repository}), {system.licence}",
        )
        for system in SYSTEMS
    ]
    return markdown(head, rows)


def costs_table() -> str:
    """Markdown table of what every model costs, folded too, beside the same network without the system.

    The last column is how many more multiply-adds the folded model takes. Every model is built and folded.
    """
    head = ("model", "px", "parameters", "MACs", "folded: parameters", "MACs", "without: parameters", "MACs", "more")
    rows = []
    for system in SYSTEMS:
        for model in system.models:
            trained, folded, plain = trained_cost(model), folded_cost(model), plain_cost(model)
            more = 100 * (folded.macs / plain.macs - 1) if plain else None
            rows.append(
                (
                    f"`{model}`",
                    str(trained.image_size),
                    *_figures(trained),
                    *(_figures(folded) if folded != trained else ("", "")),
                    *(_figures(plain) if plain else ("", "")),
                    "" if more is None else f"{more:+.1f} %",
                )
            )
    return markdown(head, rows, numbers=head[1:])


def _figures(found: Cost) -> tuple[str, str]:
    return f"{found.parameters:,}", f"{found.macs / 1e6:,.2f}M"
