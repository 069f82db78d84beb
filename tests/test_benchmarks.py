import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file
from torch import nn

from timm_ulsam import ULSAM
from timm_ulsam.layers import DiverseBranchBlock

sys.path.append(str(REPO))  # last: the package that is tested stays the installed one

from benchmarks import __main__ as command
from benchmarks import layer, rows, timing
from benchmarks import run as runner
from benchmarks.published import Published, published_layer, stacked
from benchmarks.report import markdown, systems_markdown
from benchmarks.rows import Case, Comparison, Disagreement, Row

DATA = Path(__file__).parent / "data"
SMALLEST = "cpu/layer/infer/1x96x14x14-g4"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine without a GPU, and PyTorch's number of threads as it was."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def measure(*arguments: str) -> int:
    return command.main(["--quick", "--threads", "1", *arguments])


def row(row_id: str, build) -> Row:
    return Row(row_id, "something", build, (Comparison("one", "other", "faster", 2),), seconds=0.01)


def test_the_performance_section_is_current():
    results = sorted(runner.RESULTS.glob("*.json"))
    section = markdown(rows.all_rows(), [runner.read(path) for path in results])
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert section in readme, "replace it by what `python -m benchmarks --markdown benchmarks/results/*.json` prints"


def test_the_speed_of_the_systems_is_current():
    results = sorted(runner.RESULTS.glob("*.json"))
    section = systems_markdown(rows.all_rows(), [runner.read(path) for path in results])
    page = (REPO / "docs/systems.md").read_text(encoding="utf-8")
    assert section in page, "replace it by what `python -m benchmarks --markdown benchmarks/results/*.json` prints last"


def test_the_layer_keeps_a_fifth_of_what_the_published_one_keeps_for_its_backward_pass():
    x = torch.randn(2, 32, 14, 14)
    ours, published = ULSAM(32, 4), published_layer(x, 4).train()
    assert layer.saved_bytes(ours, x) <= 0.2 * layer.saved_bytes(published, x)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["ulsam_c32_g1", "ulsam_c64_g16"])
def test_the_module_measured_against_is_the_published_one(name, mode):
    tensors = load_file(DATA / f"{name}.safetensors")
    state = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    module = Published(tensors["input"].shape[1], len({k.split(".")[1] for k in state})).train(mode == "train")
    module.load_state_dict(state)
    x = tensors["input"].requires_grad_()
    y = module(x)
    (y * tensors["grad_seed"]).sum().backward()
    assert (y - tensors[f"{mode}.output"]).abs().max() <= 1e-5
    expected = tensors[f"{mode}.grad_input"]
    assert (x.grad - expected).abs().max() <= 1e-4 * expected.abs().max()
    if mode == "train":
        after = dict(module.named_buffers())
        for key, value in tensors.items():
            if key.startswith("train.after."):
                torch.testing.assert_close(after[key.removeprefix("train.after.")], value)


@pytest.mark.parametrize("training", [False, True])
def test_ours_with_the_same_weights_computes_the_same(training):
    x = torch.randn(4, 16, 7, 9)
    published = published_layer(x, 4).train(training)
    ulsam = ULSAM(16, 4).train(training)
    ulsam.load_state_dict(published.state_dict())
    torch.testing.assert_close(ulsam(x), published(x))
    layer.check(published, {"ulsam": ulsam}, x, torch.randn_like(x) if training else None)


def test_weights_make_the_attention_matter():
    x = torch.randn(4, 16, 14, 14)
    published = published_layer(x, 4)
    ulsam = ULSAM(16, 4).eval()
    ulsam.load_state_dict(published.state_dict())
    assert ulsam.attention(x).amax((2, 3)).median() > 10 / 14**2
    assert (ulsam.conv_dw.weight < 0).any()


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 0.9 * grad


def test_a_module_that_computes_something_else_is_noticed():
    x, upstream = torch.randn(2, 4, 8, 6, 6)
    published = published_layer(x, 2).train()

    class Broken(ULSAM):
        def forward(self, x):
            return super().forward(WrongGradient.apply(x))

    broken = Broken(8, 2)
    broken.load_state_dict(published.state_dict())
    layer.check(published, {"broken": broken}, x)  # only its gradient is wrong
    with pytest.raises(Disagreement, match="gradient of the input of broken is"):
        layer.check(published, {"broken": broken}, x, upstream)
    with pytest.raises(Disagreement, match="output of identity is 1"):
        layer.check(published, {"identity": nn.Identity()}, x)
    with pytest.raises(Disagreement, match="output of nothing is nan"):
        layer.check(published, {"nothing": lambda x: x * torch.nan}, x)


