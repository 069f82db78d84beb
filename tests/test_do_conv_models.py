import copy
import hashlib

import pytest
import reference
import timm
import torch
from timm.layers import Conv2dSame
from timm.optim import param_groups_weight_decay
from timm.utils.model import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_ulsam.layers import DOConv2d
from timm_ulsam.models.doconv import checkpoint_filter_fn

PLAIN = {
    "resnet18_doconv": "resnet18",
    "resnet50_doconv": "resnet50",
    "resnet101_doconv": "resnet101",
    "resnext50_32x4d_doconv": "resnext50_32x4d",
    "mobilenetv1_doconv": "mobilenetv1_100",
    "mobilenetv2_doconv": "mobilenetv2_100",
}
BACKBONES = {
    "resnet18_doconv": "torchvision resnet18",
    "resnet50_doconv": "torchvision resnet50",
    "resnet101_doconv": "torchvision resnet101",
    "resnext50_32x4d_doconv": "torchvision resnext50_32x4d",
    "mobilenetv1_doconv": "MobileNet-v1 1.0",
    "mobilenetv2_doconv": "torchvision mobilenet_v2",
}
SMALL = ["resnet18_doconv", "mobilenetv1_doconv", "mobilenetv2_doconv"]
FILES = {"resnet18_doconv": "model_resnet18", "mobilenetv2_doconv": "model_mobilenet_v2"}


def make(name: str, **kwargs) -> nn.Module:
    """A model in evaluation whose D are not zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 5, **kwargs}).eval()
    for module in model.modules():
        if isinstance(module, DOConv2d) and module.D is not None:
            nn.init.normal_(module.D.data, std=0.1)
    return model


def images(channels: int = 3, dtype: torch.dtype = torch.float32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, 64, 64, dtype=dtype)


def published_state(name: str) -> dict[str, torch.Tensor]:
    model = reference.model("do_conv", FILES[name])
    shapes = model["state_dict_train"]
    state = reference.drawn(shapes, model["gain"], lambda k: k.endswith(("d_diag", "num_batches_tracked")))
    for key, shape in shapes.items():
        if key.endswith("d_diag"):
            state[key] = torch.eye(shape[1]).repeat(shape[0], 1, 1)
        elif key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
    return {key: state[key] for key in shapes}


def load(name: str, checkpoint: dict, folder, **kwargs) -> nn.Module:
    """The model as `--pretrained-path` of timm's train.py has it."""
    file = folder / "checkpoint.pth"
    torch.save(checkpoint, file)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **kwargs).eval()


def macs(model: nn.Module) -> int:
    """Of convolutions and linear layers; composing kernels, which is matrix multiplication in batches, is left out."""
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    return (counts[torch.ops.aten.convolution] + counts[torch.ops.aten.addmm]) // 2


