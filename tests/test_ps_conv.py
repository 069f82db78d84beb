import copy
import io

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_ulsam.layers import PSConv2d, replace_convs

LAYERS = [
    "layer_psconv_c64_d1",
    "layer_psconv_c64_d2_s2",
    "layer_psconv_c24_40_bias",
    "layer_psgconv_c64_g4",
    "layer_psgconv_c64_g8",
]
FORMATS = [torch.contiguous_format, torch.channels_last]


def make_layer(channels: int = 16, out_channels: int | None = None, *, seed: int = 1, **kwargs) -> PSConv2d:
    torch.manual_seed(seed)
    return PSConv2d(channels, out_channels or channels, **{"dilation": 2, **kwargs})


def masked(layer: PSConv2d) -> torch.Tensor:
    """The mask of `conv.weight`, entry by entry."""
    p, width = layer.parts, layer.in_channels // layer.groups
    rows, columns = layer.out_channels // layer.groups // p, width // p
    mask = torch.zeros_like(layer.conv.weight, dtype=torch.bool)
    for o in range(layer.out_channels):
        for i in range(width):
            r, c = o // rows % p, i // columns
            mask[o, i] = c in (r, (r + p // 2) % p)
    return mask


def by_parts(layer: PSConv2d, x: torch.Tensor) -> torch.Tensor:
    """Every output part of every group is a sum over input parts, each with its own dilation."""
    p, d = layer.parts, layer.dilation[0]
    outputs = []
    for g, group in enumerate(x.chunk(layer.groups, 1)):
        dense, own, shifted = (
            c.weight.chunk(layer.groups)[g].chunk(p) for c in (layer.conv, layer.gwconv, layer.gwconv_shift)
        )
        parts = group.chunk(p, 1)
        for r in range(p):
            y = 0
            for c in range(p):
                weight, dilation = dense[r].chunk(p, 1)[c], 1
                if c == r:
                    weight, dilation = own[r], d
                elif c == (r + p // 2) % p:
                    weight, dilation = shifted[r], 2 * d
                y = y + F.conv2d(parts[c], weight, None, layer.stride, dilation, dilation)
            outputs.append(y)
    y = torch.cat(outputs, 1)
    if layer.conv.bias is not None:
        y = y + sum(c.bias for c in (layer.conv, layer.gwconv, layer.gwconv_shift)).view(-1, 1, 1)
    return y


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("file", LAYERS)
def test_output_and_gradients_are_the_published_ones(file, dtype, memory_format):
    tensors = reference.tensors("ps_conv", file)
    (case,) = (c for c in reference.model("ps_conv", "layers_index")["cases"] if c["name"] == file)
    layer = PSConv2d(**case["kwargs"], dtype=dtype)
    layer.load_state_dict(reference.part(tensors, "param."))
    mask = tensors.get("mask_cyclic", tensors["mask"]).bool()
    assert torch.equal(masked(layer), mask)
    x = tensors["input"].to(dtype).contiguous(memory_format=memory_format)
    relative = 1e-6 if dtype == torch.float64 else 1e-5
    with torch.no_grad():
        reference.assert_close(layer(x), tensors["output"], relative)
    y = layer(x.requires_grad_())
    reference.assert_close(y, tensors["output"], relative)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = dict(zip(names, torch.autograd.grad((y * tensors["grad_seed"]).sum(), parameters), strict=True))
    expected = reference.part(tensors, "grad_param.")
    if "grad_raw.conv.weight" in tensors:  # the published mask leaves out some of the groups
        expected["conv.weight"] = tensors["grad_raw.conv.weight"].masked_fill(mask, 0)
    assert found.keys() == expected.keys()
    for name in names:
        reference.assert_close(found[name], expected[name], relative, name)
    assert not found["conv.weight"][mask].any()
    (gradient,) = torch.autograd.grad((layer(x) * tensors["grad_seed"]).sum(), x)
    reference.assert_close(gradient, tensors["grad_input"], relative)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("parts", "groups"), [(2, 1), (4, 1), (6, 1), (2, 3), (4, 2), (4, 4)])
def test_every_pair_of_parts_has_its_dilation(parts, groups, bias):
    width = 2 * parts * groups
    layer = make_layer(width, 2 * width, parts=parts, groups=groups, bias=bias, stride=2, dtype=torch.float64)
    x = torch.randn(2, width, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_parts(layer, x))
    assert torch.equal(layer.conv.weight == 0, masked(layer))


def test_values_loaded_at_masked_positions_take_part():
    # as with the published code, which applies the mask to the gradient alone
    layer, x = make_layer(), torch.randn(1, 16, 5, 5)
    y, state = layer(x), layer.state_dict()
    extra = torch.randn_like(state["conv.weight"]) * masked(layer)
    layer.load_state_dict({**state, "conv.weight": state["conv.weight"] + extra})
    expected = y + F.conv2d(x, extra, padding=1)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        layer.reparameterize()
        torch.testing.assert_close(layer(x), expected)


def materialized(layer: PSConv2d) -> PSConv2d:
    new = PSConv2d(16, 16, dilation=2, groups=layer.groups, device="meta").to_empty(device="cpu")
    new.load_state_dict(layer.state_dict())
    return new


def saved(layer: PSConv2d) -> PSConv2d:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "pass_through", [lambda layer: layer, copy.deepcopy, materialized, saved, torch.jit.script, torch.fx.symbolic_trace]
)
def test_masked_weights_never_train(pass_through, mode, groups):
    layer = make_layer(groups=groups)
    mask = masked(layer)
    layer = pass_through(layer).train(mode == "train")
    before = layer.conv.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(2, 16, 6, 6)).square().sum().backward()
        assert not layer.conv.weight.grad[mask].any()
        optimizer.step()
    assert not layer.conv.weight[mask].any()
    assert (layer.conv.weight != before)[~mask].all()


