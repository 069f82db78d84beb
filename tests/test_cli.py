import json
import shutil

import pytest
import timm
import torch
from conftest import REPO
from PIL import Image

from timm_ulsam.cli import main
from timm_ulsam.zoo import model_names


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    return code, *capsys.readouterr()


@pytest.fixture
def photograph(tmp_path):
    file = tmp_path / "photograph.png"
    Image.linear_gradient("L").convert("RGB").save(file)
    return file


def test_list_names_every_model_its_cost_and_weights(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()[1:]]  # one with several weights has several rows
    assert list(dict.fromkeys(names)) == model_names()
    assert "3,067,904" in out
    assert "tin200" in out


def test_list_json(capsys):
    code, out, _ = run(capsys, "list", "--json")
    zoo = {entry["name"]: entry for entry in json.loads(out)}
    assert code == 0
    assert sorted(zoo) == sorted(model_names())
    assert zoo["mobilenetv2_ulsam"]["macs"] == 262_659_328
    weights = zoo["mobilenetv2_ulsam"]["weights"]["tin200"]
    assert weights["top5"] > weights["top1"] > 25
    assert weights["image_size"] == 64
    assert 8e6 < weights["bytes"] < 9e6
    assert weights["recipe"] == "weights/recipes/mobilenetv2_ulsam.tin200.yaml"


