"""Model cards: the README.md of a Hub repository, made from what is recorded of its weights and from nothing else.

`weights/facts/<arch>.<tag>.yaml` records what was measured, `weights/datasets.yaml` the data sets, and
`weights/recipes/<arch>.<tag>.yaml` the options of train.py; the rest comes from the weights, their config.json and the
model.
"""

import json
import textwrap
from pathlib import Path
from typing import Any

import timm
import yaml
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import model_entrypoint

from .errors import InputError
from .files import write_text
from .pretrained import HUB_ORG, WEIGHTS_FILE, file_digest, recorded_digests, weights_dir
from .records import dataset_of, facts_file, read_yaml, recipe_file, start_of
from .systems import cost, system_of

# arguments of a model that its entrypoint does not speak of
_OF_ANY_MODEL = ("num_classes", "in_chans", "img_size", "global_pool", "bn_eps", "drop_rate", "drop_path_rate")
_TIMM = "[timm](https://github.com/huggingface/pytorch-image-models)"


def card(name: str, org: str = HUB_ORG) -> str:
    """The model card of the weights `<arch>.<tag>`.

    Args:
        name: Of the weights.
        org: Organization or user at the Hub whose repository they become; the card of a tag that timm does not know
            names it.

    Raises:
        InputError: If the facts, the recipe, the weights or an entry of them are missing or unfit; names what.
    """
    folder = weights_dir() / name
    if not (folder / WEIGHTS_FILE).is_file():
        cfg = timm.get_pretrained_cfg(name) if timm.is_model_pretrained(name) else None
        said = f": {cfg.description}" if cfg and cfg.description else ""
        raise InputError(f"there are no weights {name!r} in {weights_dir()}, so they have no card{said}")
    facts = read_yaml(facts_file(name))
    recipe = read_yaml(recipe_file(name))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _head(name, org, facts, config) + _text(name, org, facts, recipe, config)
    except KeyError as error:
        raise InputError(f"the facts or the recipe of {name} lack {error}") from error
    except InputError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"the facts, the recipe or config.json of {name} are not as they must be: {error}") from error


def write_card(name: str, org: str = HUB_ORG) -> Path:
    """Write the model card into the folder of the weights; returns the file.

    Args and raises as for `card`.
    """
    file = weights_dir() / name / "README.md"
    write_text(file, card(name, org))
    return file


def _head(name: str, org: str, facts: dict[str, Any], config: dict[str, Any]) -> str:
    data = dataset_of(facts["dataset"])
    measured = {"top-1": facts["top1"], "top-5": facts["top5"]}
    split = data.get("hub_splits", {}).get(facts["split"], facts["split"])
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": data["name"], "type": data.get("hub", facts["dataset"]), "split": split},
        "metrics": [{"type": "accuracy", "name": key, "value": value} for key, value in measured.items()],
    }
    head: dict[str, Any] = {
        "library_name": "timm",
        "license": config["pretrained_cfg"]["license"],
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "timm-ulsam"],
        # a data set that is not at the Hub would be a link to nothing
        **({"datasets": [data["hub"]]} if "hub" in data else {}),
        "metrics": ["accuracy"],
    }
    start = facts.get("started_from")
    if start and timm.is_model_pretrained(start):
        head["base_model"] = timm.get_pretrained_cfg(start).hf_hub_id  # of an initialization, timm's own repository
    elif start in recorded_digests():
        head["base_model"] = f"{org}/{start}"
    head["model-index"] = [{"name": name, "results": [result]}]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"


