"""Where pretrained weights are, and whether they are the published ones.

`weights/<arch>.<tag>/` is laid out as the Hub repository of that model and `weights/SHA256SUMS` records the digest of
every weight file (the format of `sha256sum`). In a checkout or a torch.hub clone the folder stands beside the package;
a wheel carries it inside, with the weight files of the default tags only. What is not at hand comes from the Hub.
"""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open

from .errors import WeightsError
from .files import read_weights, write_text

if TYPE_CHECKING:
    # for annotations only: importing timm from here would have its hook import this module half-made
    from timm.models import PretrainedCfg

HUB_ORG = "timm-ulsam"
WEIGHTS_FILE = "model.safetensors"
_SUMS_FILE = "SHA256SUMS"
# what to do where an installed package lacks records
OF_A_CLONE = "those of a clone are found with pip install -e ., or with TIMM_ULSAM_WEIGHTS naming its weights/"


def weights_dir() -> Path:
    """The folder that holds `<arch>.<tag>/`: `TIMM_ULSAM_WEIGHTS`, else inside the installed package or beside it."""
    named = os.environ.get("TIMM_ULSAM_WEIGHTS")
    if named:
        return _absolute(named)
    package = Path(__file__).resolve().parent
    inside = package / "weights"
    return inside if (inside / _SUMS_FILE).is_file() else package.parent / "weights"


@cache  # what is meant does not change with the working directory
def _absolute(named: str) -> Path:
    folder = Path(named).expanduser().absolute()
    if not (folder / _SUMS_FILE).is_file():
        warnings.warn(
            f"TIMM_ULSAM_WEIGHTS={named!r} holds no {_SUMS_FILE}, so no weights of the zoo are found there; it should "
            "name the folder weights/ of a clone",
            stacklevel=3,
        )
    return folder


