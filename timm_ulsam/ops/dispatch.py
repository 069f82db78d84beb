"""Which version of ULSAM's arithmetic runs: decided here and nowhere else."""

import functools
import os
import warnings

import torch
from torch.autograd import forward_ad

from ..errors import InputError, KernelError
from . import compiled, cpu, onnx, reference
from .dtypes import is_autocast
from .reference import Norm

KERNELS = ("auto", "reference", "triton")
_HALF = (torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result
def _requested() -> str:
    kernel = os.environ.get("TIMM_ULSAM_KERNEL") or "auto"
    if kernel not in KERNELS:
        raise InputError(f"TIMM_ULSAM_KERNEL={kernel!r}; accepted: {', '.join(map(repr, KERNELS))}")
    return kernel


@torch.compiler.assume_constant_result
@functools.cache  # what cannot be imported is looked for once
def _gpu_missing() -> str:
    """Why the Triton kernels cannot be had; empty if they can."""
    try:
        from . import gpu
    except ImportError as error:
        return str(error)
    if gpu.INTERPRETED or not torch.cuda.is_available():
        return ""
    try:
        gpu.check_launcher()
    except Exception as error:  # of whatever builds it
        reason = f"Triton cannot launch kernels here: {' '.join(str(error).split())}"
        warnings.warn(f"ULSAM runs without its GPU kernels. {reason}", stacklevel=2)
        return reason
    return ""


@torch.compiler.assume_constant_result
@functools.cache
def _has_kernels(device: int, dtype: torch.dtype) -> bool:
    # NVIDIA's from Volta on, as Triton supports them; bfloat16 is in the hardware from Ampere on
    least = (8, 0) if dtype == torch.bfloat16 else (7, 0)
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= least


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
    """Subspace attention; arguments and result as for `reference.ulsam`, by the fastest version there is for them.

    The environment variable TIMM_ULSAM_KERNEL forces one: 'reference', the plain version, or 'triton', the kernels for
    GPUs (on other devices only under TRITON_INTERPRET=1). Without it, or with 'auto', kernels run where there is a GPU
    that has them. It is read at every call; compiled code keeps what it read when it was compiled.

    Raises:
        InputError: If TIMM_ULSAM_KERNEL names no version, a ValueError.
        KernelError: If it asks for kernels that cannot run (no Triton, or tensors not on a GPU), a RuntimeError.
    """
    args = (x, weight_dw, bias_dw, norm_dw, weight_pw, bias_pw, norm_pw, map_scale)
    kernel = _requested()
    if kernel == "reference":
        return reference.ulsam(*args)
    if torch.jit.is_tracing() or _is_exporting():
        return onnx.ulsam(*args) if torch.onnx.is_in_onnx_export() else reference.ulsam(*args)
    compiling = torch.compiler.is_compiling()
    if not compiling and _must_stay_plain(x):
        return reference.ulsam(*args)
    dtype = weight_dw.dtype
    if x.dtype != dtype and not is_autocast(x.device):
        return reference.ulsam(*args)  # which refuses mixed dtypes as any convolution does
    if kernel == "triton" or _takes_kernels(x):
        return _on_gpu(*args)
    if compiling:
        return compiled.ulsam(*args)
    if x.is_cpu and (x.dtype == dtype or x.dtype in _HALF) and dtype in (torch.float32, torch.float64):
        return _on_cpu(*args)
    return reference.ulsam(*args)


def _takes_kernels(x: torch.Tensor) -> bool:
    return x.is_cuda and _has_kernels(x.device.index, x.dtype) and not _gpu_missing()


def _must_stay_plain(x: torch.Tensor) -> bool:
    """Whether someone looks at the operators themselves, as FLOP counters do, or transforms each of them."""
    return (
        type(x) not in (torch.Tensor, torch.nn.Parameter)
        or x.numel() <= x.shape[1]  # nothing, or batch statistics of one value, which batch norm refuses
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


@torch.compiler.assume_constant_result  # PyTorch 2.8 would take it for true in whatever it compiles
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def _on_cpu(x: torch.Tensor, *args) -> torch.Tensor:
    if args[-1] is not None and args[-1].requires_grad:
        return reference.ulsam(x, *args)
    if not torch.is_autocast_enabled("cpu"):
        return cpu.ulsam(x, *args)
    with torch.autocast("cpu", enabled=False):  # float32 inside, whatever is around
        return cpu.ulsam(x, *args)


def _on_gpu(x: torch.Tensor, *args) -> torch.Tensor:
    if _gpu_missing():
        raise KernelError(f"TIMM_ULSAM_KERNEL='triton', but {_gpu_missing()}; accepted here: 'auto', 'reference'")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelError(
            f"TIMM_ULSAM_KERNEL='triton' with a tensor on {x.device}: the kernels run on GPUs, elsewhere only under "
            "TRITON_INTERPRET=1"
        )
    from . import gpu

    return gpu.ulsam(x, *args)
