import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

from timm_ulsam.layers import ConvBN, DiverseBranchBlock, DOConv2d, PSConv2d, WeightNetConv2d, replace_convs


def small(**kwargs) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.Conv2d(4, 5, 3, **kwargs))


def kinds(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if "Conv" in type(m).__name__]


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "efficientnet_b0"])
def test_a_models_output_stays(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    expected, count = model(x), kinds(model).count("Conv2d")
    assert replace_convs(model, DOConv2d) is model
    assert kinds(model).count("DOConv2d") == count
    assert "Conv2d" not in kinds(model)
    assert (model(x) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_only_what_the_filter_accepts_is_replaced():
    asked = []

    def is_large(name, conv):
        asked.append((name, conv.kernel_size))
        return conv.kernel_size == (3, 3) and name != "0"

    model = replace_convs(small(), DOConv2d, is_large)
    assert asked == [("0", (3, 3)), ("1.0", (1, 1)), ("2", (3, 3))]
    assert kinds(model) == ["Conv2d", "Conv2d", "DOConv2d"]


def test_arguments_are_passed_to_the_layer():
    model = replace_convs(small(), DOConv2d, lambda name, conv: name == "2", d_mul=12)
    assert model[2].d_mul == 12


def test_a_convolution_in_two_places_stays_one():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict({"a": conv, "b": nn.Sequential(nn.ReLU(), conv)})
    replace_convs(model, DOConv2d, lambda name, conv: name == "b.1")
    assert isinstance(model["a"], DOConv2d)
    assert model["b"][1] is model["a"]


def test_a_convolution_by_itself_is_replaced():
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 5, 5)
    layer = replace_convs(conv, DOConv2d)
    assert type(layer) is DOConv2d
    assert torch.equal(layer(x), conv(x))


def test_the_order_of_modules_stays():
    model = small()
    names = [name for name, _ in model.named_modules()]
    replace_convs(model, DOConv2d, lambda name, conv: name == "0")
    assert [name for name, _ in model.named_modules()] == names


def test_mode_dtype_and_what_is_trained_stay():
    model = small().double()
    model[1].eval()
    model[2].requires_grad_(False)
    replace_convs(model, DOConv2d)
    assert [m.training for m in (model[0], model[1][0], model[2])] == [True, False, True]
    assert [m.W.requires_grad for m in (model[0], model[1][0], model[2])] == [True, True, False]
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_model_on_the_meta_device_stays_there():
    model = replace_convs(timm.create_model("resnet18", device="meta"), DOConv2d)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}


def test_subclasses_are_left_alone():
    model = nn.Sequential(timm.layers.Conv2dSame(3, 4, 3), nn.Conv2d(4, 4, 3))
    assert kinds(replace_convs(model, DOConv2d)) == ["Conv2dSame", "DOConv2d"]


def hooked() -> nn.Module:
    model = small()
    model[2].register_forward_hook(lambda *_: None)
    return model


def pruned() -> nn.Module:
    model = small()
    prune.l1_unstructured(model[2], "weight", 0.5)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[2].weight = model[1].weight
    return model


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (hooked, {}, "cannot replace 2: it has hooks"),
        (pruned, {}, "cannot replace 2: it has hooks"),
        (tied, {}, "cannot replace 1: it shares parameters"),
        (small, dict(d_mul=4), r"cannot replace 0: d_mul=4 is too small .*accepted: from 9"),
    ],
)
def test_a_chosen_misfit_leaves_the_model_as_it_was(make, kwargs, message):
    model = make()
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        replace_convs(model, DOConv2d, lambda name, conv: True, **kwargs)
    assert all(ours is theirs for ours, theirs in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize(("make", "kept"), [(hooked, ["Conv2d"]), (pruned, ["Conv2d"]), (tied, ["Conv2d", "Conv2d"])])
def test_without_a_filter_a_misfit_is_left_alone(make, kept):
    model = replace_convs(make(), DOConv2d)
    assert kinds(model)[-len(kept) :] == kept
    assert "DOConv2d" in kinds(model)


@pytest.mark.parametrize("layer", [ConvBN, DOConv2d(3, 4, 3), "DOConv2d"])
def test_what_cannot_take_a_convolutions_place_is_refused(layer):
    with pytest.raises(ValueError, match="cannot take the place of a convolution; accepted: DOConv2d, PSConv2d, Div"):
        replace_convs(small(), layer)


def test_nothing_to_replace_is_an_error_and_says_why():
    with pytest.raises(
        ValueError, match=r"no convolution to replace by DOConv2d: accepted is an nn\.Conv2d that fits it$"
    ):
        replace_convs(nn.Linear(2, 2), DOConv2d)
    with pytest.raises(ValueError, match="no convolution to replace"):
        replace_convs(small(), DOConv2d, lambda name, conv: False)
    with pytest.raises(ValueError, match="0 does not: d_mul=-1 is not a positive integer"):
        replace_convs(small(), DOConv2d, d_mul=-1)
    with pytest.raises(TypeError, match="depth"):
        replace_convs(small(), DOConv2d, depth=9)


def test_the_replaced_model_trains_and_copies():
    model = replace_convs(small(), DOConv2d)
    copied = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 3, 9, 9)
    losses = []
    for _ in range(5):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert copied[0].W.grad is None
    assert not torch.equal(copied[0].D, model[0].D)


def test_the_convolutions_inside_a_new_layer_are_not_replaced():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    replace_convs(model, PSConv2d, lambda name, conv: name == "0")
    inner = dict(model[0].named_modules())
    replace_convs(model, PSConv2d)
    assert dict(model[0].named_modules()) == inner
    assert type(model[1]) is PSConv2d


@pytest.mark.parametrize("layer", [DOConv2d, PSConv2d, DiverseBranchBlock, WeightNetConv2d])
def test_what_is_frozen_stays_frozen(layer):
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)).requires_grad_(False)
    replace_convs(model, layer)
    assert type(model[0]) is layer
    assert not any(p.requires_grad for p in model.parameters())


def test_the_convolutions_of_a_shared_layer_are_left_alone():
    block = DiverseBranchBlock(8, 8)
    model = nn.ModuleDict({"a": block, "b": nn.Sequential(nn.ReLU(), block), "c": nn.Conv2d(8, 8, 3, padding=1)})
    replace_convs(model, DiverseBranchBlock)
    assert sum(isinstance(m, DiverseBranchBlock) for m in model.modules()) == 2
    with pytest.raises(ValueError, match="no convolution to replace"):
        replace_convs(block, DiverseBranchBlock)


@pytest.mark.parametrize(
    ("layer", "biases"),
    [
        (DOConv2d, {"bias"}),
        (DiverseBranchBlock, {"dbb_origin.bn.bias"}),
        (PSConv2d, {"conv.bias", "gwconv.bias", "gwconv_shift.bias"}),
        (WeightNetConv2d, {"wnet.bias"}),
    ],
)
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_of_a_convolution_is_frozen_stays_so(layer, biases, frozen):
    conv = nn.Conv2d(8, 8, 3, padding=1)
    getattr(conv, frozen).requires_grad_(False)
    made = layer.from_conv(conv)
    trained = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert trained == (biases if frozen == "weight" else {*dict(made.named_parameters())} - biases)
