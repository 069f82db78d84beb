import re

import pytest
import timm
import torch
from conftest import REPO

from timm_ulsam import layers
from timm_ulsam.systems import SYSTEMS, costs_table, plain_cost, system_of, systems_table, trained_cost
from timm_ulsam.zoo import model_names

DOCS = (REPO / "docs/systems.md").read_text(encoding="utf-8")


def test_every_model_belongs_to_one_system_whose_key_is_in_its_name():
    named = [(name, s.key) for s in SYSTEMS for name in s.models]
    assert sorted(name for name, _ in named) == sorted(model_names())
    assert all(key in name for name, key in named)


def test_layers_are_there_to_import():
    named = {layer for s in SYSTEMS for layer in s.layers}
    assert named | {"replace_convs"} <= set(layers.__all__)
    assert all(isinstance(getattr(layers, name), type) for name in named)


def test_another_name_is_refused():
    with pytest.raises(ValueError, match=r"'resnet50' is no model of this zoo; accepted: .*'smt_tiny'"):
        system_of("resnet50")


@pytest.mark.parametrize("name", ["resnet50_sa", "mobilenetv1_ulsam_050", "shufflenetv2_050_weightnet"])
def test_the_network_without_the_system_is_another_one(name):
    assert plain_cost(name).parameters != trained_cost(name).parameters


def test_what_makes_depthwise_kernels_is_counted():
    # the authors' 41 M (github.com/megvii-model/WeightNet)
    assert trained_cost("shufflenetv2_050_weightnet").macs == 40_704_040
    # DO-Conv: a number of D for every multiplication in depthwise layers, in the stem each for all of its 32 kernels
    convs = [m for m in timm.create_model("mobilenetv2_doconv").modules() if isinstance(m, layers.DOConv2d)]
    made = sum(m.D.numel() * (1 if m.depthwise else m.out_channels) for m in convs if m.D is not None)
    assert trained_cost("mobilenetv2_doconv").macs - plain_cost("mobilenetv2_doconv").macs == made == 585_792


def test_the_page_of_systems_is_current():
    for table in (systems_table(), costs_table()):
        assert table in DOCS, "replace its tables by what `timm-ulsam list --systems` prints"


def test_timms_own_systems_build_as_the_page_says():
    named = re.findall(r'\| `timm\.create_model\("([\w.]+)"\)` \|', DOCS)
    assert named == ["seresnet50", "skresnext50_32x4d", "tf_efficientnet_cc_b0_4e", "mixer_b16_224"]
    for name in named:
        model = timm.create_model(name, num_classes=7, device="meta").eval()
        assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 7)


def test_python_on_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    assert blocks
    for block in blocks:
        exec(block, {})
