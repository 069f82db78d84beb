"""Rows of the layer alone: inference, compiled inference and training steps, against the published one and a copy."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import nn

from timm_ulsam import ULSAM

from .published import Published, published_layer, stacked
from .rows import Case, Comparison, Disagreement, Options, Row

Shape = tuple[int, int, int, int]
Mode = Literal["infer", "compile", "train"]

# shape (N, C, H, W), subspaces, and how many times faster than the published module it must be
_CPU_INFER = (((32, 96, 14, 14), 4, 9), ((32, 160, 7, 7), 4, 7), ((32, 512, 14, 14), 8, 9), ((1, 96, 14, 14), 4, 6))
_CPU_COMPILE = tuple((shape, splits, 13) for shape, splits, _ in _CPU_INFER)
_CPU_TRAIN = (((32, 96, 14, 14), 4, 3), ((32, 512, 14, 14), 8, 3))
# shape, subspaces, and how many times as long as a copy inference may take
_GPU = (((256, 96, 14, 14), 4, None), ((256, 512, 14, 14), 8, 1.7), ((64, 64, 56, 56), 4, 1.7))
_GPU_INFER_FASTER, _GPU_TRAIN_FASTER, _GPU_TRAIN_COPIES = 15, 10, 5
_SAVED = 0.5  # share of what the published module keeps for backward

# error allowed, relative to the float64 result, where twice the published module's own is not more; float32
# convolutions on a GPU are done in TF32 unless told otherwise
_TOLERANCE = {("cpu", torch.float32): 1e-3, ("cuda", torch.float32): 1e-2, ("cuda", torch.bfloat16): 5e-2}

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _results(
    module: nn.Module, x: torch.Tensor, upstream: torch.Tensor | None, by_our_names: Callable[[dict], dict]
) -> dict[str, torch.Tensor]:
    """What the layer adds to the input, and with an upstream gradient, what it adds to that, and every gradient."""
    if upstream is None:
        with torch.inference_mode():
            return {"output": (module(x).double() - x.double())}
    x = x.detach().requires_grad_()
    y = module(x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    grad_x, *grads = torch.autograd.grad(y, (x, *parameters), upstream)
    found = {
        "output": y.detach().double() - x.detach().double(),
        # without its first term, which every layer of this kind has
        "gradient of the input": grad_x.double() - upstream.double(),
    }
    gradients = by_our_names(dict(zip(names, grads, strict=True)))
    return found | {f"gradient of {name}": g.double() for name, g in gradients.items()}


def _errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    norms = {name: value.norm().item() for name, value in exact.items()}
    # a bias before batch statistics has gradient zero, of which only rounding can be seen
    floor = 0.01 * max((norm for name, norm in norms.items() if "." in name), default=0.0)
    return {
        name: (found[name] - value).norm().item() / max(norms[name], floor if "." in name else 0.0)
        for name, value in exact.items()
    }


def check(
    published: Published, modules: dict[str, nn.Module], x: torch.Tensor, upstream: torch.Tensor | None = None
) -> None:
    """See that modules compute what the published one does with the same weights.

    All are compared with the published module in float64.

    Args:
        published: The published module.
        modules: Those to check, by the name to complain of.
        x: Input, (N, C, H, W).
        upstream: Gradient of the output, of the same shape, to check gradients too.

    Raises:
        Disagreement: If the output, or a gradient, of a module is not as close as rounding allows.
    """
    double = upstream.double() if upstream is not None else None
    exact = _results(copy.deepcopy(published).double(), x.double(), double, stacked)
    own = _errors(_results(published, x, upstream, stacked), exact)
    for name, module in modules.items():
        for what, error in _errors(_results(module, x, upstream, dict), exact).items():
            allowed = max(_TOLERANCE[x.device.type, x.dtype], 2 * own[what])
            if not error <= allowed:  # NaN is no agreement either
                raise Disagreement(
                    f"{what} of {name} is {error:.1e} off the published module's in float64, allowed is {allowed:.1e}"
                )


def saved_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps from forward to backward, each storage counted once; what the module owns is left out.

    Args:
        module: What to run, on an input that requires its gradient.
        x: Input, (N, C, H, W). It counts if it is kept.
    """
    owned = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x.detach().requires_grad_())
        del y  # not before all is counted: an address may be used again
    return sum(storages.values())


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that a call holds on the GPU at once, beyond what was there before it."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _training_step(module: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> object:
    # fresh gradients, as after zero_grad: nothing is added up between calls
    return torch.autograd.grad(module(x), (x, *module.parameters()), upstream)


