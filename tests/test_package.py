import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import REPO, own_environment
from safetensors.torch import load_file, save_file

from timm_ulsam.card import card
from timm_ulsam.cli import main
from timm_ulsam.errors import InputError, WeightsError
from timm_ulsam.package import package as package_checkpoint
from timm_ulsam.pretrained import file_digest, recorded_digests, weights_dir
from timm_ulsam.records import facts_file, recipe_file

NAMES = sorted(recorded_digests())
ARCH = "mobilenetv2_ulsam_050"
LABELS = "b10\tten\nb9\tnine\nA\tletter\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What train.py leaves of a run: a checkpoint with EMA weights, options in it, the log."""
    folder = tmp_path_factory.mktemp("run")
    options = dict(model=ARCH, num_classes=3, img_size=48, crop_pct=0.9, mean=[0.5], model_kwargs=dict(num_splits=2))
    model = timm.create_model(ARCH, num_classes=3, num_splits=2)
    ema = {key: value + 1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    saved = dict(epoch=1, arch=ARCH, state_dict=model.state_dict(), state_dict_ema=ema, version=2, metric=50.0)
    torch.save({**saved, "args": argparse.Namespace(**options)}, folder / "model_best.pth.tar")
    (folder / "summary.csv").write_text(
        "epoch,eval_top1,eval_top5\n0,10.0,20.0\nepoch,eval_top1,eval_top5\n1,50.0,99.999\n"
    )
    (folder / "labels.txt").write_text(LABELS)
    save_file(model.state_dict(), folder / "plain.safetensors")
    return folder


@pytest.fixture
def checkout(checkout):
    """Its data sets have the three classes of the run."""
    file = checkout / "weights" / "datasets.yaml"
    file.write_text(re.sub(r"classes: \d+", "classes: 3", file.read_text(encoding="utf-8")), encoding="utf-8")
    return checkout


def package(capsys, run, *argv, checkpoint="model_best.pth.tar", arch=ARCH, labels=True):
    names = ["--labels", str(run / "labels.txt")] if labels else []
    code = main(["package", str(run / checkpoint), "--arch", arch, "--tag", "test", *names, *map(str, argv)])
    return code, *capsys.readouterr()


def test_a_checkpoint_becomes_a_repository_that_timm_loads(run, capsys, tmp_path):
    folder = tmp_path / "new"
    code, out, err = package(capsys, run, "--output", folder)
    assert code == 0, err
    assert out == (f"{folder}: 3 classes, its EMA weights, SHA-256 {file_digest(folder / 'model.safetensors')}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    saved = torch.load(run / "model_best.pth.tar", weights_only=False)["state_dict_ema"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, saved[key]), key
    cfg = model.pretrained_cfg
    assert (tuple(cfg["input_size"]), tuple(cfg["pool_size"]), cfg["crop_pct"]) == ((3, 48, 48), (2, 2), 0.9)
    assert tuple(cfg["mean"]) == (0.5, 0.5, 0.5)
    assert list(cfg["label_names"]) == ["A", "b9", "b10"]  # timm's order of folders: numbers as numbers, no case
    assert cfg["label_descriptions"]["b10"] == "ten"
    assert cfg["tag"] == "test"


def test_the_published_weights_come_out_of_a_safetensors_file_again(capsys, tmp_path, run):
    published = REPO / "weights/mobilenetv2_ulsam.tin200"
    config = json.loads((published / "config.json").read_text(encoding="utf-8"))
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{k}\t{v}\n" for k, v in config["label_descriptions"].items()))
    recipe = REPO / "weights/recipes/mobilenetv2_ulsam.tin200.yaml"
    argv = [str(published / "model.safetensors"), "--arch", "mobilenetv2_ulsam", "--tag", "tin200"]
    argv += ["--labels", str(labels), "--config", str(recipe), "--output", str(tmp_path / "again")]
    assert main(["package", *argv]) == 0, capsys.readouterr().err
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (published / file).read_bytes(), file


def test_classes_are_the_folders_of_the_data(run, capsys, tmp_path):
    for name in ("Fruit/Apple/Red-Apple", "Fruit/pear", "Green_Apple"):  # those of images, as timm's reader has it
        (tmp_path / "data/train" / name).mkdir(parents=True)
        (tmp_path / "data/train" / name / "1.jpg").touch()
    argv = ["--data-dir", tmp_path / "data", "--output", tmp_path / "new"]
    assert package(capsys, run, *argv, labels=False)[0] == 0
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config["label_names"] == ["Green_Apple", "pear", "Red-Apple"]
    assert config["label_descriptions"]["Red-Apple"] == "Red Apple"


def test_options_come_from_beside_a_file_that_holds_none(run, capsys, tmp_path):
    (run / "args.yaml").write_text(yaml.safe_dump(dict(model=ARCH, img_size=96, model_kwargs=dict(num_splits=2))))
    code, _, err = package(capsys, run, "--output", tmp_path / "new", checkpoint="plain.safetensors")
    (run / "args.yaml").unlink()
    assert code == 0, err
    assert json.loads((tmp_path / "new/config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 96, 96]
    state = load_file(tmp_path / "new/model.safetensors")
    assert torch.equal(state["classifier.bias"], load_file(run / "plain.safetensors")["classifier.bias"])


def save_run(folder: Path, trained, **options) -> Path:
    """A checkpoint of train.py with these options."""
    saved = dict(epoch=0, state_dict=trained.state_dict(), args=argparse.Namespace(num_classes=3, **options))
    torch.save(saved, folder / "last.pth.tar")
    return folder / "last.pth.tar"


def loaded(folder: Path):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize(
    ("start", "mean", "crop"),
    [
        ("mobilenetv2_ulsam.ra_in1k_init", 0.485, 0.875),
        ("mobilenetv1_ulsam.ra4_e3600_r224_in1k_init", 0.5, 0.875),
        ("mobilenetv2_ulsam_l", 0.485, 0.875),
    ],
)
def test_images_are_prepared_as_the_tag_does_that_the_run_started_from(start, mean, crop, run, capsys, tmp_path):
    model = timm.create_model(start, num_classes=3)
    checkpoint = save_run(tmp_path, model, model=start)
    arch = start.partition(".")[0]
    code, _, err = package(capsys, run, "--output", tmp_path / "new", checkpoint=checkpoint, arch=arch)
    assert code == 0, err
    cfg = loaded(tmp_path / "new").pretrained_cfg
    assert (tuple(cfg["input_size"]), cfg["mean"][0], cfg["crop_pct"]) == ((3, 224, 224), mean, crop)
    assert cfg["tag"] == "test"
    assert not {"description", "origin_url"} & {key for key, value in cfg.items() if value}  # of an initialization


def test_gray_images_and_the_eps_of_batch_norms_are_kept(run, capsys, tmp_path):
    model = timm.create_model(ARCH, num_classes=3, in_chans=1, bn_eps=0.01).eval()
    checkpoint = save_run(tmp_path, model, model=ARCH, img_size=32, in_chans=1, bn_eps=0.01)
    code, _, err = package(capsys, run, "--output", tmp_path / "new", checkpoint=checkpoint)
    assert code == 0, err
    again, x = loaded(tmp_path / "new"), torch.randn(2, 1, 32, 32)
    assert torch.equal(again(x), model(x))
    cfg = again.pretrained_cfg
    assert tuple(cfg["input_size"]) == (1, 32, 32)
    assert cfg["mean"] == pytest.approx([(0.485 + 0.456 + 0.406) / 3])  # of timm's loader
    assert cfg["std"] == pytest.approx([(0.229 + 0.224 + 0.225) / 3])


@pytest.mark.parametrize("options", [dict(input_size=[1, 32, 40]), dict(in_chans=1)])
def test_channels_and_size_are_found_where_the_run_has_them(options, run, capsys, tmp_path):
    model = timm.create_model(ARCH, num_classes=3, in_chans=1).eval()
    checkpoint = save_run(tmp_path, model, model=ARCH, **options)
    code, _, err = package(capsys, run, "--output", tmp_path / "new", checkpoint=checkpoint)
    assert code == 0, err
    again, x = loaded(tmp_path / "new"), torch.randn(2, 1, 32, 40)
    assert torch.equal(again(x), model(x))
    assert list(again.pretrained_cfg["input_size"]) == options.get("input_size", [1, 224, 224])


@pytest.mark.parametrize("options", [dict(img_size=64), dict(model_kwargs=dict(img_size=64))])
def test_a_model_for_one_size_is_packaged_at_that_of_the_run(options, run, capsys, tmp_path):
    arch, sizes = "repmlpnet_t224", dict(partition_sizes=(8, 4, 2, 1))
    options = dict(options, model_kwargs={**sizes, **options.get("model_kwargs", {})})
    model = timm.create_model(arch, num_classes=3, img_size=64, **sizes).eval()
    checkpoint = save_run(tmp_path, model, model=arch, **options)
    code, _, err = package(capsys, run, "--output", tmp_path / "new", checkpoint=checkpoint, arch=arch)
    assert code == 0, err
    again, x = loaded(tmp_path / "new"), torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    assert again.pretrained_cfg["input_size"][-2:] == (64, 64)


def test_the_folder_may_be_a_link_but_not_the_current_one(run, capsys, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert package(capsys, run, "--output", tmp_path / "link")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/model.safetensors").is_file()
    monkeypatch.chdir(tmp_path / "real")
    code, _, err = package(capsys, run, "--output", ".")
    assert code == 2
    assert "--output . is the current folder" in err


def test_what_was_there_is_back_where_the_new_cannot_be_put(run, capsys, tmp_path, monkeypatch):
    folder = tmp_path / "new"
    assert package(capsys, run, "--output", folder)[0] == 0
    before = file_digest(folder / "model.safetensors")
    rename = Path.rename

    def fails(self, target):
        if self.name == "new" and self != folder:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    assert package(capsys, run, "--output", folder, checkpoint="plain.safetensors")[0] == 2
    assert file_digest(folder / "model.safetensors") == before
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("broken", [b"half\n", b"\xff", b"one two three\n"])
def test_what_was_there_is_back_where_the_digest_cannot_be_recorded(broken, run, cards):
    cards("last.pth.tar")
    sums, folder = weights_dir() / "SHA256SUMS", weights_dir() / f"{ARCH}.test"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sums.write_bytes(sums.read_bytes() + broken * 2)
    recorded_digests.cache_clear()
    checkpoint = weights_dir().parent / "run" / "last.pth.tar"
    saved = torch.load(checkpoint, weights_only=False)
    torch.save({**saved, "state_dict_ema": None}, checkpoint)  # other weights
    with pytest.raises(WeightsError, match="cannot read the digests"):
        package_checkpoint(checkpoint, ARCH, "test", labels=run / "labels.txt")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not list(weights_dir().glob(".package-*"))


def test_two_processes_lose_none_of_their_digests(cards):
    code = (
        "import sys\n"
        "from timm_ulsam.pretrained import record_digest\n"
        "print('ready', flush=True)\n"
        "input()\n"
        "for i in range(50): record_digest(f'mobilenetv2_ulsam.{sys.argv[1]}{i}', '0' * 64)"
    )
    env = {**os.environ, "TIMM_ULSAM_WEIGHTS": str(weights_dir())}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    both = [subprocess.Popen([sys.executable, "-c", code, name], env=env, **pipes) for name in ("a", "b")]
    for process in both:
        assert process.stdout.readline().strip() == b"ready"
    for process in both:
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert [process.wait() for process in both] == [0, 0]
    recorded_digests.cache_clear()
    assert {f"mobilenetv2_ulsam.{name}{i}" for name in "ab" for i in range(50)} <= {*recorded_digests()}


def test_blank_lines_between_digests_are_nothing(cards):
    sums = weights_dir() / "SHA256SUMS"
    sums.write_text(sums.read_text() + "\n\n")
    cards("last.pth.tar")
    assert f"{ARCH}.test" in recorded_digests()


def test_a_run_that_goes_on_from_a_packaged_one_is_packaged(run, capsys, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert package(capsys, run, "--output", first)[0] == 0
    model = loaded(first)
    checkpoint = save_run(tmp_path, model, model=f"local-dir:{first}")
    code, _, err = package(capsys, run, "--output", second, checkpoint=checkpoint)
    assert code == 0, err
    again, x = loaded(second), torch.randn(2, 3, 48, 48)
    assert torch.equal(again(x), model(x))  # of 2 subspaces, as the first one's config.json has it
    assert again.pretrained_cfg["crop_pct"] == 0.9
    code, _, err = package(capsys, run, "--output", second, checkpoint=checkpoint, arch="mobilenetv2_ulsam")
    assert code == 2
    assert f"local-dir:{first}, a {ARCH}, not of mobilenetv2_ulsam" in err


def test_a_card_of_ones_own_is_kept(run, capsys, tmp_path):
    folder = tmp_path / "new"
    assert package(capsys, run, "--output", folder)[0] == 0
    (folder / "README.md").write_text("mine")
    assert package(capsys, run, "--output", folder)[0] == 0
    assert (folder / "README.md").read_text() == "mine"


def test_classes_of_other_readers_keep_the_order_of_their_names(run, capsys, tmp_path):
    options = dict(model=ARCH, img_size=48, model_kwargs=dict(num_splits=2))
    checkpoint = save_run(tmp_path, timm.create_model(ARCH, num_classes=3, num_splits=2), **options, dataset="hfds/a/b")
    (tmp_path / "words.txt").write_text("\ufeff" + LABELS, encoding="utf-8")  # an editor's mark is no part of a name
    argv = ["--output", tmp_path / "new", "--labels", tmp_path / "words.txt"]
    assert package(capsys, run, *argv, checkpoint=checkpoint, labels=False)[0] == 0
    assert loaded(tmp_path / "new").pretrained_cfg["label_names"] == ["b10", "b9", "A"]
    argv[2:] = ["--data-dir", tmp_path]
    code, _, err = package(capsys, run, *argv, checkpoint=checkpoint, labels=False)
    assert code == 2
    assert "the run counted the classes of hfds/a/b, not folders" in err
    assert package(capsys, run, *argv[:2], "--labels", tmp_path / "words.txt", labels=False)[0] == 0
    assert loaded(tmp_path / "new").pretrained_cfg["label_names"] == ["A", "b9", "b10"]


class Attack:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(run, capsys, tmp_path):
    saved = torch.load(run / "model_best.pth.tar", weights_only=False)
    torch.save({**saved, "attack": Attack(tmp_path / "attacked")}, tmp_path / "attack.pth.tar")
    code, out, err = package(capsys, run, "--output", tmp_path / "new", checkpoint=tmp_path / "attack.pth.tar")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "attack.pth.tar holds other objects than tensors and plain values (posix.mkdir), or is damaged" in err
    assert [path.name for path in tmp_path.iterdir()] == ["attack.pth.tar"]
    with pytest.raises(WeightsError, match=r"\(posix\.mkdir\)"):  # nor is it loaded, where timm would
        timm.create_model(ARCH, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "attack.pth.tar")))
    assert [path.name for path in tmp_path.iterdir()] == ["attack.pth.tar"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(arch="mobilenetv2_ulsam"), "the checkpoint is of mobilenetv2_ulsam_050, not of mobilenetv2_ulsam"),
        (dict(arch="resnet50"), "'resnet50' is no model of this zoo"),
        (dict(argv=["--tag", "no tag"]), "tag 'no tag': accepted are letters"),
        (dict(labels="a\tb\nc\td\n"), "the checkpoint has 3 classes, 2 are named"),
        (dict(labels="a\nb\nc\n"), "every line must be the folder of a class, a tab and its name"),
        (dict(labels="a\t1\na\t2\nb\t3\n"), "names a class twice"),
        (dict(labels="a\t1\n", encoding="utf-16"), "labels.txt is not UTF-8: "),
        (dict(options=dict(model_kwargs=dict(num_splits=4))), "does not fit mobilenetv2_ulsam_050: "),
        (dict(options=dict(model_kwargs=dict(nonsense=4))), "cannot be built with the options of the run: "),
        (dict(options=dict(input_size=48)), "have input_size: 48; train.py takes a list of channels, height and width"),
        (dict(options=dict(dataset=3)), "have dataset: 3; train.py takes text"),
        (dict(options=dict(model=3)), "have model: 3; train.py takes text"),
        (dict(options=dict(model_kwargs=["a=1"])), "have model_kwargs: ['a=1']; train.py takes names and values"),
        (dict(options=dict(class_map="map.txt")), "--class-map, which is not supported"),
        (dict(checkpoint="labels.txt"), "is not a whole checkpoint"),
        (dict(checkpoint="half"), "is not a whole checkpoint"),
        (dict(checkpoint="half.safetensors"), "is not a whole checkpoint"),
        (dict(checkpoint="missing.pth"), "cannot read"),
        (dict(checkpoint=[1, 2]), "holds no weights"),
        (dict(checkpoint={"args": "text", "state_dict": {"a": torch.zeros(1)}}), "its args are str, not options"),
        (dict(checkpoint={"state_dict": [1, 2]}), "holds no weights"),
        (dict(checkpoint={"state_dict": {1: torch.zeros(1)}}), "holds no weights"),
        (dict(checkpoint={"state_dict": {"a": 1}}), "holds no weights"),
        (dict(checkpoint={"a": torch.zeros(1), "b": 1}), "holds no weights"),
        (dict(checkpoint="nan"), "holds infinities or NaN, in 1 weights: classifier.bias"),
        (dict(argv=["--dataset", "tiny-imagenet"]), "--dataset records facts in the checkout; not with --output"),
        (dict(argv=["--output", "{tmp}"]), "holds something else than README.md, config.json, model.safetensors"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(change, message, run, capsys, tmp_path):
    argv = ["--output", tmp_path / "new", *(a.format(tmp=tmp_path) for a in change.get("argv", []))]
    if "labels" in change:
        (tmp_path / "labels.txt").write_text(change["labels"], encoding=change.get("encoding"))
        argv += ["--labels", tmp_path / "labels.txt"]
    if "options" in change:
        (tmp_path / "args.yaml").write_text(yaml.safe_dump(change["options"]))
        argv += ["--config", tmp_path / "args.yaml"]
    checkpoint = change.get("checkpoint", "model_best.pth.tar")
    whole = (run / "model_best.pth.tar").read_bytes()
    if checkpoint == "nan":
        checkpoint = torch.load(run / "model_best.pth.tar", weights_only=False)
        checkpoint["state_dict_ema"]["classifier.bias"][1] = float("nan")
    elif not isinstance(checkpoint, str):
        pass
    elif checkpoint.startswith("half"):
        checkpoint = tmp_path / checkpoint
        checkpoint.write_bytes(((run / "plain.safetensors").read_bytes() if checkpoint.suffix else whole)[:-5000])
    if isinstance(checkpoint, (dict, list)):
        torch.save(checkpoint, tmp_path / "saved.pth")
        checkpoint = tmp_path / "saved.pth"
    (tmp_path / "mine.txt").touch()
    code, out, err = package(capsys, run, *argv, checkpoint=checkpoint, arch=change.get("arch", ARCH))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "mine.txt").is_file()


def test_in_a_checkout_digest_log_facts_and_card_are_kept(run, checkout, tmp_path):
    def tool(*argv):
        environment = own_environment(PYTHONPATH=str(checkout))
        command = [sys.executable, "-m", "timm_ulsam", *map(str, argv)]
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)

    weights, name = checkout / "weights", f"{ARCH}.test"
    before = (weights / "SHA256SUMS").read_text()
    argv = ["package", run / "model_best.pth.tar", "--arch", ARCH, "--tag", "test", "--labels", run / "labels.txt"]
    done = tool(*argv, "--dataset", "tiny-imagenet")
    assert done.returncode == 0, done.stderr
    digest = file_digest(weights / name / "model.safetensors")
    added = f"{digest}  {name}/model.safetensors"
    assert sorted((weights / "SHA256SUMS").read_text().splitlines()) == sorted([*before.splitlines(), added])
    assert (weights / "logs" / f"{name}.csv").read_bytes() == (run / "summary.csv").read_bytes()
    facts = yaml.safe_load((weights / "facts" / f"{name}.yaml").read_text())
    measured = dict(dataset="tiny-imagenet", split="validation", top1=50.0, top5=100.0)
    assert facts == {**measured, "epoch": 1, "checkpoint": "model_best.pth.tar"}
    steps = [line.split(":")[1].split()[0] for line in done.stdout.splitlines()[1:]]
    assert steps == ["write", "timm-ulsam", "put", "or"]

    (weights / "recipes" / f"{name}.yaml").write_text("epochs: 2\nseed: 1\n")
    done = tool("card", name)
    assert done.returncode == 0, done.stderr
    text = (weights / name / "README.md").read_text(encoding="utf-8")
    assert "**50.00 % / 100.00 %** on the 10,000 validation images" in text
    assert digest in text
    assert sorted(path.name for path in (weights / name).iterdir()) == ["README.md", "config.json", "model.safetensors"]

    (weights / "facts" / f"{name}.yaml").write_text("# Why.\n# Because.\ndataset: tiny-imagenet\nsplit: validation\n")
    assert "the facts or the recipe of " + name + " lack 'top1'" in tool("card", name).stderr
    again = tool(*argv)  # the same name once more: replaced, measured anew
    assert again.returncode == 0, again.stderr
    assert (weights / name / "README.md").read_text(encoding="utf-8") == text
    kept = (weights / "facts" / f"{name}.yaml").read_text(encoding="utf-8")
    assert kept.startswith("# Why.\n# Because.\ndataset: tiny-imagenet\n")
    assert yaml.safe_load(kept) == facts


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "there is no folder"),
        ([], "must hold folders of images"),
        (["1.jpg", "a/1.jpg", "b/1.jpg"], "must hold folders of images"),
        (["a/1.jpg", "b/1.jpg"], "the checkpoint has 3 classes, 2 are named"),
    ],
)
def test_data_that_do_not_name_the_classes_are_refused(images, message, run, capsys, tmp_path):
    for image in images or []:
        (tmp_path / "data" / image).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / image).touch()
    if images == []:
        (tmp_path / "data").mkdir()
    code, _, err = package(capsys, run, "--data-dir", tmp_path / "data", "--output", tmp_path / "new", labels=False)
    assert code == 2
    assert message in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("checkpoint", "says"),
    [
        ("model_best.pth.tar", "with the best accuracy on the validation images ({}), which is the last."),
        ("last.pth.tar", "of the last epoch ({}): none was chosen by its accuracy."),
        ("checkpoint-1.pth.tar", "of one epoch ({})."),
    ],
)
def test_a_card_says_which_epoch_was_taken(checkpoint, says, run, cards, tmp_path):
    text = cards(checkpoint, other_seeds={7: 49.0, 8: 51.5})
    assert says.format(f"`{checkpoint}`, epoch 1, counted from 0") in text
    assert "The same recipe gave 49.00 % with seed 7, 51.50 % with seed 8." in text


