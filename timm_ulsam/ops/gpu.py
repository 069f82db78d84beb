"""ULSAM in few kernels for NVIDIA GPUs: the same arithmetic as `reference`, x read once or a few times.

Needs Triton; importing this module fails with ImportError otherwise.
"""

import math
from typing import Any

import torch
import triton
from torch.library import triton_op, wrap_triton

from . import reference
from .gpu_kernels import (
    INTERPRETED,
    attend_kernel,
    fused_kernel,
    merge_statistics_kernel,
    score_kernel,
    statistics_kernel,
)
from .gpu_kernels_backward import input_gradient_kernel, map_gradient_kernel, parameter_gradient_kernel
from .reference import Norm

_BATCH, _RUNNING, _FOLDED = 0, 1, 2  # as in gpu_kernels
_FUSED_BYTES = 64 * 1024  # of one group of one sample; more would spill out of the registers
_PROGRAMS = 1024  # enough to fill a large GPU several times

if INTERPRETED:
    # interpreted kernels cannot be traced: operators stay opaque, and launches on tensors without values do nothing
    class wrap_triton:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
                if not isinstance(x, torch._subclasses.FakeTensor):
                    self.kernel[grid](x, *args, **kwargs)

            return launch

    def triton_op(name: str, mutates_args: tuple[str, ...]) -> Any:
        def register(function: Any) -> Any:
            operator = torch.library.custom_op(name, function, mutates_args=mutates_args)
            operator.register_fake(function)
            return operator

        return register


def check_launcher() -> None:
    """Have Triton build, with a C compiler, what launches kernels; it raises whatever goes wrong there."""
    getattr(triton.runtime.driver.active, "utils", None)


def _power(size: int) -> int:
    return triton.next_power_of_2(int(size))


def _strides(t: torch.Tensor) -> tuple[int, int, int]:
    """Strides of samples, channels and pixels."""
    return t.stride(0), t.stride(1), t.stride(3) if t.shape[3] > 1 else t.stride(2)


def _is_flat(t: torch.Tensor) -> bool:
    """Whether one stride leads through all pixels, and offsets inside a sample fit in 32 bits."""
    height, width = t.shape[2:]
    flat = height == 1 or width == 1 or t.stride(2) == width * t.stride(3)
    _, channel, pixel = _strides(t)
    return flat and t.shape[1] * channel + height * width * pixel < 2**31


def _format(t: torch.Tensor) -> torch.memory_format:
    last = t.stride(1) == 1 and t.shape[1] > 1 and not t.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _step(*strides: int) -> int:
    """Common divisor of strides, as far as it makes wide words."""
    return math.gcd(16, *strides)


def _by_channel(t: torch.Tensor) -> bool:
    return t.stride(1) == 1 and t.shape[1] > 1


