"""Rows of the whole model: `mobilenetv2_ulsam` beside `mobilenetv2_100`, and beside that one with two blocks dropped.

The last is the limit: what the model would take if attention took nothing.
"""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import timm
import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import nn

from timm_ulsam import ULSAM

from .layer import peak_bytes
from .rows import Case, Comparison, Disagreement, Options, Row
from .timing import Run

PLAIN, OURS, LIMIT = "mobilenetv2_100", "mobilenetv2_ulsam", "limit"
FOLDED = f"{OURS} folded"
_REPLACED = (13, 16)  # counted from 1 through all stages
_SIZE, _CLASSES = 224, 1000
_QUICK_BATCH = 4
_ABOVE_LIMIT, _ABOVE_LIMIT_TRAINING = 0.02, 0.03

_TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}  # relative; on the GPU the models run in bfloat16

How = Literal["infer", "compile", "onnx", "train"]
_WORDS = {"infer": "inference", "compile": "inference, compiled", "onnx": "ONNX Runtime", "train": "training step"}


def models() -> dict[str, nn.Module]:
    """The three models, random weights, 1000 classes, in evaluation mode; the limit shares those of `mobilenetv2_100`.

    Shape of each: (N, 3, H, W) to (N, 1000).
    """
    torch.manual_seed(0)
    plain = timm.create_model(PLAIN, num_classes=_CLASSES)
    ours = timm.create_model(OURS, num_classes=_CLASSES)
    for layer in ours.modules():
        if isinstance(layer, ULSAM):
            nn.init.constant_(layer.bn_pw.weight, 3.0)  # maps that matter: a layer that leaves them out is noticed
    limit = copy.deepcopy(plain)
    number = 0
    for stage in limit.blocks:
        for name, _ in list(stage.named_children()):
            number += 1
            if number in _REPLACED:
                setattr(stage, name, nn.Identity())
    return {name: model.eval() for name, model in ((PLAIN, plain), (OURS, ours), (LIMIT, limit))}


def agree(name: str, found: torch.Tensor, expected: torch.Tensor, device: str) -> None:
    error = ((found.float() - expected.float()).norm() / expected.float().norm()).item()
    allowed = _TOLERANCE[device]
    if not error <= allowed:  # NaN is no agreement either
        raise Disagreement(f"{name} is {error:.1e} off what it must be, allowed is {allowed:.1e}")


@contextmanager
def _plainly() -> Iterator[None]:
    """Every ULSAM by the plain version, which is what the others must agree with."""
    before = os.environ.get("TIMM_ULSAM_KERNEL")
    os.environ["TIMM_ULSAM_KERNEL"] = "reference"
    try:
        yield
    finally:
        os.environ.pop("TIMM_ULSAM_KERNEL")
        if before is not None:
            os.environ["TIMM_ULSAM_KERNEL"] = before


