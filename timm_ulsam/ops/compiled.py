"""ULSAM as pointwise steps and sums, which is what torch.compile fuses best.

Convolutions would stay calls into libraries, each with a pass over memory of its own.
"""

import torch
import torch.nn.functional as F

from .fold import fold
from .reference import Norm, attend, attention, batch_norm, is_channels_last


def ulsam(
    x: torch.Tensor,
    weight_dw: torch.Tensor,
    bias_dw: torch.Tensor,
    norm_dw: Norm | None,
    weight_pw: torch.Tensor,
    bias_pw: torch.Tensor,
    norm_pw: Norm | None,
    map_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Subspace attention; arguments and result as for `reference.ulsam`."""
    if norm_dw is not None and not norm_dw.training:
        weight_dw, bias_dw = fold(weight_dw, bias_dw, norm_dw)
        norm_dw = None
    y = x.to(weight_dw.dtype) * weight_dw.view(1, -1, 1, 1) + bias_dw.view(1, -1, 1, 1)
    y = batch_norm(y, norm_dw).relu()
    channels_last = is_channels_last(x)
    if x.device.type != "cpu" or (torch.is_grad_enabled() and y.requires_grad):
        y = F.max_pool2d(y, 3, stride=1, padding=1)
        z = (y.permute(0, 2, 3, 1).unflatten(-1, weight_pw.shape[:2]) * weight_pw.flatten(1)).sum(-1)
        z = z.permute(0, 3, 1, 2)
    elif channels_last:
        z = _scores_channels_last(y, weight_pw.flatten(1))
    else:
        z = _scores_contiguous(y, weight_pw.flatten(1))
    return attend(x, attention(z, bias_pw, norm_pw, map_scale))


# With one zero column and row before every map, a sample laid out flat is pooled by shifting it: no window needs a
# bounds check, which leaves long vectors. Laid out means in memory (as_strided): else it would be computed nine times.
# `contiguous` is for slices of tensors of the other memory format, whose padded copy keeps theirs.


def _scores_contiguous(y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = y.shape
    plane = (height + 1) * (width + 1)
    y = F.pad(y, (1, 0, 1, 0, 0, 2)).contiguous()  # the last windows reach into two more maps of zeros
    y = y.as_strided((batch, (channels + 2) * plane), ((channels + 2) * plane, 1))
    y = _max_pool(y, 1, width + 1, channels * plane).view(batch, *weight.shape, plane)
    z = (y * weight.unsqueeze(-1)).sum(2)
    return z.view(batch, weight.shape[0], height + 1, width + 1)[..., :-1, :-1]


def _scores_channels_last(y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = y.shape
    row = (width + 1) * channels
    y = F.pad(y.permute(0, 2, 3, 1), (0, 0, 1, 0, 1, 2)).contiguous()  # and into two more rows
    y = y.as_strided((batch, (height + 3) * row), ((height + 3) * row, 1))
    y = _max_pool(y, channels, row, height * row).view(batch, height, width + 1, *weight.shape)
    return (y * weight).sum(-1)[:, :, :-1].permute(0, 3, 1, 2)


def _max_pool(y: torch.Tensor, pixel: int, row: int, size: int) -> torch.Tensor:
    rows = size + 2 * row
    y = torch.maximum(torch.maximum(y[:, :rows], y[:, pixel : pixel + rows]), y[:, 2 * pixel : 2 * pixel + rows])
    return torch.maximum(torch.maximum(y[:, :size], y[:, row : row + size]), y[:, 2 * row :])
