"""timm's own scripts, unchanged, take our names. Set TIMM_SCRIPTS to a checkout of pytorch-image-models to run."""

import csv
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from timm_ulsam.files import read_weights

SCRIPTS = os.environ.get("TIMM_SCRIPTS")
pytestmark = pytest.mark.skipif(not SCRIPTS, reason="TIMM_SCRIPTS does not name a checkout of pytorch-image-models")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of plain colours that anything can tell apart."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 16), ("validation", 8)):
        for name, hue in (("blue", 160), ("red", 0)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("HSV", (64, 64), (hue, 200, 100 + 8 * i)).convert("RGB").save(folder / f"{name}{i}.png")
    return root


# What test_two_processes_on_the_cpu cannot show, with that one argument dropped before the unchanged script runs.
ON_CPU = """
import runpy, sys
from torch.nn.parallel import DistributedDataParallel as DDP
init = DDP.__init__
DDP.__init__ = lambda self, module, device_ids=None, **kwargs: init(self, module, **kwargs)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(script: str, *arguments: object, cwd: Path, launcher: Sequence[str] = ()) -> str:
    command = [sys.executable, *launcher, str(Path(SCRIPTS) / script), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.xfail(strict=True, reason="timm names a device to DistributedDataParallel, which refuses one on the CPU")
@pytest.mark.parametrize("model", ["mobilenetv2_ulsam", "mobilenetv2_100"])
def test_two_processes_on_the_cpu(model, images, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = ["--num-classes", 2, "--device", "cpu", "--img-size", 32, "-b", 4, "--workers", 1, "--epochs", 1]
    run("train.py", "--data-dir", images, "--model", model, *options, cwd=tmp_path, launcher=launcher)


def check_training(model: str, size: int, images: Path, tmp_path: Path, start: Sequence[str] = (), launcher=()) -> None:
    """Train two epochs, resume for a third, validate."""
    # fmt: off
    options = [
        "--data-dir", images, "--model", model, "--num-classes", 2, "--device", "cpu", "--img-size", size, "-b", 4,
        "--workers", 1, "--output", tmp_path, "--experiment", "run", "--opt", "adamw", "--lr", 2e-4,
        "--warmup-epochs", 0,
    ]
    # fmt: on
    run("train.py", *options, *start, "--epochs", 2, cwd=tmp_path, launcher=launcher)
    checkpoint = tmp_path / "run" / "last.pth.tar"
    run("train.py", *options, "--epochs", 3, "--resume", checkpoint, cwd=tmp_path, launcher=launcher)
    rows = list(csv.DictReader((tmp_path / "run" / "summary.csv").open()))
    rows = [row for row in rows if row["epoch"] != "epoch"]  # a resumed run writes its own head
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    # fmt: off
    out = run(
        "validate.py", "--data-dir", images, "--split", "validation", "--model", model, "--num-classes", 2,
        "--checkpoint", checkpoint, "--img-size", size, "-b", 4, "--device", "cpu", cwd=tmp_path,
    )
    # fmt: on
    assert '"top1"' in out


@pytest.mark.parametrize("processes", [1, 2])
def test_train_resume_and_validate(processes, images, tmp_path):
    launcher = []
    if processes > 1:
        (tmp_path / "on_cpu.py").write_text(ON_CPU)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "on_cpu.py"]
    check_training("mobilenetv2_ulsam", 64, images, tmp_path, ["--pretrained"], launcher)


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("resnet50_sa", 64),
        ("smt_tiny", 64),
        ("mobilenetv2_doconv", 64),
        ("resnet50_psconv", 64),
        ("mobilenetv1_dbb", 64),
        ("repmlpnet_t224", 224),
        ("resnet50_repmlp", 224),
        ("shufflenetv2_050_weightnet", 64),
    ],
)
def test_every_system_trains(model, size, images, tmp_path):
    check_training(model, size, images, tmp_path)


def test_model_kwargs_reach_the_constructor(images, tmp_path):
    # fmt: off
    run(
        "train.py", "--data-dir", images, "--model", "mobilenetv2_ulsam", "--num-classes", 2, "--device", "cpu",
        "--img-size", 32, "-b", 4, "--workers", 1, "--epochs", 1, "--warmup-epochs", 0, "--output", tmp_path,
        "--experiment", "run", "--model-kwargs", "num_splits=8", "replace_blocks=12,13", "insert_after=16",
        cwd=tmp_path,
    )
    # fmt: on
    state = read_weights(tmp_path / "run" / "last.pth.tar")["state_dict"]
    for place in ("blocks.4.1", "blocks.4.2", "blocks.5.2_ulsam"):
        assert len(state[f"{place}.bn_pw.weight"]) == 8


def test_validate_benchmark_inference_and_export_the_pretrained_model(images, tmp_path):
    pytest.importorskip("onnx")
    name = "mobilenetv2_ulsam"
    shared = ["--model", name, "--pretrained", "--device", "cpu"]
    run("validate.py", "--data-dir", images, "--split", "validation", *shared, "-b", 8, cwd=tmp_path)
    bench = ["--bench", "inference", "--num-bench-iter", 10, "--num-warm-iter", 1, "-b", 2]
    assert '"param_count"' in run("benchmark.py", "--model", name, "--device", "cpu", *bench, cwd=tmp_path)
    run("inference.py", "--data-dir", images / "validation", *shared, "--results-dir", tmp_path, cwd=tmp_path)
    assert list(tmp_path.glob("*.csv"))
    run("onnx_export.py", tmp_path / "model.onnx", "--model", name, cwd=tmp_path)
    assert (tmp_path / "model.onnx").stat().st_size > 0


def test_folded_models_are_validated_and_benchmarked(images, tmp_path):
    shared = ["--model", "mobilenetv2_ulsam", "--device", "cpu", "--img-size", 64]
    validate = ["validate.py", "--data-dir", images, "--split", "validation", *shared, "--pretrained", "-b", 8]
    benchmark = ["benchmark.py", *shared, "--bench", "inference", "--num-bench-iter", 10, "--num-warm-iter", 1, "-b", 2]
    counts, top1 = [], []
    for options in ([], ["--reparam"]):
        out = run(*validate, *options, cwd=tmp_path)
        top1.append(re.search(r'"top1": ([\d.]+)', out).group(1))
        counts += [
            int(re.search(r"param count: (\d+)", o).group(1)) for o in (out, run(*benchmark, *options, cwd=tmp_path))
        ]
    assert top1[0] == top1[1]
    # without weight and bias of the norms over 96 and 160 channels and, twice, 4 subspaces
    folded = counts[0] - 2 * (96 + 160 + 4 + 4)
    assert counts == [counts[0], counts[0], folded, folded]
