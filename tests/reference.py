"""Numbers computed with the published code of each paper, and what tests compare with them.

Small files lie in tests/data/<system>/, the whole set in ../shared/reference/<system>/; a test whose file is in neither
is skipped.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED
from safetensors import safe_open
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data"


def path(system: str, file: str) -> Path:
    """Where a file of the reference set is; skips the test if it is not at hand."""
    for folder in (DATA / system, SHARED / "reference" / system):
        if (folder / file).is_file():
            return folder / file
    pytest.skip(f"reference/{system}/{file} is not at hand")


def tensors(system: str, file: str) -> dict[str, torch.Tensor]:
    """All tensors of a layer file."""
    return load_file(path(system, f"{file}.safetensors"))


def config(system: str, file: str) -> dict[str, Any]:
    """What the header of a layer file says of it."""
    with safe_open(path(system, f"{file}.safetensors"), framework="pt") as opened:
        return json.loads(opened.metadata()["config"])


def model(system: str, file: str) -> dict[str, Any]:
    """A model file."""
    return json.loads(path(system, f"{file}.json").read_text(encoding="utf-8"))


def part(all_tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors whose key begins so, without that beginning."""
    return {k.removeprefix(prefix): v for k, v in all_tensors.items() if k.startswith(prefix)}


def normal(key: str, shape: Iterable[int], salt: str = "") -> torch.Tensor:
    """Standard normal numbers that follow from the key alone, as all model files have them."""
    generator = torch.Generator().manual_seed(zlib.crc32((salt + key).encode()))
    return torch.randn(tuple(shape), generator=generator)


def drawn(shapes: dict[str, Iterable[int]], gain: float, keep: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """State dict of a model file of do_conv, dbb and rep_mlp: all but the keys to `keep` as constructed."""
    state = {}
    for key, shape in shapes.items():
        if keep(key):
            continue
        r = normal(key, shape)
        if r.dim() >= 2:
            state[key] = r * (gain / math.sqrt(math.prod(r.shape[1:])))
        elif key.endswith("running_var"):
            state[key] = 1 + 0.1 * r.abs()
        else:
            state[key] = 0.1 * r if key.endswith(("running_mean", "bias")) else 1 + 0.1 * r
    return state


def tiled_image(shape: Iterable[int], seed: int) -> torch.Tensor:
    """The input of model files: fine noise, and coarse noise in tiles of 32 x 32."""
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    fine = torch.randn(batch, channels, height, width, generator=generator)
    coarse = torch.randn(batch, channels, height // 32, width // 32, generator=generator)
    return fine + coarse.repeat_interleave(32, 2).repeat_interleave(32, 3)


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float, name: str = "") -> None:
    """Equal up to `relative` of the largest expected value."""
    expected = torch.as_tensor(expected).to(found.dtype)
    assert found.shape == expected.shape, name
    error = (found.detach() - expected).abs().max().item()
    largest = expected.abs().max().item()
    assert error <= relative * largest, f"{name}: wrong by {error}, the largest value is {largest}"