def build(
    options: Options,
    *,
    mode: Mode,
    shape: Shape,
    num_splits: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Case:
    """Build and check the contenders of one row; for the arguments see `rows`."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(0)
    x, upstream = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    x, upstream = (t.contiguous(memory_format=memory_format) for t in (x, upstream))
    published = published_layer(x, num_splits)
    ulsam = ULSAM(shape[1], num_splits, device=device, dtype=dtype).eval()
    ulsam.load_state_dict(published.state_dict())
    if mode == "train":
        return _training_case(published.train(), ulsam.train(), x, upstream)

    modules: dict[str, nn.Module] = {"ulsam": ulsam, "ulsam folded": copy.deepcopy(ulsam)}
    modules["ulsam folded"].reparameterize()
    if mode == "compile":
        torch.compiler.reset()
        modules = {f"{name} compiled": torch.compile(module, fullgraph=True) for name, module in modules.items()}
        modules["published compiled"] = torch.compile(published, fullgraph=True)
    check(published, modules, x)
    contenders = {"published": partial(published, x)}
    contenders |= {name: partial(module, x) for name, module in modules.items()}
    contenders["copy"] = x.clone
    return Case(contenders, torch.inference_mode)


def _training_case(published: Published, ulsam: ULSAM, x: torch.Tensor, upstream: torch.Tensor) -> Case:
    check(published, {"ulsam": ulsam}, x, upstream)
    modules = {"published": published, "ulsam": ulsam}
    memory = {name: {"saved_bytes": saved_bytes(module, x)} for name, module in modules.items()}
    copied = x.detach()
    x = x.detach().requires_grad_()
    contenders = {name: partial(_training_step, module, x, upstream) for name, module in modules.items()}
    if x.is_cuda:
        for name, run in contenders.items():
            memory[name]["peak_bytes"] = peak_bytes(run)
    contenders["copy"] = copied.clone
    return Case(contenders, memory=memory)


def _comparisons(mode: Mode, faster: float | None, copies: float | None, saved: float | None) -> tuple[Comparison, ...]:
    suffix = " compiled" if mode == "compile" else ""
    found = [
        Comparison(f"ulsam{suffix}", "published", "faster", faster),
        Comparison(f"ulsam{suffix}", "copy", "times", copies),
    ]
    if mode != "train":
        found.append(Comparison(f"ulsam folded{suffix}", "published", "faster"))
        found.append(Comparison(f"ulsam folded{suffix}", "copy", "times"))
    if mode == "compile":
        found.append(Comparison("published compiled", "published", "faster"))
    if mode == "train":
        found.append(Comparison("ulsam", "published", "times", saved, quantity="saved_bytes"))
    return tuple(found)


def _row(
    device: str,
    mode: Mode,
    shape: Shape,
    num_splits: int,
    faster: float | None,
    copies: float | None = None,
    dtype: str = "fp32",
    channels_last: bool = False,
) -> Row:
    size = "x".join(map(str, shape))
    parts = [device, "layer", mode, f"{size}-g{num_splits}"]
    parts += [dtype] * (device == "gpu") + ["channels_last"] * channels_last
    what = {"infer": "inference", "compile": "inference, compiled", "train": "training step"}[mode]
    saved = _SAVED if mode == "train" else None
    if channels_last:
        faster = copies = saved = None
    return Row(
        id="/".join(parts),
        what=f"{what}, {size}, g = {num_splits}" + f", {dtype}" * (device == "gpu") + ", channels_last" * channels_last,
        build=partial(
            build,
            mode=mode,
            shape=shape,
            num_splits=num_splits,
            device="cuda" if device == "gpu" else "cpu",
            dtype=_DTYPES[dtype],
            channels_last=channels_last,
        ),
        comparisons=_comparisons(mode, faster, copies, saved),
        needs=("cuda",) * (device == "gpu") + ("c++",) * (mode == "compile"),
        seconds=2.0 if device == "gpu" else 5.0,
    )


def rows() -> list[Row]:
    """Rows of the layer; those with inputs in channels_last report only, the others have goals."""
    found = []
    for channels_last in (False, True):
        found += [_row("cpu", "infer", *case, channels_last=channels_last) for case in _CPU_INFER]
    found += [_row("cpu", "compile", *case) for case in _CPU_COMPILE]
    for channels_last in (False, True):
        found += [_row("cpu", "train", *case, channels_last=channels_last) for case in _CPU_TRAIN]
    for channels_last in (False, True):
        variant = dict(channels_last=channels_last)
        for dtype in ("bf16", "fp32"):
            for shape, splits, copies in _GPU:
                found.append(_row("gpu", "infer", shape, splits, _GPU_INFER_FASTER, copies, dtype, **variant))
        for dtype in ("bf16", "fp32"):
            for shape, splits, _ in _GPU:
                found.append(
                    _row("gpu", "train", shape, splits, _GPU_TRAIN_FASTER, _GPU_TRAIN_COPIES, dtype, **variant)
                )
    return found
