import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch.utils.flop_counter import FlopCounterMode

from timm_ulsam import ULSAM

# Parameters with 1000 classes, multiply-adds at 224x224. The first four are those of the paper's networks (arXiv
# 2006.15102), counted with the authors' module; the rest are measured here.
COSTS = {
    "mobilenetv2_ulsam": (3_067_904, 262_659_328),
    "mobilenetv2_ulsam_s": (2_630_936, 224_544_384),
    "mobilenetv2_ulsam_l": (3_505_684, 300_789_952),
    "mobilenetv1_ulsam": (3_965_748, 516_657_664),
    "mobilenetv1_ulsam_075": (2_435_044, 295_972_224),
    "mobilenetv1_ulsam_050": (1_264_020, 136_300_800),
    "mobilenetv2_ulsam_050": (1_854_656, 87_256_576),
}
BASELINES = {
    "mobilenetv2_ulsam": "mobilenetv2_100",
    "mobilenetv2_ulsam_s": "mobilenetv2_100",
    "mobilenetv2_ulsam_l": "mobilenetv2_100",
    "mobilenetv1_ulsam": "mobilenetv1_100",
    "mobilenetv2_ulsam_050": "mobilenetv2_050",
}


def cost(name: str, **kwargs) -> tuple[int, int]:
    model = timm.create_model(name, num_classes=1000, **kwargs).eval()
    with FlopCounterMode(display=False) as flops:
        model(torch.randn(1, 3, 224, 224))
    return sum(p.numel() for p in model.parameters()), flops.get_total_flops() // 2


SMALL_RESNET = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("mobilenetv2_ulsam.ra_in1k_init", {}),
        ("repmlpnet_t224", dict(channels=(8, 16), depths=(1, 1), num_sharesets=(1, 4), partition_sizes=(8, 4))),
        ("resnet18_dbb", SMALL_RESNET),
        ("resnet50_psconv", SMALL_RESNET),
        ("resnet50_repmlp_light", dict(SMALL_RESNET, layers=(1, 2, 2, 1), img_size=32, partition_size=2)),
        ("resnet50_sa", dict(layers=(1, 1, 1, 1))),
        ("shufflenetv2_050_weightnet", dict(depths=(1, 1, 1))),
        ("smt_tiny", dict(depths=(1, 1, 1, 1))),
    ],
)
def test_a_checkpoint_without_its_first_convolution_is_refused_for_another_head_too(name, kwargs):
    arch = name.partition(".")[0]
    kwargs = {**kwargs, **(dict(img_size=32) if arch == "repmlpnet_t224" else {})}
    source = "mobilenetv2_100" if arch.startswith("mobilenetv2") else arch
    whole = timm.create_model(source, **kwargs)
    first = timm.create_model(arch, **kwargs).pretrained_cfg["first_conv"]
    gone = [k for k in whole.state_dict() if k.startswith(f"{first}.")]
    assert gone
    state = {k: v for k, v in whole.state_dict().items() if k not in gone}
    with pytest.raises(RuntimeError, match=rf"missing: {first}\."):
        timm.create_model(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=dict(state_dict=state), **kwargs)


