import copy
import warnings

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from timm_ulsam.layers import DOConv2d

FILES = [
    "conv3x3_s1_bias",
    "conv3x3_s2_nobias",
    "depthwise3x3_s1_nobias",
    "depthwise3x3_s2_bias",
    "depthwise3x3_mult2",
    "grouped3x3_g4_bias",
    "conv1x1_bias",
    "conv1x1_s2_g2_nobias",
    "conv3x3_dmul18",
    "conv3x3_dmul12_nobias",
    "conv3x3_dmul4",
    "conv7x7_s2_stem",
    "conv1x3_pad01",
    "conv3x3_dil2",
    "conv3x3_circular",
]
KINDS = {
    "dense": dict(),
    "grouped": dict(groups=2),
    "depthwise": dict(groups=8, out_channels=8),
    "multiplied depthwise": dict(groups=8, out_channels=16),
    "1x1": dict(kernel_size=1, padding=0),
    "long": dict(d_mul=20, bias=False),
    "reflected": dict(padding=(1, 2), padding_mode="reflect"),
}


def published(name: str) -> tuple[DOConv2d, dict[str, torch.Tensor]]:
    file = f"layer_{name}"
    tensors = reference.tensors("do_conv", file)
    arguments = {
        k: tuple(v) if isinstance(v, list) else v for k, v in reference.config("do_conv", file)["kwargs"].items()
    }
    if "D_mul" in arguments:
        arguments["d_mul"] = arguments.pop("D_mul")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = DOConv2d(**arguments)
    layer.load_state_dict(reference.part(tensors, "param."), strict=True)
    return layer.eval(), tensors


def make(kind: str = "dense", **kwargs) -> DOConv2d:
    """A layer whose D is not zero."""
    torch.manual_seed(0)
    arguments = dict(in_channels=8, out_channels=12, kernel_size=3, padding=1)
    layer = DOConv2d(**{**arguments, **KINDS[kind], **kwargs})
    if layer.D is not None:
        nn.init.normal_(layer.D.data, std=0.3)
    return layer


def image(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 8, 9, 7, dtype=dtype)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_outputs_and_gradients_are_the_published(name, training):
    layer, tensors = published(name)
    layer.train(training)
    x = tensors["input"].requires_grad_()
    y = layer(x)
    reference.assert_close(y, tensors["output"], 5e-6)
    (y * tensors["grad_seed"]).sum().backward()
    reference.assert_close(x.grad, tensors["grad_input"], 5e-6)
    gradients = reference.part(tensors, "grad_param.")
    assert gradients.keys() == dict(layer.named_parameters()).keys()
    for key, gradient in gradients.items():
        reference.assert_close(layer.get_parameter(key).grad, gradient, 5e-6, key)


@pytest.mark.parametrize("name", FILES)
def test_output_in_float64_is_the_published(name):
    layer, tensors = published(name)
    reference.assert_close(layer.double()(tensors["input"].double()), tensors["output_f64"], 1e-10)


@pytest.mark.parametrize("name", FILES)
def test_folded_kernels_are_the_published(name):
    layer, tensors = published(name)
    layer.reparameterize()
    expected = reference.part(tensors, "fused.")
    assert list(layer.state_dict()) == [key for key in ("weight", "bias") if key in expected]
    for key, tensor in layer.state_dict().items():
        reference.assert_close(tensor, expected[key], 5e-6, key)
    reference.assert_close(layer(tensors["input"]), tensors["output_fused"], 5e-6)


@pytest.mark.parametrize("name", FILES)
def test_a_fresh_layer_has_the_published_keys_shapes_and_constant(name):
    layer, tensors = published(name)
    layer.reset_parameters()
    state = reference.part(tensors, "param.")
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in state.items()}
    if layer.D is not None:
        assert torch.equal(layer.d_diag, state["d_diag"])
        assert not layer.D.any()
        assert "d_diag" not in dict(layer.named_parameters())


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel_size", [1, 3, (1, 5)])
def test_it_starts_as_the_plain_convolution_of_the_same_seed(kernel_size, groups):
    torch.manual_seed(3)
    plain = nn.Conv2d(8, 12, kernel_size, groups=groups)
    torch.manual_seed(3)
    layer = DOConv2d(8, 12, kernel_size, groups=groups)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", KINDS)
def test_folding_changes_no_output_once_or_twice_and_leaves_a_plain_convolution(kind, dtype, tolerance):
    layer, x = make(kind, dtype=dtype), image(dtype)
    expected, bias = layer(x), layer.bias
    plain = nn.Conv2d(8, layer.out_channels, layer.kernel_size, groups=layer.groups, bias=bias is not None)
    for _ in range(2):
        layer.reparameterize()
        reference.assert_close(layer(x), expected.detach(), tolerance)
        assert [(k, p.shape) for k, p in layer.named_parameters()] == [
            (k, p.shape) for k, p in plain.named_parameters()
        ]
        assert layer.weight.is_leaf
        assert layer.weight.is_contiguous()
        assert not list(layer.buffers())
    plain.load_state_dict(layer.state_dict())


