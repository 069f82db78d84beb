"""Checks of arguments and inputs that the layers share."""

from numbers import Integral
from typing import Any

import torch


def is_positive(value: object) -> bool:
    """Whether `value` is an integer from 1; True is none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def check_positive(**arguments: Any) -> None:
    """Refuse arguments that are no positive integers.

    Raises:
        ValueError: Names the argument and its value.
    """
    for name, value in arguments.items():
        if not is_positive(value):
            raise ValueError(f"{name}={value!r} is not a positive integer")


def pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """A setting for height and width, given as one integer or as two.

    Raises:
        ValueError: Names the argument, its value and what is accepted.
    """
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or not all(isinstance(v, Integral) and not isinstance(v, bool) and v >= least for v in both):
        raise ValueError(f"{name}={value!r}; accepted: an integer from {least}, or a pair of them")
    return int(both[0]), int(both[1])


def divisors(number: int) -> list[int]:
    """All divisors of a positive integer, in order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def check_input(x: torch.Tensor, channels: int) -> None:
    """Refuse what is not of shape (N, channels, H, W).

    A module that calls this also calls `torch.fx.wrap("check_input")`, so that it can be traced symbolically.

    Raises:
        ValueError: Names the shape and the accepted one.
    """
    if torch.jit.is_tracing():
        return  # shapes are traced values there, a comparison would only warn
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"input x of shape {list(x.shape)}: accepted is (N, {channels}, H, W)")
