"""Networks of Diverse Branch Blocks: published costs, logits and checkpoints, in both forms."""

import copy
import hashlib
import re
from functools import cache

import pytest
import reference
import timm
import torch
from reference import assert_close
from timm.utils.model import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_ulsam.models.dbb import checkpoint_filter_fn

NAMES = {"mobilenetv1_dbb": "MobileNet", "resnet18_dbb": "ResNet-18", "resnet50_dbb": "ResNet-50"}
FILES = {"mobilenetv1_dbb": "model_mobilenet", "resnet18_dbb": "model_resnet18"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def variant(name: str) -> dict:
    return next(v for v in reference.model("dbb", "variants")["variants"] if v["model"] == NAMES[name])


def published_name(key: str) -> str:
    key = re.sub(r"^(fc|classifier)\.", "linear.", key)
    key = re.sub(r"^conv1\.", "stage0.conv1.", key)
    key = re.sub(r"^layer", "stage", key).replace(".downsample.0.", ".shortcut.")
    key = re.sub(r"^conv_stem\.", "conv1.", key)
    first = {0: 0, 1: 1, 2: 3, 3: 5, 4: 11}
    key = re.sub(r"^blocks\.(\d)\.(\d)\.", lambda m: f"stem.{first[int(m[1])] + int(m[2])}.", key)
    return key.replace(".conv_dw.", ".depthwise.").replace(".conv_pw.", ".pointwise.")


def signature(model: nn.Module) -> str:
    items = [(published_name(key), list(value.shape)) for key, value in model.state_dict().items()]
    # the published blocks register their shortcut first
    blocks = list(dict.fromkeys(".".join(key.split(".")[:2]) for key, _ in items))
    items.sort(key=lambda item: (blocks.index(".".join(item[0].split(".")[:2])), ".shortcut." not in item[0]))
    return hashlib.sha256("\n".join(f"{key} {shape}" for key, shape in items).encode()).hexdigest()


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("name", NAMES)
def test_costs_and_keys_are_the_published_ones(name, form):
    expected = variant(name)
    model = timm.create_model(name, device="meta").eval()
    if form == "deploy":
        model = reparameterize_model(model)
    with FlopCounterMode(display=False) as flops:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert sum(p.numel() for p in model.parameters()) == expected[form]["params"]
    assert sum(b.numel() for b in model.buffers()) == expected[form]["buffers"]
    assert flops.get_total_flops() // 2 == expected[form]["macs"]
    assert signature(model) == expected[f"signature_{form}"]


@cache
def published(name: str) -> tuple[dict, dict[str, torch.Tensor], torch.Tensor]:
    file = reference.model("dbb", FILES[name])
    state = reference.drawn(file["state_dict_train"], file["gain"], lambda key: key.endswith("num_batches_tracked"))
    return file, state, reference.tiled_image(file["input"]["shape"], file["input"]["seed"])


@cache
def deployed(name: str) -> dict[str, torch.Tensor]:
    """The published folded state dict, as ours folds it."""
    _, state, _ = published(name)
    model = timm.create_model(name)
    model.load_state_dict(checkpoint_filter_fn(state, model), strict=False)
    return {published_name(key): value for key, value in reparameterize_model(model).state_dict().items()}


def load(name: str, checkpoint: dict, path, **kwargs) -> nn.Module:
    file = path / "checkpoint.pth"
    torch.save(checkpoint, file)
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **kwargs).eval()
    finally:
        file.unlink()


def wrapped(state: dict, wrapper: str) -> dict:
    state = {f"module.{key}": value for key, value in state.items()} if "module" in wrapper else state
    return {"epoch": 1, "state_dict": state} if "state_dict" in wrapper else {"model": state} if wrapper else state


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize(
    ("name", "wrapper"),
    [("resnet18_dbb", "module"), *(("mobilenetv1_dbb", w) for w in ("", "module in state_dict", "model"))],
)
def test_published_checkpoints_give_the_published_logits(name, form, wrapper, tmp_path):
    file, state, x = published(name)
    state = state if form == "train" else deployed(name)
    model = load(name, wrapped(state, wrapper), tmp_path)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == (form == "train")
    largest = file["logits_stats"]["abs_max"]
    precisions = [("_deploy" if form == "deploy" else "", torch.float32, 1e-5)]
    if form == "train" and wrapper in ("", "module"):
        precisions.append(("_f64", torch.float64, 1e-10))
    for suffix, dtype, tolerance in precisions:
        expected = torch.tensor(file[f"logits{suffix}_first64"], dtype=dtype)
        with torch.no_grad():
            logits = model.to(dtype)(x.to(dtype))[0]
            folded = reparameterize_model(model)(x.to(dtype))[0]
        assert (logits[:64] - expected).abs().max() <= tolerance * largest
        assert_close(folded, logits, tolerance)


@pytest.mark.parametrize("name", FILES)
def test_our_own_checkpoints_go_through_unchanged(name):
    model = timm.create_model(name, num_classes=7, in_chans=2)
    for m in (model, reparameterize_model(model)):
        own = m.state_dict()
        for target in (model, m):
            converted = checkpoint_filter_fn(own, target)
            assert list(converted) == list(own)
            assert all(converted[key] is value for key, value in own.items())