def test_masked_weights_never_train_in_parallel(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        layer = make_layer()
        DistributedDataParallel(layer)(torch.randn(2, 16, 6, 6)).square().sum().backward()
        assert not layer.conv.weight.grad[masked(layer)].any()
        assert layer.conv.weight.grad.any()
    finally:
        torch.distributed.destroy_process_group()


def test_reset_parameters_are_masked_again():
    layer = make_layer()
    nn.init.ones_(layer.conv.weight)
    layer.conv.reset_parameters()
    assert torch.equal(layer.conv.weight == 0, masked(layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
def test_reparameterized_computes_the_same_with_a_third_less(bias, memory_format, dtype):
    layer = make_layer(16, 24, bias=bias, stride=2, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 16, 7, 8, dtype=dtype)).float().sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    x = torch.randn(2, 16, 7, 8, dtype=dtype).contiguous(memory_format=memory_format)
    expected = layer(x)
    for _ in range(2):
        layer.reparameterize()
        torch.testing.assert_close(layer(x), expected)
        assert layer.conv.weight.shape == (24, 8, 3, 3)
    plain = nn.Conv2d(16, 24, 3)
    assert sum(p.numel() for n, p in layer.named_parameters() if "weight" in n) == plain.weight.numel()

    again = make_layer(16, 24, bias=bias, stride=2, dtype=dtype, seed=2)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(x), expected)


@pytest.mark.parametrize("kwargs", [dict(parts=2), dict(parts=8), dict(groups=2)])
def test_what_would_be_no_faster_is_not_reparameterized(kwargs):
    layer, x = make_layer(**kwargs), torch.randn(1, 16, 5, 5)
    expected, state = layer(x), layer.state_dict()
    layer.reparameterize()
    assert torch.equal(layer(x), expected)
    assert layer.state_dict().keys() == state.keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("kwargs", "folded"), [(dict(), False), (dict(groups=2, bias=True), False), (dict(bias=True), True)]
)
def test_is_scripted_traced_compiled_exported_and_copied(kwargs, folded, grad):
    torch.compiler.reset()
    layer, x = make_layer(**kwargs).eval(), torch.randn(2, 16, 5, 6)
    if folded:
        layer.reparameterize()
    batch = {"x": {0: torch.export.Dim("batch", max=64)}}
    with torch.set_grad_enabled(grad):
        y = layer(x)
        for made in (
            torch.jit.script(layer),
            torch.jit.trace(layer, x),
            torch.fx.symbolic_trace(layer),
            torch.compile(layer, backend="eager", fullgraph=True),
            torch.export.export(layer, (x,), dynamic_shapes=batch).module(),
            copy.deepcopy(layer),
        ):
            torch.testing.assert_close(made(x), y)
            torch.testing.assert_close(made(x[:1]), y[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_close_to_float32(dtype):
    layer, x = make_layer(), torch.randn(2, 16, 6, 6)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        y = layer.to(dtype)(x.to(dtype))
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_channels_last_stays(memory_format):
    x = torch.randn(2, 16, 6, 5).contiguous(memory_format=memory_format)
    layer = make_layer().to(memory_format=memory_format)
    y = layer(x)
    assert y.is_contiguous(memory_format=memory_format)
    layer.reparameterize()
    assert layer(x).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(parts=3), r"parts=3; accepted: even"),
        (dict(parts=0), r"parts=0; accepted: even"),
        (dict(in_channels=18), r"in_channels=18 .*accepted: multiples of 4"),
        (dict(out_channels=18), r"out_channels=18 .*accepted: multiples of 4"),
        (dict(groups=3), r"in_channels=16 .*groups=3 .*accepted: multiples of 12"),
        (dict(groups=0), r"groups=0"),
        (dict(kernel_size=5, padding=2), r"kernel_size=5, padding=2; accepted: kernel_size=3 with padding=1"),
        (dict(kernel_size=1, padding=0), r"kernel_size=1, padding=0; accepted"),
        (dict(padding=0), r"kernel_size=3, padding=0; accepted"),
        (dict(dilation=0), r"dilation=0; accepted"),
        (dict(stride=(1, 0)), r"stride=\(1, 0\); accepted"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PSConv2d(**{"in_channels": 16, "out_channels": 16, **kwargs})


@pytest.mark.parametrize("shape", [(16, 4, 4), (2, 8, 4, 4)])
def test_inputs_of_wrong_rank_or_width_are_refused(shape):
    with pytest.raises(ValueError, match=r"accepted is \(N, 16, H, W\)"):
        make_layer()(torch.randn(shape))


@pytest.mark.parametrize("groups", [1, 2])
def test_from_conv_keeps_every_weight_at_its_new_dilation(groups):
    conv = nn.Conv2d(16, 24, 3, stride=(1, 2), padding=1, groups=groups, dtype=torch.float64).eval()
    layer = PSConv2d.from_conv(conv, dilation=2)
    assert (layer.stride, layer.dilation, layer.training) == ((1, 2), (2, 2), False)
    centre = torch.randn(2, 16, 1, 1, dtype=torch.float64)  # one pixel meets the centres of the kernels alone
    torch.testing.assert_close(layer(centre), conv(centre))
    layer.dilation = (1, 1)
    for part in (layer.gwconv, layer.gwconv_shift):
        part.dilation = part.padding = (1, 1)
    x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x))  # with all dilations at 1 it is the convolution


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(kernel_size=1), "kernel_size=.*accepted"),
        (dict(kernel_size=3, padding=0), "padding=.*accepted"),
        (dict(kernel_size=3, padding=2, dilation=2), r"dilation=\(2, 2\); accepted: \(1, 1\)"),
        (dict(kernel_size=3, padding=1, padding_mode="reflect"), "padding_mode='reflect'; accepted: 'zeros'"),
    ],
)
def test_from_conv_refuses_what_does_not_fit(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PSConv2d.from_conv(nn.Conv2d(16, 16, **kwargs))


def test_replaces_the_convolutions_of_a_model_that_fit():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding="same"), nn.Conv2d(16, 8, 1))
    replace_convs(model, PSConv2d, parts=2)
    assert [isinstance(m, PSConv2d) for m in model] == [False, True, False]
    assert model(torch.randn(1, 3, 4, 4)).shape == (1, 8, 4, 4)


def test_a_folded_layer_keeps_its_parameters_when_a_state_is_loaded_and_stays_frozen():
    layer = make_layer()
    layer.conv.weight.requires_grad_(False)
    layer.reparameterize()
    weight = layer.conv.weight
    assert not weight.requires_grad
    layer.load_state_dict(layer.state_dict())
    assert layer.conv.weight is weight
