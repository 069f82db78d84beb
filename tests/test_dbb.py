"""The Diverse Branch Block: the published numbers, folding, and a convolution's place."""

import copy
import inspect
import re
from functools import partial

import pytest
import reference
import timm
import torch
from reference import assert_close
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import nn
from torch.nn.utils import parametrizations, prune

from timm_ulsam.layers import ConvBN, DiverseBranchBlock, replace_convs

FILES = [
    "dense3x3_s1",
    "dense3x3_s2",
    "grouped3x3_g4",
    "depthwise3x3_s1",
    "depthwise3x3_s2",
    "depthwise3x3_mult2",
    "dense5x5_relu",
    "dense3x3_internal16",
    "dense1x1",
    "convbn1x1_s2",
]
FORMS = {
    "dense": dict(in_channels=8, out_channels=12),
    "strided": dict(in_channels=8, out_channels=8, stride=2, kernel_size=5),
    "grouped": dict(in_channels=8, out_channels=12, groups=4),
    "depthwise": dict(in_channels=8, out_channels=8, groups=8),
    "dilated": dict(in_channels=8, out_channels=8, dilation=2, internal_channels=12),
    "to_one": dict(in_channels=8, out_channels=1),
    "one_to_one_group": dict(in_channels=8, out_channels=4, groups=4),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def stir(module: nn.Module) -> nn.Module:
    """Weights and statistics of its own, so that no branch is near zero and no border is zero."""
    for key, tensor in module.state_dict().items():
        if key.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif tensor.dim() == 1:
            nn.init.normal_(tensor, 0.3, 0.5)
        elif tensor.dim() == 4:
            nn.init.normal_(tensor, 0, tensor[0].numel() ** -0.5)
    return module


def make(dtype: torch.dtype = torch.float64, **kwargs) -> DiverseBranchBlock:
    return stir(DiverseBranchBlock(**(kwargs or FORMS["dense"]), dtype=dtype))


def image(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 8, 11, 10, dtype=dtype)


def published(file: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config, tensors = reference.config("dbb", f"layer_{file}"), reference.tensors("dbb", f"layer_{file}")
    names = {"internal_channels_1x1_3x3": "internal_channels", "nonlinear": "act_layer"}
    kwargs = {names.get(k, k): nn.ReLU if v == "ReLU" else v for k, v in config["kwargs"].items()}
    layer = {"ConvBN": ConvBN, "DiverseBranchBlock": DiverseBranchBlock}[config["module"]](**kwargs, dtype=dtype)
    layer.load_state_dict(reference.part(tensors, "param."))
    return layer, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("file", FILES)
def test_numbers_are_the_published_ones(file, dtype):
    layer, tensors = published(file, dtype)
    x = tensors["input"].to(dtype).requires_grad_()
    for mode, tolerance in (("", 5e-6), ("_train", 2e-5)):
        y = layer.train(mode == "_train")(x)
        assert_close(y, tensors[f"output{mode}"], 5e-6, f"output{mode}")
        if not mode and dtype is torch.float64:
            assert_close(y, tensors["output_f64"], 1e-10)
        x.grad = None
        layer.zero_grad()
        (y * tensors["grad_seed"].to(dtype)).sum().backward()
        assert_close(x.grad, tensors[f"grad_input{mode}"], tolerance, f"grad_input{mode}")
        if not mode:
            for name, parameter in layer.named_parameters():
                assert_close(parameter.grad, tensors[f"grad_param.{name}"], tolerance, name)
    after = reference.part(tensors, "after_train.")
    assert after
    for name, expected in after.items():
        assert_close(layer.state_dict()[name], expected, 5e-6, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("file", FILES)
def test_folded_kernels_are_the_published_ones(file, dtype):
    layer, tensors = published(file, dtype)
    expected = reference.part(tensors, "fused.")
    layer.reparameterize()
    assert layer.state_dict().keys() == expected.keys()
    for name, tensor in layer.state_dict().items():
        assert_close(tensor, expected[name], 5e-6, name)
    x = tensors["input"].to(dtype)
    assert_close(layer.eval()(x), tensors["output_fused"], 5e-6)
    from_published = published(file, dtype)[0]
    from_published.load_state_dict(expected)
    assert_close(from_published.eval()(x), tensors["output_fused"], 5e-6)


def test_a_dilated_layer_is_the_dense_one_on_every_second_pixel():
    dilated, dense = make(**FORMS["dilated"]), make(**{**FORMS["dilated"], "dilation": 1})
    dense.load_state_dict(dilated.state_dict())
    x = torch.randn(2, 8, 10, 12, dtype=torch.float64)
    for mode in (False, True):
        torch.testing.assert_close(
            dilated.eval()(x)[:, :, mode::2, mode::2], dense.eval()(x[:, :, mode::2, mode::2]), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("form", FORMS)
def test_folding_after_training_under_autocast_changes_nothing(form, dtype, tolerance):
    layer = make(dtype, **FORMS[form])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
            layer(image(dtype) + 1).float().square().mean().backward()
        optimizer.step()
    x = image(dtype)
    expected = layer.eval()(x)
    layer.reparameterize()
    assert_close(layer(x), expected, tolerance)
    once = copy.deepcopy(layer.state_dict())
    layer.reparameterize()
    assert all(torch.equal(once[k], v) for k, v in layer.state_dict().items())
    assert list(once) == ["dbb_reparam.weight", "dbb_reparam.bias"]


def test_a_folded_layer_trains_on_and_keeps_its_memory_format():
    layer = make(torch.float32).to(memory_format=torch.channels_last)
    layer.reparameterize()
    assert layer.dbb_reparam.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer.dbb_reparam.training
    layer(image(torch.float32)).square().sum().backward()
    assert all(p.requires_grad and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("kind", ["SyncBatchNorm", "FrozenBatchNorm2d"])
def test_other_batch_norms_compute_and_fold_the_same(kind):
    layer, x = make().eval(), image()
    expected = layer(x)
    convert = {"SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm, "FrozenBatchNorm2d": freeze_batch_norm_2d}
    layer = convert[kind](layer).eval()
    assert type(layer.dbb_avg.bn.bn).__name__ == kind
    torch.testing.assert_close(layer(x), expected)
    layer.reparameterize()
    torch.testing.assert_close(layer(x), expected)
    assert layer.dbb_origin is None


def test_parametrized_weights_fold():
    layer, x = make().eval(), image()
    parametrizations.weight_norm(layer.dbb_1x1_kxk.conv2)
    expected = layer(x)
    layer.reparameterize()
    torch.testing.assert_close(layer(x), expected)
    assert layer.dbb_reparam is not None


@pytest.mark.parametrize(
    "place",
    ["dbb_origin.conv", "dbb_avg.conv", "dbb_1x1.conv", "dbb_1x1_kxk.conv2", "dbb_1x1_kxk.idconv1", "dbb_1x1.bn"],
)
def test_what_does_not_fold_stays(place):
    layer, x = make().eval(), image()
    prune.random_unstructured(layer.get_submodule(place), "weight", 0.5)
    expected = layer(x)
    timm.utils.model.reparameterize_model(layer, inplace=True)
    layer.reparameterize()
    assert layer.dbb_reparam is None
    torch.testing.assert_close(layer(x), expected)


def test_a_convolution_with_hooks_computes_the_same_and_trains():
    layer, x, seen = make(), image(), []
    expected = copy.deepcopy(layer)(x)
    layer.dbb_1x1_kxk.conv2.register_forward_hook(lambda module, args, y: seen.append(y))
    torch.testing.assert_close(layer(x), expected)
    assert len(seen) == 1
    prune.random_unstructured(layer.dbb_1x1_kxk.conv2, "weight", 0.5)
    for _ in range(2):
        layer(x).sum().backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolutions_place_is_taken_with_its_output(form, bias):
    kwargs = dict(FORMS[form])
    kwargs.pop("internal_channels", None)
    kernel_size = kwargs.pop("kernel_size", 3)
    padding = kwargs.get("dilation", 1) * (kernel_size // 2)
    conv = nn.Conv2d(**kwargs, kernel_size=kernel_size, padding=padding, bias=bias, dtype=torch.float64).eval()
    layer = DiverseBranchBlock.from_conv(conv)
    assert not layer.training
    x = image()
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-12, atol=1e-12)
    layer.train()(image()).square().sum().backward()
    last = [layer.dbb_avg.avgbn, layer.dbb_1x1_kxk.bn2]
    assert all(bn.weight.grad.abs().sum() > 0 for bn in last)


def test_replace_convs_keeps_a_models_logits():
    model, x = timm.create_model("resnet18", num_classes=5).eval(), torch.randn(1, 3, 64, 64)
    expected = model(x)
    replace_convs(model, DiverseBranchBlock, lambda name, conv: conv.kernel_size == (3, 3), internal_channels=64)
    assert isinstance(model.layer4[1].conv2, DiverseBranchBlock)
    assert_close(model(x), expected, 1e-5)
    assert_close(timm.utils.model.reparameterize_model(model)(x), expected, 1e-5)


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(4, 4, 3), "padding=(0, 0); accepted: 1"),
        (nn.Conv2d(4, 4, (3, 5), padding=(1, 2)), "kernel_size=(3, 5); accepted: the same"),
        (nn.Conv2d(4, 4, 3, (1, 2), padding=1), "stride=(1, 2); accepted: the same"),
        (nn.Conv2d(4, 4, 3, padding="valid"), "padding='valid'; accepted: 1"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'; accepted: 'zeros'"),
        (nn.Conv2d(4, 4, 2, padding=1), "kernel_size=2 is even; accepted: odd"),
    ],
)
def test_a_convolution_of_another_geometry_is_refused(conv, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DiverseBranchBlock.from_conv(conv)


def test_padding_given_by_name_is_taken():
    for conv in (nn.Conv2d(8, 4, 3, padding="same", dilation=2), nn.Conv2d(8, 4, 1, padding="valid")):
        x = image(torch.float32)
        torch.testing.assert_close(DiverseBranchBlock.from_conv(conv).eval()(x), conv(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(in_channels=0), "in_channels=0 is not a positive integer"),
        (dict(out_channels=2.5), "out_channels=2.5 is not a positive integer"),
        (dict(kernel_size=4), "kernel_size=4 is even"),
        (dict(padding=0), "padding=0; accepted: 1"),
        (dict(dilation=2, padding=1), "padding=1; accepted: 2"),
        (dict(dilation=0), "dilation=0 is not"),
        (dict(stride=0), "stride=0 is not"),
        (dict(groups=3), "groups=3 does not divide in_channels=8 and out_channels=8"),
        (dict(groups=4, internal_channels=6), "internal_channels=6 is not a multiple of groups=4"),
        (dict(internal_channels=0), "internal_channels=0 is not"),
        (dict(norm_layer=partial(nn.GroupNorm, 1)), "makes a GroupNorm: accepted is a batch norm"),
        (dict(norm_layer=BatchNormAct2d), "makes a BatchNormAct2d: accepted is a batch norm"),
        (dict(norm_layer=partial(nn.BatchNorm2d, track_running_stats=False)), "with weight and running statistics"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DiverseBranchBlock(**{"in_channels": 8, "out_channels": 8, **kwargs})


@pytest.mark.parametrize("layer", [DiverseBranchBlock(8, 8), ConvBN(8, 8)])
@pytest.mark.parametrize("shape", [(1, 7, 4, 4), (8, 4, 4)])
def test_bad_input_is_refused(layer, shape):
    with pytest.raises(ValueError, match=re.escape(f"shape {list(shape)}: accepted is (N, 8, H, W)")):
        layer(torch.randn(shape))


def compiled(layer):
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend="eager")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make_twin", [torch.jit.script, torch.fx.symbolic_trace, compiled, copy.deepcopy])
@pytest.mark.parametrize("form", ["unfolded", "training", "folded"])
@pytest.mark.parametrize("kwargs", [FORMS["dense"], FORMS["depthwise"], FORMS["dilated"]])
def test_layers_can_be_taken_elsewhere(make_twin, form, kwargs):
    layer = make(**kwargs).train(form == "training")
    if form == "folded":
        layer.reparameterize()
    twin = make_twin(copy.deepcopy(layer))
    for _ in range(2):  # statistics move on in training, and the border with them
        x = image()
        torch.testing.assert_close(twin(x), layer(x))


def test_export():
    layer, x = make().eval(), image()
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("kwargs", [FORMS["dense"], FORMS["depthwise"]])
def test_channels_last_and_autocast(kwargs):
    layer, x = make(torch.float32, **kwargs), image(torch.float32)
    expected = copy.deepcopy(layer)(x)
    channels_last = dict(memory_format=torch.channels_last)
    y = copy.deepcopy(layer).to(**channels_last)(x.to(**channels_last))
    assert y.is_contiguous(**channels_last)
    assert_close(y, expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert_close(y.float(), expected, 0.05)


def test_an_activation_may_be_named_as_timm_names_it():
    assert type(DiverseBranchBlock(8, 8, 3, act_layer="relu6").act) is nn.ReLU6


def test_an_activation_follows_the_sum_in_both_forms():
    layer, x = make(**FORMS["dense"], act_layer=nn.ReLU).eval(), image()
    plain = make(**FORMS["dense"])
    plain.load_state_dict(layer.state_dict())
    expected = plain.eval()(x).relu()
    assert torch.equal(layer(x), expected)
    layer.reparameterize()
    torch.testing.assert_close(layer(x), expected)


def test_a_folded_state_loads_into_an_unfolded_layer_on_the_meta_device():
    folded = make().eval()
    folded.reparameterize()
    layer = DiverseBranchBlock(**FORMS["dense"], device="meta").eval()
    layer.load_state_dict(folded.state_dict(), assign=True)
    x = image()
    assert torch.equal(layer(x), folded(x))


def test_an_unfolded_state_does_not_load_into_a_folded_layer():
    layer = make()
    state = copy.deepcopy(layer.state_dict())
    layer.reparameterize()
    with pytest.raises(RuntimeError, match=r"Missing key.*dbb_reparam.weight"):
        layer.load_state_dict(state)


def test_a_stem_in_channels_last_has_the_right_gradients(python):
    # in a process of its own: a strided 1x1 convolution of three channels may crash there
    python(
        "import torch\n"
        "from timm_ulsam.layers import DiverseBranchBlock\n"
        "torch.manual_seed(0)\n"
        "layer, x, seed = DiverseBranchBlock(3, 32, 3, 2), torch.randn(8, 3, 224, 224), torch.randn(8, 32, 112, 112)\n"
        "gradients = []\n"
        "for memory_format in (torch.contiguous_format, torch.channels_last):\n"
        "    layer.zero_grad()\n"
        "    (layer.to(memory_format=memory_format)(x.to(memory_format=memory_format)) * seed).sum().backward()\n"
        "    gradients.append(layer.dbb_1x1.conv.weight.grad.clone())\n"
        "assert (gradients[0] - gradients[1]).abs().max() <= 1e-4 * gradients[0].abs().max()\n"
    )


@pytest.mark.parametrize("channels", [8, 32])
def test_a_strided_kernel_of_one_position_folds_too(channels):
    layer = DiverseBranchBlock(channels, 16, 1, 2, dtype=torch.float64)
    x = torch.randn(2, channels, 9, 7, dtype=torch.float64)
    layer(x)  # statistics of its own
    expected = layer.eval()(x)
    assert expected.shape == (2, 16, 5, 4)
    layer.reparameterize()
    assert_close(layer(x), expected, 1e-12)


@pytest.mark.parametrize("groups", [1, 6])
def test_inner_norms_of_a_strided_kernel_of_one_position_see_all_positions(groups):
    layer = DiverseBranchBlock(6, 6, 1, 2, groups=groups, dtype=torch.float64)
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    layer(x)
    average, sequence = layer.dbb_avg, layer.dbb_1x1_kxk
    inner = [] if average.conv is None else [(average.bn.bn, average.conv)]
    first = sequence.conv1 if sequence.idconv1 is None else sequence.idconv1
    for norm, conv in [*inner, (sequence.bn1.bn, first)]:
        assert_close(norm.running_mean, 0.1 * conv(x).mean((0, 2, 3)), 1e-12)
    origin = layer.dbb_origin
    assert_close(origin.bn.running_mean, 0.1 * origin.conv(x[:, :, ::2, ::2]).mean((0, 2, 3)), 1e-12)


def test_a_frozen_layer_stays_frozen_when_it_is_folded():
    layer = make().eval().requires_grad_(False)
    folded = timm.utils.model.reparameterize_model(layer)
    assert not any(p.requires_grad for p in folded.parameters())
    layer.load_state_dict(folded.state_dict())
    assert not any(p.requires_grad for p in layer.parameters())


def test_a_norm_without_bias_is_refused():
    if "bias" not in inspect.signature(nn.BatchNorm2d).parameters:
        pytest.skip("this PyTorch has no batch norm without bias")
    with pytest.raises(ValueError, match="norm_layer"):
        DiverseBranchBlock(8, 8, norm_layer=partial(nn.BatchNorm2d, bias=False))


def test_other_paddings_stay_when_a_convolution_is_folded():
    conv, norm = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)
    layer, x = stir(ConvBN.of(conv, norm)).eval(), torch.randn(2, 4, 6, 6)
    expected = layer(x)
    layer.reparameterize()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
