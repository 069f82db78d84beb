"""Put one kind of convolution in the place of another, in any model."""

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn


class ReplacesConv(Protocol):
    """A class of layers that can take the place of a convolution."""

    def from_conv(self, conv: nn.Conv2d, **kwargs: Any) -> nn.Module:
        """A new layer in the place of `conv`: its geometry, device, dtype, mode, and its weights where that is allowed.

        What of `conv` is frozen, weight or bias, is so in the new layer.

        Raises:
            ValueError: If it cannot take this place; names the setting and what is accepted.
        """


def trained_as(layer: nn.Module, conv: nn.Conv2d, *biases: nn.Parameter | None) -> nn.Module:
    """`layer`, put into the mode of `conv`: what carries its bias is trained if that is, all else if its weight is."""
    layer.requires_grad_(conv.weight.requires_grad)
    if conv.bias is not None:
        for bias in biases:
            bias.requires_grad_(conv.bias.requires_grad)
    return layer.train(conv.training)


def replace_convs(
    model: nn.Module,
    layer: ReplacesConv,
    filter: Callable[[str, nn.Conv2d], bool] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Replace convolutions of a model, in place.

    Pretrained weights stay: what each system makes of them its `from_conv` says. Subclasses of `nn.Conv2d` (timm's
    `Conv2dSame`, `ScaledStdConv2d`, parametrized convolutions) compute something else and are left alone, and so are
    the convolutions that a layer of the new class is made of.

        model = timm.create_model("resnet50", pretrained=True)
        replace_convs(model, DOConv2d, lambda name, conv: conv.kernel_size == (3, 3))

    Args:
        model: Any model; a convolution by itself is replaced too.
        layer: Class of the new layers, such as `DOConv2d`, `PSConv2d`, `DiverseBranchBlock` or `WeightNetConv2d`.
        filter: Called with the name and the convolution; says which are replaced, all of which must fit. None replaces
            every one that fits.
        **kwargs: Passed to `layer.from_conv`.

    Returns:
        The model, or the new layer if the model is a convolution.

    Raises:
        ValueError: If `layer` has no `from_conv`, a chosen convolution cannot be replaced, or none was. The model is
            then as it was.
    """
    if not isinstance(layer, type) or not hasattr(layer, "from_conv"):
        accepted = "DOConv2d, PSConv2d, DiverseBranchBlock, WeightNetConv2d, or a class with a from_conv as theirs"
        raise ValueError(f"layer={layer!r} cannot take the place of a convolution; accepted: {accepted}")
    places: dict[nn.Conv2d, list[str]] = {}  # by identity: one convolution in two places stays one
    users: Counter[int] = Counter()
    every = list(model.named_modules(remove_duplicate=False))
    done = tuple(f"{name}." if name else "" for name, module in every if isinstance(module, layer))
    for name, module in every:
        if type(module) is nn.Conv2d and not name.startswith(done):
            places.setdefault(module, []).append(name)
    for module in model.modules():
        users.update(id(p) for p in module._parameters.values() if p is not None)

    new: dict[str, nn.Module] = {}
    misfit = None
    for conv, names in places.items():
        if filter is not None and not any(filter(name, conv) for name in names):
            continue
        try:
            _check_replaceable(conv, users)
            replacement = layer.from_conv(conv, **kwargs)
        except ValueError as error:
            if filter is not None:
                raise ValueError(f"cannot replace {names[0] or 'the model'}: {error}") from error
            misfit = misfit or (names[0] or "the model", error)
        else:
            new.update(dict.fromkeys(names, replacement))
    if not new:
        why = f"; {misfit[0]} does not: {misfit[1]}" if misfit else ""
        raise ValueError(f"no convolution to replace by {layer.__name__}: accepted is an nn.Conv2d that fits it{why}")
    if "" in new:
        return new[""]
    for name, replacement in new.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)
    return model


def _check_replaceable(conv: nn.Conv2d, users: Counter[int]) -> None:
    hooks = conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks
    if any(hooks):
        raise ValueError("it has hooks, which would be lost; accepted: a convolution without")
    if any(users[id(p)] > 1 for p in conv.parameters()):
        raise ValueError("it shares parameters with another module; accepted: a convolution with its own")
