"""timm-ulsam: compact CNNs with subspace attention, as models of timm.

Importing this package imports neither torch nor timm; its models register themselves once timm is there.
"""

import importlib

from ._plugin import autoload

__version__ = "0.1.0"
__all__ = ["ULSAM", "autoload"]

_LAZY = {"ULSAM": "timm_ulsam.layers"}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


autoload()