def test_folding_composes_in_float64():
    layer = make()
    exact = copy.deepcopy(layer).double().weight.float()
    layer.reparameterize()
    assert torch.equal(layer.weight, exact)


def test_a_folded_layer_keeps_what_is_trained_and_trains():
    layer = make().requires_grad_(False)
    layer.reparameterize()
    assert not layer.weight.requires_grad
    layer.requires_grad_()
    layer(image()).sum().backward()
    assert layer.weight.grad.any()
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


def test_folding_leaves_a_computed_factor_alone():
    layer, x = make(), image()
    parametrizations.weight_norm(layer, "W")
    expected = layer(x)
    layer.reparameterize()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_state_dict_becomes_w_in_an_unfolded_layer(kind):
    folded, x = make(kind), image()
    folded.reparameterize()
    fresh = make(kind)
    fresh.load_state_dict(folded.state_dict(), strict=True)
    reference.assert_close(fresh(x), folded(x).detach(), 1e-6)
    assert fresh.D is None or not fresh.D.any()
    fresh(x).square().sum().backward()
    assert all(p.grad.any() for p in fresh.parameters())
    again = make(kind)
    again.reparameterize()
    again.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(again(x), folded(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_of_factors_loads_into_a_folded_layer(kind):
    layer, x = make(kind), image()
    state = layer.state_dict()
    keys = list(state)
    folded = make(kind)
    folded.reset_parameters()
    folded.reparameterize()
    folded.load_state_dict(state, strict=True)
    layer.reparameterize()
    assert torch.equal(folded(x), layer(x))
    assert list(state) == keys


def test_a_state_dict_that_does_not_fit_names_key_and_shapes():
    wrong = nn.Conv2d(8, 12, 5).state_dict()
    with pytest.raises(RuntimeError, match=r"W: .*\[12, 8, 25\]\) from checkpoint.*\[12, 8, 9\]"):
        make().load_state_dict(wrong)
    folded = make()
    folded.reparameterize()
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight".*\n.*Unexpected.*"W"'):
        folded.load_state_dict({"W": torch.zeros(12, 8, 9), "bias": torch.zeros(12)})
    with pytest.warns(UserWarning, match="d_mul=4"):
        short = DOConv2d(8, 12, 3, d_mul=4)
    with pytest.raises(RuntimeError, match="weight: a plain kernel cannot be composed with d_mul=4"):
        short.load_state_dict(nn.Conv2d(8, 12, 3).state_dict())


def test_a_small_d_mul_starts_as_a_zero_kernel_with_one_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = DOConv2d(8, 12, 3, d_mul=4, bias=False)
    (warning,) = caught
    assert "d_mul=4 is less than the kernel's area 9" in str(warning.message)
    assert warning.filename == __file__
    assert not layer(image()).any()


def test_the_weight_is_composed_and_differentiable():
    layer = make("grouped")
    assert layer.weight.shape == (12, 4, 3, 3)
    assert layer.weight.dtype == layer.W.dtype
    layer.weight.square().sum().backward()
    assert layer.W.grad.any()
    assert layer.D.grad.any()


def test_initializers_of_plain_convolutions_pass_it_by():
    assert not isinstance(make(), nn.Conv2d)


@pytest.mark.parametrize("kind", ["dense", "depthwise"])
def test_under_autocast_a_small_d_is_not_lost(kind):
    layer, x = make(kind), image()
    nn.init.normal_(layer.D.data, std=1e-3)
    expected = layer.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, composed = layer(x), layer.weight
    assert torch.equal(composed, expected)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.D.grad.dtype == torch.float32
    layer.reparameterize()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), y)


def test_in_bfloat16_the_kernel_is_rounded_once():
    layer = make().bfloat16()
    exact = copy.deepcopy(layer).float().weight.bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, exact)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_scripted_traced_compiled_exported_and_copied(kind, folded):
    layer, x = make(kind).eval(), image()
    if folded:
        layer.reparameterize()
    expected = layer(x)
    torch._dynamo.reset()
    for other in (
        torch.jit.script(layer),
        torch.jit.trace(layer, x),
        torch.fx.symbolic_trace(layer),
        torch.compile(layer, fullgraph=True, backend="eager"),
        torch.export.export(layer, (x,)).module(),
        copy.deepcopy(layer),
    ):
        assert torch.equal(other(x), expected)


def test_compiled_under_autocast_it_composes_in_float32():
    layer, x = make(), image()
    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


def test_channels_last_stays_channels_last():
    layer, x = make().to(memory_format=torch.channels_last), image().to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    reference.assert_close(y, layer(x.contiguous()).detach(), 1e-6)


