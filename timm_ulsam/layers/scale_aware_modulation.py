"""Scale-Aware Modulation, the convolutional token mixer of SMT.

Paper: `Scale-Aware Modulation Meet Transformer` - https://arxiv.org/abs/2307.08579 (ICCV 2023)
"""

import math
import re
from collections.abc import Callable

import torch
from torch import nn

from ._activation import ActLayer, create_act
from ._checks import check_input, check_positive, divisors, is_positive

torch.fx.wrap("check_input")
torch.fx.wrap("_in_format_of")

# Published state dicts number the convolutions from 1, beside the other modules.
_PUBLISHED_KEY = re.compile(r"local_conv_(\d+)\.")


def init_linear_or_conv(module: nn.Module) -> None:
    """The published initialization of all of SMT, for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _in_format_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y.contiguous() if x.is_contiguous() else y


class ScaleAwareModulation(nn.Module):
    """Values modulated by what depthwise convolutions of growing size see around them.

    Two linear maps of the input give values v and a context s. The context is split into `num_heads` equal,
    consecutive heads, and head i (from 0) goes through a depthwise convolution of size 3 + 2i. A 1x1 convolution in
    groups of one channel of every head (so every group sees all sizes), batch norm, activation and a 1x1 convolution
    make the modulator of it: v is multiplied by it, and a last linear map follows.

    A state dict of the published `Attention` with `ca_attention=1` loads as it is, strictly.

    Shape: (N, channels, H, W) to the same shape and memory format; any H and W from 1.

    Args:
        channels: Number of channels of the input.
        num_heads: Number of heads, a divisor of `channels`; the last one's convolution is of size 1 + 2 * num_heads.
        expand_ratio: The modulator is made of `expand_ratio * channels` channels.
        qkv_bias: Whether the maps to v and s have a bias.
        proj_drop: Rate of dropout on the output.
        act_layer: Activation of the modulator, a class or a name of timm's.
        norm_layer: Normalization of the modulator, called with a number of channels.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If `num_heads` does not divide `channels`, or `expand_ratio` is no positive integer; in `forward`,
            if the input is not of shape (N, channels, H, W).
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 4,
        *,
        expand_ratio: int = 2,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        act_layer: ActLayer = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_positive(channels=channels, expand_ratio=expand_ratio)
        if not is_positive(num_heads) or channels % num_heads != 0:
            accepted = divisors(channels)
            raise ValueError(f"num_heads={num_heads!r} does not divide channels={channels}; accepted: {accepted}")
        self.channels = channels
        self.num_heads = num_heads
        head = channels // num_heads
        hidden = channels * expand_ratio
        self.v = nn.Linear(channels, channels, bias=qkv_bias, **dd)
        self.s = nn.Linear(channels, channels, bias=qkv_bias, **dd)
        self.local_convs = nn.ModuleList(
            nn.Conv2d(head, head, 3 + 2 * i, padding=1 + i, groups=head, **dd) for i in range(num_heads)
        )
        self.proj0 = nn.Conv2d(channels, hidden, 1, groups=head, **dd)
        self.bn = norm_layer(hidden, **dd)
        self.act = create_act(act_layer)
        self.proj1 = nn.Conv2d(hidden, channels, 1, **dd)
        self.proj = nn.Linear(channels, channels, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.apply(init_linear_or_conv)

    def extra_repr(self) -> str:
        return f"{self.channels}, num_heads={self.num_heads}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_input(x, self.channels)
        # channels last inside: linear maps take it as it lies, and depthwise convolutions train faster on it
        tokens = x.permute(0, 2, 3, 1)
        v = self.v(tokens)
        chunks = self.s(tokens).permute(0, 3, 1, 2).chunk(self.num_heads, 1)
        # one convolution a head: a single one with all kernels padded to the largest does twice the work, and is slower
        heads = []
        for i, conv in enumerate(self.local_convs):
            heads.append(conv(chunks[i]))
        # channel j * num_heads + i is channel j of head i, which published weights of proj0 expect
        s = torch.stack(heads, 2).flatten(1, 2)
        s = self.proj1(self.act(self.bn(self.proj0(s))))
        y = self.proj_drop(self.proj(v * s.permute(0, 2, 3, 1)))
        return _in_format_of(x, y.permute(0, 3, 1, 2))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for key in [k for k in state_dict if k.startswith(prefix)]:
            match = _PUBLISHED_KEY.match(key, len(prefix))
            if match is not None:
                state_dict[f"{prefix}local_convs.{int(match[1]) - 1}.{key[match.end() :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)
