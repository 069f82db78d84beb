import pytest
import reference
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_ulsam.layers import PSConv2d

# parameters with the stored zeros (those of PS-ResNet-50 are the published ones) and multiply-adds; then the same of
# the reparameterized model
MODELS = {
    "resnet50_psconv": (31_215_656, 5_014_028_288, 25_557_032, 4_089_184_256),
    "resnet101_psconv": (55_221_288, 9_708_896_256, 44_549_160, 7_801_405_440),
    "resnext50_32x4d_psconv": (25_736_232, 4_346_085_376, 25_736_232, 4_346_085_376),
    "resnext101_32x4d_psconv": (45_511_720, 8_208_433_152, 45_511_720, 8_208_433_152),
}


def cost(model: nn.Module) -> tuple[int, int]:
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    return sum(p.numel() for p in model.parameters()), flops.get_total_flops() // 2


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_multiply_adds_are_the_published_ones(name):
    model = timm.create_model(name, device="meta").eval()
    assert cost(model) == MODELS[name][:2]
    assert cost(reparameterize_model(model)) == MODELS[name][2:]


def test_reparameterized_costs_what_the_plain_network_does():
    assert cost(timm.create_model("resnet50", device="meta").eval()) == MODELS["resnet50_psconv"][2:]


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """The state dict of the model file."""
    state = {}
    for key, entry in reference.model("ps_conv", "model_ps_resnet50")["state_dict"].items():
        r, kind = reference.normal(key, entry["shape"]), entry["kind"]
        state[key] = {
            "weight": lambda r=r, entry=entry: r * entry["scale"],
            "norm_weight": lambda r=r: 1 + 0.1 * r,
            "running_var": lambda r=r: 1 + 0.1 * r.abs(),
            "counter": lambda: torch.tensor(0),
        }.get(kind, lambda r=r: 0.1 * r)()
        if entry.get("zero_cyclic_mask"):
            blocks = state[key].unflatten(1, (4, -1)).unflatten(0, (4, -1))
            for r in range(4):
                blocks[r, :, r] = blocks[r, :, (r + 2) % 4] = 0
    return state


def save(state, path):
    torch.save(state, path / "model.pth")
    return path / "model.pth"


def load(path, **kwargs) -> nn.Module:
    return timm.create_model("resnet50_psconv", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs)


@torch.no_grad()
def test_the_published_checkpoint_gives_the_published_logits_and_the_folded_one_too(published, tmp_path):
    described = reference.model("ps_conv", "model_ps_resnet50")
    x = reference.tiled_image(described["input"]["shape"], described["input"]["seed"])
    expected = torch.tensor(described["logits_first64"])
    model = load(save({"state_dict": {f"module.{k}": v for k, v in published.items()}}, tmp_path)).eval()
    logits = model(x)
    reference.assert_close(logits[:, :64], expected, 1e-4)
    folded = reparameterize_model(model)
    again = load(save(folded.state_dict(), tmp_path)).eval()
    assert cost(timm.create_model("resnet50_psconv", device="meta")) != MODELS["resnet50_psconv"][2:]
    assert sum(p.numel() for p in again.parameters()) == MODELS["resnet50_psconv"][2]
    assert (again(x) - logits).abs().max() <= 1e-5 * logits.abs().max()


@torch.no_grad()
def test_a_checkpoint_is_adapted_to_other_inputs_heads_and_features(published, tmp_path):
    path = save({"model": published}, tmp_path)
    model = load(path, in_chans=1, num_classes=7).eval()
    torch.testing.assert_close(model.conv1.weight, published["conv1.weight"].sum(1, keepdim=True))
    x = torch.randn(1, 1, 64, 64)
    assert model(x).shape == (1, 7)
    features = load(path, in_chans=1, features_only=True).eval()(x)
    torch.testing.assert_close(features[-1], model.forward_features(x))


@torch.no_grad()
def test_a_backbone_without_a_classifier_loads_as_features_and_with_a_new_head(published, tmp_path):
    # what the authors' detection code saves
    path = save({k: v for k, v in published.items() if not k.startswith("fc.")}, tmp_path)
    model = load(path, num_classes=7).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(load(path, features_only=True).eval()(x)[-1], model.forward_features(x))
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        load(path)


@pytest.mark.parametrize("kwargs", [{}, dict(num_classes=7, in_chans=1), dict(features_only=True)])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("layer1.0.conv2.conv.weight", None), r"missing: layer1\.0\.conv2\.conv\.weight"),
        (("conv1.weight", None), r"missing: conv1\.weight"),
        (("layer1.0.conv2.weight", (1,)), r"unexpected: layer1\.0\.conv2\.weight"),
        (
            ("layer1.0.conv2.conv.weight", (64, 4, 3, 3)),
            r"conv2\.conv\.weight is \(64, 4, 3, 3\), accepted is \(64, 64",
        ),
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


def masked(layer: PSConv2d) -> torch.Tensor:
    row, column = (
        torch.arange(n) // (n // parts) % 4
        for n, parts in zip(layer.conv.weight.shape, (4 * layer.groups, 4), strict=False)
    )
    return (row[:, None] - column) % 2 == 0


@pytest.mark.parametrize("name", ["resnet50_psconv", "resnext50_32x4d_psconv"])
def test_timms_initialization_leaves_masked_weights_zero_and_they_stay_so(name):
    model = timm.create_model(name, num_classes=3, zero_init_last=False)
    layers = [m for m in model.modules() if isinstance(m, PSConv2d)]
    assert len(layers) == 16
    masks = [masked(layer) for layer in layers]
    assert not any(layer.conv.weight[mask].any() for layer, mask in zip(layers, masks, strict=True))
    assert all(layer.dilation == (2, 2) and layer.parts == 4 for layer in layers)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not any(layer.conv.weight.grad[mask].any() for layer, mask in zip(layers, masks, strict=True))
    model.init_weights()
    assert all(layer.conv.weight[~mask].std() > 0 for layer, mask in zip(layers, masks, strict=True))
    assert not any(layer.conv.weight[mask].any() for layer, mask in zip(layers, masks, strict=True))


def test_a_dilated_backbone_is_refused():
    with pytest.raises(ValueError, match=r"output_stride below 32 dilates .* accepted: output_stride=32"):
        timm.create_model("resnet50_psconv", output_stride=8, device="meta")


def test_the_number_of_blocks_can_be_given():
    model = timm.create_model("resnet50_psconv", layers=(1, 2, 1, 1), device="meta")
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [1, 2, 1, 1]