@pytest.mark.parametrize("name", PLAIN)
def test_parameters_and_macs_are_the_published_in_both_forms(name):
    variants = reference.model("do_conv", "variants")["variants"]
    (published,) = (v for v in variants if v["backbone"].startswith(BACKBONES[name]))
    model = timm.create_model(name, num_classes=1000, device="meta").eval()
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == published["train"]["trainable_params"]
    assert sum(t.numel() for t in state.values()) == published["train"]["state_dict_elements"]
    assert macs(model) == published["train"]["macs"]
    if name.startswith("resne"):  # the same keys, in the same order
        lines = "\n".join(f"{key} {list(tensor.shape)}" for key, tensor in state.items())
        assert hashlib.sha256(lines.encode()).hexdigest() == published["signature_train"]

    folded = reparameterize_model(model)
    plain = timm.create_model(PLAIN[name], num_classes=1000, device="meta")
    assert sum(p.numel() for p in folded.parameters()) == published["deploy"]["params"]
    assert macs(folded) == published["deploy"]["macs"]
    shapes = [(key, tensor.shape) for key, tensor in plain.state_dict().items()]
    assert [(key, tensor.shape) for key, tensor in folded.state_dict().items()] == shapes
    assert not [m for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("name", FILES)
def test_a_published_checkpoint_gives_the_published_logits(name, wrapper, tmp_path):
    published = reference.model("do_conv", FILES[name])
    state = published_state(name)
    checkpoint = {wrapper: {f"module.{key}": tensor for key, tensor in state.items()}} if wrapper else state
    model = load(name, checkpoint, tmp_path)
    x = reference.tiled_image(published["input"]["shape"], published["input"]["seed"])
    with torch.no_grad():
        logits = model(x)[0]
        scale = published["logits_stats"]["abs_max"]
        assert (logits[:64] - torch.tensor(published["logits_first64"])).abs().max() <= 1e-5 * scale
        assert abs(logits.abs().sum().item() / published["logits_stats"]["abs_sum"] - 1) <= 1e-5
        if wrapper is None:
            exact = model.double()(x.double())[0, :64]
            expected = torch.tensor(published["logits_f64_first64"], dtype=torch.float64)
            assert (exact - expected).abs().max() <= 1e-10 * scale
            folded = reparameterize_model(model)(x.double())[0, :64]
            assert (folded - expected).abs().max() <= 1e-10 * scale


@pytest.mark.parametrize("name", PLAIN)
def test_our_own_state_dict_passes_the_filter_unchanged(name):
    model = timm.create_model(name, device="meta")
    state = model.state_dict()
    assert checkpoint_filter_fn(state, model) == state
    model = reparameterize_model(model)
    state = model.state_dict()
    assert checkpoint_filter_fn(state, model) == state


@pytest.mark.parametrize("name", SMALL)
def test_timms_plain_checkpoint_is_where_it_starts(name, tmp_path):
    plain = timm.create_model(PLAIN[name], num_classes=1000).eval()
    model, x = load(name, plain.state_dict(), tmp_path), images()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    layers = [m for m in model.modules() if isinstance(m, DOConv2d)]
    assert layers
    assert all(m.W is not None for m in layers)


def test_torchvisions_plain_mobilenet_checkpoint_loads(tmp_path):
    published = reference.model("do_conv", "model_mobilenet_v2")
    state = reference.drawn(published["state_dict_deploy"], 1.0, lambda k: k.endswith("num_batches_tracked"))
    model = load("mobilenetv2_doconv", state, tmp_path)
    plain = timm.create_model("mobilenetv2_100")
    # the same tensors in the same order
    renamed = zip((k for k in plain.state_dict() if "tracked" not in k), state.values(), strict=True)
    plain.load_state_dict({**plain.state_dict(), **dict(renamed)})
    x = images()
    with torch.no_grad():
        assert torch.equal(model(x), plain.eval()(x))


@pytest.mark.parametrize("name", SMALL)
def test_a_folded_state_dict_is_a_plain_one(name):
    folded, x = reparameterize_model(make(name)), images()
    plain = timm.create_model(PLAIN[name], num_classes=5).eval()
    plain.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(plain(x), folded(x))
    fresh = timm.create_model(name, num_classes=5).eval()
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(fresh(x), folded(x))
    folded.load_state_dict(make(name).state_dict(), strict=True)
    assert torch.equal(plain(x), folded(x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", ["resnet18_doconv", "mobilenetv2_doconv"])
def test_folding_after_training_changes_no_logit(name, dtype, tolerance, autocast):
    # of two images, statistics of the last maps are of 8 values: float32's own rounding nears 1e-5 there
    model, x = make(name, dtype=dtype).train(), images(dtype=dtype, batch=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    before, expected = copy.deepcopy(model.state_dict()), model(x).detach()
    folded = reparameterize_model(reparameterize_model(model))
    reference.assert_close(folded(x), expected, tolerance)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["factors", "plain"])
@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("name", ["resnet18_doconv", "mobilenetv2_doconv"])
def test_a_checkpoint_of_color_images_is_adapted_to_other_inputs_as_timm_does(name, in_chans, kind, tmp_path):
    source = make(name, num_classes=1000)
    folded = reparameterize_model(source)
    expected = load(PLAIN[name], folded.state_dict(), tmp_path, in_chans=in_chans, num_classes=1000)
    state = (source if kind == "factors" else folded).state_dict()
    model, x = load(name, state, tmp_path, in_chans=in_chans), images(in_chans)
    with torch.no_grad():
        reference.assert_close(model(x), expected(x), 1e-4)
    assert torch.equal(load(name, model.state_dict(), tmp_path, in_chans=in_chans)(x), model(x))


@pytest.mark.parametrize("kind", ["factors", "plain"])
@pytest.mark.parametrize("name", ["resnet18_doconv", "mobilenetv2_doconv"])
def test_weights_of_gray_images_are_adapted_to_color(name, kind, tmp_path):
    gray = make(name, num_classes=5, in_chans=1)
    state = (gray if kind == "factors" else reparameterize_model(gray)).state_dict()
    torch.save(state, tmp_path / "gray.pth")
    # as config.json has it
    overlay = dict(file=str(tmp_path / "gray.pth"), input_size=(1, 64, 64), num_classes=5)
    color = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=3).eval()
    x = images(1)
    with torch.no_grad():
        reference.assert_close(color(x.expand(-1, 3, -1, -1)), gray(x), 1e-4)


@pytest.mark.parametrize("kind", ["factors", "plain"])
@pytest.mark.parametrize("name", SMALL)
def test_the_head_is_adapted(name, kind, tmp_path):
    source = make(name, num_classes=1000)
    folded = reparameterize_model(source)
    model, x = load(name, (source if kind == "factors" else folded).state_dict(), tmp_path, num_classes=3), images()
    with torch.no_grad():
        assert model(x).shape == (2, 3)
        reference.assert_close(model.forward_features(x), folded.forward_features(x), 1e-4)


@pytest.mark.parametrize("location", ["bottleneck", "expansion"])
@pytest.mark.parametrize("name", ["mobilenetv1_doconv", "mobilenetv2_doconv"])
def test_features_are_those_of_the_plain_network(name, location, tmp_path):
    kwargs = dict(features_only=True, feature_location=location)
    source = timm.create_model(PLAIN[name], num_classes=1000).state_dict()
    model, plain = (load(n, source, tmp_path, **kwargs) for n in (name, PLAIN[name]))
    assert model.feature_info.info == plain.feature_info.info
    x = images()
    with torch.no_grad():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(model(x), plain(x), strict=True))


def test_features_of_a_resnet_load_a_published_checkpoint(tmp_path):
    state = published_state("resnet18_doconv")
    model = load("resnet18_doconv", state, tmp_path, features_only=True, out_indices=(1, 4))
    whole, x = load("resnet18_doconv", state, tmp_path), images()
    with torch.no_grad():
        assert torch.equal(model(x)[-1], whole.forward_features(x))


@pytest.mark.parametrize("kwargs", [{}, dict(num_classes=3), dict(in_chans=1), dict(features_only=True)])
@pytest.mark.parametrize("name", SMALL)
def test_a_checkpoint_of_another_network_is_refused_with_keys_and_shapes(name, kwargs, tmp_path):
    other = "mobilenetv1_125" if name == "mobilenetv1_doconv" else "mobilenetv1_100"
    checkpoint = timm.create_model(other, num_classes=1000).state_dict()
    expected = r"W is \(\d+, \d+, 9\), accepted is \(" if "125" in other else r"missing: .*; unexpected: "
    with pytest.raises(RuntimeError, match=f"not one of DOConv.*({expected})"):
        load(name, checkpoint, tmp_path, **kwargs)


def test_the_published_constant_may_not_be_missing(tmp_path):
    state = published_state("resnet18_doconv")
    del state["layer1.0.conv1.d_diag"]
    with pytest.raises(RuntimeError, match=r"missing: layer1\.0\.conv1\.d_diag$"):
        load("resnet18_doconv", state, tmp_path, num_classes=3)
    del state["conv1.D"]
    with pytest.raises(RuntimeError, match=r"missing: conv1\.D"):
        load("resnet18_doconv", state, tmp_path, in_chans=1)


@pytest.mark.parametrize("name", SMALL)
def test_it_starts_as_timms_network_of_the_same_seed(name):
    torch.manual_seed(0)
    plain = timm.create_model(PLAIN[name], num_classes=5).eval()
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=5).eval(), images()
    assert torch.equal(model(x), plain(x))


