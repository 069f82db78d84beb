"""A MobileNet with ULSAM that starts from the weights of the plain MobileNet.

What both have is kept. Every ULSAM starts near the identity: its maps are uniform, so it answers x * (1 + 1 / (h * w))
on a map of h by w. Where nothing was taken out for it, and only one convolution reads what it answers, that convolution
takes the constant back, at the image size of the pretrained cfg; at another size the plain network's features come back
up to the change of the constant (training does not see it: a batch norm follows the convolution).
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from torch import nn

from ..layers.ulsam import ULSAM
from ..pretrained import WEIGHTS_FILE
from ._build import check_fits

INIT_SUFFIX = "_init"
_FIRST_CONV = {DepthwiseSeparableConv: "conv_dw", InvertedResidual: "conv_pw"}
_HEAD = ("conv_head", "bn2", "classifier")


def init_cfg(source: str, without: str = "") -> dict[str, Any]:
    """The part of a pretrained cfg that says which plain network's weights a model starts from, and what that makes it.

    Args:
        source: timm's name of the weights, `<arch>.<tag>`, which is that of their Hub repository too.
        without: The plain network's blocks that are not there, in words; none if nothing was taken out.
    """
    what = f"An initialization for fine-tuning, not an ImageNet classifier of its own: timm's {source}"
    if without:
        what += f" without {without}, which ULSAM replaces. Its features are not those of the plain network"
    else:
        what += ", all of it, so at the native image size its logits are those of the plain network"
    return {
        "hf_hub_id": f"timm/{source}",
        # named, so that timm does not go on to look for another where there is no network
        "hf_hub_filename": WEIGHTS_FILE,
        "origin_url": f"https://huggingface.co/timm/{source}",
        "description": f"{what}. Every ULSAM starts near the identity, untrained.",
    }


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Where the model's tag ends in `_init`, take the plain network's state dict to one of the model.

    A state dict that holds ULSAM already, as a fine-tuned model saves it, passes unchanged; so does any for other tags.

    Args:
        state_dict: Of the plain network, in timm's names.
        model: A MobileNet with ULSAM in any places, built, its ULSAM layers as they are initialized.

    Raises:
        RuntimeError: If the state dict does not fit; names the keys and shapes.
    """
    tag = model.pretrained_cfg.get("tag") or ""
    ulsams = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ULSAM))
    if not tag.endswith(INIT_SUFFIX) or any(_is_of_ulsam(key, ulsams) for key in state_dict):
        return state_dict
    dropped = ulsams if hasattr(model, "classifier") else (*ulsams, *_HEAD)
    converted = {key: value for key, value in state_dict.items() if not key.startswith(dropped)}
    converted.update({key: value for key, value in model.state_dict().items() if key.startswith(ulsams)})
    check_fits(converted, model, ["classifier."], reshaped=["conv_stem."])
    for prefix in ulsams:
        # Scale 0 makes the maps uniform. Shift 1 lets gradients through: at 0 the ReLU behind would stop them for ever.
        weight, bias = f"{prefix}bn_pw.weight", f"{prefix}bn_pw.bias"
        converted.update({weight: torch.zeros_like(converted[weight]), bias: torch.ones_like(converted[bias])})
    for key, constant in _constants(model):
        if key in converted:  # else pretrained_strict=False
            converted[key] = (converted[key].double() / constant).to(converted[key].dtype)
    return converted


def _is_of_ulsam(key: str, prefixes: tuple[str, ...]) -> bool:
    # conv_dw and conv_pw are names of a plain block's convolutions too
    return key.startswith(prefixes) and (".bn_pw." in key or ".subspaces." in key)


def _constants(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Weights that read nothing but what an inserted, uniform ULSAM answers, and the constant in that."""
    size = tuple(model.pretrained_cfg["input_size"][-2:])
    size = _reduced(size, model.conv_stem)
    blocks = [
        (f"blocks.{stage}.{name}", block)
        for stage, blocks in enumerate(model.blocks)
        for name, block in blocks.named_children()
    ]
    readers = [_only_reader(f"{name}.", block) for name, block in blocks[1:]]
    readers.append("conv_head" if isinstance(getattr(model, "conv_head", None), nn.Conv2d) else None)
    for (name, block), reader in zip(blocks, readers, strict=True):
        size = _reduced(size, block.conv_dw)
        # one in the place of a block changes the features anyhow, and what is shared with the plain network stays whole
        if name.endswith("_ulsam") and reader:
            yield f"{reader}.weight", 1 + 1 / (size[0] * size[1])


def _only_reader(prefix: str, block: nn.Module) -> str | None:
    """The convolution that alone reads a block's input; None beside a shortcut and in a ULSAM, which reads it twice."""
    if type(block) not in _FIRST_CONV or block.has_skip:
        return None
    return prefix + _FIRST_CONV[type(block)]


def _reduced(size: tuple[int, ...], conv: nn.Conv2d) -> tuple[int, ...]:
    return tuple(-(-side // stride) for side, stride in zip(size, conv.stride, strict=True))