def _tile(t: torch.Tensor, channels: int, elements: int) -> tuple[int, int]:
    """Channels and pixels of a tile that reads `t`, (N, C, H, W), in long runs."""
    size = t.shape[2] * t.shape[3]
    pixels = min(_power(size), 64 if _by_channel(t) else 1024)
    block = min(_power(channels), max(elements // pixels, 1))
    return block, min(_power(size), max(elements // block, 1))


def _row_tile(width: int, channels: int, elements: int) -> tuple[int, int]:
    """Channels and columns of a tile that walks down the rows."""
    columns = min(_power(width), 64)
    return min(_power(channels), max(elements // columns, 1)), columns


def _share(size: int, block: int, programs: int) -> int:
    """How much of `size`, in blocks, a program does where there are `programs` for each share."""
    blocks = triton.cdiv(size, block)
    return triton.cdiv(blocks, min(triton.cdiv(_PROGRAMS, max(programs, 1)), blocks)) * block


def _mode(training: bool, gamma: torch.Tensor | None) -> int:
    if gamma is None:
        return _FOLDED
    return _BATCH if training else _RUNNING


def _constants(
    like: torch.Tensor, statistics: torch.Tensor, mode: int, *tensors: torch.Tensor | None
) -> list[torch.Tensor]:
    """Weight, bias, mean and variance of a norm; any tensor where the kernels do not look."""
    gamma, beta, mean, var = (like if t is None else t for t in tensors)
    return [gamma, beta, statistics, like] if mode == _BATCH else [gamma, beta, mean, var]


@triton_op("timm_ulsam::forward", mutates_args=())
def _forward(
    x: torch.Tensor,
    weight_dw: torch.Tensor,
    bias_dw: torch.Tensor,
    gamma_dw: torch.Tensor | None,
    beta_dw: torch.Tensor | None,
    mean_dw: torch.Tensor | None,
    var_dw: torch.Tensor | None,
    weight_pw: torch.Tensor,
    bias_pw: torch.Tensor,
    gamma_pw: torch.Tensor | None,
    beta_pw: torch.Tensor | None,
    mean_pw: torch.Tensor | None,
    var_pw: torch.Tensor | None,
    map_scale: torch.Tensor | None,
    training_dw: bool,
    training_pw: bool,
    eps_dw: float,
    eps_pw: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, scores before their batch norm, and statistics (4, C) and (4, g) of the batch where they are used."""
    batch, channels, height, width = x.shape
    groups = weight_pw.shape[0]
    k, size, programs = channels // groups, height * width, batch * groups
    mode_dw, mode_pw = _mode(training_dw, gamma_dw), _mode(training_pw, gamma_pw)
    out = torch.empty_like(x)
    z = x.new_empty((batch, groups, height, width), dtype=torch.float32)
    statistics_dw = x.new_empty((4, channels if mode_dw == _BATCH else 0), dtype=torch.float32)
    statistics_pw = x.new_empty((4, groups if mode_pw == _BATCH else 0), dtype=torch.float32)
    strides = _strides(x)
    out_strides = _strides(out)
    steps = dict(C_STEP=_step(strides[1], out_strides[1]), P_STEP=_step(strides[2], out_strides[2]))
    s_step = _step(size)
    scaled = map_scale is not None
    scale = x if map_scale is None else map_scale
    dw = [weight_dw, bias_dw, *_constants(x, statistics_dw, mode_dw, gamma_dw, beta_dw, mean_dw, var_dw)]
    pw = _constants(x, statistics_pw, mode_pw, gamma_pw, beta_pw, mean_pw, var_pw)

    k_block, p_block, w_block = _power(k), _power(size), _power(width)
    fits = k_block * p_block * x.element_size() <= _FUSED_BYTES and k_block * w_block <= 4096
    if fits and mode_dw != _BATCH and mode_pw != _BATCH:
        wrap_triton(fused_kernel)[(programs,)](
            x, z, out, *dw, weight_pw, bias_pw, *pw, scale, eps_dw, eps_pw, height, width, groups, *strides,
            *out_strides, **steps, S_STEP=s_step, K=k, K_BLOCK=k_block, W_BLOCK=w_block, P_BLOCK=p_block,
            MODE_DW=mode_dw, MODE_PW=mode_pw, SCALED=scaled,
        )  # fmt: skip
        return out, z, statistics_dw, statistics_pw

    if mode_dw == _BATCH:
        c_block, pixels = _tile(x, channels, 4096)
        blocks = triton.cdiv(channels, c_block)
        # merging reads all parts again: a few hundred keep the GPU busy
        most = max(_PROGRAMS // blocks, 1)
        samples = triton.cdiv(batch, most)
        share = _share(size, pixels if samples == 1 else _power(size), blocks * batch)
        parts = triton.cdiv(batch, samples) * triton.cdiv(size, share)
        partials = x.new_empty((parts, 3, channels), dtype=torch.float32)
        wrap_triton(statistics_kernel)[(blocks, parts)](
            x, partials, batch, size, channels, *strides, samples, share, **steps, S_STEP=s_step,
            C_BLOCK=c_block, P_BLOCK=pixels,
        )  # fmt: skip
        c_block = min(_power(channels), 16)
        wrap_triton(merge_statistics_kernel)[(triton.cdiv(channels, c_block),)](
            partials, statistics_dw, weight_dw, bias_dw, parts, channels, batch * size,
            C_BLOCK=c_block, PART_BLOCK=64,
        )  # fmt: skip

    k_block, w_block = _row_tile(width, k, 4096)
    rows = _share(height, 8, programs)
    grid = (programs, triton.cdiv(height, rows), triton.cdiv(width, w_block))
    parts = batch * grid[1] * grid[2]
    partials = x.new_empty((groups, parts, 3) if mode_pw == _BATCH else (0,), dtype=torch.float32)
    wrap_triton(score_kernel)[grid](
        x, z, partials, *dw, weight_pw, bias_pw, eps_dw, height, width, groups, batch, *strides, rows,
        **steps, K=k, K_BLOCK=k_block, W_BLOCK=w_block, MODE=mode_dw, STATISTICS=mode_pw == _BATCH,
    )  # fmt: skip
    k_block, p_block = _tile(x, k, 8192)
    share = _share(k, k_block, programs)
    grid = (programs, triton.cdiv(k, share))
    pixels = _share(size, p_block, programs * grid[1])
    wrap_triton(attend_kernel)[(*grid, triton.cdiv(size, pixels))](
        x, z, out, partials, statistics_pw, *pw, scale, eps_pw, size, groups, parts, *strides, *out_strides, share,
        pixels,         **steps, S_STEP=s_step, K=k, K_BLOCK=k_block, P_BLOCK=p_block, S_BLOCK=min(_power(size), 4096),
        PART_BLOCK=256, MODE=mode_pw, SCALED=scaled,
    )  # fmt: skip
    return out, z, statistics_dw, statistics_pw


@triton_op("timm_ulsam::backward", mutates_args=())
def _backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    statistics_dw: torch.Tensor,
    statistics_pw: torch.Tensor,
    weight_dw: torch.Tensor,
    bias_dw: torch.Tensor,
    gamma_dw: torch.Tensor | None,
    beta_dw: torch.Tensor | None,
    mean_dw: torch.Tensor | None,
    var_dw: torch.Tensor | None,
    weight_pw: torch.Tensor,
    gamma_pw: torch.Tensor | None,
    beta_pw: torch.Tensor | None,
    mean_pw: torch.Tensor | None,
    var_pw: torch.Tensor | None,
    map_scale: torch.Tensor | None,
    training_dw: bool,
    training_pw: bool,
    eps_dw: float,
    eps_pw: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of x; (7, C) and (5, g), whose rows are told at `parameter_gradient_kernel`."""
    batch, channels, height, width = x.shape
    groups = weight_pw.shape[0]
    k, size, programs = channels // groups, height * width, batch * groups
    mode_dw, mode_pw = _mode(training_dw, gamma_dw), _mode(training_pw, gamma_pw)
    if not _is_flat(grad_out) or _by_channel(grad_out) != _by_channel(x):
        grad_out = grad_out.contiguous(memory_format=_format(x))
    grad_x = torch.empty_like(x)
    codes = torch.empty_like(x, dtype=torch.int8)
    grad_map = torch.empty_like(z)
    sums = z.new_empty((6 if mode_pw == _BATCH else 2, batch, channels))
    map_sums = z.new_empty((2, groups, batch))
    softmax = z.new_empty((2, programs))
    grads_dw = z.new_empty((7, channels))
    grads_pw = z.new_empty((5, groups))
    strides = [*_strides(x), *_strides(grad_out)]
    out_strides = _strides(grad_x)  # of codes as well
    steps = dict(C_STEP=_step(*strides[1::3], out_strides[1]), P_STEP=_step(*strides[2::3], out_strides[2]))
    dw = [weight_dw, bias_dw, *_constants(x, statistics_dw, mode_dw, gamma_dw, beta_dw, mean_dw, var_dw)]
    pw = _constants(x, statistics_pw, mode_pw, gamma_pw, beta_pw, mean_pw, var_pw)
    scaled = map_scale is not None
    scale = x if map_scale is None else map_scale

    k_block, p_block = _tile(x, k, 4096)
    kw_block, w_block = _row_tile(width, k, 1024)
    wrap_triton(map_gradient_kernel)[(programs,)](
        x, grad_out, z, grad_map, codes, sums, map_sums, softmax, *dw, *pw, scale, eps_dw, eps_pw, height, width,
        groups, batch, *strides, *out_strides, **steps, S_STEP=_step(size), K=k,
        K_BLOCK=k_block, P_BLOCK=p_block, S_BLOCK=min(_power(size), 4096),
        KW_BLOCK=kw_block, W_BLOCK=w_block, MODE_DW=mode_dw, MODE_PW=mode_pw, SCALED=scaled,
    )  # fmt: skip
    c_block = min(_power(k), 8)
    wrap_triton(parameter_gradient_kernel)[(groups, triton.cdiv(k, c_block))](
        sums, map_sums, grads_dw, grads_pw, *dw, weight_pw, *pw, eps_dw, eps_pw, batch, size, groups,
        K=k, K_BLOCK=c_block, N_BLOCK=64, MODE_DW=mode_dw, MODE_PW=mode_pw,
    )  # fmt: skip
    kw_block, w_block = _row_tile(width, k, 1024)
    blocks = triton.cdiv(k, kw_block) * triton.cdiv(width, w_block)
    rows = _share(height, 8, programs * blocks)
    wrap_triton(input_gradient_kernel)[(programs, triton.cdiv(height, rows), blocks)](
        x, grad_out, z, grad_map, codes, softmax, grads_dw, grads_pw, grad_x, *dw, weight_pw, *pw, eps_dw, eps_pw,
        height, width, groups, *strides, *out_strides, rows,
        **steps, K=k, K_BLOCK=kw_block, W_BLOCK=w_block, MODE_DW=mode_dw, MODE_PW=mode_pw,
    )  # fmt: skip
    return grad_x, grads_dw, grads_pw


_PARAMETERS = (1, 2, 3, 4, 7, 8, 9, 10)  # among the inputs of _forward: weight, bias, gamma, beta of dw and of pw


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:14], *output[1:])
    ctx.constants = inputs[14:]


def _differentiate(ctx: Any, grad_out: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
    inputs, (z, statistics_dw, statistics_pw) = ctx.saved_tensors[:14], ctx.saved_tensors[14:]
    needed = ctx.needs_input_grad
    if grad_out is None:
        return (None,) * 18
    batched = torch._C._functorch.is_legacy_batchedtensor(grad_out) or torch._C._functorch.is_batchedtensor(grad_out)
    if torch.is_grad_enabled() or batched:
        return _differentiate_again(inputs, ctx.constants, needed, grad_out)
    grad_x, grads_dw, grads_pw = _backward(
        grad_out, inputs[0], z, statistics_dw, statistics_pw, *inputs[1:8], *inputs[9:14], *ctx.constants
    )
    # in the order of _PARAMETERS
    rows = *grads_dw[:4].unbind(), grads_dw[4], *grads_pw[:3].unbind()
    gradients: list[torch.Tensor | None] = [None] * 18
    gradients[0] = grad_x
    for i, row in zip(_PARAMETERS, rows, strict=True):
        if inputs[i] is not None and needed[i]:
            gradients[i] = row.view_as(inputs[i]).to(inputs[i].dtype)
    return tuple(gradients)


def _differentiate_again(
    inputs: tuple[Any, ...], constants: tuple[Any, ...], needed: tuple[bool, ...], grad_out: torch.Tensor
) -> tuple[Any, ...]:
    """Gradients that can be differentiated themselves, or of many at once: those of the plain version."""
    again = torch.is_grad_enabled()
    training_dw, training_pw, eps_dw, eps_pw = constants
    norms = [
        None if inputs[i] is None else Norm(*inputs[i : i + 4], training, 0.0, eps)
        for i, training, eps in ((3, training_dw, eps_dw), (9, training_pw, eps_pw))
    ]
    with torch.enable_grad():
        x = inputs[0].to(inputs[1].dtype)  # it may be half, outside autocast by now
        out = reference.ulsam(x, *inputs[1:3], norms[0], *inputs[7:9], norms[1], inputs[13]).to(inputs[0].dtype)
    wanted = [i for i in (0, *_PARAMETERS) if inputs[i] is not None and needed[i]]
    found = torch.autograd.grad(out, [inputs[i] for i in wanted], grad_out, create_graph=again, allow_unused=True)
    gradients: list[torch.Tensor | None] = [None] * 18
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)


_forward.register_autograd(_differentiate, setup_context=_save)


def _is_supported(x: torch.Tensor, map_scale: torch.Tensor | None) -> bool:
    return (
        (x.is_cuda or (INTERPRETED and x.device.type == "cpu"))
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.numel() > 0
        and _is_flat(x)
        and not (map_scale is not None and map_scale.requires_grad)
    )


def _update_running_statistics(norms: list[tuple[Norm | None, torch.Tensor]]) -> None:
    for norm, statistics in norms:
        if norm is None or not norm.training or norm.running_mean is None or norm.running_var is None:
            continue
        running = [norm.running_mean, norm.running_var]
        batch = [row.to(old.dtype) for row, old in zip(statistics[2:].unbind(), running, strict=True)]
        torch._foreach_lerp_(running, batch, norm.momentum)


def ulsam(
    x: torch.Tensor,
    weight_dw: torch.Tensor,
    bias_dw: torch.Tensor,
    norm_dw: Norm | None,
    weight_pw: torch.Tensor,
    bias_pw: torch.Tensor,
    norm_pw: Norm | None,
    map_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Subspace attention, as `reference.ulsam`, in one to four kernels forward and three backward.

    float64, empty batches, samples of 2**31 elements or more, maps of which the scale needs a gradient, and gradients
    of gradients are left to the plain version. Arguments and result as for `reference.ulsam`.

    Raises:
        ValueError: If a batch norm is to use the statistics of a single value for each channel.
    """
    if x.dim() == 4 and not _is_flat(x):
        x = x.contiguous(memory_format=_format(x))
    if x.dim() != 4 or not _is_supported(x, map_scale):
        return reference.ulsam(x, weight_dw, bias_dw, norm_dw, weight_pw, bias_pw, norm_pw, map_scale)
    if x.is_cuda and not torch.compiler.is_compiling() and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # Triton launches on the current one
            return ulsam(x, weight_dw, bias_dw, norm_dw, weight_pw, bias_pw, norm_pw, map_scale)

    tensors: list[list[torch.Tensor | None]] = []
    for norm, channels in ((norm_dw, x.shape[1]), (norm_pw, weight_pw.shape[0])):
        if norm is None:
            tensors.append([None] * 4)
        elif norm.training:
            if x.shape[0] * x.shape[2] * x.shape[3] == 1:
                size = torch.Size([1, channels, 1, 1])
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
            tensors.append([norm.weight, norm.bias, None, None])
        else:
            tensors.append([norm.weight, norm.bias, norm.running_mean, norm.running_var])
    inputs = [x, weight_dw, bias_dw, *tensors[0], weight_pw, bias_pw, *tensors[1], map_scale]
    # the kernels step through the elements of all but x, which may be slices of other tensors, or expanded
    inputs[1:] = [None if t is None else t.contiguous() for t in inputs[1:]]
    out, _, statistics_dw, statistics_pw = _forward(
        *inputs,
        norm_dw is not None and norm_dw.training, norm_pw is not None and norm_pw.training,
        1e-5 if norm_dw is None else norm_dw.eps, 1e-5 if norm_pw is None else norm_pw.eps,
    )  # fmt: skip
    with torch.no_grad():
        _update_running_statistics([(norm_dw, statistics_dw), (norm_pw, statistics_pw)])
    return out
