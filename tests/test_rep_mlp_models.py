import ast
import copy
import gc
import hashlib

import pytest
import reference as ref
import timm
import torch
from safetensors.torch import save_file
from timm.layers import to_2tuple
from timm.models import group_parameters
from timm.utils.model import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_ulsam.models import repmlpnet, resnet_repmlp
from timm_ulsam.models._build import renamed
from timm_ulsam.models._repmlpnet_blocks import RepMLPNetUnit

NAMES = {
    "RepMLPNet-T224": "repmlpnet_t224",
    "RepMLPNet-T256": "repmlpnet_t256",
    "RepMLPNet-B224": "repmlpnet_b224",
    "RepMLPNet-B256": "repmlpnet_b256",
    "RepMLPNet-D256": "repmlpnet_d256",
    "RepMLPNet-L256": "repmlpnet_l256",
    "RepMLPRes50-Light-224 (v1)": "resnet50_repmlp_light",
    "RepMLPRes50-Bottleneck-224 (v1)": "resnet50_repmlp",
}
MODELS = {"repmlpnet_t224": "model_repmlpnet_t224", "resnet50_repmlp_light": "model_v1_repmlpres50_light_224"}
# the same networks, small
SMALL = {
    "repmlpnet_t224": dict(
        channels=(8, 16), depths=(1, 2), num_sharesets=(1, 4), img_size=32, partition_sizes=(8, 4), num_classes=10
    ),
    "resnet50_repmlp_light": dict(
        layers=(1, 2, 3, 1), channels=(16, 32, 64, 128), img_size=32, partition_size=2, num_classes=10
    ),
    "resnet50_repmlp": dict(
        layers=(1, 2, 2, 1), channels=(16, 32, 64, 128), img_size=32, partition_size=2, groups=4, num_classes=10
    ),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    gc.collect()


def small(name: str, **kwargs) -> nn.Module:
    """A small network with norms that are not trivial."""
    model = timm.create_model(name, **{**SMALL[name], **kwargs}).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        nn.init.normal_(norm.running_mean, std=0.1)
    return model


def image(batch: int = 2, size: int = 32, **kwargs) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, **kwargs)


def cost(model: nn.Module, size: int) -> dict[str, int]:
    with FlopCounterMode(display=False) as flops:
        model(torch.empty(1, 3, size, size, device="meta"))
    parameters, buffers = (sum(t.numel() for t in ts) for ts in (model.parameters(), model.buffers()))
    return dict(
        params=parameters,
        buffers=buffers,
        state_dict_elements=parameters + buffers,
        macs=flops.get_total_flops() // 2,
    )


@pytest.mark.parametrize("published", NAMES)
def test_cost_in_both_forms_is_the_published_one(published):
    variants = {v["model"]: v for v in ref.model("rep_mlp", "variants")["variants"]}
    assert variants.keys() == NAMES.keys()
    variant = variants[published]
    model = timm.create_model(NAMES[published], device="meta").eval()
    assert model.default_cfg["input_size"] == (3, variant["input_size"], variant["input_size"])
    assert cost(model, variant["input_size"]) == variant["train"]
    assert cost(reparameterize_model(model), variant["input_size"]) == variant["deploy"]


def ours(name: str, keys: list[str]) -> list[str]:
    """Our names of published keys, by the rules of the filter."""
    module = repmlpnet if "repmlpnet" in name else resnet_repmlp
    return list(renamed(dict.fromkeys(keys), module.RULES))


@pytest.mark.parametrize("name", MODELS)
def test_published_checkpoints_of_both_forms_give_the_published_logits(name, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.init, "orthogonal_", lambda tensor: tensor)  # seconds, for what is overwritten
    numbers = ref.model("rep_mlp", MODELS[name])
    shapes = numbers["state_dict_train"]
    state = ref.drawn(shapes, numbers["gain"], lambda key: key.endswith("num_batches_tracked"))
    state |= {k: torch.tensor(0) for k in shapes if k not in state}
    x = ref.tiled_image(numbers["input"]["shape"], numbers["input"]["seed"])
    file = tmp_path / "published.safetensors"
    save_file({f"module.{k}": v for k, v in state.items()}, file)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file))).eval()
    with torch.no_grad():
        logits = model(x)
    largest = numbers["logits_stats"]["abs_max"]

    def assert_published(found, expected):
        assert (found[0, :64] - torch.tensor(expected)).abs().max() <= 1e-5 * largest

    assert_published(logits, numbers["logits_first64"])
    assert abs(logits.sum() - numbers["logits_stats"]["sum"]) <= 1e-5 * numbers["logits_stats"]["abs_sum"]
    assert logits.argmax() == numbers["logits_stats"]["argmax"]

    reparameterize_model(model, inplace=True)
    keys = list(numbers["state_dict_deploy"])
    folded = model.state_dict()
    assert {k: list(v.shape) for k, v in folded.items()} == dict(
        zip(ours(name, keys), numbers["state_dict_deploy"].values(), strict=True)
    )
    save_file({k: folded[own] for k, own in zip(keys, ours(name, keys), strict=True)}, file)
    del model, folded
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file))).eval()
    with torch.no_grad():
        logits = model(x)
        assert_published(logits, numbers["logits_deploy_first64"])
        x = x.double()
        assert_published(model.double()(x), numbers["logits_f64_first64"])


