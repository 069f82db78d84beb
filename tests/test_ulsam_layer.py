import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from conftest import SHARED
from safetensors.torch import load_file
from timm.models.cspnet import model_cfgs
from torch import nn

from timm_ulsam import ULSAM

REFERENCE = [
    Path(__file__).parent / "data/ulsam_c32_g1.safetensors",
    Path(__file__).parent / "data/ulsam_c64_g16.safetensors",
    SHARED / "reference/ulsam/ulsam_c96_g4.safetensors",
]
OUR_NAMES = {
    "conv_dws": "conv_dw",
    "bn_dws": "bn_dw",
    "conv_point": "conv_pw",
    "bn_point": "bn_pw",
}


def reference(path: Path) -> dict[str, torch.Tensor]:
    if not path.exists():
        pytest.skip(f"{path} is not at hand")
    return load_file(path)


def published(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def layer_from(tensors: dict[str, torch.Tensor]) -> ULSAM:
    state = published(tensors, "param.")
    num_splits = len({k.split(".")[1] for k in state})
    layer = ULSAM(tensors["input"].shape[1], num_splits, norm_layer=partial(nn.BatchNorm2d, momentum=0.9))
    layer.load_state_dict(state)
    return layer


def assert_same_by_subspace(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], num_splits: int, relative: float, absolute: float
) -> None:
    """Every published tensor is its subspace's share of ours, relative to the tensor's largest value."""
    assert theirs
    for key, value in theirs.items():
        _, index, module, name = key.split(".")
        mine = ours[f"{OUR_NAMES[module]}.{name}"]
        if mine.dim() > 0:
            mine = mine.chunk(num_splits)[int(index)]
        assert mine.shape == value.shape, key
        assert (mine - value).abs().max() <= relative * value.abs().max() + absolute, key


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("path", REFERENCE, ids=lambda path: path.stem)
def test_output_gradients_and_statistics_are_the_published_ones(path, mode, dtype, memory_format):
    tensors = reference(path)
    layer = layer_from(tensors).to(dtype).train(mode == "train")
    x = tensors["input"].to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    y = layer(x)
    (y * tensors["grad_seed"]).sum().backward()

    exact = dtype == torch.float64
    assert (y - tensors[f"{mode}.output"]).abs().max() <= (1e-6 if exact else 1e-5)
    expected = tensors[f"{mode}.grad_input"]
    relative = 1e-4
    assert (x.grad - expected).abs().max() <= relative * expected.abs().max()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    # a bias before a batch norm on batch statistics has gradient zero, in float32 what rounding leaves of large sums
    absolute = 1e-9 if exact else 1e-4 * max(g.abs().max() for g in gradients.values())
    theirs = published(tensors, f"{mode}.grad.")
    assert_same_by_subspace(gradients, theirs, layer.num_splits, relative, absolute)
    if mode == "train":
        after = published(tensors, "train.after.")
        assert_same_by_subspace(dict(layer.named_buffers()), after, layer.num_splits, relative, 1e-9 if exact else 1e-6)


@pytest.mark.parametrize("path", REFERENCE[:2], ids=lambda path: path.stem)
def test_saves_in_its_own_names_and_loads_again(path):
    tensors = reference(path)
    layer = layer_from(tensors)
    state = layer.state_dict()
    assert not any("subspaces" in key for key in state)
    again = ULSAM(layer.channels, layer.num_splits).eval()
    again.load_state_dict(state)
    assert torch.equal(again(tensors["input"]), layer.eval()(tensors["input"]))


def test_published_state_dict_inside_a_model_loads_strictly():
    tensors = reference(REFERENCE[0])
    model = nn.Sequential(nn.Identity(), ULSAM(32, 1))
    model.load_state_dict({f"1.{k}": v for k, v in published(tensors, "param.").items()})
    assert torch.equal(model[1].bn_dw.running_mean, tensors["param.subspaces.0.bn_dws.running_mean"])


def test_published_state_dict_of_another_number_of_subspaces_is_refused():
    state = published(reference(REFERENCE[1]), "param.")
    with pytest.raises(RuntimeError, match=r"holds subspaces \[0, 1, .*num_splits=4"):
        ULSAM(64, 4).load_state_dict(state)


def test_incomplete_published_state_dict_is_refused():
    state = published(reference(REFERENCE[1]), "param.")
    del state["subspaces.3.bn_dws.weight"]
    with pytest.raises(RuntimeError, match=r"bn_dw\.weight"):
        ULSAM(64, 16).load_state_dict(state)