def _text(name: str, org: str, facts: dict[str, Any], recipe: dict[str, Any], config: dict[str, Any]) -> str:
    arch = config["architecture"]
    data, cfg = dataset_of(facts["dataset"]), config["pretrained_cfg"]
    folder_of_data, split, (channels, _, size) = facts["dataset"], facts["split"], cfg["input_size"]
    system = system_of(arch)
    papers = ", ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in system.papers)
    model_args = {**config.get("model_args", {}), "num_classes": config["num_classes"]}
    model_cost = cost(timm.create_model(arch, device="meta", **model_args), size, channels)
    file = weights_dir() / name / WEIGHTS_FILE
    started_from = start_of(name, facts, recipe)
    start = f"fine-tuned from `{started_from}`" if started_from else "trained from scratch"
    by_name = name if timm.is_model_pretrained(name) else f"hf-hub:{org}/{name}"
    run = f"seed {recipe['seed']}" if facts.get("other_seeds") else f"one run, seed {recipe['seed']}"
    measured = f"the {data['images'][split]:,} {split} images of {data['name']}"

    hardware = f" on {facts['hardware']}" if "hardware" in facts else ""
    described = _described(arch, config.get("model_args", {}))
    summary = f"""{described} The system is {system.name}, {papers}: {system.changes}. These weights were {start} on
        {data["name"]} at {size} px. A model of {_TIMM} with the plugin timm-ulsam installed."""
    trained = f"""{recipe["epochs"]} epochs{hardware} with timm's train.py and the recipe
        `weights/recipes/{name}.yaml` of the timm-ulsam repository, {run}; the log is
        `weights/logs/{name}.csv`. {_which_epoch(facts, recipe)}"""
    device = f"""Add `--device cpu` to validate.py where there is no GPU. `{folder_of_data}/` is an ImageFolder tree:
        {data["tree"]}."""
    authors = f"{facts['authors']}: " if "authors" in facts else ""
    venue = f"{facts['venue']}. " if "venue" in facts else ""
    paper = f"{authors}*{cfg['paper_name']}*. {venue}{papers}."
    if not isinstance(facts.get("notes", []), list):
        raise InputError(f"notes in the facts of {name} must be a list")
    notes = "\n".join(_wrapped(note, "- ", "  ") for note in [*facts.get("notes", []), *_terms(facts)])
    return f"""# {name}

{_wrapped(summary)}

| | |
| --- | --- |
| top-1 / top-5 | **{facts["top1"]:.2f} % / {facts["top5"]:.2f} %** on {measured} |
| classes | {config["num_classes"]}, labelled by {data["labels"]}; their English names are in `config.json` |
| parameters | {model_cost.parameters:,} |
| multiply-adds | {model_cost.macs / 1e6:,.2f}M at {size}x{size} |
| input | {_input(cfg)} |
| file | `{WEIGHTS_FILE}`, {file.stat().st_size / 1e6:.1f} MB, SHA-256 `{file_digest(file)}` |

```python
import timm

model = timm.create_model("{by_name}", pretrained=True).eval()
# to fine-tune on 10 classes
model = timm.create_model("{by_name}", pretrained=True, num_classes=10)
```

## How it was trained and measured

{_wrapped(trained)}

```sh
python train.py --config weights/recipes/{name}.yaml --data-dir {folder_of_data}
python validate.py --data-dir {folder_of_data} --split {split} --model {by_name} --pretrained
```

{_wrapped(device)}

## What to know

{notes}

## Paper

{_wrapped(paper)}
"""


def _described(arch: str, model_args: dict[str, Any]) -> str:
    """What the model is: in the words of its entrypoint, unless it was built otherwise."""
    other = {key: value for key, value in model_args.items() if key not in _OF_ANY_MODEL}
    if other:
        return f"`{arch}` built with {', '.join(f'`{key}={value!r}`' for key, value in other.items())}."
    return (model_entrypoint(arch).__doc__ or f"{arch}.").strip().splitlines()[0]


def _which_epoch(facts: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Which epoch's weights they are, and whether that was chosen by what was measured."""
    checkpoint, epoch = facts["checkpoint"], facts["epoch"]
    is_last = epoch == recipe["epochs"] - 1
    where = f"(`{checkpoint}`, epoch {epoch}, counted from 0)"
    if checkpoint.startswith("model_best"):
        chosen = f"The weights are those of the epoch with the best accuracy on the {facts['split']} images {where}"
        chosen += ", which is the last." if is_last else "."
    elif checkpoint.startswith("last") and is_last:
        chosen = f"The weights are those of the last epoch {where}: none was chosen by its accuracy."
    else:
        chosen = f"The weights are those of one epoch {where}."
    if facts.get("other_seeds"):
        others = ", ".join(f"{top1:.2f} % with seed {seed}" for seed, top1 in facts["other_seeds"].items())
        chosen += f" The same recipe gave {others}."
    return chosen


def _terms(facts: dict[str, Any]) -> list[str]:
    """Terms of the data, and of the data that the weights before these were trained on."""
    terms = [dataset_of(facts["dataset"])["terms"]]
    start = facts.get("started_from")
    if start and facts_file(start).is_file():
        terms += [t for t in _terms(read_yaml(facts_file(start))) if t not in terms]
    return terms


def _input(cfg: dict[str, Any]) -> str:
    height, width = cfg["input_size"][1:]
    if (tuple(cfg["mean"]), tuple(cfg["std"])) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        normalization = "ImageNet mean and standard deviation"
    else:
        normalization = f"mean {tuple(cfg['mean'])}, standard deviation {tuple(cfg['std'])}"
    share = "the whole shorter side" if cfg["crop_pct"] == 1 else "of the shorter side"
    return f"{height}x{width}, {cfg['interpolation']}, {share} (`crop_pct` {cfg['crop_pct']}), {normalization}"


def _wrapped(text: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()),
        width=120,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