@pytest.mark.parametrize("name", ["resnet50_sa", "resnet18_doconv", "resnet18_dbb", "mobilenetv1_dbb"])
def test_an_exported_network_can_be_cast(name):
    kwargs = dict(layers=(1, 1, 1, 1)) if name.startswith("resnet") else {}
    model, x = timm.create_model(name, num_classes=3, **kwargs).eval(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    y = torch.export.export(model, (x,)).module().to(torch.bfloat16)(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.05 * expected.abs().max().item(), rtol=0)


def test_the_gates_of_shuffle_attention_are_not_decayed():
    model = timm.create_model("resnet50_sa", layers=(1, 1, 1, 1))
    free = create_optimizer_v2(model, opt="adamw", weight_decay=0.05).param_groups[0]
    assert free["weight_decay"] == 0
    gates = {id(p) for name, p in model.named_parameters() if ".se." in name}
    assert len(gates) == 24
    assert gates <= {id(p) for p in free["params"]}


@pytest.mark.parametrize(("name", "replaced"), [("resnet50_sa", "none"), ("resnet50_psconv", ".conv2.weight")])
def test_plain_weights_load_where_what_fits_is_asked_for(name, replaced, tmp_path):
    small = dict(layers=(1, 1, 1, 1))
    plain = timm.create_model("resnet50", **small).state_dict()
    save_file(plain, tmp_path / "plain.safetensors")
    kwargs = dict(small, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "plain.safetensors")))
    with pytest.raises(RuntimeError, match="this checkpoint is not one of"):
        timm.create_model(name, **kwargs)
    state = timm.create_model(name, pretrained_strict=False, **kwargs).state_dict()
    assert all(torch.equal(state[key], plain[key]) for key in plain if not key.endswith(replaced))


@pytest.mark.parametrize("name", COSTS)
def test_cost_is_the_published_one(name):
    assert cost(name) == COSTS[name]


@pytest.mark.parametrize(
    ("blocks", "parameters", "million_macs"),
    [
        ((13,), 3_387_092, 278.12),
        ((16,), 3_185_684, 285.31),
        ((10, 13), 3_333_152, 267.83),
        ((15, 16), 2_866_496, 269.85),
    ],
)
def test_cost_of_the_papers_other_placements(blocks, parameters, million_macs):
    counted, macs = cost("mobilenetv2_ulsam", replace_blocks=blocks)
    assert counted == parameters
    assert round(macs / 1e6, 2) == million_macs


def test_another_number_of_subspaces_costs_three_parameters_each():
    assert cost("mobilenetv2_ulsam", num_splits=1)[0] == 3_067_886


@pytest.mark.parametrize("name", BASELINES)
def test_untouched_blocks_keep_timms_names_and_shapes(name):
    ours = timm.create_model(name, num_classes=1000, device="meta")
    theirs = timm.create_model(BASELINES[name], num_classes=1000, device="meta").state_dict()
    places = tuple(f"{n}." for n, m in ours.named_modules() if isinstance(m, ULSAM))
    assert places
    replaced = {k for k in theirs if k.startswith(places)}
    kept = {k: v.shape for k, v in ours.state_dict().items() if not k.startswith(places)}
    assert kept == {k: v.shape for k, v in theirs.items() if k not in replaced}


def test_inserting_in_the_middle_of_a_stage_leaves_the_names_behind_it():
    model = timm.create_model("mobilenetv2_ulsam", replace_blocks=(), insert_after=[11], num_classes=1000)
    theirs = timm.create_model("mobilenetv2_100", device="meta").state_dict()
    assert {k for k in model.state_dict() if "_ulsam" not in k} == set(theirs)
    assert list(dict(model.blocks[4].named_children())) == ["0", "0_ulsam", "1", "2"]


def test_without_ulsam_it_is_timms_mobilenet():
    ours = timm.create_model("mobilenetv1_ulsam", replace_blocks=(), num_classes=7).eval()
    theirs = timm.create_model("mobilenetv1_100", num_classes=7).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(replace_blocks=14), r"replace_blocks=14: .*accepted: \[3, 5, 6, 8, 9, 10, 12, 13, 15, 16\]"),
        (dict(replace_blocks=(13, 11)), r"11 is not a block that keeps the shape"),
        (dict(replace_blocks=[0]), r"0 is not a block"),
        (dict(replace_blocks=[13, 13]), r"more than once"),
        (dict(replace_blocks="13"), r"'13' is not a block"),
        (dict(replace_blocks=[True]), r"True is not a block"),
        (dict(insert_after=18), r"insert_after=18: .*accepted: \[1, 2, .*17\]"),
        (dict(num_splits=7), r"num_splits=7 does not divide channels=96; accepted: \[1, 2, 3, 4"),
        (dict(num_splits=0), r"num_splits=0 .*accepted"),
    ],
)
@pytest.mark.parametrize("features_only", [False, True])
def test_bad_placement_is_refused_and_the_accepted_named(kwargs, message, features_only):
    with pytest.raises(ValueError, match=message):
        timm.create_model("mobilenetv2_ulsam", features_only=features_only, **kwargs)


