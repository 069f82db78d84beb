"""The tags `..._init`: timm's weights of the plain network (here stand-ins, random) and ULSAM near the identity."""

from functools import partial

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn

from timm_ulsam import ULSAM, pretrained
from timm_ulsam.pretrained import WeightsError
from timm_ulsam.zoo import entries

V2, LARGE = "mobilenetv2_ulsam.ra_in1k_init", "mobilenetv2_ulsam_l.ra_in1k_init"
SMALL, HALF = "mobilenetv2_ulsam_s.ra_in1k_init", "mobilenetv2_ulsam_050.lamb_in1k_init"
V1 = "mobilenetv1_ulsam.ra4_e3600_r224_in1k_init"
SOURCES = {
    V1: "mobilenetv1_100.ra4_e3600_r224_in1k",
    V2: "mobilenetv2_100.ra_in1k",
    SMALL: "mobilenetv2_100.ra_in1k",
    HALF: "mobilenetv2_050.lamb_in1k",
    LARGE: "mobilenetv2_100.ra_in1k",
}
UNUSED = {
    V1: ("blocks.3.5.",),
    V2: ("blocks.4.2.", "blocks.5.2."),
    SMALL: ("blocks.4.1.", "blocks.4.2.", "blocks.5.1.", "blocks.5.2."),
    HALF: ("blocks.4.2.", "blocks.5.2."),
    LARGE: (),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Plain networks of random weights and statistics, by name, and the files with their state dicts."""
    folder = tmp_path_factory.mktemp("plain")
    networks = {}
    for source in sorted(set(SOURCES.values())):
        torch.manual_seed(0)
        network = timm.create_model(source).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight.data, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias.data, module.running_mean):
                    tensor.normal_(0, 0.3)
        save_file(network.state_dict(), folder / f"{source}.safetensors")
        networks[source] = network, str(folder / f"{source}.safetensors")
    return networks


@pytest.fixture
def create(plain):
    def create(name, **kwargs):
        file = plain[SOURCES[name]][1]
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=file), **kwargs)

    return create


@torch.no_grad()
def difference(model, network, size=224):
    """The largest difference of logits, of which those of `network` are of order 1."""
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = network(x)
    scale = expected.std()
    assert scale > 1e-3
    return ((model.eval()(x) - expected).abs().max() / scale).item()


def ulsams(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ULSAM)}


# what the tags are


@pytest.mark.parametrize("name", SOURCES)
def test_the_input_is_that_of_the_source(name):
    ours, theirs = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(SOURCES[name])
    for key in (
        *("hf_hub_id", "input_size", "test_input_size", "pool_size", "crop_pct", "test_crop_pct", "interpolation"),
        *("mean", "std", "num_classes", "first_conv", "classifier", "license"),
    ):
        assert getattr(ours, key) == getattr(theirs, key), key


@pytest.mark.parametrize("name", SOURCES)
def test_the_tag_says_that_it_is_no_classifier_of_its_own(name):
    assert name in timm.list_pretrained("*ulsam*")
    description = timm.get_pretrained_cfg(name).description
    assert "not an ImageNet classifier of its own" in description
    assert SOURCES[name] in description


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("mobilenetv2_ulsam", "tin200_96"),
        ("mobilenetv2_ulsam_s", "tin200"),
        ("mobilenetv2_ulsam_l", "ra_in1k_init"),
        ("mobilenetv2_ulsam_050", "untrained"),
        ("mobilenetv1_ulsam", "tin200"),
    ],
)
def test_what_a_name_without_a_tag_means(name, tag):
    assert timm.get_pretrained_cfg(name).tag == tag


def test_the_zoo_lists_them_without_accuracy():
    zoo = {f"{entry.name}.{tag}": w for entry in entries("ulsam") for tag, w in entry.weights.items()}
    assert all((zoo[name].top1, zoo[name].top5, zoo[name].bytes) == (None, None, None) for name in SOURCES)
    assert zoo["mobilenetv2_ulsam.tin200"].top1


# what is kept, and what ULSAM starts as


@pytest.mark.parametrize("name", [V1, V2, SMALL, HALF])
def test_every_shared_block_is_kept_and_nothing_else(name, create, plain):
    state, theirs = create(name).state_dict(), plain[SOURCES[name]][0].state_dict()
    shared = {key for key in theirs if not key.startswith(UNUSED[name])}
    assert shared == {key for key in state if not key.startswith(UNUSED[name])}
    assert all(torch.equal(state[key], theirs[key]) for key in shared)


def test_of_the_large_one_only_the_convolution_behind_differs(create, plain):
    state, theirs = create(LARGE).state_dict(), plain[SOURCES[LARGE]][0].state_dict()
    assert {key for key in theirs if not torch.equal(state[key], theirs[key])} == {"blocks.6.0.conv_pw.weight"}
    torch.testing.assert_close(state["blocks.6.0.conv_pw.weight"] * 50 / 49, theirs["blocks.6.0.conv_pw.weight"])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SOURCES)
def test_every_ulsam_starts_near_the_identity(name, training, create):
    layers = ulsams(create(name).train(training))
    assert layers
    for layer in layers.values():
        x = torch.randn(2, layer.channels, 7, 5)
        torch.testing.assert_close(layer(x), x * (1 + 1 / 35))
        torch.testing.assert_close(layer.attention(x), torch.full((2, 4, 7, 5), 1 / 35))


def test_every_parameter_of_ulsam_trains(create):
    torch.manual_seed(0)
    model = create(LARGE, num_classes=4).train()
    (layer,) = ulsams(model).values()
    start = {key: value.clone() for key, value in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
    images, labels = torch.randn(8, 3, 96, 96), torch.arange(8) % 4
    gradients = dict.fromkeys(start, 0.0)
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        for key, value in layer.named_parameters():
            gradients[key] = max(gradients[key], value.grad.abs().max().item())
    # the biases before a batch norm have none in any ULSAM
    assert {key for key in start if gradients[key] < 1e-6} <= {"conv_dw.bias", "conv_pw.bias"}
    assert all(not torch.equal(value, start[key]) for key, value in layer.named_parameters() if gradients[key] >= 1e-6)
    maps = layer.eval().attention(torch.randn(2, layer.channels, 4, 4))
    assert maps.std() > 1e-4


# the plain network's logits, where nothing was taken out


def test_the_large_one_gives_the_plain_networks_logits(create, plain):
    network, _ = plain[SOURCES[LARGE]]
    model = create(LARGE)
    assert difference(model, network) < 1e-4
    assert difference(timm.utils.reparameterize_model(model.eval()), network) < 1e-4


def test_at_another_size_they_differ_by_the_change_of_the_constant(create, plain):
    network, _ = plain[SOURCES[LARGE]]
    model = create(LARGE)
    assert difference(model, network, 96) > 1e-3
    with torch.no_grad():
        model.blocks[6][0].conv_pw.weight *= (1 + 1 / 49) / (1 + 1 / 9)
    assert difference(model, network, 96) < 1e-4


def test_the_size_is_that_of_the_pretrained_cfg(plain):
    network, file = plain[SOURCES[LARGE]]
    overlay = dict(file=file, input_size=(3, 90, 130))
    model = timm.create_model(LARGE, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 90, 130)
    with torch.no_grad():
        torch.testing.assert_close(model(x), network(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "blocks"), [(LARGE, 1), (LARGE, (3, 6, 10)), (LARGE, (13, 17)), (V1, (1, 5, 11)), (V2, 16)]
)
def test_other_places_give_the_plain_networks_logits_too(name, blocks, create, plain):
    model = create(name, replace_blocks=(), insert_after=blocks, num_splits=2)
    assert difference(model, plain[SOURCES[name]][0]) < 1e-4


@pytest.mark.parametrize(
    ("name", "blocks"), [(LARGE, (2, 11)), (V1, 13)], ids=["a shortcut around the next block", "no convolution behind"]
)
def test_where_no_convolution_alone_reads_it_nothing_is_changed(name, blocks, create, plain):
    model = create(name, replace_blocks=(), insert_after=blocks)
    network, _ = plain[SOURCES[name]]
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    assert 1e-4 < difference(model, network) < 0.2


def test_a_ulsam_behind_another_keeps_its_constant(create):
    model = create(V2, replace_blocks=13, insert_after=12)
    plain = create(V2, replace_blocks=13)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items() if "blocks.4.2." not in key)


# what timm asks of weights


@pytest.mark.parametrize("name", SOURCES)
def test_fine_tuning_starts_with_another_head_and_other_inputs(name, create, plain):
    model = create(name, num_classes=81, in_chans=1, drop_rate=0.1, drop_path_rate=0.1)
    state, theirs = model.state_dict(), plain[SOURCES[name]][0].state_dict()
    assert state["classifier.weight"].shape[0] == 81
    torch.testing.assert_close(state["conv_stem.weight"], theirs["conv_stem.weight"].sum(1, keepdim=True))
    assert torch.equal(state["blocks.2.0.conv_dw.weight"], theirs["blocks.2.0.conv_dw.weight"])
    model.train()(torch.randn(2, 1, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kwargs", [dict(), dict(output_stride=16), dict(feature_location="expansion")])
@pytest.mark.parametrize("name", SOURCES)
def test_features_are_those_of_the_model(name, kwargs, create):
    features = create(name, features_only=True, **kwargs).eval()
    x = torch.randn(1, 3, 64, 64)
    maps = features(x)
    assert len(maps) == 5
    if not kwargs:
        expected = create(name).eval().forward_intermediates(x, intermediates_only=True)
        for ours, theirs in zip(maps, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_features_through_timms_own_wrapper(create):
    x = torch.randn(1, 3, 64, 64)
    wrapped = create(V2, features_only=True, feature_cls="fx").eval()(x)
    for ours, theirs in zip(wrapped, create(V2, features_only=True).eval()(x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("folded", [False, True])
def test_what_was_fine_tuned_loads_as_it_was_saved(folded, create, tmp_path):
    model = create(LARGE, num_classes=5).eval()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.1, 0.2)
    if folded:
        timm.utils.reparameterize_model(model, inplace=True)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.pretrained_cfg["tag"] == "ra_in1k_init"
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == again.state_dict().keys()
    assert all(torch.equal(value, saved[key]) for key, value in again.state_dict().items())


def test_other_tags_do_not_take_a_plain_network_for_their_own(plain):
    file = plain[SOURCES[V2]][1]
    with pytest.raises(RuntimeError, match=r"blocks\.4\.2\.bn_dw\.weight"):
        timm.create_model(
            "mobilenetv2_ulsam.tin200", pretrained=True, num_classes=200, pretrained_cfg_overlay=dict(file=file)
        )


@pytest.mark.parametrize("kwargs", [dict(), dict(num_classes=81), dict(in_chans=1), dict(features_only=True)])
def test_weights_of_another_network_are_refused_with_names_and_shapes(kwargs, plain):
    overlay = dict(file=plain[SOURCES[V1]][1])
    with pytest.raises(RuntimeError, match=r"missing: blocks.*unexpected: blocks.* is \(\d.*, accepted is \(\d"):
        timm.create_model(V2, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def test_another_norm_than_the_plain_networks_is_refused(create):
    with pytest.raises(RuntimeError, match=r"unexpected: .*bn1\.running_mean"):
        create(LARGE, norm_layer="layernorm2d")


# where they come from


def test_they_are_downloaded_from_timms_repository(plain, monkeypatch):
    asked = []

    def download(repo_id, filename, **kwargs):
        asked.append((repo_id, filename))
        return plain[SOURCES[LARGE]][1]

    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    model = timm.create_model(LARGE, pretrained=True)
    assert asked == [("timm/mobilenetv2_100.ra_in1k", "model.safetensors")]
    assert difference(model, plain[SOURCES[LARGE]][0]) < 1e-4


def test_what_is_cached_is_taken_offline(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / f"models--timm--{SOURCES[V1]}"
    commit = "0" * 40
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "model.safetensors").symlink_to(plain[SOURCES[V1]][1])
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model = timm.create_model(V1, pretrained=True, cache_dir=tmp_path)
    assert torch.equal(model.conv_stem.weight, plain[SOURCES[V1]][0].conv_stem.weight)


@pytest.mark.parametrize("name", SOURCES)
def test_offline_and_not_cached_says_what_would_be_downloaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError) as refused:
        timm.create_model(name, pretrained=True, cache_dir=tmp_path)
    message = str(refused.value)
    for part in (f"timm/{SOURCES[name]}", "model.safetensors", "HF_HUB_OFFLINE", "--pretrained-path"):
        assert part in message
    assert "TIMM_ULSAM_WEIGHTS" not in message


def test_the_zoos_own_weights_say_so_too(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    overlay = dict(file=None)
    with pytest.raises(WeightsError) as refused:
        timm.create_model("mobilenetv2_ulsam", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
    message = str(refused.value)
    assert "model.safetensors of the Hub repository timm-ulsam/mobilenetv2_ulsam.tin" in message
    assert message.endswith("A clone of timm-ulsam has them: set TIMM_ULSAM_WEIGHTS to its weights/.")


def test_without_pretrained_nothing_is_downloaded(monkeypatch):
    monkeypatch.setattr(pretrained, "hf_hub_download", partial(pytest.fail, "asked the Hub"))
    assert timm.create_model(LARGE).num_classes == 1000
