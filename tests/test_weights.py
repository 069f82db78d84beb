import csv
import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import REPO
from safetensors.torch import load_file

from timm_ulsam import pretrained
from timm_ulsam.pretrained import WeightsError, checked_cfg, recorded_digests, weights_dir
from timm_ulsam.zoo import model_names

NAMES = sorted(recorded_digests())
DEFAULT = "mobilenetv2_ulsam.tin200_96"


@pytest.fixture
def zoo_copy(tmp_path, monkeypatch):
    """A copy of the weights that a test may damage, in the place of the real ones."""
    folder = tmp_path / "weights"
    shutil.copytree(weights_dir(), folder, ignore=shutil.ignore_patterns("logs", "recipes"))
    monkeypatch.setattr(pretrained, "weights_dir", lambda: folder)
    return folder


def overlay(folder):
    return dict(file=str(folder / DEFAULT / "model.safetensors"))


def test_the_first_weights_are_recorded():
    assert DEFAULT in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_weights_load_and_tell_what_they_are(name):
    model = timm.create_model(name, pretrained=True).eval()
    cfg = model.pretrained_cfg
    assert f"{cfg['architecture']}.{cfg['tag']}" == name
    assert cfg["hf_hub_id"] == f"timm-ulsam/{name}"
    assert model.num_classes == cfg["num_classes"] == len(cfg["label_names"]) == len(cfg["label_descriptions"])
    assert set(cfg["label_names"]) == set(cfg["label_descriptions"])
    state = load_file(weights_dir() / name / "model.safetensors")
    first = f"{cfg['first_conv']}.weight"
    assert torch.equal(model.state_dict()[first], state[first])
    assert model(torch.randn(1, *cfg["input_size"])).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_is_the_hub_repository_and_nothing_else(name):
    folder = REPO / "weights" / name
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    local = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    by_name = timm.create_model(name, pretrained=True).eval()
    x = torch.randn(1, *local.pretrained_cfg["input_size"])
    assert torch.equal(local(x), by_name(x))


