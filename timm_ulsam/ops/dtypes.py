"""Dtypes, as they are asked for and changed in every room."""

import torch


def as_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in `dtype`; no operator if it is already, for an exporter would hold a program to the dtype it saw.

    A module that calls this in what is traced symbolically also calls `torch.fx.wrap("as_dtype")`.
    """
    return x if x.dtype == dtype else x.to(dtype)


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device; never for 'meta', which PyTorch refuses to ask about."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