def test_the_signature_of_published_bottlenecks_names_our_parameters():
    state = timm.create_model("resnet50_repmlp", device="meta").state_dict()
    with_rep = {k.split(".rep_mlp.")[0] for k in state if ".rep_mlp." in k}
    shapes = {}
    for key, value in state.items():
        block = ".".join(key.split(".")[:2])
        own = {"conv3": "conv4", "conv4": "conv5", "rep_mlp": "repmlp"}
        if block in with_rep:
            part, rest = key.removeprefix(f"{block}.").split(".", 1)
            key = f"{block}.btnk_{own.get(part, part)}.{rest}"
        key = key.replace("layer", "stage").replace("downsample", "shortcut").replace("fc.", "linear.")
        shapes[key.replace("conv1.", "stage0.0.") if key.startswith("conv1.") else key] = list(value.shape)
    assert ours("resnet50_repmlp", list(shapes)) == list(state)
    # theirs has the shortcut of a block first
    order = list(dict.fromkeys(".".join(k.split(".")[:2]) for k in shapes))
    keys = sorted(shapes, key=lambda k: (order.index(".".join(k.split(".")[:2])), ".shortcut." not in k))
    variant = next(v for v in ref.model("rep_mlp", "variants")["variants"] if "Bottleneck" in v["model"])
    lines = "\n".join(f"{k} {shapes[k]}" for k in keys)
    assert hashlib.sha256(lines.encode()).hexdigest() == variant["signature_train"]


def test_a_whole_small_network_is_the_published_one():
    tensors = ref.tensors("rep_mlp", "layer_net_tiny_32x32")
    model = timm.create_model("repmlpnet_t224", **SMALL["repmlpnet_t224"]).eval()
    state = repmlpnet.checkpoint_filter_fn(ref.part(tensors, "param."), model)
    model.load_state_dict(state)
    x = tensors["input"].requires_grad_()
    y = model(x)
    (y * tensors["grad_seed"]).sum().backward()
    ref.assert_close(y, tensors["output"], 5e-6)
    ref.assert_close(x.grad, tensors["grad_input"], 5e-6)
    published = ref.part(tensors, "grad_param.")
    gradients = dict(zip(ours("repmlpnet", list(published)), published.values(), strict=True))
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        # twice the usual: one published gradient of a batch norm's scale is itself 5.9e-6 off the float64 one
        ref.assert_close(parameter.grad, gradients[name], 1e-5, name)
    twin = copy.deepcopy(model).train()
    x = tensors["input"].detach().requires_grad_()
    y = twin(x)
    (y * tensors["grad_seed"]).sum().backward()
    ref.assert_close(y, tensors["output_train"], 5e-6)
    ref.assert_close(x.grad, tensors["grad_input_train"], 2e-5)
    exact = copy.deepcopy(model).double()
    ref.assert_close(exact(tensors["input"].double()), tensors["output_f64"], 1e-10)
    fresh = timm.create_model("repmlpnet_t224", **SMALL["repmlpnet_t224"]).eval()
    fresh.load_state_dict(repmlpnet.checkpoint_filter_fn(ref.part(tensors, "fused."), fresh))
    ref.assert_close(fresh(tensors["input"]), tensors["output_fused"], 5e-6)


