"""Recorded runs: what was measured is in their logs, and what is compared was trained alike."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest
import timm
import yaml
from conftest import REPO

from timm_ulsam.cli import main
from timm_ulsam.errors import InputError
from timm_ulsam.pretrained import recorded_digests
from timm_ulsam.records import facts_file, log_file, read_log, read_yaml, recipe_file, runs, runs_table, start_of
from timm_ulsam.systems import cost

SCRIPTS = os.environ.get("TIMM_SCRIPTS")
NAMES = sorted(file.stem for file in (REPO / "weights/facts").glob("*.yaml"))
PRETRAINED = [name for name in NAMES if name.endswith(".tin200")]
ABLATION = [name for name in NAMES if ".tin200_6ep_g" in name]
FINE_TUNED = [name for name in NAMES if name.endswith((".grocery81", ".tin200_ft_grocery81"))]


def test_every_set_of_weights_is_of_a_recorded_run():
    assert {*recorded_digests()} == {run.name for run in runs() if run.has_weights}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_recorded_is_what_the_log_says(name):
    facts, recipe = read_yaml(facts_file(name)), read_yaml(recipe_file(name))
    assert recipe["experiment"] == name
    assert recipe["model"].partition(".")[0] == name.partition(".")[0]
    assert facts["split"] == recipe.get("val_split", "validation")
    log = read_log(log_file(name))
    assert sorted(log) == list(range(recipe["epochs"]))
    for key in ("top1", "top5"):
        assert abs(log[facts["epoch"]][f"eval_{key}"] - facts[key]) <= 0.05, key
    for seed, top1 in (facts.get("other_seeds") or {}).items():
        log = read_log(log_file(f"{name}.seed{seed}"))
        assert sorted(log) == list(range(recipe["epochs"]))
        assert abs(log[facts["epoch"]]["eval_top1"] - top1) <= 0.05, seed


@pytest.mark.parametrize("name", NAMES)
def test_a_run_started_from_what_its_recipe_loads(name):
    facts, recipe = read_yaml(facts_file(name)), read_yaml(recipe_file(name))
    start = start_of(name, facts, recipe)
    path = recipe.get("pretrained_path")
    loaded = Path(path).parent.name if path else recipe["model"] if recipe.get("pretrained") else None
    assert loaded == start
    assert start is None or start in NAMES


@pytest.mark.parametrize("names", [PRETRAINED, FINE_TUNED], ids=["pretrained", "fine-tuned"])
def test_runs_that_are_compared_differ_in_the_model_and_its_start_only(names):
    assert len(names) > 1
    recipes = [read_yaml(recipe_file(name)) for name in names]
    for recipe in recipes:
        for key in ("model", "experiment", "pretrained", "pretrained_path"):
            recipe.pop(key, None)
    assert all(recipe == recipes[0] for recipe in recipes)
    # of none was the best epoch picked out
    assert all(read_yaml(facts_file(name))["epoch"] == recipes[0]["epochs"] - 1 for name in names)


def test_the_ablation_differs_from_pretraining_in_epochs_and_number_of_subspaces_only():
    recipes = {name: read_yaml(recipe_file(name)) for name in ABLATION}
    assert {recipe.pop("model_kwargs")["num_splits"] for recipe in recipes.values()} == {1, 2, 4, 8, 16}
    (epochs,) = {recipe.pop("epochs") for recipe in recipes.values()}
    pretraining = read_yaml(recipe_file("mobilenetv2_ulsam.tin200"))
    for name, recipe in recipes.items():
        assert {**recipe, "epochs": pretraining["epochs"], "experiment": pretraining["experiment"]} == pretraining
        assert read_yaml(facts_file(name))["epoch"] == epochs - 1


@pytest.mark.parametrize("dataset", ["tiny-imagenet", "grocery-store"])
def test_the_tables_of_runs_are_current(dataset):
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert runs_table(runs(dataset)) in text, f"replace it by what `timm-ulsam list --runs {dataset}` prints"


def test_every_recipe_belongs_to_a_recorded_run():
    assert sorted(file.stem for file in (REPO / "weights/recipes").glob("*.yaml")) == NAMES


def test_runs_as_json(capsys):
    assert main(["list", "--runs", "tiny-imagenet", "--json"]) == 0
    found = {run["name"]: run for run in json.loads(capsys.readouterr().out)}
    ours, plain = found["mobilenetv2_ulsam.tin200"], found["mobilenetv2_100.tin200"]
    assert (ours["has_weights"], plain["has_weights"]) == (True, False)
    assert ours["epochs"] == plain["epochs"]
    assert ours["cost"]["macs"] < 0.9 * plain["cost"]["macs"]


def test_there_are_no_runs_without_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TIMM_ULSAM_WEIGHTS", str(tmp_path))
    with pytest.raises(InputError, match="holds no records of runs: those of a clone are found with pip install -e"):
        runs()
    assert main(["list", "--runs", "tiny-imagenet"]) == 2
    assert "TIMM_ULSAM_WEIGHTS naming its weights/" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "recipe", "message"),
    [
        ("mobilenetv2_100.x", dict(img_size=32), "the facts or the recipe of mobilenetv2_100.x lack 'top5'"),
        ("mobilenetv2_100.x", {}, "the facts or the recipe of mobilenetv2_100.x lack 'img_size'"),
        ("mobilnet.x", dict(img_size=32), "mobilnet cannot be built with the recipe of mobilnet.x: Unknown model"),
        ("mobilenetv2_100.x", dict(img_size=32, model_kwargs=dict(splits=2)), "cannot be built with the recipe"),
        ("mobilenetv2_100.x", dict(img_size=32, pretrained=True), "lacks started_from"),
    ],
)
def test_a_run_that_lacks_something_is_named(name, recipe, message, tmp_path, monkeypatch):
    for folder in ("facts", "recipes"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("TIMM_ULSAM_WEIGHTS", str(tmp_path))
    facts_file(name).write_text("dataset: tiny-imagenet\ntop1: 1.0\n")
    recipe_file(name).write_text(yaml.safe_dump(dict(num_classes=2, epochs=1, **recipe)))
    with pytest.raises(InputError, match=re.escape(message)):
        runs()


@pytest.mark.skipif(not SCRIPTS, reason="TIMM_SCRIPTS does not name a checkout of pytorch-image-models")
@pytest.mark.parametrize("name", NAMES)
def test_recipes_hold_nothing_but_options_of_train_py(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [SCRIPTS, *sys.path])
    spec = importlib.util.spec_from_file_location("train", f"{SCRIPTS}/train.py")
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    accepted = {action.dest for action in train.parser._actions}
    assert {*yaml.safe_load(recipe_file(name).read_text())} <= accepted


def test_a_run_on_gray_images_has_their_cost(checkout, monkeypatch):
    weights, name = checkout / "weights", "mobilenetv2_ulsam_050.gray"
    facts = dict(dataset="tiny-imagenet", split="validation", top1=1.0, top5=5.0)
    recipe = dict(epochs=1, num_classes=200, img_size=64, in_chans=1)
    (weights / "facts" / f"{name}.yaml").write_text(yaml.safe_dump(facts))
    (weights / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setenv("TIMM_ULSAM_WEIGHTS", str(weights))
    (run,) = (run for run in runs("tiny-imagenet") if run.name == name)
    gray = cost(timm.create_model("mobilenetv2_ulsam_050", num_classes=200, in_chans=1, device="meta"), 64, in_chans=1)
    assert run.cost == gray
