"""The fast versions of ULSAM's arithmetic against the plain one, and which of them runs when."""

import copy
import os
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_ulsam import ULSAM
from timm_ulsam.ops import Norm, compiled, cpu, dispatch, reference, ulsam

NORMAL = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))
FORMATS = [torch.contiguous_format, torch.channels_last]
TRAIN, EVAL, FOLDED = True, False, None
NAMES = ("x", "weight_dw", "bias_dw", "weight_pw", "bias_pw")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def arguments(shape: tuple[int, ...], splits: int, training: bool | None, dtype: torch.dtype = torch.float64) -> dict:
    """Inputs of `ulsam` by name, norms as lists."""
    channels = shape[1]
    made = dict(
        x=torch.randn(shape, dtype=dtype),
        weight_dw=torch.randn(channels, 1, 1, 1, dtype=dtype),
        bias_dw=torch.randn(channels, dtype=dtype),
        norm_dw=None,
        weight_pw=torch.randn(splits, channels // splits, 1, 1, dtype=dtype),
        bias_pw=torch.randn(splits, dtype=dtype),
        norm_pw=None,
    )
    if training is not FOLDED:
        for name, size in (("norm_dw", channels), ("norm_pw", splits)):
            weight, bias, mean = torch.randn(3, size, dtype=dtype)
            made[name] = [weight, bias, mean, torch.rand(size, dtype=dtype) + 0.5, training, 0.3, 1e-3]
    return made


def run(function: Callable, made: dict, grad: torch.Tensor, memory_format=torch.contiguous_format, **kwargs) -> dict:
    """Output, gradients and running statistics, by name."""
    made = copy.deepcopy(made)
    made["x"] = made["x"].contiguous(memory_format=memory_format)
    leaves = {name: made[name].requires_grad_() for name in NAMES}
    for name in ("norm_dw", "norm_pw"):
        if made[name]:
            made[name] = Norm(*made[name])
            leaves |= {f"{name}.weight": made[name].weight.requires_grad_()}
            leaves |= {f"{name}.bias": made[name].bias.requires_grad_()}
    y = function(**made, **kwargs)
    assert y.is_contiguous(memory_format=memory_format)
    found = {"y": y.detach()}
    found |= {f"grad {k}": g for k, g in zip(leaves, torch.autograd.grad(y, leaves.values(), grad), strict=True)}
    for name in ("norm_dw", "norm_pw"):
        if made[name]:
            found |= {f"{name}.running_mean": made[name].running_mean, f"{name}.running_var": made[name].running_var}
    return found


def assert_same(found: dict, expected: dict, tolerance: float) -> None:
    # a bias in front of batch statistics has gradient zero, up to what rounding leaves of the largest
    largest = max(value.abs().max() for name, value in expected.items() if name.startswith("grad "))
    for name, value in expected.items():
        limit = tolerance * (value.abs().max() + (largest if name.startswith("grad ") else 1))
        assert (found[name] - value).abs().max() <= limit, name


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [TRAIN, EVAL, FOLDED])
@pytest.mark.parametrize(
    ("shape", "splits"),
    [((5, 12, 6, 5), 4), ((5, 8, 1, 1), 2), ((5, 6, 1, 9), 6), ((5, 6, 7, 1), 1), ((5, 1, 3, 3), 1), ((5, 9, 2, 2), 3)],
)
def test_cpu_version_is_the_plain_one(shape, splits, training, memory_format, parts, monkeypatch):
    made = arguments(shape, splits, training)
    grad = torch.randn(shape, dtype=torch.float64)
    monkeypatch.setattr(cpu, "_PART", -(-made["x"].numel() // parts))
    assert len(cpu._parts(made["x"])) == parts
    expected = run(reference.ulsam, made, grad, memory_format)
    assert_same(run(cpu.ulsam, made, grad, memory_format), expected, 1e-12)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [TRAIN, EVAL, FOLDED])
def test_cpu_version_without_gradients_is_the_plain_one(training, memory_format, small, monkeypatch):
    monkeypatch.setattr(cpu, "_SMALL", 1 << 17 if small else 0)
    made = arguments((3, 8, 6, 5), 2, training)
    with torch.no_grad():
        found, expected = [], []
        for function, results in ((cpu.ulsam, found), (reference.ulsam, expected)):
            args = copy.deepcopy(made)
            args["x"] = args["x"].contiguous(memory_format=memory_format)
            norms = {name: args[name] and Norm(*args[name]) for name in ("norm_dw", "norm_pw")}
            results.append(function(**(args | norms)))
            results += [t for norm in norms.values() if norm for t in norm[2:4]]
    assert found[0].is_contiguous(memory_format=memory_format)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["channel slice", "transposed", "expanded"])