@pytest.mark.parametrize("file", ["layer_unit_c16_h4w4_s4", "layer_unit_c16_h6w6_s4_onepart"])
def test_a_unit_is_the_published_one(file):
    tensors, args = ref.tensors("rep_mlp", file), ref.config("rep_mlp", file)["kwargs"]
    unit = RepMLPNetUnit(args["channels"], args["h"], args["w"], num_sharesets=args["num_sharesets"]).eval()
    unit.load_state_dict(renamed(ref.part(tensors, "param."), repmlpnet.RULES))
    x = tensors["input"].requires_grad_()
    y = unit(x)
    (y * tensors["grad_seed"]).sum().backward()
    ref.assert_close(y, tensors["output"], 5e-6)
    ref.assert_close(x.grad, tensors["grad_input"], 5e-6)
    gradients = renamed(ref.part(tensors, "grad_param."), repmlpnet.RULES)
    for name, parameter in unit.named_parameters():
        ref.assert_close(parameter.grad, gradients[name], 5e-6, name)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_folding_changes_no_logit_once_or_twice(name, dtype, tolerance):
    model, x = small(name, dtype=dtype), image(dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    expected = model(x)
    once = reparameterize_model(model)
    twice = reparameterize_model(once)
    ref.assert_close(once(x), expected, tolerance)
    assert torch.equal(twice(x), once(x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any("repconv" in k or "fc3_bn" in k for k in once.state_dict())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_our_own_checkpoints_load_in_every_wrapper(name, folded, wrapper, tmp_path):
    model, x = small(name), image()
    if folded:
        reparameterize_model(model, inplace=True)
    state = model.state_dict()
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "own.pth")
    overlay = dict(file=str(tmp_path / "own.pth"), num_classes=10)
    again = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL[name]).eval()
    assert torch.equal(again(x), model(x))
    again.load_state_dict(state)
    features = {**SMALL[name], "features_only": True, "out_indices": (0, 1)}
    features = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **features).eval()
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(f, e) for f, e in zip(features(x), expected, strict=True))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("folded", [False, True])
def test_a_checkpoint_with_other_inputs_and_classes(name, folded, tmp_path):
    model = small(name)
    if folded:
        reparameterize_model(model, inplace=True)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    overlay = dict(file=str(tmp_path / "own.safetensors"), num_classes=10)
    kwargs = {**SMALL[name], "num_classes": 3, "in_chans": 1}
    other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    x = torch.randn(2, 1, 32, 32)
    # timm sums the weights of the colours
    ref.assert_close(other.forward_features(x), model.forward_features(x.expand(-1, 3, -1, -1)), 1e-5)
    assert other(x).shape == (2, 3)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("num_classes", [10, 7])
@pytest.mark.parametrize("features_only", [False, True])
def test_a_checkpoint_of_something_else_is_refused(name, num_classes, features_only, tmp_path):
    state = small(name).state_dict()
    wrong = next(k for k in state if k.endswith("fc3.weight"))
    state[wrong] = torch.zeros(2, 2)
    gone = next(k for k in state if k.endswith("repconv3.conv.weight"))
    del state[gone]
    state["something.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "wrong.pth")
    kwargs = {**SMALL[name], "num_classes": num_classes, "features_only": features_only}
    if features_only:
        kwargs["out_indices"] = (0, 1)
    overlay = dict(file=str(tmp_path / "wrong.pth"), num_classes=10)
    with pytest.raises(RuntimeError) as error:
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    for part in (f"missing: {gone}", "unexpected: something.weight", f"{wrong} is (2, 2), accepted is ("):
        assert part in str(error.value)


@pytest.mark.parametrize("name", SMALL)
def test_it_learns_with_everything_switched_on(name):
    model = small(name, drop_rate=0.1, drop_path_rate=0.1).train()
    model.set_grad_checkpointing()
    x, target = image(8), torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(nn.functional.cross_entropy(model(x).float(), target))
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert sum(losses[-3:]) < sum(losses[:3])
    model.eval()
    expected = model(x)
    ref.assert_close(reparameterize_model(model)(x), expected, 1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_of_activations_changes_no_gradient(name):
    model, x = small(name), image()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    for m in (model, twin):
        m.train()(x).square().sum().backward()
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=key)


@pytest.mark.parametrize("name", SMALL)
def test_it_is_scripted_traced_compiled_and_exported(name):
    model, x = small(name), image()
    folded = reparameterize_model(model)
    for version in (
        torch.jit.script(model),
        torch.fx.symbolic_trace(model),
        torch.compile(folded, fullgraph=True, backend="eager"),
        torch.export.export(folded, (x,)).module(),
    ):
        ref.assert_close(version(x), model(x), 1e-5)


def test_larger_images_are_cut_into_more_partitions():
    model = small("repmlpnet_t224", img_size=(64, 32))
    assert model(torch.randn(1, 3, 64, 32)).shape == (1, 10)
    assert model.load_state_dict(small("repmlpnet_t224").state_dict()).missing_keys == []
    with pytest.raises(ValueError, match=r"height 48 and width 32 .*multiples of h=32 and of w=32"):
        model(torch.randn(1, 3, 48, 32))
    with pytest.raises(ValueError, match=r"shape \[1, 1, 32, 32\]: accepted is \(N, 3, H, W\)"):
        model(torch.randn(1, 1, 32, 32))


def test_partitions_follow_the_image_where_none_are_given():
    model = repmlpnet.RepMLPNet((8, 16), (1, 2), (1, 4), img_size=(64, 96), num_classes=10).eval()
    assert model.partition_sizes == ((16, 24), (8, 12))
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 10)
    with pytest.raises(ValueError, match=r"img_size=\(100, 100\) .*multiples of 32 .*of 32 for the width$"):
        repmlpnet.RepMLPNet(img_size=100)


