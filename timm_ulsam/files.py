"""Files that are read without running what they hold, and written whole or not at all."""

import argparse
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .errors import WeightsError


def read_weights(path: Path) -> Any:
    """What a safetensors file, or one of `torch.save`, holds; no object is unpickled but tensors and plain values.

    Raises:
        WeightsError: If it cannot be read, is damaged or holds anything else; names the file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # train.py keeps its options as a namespace, which holds values and runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f" ({named[1]})" if named else ""
        raise WeightsError(
            f"{path} holds other objects than tensors and plain values{found}, or is damaged; reading those could run "
            "code, so it is refused: save its weights as safetensors where it comes from"
        ) from error
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file may fail anywhere
        raise WeightsError(f"{path} is not a whole checkpoint: {error}") from error


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A temporary file beside `file`, which takes its place at the end, and is gone where that is not reached.

    Its name is no other process's, so that two may write the same file at once: one of the two stays, whole.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8; until it is whole, the one before stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