def test_a_folded_layer_is_timed_and_checked(monkeypatch):
    monkeypatch.setattr(ULSAM, "reparameterize", lambda self: None)
    found = runner.run_row(rows.select(rows.all_rows(), [SMALLEST])[0], rows.Options(threads=1, quick=True))
    assert list(found["contenders"]) == ["published", "ulsam", "ulsam folded", "copy"]
    assert found["skipped"] == {}
    assert {c["contender"] for c in found["comparisons"]} == {"ulsam", "ulsam folded"}

    monkeypatch.setattr(ULSAM, "reparameterize", lambda self: nn.init.zeros_(self.conv_pw.weight))
    found = runner.run_row(rows.select(rows.all_rows(), [SMALLEST])[0], rows.Options(threads=1, quick=True))
    assert found["status"] == "failed"
    assert found["reason"].startswith("output of ulsam folded is")


def test_gradients_of_subspaces_are_stacked_by_our_names():
    published = Published(8, 2)
    found = stacked(dict(published.named_parameters()))
    assert {name: p.shape for name, p in found.items()} == {n: p.shape for n, p in ULSAM(8, 2).named_parameters()}


def test_what_backward_keeps_is_counted_once_and_without_weights():
    x = torch.randn(2, 8, 5, 5)
    assert layer.saved_bytes(nn.ReLU(), x) == x.nbytes
    assert layer.saved_bytes(nn.Conv2d(8, 8, 1), x) == x.nbytes
    assert layer.saved_bytes(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()), x) == 2 * x.nbytes

    class Halves(nn.Module):
        def forward(self, x):
            return torch.cat([half.sin() for half in x.chunk(2, 1)], 1)

    assert layer.saved_bytes(Halves(), x) == x.nbytes


def test_figures_are_ratios_of_medians_with_the_spread_of_rounds():
    seconds = {"a": [1.0, 2.0, 3.0], "b": [10.0, 20.0, 60.0], "c": [0.5, 1.0, 1.5]}
    assert Comparison("a", "b", "faster").figure(seconds) == (10, 10, 15)
    assert Comparison("b", "a", "times").figure(seconds) == (10, 10, 15)
    assert Comparison("a", "b", "above", limit="c").figure(seconds) == pytest.approx((0.05, 0.0375, 0.05))


def test_goals_are_bounds():
    assert Comparison("a", "b", "faster", 9).reached(9)
    assert not Comparison("a", "b", "faster", 9).reached(8.9)
    assert Comparison("a", "b", "times", 1.7).reached(1.7)
    assert not Comparison("a", "b", "times", 1).reached(1)
    assert not Comparison("a", "b", "above", 0.02, limit="c").reached(0.021)
    assert Comparison("a", "b", "times").reached(1) is None


def test_contenders_are_timed_alternately_in_turned_order():
    order = []

    def clock(run, calls):
        order.append((run(), calls))
        return {"a": 1e-3, "b": 0.5}[order[-1][0]]

    contenders = {"a": lambda: "a", "b": lambda: "b"}
    samples = timing.measure(contenders, clock, seconds=0, min_rounds=3, loop_seconds=4e-3)
    assert samples.calls == {"a": 4, "b": 1}
    assert samples.seconds == {"a": [1e-3] * 3, "b": [0.5] * 3}
    assert order[-6:] == [("a", 4), ("b", 1), ("b", 1), ("a", 4), ("a", 4), ("b", 1)]


def test_rows_have_names_of_their_own_and_comparisons():
    found = rows.all_rows()
    assert len({r.id for r in found}) == len(found)
    assert all(r.comparisons and r.device in ("cpu", "gpu") for r in found)


def test_every_row_is_measured_or_says_why_not(tmp_path, capsys):
    output = tmp_path / "results.json"
    picked = (SMALLEST, "cpu/layer/train/32x96", "cpu/model/infer/batch1/channels_last", "gpu/")
    assert measure(*(word for pattern in picked for word in ("--only", pattern)), "--output", str(output)) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert {r["id"] for r in report["rows"]} == {r.id for r in rows.select(rows.all_rows(), picked)}
    assert not report["complete"]
    assert {"python", "torch", "timm", "triton", "onnxruntime", "timm_ulsam", "commit"} <= report["versions"].keys()
    shown = capsys.readouterr()
    for result in report["rows"]:
        assert result["id"] in shown.out
        assert result["id"] in shown.err
        if result["device"] == "gpu":
            assert (result["status"], result["reason"]) == ("not measured", "no CUDA device")
            continue
        assert result["status"] == "measured", result
        assert result["rounds"] >= 3
        for times in result["contenders"].values():
            assert 0 < times["lower_s"] <= times["median_s"] <= times["upper_s"]
        assert any(c["value"] > 0 for c in result["comparisons"])
    assert "to be replaced" in markdown(rows.all_rows(), [report])


