import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import reference
import timm
import torch
from timm.models.cspnet import model_cfgs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_ulsam.layers import ShuffleAttention

LAYERS = ["layer_c64_g8_8x8", "layer_c64_g8_7x9", "layer_c512_g64_7x7", "layer_c64_g4_6x10_lowvar"]
FORMATS = [torch.contiguous_format, torch.channels_last]
MODELS = {  # parameters (those of SA-Net50 are the published ones), multiply-adds: those of the plain ResNets
    "resnet50_sa": (25_557_740, 4_089_184_256),
    "resnet101_sa": (44_550_684, 7_801_405_440),
    "resnet152_sa": (60_195_052, 11_513_626_624),
}


def make_layer(channels: int = 16, groups: int = 2, **kwargs) -> ShuffleAttention:
    layer = ShuffleAttention(channels, groups, **kwargs)
    torch.manual_seed(1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def by_loops(layer: ShuffleAttention, x: torch.Tensor) -> torch.Tensor:
    """The paper's figure, channel by channel."""
    c, k = layer.channels, layer.channels // (2 * layer.groups)
    out = torch.empty_like(x)
    for channel in range(c):
        i, value = channel % k, x[:, channel]
        mean = value.mean((1, 2), keepdim=True)
        if channel // k % 2 == 0:
            gate = layer.cweight[0, i] * mean + layer.cbias[0, i]
        else:
            normed = (value - mean) / (value.var((1, 2), correction=0, keepdim=True) + 1e-5).sqrt()
            gate = layer.sweight[0, i] * (normed * layer.gn.weight[i] + layer.gn.bias[i]) + layer.sbias[0, i]
        out[:, 2 * channel if channel < c // 2 else 2 * channel - c + 1] = value * gate.sigmoid()
    return out


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("file", LAYERS)
def test_output_and_gradient_are_the_published_ones(file, dtype, memory_format):
    tensors, args = reference.tensors("sa_net", file), reference.config("sa_net", file)["args"]
    layer = ShuffleAttention(args["channel"], args["groups"], dtype=dtype)
    layer.load_state_dict(reference.part(tensors, "param."))
    x = tensors["input"].to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad((y * tensors["grad_seed"]).sum(), x)
    exact = dtype == torch.float64
    reference.assert_close(y, tensors["output"], 1e-6 if exact else 1e-5)
    reference.assert_close(gradient, tensors["grad_input"], 1e-6 if exact else 2e-5)
    with torch.no_grad():
        reference.assert_close(layer(x), tensors["output"], 1e-6 if exact else 1e-5)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_each_channel_is_gated_in_its_branch_and_moved_to_its_place(groups, memory_format):
    layer = make_layer(12, groups, dtype=torch.float64)  # an odd number of groups: the shuffle cuts one of them
    x = torch.randn(2, 12, 3, 5, dtype=torch.float64).contiguous(memory_format=memory_format)
    torch.testing.assert_close(layer(x), by_loops(layer, x))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_loops(layer, x))


def test_parameters_are_trained_exactly():
    layer = make_layer(8, 2, dtype=torch.float64)
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("grad", [False, True])
def test_vmap_gives_each_batch_its_own_output(grad):
    layer, x = make_layer(), torch.randn(3, 2, 16, 4, 5)
    with torch.set_grad_enabled(grad):
        y = torch.func.vmap(layer)(x)
        torch.testing.assert_close(y, torch.stack([layer(batch) for batch in x]))


def test_a_new_layer_scales_everything_alike():
    x = torch.randn(2, 256, 3, 3)
    expected = x.unflatten(1, (2, 128)).transpose(1, 2).flatten(1, 2) * torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(ShuffleAttention(256)(x), expected)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (1, 16, 1, 1), (1, 16, 1, 9), (0, 16, 4, 4)])
