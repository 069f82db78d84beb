"""Turn a checkpoint of timm's train.py into `weights/<arch>.<tag>/`, the Hub repository of that model."""

import argparse
import json
import re
import shutil
import tempfile
import textwrap
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.data.model_config import resolve_input_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.models import clean_state_dict, save_for_hf
from timm.utils import natural_key
from torch import nn

from . import models  # noqa: F401  (registers them)
from .card import write_card
from .errors import InputError
from .files import read_weights, write_text
from .models._build import check_fits
from .pretrained import OF_A_CLONE, WEIGHTS_FILE, file_digest, record_digest, weights_dir
from .publish import FILES
from .records import dataset_of, facts_file, log_file, read_log, read_yaml, recipe_file
from .zoo import model_names

# of the options of train.py that are read here
_KINDS = {"model": str, "dataset": str, "val_split": str, "input_size": (list, tuple), "model_kwargs": dict}
_NAMES = {str: "text", (list, tuple): "a list of channels, height and width", dict: "names and values"}
_OTHER_READERS = ("hfds/", "hfids/", "tfds/", "torch/", "wds/")  # of timm, by the beginning of --dataset


@dataclass(frozen=True)
class Packaged:
    """What was written.

    Attributes:
        folder: Laid out as a Hub repository.
        classes: Number of classes.
        source: Which weights of the checkpoint they are.
        digest: SHA-256 of model.safetensors.
        left_to_do: What the zoo still lacks of these weights.
    """

    folder: Path
    classes: int
    source: str
    digest: str
    left_to_do: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read.

    Attributes:
        state: The weights, under the model's own keys.
        source: Which weights of the file they are.
        options: Options of train.py, {} if it does not hold them.
        epoch: Counted from 0; None if it is not known.
    """

    state: dict[str, torch.Tensor]
    source: str
    options: dict[str, Any]
    epoch: int | None


def package(
    checkpoint: str | Path,
    arch: str,
    tag: str,
    *,
    labels: str | Path | None = None,
    data_dir: str | Path | None = None,
    dataset: str | None = None,
    config: str | Path | None = None,
    output: str | Path | None = None,
) -> Packaged:
    """Write model.safetensors, config.json and, where the facts are recorded, the model card.

    In a checkout the folder is `weights/<arch>.<tag>/`; its digest is recorded in `weights/SHA256SUMS`, the log of the
    run beside the checkpoint is kept in `weights/logs/`, and what it measured of this epoch becomes recorded fact.

    Args:
        checkpoint: Of train.py, or weights in safetensors.
        arch: Name of a model of the zoo.
        tag: Name of the weights.
        labels: File that names the classes: in every line the folder, a tab, the name. Either this or `data_dir`. The
            order of its lines counts where the run read no folders of images but another `--dataset` (`hfds/...`).
        data_dir: Data whose folders are the classes; those of `train/`, if there is one.
        dataset: Entry of `weights/datasets.yaml` that accuracy was measured on; by default that of the recorded facts.
        config: Options of train.py; by default those in the checkpoint, then args.yaml beside it.
        output: Folder to write, in the place of the one in the checkout; nothing else is recorded then. A README.md
            that it holds is kept.

    Raises:
        InputError: If an argument does not fit, or the checkpoint is not of this architecture or has other classes.
        WeightsError: If the checkpoint cannot be read without running code. Nothing is written in either case.
    """
    if arch not in model_names():
        raise InputError(f"{arch!r} is no model of this zoo; see timm-ulsam list")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", tag):
        raise InputError(f"tag {tag!r}: accepted are letters, digits, _ and -")
    if (labels is None) == (data_dir is None):
        raise InputError("give the classes either as labels or as data_dir")
    name, in_zoo = f"{arch}.{tag}", output is None
    if in_zoo and not (weights_dir() / "facts").is_dir():
        raise InputError(f"{weights_dir()} holds no records: {OF_A_CLONE}; or name a folder to write with --output")
    if dataset is not None:
        if not in_zoo:
            raise InputError("--dataset records facts in the checkout; not with --output")
        dataset_of(dataset)
    folder = weights_dir() / name if in_zoo else Path(output)
    _check_free(folder)
    real = folder.resolve()  # a link stays one
    if not in_zoo and Path.cwd().is_relative_to(real):
        raise InputError(f"--output {output} is the current folder, or holds it, and cannot be replaced")

    path = Path(checkpoint)
    read = read_checkpoint(path)
    options = _options(path, read, config)
    by_folders = not (options.get("dataset") or "").lower().startswith(_OTHER_READERS)
    if labels is None and not by_folders:
        raise InputError(f"the run counted the classes of {options['dataset']}, not folders: name them with --labels")
    names = _class_folders(Path(data_dir)) if labels is None else _labels(Path(labels), by_folders)
    model, data = _fitted(read, options, arch, tag, names)

    facts = _facts(name, dataset, path, read, options, len(names)) if in_zoo else {}

    real.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=real.parent, prefix=".package-") as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        _save(model, data, tag, names, new)
        digest = file_digest(new / WEIGHTS_FILE)
        if real.exists():
            if not in_zoo and (real / "README.md").is_file():
                shutil.copy2(real / "README.md", new)
            real.rename(old)
        try:
            new.rename(real)
            if in_zoo:
                record_digest(name, digest)
        except BaseException:
            if not new.exists():
                real.rename(new)
            if old.exists():
                old.rename(real)
            raise
    left_to_do = _record(name, path, facts) if in_zoo else ()
    return Packaged(folder, len(names), read.source, digest, left_to_do)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of train.py, or a safetensors file.

    Raises:
        InputError: If it holds no weights.
        WeightsError: As `read_weights`.
    """
    saved = read_weights(path)
    if path.suffix == ".safetensors":
        return Checkpoint(saved, "its weights", {}, None)
    if not isinstance(saved, dict):
        raise InputError(f"{path} holds no weights")
    options = saved.get("args") or {}
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    if not isinstance(options, dict):
        raise InputError(f"{path} is no checkpoint of train.py: its args are {type(options).__name__}, not options")
    for key, source in (("state_dict_ema", "its EMA weights"), ("state_dict", "its weights")):
        if saved.get(key):
            return Checkpoint(_state(path, saved[key]), source, options, saved.get("epoch"))
    return Checkpoint(_state(path, saved), "its weights", {}, None)


