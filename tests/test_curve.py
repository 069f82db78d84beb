import pytest
from PIL import Image

from timm_ulsam.cli import main
from timm_ulsam.curve import read_curve

HEAD = "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n"


@pytest.fixture
def log(tmp_path):
    folder = tmp_path / "my_run"
    folder.mkdir()
    (folder / "summary.csv").write_text(f"{HEAD}0,3.0,3.1,10.5,20.0,0.1\n{HEAD}1,2.0,2.1,30.25,50.0,0.0\n")
    return folder / "summary.csv"


def test_a_resumed_log_is_one_curve_named_after_its_run(log):
    assert read_curve(log) == read_curve(log.parent) == ("my_run", {1: 10.5, 2: 30.25})


def test_a_log_that_was_kept_under_a_name_is_named_so(log, tmp_path):
    kept = log.rename(tmp_path / "mobilenetv2_ulsam.tin200.csv")
    assert read_curve(kept)[0] == "mobilenetv2_ulsam.tin200"


def test_the_picture_has_the_lines_of_all_runs(log, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    other = tmp_path / "other.csv"
    other.write_text(f"{HEAD}0,3.0,3.1,80.0,90.0,0.1\n1,3.0,3.1,81.0,90.0,0.1\n")
    pictures = []
    for argv in ([str(log)], [str(log), str(other)]):
        out = tmp_path / f"{len(argv)}.png"
        assert main(["curve", *argv, "--output", str(out)]) == 0
        assert capsys.readouterr().out == f"learning curves drawn in {out}\n"
        with Image.open(out) as picture:
            pictures.append({color for _, color in picture.convert("RGB").getcolors(1 << 20)})
    first, second = (31, 119, 180), (255, 127, 14)  # matplotlib's first two colours
    assert [[color in picture for color in (first, second)] for picture in pictures] == [[True, False], [True, True]]


@pytest.mark.parametrize(
    ("text", "out", "message"),
    [
        (None, "out.png", "cannot read {tmp}/log.csv: No such file"),
        ("no,log\n1,2\n", "out.png", "{tmp}/log.csv is no summary.csv of train.py"),
        ("epoch,eval_top1\nzero,1.0\n", "out.png", "is no summary.csv of train.py"),
        ("", "out.png", "holds no eval_top1"),
        ("epoch,train_loss\n0,1.0\n", "out.png", "holds no eval_top1"),
        (HEAD + "0,3.0,3.1,10.5,20.0,0.1\n", "out.txt", "accepted suffixes are .jpg"),
        (HEAD + "0,3.0,3.1,10.5,20.0,0.1\n", "nowhere/out.png", "there is no folder {tmp}/nowhere"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(text, out, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "log.csv").write_text(text)
    assert main(["curve", str(tmp_path / "log.csv"), "--output", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert message.format(tmp=tmp_path) in error
    assert error.count("\n") == 1
    assert not (tmp_path / out).exists()