@pytest.mark.parametrize("name", NAMES)
def test_the_published_config_is_what_timm_knows(name):
    published = json.loads((REPO / "weights" / name / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
    known = timm.get_pretrained_cfg(name).to_dict()
    for key in ("num_classes", "input_size", "pool_size", "crop_pct", "interpolation", "mean", "std", "first_conv"):
        assert tuple(np.atleast_1d(published[key])) == tuple(np.atleast_1d(known[key])), key


@pytest.mark.parametrize("name", NAMES)
def test_the_card_states_what_was_measured_and_the_commands(name):
    card = (REPO / "weights" / name / "README.md").read_text(encoding="utf-8")
    top1 = pretrained.card_metrics(name)["top-1"]
    assert f"**{top1:.2f} %" in card
    assert f"\npython train.py --config weights/recipes/{name}.yaml --data-dir " in card
    assert re.search(rf"\npython validate\.py --data-dir .* --model {name} --pretrained\n", card)
    recipe, facts = (yaml.safe_load((REPO / "weights" / kind / f"{name}.yaml").open()) for kind in ("recipes", "facts"))
    rows = csv.DictReader((REPO / "weights/logs" / f"{name}.csv").open())
    log = {int(row["epoch"]): row for row in rows if row["epoch"] != "epoch"}  # a resumed run writes its own head
    if facts["split"] == recipe.get("val_split", "validation"):
        assert abs(float(log[facts["epoch"]]["eval_top1"]) - top1) <= 0.3


@pytest.mark.skipif("TINY_IMAGENET" not in os.environ, reason="TINY_IMAGENET does not name the unpacked Tiny ImageNet")
@pytest.mark.parametrize("name", [name for name in NAMES if "_ft_" not in name])
def test_weights_reach_the_cards_accuracy(name):
    model = timm.create_model(name, pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    dataset = timm.data.create_dataset("", root=os.environ["TINY_IMAGENET"], split="validation")
    loader = timm.data.create_loader(
        dataset, batch_size=250, is_training=False, use_prefetcher=False, num_workers=1, **data
    )
    with torch.inference_mode():
        right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
    assert abs(100 * right / len(dataset) - pretrained.card_metrics(name)["top-1"]) <= 0.3


def bytes_in(path):
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def test_the_weights_in_the_repository_stay_small():
    assert sum(bytes_in(file) for file in (REPO / "weights").rglob("*.safetensors")) < 100e6


def test_there_are_no_weights_but_safetensors():
    found = {file.suffix for folder in NAMES for file in (REPO / "weights" / folder).iterdir()}
    assert found == {".safetensors", ".json", ".md"}
    assert sorted(file.parent.name for file in (REPO / "weights").rglob("*.safetensors")) == NAMES


def test_the_wheel_carries_the_default_weights_only_and_stays_small():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    build = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    wheel = build["targets"]["wheel"]
    for source, place in wheel["force-include"].items():
        assert place == f"timm_ulsam/{source}"
    assert {
        name for name in NAMES if not {f"weights/{name}", f"weights/{name}/config.json"} & {*wheel["force-include"]}
    } == set()
    carried = {source.split("/")[1] for source in wheel["force-include"] if bytes_in(REPO / source) > 1e6}
    defaults = {f"{cfg.architecture}.{cfg.tag}" for cfg in map(timm.get_pretrained_cfg, model_names())}
    assert carried == defaults & {*NAMES}
    modules = sum(bytes_in(file) for package in wheel["packages"] for file in (REPO / package).rglob("*.py"))
    assert modules + sum(bytes_in(REPO / source) for source in wheel["force-include"]) < 40e6


def test_the_default_tag_is_the_most_accurate_one():
    model = timm.create_model("mobilenetv2_ulsam", pretrained=True)
    on_the_same_classes = [name for name in NAMES if name.startswith("mobilenetv2_ulsam.") and "_ft_" not in name]
    best = max(on_the_same_classes, key=lambda name: pretrained.card_metrics(name)["top-1"])
    assert f"mobilenetv2_ulsam.{model.pretrained_cfg['tag']}" == best == DEFAULT
    # the weights of an initialization are timm's: nothing of it is stored here
    assert [name for name in timm.list_pretrained("*ulsam*") if not name.endswith("_init")] == NAMES


def test_fine_tuning_starts_from_everything_but_the_head():
    trained = timm.create_model("mobilenetv2_ulsam", pretrained=True).state_dict()
    model = timm.create_model("mobilenetv2_ulsam", pretrained=True, num_classes=81, in_chans=1, drop_path_rate=0.1)
    state = model.state_dict()
    assert state["classifier.weight"].shape == (81, 1280)
    assert state["conv_stem.weight"].shape[1] == 1
    for key, value in trained.items():
        if not key.startswith(("classifier", "conv_stem")):
            assert torch.equal(state[key], value), key


def test_pretrained_features_are_those_of_the_model():
    model = timm.create_model("mobilenetv2_ulsam", pretrained=True).eval()
    features = timm.create_model("mobilenetv2_ulsam", pretrained=True, features_only=True).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, intermediates_only=True)
    for ours, theirs in zip(features(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("damage", ["truncate", "flip"])
@pytest.mark.parametrize("name", [DEFAULT, "mobilenetv2_ulsam"])
def test_a_damaged_file_is_refused_by_name_and_digests(damage, name, zoo_copy):
    file = zoo_copy / DEFAULT / "model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        del content[len(content) // 2 :]
    else:
        content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightsError) as refused:
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay(zoo_copy))
    message = str(refused.value)
    found = pretrained.hashlib.sha256(content).hexdigest()
    assert str(file) in message
    assert recorded_digests()[DEFAULT] in message
    assert found in message
    with pytest.raises(WeightsError, match=found):
        timm.create_model(f"local-dir:{file.parent}", pretrained=True)


def test_a_damaged_file_is_refused_through_a_link(zoo_copy, tmp_path):
    file = zoo_copy / DEFAULT / "model.safetensors"
    (tmp_path / "elsewhere").write_bytes(file.read_bytes()[:-1])
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match="truncated or altered"):
        timm.create_model(DEFAULT, pretrained=True, pretrained_cfg_overlay=overlay(zoo_copy))


@pytest.mark.parametrize("record", [None, "", "no record\nat all\n"])
def test_weights_of_the_zoo_without_a_readable_record_are_refused(record, zoo_copy):
    (zoo_copy / "SHA256SUMS").unlink()
    if record is not None:
        (zoo_copy / "SHA256SUMS").write_text(record)
    recorded_digests.cache_clear()
    try:
        with pytest.raises(WeightsError, match="SHA256SUMS"):
            timm.create_model(DEFAULT, pretrained=True, pretrained_cfg_overlay=overlay(zoo_copy))
    finally:
        recorded_digests.cache_clear()


def test_a_truncated_file_that_a_user_names_is_refused_by_name(tmp_path):
    shutil.copytree(weights_dir() / DEFAULT, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=f"{file} is not a whole safetensors file"):
        timm.create_model(f"local-dir:{file.parent}", pretrained=True)


@pytest.mark.parametrize("source", [dict(hf_hub_id="someone/else"), dict(url="file:///nowhere/else.safetensors")])
def test_another_source_that_a_user_names_is_the_one_taken(source, monkeypatch):
    file = str(weights_dir() / DEFAULT / "model.safetensors")
    monkeypatch.setattr(pretrained, "hf_hub_download", lambda repo, *_, **__: {"someone/else": file}[repo])
    taken = {}

    def load(model, pretrained_cfg, **kwargs):
        taken.update(pretrained_cfg)

    monkeypatch.setattr(timm.models._builder, "load_pretrained", load)
    timm.create_model("mobilenetv2_ulsam", pretrained=True, pretrained_cfg_overlay=source)
    found = {k: taken[k] for k in ("file", "hf_hub_id", "url") if k in taken}
    assert found == ({**source, "file": file} if "hf_hub_id" in source else source)


def test_a_zoo_without_its_weights_folder_still_knows_the_models(tmp_path, python):
    shutil.copytree(REPO / "timm_ulsam", tmp_path / "timm_ulsam")
    done = python(
        "import timm_ulsam, timm; m = timm.create_model('mobilenetv2_ulsam')\n"
        "print(m.num_classes, m.pretrained_cfg['hf_hub_id'])",
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert done.stdout.split() == ["200", f"timm-ulsam/{DEFAULT}"]


def test_one_broken_folder_costs_its_class_names_and_no_model(tmp_path, python):
    shutil.copytree(REPO / "weights", tmp_path / "weights", ignore=shutil.ignore_patterns("*.safetensors"))
    broken = tmp_path / "weights" / DEFAULT / "config.json"
    broken.write_text(broken.read_text()[:100])
    done = python(
        "import timm; m = timm.create_model('mobilenetv2_ulsam'); s = timm.create_model('mobilenetv2_ulsam_s')\n"
        "print(m.pretrained_cfg.get('label_names'), len(s.pretrained_cfg['label_names']))",
        TIMM_ULSAM_WEIGHTS=str(tmp_path / "weights"),
    )
    assert done.stdout.split() == ["None", "200"]
    assert f"{DEFAULT} goes without class names: cannot read {broken}" in done.stderr


def test_a_folder_that_holds_no_weights_of_the_zoo_is_told(tmp_path, python):
    done = python("import timm; timm.create_model('mobilenetv2_ulsam')", TIMM_ULSAM_WEIGHTS=str(tmp_path))
    assert done.stderr.count(f"TIMM_ULSAM_WEIGHTS='{tmp_path}' holds no SHA256SUMS") == 1


def test_weights_that_a_user_names_are_not_compared(tmp_path):
    model = timm.create_model("mobilenetv2_ulsam", pretrained=True)
    torch.nn.init.zeros_(model.classifier.bias)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.classifier.bias.abs().sum() == 0
    other = timm.create_model(
        "mobilenetv2_ulsam", pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "model.safetensors"))
    )
    assert other.classifier.bias.abs().sum() == 0


