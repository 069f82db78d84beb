"""ULSAM compiled, scripted, traced and exported, beside its modules called one by one."""

import copy

import pytest
import timm
import torch
from compare import assert_same, images, make_layer, make_model, pass_through, plainly, step
from timm.utils.model import reparameterize_model
from timm.utils.onnx import onnx_export
from torch import nn
from torch._dynamo.utils import counters

from timm_ulsam import ULSAM
from timm_ulsam.ops import onnx as onnx_version


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()


def graphs() -> int:
    """How many graphs were compiled so far."""
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_model_compiles_to_one_graph_and_trains_the_same(mode):
    model, x = make_model().train(mode == "train"), images()
    with plainly():
        expected = step(model, x)
    assert_same(pass_through(model, x, torch.compile(model, backend="aot_eager", fullgraph=True)), expected)
    assert graphs() == 1


def test_inductor_trains_the_same_and_compiles_once():
    layer, x = make_layer(), torch.randn(4, 8, 6, 7, dtype=torch.float64)
    plain, compiled = copy.deepcopy(layer), torch.compile(layer, fullgraph=True)
    for _ in range(2):  # statistics go on from the first step to the second
        ours = pass_through(layer, x, compiled)
        with plainly():
            assert_same(ours, pass_through(plain, x))
    assert graphs() == 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_inductor_infers_the_same_and_keeps_the_memory_format(memory_format):
    layer = make_layer().eval()
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
    with torch.inference_mode():
        y = torch.compile(layer, fullgraph=True)(x)
        with plainly():
            torch.testing.assert_close(y, layer(x))
    assert y.is_contiguous(memory_format=memory_format)
    assert graphs() == 1


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("how", ["dynamic", "mark", "automatic"])
def test_batches_of_other_sizes_compile_at_most_once_more(how, mode):
    layer = make_layer().train(mode == "train")
    compiled = copy.deepcopy(layer)
    compiled.compile(backend="aot_eager", fullgraph=True, dynamic=True if how == "dynamic" else None)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 8, 6, 7, dtype=torch.float64)
        value = x.clone()
        if how == "mark":
            torch._dynamo.mark_dynamic(value, 0)
        with torch.no_grad():
            y = compiled(value)
        with plainly(), torch.no_grad():
            torch.testing.assert_close(y, layer(x))
    assert graphs() == 1 + (how == "automatic")