@pytest.mark.parametrize("kwargs", [dict(num_classes=5, in_chans=1), dict(features_only=True)])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["missing", "shape", "unexpected", "another model"])
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(name, kwargs, change, tmp_path):
    state = dict(published(name)[1])
    key = {"mobilenetv1_dbb": "stem.3.pointwise.bn.weight", "resnet18_dbb": "stage2.0.shortcut.bn.weight"}[name]
    ours = {"mobilenetv1_dbb": "blocks.2.0.conv_pw.bn.weight", "resnet18_dbb": "layer2.0.downsample.0.bn.weight"}[name]
    if change == "missing":
        del state[key]
        message = f"missing: {ours}"
    elif change == "shape":
        state[key] = torch.ones(3)
        message = f"{ours} is (3,), accepted is ("
    elif change == "unexpected":
        state["extra.weight"] = torch.ones(3)
        message = "unexpected: extra.weight"
    else:
        state = published(next(other for other in FILES if other != name))[1]
        message = ours
    with pytest.raises(RuntimeError, match=re.escape(message)):
        load(name, state, tmp_path, **kwargs)


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("name", FILES)
def test_a_grey_model_has_the_logits_of_grey_images(name, form, tmp_path):
    state = published(name)[1] if form == "train" else deployed(name)
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        expected = load(name, state, tmp_path)(x.expand(1, 3, 64, 64))
        assert_close(load(name, state, tmp_path, in_chans=1)(x), expected, 1e-5)
        four, x = load(name, state, tmp_path, in_chans=4, num_classes=5), torch.randn(1, 4, 64, 64)
        assert four(x).shape == (1, 5)
        assert_close(reparameterize_model(four)(x), four(x), 1e-5)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_weights_of_grey_images_are_adapted_to_color(name, folded, tmp_path):
    grey = timm.create_model(name, in_chans=1, num_classes=5).eval()
    grey = reparameterize_model(grey) if folded else grey
    torch.save(grey.state_dict(), tmp_path / "grey.pth")
    # as config.json has it
    overlay = dict(file=str(tmp_path / "grey.pth"), input_size=(1, 64, 64), num_classes=5)
    color = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=3).eval()
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        assert_close(color(x.expand(1, 3, 64, 64)), grey(x), 1e-5)


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("name", FILES)
def test_features_of_a_checkpoint_are_those_of_the_classifier(name, form, tmp_path):
    state, x = published(name)[1] if form == "train" else deployed(name), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = load(name, state, tmp_path, features_only=True)(x)
        expected = load(name, state, tmp_path).forward_intermediates(x, intermediates_only=True)
    assert len(features) == len(expected) == 5
    for found, e in zip(features, expected, strict=True):
        torch.testing.assert_close(found, e)


def test_the_mobilenets_expansion_features_are_the_input_of_pointwise_convolutions():
    model = timm.create_model("mobilenetv1_dbb", features_only=True, feature_location="expansion").eval()
    seen = []
    for stage in model.blocks:
        stage[-1].conv_pw.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features = model(torch.randn(1, 3, 64, 64))
    assert [f.shape[1] for f in features] == model.feature_info.channels() == [32, 128, 256, 512, 1024]
    assert all(torch.equal(f, s) for f, s in zip(features, seen, strict=True))
    with pytest.raises(ValueError, match="feature_location='depthwise'; accepted: 'bottleneck', 'expansion'"):
        timm.create_model("mobilenetv1_dbb", features_only=True, feature_location="depthwise")


@pytest.mark.parametrize("name", ["resnet18_dbb", "resnet50_dbb"])
def test_residual_branches_start_at_zero_as_timms_do(name):
    x = torch.randn(1, 64 if name == "resnet18_dbb" else 256, 8, 8)
    for zero in (True, False):
        block = timm.create_model(name, zero_init_last=zero).eval().layer1[1]
        assert torch.equal(block(x), x.relu()) == zero


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_networks_fold(output_stride):
    model = timm.create_model("resnet18_dbb", output_stride=output_stride, num_classes=3, zero_init_last=False).eval()
    x = torch.randn(1, 3, 64, 64)
    assert model.forward_features(x).shape[-1] == 64 // output_stride
    assert_close(reparameterize_model(model)(x), model(x), 1e-5)


@pytest.mark.parametrize("name", FILES)
def test_other_norms_and_paddings_are_refused(name):
    with pytest.raises(ValueError, match="accepted is a batch norm with weight and running statistics"):
        timm.create_model(name, norm_layer="groupnorm")
    with pytest.raises(ValueError, match=r"padding=\(0, 0\); accepted: 1"):
        timm.create_model("mobilenetv1_dbb", pad_type="same")


def test_batch_norm_settings_reach_every_norm():
    model = timm.create_model("mobilenetv1_dbb", bn_eps=1e-3, bn_momentum=0.01, device="meta")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(bn.eps, bn.momentum) for bn in norms} == {(1e-3, 0.01)}
    assert len(norms) == 6 + 13 * (4 + 1)


def test_every_parameter_trains_under_autocast_and_the_loss_falls():
    model = timm.create_model("mobilenetv1_dbb", num_classes=4, drop_rate=0.1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    x, y = torch.randn(8, 3, 64, 64), torch.arange(8) % 4
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        assert_close(reparameterize_model(model)(x), model(x), 1e-5)


@pytest.mark.parametrize("name", ["mobilenetv1_dbb", "resnet18_dbb"])
def test_checkpointing_of_activations_changes_no_gradient(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, dtype=torch.float64)
    twin, x = copy.deepcopy(model), torch.randn(4, 3, 64, 64, dtype=torch.float64)
    twin.set_grad_checkpointing()
    for one in (model, twin):
        one(x).square().sum().backward()
    for (key, parameter), again in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(again.grad, parameter.grad), key