@pytest.mark.parametrize("name", COSTS)
def test_every_subspace_module_trains(name):
    model = timm.create_model(name, num_classes=5).train()
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_features_with_a_replaced_block_at_a_stages_end():
    x = torch.randn(1, 3, 64, 64)
    for location, widths in (("bottleneck", [16, 24, 32, 96, 320]), ("expansion", [32, 144, 192, 96, 960])):
        model = timm.create_model("mobilenetv2_ulsam", features_only=True, feature_location=location)
        assert [f.shape[1] for f in model(x)] == widths == model.feature_info.channels()


def test_stochastic_depth_skips_the_attention_of_whole_samples():
    model = timm.create_model("mobilenetv2_ulsam", drop_path_rate=0.5)
    block = model.blocks[4][2]
    assert isinstance(block, ULSAM)
    rate = block.drop_path.drop_prob
    assert 0 < rate < 0.5
    torch.manual_seed(0)
    x = torch.randn(64, 96, 4, 4)
    skipped = (block(x) == x).flatten(1).all(1)
    assert 0 < skipped.sum() < 64
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_a_hook_on_stochastic_depth_sees_the_attention_maps(rate, training):
    model = timm.create_model("mobilenetv2_ulsam", drop_path_rate=rate).train(training)
    block, seen = model.blocks[4][2], []
    assert isinstance(block, ULSAM)
    handle = block.drop_path.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    block(torch.randn(2, 96, 6, 6))
    assert seen == [(2, 4, 6, 6)]
    handle.remove()
    block(torch.randn(2, 96, 6, 6))
    assert len(seen) == 1


def test_a_ulsam_is_in_the_layer_group_of_its_place():
    model = timm.create_model("mobilenetv2_ulsam_l")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["blocks.5.2_ulsam.conv_dw.weight"] == groups["blocks.5.2.conv_pw.weight"]


def test_an_unknown_feature_location_is_refused():
    with pytest.raises(ValueError, match="feature_location='depthwise'; accepted: 'bottleneck', 'expansion'"):
        timm.create_model("mobilenetv2_ulsam", features_only=True, feature_location="depthwise")


_PLACE = {12: "4.1", 13: "4.2", 16: "5.2"}  # timm's stage and block in it


def test_blocks_may_be_any_collection_of_integers():
    for blocks in ({13, 16}, np.array([13, 16]), range(12, 14)):
        model = timm.create_model("mobilenetv2_ulsam", replace_blocks=blocks, device="meta")
        places = {name for name, module in model.named_modules() if isinstance(module, ULSAM)}
        assert places == {f"blocks.{_PLACE[block]}" for block in blocks}


def test_the_normalization_may_be_named_as_for_timms_models():
    model = timm.create_model("mobilenetv2_ulsam", norm_layer="layernorm2d", num_classes=3).eval()
    assert isinstance(model.blocks[4][2].bn_dw, LayerNorm2d)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(ValueError, match="norm_layer='evonorms0': accepted is a norm of timm without an activation"):
        timm.create_model("mobilenetv2_ulsam", norm_layer="evonorms0")


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_inputs_and_heads(in_chans):
    model = timm.create_model("mobilenetv1_ulsam", in_chans=in_chans, num_classes=3).eval()
    assert model(torch.randn(1, in_chans, 32, 32)).shape == (1, 3)
    model.reset_classifier(0)
    assert model(torch.randn(1, in_chans, 32, 32)).shape == (1, model.num_features)