def test_list_of_one_system(capsys):
    code, out, _ = run(capsys, "list", "--system", "ulsam", "--json")
    assert code == 0
    assert {entry["system"] for entry in json.loads(out)} == {"ulsam"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--system", "senet"], "unknown system 'senet'; accepted: ulsam, sa, smt, doconv"),
        (["--systems", "--system", "ulsam"], "not with --json, --system or --runs"),
        (["--systems", "--json"], "not with --json, --system or --runs"),
        (["--systems", "--runs", "tiny-imagenet"], "not with --json, --system or --runs"),
        (["--runs", "tiny-imagenet", "--system", "ulsam"], "not with --system"),
        (["--runs", "imagenet"], "unknown data set 'imagenet'; accepted: tiny-imagenet, grocery-store"),
    ],
)
def test_list_refuses_what_it_does_not_know(arguments, message, capsys):
    code, out, err = run(capsys, "list", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_demo_names_what_is_in_the_photographs_and_draws_where_it_looked(capsys, tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    out = tmp_path / "attention.png"
    code, text, _ = run(capsys, "predict", "--demo", "--attention", str(out))
    assert code == 0
    lines = text.splitlines()
    assert [lines[0], lines[6], lines[12]] == ["chelsea.png", "coffee.png", "rocket.jpg"]
    assert all("%" in line for line in lines[1:6])
    # as the README says
    assert lines[3].endswith("Egyptian cat")
    assert lines[7].endswith("espresso")
    first, second, third = (line.split("%", 1)[1] for line in lines[13:16])
    assert ("fountain" in first, "obelisk" in second, "missile" in third) == (True, True, True)
    with Image.open(out) as picture:
        assert picture.width > picture.height  # nine panels wide, three photographs high
    assert [p.name for p in tmp_path.iterdir()] == ["attention.png"]


@pytest.mark.parametrize(
    ("kernel", "message"),
    [("cuda", "TIMM_ULSAM_KERNEL='cuda'; accepted: 'auto', 'reference', 'triton'"), ("triton", "a tensor on cpu")],
)
def test_kernels_that_cannot_be_had_are_one_line(capsys, photograph, monkeypatch, kernel, message):
    monkeypatch.setenv("TIMM_ULSAM_KERNEL", kernel)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("timm_ulsam.ops.dispatch._gpu_missing", lambda: "")
    code, out, err = run(capsys, "predict", str(photograph))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_predict_json(capsys, photograph):
    code, out, _ = run(capsys, "predict", str(photograph), str(photograph), "--json")
    result = json.loads(out)
    assert code == 0
    assert result["model"] == "mobilenetv2_ulsam"
    assert [i["image"] for i in result["images"]] == [str(photograph)] * 2
    best = result["images"][0]["predictions"]
    assert len(best) == 5
    assert best == sorted(best, key=lambda p: -p["probability"])
    assert best[0]["label"].startswith("n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/missing.png"], "cannot read {tmp}/missing.png: No such file"),
        (["{tmp}"], "cannot read {tmp}: Is a directory"),
        (["{tmp}/text.png"], "text.png is not an image"),
        (
            ["{photo}", "--model", "mobilenetv2_ulsm"],
            "unknown model 'mobilenetv2_ulsm'; did you mean mobilenetv2_ulsam",
        ),
        (["{photo}", "--model", "resnet50_sa"], "has no pretrained weights; models of this zoo that have: mob"),
        (
            ["{photo}", "--model", "mobilenetv2_ulsam_050"],
            "mobilenetv2_ulsam_050 without a tag has no weights; there are: mobilenetv2_ulsam_050.lamb_in1k_init",
        ),
        (
            ["{photo}", "--model", "mobilenetv2_ulsam.in99"],
            "no weights 'in99'; it has: mobilenetv2_ulsam.ra_in1k_init, mob",
        ),
        (["{photo}", "--model", "local-dir:{tmp}/nowhere"], "nowhere"),
        (["{photo}", "--attention", "{tmp}/nowhere/out.png"], "cannot write {tmp}/nowhere/out.png: there is no"),
        (["{photo}", "--attention", "{tmp}/out.xyz"], "accepted suffixes are .jpg, .pdf, .png"),
        (["{photo}", "--attention", "{tmp}/out"], "accepted suffixes are .jpg, .pdf, .png"),
        (["{photo}", "--model", "local-dir:{tmp}"], "cannot load local-dir:{tmp}: Config file not found"),
        ([], "or --demo"),
        (["{photo}", "--demo"], "or --demo"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, photograph):
    (tmp_path / "text.png").write_text("no image")
    places = dict(tmp=tmp_path, photo=photograph)
    code, out, err = run(capsys, "predict", *(a.format(**places) for a in arguments))
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("timm-ulsam: error: ")
    assert message.format(**places) in err


def test_attention_without_a_ulsam_block_is_refused(photograph, tmp_path):
    from timm_ulsam.predict import InputError, attention_maps, draw_attention, predict, read_image

    model = timm.create_model("mobilenetv2_050", num_classes=1000).eval()
    image = read_image(photograph)
    assert attention_maps(model, [image]) == {}
    with pytest.raises(InputError, match="no ULSAM block"):
        draw_attention(model, [image], predict(model, [image]), tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_a_photograph_is_turned_as_its_camera_says(tmp_path, photograph):
    from timm_ulsam.predict import read_image

    upright = read_image(photograph)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").tobytes() == upright.tobytes()


def test_damaged_exif_does_not_matter(tmp_path, photograph):
    from timm_ulsam.predict import read_image

    upright = read_image(photograph)
    for exif in (b"Exif\0\0neither II nor MM", b"Exif\0\0II"):
        upright.save(tmp_path / "odd.png", exif=exif)
        assert read_image(tmp_path / "odd.png").tobytes() == upright.tobytes()


def test_a_damaged_png_is_named(capsys, tmp_path):
    damaged = tmp_path / "damaged.png"
    Image.effect_noise((400, 400), 99).save(damaged)
    chunks = damaged.read_bytes().split(b"IDAT")
    assert len(chunks) > 2
    damaged.write_bytes(b"IDAT".join(chunks[:2]) + b"\0\0\0\0" + chunks[2])
    code, out, err = run(capsys, "predict", str(damaged))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"cannot read {damaged}: " in err


def test_a_file_that_pillow_fails_on_in_any_way_is_named(capsys, photograph, monkeypatch):
    def fail(*args):
        raise RuntimeError("Failed to decode image")  # as of a damaged AVIF

    monkeypatch.setattr(Image.Image, "convert", fail)
    code, out, err = run(capsys, "predict", str(photograph))
    assert (code, out) == (2, "")
    assert err == f"timm-ulsam: error: cannot read {photograph}: Failed to decode image\n"


@pytest.mark.parametrize(
    ("names", "cfg", "message"),
    [
        ({str(i): f"class-{i}" for i in reversed(range(12))}, {}, None),
        (None, {"label_descriptions": ["a", "b"]}, "label_descriptions of the weights are a list; accepted: a dict"),
        (None, {"interpolation": "nearest-ish"}, "cannot load {model}: unknown 'nearest-ish'"),
    ],
)
def test_labels_and_transforms_of_other_peoples_weights(capsys, tmp_path, photograph, names, cfg, message):
    model = timm.create_model("mobilenetv2_050", num_classes=12)
    timm.models.save_for_hf(model, tmp_path / "plain", safe_serialization=True)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["label_names"] = names or [f"class-{i}" for i in range(12)]
    config.update({k: v for k, v in cfg.items() if k == "label_descriptions"})
    config["pretrained_cfg"].update({k: v for k, v in cfg.items() if k == "interpolation"})
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    name = f"local-dir:{tmp_path / 'plain'}"
    code, out, err = run(capsys, "predict", str(photograph), "--model", name, "--json")
    if message:
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message.format(model=name) in err
        return
    from timm_ulsam.predict import class_names, load_model

    assert code == 0
    assert class_names(load_model(name)) == [(f"class-{i}", f"class-{i}") for i in range(12)]


def test_an_interrupt_is_no_traceback(capsys, photograph, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("timm_ulsam.predict.read_image", interrupt)
    assert run(capsys, "predict", str(photograph)) == (130, "", "")


def test_what_weights_say_of_themselves_is_said(capsys, tmp_path, photograph):
    weights = tmp_path / "weights"
    shutil.copytree(REPO / "weights/mobilenetv2_ulsam.tin200", weights)
    config = json.loads((weights / "config.json").read_text())
    config["pretrained_cfg"]["description"] = "An initialization."
    (weights / "config.json").write_text(json.dumps(config))
    code, out, err = run(capsys, "predict", str(photograph), "--model", f"local-dir:{weights}", "--json")
    assert (code, err) == (0, f"timm-ulsam: local-dir:{weights}: An initialization.\n")
    assert len(json.loads(out)["images"]) == 1


def test_json_does_not_name_a_picture_that_cannot_be_drawn(capsys, tmp_path, photograph):
    pytest.importorskip("matplotlib")
    model = timm.create_model("mobilenetv2_050", num_classes=10)
    timm.models.save_for_hf(model, tmp_path / "plain", safe_serialization=True)
    argv = ["--model", f"local-dir:{tmp_path / 'plain'}", "--json", "--attention", str(tmp_path / "out.png")]
    code, out, err = run(capsys, "predict", str(photograph), *argv)
    assert (code, out) == (2, "")
    assert "no ULSAM block" in err


def test_more_photographs_than_one_batch(capsys, photograph):
    code, out, _ = run(capsys, "predict", *[str(photograph)] * 40, "--json")
    images = json.loads(out)["images"]
    assert code == 0
    assert len(images) == 40
    first, last = ([p["probability"] for p in image["predictions"]] for image in (images[0], images[39]))
    assert last == pytest.approx(first, rel=1e-3)


def test_class_names_are_not_those_of_other_weights():
    from timm_ulsam.predict import class_names

    assert class_names(timm.create_model("mobilenetv2_ulsam", num_classes=3))[2] == ("2", "class 2")
    assert class_names(timm.create_model("mobilenetv2_100", num_classes=1000))[281] == ("n02123045", "tabby, tabby cat")


@pytest.mark.parametrize("argv", [[], ["no-such-verb"], ["predict", "--no-such-option"]])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2


def test_is_quiet_when_its_reader_is_gone(python):
    done = python(
        "import subprocess, sys\n"
        "pipe = subprocess.PIPE\n"
        "p = subprocess.Popen([sys.executable, '-m', 'timm_ulsam', 'list'], stdout=pipe, stderr=pipe)\n"
        "p.stdout.close(); sys.stderr.buffer.write(p.stderr.read()); sys.exit(p.wait())"
    )
    assert done.stderr == ""


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_photographs_have_the_channels_that_the_model_takes(channels, mode, photograph):
    from timm_ulsam.predict import attention_maps, predict

    model = timm.create_model("mobilenetv2_ulsam_050", num_classes=3, in_chans=channels).eval()
    statistics = dict(mean=(0.5,) * channels, std=(0.5,) * channels)
    model.pretrained_cfg.update(input_size=(channels, 64, 64), crop_pct=1.0, **statistics)
    with Image.open(photograph) as opened:
        image = opened.resize((64, 64))
    pixels = torch.tensor(list(image.convert(mode).tobytes())).view(64, 64, channels) / 255
    with torch.no_grad():
        expected = model(((pixels - 0.5) / 0.5).permute(2, 0, 1)[None]).softmax(-1)
    (best,) = predict(model, [image])
    assert [p.probability for p in best] == pytest.approx(sorted(expected[0].tolist(), reverse=True), abs=1e-5)
    assert len(attention_maps(model, [image])) == 2


def test_attention_of_gray_images_is_drawn(photograph, tmp_path):
    pytest.importorskip("matplotlib")
    from timm_ulsam.predict import draw_attention, predict, read_image

    model = timm.create_model("mobilenetv2_ulsam_050", num_classes=3, in_chans=1).eval()
    model.pretrained_cfg.update(input_size=(1, 64, 64), mean=(0.5,), std=(0.5,))
    images = [read_image(photograph)]
    draw_attention(model, images, predict(model, images), tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > picture.height


def test_a_model_of_other_channels_is_refused(photograph):
    from timm_ulsam.predict import InputError, predict, read_image

    model = timm.create_model("mobilenetv2_ulsam_050", num_classes=3, in_chans=4).eval()
    model.pretrained_cfg.update(input_size=(4, 64, 64))
    with pytest.raises(InputError, match="this model takes 4"):
        predict(model, [read_image(photograph)])


def test_predictions_are_printed_even_if_the_picture_cannot_be(capsys, photograph, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import matplotlib.figure

    def too_large(*args, **kwargs):
        raise ValueError("encoding error 5: Image size exceeds WebP limit of 16383 pixels")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", too_large)
    code, out, err = run(capsys, "predict", str(photograph), "--attention", str(tmp_path / "out.webp"))
    assert code == 2
    assert out.count("%") == 5
    assert f"cannot write {tmp_path / 'out.webp'}: encoding error 5: Image size exceeds" in err


def test_names_that_a_terminal_lacks_are_printed_all_the_same(python):
    code = "import sys, timm_ulsam.cli as c; c._list = lambda args: print('\u82f9\u679c'); sys.exit(c.main(['list']))"
    assert python(code, PYTHONIOENCODING="cp1252").stdout == "\\u82f9\\u679c\n"
