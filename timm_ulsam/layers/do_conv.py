"""Depthwise Over-parameterized Convolution (DO-Conv).

Paper: `DO-Conv: Depthwise Over-parameterized Convolutional Layer` - https://arxiv.org/abs/2006.12030
"""

import math
import warnings
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import as_dtype, is_autocast
from ._checks import check_input, check_positive, divisors, is_positive, pair
from .replace import trained_as

torch.fx.wrap("check_input")
torch.fx.wrap("compose_kernel")


def _over_parameterized(w: torch.Tensor, matrix: torch.Tensor, depthwise: bool) -> torch.Tensor:
    """(out, in / groups, d_mul), (in, area, d_mul) to (out, in / groups, area)."""
    out, per_group, d_mul = w.shape
    channels, area = matrix.shape[0], matrix.shape[1]
    # In grouped layers row c of D is not the input channel c: rows follow the flat index o * (in / groups) + j of W,
    # modulo the input channels. Published weights were trained so.
    if depthwise:  # every matrix has one column to multiply with: cheaper elementwise
        return (matrix * w.reshape(channels, 1, d_mul)).sum(-1).reshape(out, per_group, area)
    columns = w.reshape(-1, channels, d_mul).permute(1, 2, 0)
    return torch.matmul(matrix, columns).permute(2, 0, 1).contiguous().view(out, per_group, area)


def compose_kernel(
    w: torch.Tensor,
    d: torch.Tensor | None,
    d_diag: torch.Tensor | None,
    kernel_size: tuple[int, int],
    depthwise: bool = False,
) -> torch.Tensor:
    """The plain kernel that a DO-Conv computes, differentiable.

    In float32 at least, under autocast too: next to the ones of `d_diag` half precision loses a small D. `depthwise`
    (as many groups as input and output channels) chooses the faster way to the same result.

    Shape: (out, in / groups, d_mul), (in, area, d_mul) twice to (out, in / groups, height, width); without `d` and
    `d_diag` (out, in / groups, 1) to (out, in / groups, 1, 1).
    """
    shape = (w.shape[0], w.shape[1], kernel_size[0], kernel_size[1])
    if d is None or d_diag is None:
        return w.reshape(shape)
    dtype = torch.promote_types(w.dtype, torch.float32)
    exact_w, exact_d = as_dtype(w, dtype), as_dtype(d, dtype)
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript drops what is inside
        if is_autocast(w.device):
            with torch.autocast(w.device.type, enabled=False):
                kernel = _over_parameterized(exact_w, exact_d + d_diag, depthwise)
            return as_dtype(kernel, w.dtype).reshape(shape)
    return as_dtype(_over_parameterized(exact_w, exact_d + d_diag, depthwise), w.dtype).reshape(shape)


def _in_float64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("meta" if tensor.is_meta else "cpu", torch.float64)  # not every device has float64


