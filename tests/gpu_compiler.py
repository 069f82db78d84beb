"""Compile the GPU's kernels for a GPU that is not there, down to its machine code, and print their names.

In a process of its own, as Triton then takes the one named for the one at hand: `python tests/gpu_compiler.py 80`, the
compute capability without its point.
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from timm_ulsam.ops import gpu


class NoGPU:
    """Triton's driver of a GPU that can be compiled for, not run on."""

    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 64 * 1024})

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


compiled: set[str] = set()  # names of kernels


class Compiler:
    """In the place of `wrap_triton`: a launch compiles the kernel, in all ways that are tried out on a GPU."""

    def __init__(self, kernel: Any) -> None:
        tuned = isinstance(kernel, triton.runtime.Autotuner)
        self.kernel = kernel.fn if tuned else kernel
        self.options = [config.all_kwargs() for config in kernel.configs] if tuned else [{}]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            for options in self.options:
                assert self.kernel.warmup(*args, grid=grid, **kwargs, **options).asm["cubin"]
            compiled.add(self.kernel.__name__)

        return launch


def compile_all(dtype: torch.dtype, memory_format: torch.memory_format, training: bool) -> None:
    batch, channels, groups = 2, 96, 4
    x = torch.zeros(batch, channels, 14, 14, dtype=dtype).to(memory_format=memory_format)

    def norm(size: int) -> list[torch.Tensor | None]:
        return [torch.zeros(size), torch.zeros(size), *([None] * 2 if training else [torch.zeros(size)] * 2)]

    dw = [torch.zeros(channels, 1, 1, 1), torch.zeros(channels), *norm(channels)]
    weight_pw, bias_pw, *norm_pw = torch.zeros(groups, channels // groups, 1, 1), torch.zeros(groups), *norm(groups)
    last = [torch.ones(batch, 1, 1, 1), training, training, 1e-5, 1e-5]
    # what the operators do, without PyTorch's dispatch, which would ask for a GPU
    _, *kept = gpu._forward._init_fn(x, *dw, weight_pw, bias_pw, *norm_pw, *last)
    gpu._backward._init_fn(torch.zeros_like(x), x, *kept, *dw, weight_pw, *norm_pw, *last)


if __name__ == "__main__":
    capability = int(sys.argv[1])
    driver.set_active(NoGPU(capability))
    gpu.wrap_triton = Compiler
    compile_all(torch.float32, torch.contiguous_format, training=True)
    half = torch.bfloat16 if capability >= 80 else torch.float16
    compile_all(half, torch.channels_last, training=False)
    print(*sorted(compiled))