@cache
def recorded_digests() -> dict[str, str]:
    """SHA-256 of every weight file that belongs to the zoo, by `<arch>.<tag>`.

    Raises:
        WeightsError: If the record cannot be read.
    """
    sums = weights_dir() / _SUMS_FILE
    try:
        rows = [line.split() for line in sums.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {path.split("/")[0]: digest for digest, path in rows}
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read the digests of the weights in {sums}: {error}") from error


def weights_cfg(name: str) -> dict[str, Any]:
    """The part of timm's pretrained cfg that says where the weights `<arch>.<tag>` are and what their classes mean."""
    folder = weights_dir() / name
    cfg: dict[str, Any] = {"hf_hub_id": f"{HUB_ORG}/{name}"}
    if (folder / WEIGHTS_FILE).is_file():
        cfg["file"] = str(folder / WEIGHTS_FILE)
    config_file = folder / "config.json"
    if config_file.is_file():
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
            cfg |= {"label_names": tuple(config["label_names"]), "label_descriptions": config["label_descriptions"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            # one broken folder must not keep timm from knowing the models
            warnings.warn(f"{name} goes without class names: cannot read {config_file}: {error!r}", stacklevel=2)
    return cfg


def card_metrics(name: str) -> dict[str, float]:
    """What the model card of `<arch>.<tag>` states, in percent: `top-1` and `top-5`; {} if there is no card."""
    card = weights_dir() / name / "README.md"
    if not card.is_file():
        return {}
    return {result.metric_name: result.metric_value for result in ModelCard.load(card).data.eval_results or []}


def file_size(name: str) -> int | None:
    """Bytes of the weight file of `<arch>.<tag>`, None if it is not at hand."""
    file = weights_dir() / name / WEIGHTS_FILE
    return file.stat().st_size if file.is_file() else None


def file_digest(file: str | Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with Path(file).open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def git_digest(file: str | Path) -> str:
    """SHA-1 that git gives a file, by which the Hub knows what is not in its large file storage."""
    content = Path(file).read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def check_digest(file: str | Path, expected: str, advice: str = "Delete it and fetch it again.") -> None:
    """Refuse a weight file that is not the one recorded.

    Raises:
        WeightsError: If the SHA-256 of `file` is not `expected`; names file, expected and found digest.
    """
    found = file_digest(file)
    if found != expected:
        raise WeightsError(
            f"{file} is not the published weight file (truncated or altered): "
            f"expected SHA-256 {expected}, found {found}. {advice}"
        )


def recorded_digest(name: str) -> str:
    """The SHA-256 that `SHA256SUMS` records for the weights `<arch>.<tag>`.

    Raises:
        WeightsError: If it records none.
    """
    if name not in recorded_digests():
        raise WeightsError(f"{weights_dir() / _SUMS_FILE} records no digest for {name}, its weights cannot be checked")
    return recorded_digests()[name]


def record_digest(name: str, digest: str) -> None:
    """Record the SHA-256 of the weights `<arch>.<tag>`; the digests of all others stay, those just added included."""
    sums = weights_dir() / _SUMS_FILE
    sums.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(sums.with_name(f".{_SUMS_FILE}.lock")):
        recorded_digests.cache_clear()
        digests = {**(recorded_digests() if sums.is_file() else {}), name: digest}
        write_text(sums, "".join(f"{digests[name]}  {name}/{WEIGHTS_FILE}\n" for name in sorted(digests)))
    recorded_digests.cache_clear()


def checked_cfg(cfg: "PretrainedCfg", cache_dir: str | Path | None = None) -> "PretrainedCfg":
    """A pretrained cfg whose weights are at hand and whole; the zoo's own have the recorded digest.

    Weights that a caller names (in `pretrained_cfg_overlay`, or by a `local-dir:` or `hf-hub:` name) have no recorded
    digest. Of a local file it is checked that it is a whole safetensors file; what comes from the Hub must be
    safetensors and have the digest that the Hub states, else it does not stay in the cache. The files that a tag takes
    from another organization's repository (timm's, for an initialization) are no more than that.

    Raises:
        WeightsError: If a file is truncated or altered, is one of the zoo without a recorded digest, is at the Hub and
            no safetensors file, or would run code when it is read.
    """
    name = f"{cfg.architecture}.{cfg.tag}"
    if cfg.state_dict and cfg.source not in ("hf-hub", "local-dir"):  # there timm does not look at it
        return cfg
    if cfg.file and cfg.source != "hf-hub":
        file = Path(cfg.file)
        file = file / WEIGHTS_FILE if file.is_dir() else file
        if file.resolve() == (weights_dir() / name / WEIGHTS_FILE).resolve():
            check_digest(file, recorded_digest(name))
        elif file.suffix == ".safetensors" and file.is_file():
            _check_whole(file)
        elif file.is_file():
            read_weights(file)  # refuses what would run code, which older versions of timm load
    elif cfg.hf_hub_id:
        # timm is given the file that was checked, not the name of one that may be another by then
        return dataclasses.replace(cfg, file=str(_from_hub(cfg, cache_dir)), source="file")
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
        is_own = _own_weights(repository.partition("@")[0]) is not None
        response = getattr(error, "response", None)
        answered = "" if response is None else f", the Hub answered {response.status_code}"
        clone = " A clone of timm-ulsam has them: set TIMM_ULSAM_WEIGHTS to its weights/." if is_own else ""
        raise WeightsError(
            f"the weights of {cfg.architecture}.{cfg.tag} are {file} of the Hub repository {repository}, which is "
            f"neither in the local cache nor could be downloaded ({type(error).__name__}{answered}). Build the model "
            f"once with access to {ENDPOINT} and without HF_HUB_OFFLINE, which caches it; or run `hf download "
            f"{repository} {file}` elsewhere and name the copy: pretrained_cfg_overlay=dict(file=PATH), or "
            f"--pretrained-path PATH.{clone}"
        ) from error


def _own_weights(repo: str) -> str | None:
    """`<arch>.<tag>` of a Hub repository of the zoo, None of another's; the Hub does not tell upper from lower case."""
    org, _, name = repo.partition("/")
    return name if org.lower() == HUB_ORG else None


def _from_hub(cfg: "PretrainedCfg", cache_dir: str | Path | None) -> Path:
    repo, _, revision = cfg.hf_hub_id.partition("@")
    options = {"revision": revision or None, "cache_dir": cache_dir}
    filename = cfg.hf_hub_filename or WEIGHTS_FILE
    if not filename.endswith(".safetensors"):
        raise WeightsError(f"{filename} of {cfg.hf_hub_id} is not a safetensors file, and nothing else is loaded")
    if cfg.source == "hf-hub":
        config = try_to_load_from_cache(repo, "config.json", **options)  # timm has just read it
        if isinstance(config, str):
            _check_download(Path(config))
    try:
        file = Path(hf_hub_download(repo, filename, **options))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        raise WeightsError(f"{cfg.hf_hub_id} holds no {filename}, and nothing else is loaded") from error
    _check_download(file)
    # by the repository that was asked for, at whatever revision: what its config.json says is as little trusted
    own = _own_weights(repo)
    if own is not None:
        expected = recorded_digest(own)  # where the record is what lacks, the file stays
        try:
            check_digest(file, expected, _DROPPED)
        except WeightsError:
            _drop_from_cache(file)
            raise
    else:
        _check_whole(file)
    return file


_DROPPED = "It is no longer in the cache: fetch it again."


def _check_download(file: Path) -> None:
    """Compare a file in the cache with the digest that the Hub gave it, after which the cache names it."""
    if not file.is_symlink():
        return  # a file system without links: the cache does not know the digest
    stated = file.readlink().name
    digest = {64: file_digest, 40: git_digest}.get(len(stated))
    found = digest(file) if digest else stated
    if found != stated:
        _drop_from_cache(file)
        raise WeightsError(
            f"{file} is truncated or altered: at the Hub its digest is {stated}, here it is {found}. {_DROPPED}"
        )


def _drop_from_cache(file: Path) -> None:
    while file.is_symlink():
        target = file.parent / file.readlink()
        file.unlink()
        file = target
    file.unlink(missing_ok=True)


def _check_whole(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise WeightsError(f"{file} is not a whole safetensors file: {error}") from error