def _stem_gradient(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Gradient of the first convolution, to which all others lead, by a copy of the model."""
    model = copy.deepcopy(model).train()
    with _amp(x.device.type):
        loss = F.cross_entropy(model(x), target)
    return torch.autograd.grad(loss, model.conv_stem.weight)[0]


def _amp(device: str) -> AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    # entered and left with every batch, as timm's scripts do: weights are cast anew each time
    with _amp(x.device.type):
        return model(x)


class TrainingStep:
    """Forward, backward and SGD step on one batch."""

    def __init__(self, model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> None:
        self._model, self._x, self._target = model.train(), x, target
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self) -> None:
        self._optimizer.zero_grad()
        with _amp(self._x.device.type):
            loss = F.cross_entropy(self._model(self._x), self._target)
        loss.backward()
        self._optimizer.step()


def _onnx_session(model: nn.Module, x: torch.Tensor, threads: int) -> Callable[[], torch.Tensor]:
    import onnxruntime
    from timm.utils.onnx import onnx_export

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    # else the threads of one session go on spinning, on the cores of the contender that is timed next
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        onnx_export(model, path, example_input=x)
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def build(options: Options, *, how: How, device: str, batch: int, channels_last: bool) -> Case:
    """Build the contenders of one row, and check those that share weights; for the arguments see `rows`."""
    note = ""
    if options.quick and batch > _QUICK_BATCH:
        note, batch = f"batch {_QUICK_BATCH} in the place of {batch}", _QUICK_BATCH
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    nets = {name: model.to(device, memory_format=memory_format) for name, model in models().items()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, _SIZE, _SIZE, generator=generator).to(device, memory_format=memory_format)
    if how == "train":
        target = torch.randint(_CLASSES, (batch,), generator=generator).to(device)
        checked = nets[OURS], x, target
        if device == "cpu":
            # in float32 rounding alone may move the gradient of the first layer by more than the tolerance
            checked = copy.deepcopy(nets[OURS]).double(), x.double(), target
        with _plainly():
            expected = _stem_gradient(*checked)
        agree(f"the gradient of {OURS}", _stem_gradient(*checked), expected, device)
        steps: dict[str, Run] = {name: TrainingStep(model, x, target) for name, model in nets.items()}
        memory = {name: {"peak_bytes": peak_bytes(step)} for name, step in steps.items()} if x.is_cuda else {}
        return Case(steps, memory=memory, note=note)

    nets[FOLDED] = reparameterize_model(nets[OURS]).eval()
    contenders: dict[str, Run] = {name: partial(forward, model, x) for name, model in nets.items()}
    with torch.inference_mode():
        with _plainly():
            expected = {name: run() for name, run in contenders.items()}
        for name in (OURS, FOLDED):
            agree(name, contenders[name](), expected[OURS], device)
    if how == "compile":
        torch.compiler.reset()
        contenders = {name: partial(torch.compile(model), x) for name, model in nets.items()}
    elif how == "onnx":
        contenders = {name: _onnx_session(model, x, options.threads) for name, model in nets.items()}
    if how != "infer":
        with torch.inference_mode():
            for name, run in contenders.items():
                agree(f"{name}, {_WORDS[how]}", run(), expected[name], device)
    return Case(contenders, torch.inference_mode, note=note)


def _row(
    device: str, how: How, batch: int, channels_last: bool = False, *, seconds: float, has_goal: bool = True
) -> Row:
    above = (_ABOVE_LIMIT_TRAINING if how == "train" else _ABOVE_LIMIT) if has_goal else None
    comparisons = [
        Comparison(OURS, PLAIN, "times", 1.0 if has_goal else None),
        Comparison(OURS, PLAIN, "above", above, limit=LIMIT),
    ]
    if how != "train":
        comparisons.append(Comparison(FOLDED, PLAIN, "times"))
        comparisons.append(Comparison(FOLDED, PLAIN, "above", limit=LIMIT))
    return Row(
        id="/".join([device, "model", how, f"batch{batch}"] + ["channels_last"] * channels_last),
        what=f"{_WORDS[how]}, batch {batch}" + ", AMP" * (device == "gpu") + ", channels_last" * channels_last,
        build=partial(
            build, how=how, device="cuda" if device == "gpu" else "cpu", batch=batch, channels_last=channels_last
        ),
        comparisons=tuple(comparisons),
        needs=("cuda",) * (device == "gpu") + ("onnxruntime",) * (how == "onnx") + ("c++",) * (how == "compile"),
        seconds=seconds,
    )


def rows() -> list[Row]:
    """Rows of the whole model."""
    return [
        *(_row("cpu", "infer", 1, channels_last, seconds=12) for channels_last in (False, True)),
        *(_row("cpu", "infer", 16, channels_last, seconds=25) for channels_last in (False, True)),
        _row("cpu", "onnx", 1, seconds=12),
        _row("cpu", "onnx", 16, seconds=20),
        _row("cpu", "compile", 16, True, seconds=15, has_goal=False),
        _row("cpu", "train", 16, True, seconds=35),
        _row("gpu", "infer", 256, True, seconds=15),
        _row("gpu", "train", 256, True, seconds=20),
    ]
