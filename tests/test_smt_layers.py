"""Scale-Aware Modulation and the other blocks of SMT, beside the published code."""

import copy
from functools import partial
from typing import Any

import pytest
import reference
import timm
import torch
from timm.layers import LayerNorm2d, set_fused_attn
from torch import nn

from timm_ulsam.layers import ScaleAwareModulation
from timm_ulsam.models._build import renamed
from timm_ulsam.models._smt_blocks import Block, Downsample, SelfAttention, Stem
from timm_ulsam.models.smt import _PUBLISHED_NAMES

MODULATION = ["attn_ca_d64_h4_8x8", "attn_ca_d64_h4_7x9"]
FILES = [
    *MODULATION,
    "attn_sa_d64_h8_8x8",
    "attn_sa_d64_h4_7x9",
    "block_ca_d32_7x9_lowvar",
    "block_sa_d32_7x9_lowvar",
    "stem_k3_d32_34x46_lowvar",
    "embed_32to64_9x13_lowvar",
]
# by published class: where one stands in the published model, and in ours
PLACES = {
    "Attention": ("block1.0.attn.", "stages.0.blocks.0.attn."),
    "Block": ("block1.0.", "stages.0.blocks.0."),
    "Head": ("patch_embed1.", "stem."),
    "OverlapPatchEmbed": ("patch_embed2.", "stages.1.downsample."),
}


def built(kind: str, args: dict[str, Any]) -> nn.Module:
    """The module of ours for a published class and its arguments."""
    if kind == "Head":
        return Stem(3, args["dim"], args["head_conv"])
    if kind == "OverlapPatchEmbed":
        return Downsample(args["in_chans"], args["embed_dim"])
    if args["ca_attention"]:
        attn = ScaleAwareModulation(args["dim"], args["ca_num_heads"], expand_ratio=args["expand_ratio"])
    else:
        attn = SelfAttention(args["dim"], args["sa_num_heads"])
    if kind == "Attention":
        return attn
    return Block(args["dim"], attn, mlp_ratio=args["mlp_ratio"], init_values=1e-4 if args["use_layerscale"] else None)


def our_names(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    theirs, ours = PLACES[kind]
    return reference.part(renamed({theirs + k: v for k, v in state.items()}, _PUBLISHED_NAMES), ours)


def as_map(tokens: torch.Tensor, height: int) -> torch.Tensor:
    """(N, H * W, C) to (N, C, H, W); a map stays one."""
    return tokens if tokens.dim() == 4 else tokens.transpose(1, 2).unflatten(2, (height, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("file", FILES)
def test_output_gradient_and_statistics_are_the_published_ones(file, memory_format, dtype):
    config, tensors = reference.config("smt", file), reference.tensors("smt", file)
    layer = built(config["module"], config["args"])
    layer.load_state_dict(our_names(reference.part(tensors, "param."), config["module"]))
    layer.to(dtype).eval()
    height = config.get("H", config.get("out_H"))
    output, outputs, gradients = (1e-6, 1e-6, 1e-6) if dtype == torch.float64 else (1e-5, 1e-5, 2e-5)

    x = as_map(tensors["input"], height).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    y = layer(x)
    reference.assert_close(y, as_map(tensors["output"], height), output)
    (y * as_map(tensors["grad_seed"], height)).sum().backward()
    reference.assert_close(x.grad, as_map(tensors["grad_input"], height), gradients)

    trained = layer.train()(x.detach())
    reference.assert_close(trained, as_map(tensors.get("output_train", tensors["output"]), height), outputs)
    after = our_names(reference.part(tensors, "post_train."), config["module"])
    assert bool(after) == any(isinstance(m, nn.BatchNorm2d) for m in layer.modules())
    for key, value in after.items():
        reference.assert_close(layer.get_buffer(key), value, output, key)


@pytest.mark.parametrize("file", MODULATION)
def test_a_published_modulation_loads_as_it_is(file):
    state = reference.part(reference.tensors("smt", file), "param.")
    model = nn.Sequential(nn.Identity(), ScaleAwareModulation(64))
    model.load_state_dict({f"1.{k}": v for k, v in state.items()})
    assert torch.equal(model[1].local_convs[3].weight, state["local_conv_4.weight"])
    with pytest.raises(RuntimeError, match=r"local_convs\.3\.weight"):
        ScaleAwareModulation(64, 2).load_state_dict(state)


def test_attention_is_the_same_unfused():
    torch.manual_seed(0)
    layer, x = SelfAttention(32, 4).eval(), torch.randn(2, 32, 5, 6)
    state = layer.state_dict()
    assert layer.fused_attn
    set_fused_attn(False)
    try:
        plain = SelfAttention(32, 4).eval()
    finally:
        set_fused_attn(True)
    assert not plain.fused_attn
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(x), layer(x))


# --- the layer as a drop-in


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_shape_and_memory_format_stay(memory_format):
    layer = ScaleAwareModulation(12, 3)
    for size in ((1, 1), (2, 7), (5, 3)):
        x = torch.randn(2, 12, *size).contiguous(memory_format=memory_format)
        y = layer(x)
        assert y.shape == x.shape
        assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(channels=0), "channels=0"),
        (dict(num_heads=5), r"num_heads=5 does not divide channels=8; accepted: \[1, 2, 4, 8\]"),
        (dict(num_heads=0), "num_heads=0"),
        (dict(num_heads=True), "num_heads=True"),
        (dict(expand_ratio=1.5), r"expand_ratio=1\.5"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ScaleAwareModulation(**dict(dict(channels=8), **kwargs))


@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (8, 5, 5), (2, 5, 5, 8)])
def test_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"accepted is \(N, 8, H, W\)"):
        ScaleAwareModulation(8)(torch.randn(shape))


