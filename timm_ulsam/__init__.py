"""timm-ulsam: compact CNNs with subspace attention, as models of timm.

Importing this package imports neither torch nor timm; its models register themselves once timm is there.
"""

import importlib
from typing import TYPE_CHECKING

from ._plugin import autoload

if TYPE_CHECKING:
    from . import layers, models
    from .layers import ULSAM

__version__ = "0.1.0"
__all__ = ["ULSAM", "autoload", "layers", "models"]


def __getattr__(name: str) -> object:
    if name in ("layers", "models"):
        return importlib.import_module(f"{__name__}.{name}")
    if name == "ULSAM":
        return importlib.import_module(f"{__name__}.layers").ULSAM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


autoload()
