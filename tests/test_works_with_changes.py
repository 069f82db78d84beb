"""ULSAM whose modules are changed, watched, frozen or differentiated in other ways, beside them called one by one."""

import copy

import pytest
import torch
from compare import (
    assert_same,
    cpu_spy,
    fused_spy,
    images,
    make_layer,
    make_model,
    plainly,
    results,
    split_batch_norms,
    step,
)
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_synchronized_batch_norms_are_called_themselves():
    layer, x = make_layer(), torch.randn(4, 8, 5, 6, dtype=torch.float64)
    model, image = make_model(), images()
    for module, value, convert in (
        (layer, x, nn.SyncBatchNorm.convert_sync_batchnorm),
        (model, image, convert_sync_batchnorm),  # timm's, as timm's norms hold activations that PyTorch's would lose
    ):
        expected = step(module, value)
        converted = convert(copy.deepcopy(module))
        with fused_spy() as fused:
            assert_same(step(converted, value), expected)
        assert fused.call_count == 0


def test_split_batch_norms_normalize_each_part_by_itself():
    model, x = make_model(), images(8)
    converted = split_batch_norms(copy.deepcopy(model))
    with fused_spy() as fused:
        y = converted(x)
    assert fused.call_count == 0
    torch.testing.assert_close(y, torch.cat([copy.deepcopy(model)(part) for part in x.chunk(2)]))


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


# What changes the layer, and what the same layer's plain weights and modules then are.
def halve(layer):
    parametrize.register_parametrization(layer.conv_dw, "weight", Halved())


def halved(layer):
    layer.conv_dw.weight.data /= 2


def prune_half(layer):
    prune.custom_from_mask(layer.conv_dw, "weight", torch.arange(8).view(8, 1, 1, 1) < 4)


def pruned(layer):
    layer.conv_dw.weight.data[4:] = 0


def normalize_weight(layer):
    parametrizations.weight_norm(layer.conv_pw)


def unchanged(layer):
    pass


@pytest.mark.parametrize(
    ("change", "same"), [(halve, halved), (prune_half, pruned), (normalize_weight, unchanged)], ids=lambda f: f.__name__
)
def test_weights_made_of_others_are_made_anew_and_train(change, same):
    layer, x = make_layer(), torch.randn(4, 8, 5, 6, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    change(layer)
    same(plain)
    torch.testing.assert_close(layer(x), plain(x))
    before = [p.clone() for p in layer.parameters()]
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    # biases before a batch norm do not matter to it, and stay
    moved = [not torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True) if p.dim() > 1]
    assert all(moved)


class Square(nn.Module):
    def forward(self, x):
        return x.square()


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 3


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("act_dw", nn.SiLU()),
        ("act_pw", Square()),
        ("pool", nn.AvgPool2d(3, stride=1, padding=1)),
        ("pool", nn.MaxPool2d(5, stride=1, padding=2)),
        ("bn_dw", nn.InstanceNorm2d(8, affine=True)),
        ("bn_dw", nn.BatchNorm2d(8, affine=False)),
        ("bn_pw", nn.BatchNorm2d(4, momentum=None)),
        ("bn_pw", nn.BatchNorm2d(4, track_running_stats=False)),
        ("conv_dw", OwnConv(8, 8, 1, groups=8)),
        ("conv_dw", nn.Conv2d(8, 8, 1, groups=8, bias=False)),
        ("conv_dw", nn.Conv2d(8, 8, 3, padding=1, groups=8)),
        ("conv_dw", nn.Conv2d(8, 8, 1)),
        ("conv_pw", nn.Conv2d(8, 4, 3, padding=1, groups=4)),
        ("conv_pw", nn.Conv2d(8, 4, 1)),
    ],
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_module_put_in_the_place_of_another_is_called(name, module, mode):
    layer, x = make_layer().train(mode == "train"), torch.randn(4, 8, 6, 7, dtype=torch.float64)
    setattr(layer, name, copy.deepcopy(module).double().train(mode == "train"))
    ours = step(layer, x)
    with plainly():
        assert_same(ours, step(layer, x))


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_inside_are_called_and_change_nothing(register):
    layer, x = make_layer(), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    expected = step(layer, x)
    called = []
    handles = [getattr(m, register)(lambda m, *_: called.append(m)) for m in layer.children()]
    assert_same(step(layer, x), expected)
    assert len(called) == 7
    for handle in handles:
        handle.remove()
    with cpu_spy() as fused:
        assert_same(step(layer, x), expected)
    assert fused.call_count == 1


def test_hooks_on_all_modules_are_called():
    layer, x = make_layer(), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(type(m)))
    try:
        layer(x)
    finally:
        handle.remove()
    assert called == [type(m) for m in (*layer.children(), layer)]


@pytest.mark.parametrize("backward", [False, True])
def test_operations_counted_are_those_of_the_modules(backward):
    model, x = make_model(), images(2)

    def count():
        with FlopCounterMode(display=False) as flops:
            y = model(x)
            if backward:
                y.sum().backward()
        return flops.get_flop_counts()

    ours = count()
    assert any("blocks.2.2" in module for module in ours)
    with plainly():
        assert ours == count()