def test_options_are_in_effect():
    layer = ScaleAwareModulation(8, 2, expand_ratio=3, qkv_bias=False, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
    assert layer.v.bias is layer.s.bias is None
    assert [conv.kernel_size[0] for conv in layer.local_convs] == [3, 5]
    assert layer.proj1.in_channels == 24
    assert isinstance(layer.act, nn.SiLU)
    assert isinstance(layer.bn, LayerNorm2d)
    assert (ScaleAwareModulation(8, proj_drop=0.5)(torch.randn(4, 8, 9, 9)) == 0).float().mean() > 0.4
    meta = ScaleAwareModulation(8, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.float64)}


def test_initialization_is_the_published_one():
    torch.manual_seed(0)
    layer = ScaleAwareModulation(256, 4)
    expected = {"v": 0.02, "proj": 0.02, "local_convs.0": (2 / 9) ** 0.5, "local_convs.3": (2 / 81) ** 0.5}
    expected |= {"proj0": 0.5, "proj1": (2 / 256) ** 0.5}
    for name, std in expected.items():
        assert layer.get_submodule(name).weight.std().item() == pytest.approx(std, rel=0.1), name
        assert not layer.get_submodule(name).bias.any()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace", "fx", "compile", "export", "deepcopy"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_layer_captured_computes_the_same(how, memory_format):
    torch.manual_seed(0)
    layer = ScaleAwareModulation(8, 2).eval()
    x = torch.randn(2, 8, 6, 7).contiguous(memory_format=memory_format)
    captured = {
        "script": lambda: torch.jit.script(layer),
        "trace": lambda: torch.jit.trace(layer, x),
        "fx": lambda: torch.fx.symbolic_trace(layer),
        "compile": lambda: torch.compile(layer, fullgraph=True, backend="eager"),
        "export": lambda: torch.export.export(layer, (x,)).module(),
        "deepcopy": lambda: copy.deepcopy(layer),
    }[how]()
    y = captured(x)
    torch.testing.assert_close(y, layer(x))
    assert y.is_contiguous(memory_format=memory_format)


def test_it_trains_under_autocast():
    layer = ScaleAwareModulation(8)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *layer.parameters()))


def test_an_activation_may_be_named_as_timm_names_it():
    assert type(ScaleAwareModulation(8, act_layer="silu").act) is nn.SiLU


def test_it_serves_as_attn_layer_of_timm_models():
    for attn_layer in (ScaleAwareModulation, partial(ScaleAwareModulation, num_heads=2, expand_ratio=1)):
        model = timm.create_model("resnet18", block_args=dict(attn_layer=attn_layer), num_classes=3)
        assert sum(isinstance(m, ScaleAwareModulation) for m in model.modules()) == 8
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