@pytest.mark.parametrize("damaged", [False, True])
def test_what_is_not_at_hand_comes_checked_from_the_hub(damaged, zoo_copy, tmp_path, monkeypatch):
    cached = tmp_path / "cache" / "model.safetensors"
    cached.parent.mkdir()
    content = (zoo_copy / DEFAULT / "model.safetensors").read_bytes()
    cached.write_bytes(content[:-1] if damaged else content)
    asked = []

    def download(repo_id, filename, **kwargs):
        asked.append((repo_id, filename))
        return str(cached)

    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    if damaged:
        with pytest.raises(WeightsError, match=str(cached)):
            timm.create_model(DEFAULT, pretrained=True, pretrained_cfg_overlay=dict(file=None))
    else:
        timm.create_model(DEFAULT, pretrained=True, pretrained_cfg_overlay=dict(file=None))
    assert asked == [(f"timm-ulsam/{DEFAULT}", "model.safetensors")]


def test_offline_and_from_any_directory(python):
    done = python(
        "import timm, json; m = timm.create_model('mobilenetv2_ulsam', pretrained=True)\n"
        "print(json.dumps([m.num_classes, m.pretrained_cfg['file']]))",
        HF_HUB_OFFLINE="1",
    )
    classes, file = json.loads(done.stdout)
    assert classes == 200
    assert file.endswith(f"{DEFAULT}/model.safetensors")


def test_a_model_without_weights_says_so():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for mobilenetv2_ulsam_050"):
        timm.create_model("mobilenetv2_ulsam_050", pretrained=True)


def test_a_cfg_of_a_url_passes_unchanged():
    cfg = dataclasses.replace(timm.get_pretrained_cfg("mobilenetv2_100"), hf_hub_id=None, url="https://nowhere/w.pth")
    assert checked_cfg(cfg) is cfg


def test_a_relative_folder_of_weights_does_not_depend_on_where_the_process_goes(python, tmp_path):
    (tmp_path / "weights").symlink_to(REPO / "weights", target_is_directory=True)
    code = "import os; os.environ['TIMM_ULSAM_WEIGHTS'] = 'weights'; import timm; os.chdir('/')\n"
    code += "print(timm.create_model('mobilenetv2_ulsam.tin200', pretrained=True).num_classes)"
    assert python(code).stdout.strip() == "200"