class Operators(TorchDispatchMode):
    """What profilers and quantizers of this kind see."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_who_watches_operators_sees_those_of_the_modules(mode):
    layer, x = make_layer().train(mode == "train"), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    with Operators() as watched:
        y = layer(x)
    assert watched.seen.count(torch.ops.aten.convolution.default) == 2
    assert torch.ops.aten.max_pool2d_with_indices.default in watched.seen
    with plainly():
        torch.testing.assert_close(layer(x), y)


def test_frozen_batch_norms_stay_and_the_convolutions_train():
    model, x = make_model(), images()
    before = {k: v.clone() for k, v in model.named_buffers()}
    # what they must be like: the same batch norms, evaluating and without gradients of their own
    plain = copy.deepcopy(model)
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval().requires_grad_(False)
    model = freeze_batch_norm_2d(model).train()
    with fused_spy() as fused:
        ours = step(model, x)
    assert fused.call_count == 0
    with plainly():
        theirs = step(plain, x)
    theirs = {k: v for k, v in theirs.items() if "num_batches_tracked" not in k}
    ours = {k: v for k, v in ours.items() if "num_batches_tracked" not in k}
    moved = {k: v for k, v in ours.items() if k in theirs}
    assert_same(moved, theirs)
    assert all(torch.equal(ours[k], before[k]) for k in before if k in ours)


def test_batch_norms_only_evaluating_stay_on_the_fused_path():
    model, x = make_model().train(), images()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    before = {k: v.clone() for k, v in model.named_buffers()}
    with cpu_spy() as fused:
        ours = step(model, x)
    assert fused.call_count == 2
    assert all(torch.equal(ours[k], v) for k, v in before.items())
    with plainly():
        assert_same(ours, step(model, x))


@pytest.mark.parametrize("norm", ["bn_dw", "bn_pw"])
@pytest.mark.parametrize("parameters", ["frozen", "trained"])
def test_one_batch_norm_may_evaluate_and_the_other_train(norm, parameters):
    layer, x = make_layer(), torch.randn(4, 8, 5, 6, dtype=torch.float64)
    getattr(layer, norm).eval().requires_grad_(parameters == "trained")
    with cpu_spy() as fused:
        ours = step(layer, x)
    assert fused.call_count == 1
    with plainly():
        assert_same(ours, step(layer, x))


@pytest.mark.parametrize(
    "names", [["conv_dw"], ["conv_pw"], ["conv_dw", "bn_dw"], ["conv_dw", "bn_dw", "conv_pw", "bn_pw"]]
)
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(names):
    layer, x = make_layer(), torch.randn(4, 8, 5, 6, dtype=torch.float64)
    for name in names:
        getattr(layer, name).requires_grad_(False)
    ours = step(layer, x)
    with plainly():
        assert_same(ours, step(layer, x))


def test_functional_calls_use_the_tensors_given():
    model, x = make_model().eval(), images()
    other = {k: v.detach() * 1.1 for k, v in model.named_parameters()}
    buffers = {k: v * 1.1 if v.is_floating_point() else v for k, v in model.named_buffers()}
    twin = copy.deepcopy(model)
    twin.load_state_dict({**other, **buffers})
    with plainly():
        expected = twin(x)
    torch.testing.assert_close(torch.func.functional_call(model, (other, buffers), (x,)), expected)


def test_gradients_of_single_samples():
    model, x = make_model().eval(), images(3)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample.unsqueeze(0),)).square().sum()

    ours = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        with plainly():
            model.zero_grad()
            model(x[i : i + 1]).square().sum().backward()
        expected = {f"gradient of {k}": p.grad for k, p in model.named_parameters()}
        assert_same({f"gradient of {k}": v[i] for k, v in ours.items()}, expected)


# torch.func refuses to count batches in a batch norm of PyTorch, and so in ours
@pytest.mark.parametrize(("api", "mode"), [("func", "eval"), ("autograd", "eval"), ("autograd", "train")])
def test_forward_mode_derivatives_agree_with_backward_ones(api, mode):
    layer = make_layer().train(mode == "train")
    x, tangent, cotangent = torch.randn(3, 4, 8, 5, 6, dtype=torch.float64)
    if api == "func":
        _, derivative = torch.func.jvp(layer, (x,), (tangent,))
    else:
        with torch.autograd.forward_ad.dual_level():
            y = layer(torch.autograd.forward_ad.make_dual(x, tangent))
            derivative = torch.autograd.forward_ad.unpack_dual(y).tangent
    x.requires_grad_()
    with cpu_spy() as fused:
        (gradient,) = torch.autograd.grad(layer(x), x, cotangent)
    assert fused.call_count == 1
    torch.testing.assert_close((derivative * cotangent).sum(), (gradient * tangent).sum())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_penalty_on_gradients_trains(mode):
    layer, x = make_layer().train(mode == "train"), torch.randn(4, 8, 5, 6, dtype=torch.float64)

    def penalize():
        twin, value = copy.deepcopy(layer), x.clone().requires_grad_()
        loss = twin(value).square().sum()
        (gradient,) = torch.autograd.grad(loss, value, create_graph=True)
        (loss + gradient.square().sum()).backward()
        return {"gradient": value.grad, **results(twin)}

    with cpu_spy() as fused:
        ours = penalize()
    assert fused.call_count == 1
    with plainly():
        assert_same(ours, penalize())


def test_many_gradients_at_once():
    layer, x = make_layer().eval(), torch.randn(1, 8, 2, 3, dtype=torch.float64)
    with plainly():
        expected = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(layer, x, vectorize=True), expected)
    x.requires_grad_()
    y = layer(x)
    rows = torch.eye(y.numel(), dtype=x.dtype).view(-1, *y.shape)
    ours = torch.func.vmap(lambda row: torch.autograd.grad(y, x, row)[0])(rows)
    torch.testing.assert_close(ours, expected.view(ours.shape))
