"""Where pretrained weights are, and whether they are the published ones.

`weights/<arch>.<tag>/` is laid out as the Hub repository of that model and `weights/SHA256SUMS` records the digest of
every weight file (the format of `sha256sum`). In a checkout or a torch.hub clone the folder stands beside the package;
a wheel carries it inside, with the weight files of the default tags only. What is not at hand comes from the Hub.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    # for annotations only: importing timm from here would have its hook import this module half-made
    from timm.models import PretrainedCfg

HUB_ORG = "timm-ulsam"
WEIGHTS_FILE = "model.safetensors"
_SUMS_FILE = "SHA256SUMS"


class WeightsError(RuntimeError):
    """A weight file is not the one that was published, or cannot be had."""


def weights_dir() -> Path:
    """The folder that holds `<arch>.<tag>/`: inside the installed package, else beside it."""
    package = Path(__file__).resolve().parent
    inside = package / "weights"
    return inside if (inside / _SUMS_FILE).is_file() else package.parent / "weights"


@cache
def recorded_digests() -> dict[str, str]:
    """SHA-256 of every weight file that belongs to the zoo, by `<arch>.<tag>`.

    Raises:
        WeightsError: If the record cannot be read.
    """
    sums = weights_dir() / _SUMS_FILE
    try:
        rows = [line.split() for line in sums.read_text(encoding="utf-8").splitlines()]
        return {path.split("/")[0]: digest for digest, path in rows}
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read the digests of the weights in {sums}: {error}") from error


def weights_cfg(name: str) -> dict[str, Any]:
    """The part of timm's pretrained cfg that says where the weights `<arch>.<tag>` are and what their classes mean."""
    folder = weights_dir() / name
    cfg: dict[str, Any] = {"hf_hub_id": f"{HUB_ORG}/{name}"}
    if (folder / WEIGHTS_FILE).is_file():
        cfg["file"] = str(folder / WEIGHTS_FILE)
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        cfg["label_names"] = tuple(config["label_names"])
        cfg["label_descriptions"] = config["label_descriptions"]
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
    """A pretrained cfg whose weights are at hand and whole; the zoo's own have the recorded digest.

    Weights that a caller names (in `pretrained_cfg_overlay`, or by a `local-dir:` or `hf-hub:` name) have no digest to
    compare with; of a local file it is checked that it is a whole safetensors file. Neither have those that a tag takes
    from another organization's repository (timm's, for an initialization): they are not ours to record, and timm
    downloads them.

    Raises:
        WeightsError: If a file is truncated, or is one of the zoo and altered or without a recorded digest.
    """
    name = f"{cfg.architecture}.{cfg.tag}"
    if cfg.state_dict:
        return cfg
    if cfg.file:
        file = Path(cfg.file)
        file = file / WEIGHTS_FILE if file.is_dir() else file
        if file.resolve() == (weights_dir() / name / WEIGHTS_FILE).resolve():
            check_digest(file, _recorded_digest(name))
        elif file.suffix == ".safetensors" and file.is_file():
            _check_whole(file)
    elif cfg.hf_hub_id == f"{HUB_ORG}/{name}":
        downloaded = hf_hub_download(cfg.hf_hub_id, WEIGHTS_FILE, cache_dir=cache_dir)
        check_digest(downloaded, _recorded_digest(name))
        if cfg.source != "hf-hub":
            return dataclasses.replace(cfg, file=downloaded)
    return cfg


@contextmanager
def downloads_explained(cfg: "PretrainedCfg") -> Iterator[None]:
    """Around what may download the weights of `cfg`: where that fails, say what was to be downloaded.

    Raises:
        WeightsError: If the Hub cannot be reached, or not asked (`HF_HUB_OFFLINE`), and its cache lacks the file, or if
            it refuses; names repository and file, and what to do.
    """
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        repository, file = cfg.hf_hub_id, cfg.hf_hub_filename or WEIGHTS_FILE
        raise WeightsError(
            f"the weights of {cfg.architecture}.{cfg.tag} are {file} of the Hub repository {repository}, which is "
            f"neither in the local cache nor could be downloaded ({type(error).__name__}). Build the model once with "
            f"access to {ENDPOINT} and without HF_HUB_OFFLINE, which caches it; or run `hf download {repository} "
            f"{file}` elsewhere and name the copy: pretrained_cfg_overlay=dict(file=PATH), or --pretrained-path PATH."
        ) from error


def _recorded_digest(name: str) -> str:
    if name not in recorded_digests():
        raise WeightsError(f"{weights_dir() / _SUMS_FILE} records no digest for {name}, its weights cannot be checked")
    return recorded_digests()[name]


def _check_whole(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise WeightsError(f"{file} is not a whole safetensors file: {error}") from error