def test_a_compiled_layer_notices_what_is_changed_later():
    layer, x = make_layer().eval(), torch.randn(2, 8, 6, 7, dtype=torch.float64)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    before = compiled(x)
    layer.act_dw = nn.SiLU()
    with plainly():
        expected = layer(x)
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(compiled(x), expected)
    layer.act_dw = nn.ReLU()
    layer.reparameterize()
    torch.testing.assert_close(compiled(x), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("folded", [False, True])
def test_a_scripted_or_traced_model_is_saved_and_takes_any_batch(how, folded, tmp_path):
    model = make_model(drop_path_rate=0.2).eval()
    with plainly():
        x = images(3)
        expected = model(x)
    if folded:
        model = reparameterize_model(model)
    made = torch.jit.script(model) if how == "script" else torch.jit.trace(model, images(2))
    made.save(tmp_path / "model.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_scripted_model_trains():
    model, x = make_model(), images()
    with plainly():
        expected = step(model, x)
    assert_same(pass_through(torch.jit.script(model), x), expected)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_symbolic_trace_shows_ulsams_modules_and_trains(mode):
    model, x = make_model().train(mode == "train"), images()
    with plainly():
        expected = step(model, x)
    traced = torch.fx.symbolic_trace(model)
    names = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert {f"blocks.2.2.{name}" for name, _ in model.blocks[2][2].named_children()} <= names
    ours = step(traced, x)
    # PyTorch's tracer writes out timm's norms, without their count of batches
    lost = expected.keys() - ours.keys()
    assert all(name.endswith("num_batches_tracked") and not name.startswith("blocks.2.2.") for name in lost)
    assert_same(ours, {name: value for name, value in expected.items() if name not in lost})


def test_features_from_inside_ulsam():
    pytest.importorskip("torchvision", reason="timm extracts features from a graph by torchvision")
    model, x = make_model().eval(), images()
    names = {"blocks.2.2.act_pw": "scores", "blocks.2.2": "block"}
    found = timm.layers.create_feature_extractor(model, names)(x)
    layer, inputs = model.blocks[2][2], []
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with plainly():
        model(x)
        torch.testing.assert_close(found["block"], layer(inputs[0]))
        torch.testing.assert_close(found["scores"].flatten(2).softmax(-1), layer.attention(inputs[0]).flatten(2))


@pytest.mark.parametrize("location", ["bottleneck", "expansion"])
def test_features_of_a_backbone_are_those_of_the_modules(location):
    # 6 and 13 end their stages; what hangs on hooks ('expansion') must come of them too
    model = make_model(features_only=True, feature_location=location, num_classes=0).eval()
    x = images(2)
    ours = model(x)
    with plainly():
        theirs = model(x)
    assert len(ours) == 5
    torch.testing.assert_close(ours, theirs)
    assert [f.shape[1] for f in ours] == model.feature_info.channels()


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("batch", ["static", "dynamic"])
@pytest.mark.parametrize("folded", [False, True])
def test_an_exported_model_holds_only_atens_operators(batch, folded, tmp_path):
    model, x = make_model().eval(), images(3)
    with plainly():
        expected = model(x)
    if folded:
        model = reparameterize_model(model)
    shapes = {"x": {0: torch.export.Dim("batch", max=64)}} if batch == "dynamic" else None
    program = torch.export.export(model, (images(3 if batch == "static" else 2),), dynamic_shapes=shapes)
    for made in (program, program.run_decompositions()):
        assert operators(made) <= {"aten", "_operator", "sym_size", "<built-in function getitem>"}
    torch.export.save(program, tmp_path / "model.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_exported_model_can_be_cast(dtype):
    model, x = make_model().eval(), images(2)
    exported = torch.export.export(model, (x,)).module()
    expected = model.to(dtype)(x.to(dtype))
    tolerance = {torch.float16: 0.02, torch.bfloat16: 0.1, torch.float32: 1e-5}[dtype] * expected.abs().max().item()
    torch.testing.assert_close(exported.to(dtype)(x.to(dtype)), expected, atol=tolerance, rtol=0)


def test_a_model_exported_for_training_with_stochastic_depth_can_be_cast():
    x = images(2)
    exported = torch.export.export(make_model(drop_path_rate=0.5).train(), (x,)).module()
    assert exported.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_a_model_exported_for_training_holds_the_modules_convolutions():
    # what quantization matches its patterns in
    program = torch.export.export(make_model(), (images(),))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    ulsams = sum(isinstance(m, ULSAM) for m in make_model().modules())
    assert ulsams == 2
    convolutions = sum(isinstance(m, nn.Conv2d) for m in make_model().modules())
    assert sum("conv2d" in name for name in called) == convolutions
    assert sum("batch_norm" in name for name in called) == convolutions


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("use_dynamo", [False, True], ids=["legacy", "dynamo"])
@pytest.mark.parametrize("folded", [False, True])
def test_onnx_has_standard_operators_and_any_batch(use_dynamo, folded, tmp_path, monkeypatch):
    ran, function = [], onnx_version.ulsam
    monkeypatch.setattr(onnx_version, "ulsam", lambda *args: ran.append(1) or function(*args))
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if use_dynamo:
        pytest.importorskip("onnxscript")
    model = make_model(torch.float32).eval()
    inputs = [images(batch, torch.float32) for batch in (1, 3)]
    with plainly(), torch.no_grad():
        expected = [model(x) for x in inputs]
    if folded:
        model = reparameterize_model(model)
    path = str(tmp_path / "model.onnx")
    onnx_export(model, path, batch_size=2, input_size=(3, 64, 64), use_dynamo=use_dynamo, check_forward=True)
    assert ran
    made = onnx.load(path)
    assert {node.domain for node in made.graph.node} <= {"", "ai.onnx"}
    assert not made.functions
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x, y in zip(inputs, expected, strict=True):
        (found,) = session.run(None, {"input0": x.numpy()})
        assert abs(torch.from_numpy(found) - y).max() <= 1e-4 * y.abs().max()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_of_an_exported_program(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    layer, x = make_layer(torch.float32).eval(), torch.randn(2, 8, 6, 7)
    program = torch.onnx.export(torch.export.export(layer, (x,)), dynamo=True, verbose=False)
    program.save(tmp_path / "layer.onnx")
    session = runtime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with plainly():
        torch.testing.assert_close(torch.from_numpy(found), layer(x))