@pytest.mark.parametrize("img_size", [32, (96, 64)])
def test_partitions_that_fit_are_named_and_accepted(img_size):
    with pytest.raises(ValueError, match=r"multiples of 224 .*, or partition_sizes=") as error:
        timm.create_model("repmlpnet_t224", img_size=img_size)
    # as it would be typed behind --model-kwargs
    sizes = ast.literal_eval(str(error.value).partition("partition_sizes=")[2])
    model = timm.create_model("repmlpnet_t224", img_size=img_size, partition_sizes=sizes, num_classes=10).eval()
    assert model(torch.randn(1, 3, *to_2tuple(img_size))).shape == (1, 10)
    with pytest.raises(ValueError, match=r"multiples of 224 .*, or of 32 and of 32 with other partition_sizes$"):
        timm.create_model("repmlpnet_t224", img_size=100)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("repmlpnet_t224", dict(img_size=256), r"img_size=\(256, 256\) .*multiples of 224 for the height and of 224"),
        ("repmlpnet_t224", dict(img_size=-1), r"img_size=-1: accepted is a positive integer, or a pair"),
        (
            "repmlpnet_t224",
            dict(partition_sizes=(7, 7)),
            r"partition_sizes=\(7, 7\): accepted is one for each of the 4",
        ),
        ("repmlpnet_t224", dict(partition_sizes=(0, 7, 7, 7)), r"partition_sizes=0"),
        ("repmlpnet_t224", dict(depths=(2, 2)), r"depths=\(2, 2\): accepted is one for each of the 4 stages"),
        ("repmlpnet_t224", dict(num_sharesets=(3, 4, 16, 128)), r"num_sharesets=3 does not divide channels=64"),
        (
            "resnet50_repmlp_light",
            dict(img_size=256),
            r"img_size=256 .*partition_size=7: accepted are multiples of 112",
        ),
        ("resnet50_repmlp_light", dict(partition_size=0), r"partition_size=0"),
        ("resnet50_repmlp", dict(bottleneck_ratios=(3, 4)), r"bottleneck_ratios=\(3, 4\): 3 does not divide 128"),
        ("resnet50_repmlp", dict(bottleneck_ratios=(2,)), r"bottleneck_ratios=\(2,\)"),
    ],
)
def test_bad_arguments_are_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, device="meta", **kwargs)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_convolutions_are_dilated_as_timms_are(output_stride):
    ours, plain = (
        timm.create_model(name, output_stride=output_stride, device="meta") for name in ("resnet50_repmlp", "resnet50")
    )
    expected = plain.layer3[1].conv2.dilation
    assert expected == ((2, 2) if output_stride == 8 else (1, 1))
    block = ours.layer3[1]
    assert (block.conv2.conv.dilation, block.conv3.conv.dilation) == (expected, expected)
    assert ours(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)


def test_the_first_papers_networks_take_one_size():
    model = small("resnet50_repmlp")
    with pytest.raises(ValueError, match=r"accepted is \(N, 16, 4, 4\), the one size"):
        model(image(size=64))
    assert small("resnet50_repmlp", img_size=64)(image(size=64)).shape == (2, 10)


@pytest.mark.parametrize("name", SMALL)
def test_layers_are_grouped_by_depth(name):
    model = small(name)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == dict(model.named_parameters()).keys()
    first, *_, last = groups
    assert groups[first] == 0 < groups[last] == max(groups.values())


def test_stages_are_taken_pruned_and_normed():
    model, x = small("repmlpnet_t224"), image()
    final, (first, second) = model.forward_intermediates(x)
    assert torch.equal(final, model.norm(second))
    assert torch.equal(final, model.forward_intermediates(x, indices=[1], norm=True, intermediates_only=True)[0])
    assert torch.equal(first, model.forward_intermediates(x, indices=[0], stop_early=True)[0])
    assert model.prune_intermediate_layers([0]) == [0]
    assert torch.equal(model(x), first)
    with pytest.raises(ValueError, match="output_fmt=NLC; accepted: NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")