class DOConv2d(nn.Module):
    """A convolution whose kernel is the product of two trained factors, and which folds into a plain one.

    Every kernel is composed of a conventional one, W, over d_mul instead of height * width positions, and of a matrix
    D of each input channel: K[o, j, m] = sum over s of (D + d_diag)[c, m, s] * W[o, j, s]. D starts at zero and the
    constant `d_diag` holds identities, so that the layer starts as the plain convolution W. Nothing changes but the
    training: there are more parameters, no other function. 1x1 kernels have W only, and `d_mul` has no meaning there.

    State dicts of the published code (`W`, `D`, `d_diag`, `bias`) load as they are, strictly. So does one of a plain
    convolution, a folded layer's included: its `weight` becomes W, D becomes zero, and the layer stays trainable as a
    DO-Conv. A folded layer takes both kinds too, and stays folded.

    `weight` is the composed kernel, to be read and differentiated, not to be written: to initialize, change `W`.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), as `nn.Conv2d`.

    Args:
        in_channels: As for `nn.Conv2d`, and so are all others but `d_mul`.
        d_mul: Depth multiplier of D, height * width of the kernel if None. Less than that works as published, but
            starts as a zero kernel and cannot compose every kernel.

    Raises:
        ValueError: If an argument is none that `nn.Conv2d` can compute with, or `d_mul` is not positive; in `forward`,
            if the input is not of shape (N, in_channels, H, W).
    """

    __jit_unused_properties__: ClassVar[list[str]] = ["weight"]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        d_mul: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels, groups=groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups != 0:
                raise ValueError(f"groups={groups} does not divide {name}={channels}; accepted: {divisors(channels)}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair("kernel_size", kernel_size, 1)
        self.stride = pair("stride", stride, 1)
        self.padding = padding if isinstance(padding, str) else pair("padding", padding, 0)
        self.dilation = pair("dilation", dilation, 1)
        self.groups = groups
        self.depthwise = groups == in_channels == out_channels
        self.padding_mode = padding_mode
        # PyTorch's own checks of padding and its mode, and what it pads for both
        geometry = self.kernel_size, self.stride, self.padding, self.dilation, 1, False, padding_mode
        self._padding = list(nn.Conv2d(1, 1, *geometry, device="meta")._reversed_padding_repeated_twice)

        area = math.prod(self.kernel_size)
        if d_mul is not None:
            check_positive(d_mul=d_mul)
        self.d_mul = 1 if area == 1 else d_mul or area
        if self.d_mul < area:
            warnings.warn(
                f"d_mul={d_mul} is less than the kernel's area {area}: it starts as a zero kernel, of reduced rank",
                stacklevel=2,
            )
        # None in a folded layer
        self.W = nn.Parameter(torch.empty(out_channels, in_channels // groups, self.d_mul, **dd))
        if area > 1:
            self.D = nn.Parameter(torch.empty(in_channels, area, self.d_mul, **dd))
            self.register_buffer("d_diag", torch.empty(in_channels, area, self.d_mul, **dd))
        else:
            self.register_parameter("D", None)
            self.register_buffer("d_diag", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, **dd))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, d_mul: int | None = None) -> "DOConv2d":
        """A DO-Conv that computes what `conv` does and is trained from there.

        Args:
            conv: Its geometry, kernel, bias, device, dtype, mode, and what of it is trained are kept.
            d_mul: As for the class.

        Raises:
            ValueError: If `conv` is not an `nn.Conv2d` itself, or `d_mul` is too small to compose its kernel.
        """
        if type(conv) is not nn.Conv2d:
            raise ValueError(f"conv is of {type(conv).__name__}; accepted is nn.Conv2d, none of its subclasses")
        area = math.prod(conv.kernel_size)
        if area > 1 and is_positive(d_mul) and d_mul < area:
            raise ValueError(f"d_mul={d_mul} is too small for the kernel {conv.kernel_size}; accepted: from {area}")
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode
        channels = conv.in_channels, conv.out_channels
        # on the meta device, so that nothing is drawn at random
        layer = cls(*channels, conv.kernel_size, *geometry, d_mul=d_mul, device="meta", dtype=conv.weight.dtype)
        layer.load_state_dict({k: v.detach().clone() for k, v in conv.state_dict().items()}, assign=True)
        return trained_as(layer, conv, layer.bias)

    @property
    def weight(self) -> torch.Tensor:
        """The kernel (out_channels, in_channels / groups, height, width), composed of W and D; folded, a parameter."""
        if self.W is None:
            kernel = self._parameters.get("weight", self.__dict__.get("weight"))
            if kernel is None:
                raise AttributeError("this folded layer has no weight")
            return kernel
        return compose_kernel(self.W, self.D, self.d_diag, self.kernel_size, self.depthwise)

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        # of a folded layer DataParallel and pruning put a tensor in the place of the parameter
        if self.W is not None:
            raise AttributeError("the kernel is composed of W and D while the layer is not folded: set those")
        self.__dict__["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        self.__dict__.pop("weight", None)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"padding_mode={self.padding_mode!r}, d_mul={self.d_mul}, folded={self.W is None}"
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W as `nn.Conv2d` draws its weight, the same numbers from the same seed; D is zero."""
        kernel = self.weight if self.W is None else self.W
        nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))
        if self.D is not None:
            nn.init.zeros_(self.D)
            self.d_diag.copy_(self._diagonal(self.d_diag))
        if self.bias is not None:
            bound = 1 / math.sqrt(kernel[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def _diagonal(self, like: torch.Tensor) -> torch.Tensor:
        """Identities side by side, as many as fit into d_mul, then zeros; the same for every input channel."""
        area = math.prod(self.kernel_size)
        eye = torch.eye(area, dtype=like.dtype, device=like.device).repeat(1, self.d_mul // area)
        return F.pad(eye, (0, self.d_mul - eye.shape[1])).repeat(self.in_channels, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_input(x, self.in_channels)
        if self.W is None:
            weight = self.weight
        else:
            weight = compose_kernel(self.W, self.D, self.d_diag, self.kernel_size, self.depthwise)
        if self.padding_mode != "zeros":
            x = F.pad(x, self._padding, mode=self.padding_mode)
            return F.conv2d(x, weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def reparameterize(self) -> None:
        """Become a plain convolution, in place, with `weight` and `bias` alone: `--reparam` of timm's scripts.

        Computed in float64. A second call changes nothing, and neither does a first where W or D is itself computed
        (parametrization, pruning).
        """
        own = self._parameters
        if own.get("W") is None or "D" not in own:
            return
        tensors = [t if t is None else _in_float64(t) for t in (self.W, self.D, self.d_diag)]
        weight = compose_kernel(*tensors, self.kernel_size).to(self.W.device, self.W.dtype)
        # in the order of a plain convolution; where a property is, `register_parameter` refuses
        own["weight"] = nn.Parameter(weight, requires_grad=self.W.requires_grad)
        if "bias" in own:  # else it is computed
            own["bias"] = own.pop("bias")
        self.W = self.D = self.d_diag = None

    def convert_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str = "") -> None:
        """Bring what `state_dict` holds under `prefix` into the form of this layer, in place.

        An unfolded layer takes the weight of a plain convolution as W, a folded one composes W and D, in float64. What
        is already of this form, or does not fit together, stays.
        """
        if self.W is None:
            fold_state_dict(state_dict, prefix, self.kernel_size)
            return
        area = math.prod(self.kernel_size)
        weight = state_dict.get(f"{prefix}weight")
        if weight is None or weight.dim() != 4 or f"{prefix}W" in state_dict or self.d_mul < area:
            return
        # the first block only: were several equal, they would stay so
        state_dict[f"{prefix}W"] = F.pad(weight.flatten(2), (0, self.d_mul - area))
        if self.D is not None:
            state_dict[f"{prefix}D"] = weight.new_zeros(self.D.shape)
            state_dict[f"{prefix}d_diag"] = self._diagonal(weight)
        del state_dict[f"{prefix}weight"]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        if self.W is not None and f"{prefix}weight" in state_dict and self.d_mul < math.prod(self.kernel_size):
            errors.append(f"{prefix}weight: a plain kernel cannot be composed with d_mul={self.d_mul}")
        self.convert_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)


def fold_state_dict(state_dict: dict[str, torch.Tensor], prefix: str, kernel_size: tuple[int, int]) -> None:
    """Replace W, D and d_diag under `prefix` by the `weight` they compose, in place, if they fit together."""
    w, d, d_diag = (state_dict.get(prefix + name) for name in ("W", "D", "d_diag"))
    area = math.prod(kernel_size)
    if w is None or w.dim() != 3:
        return
    if area == 1:
        fits = w.shape[2] == 1
    else:
        fits = d is not None and d_diag is not None and d.shape == d_diag.shape and d.dim() == 3
        fits = fits and d.shape[1:] == (area, w.shape[2]) and w.shape[:2].numel() % d.shape[0] == 0
    if not fits:
        return
    factors = [None if area == 1 else _in_float64(t) for t in (d, d_diag)]
    state_dict[f"{prefix}weight"] = compose_kernel(_in_float64(w), *factors, kernel_size).to(w.device, w.dtype)
    for name in ("W", "D", "d_diag"):
        state_dict.pop(prefix + name, None)
