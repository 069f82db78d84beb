"""Activations by class or by timm's name of them."""

from collections.abc import Callable

from torch import nn

ActLayer = str | Callable[[], nn.Module]


def create_act(act_layer: ActLayer) -> nn.Module:
    """A new activation, of a class or of the name that timm has for one, as some of its models pass it.

    Raises:
        ValueError: If timm knows no such name.
    """
    if not isinstance(act_layer, str):
        return act_layer()
    from timm.layers import get_act_layer  # the layers need timm for nothing else

    try:
        return get_act_layer(act_layer)()
    except (KeyError, TypeError):
        accepted = "a class, or a name of timm's such as 'relu', 'silu', 'gelu'"
        raise ValueError(f"act_layer={act_layer!r} is no activation that timm knows; accepted: {accepted}") from None
