"""What a checkout records of training runs, under `weights/`: one run, one name, `<arch>.<tag>`.

`facts/<name>.yaml` says what was measured, `recipes/<name>.yaml` with which options of timm's train.py it was trained,
`logs/<name>.csv` how that went, `datasets.yaml` on what. A run whose weights are kept has a folder `<name>/` as well;
the others, baselines and ablations, are figures only.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import yaml

from .errors import InputError
from .pretrained import OF_A_CLONE, WEIGHTS_FILE, weights_dir
from .systems import Cost, cost
from .tables import markdown


def facts_file(name: str) -> Path:
    """Where the facts of the run `<arch>.<tag>` are recorded."""
    return weights_dir() / "facts" / f"{name}.yaml"


def recipe_file(name: str) -> Path:
    """Where the options of train.py for the run `<arch>.<tag>` are recorded."""
    return weights_dir() / "recipes" / f"{name}.yaml"


def log_file(name: str) -> Path:
    """Where train.py's summary.csv of the run `<arch>.<tag>` is kept."""
    return weights_dir() / "logs" / f"{name}.csv"


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file that holds names and values.

    Raises:
        InputError: If it is missing or something else; names the file.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} must hold names and values")
    return content


def read_log(file: Path) -> dict[int, dict[str, float]]:
    """What train.py's summary.csv says of every epoch, counted from 0.

    Raises:
        InputError: If it cannot be read or is none; names the file.
    """
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            rows = [row for row in csv.DictReader(opened) if row["epoch"] != "epoch"]  # a resumed run writes it again
        return {int(row.pop("epoch")): {key: float(value) for key, value in row.items() if value} for row in rows}
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{file} is no summary.csv of train.py") from error


def dataset_of(key: str) -> dict[str, Any]:
    """What `weights/datasets.yaml` records of a data set.

    Raises:
        InputError: If it is none of them.
    """
    datasets = read_yaml(weights_dir() / "datasets.yaml")
    if key not in datasets:
        raise InputError(f"unknown data set {key!r}; accepted: {', '.join(datasets)}")
    return datasets[key]


def start_of(name: str, facts: dict[str, Any], recipe: dict[str, Any]) -> str | None:
    """Name of the weights that a run started from; None from scratch.

    Raises:
        InputError: If recipe and facts do not say the same.
    """
    start = facts.get("started_from")
    starts = any(recipe.get(key) for key in ("pretrained", "pretrained_path", "initial_checkpoint"))
    if starts and start is None:
        raise InputError(f"{facts_file(name)} lacks started_from: the recipe of {name} starts from weights")
    if start is not None and not starts:
        raise InputError(f"{facts_file(name)} has started_from, but the recipe of {name} starts from scratch")
    return start


@dataclass(frozen=True)
class Run:
    """A recorded training run.

    Attributes:
        name: `<arch>.<tag>`.
        dataset: Key of its data set.
        started_from: Name of the weights that it started from; None from scratch.
        epochs: Number of epochs.
        cost: Of the network with the classes and the image size of the data.
        top1: Top-1 accuracy in percent.
        top5: Top-5 accuracy in percent.
        seeds: Top-1 accuracy in percent of every seed, the recipe's own first.
        has_weights: Whether its weights are kept.
    """

    name: str
    dataset: str
    started_from: str | None
    epochs: int
    cost: Cost
    top1: float
    top5: float
    seeds: tuple[float, ...]
    has_weights: bool


def runs(dataset: str | None = None) -> list[Run]:
    """All recorded runs, or those on one data set.

    Raises:
        InputError: If there are no records (they are not part of an installed package), the data set is none of
            `weights/datasets.yaml`, or a record lacks something.
    """
    folder = weights_dir() / "facts"
    if not folder.is_dir():
        raise InputError(f"{weights_dir()} holds no records of runs: {OF_A_CLONE}")
    if dataset is not None:
        dataset_of(dataset)
    found = [(file.stem, read_yaml(file)) for file in sorted(folder.glob("*.yaml"))]
    return [_run(name, facts) for name, facts in found if dataset in (None, facts.get("dataset"))]


def _run(name: str, facts: dict[str, Any]) -> Run:
    recipe = read_yaml(recipe_file(name))
    arch = name.partition(".")[0]
    try:
        channels = recipe.get("in_chans") or 3
        model_args = {"num_classes": recipe["num_classes"], "in_chans": channels, **(recipe.get("model_kwargs") or {})}
        return Run(
            name=name,
            dataset=facts["dataset"],
            started_from=start_of(name, facts, recipe),
            epochs=recipe["epochs"],
            cost=cost(timm.create_model(arch, device="meta", **model_args), recipe["img_size"], channels),
            top1=facts["top1"],
            top5=facts["top5"],
            seeds=(facts["top1"], *(facts.get("other_seeds") or {}).values()),
            has_weights=(weights_dir() / name / WEIGHTS_FILE).is_file(),
        )
    except KeyError as error:
        raise InputError(f"the facts or the recipe of {name} lack {error}") from error
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{arch} cannot be built with the recipe of {name}: {error}") from error


def runs_table(found: list[Run]) -> str:
    """Markdown table of runs, one a row."""
    head = ("run", "start", "px", "epochs", "parameters", "MACs", "top-1", "top-5", "kept")
    rows = [
        (
            f"`{run.name}`",
            f"`{run.started_from}`" if run.started_from else "scratch",
            str(run.cost.image_size),
            str(run.epochs),
            f"{run.cost.parameters:,}",
            f"{run.cost.macs / 1e6:,.2f}M",
            f"{run.top1:.2f} %{_spread(run.seeds)}",
            f"{run.top5:.2f} %",
            "weights" if run.has_weights else "figures",
        )
        for run in found
    ]
    return markdown(head, rows, numbers=head[2:-1])


def _spread(seeds: tuple[float, ...]) -> str:
    return f" ({min(seeds):.2f} to {max(seeds):.2f} over {len(seeds)} seeds)" if len(seeds) > 1 else ""