def test_a_resnet_can_be_initialized_again():
    model = make("resnet18_doconv")
    before = model.layer1[0].conv1.W.detach().clone()
    model.init_weights()
    layer = model.layer1[0].conv1
    assert not torch.equal(layer.W, before)
    assert not layer.D.any()
    assert layer.W.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


def test_both_factors_decay_and_the_constant_is_no_parameter():
    model = timm.create_model("mobilenetv2_doconv", device="meta")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(p)].split(".")[-1] for p in group["params"]}
        for group in param_groups_weight_decay(model, 0.05)
    }
    assert groups == {0.05: {"W", "D", "weight"}, 0.0: {"weight", "bias"}}


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_trains(name):
    # zero scales would hide the rest of a block in the first step
    kwargs = dict(zero_init_last=False) if name == "resnet18_doconv" else {}
    model = timm.create_model(name, num_classes=5, drop_rate=0.1, drop_path_rate=0.1, **kwargs).train()
    model.set_grad_checkpointing()
    model(images()).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert {k for k, p in model.named_parameters() if not p.grad.any()} == set()


def test_other_kinds_of_convolution_are_refused():
    with pytest.raises(ValueError, match="'conv_stem': 'Conv2dSame'"):
        timm.create_model("mobilenetv2_doconv", pad_type="same", device="meta")
    assert issubclass(Conv2dSame, nn.Conv2d)


def test_an_unknown_feature_location_is_refused():
    with pytest.raises(ValueError, match="feature_location='depthwise'; accepted: 'bottleneck', 'expansion'"):
        timm.create_model("mobilenetv2_doconv", features_only=True, feature_location="depthwise")
