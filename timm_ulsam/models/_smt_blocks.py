"""Blocks of SMT, on feature maps (N, C, H, W) that lie in memory as channels_last."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, LayerScale2d, use_fused_attn
from torch import nn

from ..layers._checks import divisors, is_positive

Layer = Callable[..., nn.Module]


class SelfAttention(nn.Module):
    """Multi-head self-attention over all positions, plus a depthwise 3x3 convolution of the values.

    Shape: (N, dim, H, W) to the same.
    """

    fused_attn: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        if not is_positive(num_heads) or dim % num_heads != 0:
            raise ValueError(
                f"attention_heads: {num_heads!r} does not divide {dim} channels; accepted: {divisors(dim)}"
            )
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.local_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        # (N, H, W, dim) to (N, num_heads, H * W, dim / num_heads)
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        H, W = x.shape[1], x.shape[2]
        k_map, v_map = self.kv(x).chunk(2, -1)
        q, k, v = self._heads(self.q(x)), self._heads(k_map), self._heads(v_map)
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            y = self.attn_drop(attn.softmax(dim=-1)) @ v
        y = y.transpose(1, 2).flatten(2).unflatten(1, (H, W))
        y = y + self.local_conv(v_map.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj_drop(self.proj(y)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """MLP with a depthwise 3x3 convolution beside the identity before its activation.

    Shape: (N, dim, H, W) to the same.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        drop: float = 0.0,
        act_layer: Layer = nn.GELU,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.drop1(self.act(x + self.dwconv(x)))
        return self.drop2(self.fc2(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Residual token mixer, then residual MLP, each after its norm.

    Shape: (N, dim, H, W) to the same.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Layer = nn.GELU,
        norm_layer: Layer = LayerNorm2d,
        **dd: Any,
    ) -> None:
        super().__init__()
        scale = nn.Identity if init_values is None else partial(LayerScale2d, dim, init_values, **dd)
        self.norm1 = norm_layer(dim, eps=1e-6, **dd)
        self.attn = attn
        self.ls1 = scale()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, act_layer=act_layer, **dd)
        self.ls2 = scale()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Stem(nn.Module):
    """Convolution of stride 2, batch norm, ReLU, and a 2x2 convolution of stride 2: the published `Head`.

    Shape: (N, in_chans, H, W) to (N, dim, (H + 1) // 4, (W + 1) // 4).
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        kernel_size: int = 3,
        *,
        norm_layer: Layer = LayerNorm2d,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, kernel_size, stride=2, padding=kernel_size // 2, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(dim, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(dim, dim, 2, stride=2, **dd)
        # published weights were trained with another epsilon here and in Downsample than in blocks
        self.norm = norm_layer(dim, eps=1e-5, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv2(self.act1(self.bn1(self.conv1(x)))))


class Downsample(nn.Module):
    """3x3 convolution of stride 2, and norm: the published `OverlapPatchEmbed`.

    Shape: (N, in_dim, H, W) to (N, dim, (H + 1) // 2, (W + 1) // 2).
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        norm_layer: Layer = LayerNorm2d,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd)
        self.norm = norm_layer(dim, eps=1e-5, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x))