def _state(path: Path, saved: Any) -> dict[str, torch.Tensor]:
    if (
        not saved
        or not isinstance(saved, dict)
        or not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in saved.items())
    ):
        raise InputError(f"{path} holds no weights; accepted: a checkpoint of train.py, or a state dict")
    return clean_state_dict(saved)


def _check_free(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {*FILES}):
        raise InputError(f"{folder} holds something else than {', '.join(FILES)}; it is not replaced")


def _labels(file: Path, by_folders: bool) -> dict[str, str]:
    try:
        # some editors put a mark before the first line
        rows = [line.split("\t") for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        names = dict(rows)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8: {error}") from error
    except ValueError as error:
        raise InputError(f"{file}: every line must be the folder of a class, a tab and its name") from error
    if len(names) != len(rows):
        raise InputError(f"{file} names a class twice")
    # as timm's reader of image folders counts them
    return dict(sorted(names.items(), key=lambda item: natural_key(item[0]))) if by_folders else names


def _class_folders(data: Path) -> dict[str, str]:
    data = data / "train" if (data / "train").is_dir() else data
    if not data.is_dir():
        raise InputError(f"there is no folder {data}")
    _, counted = find_images_and_targets(str(data))  # as train.py does: folders with images, however deep
    if not counted or "" in counted:
        raise InputError(f"{data} must hold folders of images, of which each is a class")
    return {name: re.sub("[-_]+", " ", name) for name in sorted(counted, key=counted.get)}


def _options(path: Path, read: Checkpoint, config: str | Path | None) -> dict[str, Any]:
    beside = path.parent / "args.yaml"
    if config is not None:
        options = read_yaml(Path(config))
    elif read.options or not beside.is_file():
        options = read.options
    else:
        options = read_yaml(beside)
    for key, kind in _KINDS.items():
        if options.get(key) and not isinstance(options[key], kind):
            raise InputError(f"the options of the run have {key}: {options[key]!r}; train.py takes {_NAMES[kind]}")
    if options.get("class_map"):
        raise InputError("the run counted its classes by a --class-map, which is not supported")
    return options


def _fitted(
    read: Checkpoint, options: dict[str, Any], arch: str, tag: str, names: dict[str, str]
) -> tuple[nn.Module, dict[str, Any]]:
    """The model with the weights of the checkpoint, and how its images are prepared."""
    trained = options.get("model") or arch
    if ":" not in trained and trained.partition(".")[0] != arch:
        raise InputError(f"the checkpoint is of {trained}, not of {arch}")
    # as train.py reads them: either sizes with channels, or apart
    channels, *size = options.get("input_size") or (options.get("in_chans"), options.get("img_size"))
    model_kwargs = dict(options.get("model_kwargs") or {})
    if timm.get_pretrained_cfg(arch).fixed_input_size and size != [None]:
        model_kwargs.setdefault("img_size", size[0] if len(size) == 1 else tuple(size))
    try:
        # by the run's own name, whose tag, or whose config.json, says how images are prepared; None is left out
        model = timm.create_model(
            trained,
            num_classes=len(names),
            in_chans=channels,
            global_pool=options.get("gp"),
            bn_eps=options.get("bn_eps"),
            **model_kwargs,
        )
    except Exception as error:  # a name with a colon may point to anything
        raise InputError(f"{trained} cannot be built with the options of the run: {error}") from error
    if model.pretrained_cfg["architecture"] != arch:
        raise InputError(f"the checkpoint is of {trained}, a {model.pretrained_cfg['architecture']}, not of {arch}")
    classifier = model.pretrained_cfg.get("classifier")
    if isinstance(classifier, str) and f"{classifier}.weight" in read.state:
        trained_classes = len(read.state[f"{classifier}.weight"])
        if trained_classes != len(names):
            raise InputError(f"the checkpoint has {trained_classes} classes, {len(names)} are named")
    try:
        check_fits(read.state, model)
    except RuntimeError as error:
        raise InputError(textwrap.shorten(f"the checkpoint does not fit {arch}: {error}", 1000)) from error
    broken = [key for key, value in read.state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise InputError(f"the checkpoint holds infinities or NaN, in {len(broken)} weights: {broken[0]}, ...")
    model.load_state_dict(read.state)

    try:
        data = resolve_input_data_config(model, options)
    except (TypeError, ValueError) as error:
        raise InputError(f"the options of the run do not fit: {error}") from error
    _, height, width = data["input_size"]
    if tuple(data["input_size"]) != tuple(model.pretrained_cfg["input_size"]) and hasattr(model, "feature_info"):
        stride = model.feature_info[-1]["reduction"]
        model.pretrained_cfg["pool_size"] = (-(-height // stride), -(-width // stride))
    model.pretrained_cfg.update(tag=tag, input_size=data["input_size"])
    for key in ("label_names", "label_descriptions", "description", "origin_url"):
        model.pretrained_cfg.pop(key, None)  # of the tag that the run started from, or the default one
    return model, data


def _save(model: nn.Module, data: dict[str, Any], tag: str, names: dict[str, str], folder: Path) -> None:
    described = {
        "pretrained_cfg": {"tag": tag, "num_classes": len(names)},
        "label_names": list(names),
        "label_descriptions": names,
    }
    save_for_hf(model, str(folder), model_config=described, data_config=data, safe_serialization=True)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    # transformers gives the number of classes to timm itself, and chokes where it is given twice
    config.get("model_args", {}).pop("num_classes", None)
    config_file.write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / WEIGHTS_FILE).chmod(config_file.stat().st_mode)  # safetensors writes files for their owner alone


def _facts(
    name: str, dataset: str | None, path: Path, read: Checkpoint, options: dict[str, Any], classes: int
) -> dict[str, Any]:
    """The facts with what the run measured at this epoch; {} if nothing is to be recorded."""
    old = read_yaml(facts_file(name)) if facts_file(name).is_file() else {}
    split = options.get("val_split", "validation")
    if dataset is None and (not old or old.get("split") != split):
        return {}
    # train.py measures no such weights at the end of an epoch
    if path.name.startswith("recovery"):
        raise InputError(f"{path.name} is of the middle of an epoch: nothing measured its accuracy")
    if options.get("model_ema_force_cpu") and read.source == "its EMA weights":
        raise InputError("with --model-ema-force-cpu the run did not measure the accuracy of its EMA weights")
    data = dataset_of(dataset or old["dataset"])
    if data.get("classes", classes) != classes:
        raise InputError(f"the checkpoint has {classes} classes, {data['name']} has {data['classes']}")
    known = data["images"]
    if split not in known:
        raise InputError(f"the run measured the split {split!r} of the data; accepted: {', '.join(known)}")
    log = path.parent / "summary.csv"
    try:
        measured = read_log(log)[read.epoch]
        top1, top5 = (round(measured[key], 2) for key in ("eval_top1", "eval_top5"))
    except (InputError, KeyError) as error:
        raise InputError(f"{log} does not say what was measured at epoch {read.epoch}") from error
    new = {"dataset": dataset or old["dataset"], "split": split, "top1": top1, "top5": top5}
    return {**old, **new, "epoch": read.epoch, "checkpoint": path.name}


def _heading(file: Path) -> str:
    """The comment that a file begins with, which YAML does not read; "" if there is none, or no file."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return "".join(takewhile(lambda line: line.startswith("#"), lines))


def _record(name: str, path: Path, facts: dict[str, Any]) -> tuple[str, ...]:
    """Keep the log and the facts, write the card; returns what is left to do by hand."""
    file, recipe, kept_log = facts_file(name), recipe_file(name), log_file(name)
    arch, _, tag = name.partition(".")
    steps = []
    log = path.parent / "summary.csv"
    if log.is_file():
        write_text(kept_log, log.read_text(encoding="utf-8"))
    if facts and not (file.is_file() and read_yaml(file) == facts):  # what stands there may have comments
        written = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=120)
        write_text(file, _heading(file) + written)
    if not facts:
        steps.append(f"measure it and record that in {file}")
    if not recipe.is_file():
        steps.append(f"write {recipe}")
    try:
        if not facts:
            raise InputError(f"{file} is not of this run")
        write_card(name)
    except InputError as error:
        steps.append(f"timm-ulsam card {name}, when this is mended: {error}")
    if name not in timm.list_pretrained(arch):
        module = timm.models.model_entrypoint(arch).__module__
        steps.append(f"put the tag {tag!r} into default_cfgs of {module}, then timm-ulsam card {name}")
        steps.append(f"or keep it at the Hub alone: timm-ulsam card {name} --org ORG says that in the card")
    return tuple(steps)