def test_a_row_that_disagrees_is_an_error_and_costs_no_other(monkeypatch, tmp_path, capsys):
    def disagree(options):
        raise Disagreement("output of ulsam is 2.0e-01 off")

    def stand_still(options):
        return Case({"one": lambda: None, "other": lambda: None})

    monkeypatch.setattr(command, "all_rows", lambda: [row("cpu/wrong", disagree), row("cpu/right", stand_still)])
    monkeypatch.setattr(command, "RESULTS", tmp_path / "default")
    output = tmp_path / "results.json"
    assert measure("--output", str(output)) == 1
    assert "error: cpu/wrong: output of ulsam is 2.0e-01 off" in capsys.readouterr().err
    assert [r["status"] for r in runner.read(output)["rows"]] == ["failed", "measured"]
    assert command.main([]) == 1  # a complete run with a failure replaces no result
    assert not (tmp_path / "default").exists()


def test_only_a_complete_run_replaces_the_committed_results(monkeypatch, tmp_path):
    case = Case({"one": lambda: None, "other": lambda: None})
    found = [row("cpu/a", lambda options: case), Row("gpu/b", "b", lambda options: case, (), needs=("cuda",))]
    monkeypatch.setattr(command, "all_rows", lambda: found)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    assert command.main(["--quick"]) == 0
    assert command.main(["--only", "cpu"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert command.main([]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]
    report = runner.read(tmp_path / "cpu.json")
    assert report["complete"]
    assert [r["status"] for r in report["rows"]] == ["measured", "not measured"]


def test_rows_of_systems_have_a_file_of_their_own(monkeypatch, tmp_path):
    case = Case({"one": lambda: None, "other": lambda: None})
    found = [row(f"cpu/{name}", lambda options: case) for name in ("a", "system/b", "system/c")]
    monkeypatch.setattr(command, "all_rows", lambda: found)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    assert command.main(["--only", "system/b"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert command.main(["--only", "/system/"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["cpu-systems.json"]
    assert command.main([]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu-systems.json", "cpu.json"]


def test_a_fold_that_computes_something_else_is_noticed(monkeypatch):
    monkeypatch.setattr(DiverseBranchBlock, "reparameterize", lambda self: nn.init.zeros_(self.dbb_origin.conv.weight))
    found = runner.run_row(
        rows.select(rows.all_rows(), ["mobilenetv1_dbb/infer/batch1"])[0], rows.Options(threads=1, quick=True)
    )
    assert found["status"] == "failed"
    assert found["reason"].startswith("mobilenetv1_dbb folded is")


def test_an_interrupted_run_leaves_no_file(monkeypatch, tmp_path, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "all_rows", lambda: [row("cpu/a", interrupted)])
    assert measure("--output", str(tmp_path / "results.json")) == 130
    assert list(tmp_path.iterdir()) == []
    assert "interrupted" in capsys.readouterr().err


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "results.json"
    runner.write(path, {"schema": runner.SCHEMA})
    with pytest.raises(TypeError):
        runner.write(path, {"schema": runner.SCHEMA, "rows": [object()]})
    assert runner.read(path) == {"schema": runner.SCHEMA}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "no row fits --only nothing"),
        (["--threads", "0"], "--threads 0 is less than 1"),
        (["--output", "no/such/folder/x.json"], "not a file in a folder that exists"),
        (["--markdown", "README.md"], "is no JSON"),
        (["--markdown", "missing.json"], "missing.json"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(REPO)
    assert command.main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_the_list_shows_rows_goals_and_what_is_missing(capsys):
    assert command.main(["--list", "--only", SMALLEST, "--only", "gpu/layer/infer/256x512"]) == 0
    shown = capsys.readouterr().out
    assert "ulsam beside published, how many times faster: >= 6x" in shown
    assert "gpu/layer/infer/256x512x14x14-g8/bf16  [not here: no CUDA device]" in shown
    assert "ulsam beside copy, times its time: <= 1.7x" in shown
