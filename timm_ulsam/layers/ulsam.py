"""Ultra-Lightweight Subspace Attention Module (ULSAM).

Paper: `ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks`
- https://arxiv.org/abs/2006.15102 (WACV 2020)
"""

import re
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from ..ops import Norm, attend, ulsam
from ._activation import ActLayer, create_act
from ._checks import check_input, check_positive, divisors, is_positive
from ._folding import double, folded, is_foldable

# Published state dicts hold one small module per subspace. Their names, and ours.
_PUBLISHED_KEY = re.compile(r"subspaces\.(\d+)\.(conv_dws|bn_dws|conv_point|bn_point)\.(\w+)")
_PUBLISHED_MODULES = {"conv_dws": "conv_dw", "bn_dws": "bn_dw", "conv_point": "conv_pw", "bn_point": "bn_pw"}


torch.fx.wrap("check_input")

_PAIRS = (("conv_dw", "bn_dw"), ("conv_pw", "bn_pw"))
_CONV = ((1, 1), (1, 1), (0, 0))
_POOL = (3, 1, 1, 1, False, False)


def _tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter or buffer, without `nn.Module.__getattr__`, which takes longer than some operators, where it may."""
    tensor = module._parameters.get(name)
    if tensor is None:
        tensor = module._buffers.get(name)
    return getattr(module, name) if tensor is None else tensor  # replicas have them as plain attributes


def is_unchanged(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very type, as it was made, and has no hooks: calling it does what its type does."""
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
    )


def _has_global_hooks() -> bool:
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def _is_conv(conv: nn.Conv2d, channels: int) -> bool:
    return (
        is_unchanged(conv, nn.Conv2d)
        and conv.groups == conv.out_channels == channels
        and (conv.kernel_size, conv.stride, conv.padding) == _CONV
        and _tensor(conv, "bias") is not None
    )


def _is_norm(bn: nn.Module) -> bool:
    if type(bn) is Folded:
        return is_unchanged(bn, Folded)
    return (
        is_unchanged(bn, nn.BatchNorm2d)
        and bn.momentum is not None
        and _tensor(bn, "weight") is not None
        and _tensor(bn, "bias") is not None
    )


def _is_pool(pool: nn.MaxPool2d) -> bool:
    if not is_unchanged(pool, nn.MaxPool2d):
        return False
    settings = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.return_indices, pool.ceil_mode
    return settings == _POOL


def _norm_of(bn: nn.Module) -> Norm | None:
    """What the fused function needs of a batch norm; its count of batches moves on as by a call."""
    if type(bn) is Folded:
        return None
    training, tracks = bn.training, bn.track_running_stats
    if training and tracks and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    mean = var = None
    if tracks or not training:
        mean, var = _tensor(bn, "running_mean"), _tensor(bn, "running_var")
    return Norm(_tensor(bn, "weight"), _tensor(bn, "bias"), mean, var, training or mean is None, bn.momentum, bn.eps)


class Folded(nn.Identity):
    """Stands where a batch norm was before it was folded; its one buffer says so in a state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("folded", torch.tensor(1))


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

    All steps run as one fused function (`timm_ulsam.ops`), as long as they are the ones built here: with another
    activation or norm, a synchronized, split or frozen batch norm, or hooks on them, the modules are called one by one,
    with the same result.

    Args:
        channels: Number of channels of the input.
        num_splits: Number of subspaces g, a divisor of `channels`.
        act_layer: Activation after each batch norm, a class or a name of timm's.
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
        act_layer: ActLayer = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_positive(channels=channels)
        if not is_positive(num_splits) or channels % num_splits != 0:
            accepted = divisors(channels)
            raise ValueError(f"num_splits={num_splits!r} does not divide channels={channels}; accepted: {accepted}")
        self.channels = channels
        self.num_splits = num_splits
        self.conv_dw = nn.Conv2d(channels, channels, 1, groups=channels, **dd)
        self.bn_dw = norm_layer(channels, **dd)
        self.act_dw = create_act(act_layer)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.conv_pw = nn.Conv2d(channels, num_splits, 1, groups=num_splits, **dd)
        self.bn_pw = norm_layer(num_splits, **dd)
        self.act_pw = create_act(act_layer)

    def extra_repr(self) -> str:
        return f"{self.channels}, num_splits={self.num_splits}"

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Attention maps of the subspaces.

        Shape: (N, channels, H, W) to (N, num_splits, H, W); every map is positive and sums to 1.
        """
        check_input(x, self.channels)
        y = self.pool(self.act_dw(self.bn_dw(self.conv_dw(x))))
        y = self.act_pw(self.bn_pw(self.conv_pw(y)))
        return y.flatten(2).softmax(dim=-1).reshape(y.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript drops what is inside
            if self._is_fusable(x):
                return self._fused(x, None)
        return attend(x, self.attention(x))

    def _is_fusable(self, x: torch.Tensor) -> bool:
        # where each module is of its type and nobody listens to it, the fused function does what calling them does;
        # synchronized, split and frozen batch norms, other activations, quantized convolutions, hooks: modules to call
        conv_dw, bn_dw, act_dw, pool, conv_pw, bn_pw, act_pw, *_ = self._modules.values()  # a subclass may have more
        return (
            isinstance(x, torch.Tensor)
            and _is_conv(conv_dw, self.channels)
            and _is_norm(bn_dw)
            and is_unchanged(act_dw, nn.ReLU)
            and _is_pool(pool)
            and _is_conv(conv_pw, self.num_splits)
            and _is_norm(bn_pw)
            and is_unchanged(act_pw, nn.ReLU)
            and type(self).attention is ULSAM.attention
            and not _has_global_hooks()
        )

    def _fused(self, x: torch.Tensor, map_scale: torch.Tensor | None) -> torch.Tensor:
        check_input(x, self.channels)
        conv_dw, bn_dw, _, _, conv_pw, bn_pw, *_ = self._modules.values()
        dw = _tensor(conv_dw, "weight"), _tensor(conv_dw, "bias"), _norm_of(bn_dw)
        pw = _tensor(conv_pw, "weight"), _tensor(conv_pw, "bias"), _norm_of(bn_pw)
        return ulsam(x, *dw, *pw, map_scale)

    def reparameterize(self) -> None:
        """Fold both batch norms into the convolutions, in place, for inference: `--reparam` of timm's scripts.

        Computed in float64; the running statistics become constants, in training mode too. A second call changes
        nothing, and neither does a first where a norm has no running statistics or is no batch norm, or where a
        convolution was replaced, has hooks, or computes its weight (parametrization, pruning).
        """
        kernels = []
        for conv_name, bn_name in _PAIRS:
            conv, bn = getattr(self, conv_name), getattr(self, bn_name)
            if is_foldable(bn) and is_unchanged(conv, nn.Conv2d) and conv.bias is not None:
                kernels.append((conv, bn_name, folded(double(conv.weight), double(conv.bias), bn)))
        with torch.no_grad():
            for conv, bn_name, (weight, bias) in kernels:
                conv.weight.copy_(weight)
                conv.bias.copy_(bias)
                setattr(self, bn_name, Folded().to(conv.weight.device))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        _convert_published(state_dict, prefix, self.num_splits, errors)
        for _, bn_name in _PAIRS:
            if f"{prefix}{bn_name}.folded" in state_dict and type(getattr(self, bn_name)) is not Folded:
                setattr(self, bn_name, Folded().to(self.conv_dw.weight.device))  # as the saved layer was
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