@pytest.mark.parametrize(
    ("start", "repository", "terms"),
    [
        ("mobilenetv2_ulsam.ra_in1k_init", "timm/mobilenetv2_100.ra_in1k", []),
        ("mobilenetv2_ulsam.tin200", "timm-ulsam/mobilenetv2_ulsam.tin200", ["Tiny ImageNet is a subset of ImageNet"]),
        ("mobilenetv2_ulsam.mine", None, []),  # it is nowhere
    ],
)
def test_a_card_says_what_the_weights_started_from(start, repository, terms, cards):
    text = cards("last.pth.tar", started_from=start)
    assert f"were fine-tuned from `{start}` on" in text
    assert re.findall(r"base_model: (\S+)", text) == ([repository] if repository else [])
    assert f'timm.create_model("hf-hub:timm-ulsam/{ARCH}.test", pretrained=True)' in text  # timm does not know the tag
    assert "datasets:" not in text  # Grocery Store is not at the Hub
    assert "is under the MIT licence." in text
    assert [term for term in ["Tiny ImageNet is a subset of ImageNet"] if term in text] == terms


def test_a_card_names_who_publishes_it(cards, capsys):
    cards("last.pth.tar")
    assert main(["card", f"{ARCH}.test", "--org", "someone"]) == 0
    text = Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8")
    assert text.count(f"hf-hub:someone/{ARCH}.test") == 3  # two in Python, validate.py
    assert "timm-ulsam/" not in text


