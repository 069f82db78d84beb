"""Where pretrained weights are, and whether they are the published ones.

`weights/<arch>.<tag>/` is laid out as the Hub repository of that model and `weights/SHA256SUMS` records the digest of
every weight file (the format of `sha256sum`). In a checkout or a torch.hub clone the folder stands beside the package;
a wheel carries it inside, with the weight files of the default tags only. What is not at hand comes from the Hub.
"""

import dataclasses
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, hf_hub_download

if TYPE_CHECKING:
    # for annotations only: importing timm from here would have its hook import this module half-made
    from timm.models import PretrainedCfg

HUB_ORG = "timm-ulsam"
WEIGHTS_FILE = "model.safetensors"
_SUMS_FILE = "SHA256SUMS"


class WeightsError(RuntimeError):
    """A weight file is not the one that was published."""


def weights_dir() -> Path:
    """The folder that holds `<arch>.<tag>/`: inside the installed package, else beside it."""
    package = Path(__file__).resolve().parent
    inside = package / "weights"
    return inside if (inside / _SUMS_FILE).is_file() else package.parent / "weights"


@cache
def recorded_digests() -> dict[str, str]:
    """SHA-256 of every weight file that belongs to the zoo, by `<arch>.<tag>`."""
    sums = weights_dir() / _SUMS_FILE
    if not sums.is_file():
        return {}
    rows = (line.split() for line in sums.read_text(encoding="utf-8").splitlines() if line.strip())
    return {path.split("/")[0].lstrip("*"): digest for digest, path in rows}


def weights_cfg(name: str) -> dict[str, Any]:
    """timm's pretrained cfg of the weights `<arch>.<tag>`: as published, with the place to load them from."""
    from timm.models._hub import load_model_config_from_path

    cfg, _, _ = load_model_config_from_path(weights_dir() / name)
    cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
    for key in ("tag", "source", "file"):
        cfg.pop(key, None)
    cfg["hf_hub_id"] = f"{HUB_ORG}/{name}"
    file = weights_dir() / name / WEIGHTS_FILE
    if file.is_file():
        cfg["file"] = str(file)
    return cfg


def card_top1(name: str) -> float | None:
    """Top-1 accuracy in percent that the model card of `<arch>.<tag>` states, None if there is no card."""
    card = weights_dir() / name / "README.md"
    if not card.is_file():
        return None
    results = ModelCard.load(card).data.eval_results or []
    return next((r.metric_value for r in results if r.metric_name == "top-1"), None)


def check_digest(file: str | Path, expected: str) -> None:
    """Refuse a weight file that is not the one recorded.

    Raises:
        WeightsError: If the SHA-256 of `file` is not `expected`; names file, expected and found digest.
    """
    found = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    if found != expected:
        raise WeightsError(
            f"{file} is not the published weight file (truncated or altered): "
            f"expected SHA-256 {expected}, found {found}. Delete it and fetch it again."
        )


def checked_cfg(cfg: "PretrainedCfg", cache_dir: str | Path | None = None) -> "PretrainedCfg":
    """A pretrained cfg whose weights are at hand and, where they are the zoo's own, have the recorded digest.

    Weights that a caller names (`file`, `url` or `state_dict` in `pretrained_cfg_overlay`, another Hub repository)
    pass unchecked: there is nothing recorded to compare them with.

    Raises:
        WeightsError: If a file of the zoo is truncated or altered.
    """
    name = f"{cfg.architecture}.{cfg.tag}"
    expected = recorded_digests().get(name)
    if expected is None or cfg.state_dict:
        return cfg
    if cfg.file:
        file = Path(cfg.file)
        file = file / WEIGHTS_FILE if file.is_dir() else file
        if file.resolve() == weights_dir() / name / WEIGHTS_FILE:
            check_digest(file, expected)
        return cfg
    if cfg.hf_hub_id == f"{HUB_ORG}/{name}":
        file = hf_hub_download(cfg.hf_hub_id, WEIGHTS_FILE, cache_dir=cache_dir)
        check_digest(file, expected)
        return cfg if cfg.source == "hf-hub" else dataclasses.replace(cfg, file=file)
    return cfg
