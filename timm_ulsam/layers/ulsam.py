"""Ultra-Lightweight Subspace Attention Module (ULSAM).

Paper: `ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks`
- https://arxiv.org/abs/2006.15102 (WACV 2020)
"""

import re
from collections.abc import Callable
from numbers import Integral

import torch
from torch import nn

# Published state dicts hold one small module per subspace. Their names, and ours.
_PUBLISHED_KEY = re.compile(r"subspaces\.(\d+)\.(conv_dws|bn_dws|conv_point|bn_point)\.(\w+)")
_PUBLISHED_MODULES = {"conv_dws": "conv_dw", "bn_dws": "bn_dw", "conv_point": "conv_pw", "bn_point": "bn_pw"}


@torch.fx.wrap
def _check_input(x: torch.Tensor, channels: int) -> None:
    if torch.jit.is_tracing():
        return  # shapes are traced values there, a comparison would only warn
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"input x of shape {list(x.shape)}: accepted is (N, {channels}, H, W)")


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def attend(x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """`x * A + x` with one map A for each of g consecutive groups of channels.

    Shape: (N, C, H, W) and (N, g, H, W) to (N, C, H, W), in the dtype and memory format of `x`.
    """
    splits = maps.shape[1]
    subspaces = x.unflatten(1, (splits, x.shape[1] // splits))
    # in one step: in half precision 1 + A, rounded by itself, would lose the attention
    return torch.addcmul(subspaces, subspaces, maps.to(x.dtype).unsqueeze(2)).flatten(1, 2)


class ULSAM(nn.Module):
    """One spatial attention map for each group of channels, at almost no cost.

    Channels are split into `num_splits` equal, consecutive groups (subspaces). In each group a 1x1 depthwise
    convolution, batch norm and activation, a 3x3 max pool, a 1x1 convolution to a single channel, batch norm and
    activation, and a softmax over all H * W positions infer an attention map A; the group leaves as x * A + x.
    All groups are computed together: 1x1 convolutions grouped by subspace and one batch norm over all channels are
    the same arithmetic as one small network per subspace.

    The authors run their batch norms with momentum 0.9 (running statistics follow the last batch almost alone). Here
    they keep PyTorch's 0.1, as every other batch norm of a timm backbone does: evaluation then does not hang on which
    batch came last. For the published behaviour pass `norm_layer=partial(nn.BatchNorm2d, momentum=0.9)`.

    A state dict saved by the published code (`subspaces.<i>.conv_dws.weight`, ...) loads as it is, strictly.

    Shape: (N, channels, H, W) to the same shape, dtype and memory format; any H and W from 1.

    Args:
        channels: Number of channels of the input.
        num_splits: Number of subspaces g, a divisor of `channels`.
        act_layer: Activation after each batch norm.
        norm_layer: Normalization, called with a number of channels.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If `num_splits` is less than 1 or does not divide `channels`; in `forward`, if the input is not of
            shape (N, channels, H, W).
    """

    def __init__(
        self,
        channels: int,
        num_splits: int = 4,
        *,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if not _is_positive_integer(channels):
            raise ValueError(f"channels={channels!r} is not a positive integer")
        if not _is_positive_integer(num_splits) or channels % num_splits != 0:
            divisors = [d for d in range(1, channels + 1) if channels % d == 0]
            raise ValueError(f"num_splits={num_splits!r} does not divide channels={channels}; accepted: {divisors}")
        self.channels = channels
        self.num_splits = num_splits
        self.conv_dw = nn.Conv2d(channels, channels, 1, groups=channels, **dd)
        self.bn_dw = norm_layer(channels, **dd)
        self.act_dw = act_layer()
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.conv_pw = nn.Conv2d(channels, num_splits, 1, groups=num_splits, **dd)
        self.bn_pw = norm_layer(num_splits, **dd)
        self.act_pw = act_layer()

    def extra_repr(self) -> str:
        return f"{self.channels}, num_splits={self.num_splits}"

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Attention maps of the subspaces.

        Shape: (N, channels, H, W) to (N, num_splits, H, W); every map is positive and sums to 1.
        """
        _check_input(x, self.channels)
        y = self.pool(self.act_dw(self.bn_dw(self.conv_dw(x))))
        y = self.act_pw(self.bn_pw(self.conv_pw(y)))
        return y.flatten(2).softmax(dim=-1).reshape(y.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return attend(x, self.attention(x))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        _convert_published(state_dict, prefix, self.num_splits, errors)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)


def _convert_published(state_dict: dict[str, torch.Tensor], prefix: str, num_splits: int, errors: list[str]) -> None:
    """Replace the published keys under `prefix` in `state_dict` by ours, in place."""
    tensors: dict[str, dict[int, torch.Tensor]] = {}
    for key in [k for k in state_dict if k.startswith(prefix)]:
        match = _PUBLISHED_KEY.fullmatch(key[len(prefix) :])
        if match is not None:
            index, module, name = match.groups()
            tensors.setdefault(f"{prefix}{_PUBLISHED_MODULES[module]}.{name}", {})[int(index)] = state_dict.pop(key)
    for key, by_subspace in tensors.items():
        if sorted(by_subspace) != list(range(num_splits)):
            errors.append(
                f"{key}: published state dict holds subspaces {sorted(by_subspace)}, "
                f"this layer has num_splits={num_splits}"
            )
            continue
        parts = [by_subspace[i] for i in range(num_splits)]
        # counters are scalars, the same in every subspace; everything else is stacked channel by channel
        state_dict[key] = torch.cat(parts) if parts[0].dim() > 0 else parts[0]
