"""Models whose ULSAM is folded (`--reparam` of timm's scripts): what they compute, how they are saved and trained."""

import copy
import inspect
import io
from functools import partial

import pytest
import timm
import torch
from compare import assert_same, cpu_spy, images, make_layer, make_model, plainly, split_batch_norms, step
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.utils.flop_counter import FlopCounterMode

from timm_ulsam import ULSAM


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def same_state(ours: nn.Module, theirs: nn.Module) -> bool:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], v) for k, v in theirs.items())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_folding_changes_no_logit_and_not_the_model_it_is_made_of(dtype, tolerance):
    model, x = make_model(dtype).eval(), images(dtype=dtype)
    before = copy.deepcopy(model)
    with plainly():
        expected = model(x)
    folded = reparameterize_model(model)
    with cpu_spy() as fused:
        error = (folded(x) - expected).abs().max()
    assert fused.call_count == 2
    assert error <= tolerance * expected.abs().max()
    assert same_state(model, before)


def test_folding_takes_the_norms_parameters_and_no_operation():
    model, x = make_model(), images(1)

    def cost(model):
        with FlopCounterMode(display=False) as flops:
            model(x)
        return sum(p.numel() for p in model.parameters()), flops.get_total_flops()

    parameters, operations = cost(model.eval())
    # weight and bias of two norms, over all channels (32 and 96 in these places) and over 4 subspaces
    assert cost(reparameterize_model(model)) == (parameters - 2 * (32 + 4 + 96 + 4), operations)


def test_folding_again_changes_nothing():
    once = reparameterize_model(make_model().eval())
    twice = reparameterize_model(once)
    assert same_state(twice, once)
    for layer in (m for m in twice.modules() if isinstance(m, ULSAM)):
        layer.reparameterize()
    assert same_state(twice, once)


@pytest.mark.parametrize("into", ["unfolded", "folded", "meta", "checkpoint_path"])
def test_a_folded_state_loads_strictly(into, tmp_path):
    folded, x = reparameterize_model(make_model().eval()), images()
    torch.save(folded.state_dict(), tmp_path / "folded.pth")
    state = torch.load(tmp_path / "folded.pth")
    if into == "checkpoint_path":
        kwargs = dict(num_classes=5, replace_blocks=(6, 13), checkpoint_path=tmp_path / "folded.pth")
        fresh = timm.create_model("mobilenetv2_ulsam", **kwargs).double()
        state = {k: v.float().double() if v.is_floating_point() else v for k, v in state.items()}
        folded.load_state_dict(state)
    elif into == "meta":
        with torch.device("meta"):
            fresh = make_model()
        fresh.load_state_dict(state, assign=True)
    else:
        fresh = make_model()
        if into == "folded":
            fresh = reparameterize_model(fresh)
        fresh.load_state_dict(state)
    assert same_state(fresh, folded)
    assert torch.equal(fresh.eval()(x), folded(x))


def test_an_unfolded_state_does_not_load_into_a_folded_model():
    model = make_model()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"blocks\.2\.2\.bn_dw\.weight"'):
        reparameterize_model(model).load_state_dict(model.state_dict())


def test_a_folded_model_is_copied_and_saved_whole():
    folded, x = reparameterize_model(make_model().eval()), images()
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    for twin in (copy.deepcopy(folded), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), folded(x))


def test_a_folded_model_trains_on():
    model, x = reparameterize_model(make_model()).train(), images()
    with cpu_spy() as fused:
        ours = step(model, x)
    assert fused.call_count == 2
    with plainly():
        assert_same(ours, step(model, x))
    assert all(f"gradient of {name}" in ours for name, _ in model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(model(x).square().sum())
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("kind", ["SyncBatchNorm", "SplitBatchNorm2d", "FrozenBatchNorm2d"])
def test_other_batch_norms_fold_too(kind):
    model, x = make_model().eval(), images()
    expected = model(x)
    convert = {
        "SyncBatchNorm": timm.layers.convert_sync_batchnorm,
        "SplitBatchNorm2d": split_batch_norms,
        "FrozenBatchNorm2d": timm.layers.freeze_batch_norm_2d,
    }[kind]
    converted = convert(copy.deepcopy(model)).eval()
    assert any(type(m).__name__ == kind for m in converted.blocks[2][2].children())
    folded = reparameterize_model(converted)
    torch.testing.assert_close(folded(x), expected)
    assert not any(kind in type(m).__name__ for m in folded.blocks[2][2].children())


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda conv: parametrize.register_parametrization(conv, "weight", Halved()),
        lambda conv: parametrize.register_parametrization(conv, "bias", Halved()),
        lambda conv: prune.custom_from_mask(conv, "weight", torch.arange(8).view(8, 1, 1, 1) < 4),
        parametrizations.weight_norm,
        weight_norm,
    ],
    ids=["parametrized_weight", "parametrized_bias", "pruned", "weight_norm", "old_weight_norm"],
)
def test_weights_made_of_others_compute_the_same_after_folding(change):
    layer, x = make_layer().eval(), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    change(layer.conv_dw)
    expected = layer(x)
    layer.reparameterize()
    torch.testing.assert_close(layer(x), expected)
    assert isinstance(layer.bn_pw, nn.Identity)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(8, 8, 1, groups=8, bias=False), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)]
)
def test_other_convolutions_compute_the_same_after_folding(conv):
    layer, x = make_layer().eval(), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    layer.conv_dw = copy.deepcopy(conv).double()
    expected = layer(x)
    layer.reparameterize()
    torch.testing.assert_close(layer(x), expected)


def test_what_a_convolution_of_another_class_does_is_not_folded_away():
    class Clipped(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).clamp(-0.5, 0.5)

    layer, x = make_layer().eval(), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    layer.conv_dw = Clipped(8, 8, 1, groups=8).double()
    expected = layer(x)
    layer.reparameterize()
    torch.testing.assert_close(layer(x), expected)


def test_a_norm_without_bias_computes_the_same_and_does_not_fold():
    if "bias" not in inspect.signature(nn.BatchNorm2d).parameters:
        pytest.skip("this PyTorch has no batch norm without bias")
    layer = ULSAM(8, 2, norm_layer=partial(nn.BatchNorm2d, bias=False))
    for training in (True, False):
        layer.train(training)
        expected, x = copy.deepcopy(layer), torch.randn(2, 8, 5, 5, requires_grad=True)
        for bn in (expected.bn_dw, expected.bn_pw):
            bn.register_forward_hook(lambda module, args, y: None)  # one by one
        torch.testing.assert_close(layer(x), expected(x))
    layer.reparameterize()
    assert type(layer.bn_dw) is nn.BatchNorm2d


def test_a_pruned_norm_does_not_fold():
    layer, x = ULSAM(8, 2).eval(), torch.randn(2, 8, 5, 5)
    prune.l1_unstructured(layer.bn_dw, "weight", 0.5)
    nn.init.normal_(layer.bn_dw.weight_orig)  # as load_state_dict would
    layer.reparameterize()
    assert type(layer.bn_dw) is nn.BatchNorm2d
    y = layer(x)
    prune.remove(layer.bn_dw, "weight")
    torch.testing.assert_close(y, layer(x))
