"""The published ULSAM module, rebuilt from its description: what ours is measured against.

One small network per subspace, run one after the other, some ten operations each. Its state dict has the names that
the authors' files have, so one state dict serves both modules.
"""

import torch
import torch.nn.functional as F
from torch import nn

# names of the parts, here and in `timm_ulsam.ULSAM`
_PARTS = {"conv_dws": "conv_dw", "bn_dws": "bn_dw", "conv_point": "conv_pw", "bn_point": "bn_pw"}


class Subspace(nn.Module):
    """Attention over one group of C channels.

    Shape: (N, C, H, W) to the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_dws = nn.Conv2d(channels, channels, kernel_size=1, groups=channels)
        self.bn_dws = nn.BatchNorm2d(channels, momentum=0.9)
        self.relu_dws = nn.ReLU(inplace=False)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=1, padding=1)
        self.conv_point = nn.Conv2d(channels, 1, kernel_size=1)
        self.bn_point = nn.BatchNorm2d(1, momentum=0.9)
        self.relu_point = nn.ReLU(inplace=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.maxpool(self.relu_dws(self.bn_dws(self.conv_dws(x))))
        z = self.relu_point(self.bn_point(self.conv_point(y)))
        n, _, h, w = z.shape
        maps = F.softmax(z.reshape(n, 1, h * w), dim=2).reshape(n, 1, h, w)
        return torch.mul(maps.expand(x.shape), x) + x


class Published(nn.Module):
    """The layer: `num_splits` subspaces in a loop.

    Shape: (N, channels, H, W) to the same.
    """

    def __init__(self, channels: int, num_splits: int) -> None:
        super().__init__()
        self.subspaces = nn.ModuleList(Subspace(channels // num_splits) for _ in range(num_splits))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = torch.chunk(x, len(self.subspaces), dim=1)
        return torch.cat([subspace(group) for subspace, group in zip(self.subspaces, groups, strict=True)], dim=1)


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by published parameter name, one a subspace, to one a parameter of `timm_ulsam.ULSAM`, by its name."""
    parts: dict[str, list[torch.Tensor]] = {}
    for key, tensor in tensors.items():
        _, _, module, name = key.split(".")
        parts.setdefault(f"{_PARTS[module]}.{name}", []).append(tensor)
    return {key: torch.cat(values) for key, values in parts.items()}


def published_layer(x: torch.Tensor, num_splits: int) -> Published:
    """A published layer for inputs like `x` of (N, C, H, W), with weights under which every step matters.

    Maps are peaked, so that the attention is no rounding error of the output; weights and shifts have both signs; the
    running statistics are almost those of `x`. The weights are in the dtype and on the device of `x`, in evaluation
    mode, and depend on `x`'s shape and contents alone.
    """
    layer = Published(x.shape[1], num_splits).to(x.device)
    generator = torch.Generator().manual_seed(x.shape[1])
    with torch.no_grad():
        for name, p in layer.named_parameters():
            _, _, module, kind = name.split(".")
            noise = torch.randn(p.shape, generator=generator)
            if module == "bn_point" and kind == "weight":
                noise = 3 + 0.3 * noise
            elif module == "bn_dws" and kind == "weight":
                noise = 1 + 0.3 * noise
            elif kind == "bias":
                noise = 0.3 * noise
            p.copy_(noise)
        layer.train()(x.float())
    return layer.eval().to(x.dtype)