def test_any_size_keeps_shape_dtype_and_format(shape, dtype, memory_format, grad):
    layer = make_layer().to(dtype)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    with torch.set_grad_enabled(grad):
        y = layer(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert y.is_contiguous(memory_format=memory_format) or y.numel() == 0
    torch.testing.assert_close(y.float(), layer.float()(x.float()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_large_values_in_float16_do_not_overflow(memory_format):
    layer = make_layer()
    x = (300 * torch.randn(2, 16, 8, 8)).contiguous(memory_format=memory_format)
    with torch.no_grad():
        expected = layer(x)
        assert (layer.half()(x.half()) - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype_of_the_input(dtype, memory_format):
    layer, x = make_layer(), torch.randn(2, 16, 4, 4).contiguous(memory_format=memory_format)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.to(dtype))
        y.float().sum().backward()
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_is_scripted_traced_compiled_exported_and_copied(memory_format, grad):
    torch.compiler.reset()
    layer, x = make_layer().eval(), torch.randn(2, 16, 5, 6).contiguous(memory_format=memory_format)
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("use_dynamo", [False, True], ids=["legacy", "dynamo"])
def test_onnx_computes_the_same(use_dynamo, tmp_path):
    pytest.importorskip("onnxscript" if use_dynamo else "onnx")
    runtime = pytest.importorskip("onnxruntime")
    layer, x = make_layer().eval(), torch.randn(2, 16, 6, 7)
    with torch.no_grad():
        y = layer(x)
        torch.onnx.export(layer, (x,), str(tmp_path / "layer.onnx"), dynamo=use_dynamo, input_names=["x"])
    session = runtime.InferenceSession(str(tmp_path / "layer.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_takes_any_batch_and_size(tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    layer, x, file = make_layer().eval(), torch.randn(5, 16, 9, 4), str(tmp_path / "layer.onnx")
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(layer, (x[:2, :, :6, :3],), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    (found,) = runtime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), layer(x))


@pytest.mark.parametrize(
    ("channels", "groups", "message"),
    [
        (64, 64, r"groups=64 does not divide half of channels=64; .*accepted: \[1, 2, 4, 8, 16, 32\]"),
        (12, 4, r"groups=4 .*channels=12; .*accepted: \[1, 2, 3, 6\]"),  # published: 2 channels and 1
        (12, 0, r"groups=0 .*accepted"),
        (12, True, r"groups=True .*accepted"),
        (12, 2.0, r"groups=2\.0 .*accepted"),
        (7, 1, r"channels=7 is odd; accepted: even"),
        (0, 1, r"channels=0"),
    ],
)
def test_channels_that_cannot_be_split_are_refused(channels, groups, message):
    with pytest.raises(ValueError, match=message):
        ShuffleAttention(channels, groups)


@pytest.mark.parametrize("shape", [(16, 4, 4), (2, 8, 4, 4)])
def test_inputs_of_wrong_rank_or_width_are_refused(shape):
    with pytest.raises(ValueError, match=r"accepted is \(N, 16, H, W\)"):
        make_layer()(torch.randn(shape))


def test_serves_as_attn_layer_of_narrow_models_with_explicit_groups():
    model = timm.create_model("resnet18", block_args=dict(attn_layer=partial(ShuffleAttention, groups=8)))
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    layers = [m for m in model.modules() if isinstance(m, ShuffleAttention)]
    assert len(layers) == 8
    assert all(p.grad is not None for layer in layers for p in layer.parameters())
    with pytest.raises(ValueError, match="groups=64 does not divide half of channels=64"):
        timm.create_model("resnet18", block_args=dict(attn_layer=ShuffleAttention))


@pytest.mark.parametrize(
    ("name", "attn"),
    [
        ("efficientnet_b0", lambda layer: dict(se_layer=layer)),
        ("cs3darknet_m", lambda layer: dict(stages=replace(model_cfgs["cs3darknet_m"].stages, attn_layer=layer))),
    ],
)
def test_serves_where_timm_passes_an_activation(name, attn):
    model = timm.create_model(name, num_classes=3, **attn(partial(ShuffleAttention, groups=4)))
    layers = [m for m in model.modules() if isinstance(m, ShuffleAttention)]
    assert layers
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None for layer in layers for p in layer.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_multiply_adds_are_the_published_ones(name):
    model = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert (sum(p.numel() for p in model.parameters()), flops.get_total_flops() // 2) == MODELS[name]


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """The state dict of the model file, under the authors' keys."""
    described = reference.model("sa_net", "model_sa_resnet50")
    model = timm.create_model("resnet50_sa", device="meta")
    state = {}
    for entry in described["state_dict"]:
        key, shape = entry["key"], entry["shape"]
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
            continue
        r = reference.normal(key, shape, described["salt"])
        if key.endswith("running_mean"):
            r = 0.1 * r
        elif key.endswith("running_var"):
            r = 1 + 0.1 * r.abs()
        elif len(shape) >= 2:
            r = r / math.sqrt(r.numel() / shape[0])
        else:
            r = 0.1 * r if key.endswith("bias") else 1 + 0.1 * r
        assert abs(r.double().sum() - entry["sum"]) <= 1e-6 * entry["abs_sum"]
        state[key] = r
    assert len(state) == len(model.state_dict())
    return state


@pytest.fixture(scope="module")
def checkpoint(published, tmp_path_factory):
    """That state dict as a file, as the authors' training script saves it."""
    path = tmp_path_factory.mktemp("sa") / "checkpoint.pth.tar"
    torch.save({"epoch": 100, "state_dict": {f"module.{k}": v for k, v in published.items()}}, path)
    return path


def load(path, **kwargs) -> nn.Module:
    return timm.create_model("resnet50_sa", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs)


def save(state, path):
    torch.save(state, path / "model.pth")
    return path / "model.pth"


@torch.no_grad()
def test_the_published_checkpoint_gives_the_published_logits_and_ours_loads_again(checkpoint, tmp_path):
    described = reference.model("sa_net", "model_sa_resnet50")["input"]
    expected = reference.tensors("sa_net", "model_sa_resnet50")["logits"]
    x = torch.randn(described["shape"], generator=torch.Generator().manual_seed(described["seed"]))
    model = load(checkpoint).eval()
    logits = model(x)
    assert (logits[:, :64] - expected).abs().max() <= 5e-5
    again = load(save(model.state_dict(), tmp_path)).eval()
    assert torch.equal(again(x[:1, :, :64, :64]), model(x[:1, :, :64, :64]))
    nhwc = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert (nhwc - logits).abs().max() <= 5e-5


@torch.no_grad()
def test_the_published_checkpoint_is_adapted_to_other_inputs_heads_and_features(checkpoint, published):
    model = load(checkpoint, in_chans=1, num_classes=7).eval()
    torch.testing.assert_close(model.conv1.weight, published["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(model.layer4[2].se.sbias, published["layer4.2.sa.sbias"])
    x = torch.randn(1, 1, 64, 64)
    assert model(x).shape == (1, 7)
    features = load(checkpoint, in_chans=1, features_only=True).eval()(x)
    torch.testing.assert_close(features[-1], model.forward_features(x))


@pytest.mark.parametrize("kwargs", [{}, dict(num_classes=7, in_chans=1), dict(features_only=True)])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("layer1.0.sa.cbias", None), r"missing: layer1\.0\.se\.cbias"),
        (("conv1.weight", None), r"missing: conv1\.weight"),
        (("layer9.weight", (1,)), r"unexpected: layer9\.weight"),
        (("layer1.0.sa.cbias", (1, 4, 1, 1)), r"layer1\.0\.se\.cbias is \(1, 4, 1, 1\), accepted is \(1, 2, 1, 1\)"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(published, changed, message, kwargs, tmp_path):
    key, shape = changed
    state = {k: torch.empty(()).expand(v.shape) for k, v in published.items()}  # a small file of the same shapes
    state.pop(key, None)
    if shape is not None:
        state[key] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=message):
        load(save(state, tmp_path), **kwargs)


def test_the_model_trains():
    model = timm.create_model("resnet50_sa", num_classes=3, drop_path_rate=0.1, zero_init_last=False)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_number_of_blocks_can_be_given():
    model = timm.create_model("resnet50_sa", layers=(1, 2, 1, 1), device="meta")
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [1, 2, 1, 1]
