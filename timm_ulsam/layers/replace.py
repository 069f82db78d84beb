"""Put one kind of convolution in the place of another, in any model."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn


class ReplacesConv(Protocol):
    """A class of layers that can take the place of a convolution."""

    def from_conv(self, conv: nn.Conv2d, **kwargs: Any) -> nn.Module:
        """A new layer in the place of `conv`: its geometry, device, dtype, mode, and its weights where that is allowed.

        Raises:
            ValueError: If it cannot take this place; names the setting and what is accepted.
        """


def replace_convs(
    model: nn.Module,
    layer: ReplacesConv,
    filter: Callable[[str, nn.Conv2d], bool] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Replace convolutions of a model, in place.

    Pretrained weights stay: what each system makes of them its `from_conv` says. Subclasses of `nn.Conv2d` (timm's
    `Conv2dSame`, `ScaledStdConv2d`, parametrized convolutions) compute something else and are left alone.

        model = timm.create_model("resnet50", pretrained=True)
        replace_convs(model, DOConv2d, lambda name, conv: conv.kernel_size == (3, 3))

    Args:
        model: Any model; a convolution by itself is replaced too.
        layer: Class of the new layers, such as `DOConv2d`, `PSConv2d` or `DiverseBranchBlock`.
        filter: Called with the name and the convolution; says which are replaced, all of which must fit. None replaces
            every one that fits.
        **kwargs: Passed to `layer.from_conv`.

    Returns:
        The model, or the new layer if the model is a convolution.

    Raises:
        ValueError: If a chosen convolution cannot be replaced, or none was. The model is then as it was.
    """
    new: dict[int, nn.Module] = {}  # by identity: one convolution in two places stays one
    places = []
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is not nn.Conv2d or (filter is not None and not filter(name, module)):
            continue
        if id(module) not in new:
            try:
                if module._forward_hooks or module._forward_pre_hooks:
                    raise ValueError("it has hooks, which would be lost; accepted: a convolution without")
                new[id(module)] = layer.from_conv(module, **kwargs)
            except ValueError as error:
                if filter is None:
                    continue
                raise ValueError(f"cannot replace {name or 'the model'}: {error}") from error
        places.append((name, new[id(module)]))
    if not places:
        raise ValueError(f"no convolution to replace by {layer.__name__}: accepted is an nn.Conv2d that fits it")
    for name, replacement in places:
        if not name:
            return replacement
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)
    return model