def test_a_card_describes_the_model_as_it_was_built(cards):
    text = cards("last.pth.tar")
    assert f"# {ARCH}.test `{ARCH}` built with `num_splits=2`. The system is ULSAM" in text
    assert "g = 4" not in text


def test_a_run_with_other_classes_than_the_data_is_not_recorded(run, checkout, monkeypatch):
    monkeypatch.setenv("TIMM_ULSAM_WEIGHTS", str(checkout / "weights"))
    shutil.copy2(REPO / "weights" / "datasets.yaml", checkout / "weights")
    with pytest.raises(InputError, match="the checkpoint has 3 classes, Tiny ImageNet-200 has 200"):
        package_checkpoint(run / "model_best.pth.tar", ARCH, "test", labels=run / "labels.txt", dataset="tiny-imagenet")
    assert not (checkout / "weights" / f"{ARCH}.test").exists()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (dict(top1="38.35 %"), "are not as they must be: "),
        (dict(other_seeds=[40.1]), "are not as they must be: "),
        (dict(notes="one note"), "notes in the facts of mobilenetv2_ulsam_050.test must be a list"),
    ],
)
def test_a_card_of_unfit_facts_is_refused(facts, message, cards):
    cards("last.pth.tar")
    file = facts_file(f"{ARCH}.test")
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **facts}))
    with pytest.raises(InputError, match=message):
        card(f"{ARCH}.test")


