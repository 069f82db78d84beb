"""WeightNet as a layer: the published numbers, every way of computing it, and its place in other networks."""

import copy

import pytest
import reference
import timm
import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import nn
from torch.nn.utils import prune

from timm_ulsam.layers import WeightNet, WeightNetConv2d, replace_convs

DENSE = {
    "layer_weightnet_k3_32_48": (32, 48, 3),
    "layer_weightnet_k3_32_48_s2_b1": (32, 48, 3, 2),
    "layer_weightnet_k1_24_24": (24, 24, 1),
}
DEPTHWISE = {"layer_weightnet_dw_k3_24_s1": (24, 24, 3), "layer_weightnet_dw_k3_48_s2": (48, 48, 3, 2)}
FORMATS = [torch.contiguous_format, torch.channels_last]


def published(file: str, dtype: torch.dtype = torch.float32) -> tuple[WeightNet, dict[str, torch.Tensor]]:
    tensors = reference.tensors("weight_net", file)
    args = {**DENSE, **DEPTHWISE}[file]
    layer = WeightNet(*args, groups=args[0] if file in DEPTHWISE else 1, dtype=dtype)
    layer.load_state_dict(reference.part(tensors, "param."))
    return layer, {k: v.to(dtype) for k, v in tensors.items()}


def plainly(layer: WeightNet, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """What WeightNet is, one sample after another, by convolutions alone."""
    outputs = []
    for sample, c in zip(x.split(1), condition.split(1), strict=True):
        scale = F.conv2d(c, layer.wn_fc1.weight, layer.wn_fc1.bias).sigmoid()
        kernel = F.conv2d(scale, layer.wn_fc2.weight, groups=layer.wn_fc2.groups).reshape(layer.kernel_shape)
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        outputs.append(F.conv2d(sample, kernel, layer.bias, *geometry))
    return torch.cat(outputs)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("file", [*DENSE, *DEPTHWISE])
def test_outputs_and_gradients_are_the_published_ones(file, dtype, memory_format):
    layer, tensors = published(file, dtype)
    x = tensors["input"].contiguous(memory_format=memory_format).requires_grad_()
    condition = tensors["cond"].requires_grad_()
    y = layer(x, condition)
    (y * tensors["grad_seed"]).sum().backward()
    tolerance = 1e-5 if dtype is torch.float32 else 1e-6  # stored as float32
    reference.assert_close(y, tensors["output"], tolerance, "output")
    reference.assert_close(x.grad, tensors["grad_input"], tolerance, "input")
    reference.assert_close(condition.grad, tensors["grad_cond"], tolerance, "condition")
    gradients = reference.part(tensors, "grad_param.")
    assert set(gradients) == {n for n, _ in layer.named_parameters()}
    for name, parameter in layer.named_parameters():
        reference.assert_close(parameter.grad, gradients[name], tolerance, name)


CASES = [
    dict(args=(128, 8, 3)),
    dict(args=(256, 8, 3), num_groups=4, expansion=4, stride=2, dilation=2, padding=(2, 1)),
    dict(args=(256, 8, (3, 1)), groups=2),
    dict(args=(8, 12, 3), expansion=1, num_groups=1, bias=True),
    dict(args=(8, 12, 1), expansion=1, num_groups=1),
    dict(args=(8, 12, 3), expansion=8, num_groups=2),
    dict(args=(8, 12, 3), groups=4),
    dict(args=(3, 4, 2), bias=True),  # half of a kernel's weights is no whole number of channels
    dict(args=(8, 12, 1), stride=2),
    dict(args=(8, 12, 1), expansion=6, num_groups=2, padding=1),
    dict(args=(8, 8, 3), groups=8, expansion=4),
    dict(args=(8, 16, 5), groups=8, stride=(1, 2), bias=True),
    dict(args=(1, 4, 2)),
]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kwargs", CASES)
def test_each_sample_is_convolved_with_its_own_kernel(kwargs, batch, memory_format):
    torch.manual_seed(0)
    kwargs = dict(kwargs)
    layer = WeightNet(*kwargs.pop("args"), **kwargs, dtype=torch.float64)
    x = torch.randn(batch, layer.in_channels, 7, 10, dtype=torch.float64).contiguous(memory_format=memory_format)
    condition = torch.randn(batch, layer.condition_channels, 1, 1, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    found, expected = layer(x, condition), plainly(layer, x, condition)
    reference.assert_close(found, expected, 1e-12)
    inputs = [x, condition, *layer.parameters()]
    seed = torch.randn_like(found)
    pairs = zip(*(torch.autograd.grad(y, inputs, seed, retain_graph=True) for y in (found, expected)), strict=True)
    for a, b in pairs:
        reference.assert_close(a, b, 1e-12)


def test_every_second_channel_of_a_tensor_is_an_input_too():
    layer = WeightNet(8, 8, 1).double()
    condition = torch.randn(2, 16, 1, 1, dtype=torch.float64)
    for memory_format in FORMATS:
        x = torch.randn(2, 16, 5, 6, dtype=torch.float64).contiguous(memory_format=memory_format)[:, 1::2]
        reference.assert_close(layer(x, condition), plainly(layer, x, condition), 1e-12)


def test_the_kernel_can_be_had():
    layer, tensors = published("layer_weightnet_k1_24_24")
    kernel = layer.kernel(tensors["cond"])
    assert kernel.shape == (2, 24, 24, 1, 1)
    y = torch.einsum("noi,nihw->nohw", kernel.flatten(2), tensors["input"])
    reference.assert_close(y, tensors["output"], 1e-5)


@pytest.mark.parametrize("channels", [8, 256, 500])
def test_the_condition_has_a_sixteenth_of_the_channels_at_least_16(channels):
    layer = WeightNet(channels, 8, 1)
    assert layer.condition_channels == max(16, channels // 16) == layer.wn_fc1.in_channels
    assert WeightNetConv2d(channels, 8, 1).reduce.out_channels == layer.condition_channels


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((0, 8, 3), {}, "in_channels=0 is not a positive integer"),
        ((8, 8.0, 3), {}, "out_channels=8.0"),
        ((8, 8, 0), {}, "kernel_size=0; accepted: an integer from 1"),
        ((8, 8, (3, 3, 3)), {}, r"kernel_size=\(3, 3, 3\); accepted"),
        ((8, 8, 3, 0), {}, "stride=0; accepted"),
        ((8, 8, 3), dict(padding="same"), "padding='same'; accepted: an integer from 0"),
        ((8, 8, 3), dict(padding=-1), "padding=-1"),
        ((8, 8, 3), dict(dilation=True), "dilation=True"),
        ((8, 12, 3), dict(groups=3), r"groups=3 does not divide in_channels=8 .*accepted: \[1, 2, 4\]"),
        ((8, 8, 3), dict(expansion=3), "expansion=3 is not a multiple of num_groups=2"),
        ((8, 8, 3), dict(expansion=0), "expansion=0"),
        ((3, 8, 3), {}, r"num_groups=2 does not divide the 27 weights .*accepted: \[1, 3, 9, 27\]"),
    ],
)
@pytest.mark.parametrize("cls", [WeightNet, WeightNetConv2d])
def test_arguments_that_do_not_fit_are_refused(cls, args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cls(*args, **kwargs)


@pytest.mark.parametrize(
    ("x", "condition", "message"),
    [
        ((2, 7, 4, 4), (2, 16, 1, 1), r"\[2, 7, 4, 4\]: accepted is \(N, 8, H, W\)"),
        ((8, 4, 4), (1, 16, 1, 1), r"accepted is \(N, 8, H, W\)"),
        ((2, 8, 4, 4), (1, 16, 1, 1), r"condition of shape \[1, 16, 1, 1\]: accepted is \(2, 16, 1, 1\)"),
        ((2, 8, 4, 4), (2, 8, 1, 1), r"accepted is \(2, 16, 1, 1\)"),
        ((2, 8, 4, 4), (2, 16), r"accepted is \(2, 16, 1, 1\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, condition, message):
    with pytest.raises(ValueError, match=message):
        WeightNet(8, 8, 3)(torch.randn(x), torch.randn(condition))


def test_the_drop_in_checks_its_input():
    with pytest.raises(ValueError, match=r"accepted is \(N, 8, H, W\)"):
        WeightNetConv2d(8, 8, 3)(torch.randn(2, 7, 4, 4))


CONVS = [
    nn.Conv2d(8, 12, 3, padding=1),
    nn.Conv2d(8, 12, 3, stride=2, bias=False),
    nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=8),
    nn.Conv2d(8, 12, (1, 3), padding="valid", groups=2),
    nn.Conv2d(8, 12, 1),
]


@pytest.mark.parametrize(("expansion", "num_groups"), [(2, 2), (4, 2), (1, 1)])
@pytest.mark.parametrize("conv", CONVS)
def test_from_conv_computes_at_first_what_the_convolution_did(conv, expansion, num_groups):
    conv = copy.deepcopy(conv).double().eval()
    layer = WeightNetConv2d.from_conv(conv, expansion=expansion, num_groups=num_groups)
    assert not layer.training
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    x = torch.randn(2, 8, 9, 8, dtype=torch.float64)
    reference.assert_close(layer(x), conv(x), 1e-12)


@pytest.mark.parametrize("expansion", [2, 6])
def test_from_conv_can_be_trained_away_from_where_it_begins(expansion):
    torch.manual_seed(0)
    layer = WeightNetConv2d.from_conv(nn.Conv2d(8, 8, 3, padding=1), expansion=expansion)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(4, 8, 6, 6)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert all((p != before[n]).any() for n, p in layer.named_parameters())
    kernels = layer.wnet.kernel(layer.reduce(x))
    assert not torch.allclose(kernels[0], kernels[1], rtol=0, atol=1e-9)
    # sigmoids of one group, alike in what they do, must not stay alike for ever
    units = layer.wnet.wn_fc1(layer.reduce(x))[0].reshape(-1, expansion // 2)
    assert expansion == 2 or (units[:, 0] != units[:, 1]).all()


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(8, 8, 3, padding_mode="reflect"), "padding_mode='reflect'; accepted: 'zeros'"),
        (nn.Conv2d(8, 8, 2, padding="same"), "padding='same' with kernel_size"),
        (nn.Conv2d(3, 8, 3), "num_groups=2 does not divide the 27 weights"),
    ],
)
def test_from_conv_refuses_what_it_cannot_take_the_place_of(conv, message):
    with pytest.raises(ValueError, match=message):
        WeightNetConv2d.from_conv(conv)


def test_a_pretrained_network_keeps_its_logits():
    model = timm.create_model("resnet18", num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    replace_convs(model, WeightNetConv2d, lambda name, conv: conv.kernel_size == (3, 3))
    assert sum(isinstance(m, WeightNetConv2d) for m in model.modules()) == 16
    reference.assert_close(model(x), expected, 1e-5)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_its_own_generator_is_not_replaced():
    model = nn.Sequential(WeightNetConv2d(8, 8, 3), ConvNormAct(8, 8, 1))
    replace_convs(model, WeightNetConv2d)
    assert [type(m) for m in model[0].children()] != [WeightNetConv2d] * 2
    assert isinstance(model[1].conv, WeightNetConv2d)
    assert sum(isinstance(m, WeightNetConv2d) for m in model.modules()) == 2


def test_kernels_begin_at_the_scale_of_pytorchs():
    torch.manual_seed(0)
    for kwargs in (dict(), dict(expansion=8), dict(groups=64)):
        layer = WeightNet(64, 64, 3, **kwargs)
        kernel = layer.kernel(torch.zeros(1, layer.condition_channels, 1, 1))
        plain = nn.Conv2d(64, 64, 3, groups=layer.groups).weight
        assert 0.8 < (kernel.std() / plain.std()).item() < 1.3


LAYERS = {
    "pointwise": dict(args=(8, 8, 1)),
    "dense": dict(args=(128, 8, 3)),
    "depthwise": dict(args=(8, 8, 3), groups=8),
    "more_inputs": dict(args=(8, 8, 3), expansion=4),
    "more_inputs_pointwise": dict(args=(8, 8, 1), expansion=6),
    "pointwise_groups": dict(args=(8, 8, 1), groups=2),
    "more_inputs_depthwise": dict(args=(8, 8, 3), groups=8, expansion=4),
}


def drop_in(name: str) -> tuple[WeightNetConv2d, torch.Tensor]:
    torch.manual_seed(0)
    kwargs = dict(LAYERS[name])
    layer = WeightNetConv2d(*kwargs.pop("args"), **kwargs).eval()
    return layer, torch.randn(2, layer.in_channels, 6, 7)


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_can_be_scripted_traced_compiled_exported_and_copied(name):
    layer, x = drop_in(name)
    with torch.no_grad():
        expected = layer(x)
        forms = {
            "script": torch.jit.script(layer),
            "trace": torch.jit.trace(layer, x),
            "fx": torch.fx.symbolic_trace(layer),
            "compile": torch.compile(layer, fullgraph=True, backend="eager"),
            "export": torch.export.export(layer, (x,)).module(),
            "copy": copy.deepcopy(layer),
        }
        for form, module in forms.items():
            reference.assert_close(module(x), expected, 1e-5, form)


@pytest.mark.parametrize("name", LAYERS)
def test_traced_and_exported_layers_take_any_batch(name):
    layer, x = drop_in(name)
    batches = {0: torch.export.Dim("batch", min=2, max=64)}
    larger = torch.randn(5, *x.shape[1:])
    with torch.no_grad():
        expected = layer(larger)
        exported = torch.export.export(layer, (x,), dynamic_shapes=(batches,)).module()
        reference.assert_close(exported(larger), expected, 1e-5)
        reference.assert_close(torch.jit.trace(layer, x, check_trace=False)(larger), expected, 1e-5)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_runs_under_autocast(name, memory_format):
    layer, x = drop_in(name)
    x = x.contiguous(memory_format=memory_format)
    biased = WeightNetConv2d.from_conv(nn.Conv2d(layer.in_channels, 8, 3))
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert biased(x).dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16
    reference.assert_close(y.float(), expected, 0.05)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("name", ["pointwise", "dense", "depthwise"])
def test_channels_last_stays(name):
    layer, x = drop_in(name)
    assert layer(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous()


def test_device_and_dtype_are_passed_down():
    layer = WeightNetConv2d(8, 8, 3, bias=True, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


@pytest.mark.parametrize("expansion", [2, 4])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_an_empty_batch_passes(kernel_size, expansion):
    layer = WeightNetConv2d(8, 12, kernel_size, expansion=expansion).eval()
    assert layer(torch.randn(0, 8, 9, 7)).shape == (0, 12, 9, 7)


def test_hooks_on_the_second_layer_run_so_that_it_can_be_pruned():
    layer, x = WeightNetConv2d(8, 8, 3), torch.randn(2, 8, 5, 5)
    prune.l1_unstructured(layer.wnet.wn_fc2, "weight", 0.5)
    for _ in range(2):
        layer(x).sum().backward()
    nn.init.normal_(layer.wnet.wn_fc2.weight_orig)  # as load_state_dict would
    y = layer(x)
    prune.remove(layer.wnet.wn_fc2, "weight")
    reference.assert_close(y, layer(x), 1e-5)
