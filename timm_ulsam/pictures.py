"""Files of pictures that matplotlib draws."""

import importlib.util
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import whole_file

_SUFFIXES = (".jpg", ".pdf", ".png", ".svg", ".webp")


def check_picture(out: str | Path) -> None:
    """Refuse a picture that could not be drawn, before the work that leads to it.

    Raises:
        InputError: If the suffix is not that of a picture, the folder does not exist, or matplotlib is not installed.
    """
    out = Path(out)
    if out.suffix.lower() not in _SUFFIXES:
        raise InputError(f"cannot draw into {out}: accepted suffixes are {', '.join(_SUFFIXES)}")
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out}: there is no folder {out.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("drawing needs matplotlib: pip install 'timm-ulsam[demo]'")


def write_figure(figure: Any, out: Path) -> None:
    """Write a matplotlib figure; its suffix names the format.

    Raises:
        InputError: If the file cannot be written. Nothing half-written stays then.
    """
    try:
        with whole_file(out) as temporary:
            figure.savefig(temporary, format=out.suffix[1:].lower(), dpi=100)
    except (OSError, ValueError) as error:  # ValueError: larger than the format can be
        raise InputError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from error