def test_a_card_of_a_broken_config_is_refused(cards):
    cards("last.pth.tar")
    (weights_dir() / f"{ARCH}.test" / "config.json").write_text("{")
    with pytest.raises(InputError, match="are not as they must be: "):
        card(f"{ARCH}.test")


@pytest.mark.parametrize(
    ("recipe", "facts", "message"),
    [
        (dict(pretrained=True), {}, "lacks started_from"),
        (dict(initial_checkpoint="a.safetensors"), {}, "lacks started_from"),
        ({}, dict(started_from="mobilenetv2_ulsam.tin200"), "starts from scratch"),
    ],
)
def test_a_card_without_a_start_that_its_recipe_has_is_refused(recipe, facts, message, cards):
    cards("last.pth.tar")
    name = f"{ARCH}.test"
    recipe_file(name).write_text(yaml.safe_dump(dict(epochs=2, seed=1, **recipe)))
    facts_file(name).write_text(yaml.safe_dump({**yaml.safe_load(facts_file(name).read_text()), **facts}))
    with pytest.raises(InputError, match=message):
        card(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("recovery-1-5.pth.tar", {}, "recovery-1-5.pth.tar is of the middle of an epoch"),
        ("last.pth.tar", dict(model_ema_force_cpu=True), "did not measure the accuracy of its EMA weights"),
    ],
)
def test_accuracy_that_was_not_measured_is_not_recorded(name, options, message, run, checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("TIMM_ULSAM_WEIGHTS", str(checkout / "weights"))
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/model_best.pth.tar").rename(tmp_path / "run" / name)
    given = dict(labels=run / "labels.txt", dataset="tiny-imagenet", config=tmp_path / "args.yaml")
    given["config"].write_text(yaml.safe_dump(dict(model=ARCH, model_kwargs=dict(num_splits=2), **options)))
    with pytest.raises(InputError, match=message):
        package_checkpoint(tmp_path / "run" / name, ARCH, "test", **given)
    assert not (checkout / "weights" / f"{ARCH}.test").exists()


def test_a_split_that_the_records_lack_is_refused_before_anything_is_written(run, checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("TIMM_ULSAM_WEIGHTS", str(checkout / "weights"))
    options = tmp_path / "args.yaml"
    options.write_text(yaml.safe_dump(dict(model=ARCH, model_kwargs=dict(num_splits=2), val_split="val")))
    given = dict(labels=run / "labels.txt", dataset="grocery-store", config=options)
    with pytest.raises(InputError, match="measured the split 'val' of the data; accepted: train, validation, test"):
        package_checkpoint(run / "model_best.pth.tar", ARCH, "test", **given)
    assert not (checkout / "weights" / f"{ARCH}.test").exists()


@pytest.fixture
def cards(run, checkout, monkeypatch):
    """Package a checkpoint into a checkout that records these facts; returns the card."""
    weights, name = checkout / "weights", f"{ARCH}.test"
    monkeypatch.setenv("TIMM_ULSAM_WEIGHTS", str(weights))

    def card_of(checkpoint, **facts):
        (weights / "facts" / f"{name}.yaml").write_text(yaml.safe_dump({"split": "validation", **facts}))
        recipe = dict(epochs=2, seed=1, pretrained="started_from" in facts)
        (weights / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        folder = weights.parent / "run"
        shutil.copytree(run, folder)
        (folder / "model_best.pth.tar").rename(folder / checkpoint)
        package_checkpoint(folder / checkpoint, ARCH, "test", labels=run / "labels.txt", dataset="grocery-store")
        return " ".join((weights / name / "README.md").read_text(encoding="utf-8").split())

    recorded_digests.cache_clear()
    yield card_of
    recorded_digests.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_the_cards_are_current(name):
    assert card(name) == (REPO / "weights" / name / "README.md").read_text(encoding="utf-8"), (
        f"write it again: timm-ulsam card {name}"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mobilenetv2_ulsam.in99", "so they have no card\n"),
        ("mobilenetv2_ulsam", "so they have no card"),
        ("mobilenetv2_ulsam.ra_in1k_init", "no card: An initialization for fine-tuning, not an ImageNet classifier"),
    ],
)
def test_a_card_of_no_weights_is_refused(name, message, capsys):
    assert main(["card", name]) == 2
    error = capsys.readouterr().err
    assert f"there are no weights {name!r}" in error
    assert message in error