@pytest.mark.parametrize("padding", [(1, 2), (0, 3), 2, "same", "valid"])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
def test_padding_is_that_of_a_plain_convolution(padding, padding_mode):
    conv = nn.Conv2d(8, 6, (3, 4), padding=padding, dilation=(2, 1), padding_mode=padding_mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of what "same" costs for even kernels
        assert torch.equal(DOConv2d.from_conv(conv)(x := image()), conv(x))


@pytest.mark.parametrize("d_mul", [None, 9, 18, 20])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_from_conv_keeps_output_dtype_mode_and_what_is_trained(groups, d_mul):
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups, dtype=torch.float64).eval()
    conv.weight.requires_grad_(False)
    state = torch.random.get_rng_state()
    layer = DOConv2d.from_conv(conv, d_mul=d_mul)
    assert torch.equal(torch.random.get_rng_state(), state)
    x = image(torch.float64)
    assert torch.equal(layer(x), conv(x))
    assert not layer.training
    assert layer.d_mul == (d_mul or 9)
    assert {k: p.requires_grad for k, p in layer.named_parameters()} == {"W": False, "D": False, "bias": True}
    layer.bias.data.zero_()
    assert conv.bias.any()


def test_from_conv_takes_the_device():
    layer = DOConv2d.from_conv(nn.Conv2d(8, 16, 3, device="meta"))
    layer.reparameterize()
    assert layer.weight.device == layer.bias.device == torch.device("meta")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(in_channels=0), "in_channels=0 is not a positive integer"),
        (dict(out_channels=2.0), "out_channels=2.0 is not"),
        (dict(groups=0), "groups=0 is not"),
        (dict(groups=3), r"groups=3 does not divide in_channels=8; accepted: \[1, 2, 4, 8\]"),
        (dict(groups=8), r"groups=8 does not divide out_channels=12; accepted: \[1, 2, 3"),
        (dict(d_mul=0), "d_mul=0 is not"),
        (dict(d_mul=0, kernel_size=1), "d_mul=0 is not"),
        (dict(kernel_size=0), "kernel_size=0; accepted: an integer from 1"),
        (dict(kernel_size=(3, 3, 3)), r"kernel_size=\(3, 3, 3\); accepted"),
        (dict(stride=True), "stride=True; accepted"),
        (dict(dilation=(1, 0)), r"dilation=\(1, 0\); accepted"),
        (dict(padding=-1), "padding=-1; accepted: an integer from 0"),
        (dict(padding="full"), "full"),
        (dict(padding_mode="wrap"), "padding_mode='wrap'"),
    ],
)
def test_bad_arguments_are_refused_and_the_accepted_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DOConv2d(**{**dict(in_channels=8, out_channels=12, kernel_size=3), **kwargs})


@pytest.mark.parametrize("shape", [(2, 7, 5, 5), (8, 5, 5)])
def test_a_bad_input_is_refused(shape):
    with pytest.raises(ValueError, match=r"accepted is \(N, 8, H, W\)"):
        make()(torch.zeros(shape))


def test_from_conv_refuses_what_it_would_change():
    class Own(nn.Conv2d):
        pass

    with pytest.raises(ValueError, match=r"conv is of Own; accepted is nn\.Conv2d"):
        DOConv2d.from_conv(Own(8, 8, 3))
    with pytest.raises(ValueError, match=r"d_mul=8 is too small for the kernel \(3, 3\); accepted: from 9"):
        DOConv2d.from_conv(nn.Conv2d(8, 8, 3), d_mul=8)


def test_a_folded_layer_is_replicated_and_pruned():
    layer, x = DOConv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)
    nn.init.normal_(layer.D)
    with pytest.raises(AttributeError, match="composed of W and D"):
        layer.weight = torch.zeros(6, 4, 3, 3)
    layer.reparameterize()
    replica = layer._replicate_for_data_parallel()  # as nn.DataParallel does it, which needs several GPUs
    for own, made in ((layer._parameters, replica._parameters), (layer._buffers, replica._buffers)):
        for key, tensor in own.items():
            if tensor is None:
                made[key] = None
            else:
                setattr(replica, key, tensor.detach().clone())
    assert torch.equal(replica(x), layer(x))
    kernel = layer.weight.detach().clone()
    prune.l1_unstructured(layer, "weight", 0.5)
    y = layer(x)
    assert (layer.weight == 0).sum() == kernel.numel() // 2
    torch.testing.assert_close(y, F.conv2d(x, layer.weight, layer.bias, padding=1))
    y.sum().backward()
    prune.remove(layer, "weight")
    torch.testing.assert_close(layer(x), y)
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_a_layer_with_a_pruned_bias_folds():
    layer, x = DOConv2d(4, 4, 3).double(), image(torch.float64)[:, :4]
    prune.random_unstructured(layer, "bias", 0.5)
    expected = layer(x)
    layer.reparameterize()
    reference.assert_close(layer(x), expected, 1e-12)
    assert "W" not in layer.state_dict()