def test_cpu_version_takes_any_strides(kind, monkeypatch):
    monkeypatch.setattr(cpu, "_SMALL", 0)
    made = arguments((3, 8, 6, 6), 2, TRAIN)
    wide = torch.randn(3, 16, 6, 6, dtype=torch.float64)
    x = {
        "channel slice": wide[:, 4:12],
        "transposed": wide[:, :8].transpose(2, 3),
        "expanded": wide[:1, :8].expand(3, -1, -1, -1),
    }[kind]
    results = []
    for function in (cpu.ulsam, reference.ulsam):
        args = copy.deepcopy(made) | {"x": x}
        norms = {n: Norm(*args[n]) for n in ("norm_dw", "norm_pw")}
        plain = function(**(args | norms))
        x = x.detach().requires_grad_()
        y = function(**(args | norms | {"x": x}))
        results.append((plain, y, *torch.autograd.grad(y.square().sum(), x)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("part", [(slice(None), slice(8)), (slice(None), slice(8), slice(1, -1), slice(1, -1))])
def test_compiled_version_takes_slices(part, memory_format):
    wide = torch.randn(3, 16, 8, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
    x = wide[part] if len(part) == 2 else wide[:, :8][part]
    made = arguments(tuple(x.shape), 4, FOLDED) | {"x": x}
    with torch.no_grad():
        torch.testing.assert_close(compiled.ulsam(**made), reference.ulsam(**made))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_compiled_version_takes_no_images(memory_format):
    made = arguments((0, 8, 5, 4), 2, FOLDED)
    made["x"] = made["x"].contiguous(memory_format=memory_format)
    with torch.no_grad():
        assert compiled.ulsam(**made).shape == (0, 8, 5, 4)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [TRAIN, EVAL, FOLDED])
def test_compiled_version_is_the_plain_one(training, memory_format):
    shape = (3, 8, 6, 5)
    made, grad = arguments(shape, 4, training), torch.randn(shape, dtype=torch.float64)
    expected = run(reference.ulsam, made, grad, memory_format)
    assert_same(run(compiled.ulsam, made, grad, memory_format), expected, 1e-12)
    norms = {name: made[name] and Norm(*made[name]) for name in ("norm_dw", "norm_pw")}
    made["x"] = made["x"].contiguous(memory_format=memory_format)
    with torch.no_grad():  # pools in another way where no gradient is needed
        torch.testing.assert_close(compiled.ulsam(**(made | norms)), expected["y"])


@pytest.mark.parametrize("training", [(TRAIN, EVAL), (EVAL, TRAIN)])
def test_norms_may_be_frozen_one_by_one(training):
    made = arguments((3, 8, 6, 5), 4, TRAIN)
    made["norm_dw"][4], made["norm_pw"][4] = training
    grad = torch.randn(3, 8, 6, 5, dtype=torch.float64)
    expected = run(reference.ulsam, made, grad)
    assert_same(run(cpu.ulsam, made, grad), expected, 1e-12)
    assert_same(run(compiled.ulsam, made, grad), expected, 1e-12)


@pytest.mark.parametrize("function", [reference.ulsam, cpu.ulsam])
@pytest.mark.parametrize("training", [TRAIN, EVAL, FOLDED])
def test_first_and_second_derivatives_are_exact(training, function):
    made = arguments((2, 4, 3, 4), 2, training)

    def of(*tensors: torch.Tensor) -> torch.Tensor:
        args = made | dict(zip(NAMES, tensors[:5], strict=True))
        for i, name in enumerate(("norm_dw", "norm_pw")):
            if made[name]:
                _, _, mean, var, *rest = made[name]
                args[name] = Norm(*tensors[5 + 2 * i : 7 + 2 * i], mean.clone(), var.clone(), *rest)
        return function(**args)

    norms = [t for name in ("norm_dw", "norm_pw") if made[name] for t in made[name][:2]]
    inputs = [t.clone().requires_grad_() for t in (*(made[name] for name in NAMES), *norms)]
    assert torch.autograd.gradcheck(of, inputs)
    assert torch.autograd.gradgradcheck(of, inputs)


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("training", [TRAIN, EVAL])
def test_equal_values_pass_the_gradient_to_the_first_of_a_window(training, value):
    made = arguments((2, 8, 4, 5), 2, training)
    made["x"] = torch.full_like(made["x"], value)
    grad = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    expected = run(reference.ulsam, made, grad)
    assert_same(run(cpu.ulsam, made, grad), expected, 1e-9)


def test_a_map_scale_is_the_stochastic_depth_of_each_sample():
    made, grad = arguments((3, 8, 4, 5), 2, TRAIN), torch.randn(3, 8, 4, 5, dtype=torch.float64)
    map_scale = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    expected = run(reference.ulsam, made, grad, map_scale=map_scale)
    found = run(ulsam, made, grad, map_scale=map_scale)
    assert_same(found, expected, 1e-12)
    assert torch.equal(found["y"][0], made["x"][0])


def test_a_map_scale_can_be_learned():
    made = arguments((3, 8, 4, 5), 2, FOLDED)
    map_scale = torch.ones(3, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    ulsam(**made, map_scale=map_scale).sum().backward()
    assert map_scale.grad.abs().min() > 0


def test_the_result_may_be_changed_in_place():
    layer = ULSAM(8, 2).eval()
    with torch.no_grad():
        y = layer(torch.randn(2, 8, 4, 4))
    factor = torch.ones(8, 1, 1, requires_grad=True)
    y.mul_(factor).sum().backward()
    assert factor.grad is not None


def test_statistics_may_move_between_an_evaluation_and_its_backward_pass():
    layer = ULSAM(8, 2)
    x = torch.randn(2, 8, 4, 4)
    y = layer.eval()(x)
    expected = torch.autograd.grad(y.square().sum(), layer.parameters(), retain_graph=True)
    layer.train()(x)
    for found, gradient in zip(torch.autograd.grad(y.square().sum(), layer.parameters()), expected, strict=True):
        torch.testing.assert_close(found, gradient)


def test_parameters_may_be_plain_tensors_as_shards_and_replicas_have_them():
    layer, x = ULSAM(8, 2), torch.randn(2, 8, 4, 4)
    expected = copy.deepcopy(layer)(x)
    for module in (layer.conv_dw, layer.bn_dw, layer.conv_pw, layer.bn_pw):
        for name, parameter in list(module.named_parameters()):
            delattr(module, name)
            setattr(module, name, parameter * 1.0)
    assert torch.equal(layer(x), expected)


def test_another_default_device_neither_fails_nor_leaves_a_trace():
    layer, x = ULSAM(8, 2), torch.randn(2, 8, 4, 4)
    cpu._thread.__dict__.clear()
    torch.set_default_device("meta")
    try:
        layer(x)
    finally:
        torch.set_default_device(None)
    assert layer(x).isfinite().all()


# Numerics: what float32 makes of awkward values, against float64.


def layers(channels: int = 8, splits: int = 2) -> tuple[ULSAM, ULSAM]:
    layer = ULSAM(channels, splits)
    with torch.no_grad():
        for bn in (layer.bn_dw, layer.bn_pw):
            bn.weight.uniform_(0.5, 2)
            bn.bias.uniform_(0, 1)
    return layer, copy.deepcopy(layer).double()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "x",
    [
        NORMAL * 1e4,
        NORMAL * 1e-6,
        NORMAL + 1e3,
        torch.zeros(4, 8, 6, 6),
        torch.full((4, 8, 6, 6), -7.0),
        NORMAL[..., :1, :1],
    ],
    ids=["large", "tiny", "far from zero", "zero", "constant", "one pixel"],
)
def test_awkward_inputs_stay_exact(x, training):
    layer, exact = layers()
    grad = torch.randn_like(x)
    results = []
    for module, dtype in ((layer, torch.float32), (exact, torch.float64)):
        module.train(training)
        inputs = x.detach().to(dtype, copy=True).requires_grad_()
        y = module(inputs) if dtype == torch.float32 else reference_of(module, inputs)
        y.backward(grad.to(dtype))
        results.append((y, inputs.grad, module.bn_dw.running_mean, module.bn_dw.running_var))
    for mine, theirs in zip(*results, strict=True):
        scale = max(1e-6, theirs.abs().max())
        assert (mine - theirs).abs().max() <= 2e-4 * scale


def reference_of(layer: ULSAM, x: torch.Tensor) -> torch.Tensor:
    return reference.attend(x, layer.attention(x))


def test_scores_of_large_magnitude_give_a_sharp_map():
    layer, exact = layers()
    with torch.no_grad():
        layer.bn_pw.weight.fill_(1e4)
        exact.bn_pw.weight.fill_(1e4)
    x = torch.randn(4, 8, 6, 6)
    y = layer(x)
    assert y.isfinite().all()
    assert (y - reference_of(exact, x.double())).abs().max() <= 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("small", [False, True])
def test_infinities_and_nans_go_where_the_plain_version_has_them(value, training, memory_format, small, monkeypatch):
    monkeypatch.setattr(cpu, "_SMALL", 1 << 17 if small else 0)
    layer, _ = layers()
    layer.train(training)
    x = torch.randn(4, 8, 6, 6)
    x[1, 2, 3, 4] = value
    x = x.contiguous(memory_format=memory_format)
    with torch.no_grad():
        plain = reference_of(copy.deepcopy(layer), x)
        fused = copy.deepcopy(layer)(x)
    assert not plain.isfinite().all()
    assert torch.equal(plain.isnan(), fused.isnan())
    torch.testing.assert_close(fused, plain, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_half_precision_do_not_overflow(dtype):
    layer, exact = layers()
    x = (torch.randn(4, 8, 6, 6) * 1e4).clamp(-6e4, 6e4).to(dtype)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    expected = reference_of(exact, x.double())
    assert (y.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()
    assert (layer.bn_dw.running_var - exact.bn_dw.running_var).abs().max() <= 1e-4 * exact.bn_dw.running_var.max()


# Which version runs.


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Names of the versions that ran."""
    names: list[str] = []
    for name, module in (("reference", reference), ("cpu", cpu), ("compiled", compiled)):

        def spy(*args, _name=name, _function=module.ulsam, **kwargs):
            names.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setattr(module, "ulsam", spy)
    return names


def test_the_cpu_version_runs_on_the_cpu(ran):
    ULSAM(8, 2)(torch.randn(2, 8, 4, 4))
    assert ran == ["cpu"]


def test_the_compiled_version_is_what_is_compiled(ran):
    layer, x = ULSAM(8, 2).eval(), torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x))
    assert ran == ["compiled", "cpu"]


def test_the_environment_forces_the_plain_version(ran, monkeypatch):
    monkeypatch.setenv("TIMM_ULSAM_KERNEL", "reference")
    ULSAM(8, 2)(torch.randn(2, 8, 4, 4))
    assert ran == ["reference"]


def test_an_unknown_version_is_refused(monkeypatch):
    monkeypatch.setenv("TIMM_ULSAM_KERNEL", "cuda")
    with pytest.raises(ValueError, match="TIMM_ULSAM_KERNEL='cuda'; accepted: 'auto', 'reference', 'triton'"):
        ULSAM(8, 2)(torch.randn(2, 8, 4, 4))


def test_kernels_that_cannot_run_here_are_refused(monkeypatch):
    monkeypatch.setenv("TIMM_ULSAM_KERNEL", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TIMM_ULSAM_KERNEL='triton'"):
        ULSAM(8, 2)(torch.randn(2, 8, 4, 4))


def test_kernels_that_are_missing_are_refused_and_say_why(monkeypatch):
    monkeypatch.setenv("TIMM_ULSAM_KERNEL", "triton")
    monkeypatch.setattr(dispatch, "_gpu_missing", lambda: "No module named 'triton'")
    with pytest.raises(RuntimeError, match="No module named 'triton'; accepted here: 'auto', 'reference'"):
        ULSAM(8, 2)(torch.randn(2, 8, 4, 4))


@pytest.fixture
def fresh_dispatch():
    cached = dispatch._gpu_missing, dispatch._has_kernels
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is launched in the interpreter")
def test_a_gpu_without_what_launches_kernels_runs_the_plain_version(fresh_dispatch, monkeypatch):
    gpu = pytest.importorskip("timm_ulsam.ops.gpu", reason="needs Triton", exc_type=ImportError)

    def fail():
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "check_launcher", fail)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_gpu = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0), dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"ULSAM runs without its GPU kernels.* Failed to find C compiler"):
        assert not dispatch._takes_kernels(on_gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert not dispatch._takes_kernels(on_gpu)
    monkeypatch.setattr(gpu, "check_launcher", lambda: None)
    dispatch._gpu_missing.cache_clear()
    assert dispatch._takes_kernels(on_gpu)


@pytest.mark.parametrize(
    ("capability", "dtypes"),
    [((6, 1), []), ((7, 5), [torch.float32, torch.float16]), ((8, 0), [torch.float32, torch.float16, torch.bfloat16])],
)
def test_kernels_run_where_the_gpu_has_their_instructions(capability, dtypes, fresh_dispatch, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "_gpu_missing", lambda: "")
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0), dtype=dtype)
        if dispatch._takes_kernels(x):
            found.append(dtype)
    assert found == dtypes


def test_one_value_for_each_channel_is_refused_as_by_batch_norm():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ULSAM(8, 2)(torch.randn(1, 8, 1, 1))


def test_who_counts_operators_sees_the_plain_ones(ran):
    with FlopCounterMode(display=False) as flops:
        ULSAM(8, 2)(torch.randn(1, 8, 4, 4))
    assert "cpu" not in ran
    assert flops.get_total_flops() == 2 * (8 + 8) * 16


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_parameters_of_half_precision_stay_with_the_plain_version(ran, half):
    ULSAM(8, 2).to(half).eval()(torch.randn(1, 8, 4, 4, dtype=half))
    assert ran == ["reference"]


def test_half_precision_with_parameters_of_float32_is_refused_on_meta_too():
    with pytest.raises(RuntimeError, match="should be the same"):
        ULSAM(8, 2, device="meta")(torch.randn(1, 8, 4, 4, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("made", ["eager", "compiled"])
def test_half_precision_with_parameters_of_float32_needs_autocast(half, made):
    layer, x = ULSAM(8, 2).eval(), torch.randn(1, 8, 4, 4, dtype=half)
    run = layer if made == "eager" else torch.compile(layer, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="should be the same"):
        run(x)
    with torch.autocast("cpu", half):
        torch.testing.assert_close(run(x), layer.to(half)(x), atol=0.02, rtol=0.02)


# Folding.


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_folding_changes_nothing_but_the_modules(norm_layer):
    torch.manual_seed(0)
    layer = ULSAM(16, 4, norm_layer=norm_layer)
    with torch.no_grad():
        for bn in (layer.bn_dw, layer.bn_pw):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.1, 3)
            bn.weight.normal_()
            bn.bias.normal_()
    x = torch.randn(2, 16, 7, 5)
    y = layer.eval()(x)
    layer.reparameterize()
    assert isinstance(layer.bn_dw, nn.Identity)
    assert isinstance(layer.bn_pw, nn.Identity)
    assert (layer(x) - y).abs().max() <= 1e-5
    assert (reference_of(layer, x) - y).abs().max() <= 1e-5
    once = copy.deepcopy(layer.state_dict())
    layer.reparameterize()
    assert all(torch.equal(value, once[key]) for key, value in layer.state_dict().items())
    assert torch.equal(layer.train()(x), layer.eval()(x))  # constants, whatever the mode


def test_what_is_no_batch_norm_is_not_folded():
    layer = ULSAM(8, 2, norm_layer=partial(nn.GroupNorm, 1)).eval()
    x = torch.randn(2, 8, 4, 4)
    y = layer(x)
    layer.reparameterize()
    assert isinstance(layer.bn_dw, nn.GroupNorm)
    assert torch.equal(layer(x), y)


def test_a_folded_layer_is_saved_and_loaded():
    layer = ULSAM(8, 2).eval()
    layer.bn_dw.running_mean.normal_()
    layer.reparameterize()
    x = torch.randn(2, 8, 4, 4)
    state = layer.state_dict()
    convs = {"conv_dw.weight", "conv_dw.bias", "conv_pw.weight", "conv_pw.bias"}
    assert set(state) == convs | {"bn_dw.folded", "bn_pw.folded"}
    again = ULSAM(8, 2)
    again.load_state_dict(state)
    assert torch.equal(again(x), layer(x))
    again.load_state_dict(state)  # into a folded one
    assert torch.equal(again(x), layer(x))


def test_a_state_dict_of_convolutions_alone_is_refused_and_folds_nothing():
    layer = ULSAM(8, 2)
    state = {key: value for key, value in layer.state_dict().items() if key.startswith("conv")}
    with pytest.raises(RuntimeError, match=r"Missing key.*bn_dw\.weight"):
        layer.load_state_dict(state)
    layer.load_state_dict(state, strict=False)
    assert type(layer.bn_dw) is type(layer.bn_pw) is nn.BatchNorm2d


def test_a_state_dict_with_batch_norms_does_not_load_into_a_folded_layer():
    layer = ULSAM(8, 2)
    state = copy.deepcopy(layer.state_dict())
    layer.reparameterize()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bn_dw\.weight"):
        layer.load_state_dict(state)
