"""The GPU's kernels against the plain version in float64: on the GPU if there is one, else in Triton's interpreter.

Triton decides at import whether it interprets, and code compiled by PyTorch needs it not to: without a GPU the tests
run in a process of their own, and another compiles the kernels, which the interpreter does not. To see one fail there:
`TRITON_INTERPRET=1 pytest tests/test_gpu_kernels.py -k name`.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch
from packaging.version import Version

from timm_ulsam import ULSAM
from timm_ulsam.ops import reference
from timm_ulsam.ops.reference import Norm

triton = pytest.importorskip("triton", reason="the GPU's kernels need Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = torch.cuda.is_available() or INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
if HERE:
    gpu = pytest.importorskip("timm_ulsam.ops.gpu", exc_type=ImportError)
# NumPy's, from the interpreter, where padding meets infinity
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TRAIN, EVAL, FOLDED = (True, True), (False, False), (None, None)
WEIGHTS = ["weight_dw", "bias_dw", "weight_pw", "bias_pw"]
NORMS = ["gamma_dw", "beta_dw", "gamma_pw", "beta_pw"]
RUNNING = ["mean_dw", "var_dw", "mean_pw", "var_pw"]


def parameters(channels: int, splits: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape) * std + mean).to(DEVICE, dtype)

    made = dict(
        weight_dw=normal(channels, 1, 1, 1, mean=0.3), bias_dw=normal(channels, std=0.3),
        weight_pw=normal(splits, channels // splits, 1, 1), bias_pw=normal(splits, std=0.3),
    )  # fmt: skip
    for name, size in (("dw", channels), ("pw", splits)):
        made |= {f"gamma_{name}": normal(size, mean=1, std=0.3), f"beta_{name}": normal(size, mean=0.3, std=0.3)}
        made |= {f"mean_{name}": normal(size, std=0.3), f"var_{name}": normal(size).square() + 0.3}
    return made


def run(function, x, grad, params, training, map_scale=None, momentum=(0.1, 0.3), dtype=None):
    """Output, gradients and running statistics; in `dtype` if given."""
    params = {k: v.detach().to(dtype or v.dtype).clone() for k, v in params.items()}
    x = x.detach().to(dtype or x.dtype).requires_grad_()
    names = [n for n in WEIGHTS + NORMS if n in WEIGHTS or training[n.endswith("pw")] is not None]
    for name in names:
        params[name].requires_grad_()
    norms = {}
    for kind, train, share in zip(("dw", "pw"), training, momentum, strict=True):
        norm = [params[f"{n}_{kind}"] for n in ("gamma", "beta", "mean", "var")]
        norms[kind] = None if train is None else Norm(*norm, train, share, 1e-3)
    if map_scale is not None:
        map_scale = map_scale.to(dtype or map_scale.dtype)
    out = function(x, *(params[n] for n in WEIGHTS[:2]), norms["dw"],
                   *(params[n] for n in WEIGHTS[2:]), norms["pw"], map_scale)  # fmt: skip
    gradients = torch.autograd.grad(out, [x, *(params[n] for n in names)], grad.to(out.dtype))
    found = dict(zip(["out", "grad_x", *(f"grad_{n}" for n in names)], [out.detach(), *gradients], strict=True))
    return found | {n: params[n] for n in RUNNING}


def assert_close(found, expected, tolerance: float, absolute: float) -> None:
    for key, value in expected.items():
        error = (found[key].double() - value).abs().max()
        limit = max(tolerance, torch.finfo(found[key].dtype).eps) * value.abs().max() + absolute
        assert error <= limit, f"{key}: {error} > {limit}"


def check(x, splits, training=TRAIN, dtype=torch.float32, params=None, tolerance=5e-5, **options):
    params = params or parameters(x.shape[1], splits, dtype)
    grad = torch.randn(x.shape).to(x)
    found = run(gpu.ulsam, x, grad, params, training, **options)
    expected = run(reference.ulsam, x, grad, params, training, dtype=torch.float64, **options)
    # the gradient of a bias in front of a batch norm is what rounding leaves of large sums
    gradients = [v.abs().max().item() for k, v in expected.items() if k.startswith("grad_")]
    assert_close(found, expected, tolerance, tolerance * 2e-2 * max(gradients))
    assert found["out"].dtype == x.dtype
    assert found["grad_x"].dtype == x.dtype
    if x.dtype == torch.float32:
        # what attention adds, apart from x itself
        share = found["out"] - x, expected["out"] - x.double()
        assert (share[0] - share[1]).abs().max() <= tolerance * share[1].abs().max() + 1e-6 * x.abs().max()
        share = found["grad_x"] - grad, expected["grad_x"] - grad.double()
        assert (share[0] - share[1]).abs().max() <= tolerance * share[1].abs().max() + 1e-6 * grad.abs().max()
    return found, expected


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # cuDNN computes what some are compared with


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [TRAIN, EVAL, FOLDED])
def test_output_gradients_and_statistics_are_those_of_the_plain_version(training, dtype, memory_format):
    x = tensor(2, 6, 4, 6, dtype=dtype).contiguous(memory_format=memory_format)
    found, _ = check(x, 2, training)
    assert found["out"].is_contiguous(memory_format=memory_format)
    assert found["grad_x"].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("training", [(True, False), (False, True), (None, True), (True, None)])
def test_norms_may_differ_in_where_their_statistics_come_from(training):
    check(tensor(2, 4, 4, 5), 2, training)


@pytest.mark.parametrize("training", [TRAIN, EVAL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_may_be_half_precision_too(dtype, training):
    check(tensor(2, 4, 4, 5, dtype=dtype), 2, training, dtype)


@pytest.mark.parametrize("training", [TRAIN, EVAL])
@pytest.mark.parametrize(
    ("shape", "splits"),
    [
        ((3, 4, 1, 1), 2), ((2, 4, 5, 7), 2), ((2, 2, 1, 9), 1), ((2, 2, 9, 1), 1), ((1, 3, 7, 7), 3),
        ((2, 1, 3, 3), 1), ((1, 10, 3, 5), 2), ((1, 2, 3, 70), 1),
    ],
)  # fmt: skip
def test_any_size_number_of_channels_and_of_groups(shape, splits, training):
    check(tensor(*shape), splits, training)


@pytest.mark.parametrize("training", [TRAIN, EVAL])
def test_large_maps_and_many_channels_are_done_in_pieces(training, monkeypatch):
    monkeypatch.setattr(gpu, "_FUSED_BYTES", 0)
    monkeypatch.setattr(gpu, "_row_tile", lambda width, channels, elements: (2, 4))
    monkeypatch.setattr(gpu, "_tile", lambda t, channels, elements: (2, 16))
    monkeypatch.setattr(gpu, "_PROGRAMS", 8)
    check(tensor(1, 5, 9, 6), 1, training)


def test_maps_beyond_one_kernel_take_two():
    x, params = tensor(1, 2, 20, 410), parameters(2, 1)
    exact = {k: v.double() for k, v in params.items()}
    expected = call(reference.ulsam, x.double(), exact, False)
    assert (call(gpu.ulsam, x, params, False) - expected).abs().max() <= 2**-23 * expected.abs().max()


@pytest.mark.parametrize(
    "view",
    [
        lambda: tensor(2, 9, 3, 4)[:, 2:8],
        lambda: tensor(2, 9, 3, 4).contiguous(memory_format=torch.channels_last)[:, 2:8],
        lambda: tensor(2, 6, 4, 3).transpose(2, 3),
        lambda: tensor(6, 2, 3, 4).transpose(0, 1),
        lambda: tensor(2, 6, 6, 4)[:, :, ::2],
        lambda: tensor(2, 6, 3, 8)[..., 2:7],
        lambda: tensor(1, 6, 3, 4).expand(2, -1, -1, -1),
    ],
)
@pytest.mark.parametrize("training", [TRAIN, EVAL])
def test_views_of_any_strides(view, training):
    check(view(), 2, training)


@pytest.mark.parametrize("training", [TRAIN, EVAL])
def test_parameters_may_be_slices_and_the_map_scale_expanded(training):
    x, params = tensor(2, 6, 4, 5), parameters(6, 2)
    slices = {k: torch.stack([v, torch.full_like(v, 9.0)], -1)[..., 0] for k, v in params.items()}
    scale = torch.full((1, 1, 1, 1), 0.5, device=DEVICE).expand(2, 1, 1, 1)
    results = []
    for p, s in ((params, scale.contiguous()), (slices, scale)):
        norms = [
            Norm(*(p[f"{n}_{kind}"] for n in ("gamma", "beta", "mean", "var")), train, 0.1, 1e-5)
            for kind, train in zip(("dw", "pw"), training, strict=True)
        ]
        learned = [p[n].requires_grad_() for n in WEIGHTS + NORMS]
        y = gpu.ulsam(x, *(p[n] for n in WEIGHTS[:2]), norms[0], *(p[n] for n in WEIGHTS[2:]), norms[1], s)
        results.append([y, *torch.autograd.grad(y.square().sum(), learned), *(p[n] for n in RUNNING)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_layer_runs_them(monkeypatch):
    monkeypatch.setenv("TIMM_ULSAM_KERNEL", "triton")
    ran, function = [], gpu.ulsam
    monkeypatch.setattr(gpu, "ulsam", lambda *args: ran.append(1) or function(*args))
    layer, x = ULSAM(8, 2, device=DEVICE), tensor(2, 8, 4, 5)
    found = layer(x)
    found.square().sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    assert ran == [1]
    monkeypatch.setenv("TIMM_ULSAM_KERNEL", "reference")
    layer.zero_grad()
    expected = layer(x)
    expected.square().sum().backward()
    assert ran == [1]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, [p.grad for p in layer.parameters()], rtol=1e-4, atol=1e-4)


def test_gradients_of_any_strides():
    x, params = tensor(2, 4, 4, 5), parameters(4, 2)
    for grad in (
        torch.ones((), device=DEVICE).expand(x.shape),
        tensor(2, 4, 4, 5).contiguous(memory_format=torch.channels_last),
        tensor(2, 4, 5, 4).transpose(2, 3),
    ):
        found = run(gpu.ulsam, x, grad, params, TRAIN)
        expected = run(reference.ulsam, x, grad, params, TRAIN, dtype=torch.float64)
        assert_close(found, expected, 2e-5, 1e-6)


@pytest.mark.parametrize("training", [TRAIN, EVAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_values_pass_their_gradient_to_the_first(dtype, training):
    steps = torch.randint(0, 2, (2, 4, 4, 5)).to(DEVICE, dtype)  # ties in every window
    check(steps, 2, training)
    params = parameters(4, 2)
    params["beta_dw"].abs_()
    check(torch.full_like(steps[:1], 0.5), 2, training, params=params)
    check(torch.zeros_like(steps[:1]), 2, training, params=params)


@pytest.mark.parametrize("training", [TRAIN, EVAL])
def test_channels_of_scale_zero_pass_their_gradient_to_the_first(training):
    params = parameters(4, 2)
    params["beta_dw"].abs_().add_(0.5)
    params["weight_dw"][1] = 0
    params["gamma_dw"][2] = 0
    check(tensor(2, 4, 4, 5), 2, training, params=params)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("training", [TRAIN, EVAL, FOLDED])
def test_what_is_not_finite_spreads_as_in_the_plain_version(training, value):
    x, params, grad = tensor(2, 4, 4, 5), parameters(4, 2), tensor(2, 4, 4, 5)
    x[0, 1, 2, 2] = value
    found = run(gpu.ulsam, x, grad, params, training)["out"]
    expected = run(reference.ulsam, x, grad, params, training)["out"]
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_large_scores_and_values_stay_finite():
    x, params, grad = tensor(2, 4, 4, 5) * 100, parameters(4, 2), tensor(2, 4, 4, 5)
    params["gamma_pw"] *= 300
    found = run(gpu.ulsam, x, grad, params, TRAIN)
    expected = run(reference.ulsam, x, grad, params, TRAIN, dtype=torch.float64)
    assert_close({"out": found["out"]}, {"out": expected["out"]}, 1e-4, 0)
    assert all(v.isfinite().all() for v in found.values())
    x = (tensor(2, 4, 4, 5) * 2e4).clamp(-6e4, 6e4).half()
    params = parameters(4, 2)
    for name in RUNNING:
        params[name] = params[name].float()
    found, _ = check(x, 2, TRAIN, params=params)
    assert all(v.isfinite().all() for v in found.values())


def test_statistics_of_values_far_from_zero_do_not_cancel():
    check(tensor(2, 4, 4, 5) + 1000, 2, TRAIN, tolerance=1e-3)


@pytest.mark.parametrize("training", [TRAIN, EVAL])
def test_map_scale_multiplies_the_maps_of_each_sample(training, monkeypatch):
    scale = torch.tensor([0.0, 2.0], device=DEVICE).view(2, 1, 1, 1)
    check(tensor(2, 4, 4, 5), 2, training, map_scale=scale)
    monkeypatch.setattr(gpu, "_FUSED_BYTES", 0)
    check(tensor(2, 4, 4, 5), 2, training, map_scale=scale)


def test_map_scale_may_need_a_gradient():
    x, params = tensor(2, 4, 4, 5), parameters(4, 2)
    scale = torch.ones(2, 1, 1, 1, device=DEVICE, requires_grad=True)
    out = gpu.ulsam(x, *(params[n] for n in WEIGHTS[:2]), None, *(params[n] for n in WEIGHTS[2:]), None, scale)
    out.sum().backward()
    assert scale.grad.abs().min() > 0


def call(function, x: torch.Tensor, params: dict[str, torch.Tensor], training: bool = True) -> torch.Tensor:
    norms = [Norm(*(params[f"{n}_{k}"] for n in ("gamma", "beta", "mean", "var")), training, 0.1, 1e-5)
             for k in ("dw", "pw")]  # fmt: skip
    return function(
        x, params["weight_dw"], params["bias_dw"], norms[0], params["weight_pw"], params["bias_pw"], norms[1]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    x, params = tensor(2, 4, 4, 5, dtype=dtype), parameters(4, 2)
    expected = call(gpu.ulsam, x, params, False)
    with torch.autocast(DEVICE, torch.bfloat16 if dtype == torch.float32 else torch.float16):
        found = call(gpu.ulsam, x, params, False)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_same_input_gives_the_same_bits():
    x, params, grad = tensor(2, 4, 3, 4), parameters(4, 2), tensor(2, 4, 3, 4)
    for training in (TRAIN, EVAL):
        one, two = (run(gpu.ulsam, x, grad, params, training) for _ in range(2))
        assert all(torch.equal(one[k], two[k]) for k in one)


def test_one_value_for_each_channel_is_refused_in_training():
    params = parameters(4, 2)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        call(gpu.ulsam, tensor(1, 4, 1, 1), params)
    assert call(gpu.ulsam, tensor(1, 4, 1, 1), params, False).shape == (1, 4, 1, 1)


def test_what_the_kernels_do_not_know_is_left_to_the_plain_version():
    params = parameters(4, 2)
    assert call(gpu.ulsam, tensor(0, 4, 3, 3), params).shape == (0, 4, 3, 3)
    exact = {k: v.double() for k, v in params.items()}
    assert call(gpu.ulsam, tensor(2, 4, 3, 3).double(), exact).dtype == torch.float64


def test_norms_without_running_statistics_train():
    params = parameters(4, 2)
    x = tensor(2, 4, 3, 3)
    expected = call(gpu.ulsam, x, params)
    assert torch.equal(call(gpu.ulsam, x, params | dict.fromkeys(RUNNING)), expected)


def test_gradients_can_be_differentiated_again():
    x, params = tensor(2, 4, 3, 4).requires_grad_(), parameters(4, 2)
    penalties = []
    for function, dtype in ((gpu.ulsam, torch.float32), (reference.ulsam, torch.float64)):
        y = x.detach().to(dtype).requires_grad_()
        weights = [params[n].to(dtype).requires_grad_() for n in WEIGHTS]
        out = function(y, *weights[:2], None, *weights[2:], None)
        gradient = torch.autograd.grad(out.square().sum(), [y, *weights], create_graph=True)
        penalties.append(torch.autograd.grad(sum(g.square().sum() for g in gradient), [y, *weights]))
    largest = max(p.abs().max() for p in penalties[1])
    for found, expected in zip(*penalties, strict=True):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-6 * largest


def test_many_gradients_can_be_had_at_once():
    x, params = tensor(2, 4, 3, 4).requires_grad_(), parameters(4, 2)
    weights = [params[n] for n in WEIGHTS]
    out = gpu.ulsam(x, *weights[:2], None, *weights[2:], None)
    grads = tensor(3, *x.shape)
    (many,) = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)
    for found, grad in zip(many, grads, strict=True):
        (expected,) = torch.autograd.grad(out, x, grad, retain_graph=True)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def arguments(x: torch.Tensor, training: bool) -> tuple:
    params = parameters(x.shape[1], 2)
    for name in WEIGHTS + NORMS:
        params[name].requires_grad_()
    running = {n: None if training else params[n] for n in RUNNING}
    names = ["weight_dw", "bias_dw", "gamma_dw", "beta_dw", "mean_dw", "var_dw",
             "weight_pw", "bias_pw", "gamma_pw", "beta_pw", "mean_pw", "var_pw"]  # fmt: skip
    return x, *((params | running)[n] for n in names), None, training, training, 1e-5, 1e-5


@pytest.mark.parametrize(("training", "memory_format"), [(True, torch.contiguous_format), (False, torch.channels_last)])
def test_operators_keep_the_rules_of_torch_library(memory_format, training):
    x = tensor(1, 4, 2, 3).contiguous(memory_format=memory_format).requires_grad_()
    inputs = arguments(x, training)
    torch.library.opcheck(gpu._forward, inputs)
    inputs = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in inputs)
    out, *kept = gpu._forward(*inputs)
    torch.library.opcheck(gpu._backward, (torch.ones_like(out), inputs[0], *kept, *inputs[1:8], *inputs[9:]))


@pytest.mark.parametrize("training", [False, True])
def test_compiles_to_one_graph(training):
    params, graphs = parameters(4, 2), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x = tensor(2, 4, 4, 5).requires_grad_()
    own = {k: v.clone() for k, v in params.items()}
    expected = call(gpu.ulsam, x, params, training)
    torch.testing.assert_close(
        torch.compile(call, backend=backend, fullgraph=True)(gpu.ulsam, x, own, training), expected
    )
    assert len(graphs) == 1
    for n in RUNNING:
        torch.testing.assert_close(own[n], params[n])
    torch._dynamo.reset()
    found = torch.compile(call, backend="aot_eager", fullgraph=True)(gpu.ulsam, x, own, training)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), x)[0])


if not HERE:
    for name in [n for n in globals() if n.startswith("test_")]:
        del globals()[name]

    def test_kernels_in_the_interpreter(tmp_path):
        installed = Version(triton.__version__), Version(numpy.__version__)
        if installed[0] < Version("3.7") and installed[1] >= Version("2.4"):
            # triton-lang/triton#9171: it fails at the first loop
            pytest.skip("the interpreter of Triton {} needs NumPy < 2.4 and found {}".format(*installed))
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", __file__]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        # away from the checkout, which `-m` would put before the installed package
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.fail(done.stdout + done.stderr, pytrace=False)

    @pytest.mark.parametrize("capability", ["75", "80", "90"])
    def test_kernels_compile_to_machine_code(capability, tmp_path):
        command = [sys.executable, str(Path(__file__).with_name("gpu_compiler.py")), capability]
        environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.fail(done.stdout + done.stderr, pytrace=False)
        kernels = "attend fused input_gradient map_gradient merge_statistics parameter_gradient score statistics"
        assert done.stdout.split() == [f"{name}_kernel" for name in kernels.split()]

    def test_kernels_are_tuned_by_one_thread_at_a_time(monkeypatch):
        kernels = pytest.importorskip("timm_ulsam.ops.gpu_kernels")
        inside, most = [], []

        def run(self):
            inside.append(self)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

        monkeypatch.setattr(triton.runtime.Autotuner, "run", run)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda kernel: kernel.run(), [kernels.score_kernel, kernels.attend_kernel] * 4))
        assert most == [1] * 8
