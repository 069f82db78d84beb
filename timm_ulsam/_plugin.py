"""Makes timm know our models, in whatever order torch, timm and this package are imported.

PyTorch calls the entry points of the group `torch.backends` at the end of `import torch`; ours is `autoload`. At that
moment timm may be half imported (it is what imports torch, often), so nothing of it is touched here: a post-import hook
waits until `timm.models` is complete.
"""

import importlib
import sys
import warnings

_registered = False


def autoload() -> None:
    """Have `timm_ulsam.models` imported right after `timm.models`. Safe to call more than once; never raises."""
    global _registered
    if _registered:
        return
    _registered = True
    try:
        from wrapt import register_post_import_hook

        register_post_import_hook(_register_models, "timm.models")
    except Exception as error:
        _warn(error)


def _register_models(_timm_models: object) -> None:
    try:
        importlib.import_module("timm_ulsam.models")
    except Exception as error:
        _warn(error)


def _warn(cause: Exception) -> None:
    message = f"timm-ulsam could not register its models with timm: {type(cause).__name__}: {cause}"
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        # warnings are errors here (python -W error), and an error would break the import of torch or timm
        print(message, file=sys.stderr)
