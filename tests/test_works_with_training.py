"""ULSAM with what training code does to models, beside its modules called one by one."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from compare import assert_same, cpu_spy, images, make_layer, make_model, plainly, results, step
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

from timm_ulsam.ops import attend


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_model_gives_what_its_modules_give(mode):
    model, x = make_model().train(mode == "train"), images()
    with cpu_spy() as fused:
        ours = step(model, x)
    assert fused.call_count == 2
    with plainly(), cpu_spy() as fused:
        theirs = step(model, x)
    assert fused.call_count == 0
    assert_same(ours, theirs)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_autocast_of_a_model_keeps_its_dtypes_and_is_as_close_as_the_modules(mode):
    model, x = make_model(torch.float32).train(mode == "train"), images(8, torch.float32)
    exact = step(copy.deepcopy(model).double(), x.double())["output"]
    with torch.autocast("cpu", torch.bfloat16):
        ours = step(model, x)
        with plainly():
            theirs = step(model, x)
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    assert all(v.isfinite().all() for v in ours.values())
    error, theirs_error = ((y["output"] - exact).abs().max() / exact.abs().max() for y in (ours, theirs))
    assert error <= 1.5 * theirs_error + 2**-7


def test_autocast_rounds_nothing_inside_the_layer():
    layer, x = make_layer(torch.float32), torch.randn(2, 8, 6, 6)
    expected = step(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(step(layer, x), expected, 0)


def test_channels_last_goes_through_every_block_and_changes_nothing():
    model, x = make_model(), images()
    expected = step(model, x)
    model = model.to(memory_format=torch.channels_last)
    formats = []
    for stage in model.blocks:
        for block in stage:
            block.register_forward_hook(
                lambda m, _, y: formats.append(y.is_contiguous(memory_format=torch.channels_last))
            )
            block.register_full_backward_hook(
                lambda m, _, g: formats.append(g[0].is_contiguous(memory_format=torch.channels_last))
            )
    x = x.contiguous(memory_format=torch.channels_last)
    assert_same(step(model, x), expected)
    assert formats == [True] * 2 * 17


def test_checkpointing_computes_ulsam_again_like_any_block_and_the_same_gradients():
    model, x = make_model(), images()
    calls = {name: 0 for name, m in model.named_modules() if m in [b for stage in model.blocks for b in stage]}
    expected = step(model, x)

    def count(name, *_):
        calls[name] += 1

    for name in calls:
        model.get_submodule(name).register_forward_pre_hook(partial(count, name))
    model.set_grad_checkpointing()
    ours = step(model, x)
    assert set(calls.values()) == {2}
    # running statistics move twice there, in any batch norm: compared with the modules under checkpointing
    gradients = {k for k in ours if "gradient" in k or k == "output"}
    assert_same({k: ours[k] for k in gradients}, {k: expected[k] for k in gradients})
    with plainly():
        assert_same(ours, step(model, x))


def test_an_average_of_the_weights_follows_and_evaluates():
    model, x = make_model(), images()
    ema = ModelEmaV3(model, decay=0.75)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = model.state_dict()
    ema.update(model)
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name])
        else:
            assert torch.equal(value, after[name])
    y = ema(x)
    with plainly():
        torch.testing.assert_close(y, ema(x))


def _distributed(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, x = torch.load(folder / "work.pt", weights_only=False)
    found = []
    for options in ({}, {"static_graph": True}, {"find_unused_parameters": True}):
        replica = DistributedDataParallel(copy.deepcopy(model), **options)
        for _ in range(2):  # a static graph is known from the second step on
            replica.zero_grad()
            replica(x.chunk(2)[rank]).square().mean().backward()
        found.append(results(replica.module))
    replica = DistributedDataParallel(copy.deepcopy(model).train())
    replica(x.chunk(2)[rank]).square().mean().backward()
    found.append(results(replica.module))
    torch.save(found, folder / f"found{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_find_the_gradients_of_one(tmp_path):
    # on frozen statistics: else each process would normalize by its own half
    model, x = make_model().eval(), images(8)
    torch.save((model, x), tmp_path / "work.pt")
    torch.multiprocessing.spawn(_distributed, args=(tmp_path,), nprocs=2)
    found = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(2)]
    with plainly():
        model(x).square().mean().backward()
        expected = results(model)
        halves = []
        for part in x.chunk(2):
            trained = copy.deepcopy(model).train()
            trained.zero_grad()
            trained(part).square().mean().backward()
            halves.append(results(trained))
    for *frozen, trained in found:
        for ours in frozen:
            assert_same(ours, expected)
        gradients = [name for name in expected if name.startswith("gradient of")]
        mean = {name: (halves[0][name] + halves[1][name]) / 2 for name in gradients}
        assert_same({name: trained[name] for name in gradients}, mean)
    # and in training each has its own statistics, of its half
    for (*_, trained), half in zip(found, halves, strict=True):
        buffers = [name for name in half if not name.startswith("gradient of")]
        assert_same({name: trained[name] for name in buffers}, {name: half[name] for name in buffers})


def test_deterministic_algorithms_train_bit_by_bit_the_same():
    model, x = make_model(torch.float32), images(dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        with cpu_spy() as fused:
            first, second = step(model, x), step(model, x)
        assert fused.call_count == 4
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(first, second, 0)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_copy_of_a_used_model_is_another_model(how):
    model, x = make_model(), images()
    model(x).square().sum().backward()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    for m in (model, twin):
        m.zero_grad()
    expected = model.eval()(x)
    assert torch.equal(twin.eval()(x), expected)
    twin.train()(x).square().sum().backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert torch.equal(model(x), expected)
    assert all(p.grad is None for p in model.parameters())


def test_two_passes_before_one_backward():
    layer = make_layer()
    inputs = [torch.randn(4, 8, 5, 6, dtype=torch.float64) for _ in range(2)]

    def both():
        twin = copy.deepcopy(layer)
        (twin(inputs[0]) * twin(inputs[1])).square().sum().backward()
        return results(twin)

    ours = both()
    with plainly():
        assert_same(ours, both())


def test_stochastic_depth_drops_the_same_samples():
    model, x = make_model(drop_path_rate=0.5), images(8)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        with cpu_spy() as fused:
            found.append(step(model, x))
        assert fused.call_count == 2
    torch.manual_seed(1)
    with plainly():
        theirs = step(model, x)
    assert_same(found[0], theirs)
    assert_same(found[0], found[1], 0)
    torch.manual_seed(2)
    assert not torch.allclose(step(model, x)["output"], theirs["output"])


# larger than what goes by few operators, and smaller
@pytest.mark.parametrize("shape", [(40, 8, 24, 24), (2, 8, 5, 6)])
def test_inference_between_training_steps_disturbs_neither(shape):
    layer, x = make_layer(), torch.randn(shape, dtype=torch.float64)
    with plainly():
        training, inference = step(layer, x), copy.deepcopy(layer).eval()(x)
    for _ in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(copy.deepcopy(layer).eval()(x), inference)
        assert_same(step(layer, x), training)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_threads_do_not_disturb_each_other(memory_format):
    layer = make_layer().eval()
    sizes = [(40, 8, 24, 24), (3, 8, 30, 20), (20, 8, 40, 17), (2, 8, 5, 6)]
    inputs = [torch.randn(size, dtype=torch.float64).contiguous(memory_format=memory_format) for size in sizes] * 4
    with plainly():
        expected = [step(layer, x) for x in inputs[:4]] * 4

    def work(x):
        with torch.no_grad():
            y = layer(x)
        return y, step(layer, x)

    with ThreadPoolExecutor(4) as pool:
        for (y, ours), theirs in zip(pool.map(work, inputs), expected, strict=True):
            torch.testing.assert_close(y, theirs["output"])
            assert_same(ours, theirs)


class Attended(torch.utils.data.Dataset):
    """A dataset that asks a layer, as one does for features computed on the way."""

    def __init__(self, layer, inputs):
        self.layer, self.inputs = layer, inputs

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.layer(self.inputs[i])


def test_a_forked_worker_computes_the_same():
    layer = make_layer().eval()
    inputs = torch.randn(3, 40, 8, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        layer(inputs[0])  # the parent's memory is there when it forks
    data = torch.utils.data.DataLoader(
        Attended(layer, inputs), None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    with plainly():
        expected = attend(inputs[0], layer.attention(inputs[0]))
    torch.testing.assert_close(next(iter(data)), expected)
