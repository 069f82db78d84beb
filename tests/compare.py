"""ULSAM as it runs beside its modules called one by one, for tests of what it works with."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from torch import nn

from timm_ulsam import ULSAM
from timm_ulsam.layers import ulsam as layer_module
from timm_ulsam.ops import cpu


def stir(module: nn.Module) -> nn.Module:
    """Give every ULSAM weights and statistics of its own: as initialized its maps are nearly even and hide mistakes."""
    for layer in module.modules():
        if isinstance(layer, ULSAM):
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.is_floating_point():
                    nn.init.normal_(tensor.data, 0.5)
            for norm in (layer.bn_dw, layer.bn_pw):
                norm.running_var.abs_().add_(0.3)
    return module


def make_layer(dtype: torch.dtype = torch.float64, **kwargs: Any) -> ULSAM:
    return stir(ULSAM(8, 4, dtype=dtype, **kwargs))


def make_model(dtype: torch.dtype = torch.float64, **kwargs: Any) -> nn.Module:
    # in places where 64 px leave maps of 8x8 and 4x4: those of 2x2 are even, whatever the weights
    kwargs = {"num_classes": 5, "replace_blocks": (6, 13), **kwargs}
    return stir(timm.create_model("mobilenetv2_ulsam", **kwargs).to(dtype))


def images(batch: int = 4, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, dtype=dtype)


def plainly() -> AbstractContextManager:
    """Have every ULSAM call its modules one by one."""
    return mock.patch.object(ULSAM, "_is_fusable", return_value=False)


def fused_spy() -> AbstractContextManager[mock.MagicMock]:
    """Whether a ULSAM asks for the fused function, instead of calling its modules."""
    return mock.patch.object(layer_module, "ulsam", wraps=layer_module.ulsam)


def cpu_spy() -> AbstractContextManager[mock.MagicMock]:
    """Whether the CPU's fused version computes, which the fused function may leave to the plain one."""
    return mock.patch.object(cpu, "ulsam", wraps=cpu.ulsam)


def step(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `pass_through` says of a copy of the module."""
    return pass_through(copy.deepcopy(module), x)


def pass_through(module: nn.Module, x: torch.Tensor, call: Callable | None = None) -> dict[str, torch.Tensor]:
    """Output, gradients and buffers after a forward and a backward pass, of the module or what was made of it."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = module(x) if call is None else call(x)
    # no symmetric loss: the gradient of a sum through a batch norm is zero
    torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).mul(y).sum().backward()
    return {"output": y.detach(), "gradient": x.grad, **results(module)}


def results(module: nn.Module) -> dict[str, torch.Tensor]:
    gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {**gradients, **{name: b.clone() for name, b in module.named_buffers()}}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    """Equal up to `tolerance` of a tensor's largest value.

    And of a thousandth of the largest of all gradients, or buffers: some are zero, but for rounding.
    """
    assert ours.keys() == theirs.keys()
    sizes = {name: t.abs().max().item() if t.numel() else 0.0 for name, t in theirs.items()}
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert ours[name].shape == expected.shape, name
        kind = [size for other, size in sizes.items() if other.startswith("gradient") == name.startswith("gradient")]
        limit = tolerance * (sizes[name] + 1e-3 * max(kind))
        error = (ours[name] - expected).abs().max().item() if expected.numel() else 0.0
        assert error <= limit, f"{name}: wrong by {error}, its largest value is {sizes[name]}"


def split_batch_norms(model: nn.Module) -> nn.Module:
    """timm's conversion to split batch norms; skips the test where it loses the activations of timm's own norms."""
    if (timm.layers.convert_splitbn_model(timm.layers.BatchNormAct2d(2)).eval()(torch.randn(8, 2, 3, 3)) < 0).any():
        pytest.skip(f"split batch norms are broken in timm {timm.__version__}")
    return timm.layers.convert_splitbn_model(model)