def test_maps_are_positive_and_sum_to_one():
    layer = ULSAM(8, 2)
    maps = layer.attention(torch.randn(3, 8, 5, 7))
    assert maps.shape == (3, 2, 5, 7)
    assert (maps > 0).all()
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(3, 2))


def test_output_is_the_input_times_one_plus_its_groups_map():
    layer = ULSAM(6, 3).eval()
    x = torch.randn(2, 6, 4, 5)
    maps = layer.attention(x)
    y = layer(x)
    for channel in range(6):
        torch.testing.assert_close(y[:, channel], x[:, channel] * (1 + maps[:, channel // 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (1, 8, 1, 9), (2, 8, 5, 7)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_size_and_dtype_keeps_shape_dtype_and_format(dtype, training, shape, memory_format):
    layer = ULSAM(8, 4, dtype=dtype).train(training)
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_half_precision_is_close_to_float32():
    layer = ULSAM(16, 4).eval()
    x = torch.randn(2, 16, 7, 7).bfloat16()
    y = layer.to(torch.bfloat16)(x)
    exact = layer.float()(x.float())
    assert (y.float() - exact).abs().max() <= 2**-7 * exact.abs().max()


@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch_passes_and_leaves_the_statistics_finite(training):
    layer = ULSAM(8, 4).train(training)
    x = torch.randn(0, 8, 4, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert all(b.isfinite().all() for b in layer.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype_of_the_input(dtype):
    layer = ULSAM(8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 8, 4, 4, dtype=dtype)).dtype == dtype


def test_gradients_are_exact_in_float64():
    layer = ULSAM(4, 2, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_a_gradient_penalty_under_autocast_is_near_that_of_float32():
    torch.manual_seed(0)
    layer, x = ULSAM(8, 2), torch.randn(4, 8, 6, 6)
    penalties = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = layer(leaf).float().square().sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)  # outside autocast, as PyTorch's recipe has it
        assert gradient.dtype == dtype
        penalties.append(torch.autograd.grad(gradient.float().square().sum(), layer.conv_pw.weight)[0])
    assert (penalties[0] - penalties[1]).abs().max() <= 0.05 * penalties[1].abs().max()


def test_is_scripted_traced_compiled_exported_and_pickled():
    layer = ULSAM(8, 4).eval()
    x = torch.randn(2, 8, 5, 6)
    y = layer(x)
    for made in (
        torch.jit.script(layer),
        torch.jit.trace(layer, x),
        torch.fx.symbolic_trace(layer),
        torch.compile(layer, backend="eager", fullgraph=True),
        torch.export.export(layer, (x,)).module(),
        pickle.loads(pickle.dumps(layer)),
    ):
        torch.testing.assert_close(made(x), y)


@pytest.mark.parametrize("num_splits", [0, -4, 3, 16, 2.0, True])
def test_num_splits_that_do_not_divide_are_refused(num_splits):
    with pytest.raises(ValueError, match=rf"num_splits={num_splits!r} .*channels=8; accepted: \[1, 2, 4, 8\]"):
        ULSAM(8, num_splits)


def test_channels_below_one_are_refused():
    with pytest.raises(ValueError, match="channels=0"):
        ULSAM(0, 1)


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize(
    ("shape", "message"),
    [((8, 4, 4), r"input x of shape \[8, 4, 4\]: accepted is \(N, 8, H, W\)"), ((2, 6, 4, 4), r"shape \[2, 6, 4, 4\]")],
)
def test_inputs_of_wrong_rank_or_width_are_refused(shape, message, scripted):
    layer = torch.jit.script(ULSAM(8, 4)) if scripted else ULSAM(8, 4)
    with pytest.raises(torch.jit.Error if scripted else ValueError, match=message):
        layer(torch.randn(shape))


def test_an_activation_may_be_named_as_timm_names_it():
    assert type(ULSAM(8, act_layer="silu").act_pw) is nn.SiLU
    with pytest.raises(ValueError, match="act_layer='sillu' is no activation that timm knows; accepted: a class, or"):
        ULSAM(8, act_layer="sillu")


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", dict(block_args=dict(attn_layer=ULSAM))),
        ("resnet50", dict(block_args=dict(attn_layer=partial(ULSAM, num_splits=8)))),
        ("efficientnet_b0", dict(se_layer=ULSAM)),
        ("cs3darknet_m", dict(stages=replace(model_cfgs["cs3darknet_m"].stages, attn_layer=ULSAM))),
    ],
)
def test_serves_as_attn_layer_of_timm_models_and_trains(name, kwargs):
    model = timm.create_model(name, num_classes=3, **kwargs)
    layers = [m for m in model.modules() if isinstance(m, ULSAM)]
    assert layers
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None for layer in layers for p in layer.parameters())
