"""ULSAM as few ONNX operators: none that only computes shapes, for runtimes pay for each node."""

import torch
import torch.nn.functional as F

from .reference import Norm, batch_norm


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
    splits = weight_pw.shape[0]
    y = F.conv2d(x, weight_dw, bias_dw, groups=weight_dw.shape[0])
    y = F.max_pool2d(batch_norm(y, norm_dw).relu(), 3, stride=1, padding=1)
    z = batch_norm(F.conv2d(y, weight_pw, bias_pw, groups=splits), norm_pw).relu()
    # a softmax over both axes of the map, where PyTorch's and ONNX's want one: reshaping needs shapes
    powers = (z - z.amax((2, 3), keepdim=True)).exp()
    maps = powers / powers.sum((2, 3), keepdim=True)
    if map_scale is not None:
        maps = maps * map_scale
    # one map for each of its subspace's channels, by a convolution with ones
    maps = F.conv2d(maps, torch.ones_like(weight_dw), groups=splits)
    return x * maps + x
