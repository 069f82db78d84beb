import copy

import pytest
import reference as ref
import torch
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from torch import nn
from torch.nn.utils import parametrizations

from timm_ulsam.layers import RepMLP, RepMLPBlock
from timm_ulsam.layers.conv_bn import ConvBN
from timm_ulsam.layers.rep_mlp import GroupedFC

BLOCKS = [
    "layer_block_c16_h7w7_s4",
    "layer_block_c12_h4w6_s3",
    "layer_block_c8_h8w8_s1",
    "layer_block_c8_h5w5_s8_k135",
    "layer_block_c8_h4w4_s2_noconv",
    "layer_block_c12_h5w7_s3_onepart",
]
LAYERS = [*BLOCKS, "layer_v1_c8_8x12_h4w4_g4", "layer_v1_c6_7x7_noglobal_g2_k135"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(file: str, **kwargs) -> nn.Module:
    args = ref.config("rep_mlp", file)["kwargs"]
    sizes = args["reparam_conv_k"] or ()
    if "block" in file:
        return RepMLPBlock(
            args["in_channels"],
            args["h"],
            args["w"],
            kernel_sizes=sizes,
            reduction=args["globalperceptron_reduce"],
            num_sharesets=args["num_sharesets"],
            **kwargs,
        )
    return RepMLP(
        args["in_channels"],
        args["H"],
        args["W"],
        args["h"],
        args["w"],
        kernel_sizes=sizes,
        reduction=args["fc1_fc2_reduction"],
        groups=args["fc3_groups"],
        **kwargs,
    )


def published(file: str, **kwargs) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    tensors = ref.tensors("rep_mlp", file)
    layer = make(file, **kwargs).eval()
    layer.load_state_dict(ref.part(tensors, "param."))
    return layer, tensors


def small(kind: str, **kwargs) -> tuple[nn.Module, torch.Tensor]:
    """A layer with several partitions whose norms are not trivial."""
    if kind == "block":
        layer = RepMLPBlock(8, 3, 4, num_sharesets=2, **kwargs)
    else:
        layer = RepMLP(8, 6, 8, 3, 4, groups=2, **kwargs)
    for norm in (m for m in layer.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return layer.eval(), torch.randn(2, 8, 6, 8, dtype=kwargs.get("dtype"))


@pytest.mark.parametrize("file", LAYERS)
def test_outputs_and_gradients_are_the_published_ones(file):
    layer, tensors = published(file)
    x = tensors["input"].requires_grad_()
    y = layer(x)
    (y * tensors["grad_seed"]).sum().backward()
    ref.assert_close(y, tensors["output"], 5e-6)
    ref.assert_close(x.grad, tensors["grad_input"], 5e-6)
    gradients = ref.part(tensors, "grad_param.")
    assert gradients.keys() == dict(layer.named_parameters()).keys()
    for name, parameter in layer.named_parameters():
        ref.assert_close(parameter.grad, gradients[name], 5e-6, name)


@pytest.mark.parametrize("file", LAYERS)
def test_training_is_the_published_one(file):
    layer, tensors = published(file)
    x = tensors["input"].requires_grad_()
    y = layer.train()(x)
    (y * tensors["grad_seed"]).sum().backward()
    ref.assert_close(y, tensors["output_train"], 5e-6)
    ref.assert_close(x.grad, tensors["grad_input_train"], 2e-5)
    buffers = ref.part(tensors, "after_train.")
    assert buffers.keys() == dict(layer.named_buffers()).keys()
    for name, buffer in layer.named_buffers():
        ref.assert_close(buffer, buffers[name], 5e-6, name)


@pytest.mark.parametrize("file", LAYERS)
def test_in_float64_it_is_exact_folded_too(file):
    layer, tensors = published(file, dtype=torch.float64)
    x = tensors["input"].double()
    ref.assert_close(layer(x), tensors["output_f64"], 1e-10)
    layer.reparameterize()
    ref.assert_close(layer(x), tensors["output_f64"], 1e-10)


@pytest.mark.parametrize("file", LAYERS)
def test_folding_gives_the_published_weights(file):
    layer, tensors = published(file)
    layer.reparameterize()
    fused = ref.part(tensors, "fused.")
    assert layer.state_dict().keys() == fused.keys()
    for name, value in layer.state_dict().items():
        ref.assert_close(value, fused[name], 5e-6, name)
    ref.assert_close(layer(tensors["input"]), tensors["output_fused"], 5e-6)
    before = copy.deepcopy(layer.state_dict())
    layer.reparameterize()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("file", LAYERS)
def test_a_published_folded_state_loads_into_a_new_layer_and_back(file):
    layer, tensors = make(file).eval(), ref.tensors("rep_mlp", file)
    layer.load_state_dict(ref.part(tensors, "fused."))
    ref.assert_close(layer(tensors["input"]), tensors["output_fused"], 5e-6)
    again = make(file, device="meta")
    again.load_state_dict(layer.state_dict(), assign=True)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.eval()(tensors["input"]), layer(tensors["input"]))


@pytest.mark.parametrize("kind", ["block", "v1"])
def test_an_unfolded_state_does_not_load_into_a_folded_layer(kind):
    layer, _ = small(kind)
    state = copy.deepcopy(layer.state_dict())
    layer.reparameterize()
    with pytest.raises(RuntimeError, match=r'Missing key.*"fc3\.bias"'):
        layer.load_state_dict(state)


@pytest.mark.parametrize("kind", ["block", "v1"])
def test_a_folded_layer_trains_and_is_copied(kind):
    layer, x = small(kind)
    layer.reparameterize()
    twin = copy.deepcopy(layer.train())
    before = [p.clone() for p in twin.parameters()]
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
    twin(x).square().sum().backward()
    optimizer.step()
    assert all((p != b).any() for p, b in zip(twin.parameters(), before, strict=True))
    assert not torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("kind", ["block", "v1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folding_after_training_under_autocast(kind, dtype):
    layer, x = small(kind, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        layer.train()(x).float().square().mean().backward()
    layer.eval()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer.reparameterize()
    ref.assert_close(layer(x), expected, 1e-5 if dtype is torch.float32 else 1e-12)


@pytest.mark.parametrize("kind", ["block", "v1"])
@pytest.mark.parametrize("convert", [convert_sync_batchnorm, freeze_batch_norm_2d])
def test_other_batch_norms_fold_too(kind, convert):
    layer, x = small(kind)
    expected = layer(x)
    layer = convert(nn.ModuleList([layer]))[0].eval()
    layer.reparameterize()
    assert "repconv3.conv.weight" not in layer.state_dict()
    ref.assert_close(layer(x), expected, 1e-5)


@pytest.mark.parametrize("kind", ["block", "v1"])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "fc3_bn", nn.GroupNorm(1, layer.fc3_bn.num_features)),
        lambda layer: setattr(layer.repconv3, "bn", nn.InstanceNorm2d(layer.repconv3.conv.out_channels)),
        lambda layer: parametrizations.weight_norm(layer.repconv1.conv),
        lambda layer: parametrizations.weight_norm(layer.fc3),
    ],
)
def test_other_parts_compute_the_same_afterwards(kind, change):
    layer, x = small(kind)
    change(layer)
    expected = layer(x)
    layer.reparameterize()
    ref.assert_close(layer(x), expected, 1e-5)


def test_branches_folded_by_themselves_fold_in_afterwards():
    layer, x = small("block")
    expected = layer(x)
    layer.repconv3.reparameterize()
    layer.reparameterize()
    assert layer.state_dict().keys() == {f"{m}.{t}" for m in ("gp.fc1", "gp.fc2", "fc3") for t in ("weight", "bias")}
    ref.assert_close(layer(x), expected, 1e-5)


def test_conv_bn_folds_with_a_bias_and_loads_again():
    layer = ConvBN.of(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)).eval()
    nn.init.normal_(layer.bn.running_mean)
    x = torch.randn(2, 4, 5, 5)
    expected = layer(x)
    layer.reparameterize()
    ref.assert_close(layer(x), expected, 1e-5)
    twin = ConvBN(4, 6, 3)
    twin.load_state_dict(layer.state_dict())
    twin.reparameterize()
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_fc_is_the_grouped_convolution(groups, bias):
    layer, x = GroupedFC(8, groups, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    if bias:
        layer.bias = nn.Parameter(torch.randn(8, dtype=torch.float64))
    expected = nn.functional.conv2d(x.view(5, 8, 1, 1), layer.weight, layer.bias, groups=groups)
    ref.assert_close(layer(x).flatten(1), expected.flatten(1), 1e-12)


@pytest.mark.parametrize("kind", ["block", "v1"])
@pytest.mark.parametrize("folded", [False, True])
def test_it_is_scripted_traced_compiled_and_exported(kind, folded):
    layer, x = small(kind)
    if folded:
        layer.reparameterize()
    expected = layer(x)
    for version in (
        torch.jit.script(layer),
        torch.jit.trace(layer, x),
        torch.fx.symbolic_trace(layer),
        torch.compile(layer, fullgraph=True, backend="eager"),
        torch.export.export(layer, (x,)).module(),
    ):
        torch.testing.assert_close(version(x), expected)


@pytest.mark.parametrize("kind", ["block", "v1"])
def test_channels_last_half_precision_and_empty_batches(kind):
    layer, x = small(kind)
    expected = layer(x)
    last = layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        ref.assert_close(layer(x).float(), expected, 0.05)
    assert layer(x[:0]).shape == x[:0].shape
    assert copy.deepcopy(layer).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_orthogonal_initialization():
    for dtype in (torch.float32, torch.bfloat16):
        weight = RepMLP(4, 4, 4, 2, 2, groups=2, dtype=dtype).fc3.weight.detach().flatten(1).float()
        torch.testing.assert_close(weight.T @ weight, torch.eye(8), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(channels=0), "channels=0 is not a positive integer"),
        (dict(h=0), "h=0 is not a positive integer"),
        (dict(w=2.5), r"w=2\.5 is not a positive integer"),
        (dict(num_sharesets=3), r"num_sharesets=3 does not divide channels=8; accepted: \[1, 2, 4, 8\]"),
        (dict(num_sharesets=16), r"num_sharesets=16 does not divide"),
        (dict(kernel_sizes=(1, 2)), r"kernel_sizes=\(1, 2\): accepted are different odd"),
        (dict(kernel_sizes=(3, 3)), r"kernel_sizes=\(3, 3\)"),
        (dict(reduction=9), r"reduction=9: accepted is an integer from 1 to channels=8"),
    ],
)
def test_bad_arguments_of_the_block_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RepMLPBlock(**{**dict(channels=8, h=4, w=4), **kwargs})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(channels=-1), "channels=-1 is not a positive integer"),
        (dict(out_channels=16), "out_channels=16: accepted is channels=8"),
        (dict(h=3), r"h=3 does not divide height=8; accepted: \[1, 2, 4, 8\]"),
        (dict(w=0), r"w=0 does not divide width=4"),
        (dict(groups=3), r"groups=3 does not divide channels=8; accepted: \[1, 2, 4, 8\]"),
        (dict(kernel_sizes=[4]), r"kernel_sizes=\[4\]"),
        (dict(reduction=0), r"reduction=0: accepted is an integer from 1 to 16"),
    ],
)
def test_bad_arguments_of_the_first_block_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RepMLP(**{**dict(channels=8, height=8, width=4, h=4, w=4), **kwargs})


def test_inputs_that_do_not_fit_are_refused():
    layer, _ = small("block")
    with pytest.raises(ValueError, match=r"height 7 and width 8 .*multiples of h=3 and of w=4"):
        layer(torch.randn(1, 8, 7, 8))
    with pytest.raises(ValueError, match=r"shape \[1, 4, 6, 8\]: accepted is \(N, 8, H, W\)"):
        layer(torch.randn(1, 4, 6, 8))
    layer, _ = small("v1")
    with pytest.raises(ValueError, match=r"shape \[1, 8, 3, 8\]: accepted is \(N, 8, 6, 8\)"):
        layer(torch.randn(1, 8, 3, 8))
    with pytest.raises(ValueError, match=r"shape \[8, 6, 8\]"):
        layer(torch.randn(8, 6, 8))


def test_kernel_sizes_that_are_none_are_refused():
    with pytest.raises(ValueError, match="kernel_sizes=3: accepted are different odd positive integers"):
        RepMLPBlock(8, 3, 3, kernel_sizes=3)
