"""ULSAM on the CPU, from PyTorch's own operators: few passes over the data, each at the speed of memory.

A 1x1 depthwise convolution and the batch norm behind it are one affine map per channel. After the ReLU nothing is
negative, so a zero between rows bounds a pooling window as well as minus infinity does: with maps laid out flat, one
zero column and row between them, a 3x3 maximum is four maxima of that memory with itself, shifted. The batch goes
through in parts, which keeps what is between in the cache and in memory that the process already has.
"""

import threading
from typing import Any

import torch

from . import reference
from .fold import fold
from .reference import Norm, attention, batch_norm, is_channels_last

aten = torch.ops.aten
_thread = threading.local()

# Elements of x in one part of the batch: the best of the powers of two from 2^15 to 2^20 that were tried.
_PART = 1 << 19
# Elements of x up to which the number of operators weighs more than the passes over the data.
_SMALL = 1 << 17


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
    """Subspace attention; arguments and result as for `reference.ulsam`.

    Parameters are all float32, or all float64; `x` is of their type, or of half precision. No gradient is computed for
    `map_scale`.
    """
    if torch.is_grad_enabled():
        dw, pw = norm_dw or (None, None), norm_pw or (None, None)
        tensors = (x, weight_dw, bias_dw, weight_pw, bias_pw, *dw[:2], *pw[:2])
        if any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return _ULSAM.apply(*tensors, dw[2:], pw[2:], map_scale)
    if x.numel() <= _SMALL:
        z = _scores_small(x, weight_dw, bias_dw, norm_dw, weight_pw)
    else:
        z, _, _ = _scores(x, weight_dw, bias_dw, norm_dw, weight_pw)
    return _attend(x, attention(z, bias_pw, norm_pw, map_scale))


def _like(x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    # maps are g / C of x: cheaper to lay out anew than to read across
    return maps.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else maps


def _attend(x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """`reference.attend`, but no view, which nobody could change in place behind a function of autograd."""
    batch, channels, height, width = x.shape
    shape = (batch, maps.shape[1], channels // maps.shape[1], height, width)
    y, subspaces = torch.empty_like(x), x.view(shape)
    torch.addcmul(subspaces, subspaces, _like(x, maps).to(x.dtype).unsqueeze(2), out=y.view(shape))
    return y


def _parts(x: torch.Tensor, elements: int = 0) -> list[slice]:
    """Parts of the batch, of almost one size, the first the largest."""
    count = min(x.shape[0], max(1, -(-x.numel() // (elements or _PART))))
    size = -(-x.shape[0] // count)
    return [slice(i, min(i + size, x.shape[0])) for i in range(0, x.shape[0], size)]


def _workspace(like: torch.Tensor, *sizes: int) -> list[torch.Tensor]:
    """Flat tensors of the given sizes, in memory that this thread keeps and uses again in the next call.

    What they hold is undefined. Fresh memory would cost more than what is done with it: the operating system hands it
    over page by page. At most 16 MB of float32 are kept.
    """
    kept = getattr(_thread, "memory", None)
    if kept is None or kept.dtype != like.dtype or kept.numel() < sum(sizes):
        with torch.inference_mode(False):  # or it could be used in inference only
            kept = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
        # whole maps larger than a part are rare, and their memory is given back
        _thread.memory = kept if kept.numel() <= 8 * _PART else None
    return list(kept[: sum(sizes)].split(sizes))


def _buffer_like(x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """The beginning of `memory` in shape and memory format of `x`."""
    memory = memory.view(-1)[: x.numel()]
    if not is_channels_last(x):
        return memory.view(x.shape)
    batch, channels, height, width = x.shape
    return memory.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _per_channel(vector: torch.Tensor) -> torch.Tensor:
    return vector.view(1, -1, 1, 1)


def _batch_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel of (N, C, H, W), the variance of what is left without the mean."""
    mean = x.mean((0, 2, 3))
    squares = torch.zeros_like(mean)
    parts = _parts(x, _PART // 2)
    (memory,) = _workspace(x, x[parts[0]].numel())
    for part in parts:
        centred = _buffer_like(x[part], memory)
        torch.sub(x[part], _per_channel(mean), out=centred)
        squares += centred.square_().sum((0, 2, 3))
    return mean, squares / (x.numel() // x.shape[1])


def _fold(
    weight: torch.Tensor, bias: torch.Tensor, norm: Norm | None, mean: torch.Tensor | None, var: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, (C,), of a 1x1 depthwise convolution and batch norm; `mean` and `var` are those of its input."""
    if norm is None or not norm.training:
        return fold(weight, bias, norm)
    scale = weight * norm.weight * torch.rsqrt(weight.square() * var + norm.eps)
    return scale, norm.bias - scale * mean  # the convolution's bias leaves with the mean


def _scores(
    x: torch.Tensor, weight_dw: torch.Tensor, bias_dw: torch.Tensor, norm: Norm | None, weight_pw: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`reference.scores`, and mean and variance of the batch's channels where they are used."""
    weight = weight_dw.view(-1)
    x = x.to(weight.dtype)
    mean = var = None
    if norm is not None and norm.training:
        mean, var = _batch_statistics(x)
        if norm.running_mean is not None:
            count = x.numel() // x.shape[1]
            norm.running_mean.lerp_(weight * mean + bias_dw, norm.momentum)
            norm.running_var.lerp_(weight.square() * var * (count / (count - 1)), norm.momentum)
    scale, shift = _fold(weight, bias_dw, norm, mean, var)
    if is_channels_last(x):
        return _scores_channels_last(x, scale, shift, weight_pw.flatten(1)), mean, var
    return _scores_contiguous(x.contiguous(), scale, shift, weight_pw.flatten(1)), mean, var


def _scores_small(
    x: torch.Tensor, weight_dw: torch.Tensor, bias_dw: torch.Tensor, norm: Norm | None, weight_pw: torch.Tensor
) -> torch.Tensor:
    """`reference.scores` in the fewest operators; PyTorch's pooling is fast where the channels are last."""
    pixels = x.to(weight_dw.dtype).permute(0, 2, 3, 1).contiguous()
    y = torch.addcmul(bias_dw, pixels, weight_dw.view(-1)).permute(0, 3, 1, 2)
    y = torch.max_pool2d(batch_norm(y, norm).relu_(), 3, 1, 1).permute(0, 2, 3, 1)
    y = y.view(*y.shape[:3], *weight_pw.shape[:2]).mul_(weight_pw.flatten(1))
    return y.sum(-1).permute(0, 3, 1, 2).contiguous()


class _Flat:
    """Buffers for maps laid out flat, and their 3x3 maximum.

    Every map lies in (H + 1, W + 1) pixels, the last row and column zero. A pixel is one value, or all channels of a
    position.
    """

    def __init__(self, maps: int, height: int, width: int, pixel: int, like: torch.Tensor) -> None:
        self.shape = (height + 1, width + 1)
        self.row = (width + 1) * pixel
        self.pixel = pixel
        self.map = (height + 1) * self.row
        # above the first map lie a row and a pixel, as between two maps, and below the last one
        size = maps * self.map
        sizes = size + 2 * (self.row + pixel), size + 2 * self.row, size
        self.source, self.rows, self.result = _workspace(like, *sizes)
        self.source.zero_()

    def interior(self, maps: int) -> torch.Tensor:
        """Where the maps go, (maps, H, W, pixel)."""
        start = self.row + self.pixel
        whole = self.source[start : start + maps * self.map]
        return whole.view(maps, *self.shape, self.pixel)[:, :-1, :-1]

    def max_pool(self, maps: int) -> torch.Tensor:
        """3x3 maximum of the maps, flat: (maps * (H + 1) * (W + 1) * pixel,)."""
        size, pixel, row = maps * self.map, self.pixel, self.row
        source = self.source[: size + 2 * (row + pixel)]
        rows = self.rows[: size + 2 * row]
        torch.maximum(source[: -2 * pixel], source[pixel:-pixel], out=rows)
        torch.maximum(rows, source[2 * pixel :], out=rows)
        result = self.result[:size]
        torch.maximum(rows[: -2 * row], rows[row:-row], out=result)
        return torch.maximum(result, rows[2 * row :], out=result)


def _scores_contiguous(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = x.shape
    splits, depth = weight.shape
    weight, zero, one = weight.unsqueeze(1), torch.zeros_like(scale), torch.ones_like(scale)
    z = x.new_empty(batch, splits, height, width)
    parts = _parts(x)
    flat = _Flat(parts[0].stop * channels, height, width, 1, x)
    for part in parts:
        samples = part.stop - part.start
        maps = samples * channels
        # the quickest affine map per channel where channels are not last
        y = torch.batch_norm(x[part], scale, shift, zero, one, False, 0.0, 0.0, False)
        torch.clamp_min(y, 0, out=flat.interior(maps).view(y.shape))
        y = flat.max_pool(maps).view(samples, splits, depth, -1)
        z[part] = torch.matmul(weight, y).view(samples, splits, *flat.shape)[..., :-1, :-1]
    return z


def _scores_channels_last(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)
    z = x.new_empty(batch, weight.shape[0], height, width)
    parts = _parts(x)
    flat = _Flat(parts[0].stop, height, width, channels, x)
    for part in parts:
        samples = part.stop - part.start
        torch.addcmul(shift, pixels[part], scale, out=flat.interior(samples)).relu_()
        y = flat.max_pool(samples).view(samples, *flat.shape, *weight.shape)
        z[part] = y.mul_(weight).sum(-1).permute(0, 3, 1, 2)[..., :-1, :-1]
    return z


class _ULSAM(torch.autograd.Function):
    """`ulsam` with a backward of its own: it keeps x and the scores, and computes the rest of the forward again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_dw: torch.Tensor,
        bias_dw: torch.Tensor,
        weight_pw: torch.Tensor,
        bias_pw: torch.Tensor,
        norm_dw_weight: torch.Tensor | None,
        norm_dw_bias: torch.Tensor | None,
        norm_pw_weight: torch.Tensor | None,
        norm_pw_bias: torch.Tensor | None,
        dw: tuple,
        pw: tuple,
        map_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        norm_dw = Norm(norm_dw_weight, norm_dw_bias, *dw) if dw else None
        norm_pw = Norm(norm_pw_weight, norm_pw_bias, *pw) if pw else None
        z, mean, var = _scores(x, weight_dw, bias_dw, norm_dw, weight_pw)
        y = _attend(x, attention(z, bias_pw, norm_pw, map_scale))
        norms = [norm and _for_backward(norm) for norm in (norm_dw, norm_pw)]
        tensors = [tensor for norm in norms if norm for tensor in norm[:4]]
        ctx.save_for_backward(x, weight_dw, bias_dw, weight_pw, bias_pw, map_scale, z, mean, var, *tensors)
        ctx.settings = [norm and norm[4:] for norm in norms]
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_dw, bias_dw, weight_pw, bias_pw, map_scale, z, mean, var, *tensors = ctx.saved_tensors
        tensors = iter(tensors)
        dw, pw = (s and Norm(*(next(tensors) for _ in range(4)), *s) for s in ctx.settings)
        # the gradients are to be differentiated themselves, or there are many at once (vmap)
        again = torch.is_grad_enabled()
        if again or torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad):
            inputs = (x, weight_dw, bias_dw, weight_pw, bias_pw, *(dw or (None,) * 2)[:2], *(pw or (None,) * 2)[:2])
            with torch.enable_grad():
                as_wide = x.to(weight_dw.dtype)  # x may be half, outside autocast by now
                y = reference.ulsam(as_wide, weight_dw, bias_dw, dw, weight_pw, bias_pw, pw, map_scale).to(x.dtype)
            return *_gradients(y, inputs, grad, create_graph=again), None, None, None

        # of the maps, a g / C of x: as autograd has it
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            maps = attention(z, bias_pw, pw, map_scale)
        grad_maps = torch.empty_like(maps)
        for part in _parts(x):
            product = (x[part] * grad[part]).to(maps.dtype)
            grad_maps[part] = product.unflatten(1, (maps.shape[1], -1)).sum(2)
        grad_z, grad_bias_pw, *grad_pw = _gradients(maps, (z, bias_pw, *(pw or (None,) * 2)[:2]), grad_maps)

        sums = _scores_backward(x, weight_dw, bias_dw, dw, weight_pw, mean, var, grad, maps.detach(), grad_z)
        grad_x, grad_dw, grad_bias_dw, grad_weight_pw, *grad_norm_dw = sums
        return grad_x, grad_dw, grad_bias_dw, grad_weight_pw, grad_bias_pw, *grad_norm_dw, *grad_pw, None, None, None


def _for_backward(norm: Norm) -> Norm:
    if norm.training:  # on statistics of the batch: the running ones were updated, and must not be again
        return norm._replace(running_mean=None, running_var=None)
    # copies, for a training step may update them before backward
    return norm._replace(running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone())


def _gradients(
    y: torch.Tensor, inputs: tuple[torch.Tensor | None, ...], grad: torch.Tensor, create_graph: bool = False
) -> list[torch.Tensor | None]:
    """Gradients of the inputs that need one, None for the others."""
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph))
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs]


def _scores_backward(
    x: torch.Tensor,
    weight_dw: torch.Tensor,
    bias: torch.Tensor,
    norm: Norm | None,
    weight_pw: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    grad_y: torch.Tensor,
    maps: torch.Tensor,
    grad_z: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, all of it, and of `weight_dw`, bias, `weight_pw`, and the norm's weight and bias."""
    weight, weight_pw = weight_dw.view(-1), weight_pw.flatten(1)
    scale, shift = _fold(weight, bias, norm, mean, var)
    if mean is not None:
        shift = norm.bias  # of x without its mean: sums of products with x would cancel
    grad_x = torch.empty_like(x, dtype=weight.dtype)
    grad_weight_pw = torch.zeros_like(weight_pw)
    grad_scale, grad_shift = torch.zeros_like(scale), torch.zeros_like(scale)
    # (positions, C), channels last whatever x is: there PyTorch's pooling is fast; the same memory for every part
    channels, height, width = x.shape[1:]
    parts = _parts(x, _PART // 2)
    positions = parts[0].stop * height * width
    size = positions * channels
    # with pixels a power of two apart, to read one channel of all would evict itself from the cache
    wide = channels + 16
    indices, *buffers, spread = _workspace(weight, size * (8 // weight.itemsize), *(size,) * 4, positions * wide)
    buffers = [buffer.view(positions, channels) for buffer in (indices.view(torch.int64), *buffers)]
    for part in parts:
        shape = (part.stop - part.start, height, width, channels)
        indices, pixels, y, pooled, grad = (buffer[: shape[0] * height * width] for buffer in buffers)
        indices4, y4, pooled4, grad4 = (t.view(shape).permute(0, 3, 1, 2) for t in (indices, y, pooled, grad))
        if mean is None:
            pixels.view(shape).copy_(x[part].permute(0, 2, 3, 1))
        else:
            torch.sub(x[part].permute(0, 2, 3, 1), mean, out=pixels.view(shape))
        torch.addcmul(shift, pixels, scale, out=y).relu_()
        aten.max_pool2d_with_indices.out(y4, [3, 3], [1, 1], [1, 1], out=pooled4, indices=indices4)
        grad_scores = grad_z[part].permute(0, 2, 3, 1).reshape(-1, weight_pw.shape[0], 1)
        grad_weight_pw += pooled.view(-1, *weight_pw.shape).mul_(grad_scores).sum(0)
        torch.mul(grad_scores, weight_pw, out=grad.view(-1, *weight_pw.shape))
        aten.max_pool2d_with_indices_backward.grad_input(
            grad4, y4, [3, 3], [1, 1], [1, 1], [1, 1], False, indices4, grad_input=pooled4
        )
        grad = aten.threshold_backward.grad_input(pooled, y, 0, grad_input=pooled)
        grad_shift += grad.sum(0)
        grad_scale += pixels.mul_(grad).sum(0)
        spread_part = spread[: len(grad) * wide].view(*shape[:3], wide)[..., :channels]
        torch.mul(grad.view(shape), scale, out=spread_part)
        grad_part, grad_y_part = grad_x[part], grad_y[part].to(weight.dtype)
        torch.add(spread_part.permute(0, 3, 1, 2), grad_y_part, out=grad_part)
        splits = (weight_pw.shape[0], -1)
        grad_part = grad_part.unflatten(1, splits)
        grad_part.addcmul_(grad_y_part.unflatten(1, splits), _like(x, maps[part]).unsqueeze(2))

    grad_weight_pw = grad_weight_pw.view(*weight_pw.shape, 1, 1)
    if norm is None:
        return grad_x.to(x.dtype), grad_scale.view(weight_dw.shape), grad_shift, grad_weight_pw, None, None
    if mean is None:
        rstd = torch.rsqrt(norm.running_var + norm.eps)
        grad_weight = grad_scale * norm.weight * rstd
        grad_bias = grad_shift * norm.weight * rstd
        grad_norm_weight = (weight * grad_scale + (bias - norm.running_mean) * grad_shift) * rstd
    else:
        # d scale / d weight = norm.weight * rstd^3 * eps, d scale / d var = -norm.weight * weight^3 * rstd^3 / 2
        rstd = torch.rsqrt(weight.square() * var + norm.eps)
        grad_weight = grad_scale * norm.weight * norm.eps * rstd.pow(3)
        grad_bias = torch.zeros_like(bias)  # it leaves with the mean
        grad_norm_weight = grad_scale * weight * rstd
        count = x.numel() // x.shape[1]
        grad_mean = _per_channel(-scale * grad_shift / count)
        grad_var = _per_channel(-grad_scale * norm.weight * (weight * rstd).pow(3) / count)
        for part in parts:
            centred = _buffer_like(x[part], buffers[1])
            torch.sub(x[part], _per_channel(mean), out=centred)
            grad_x[part].addcmul_(centred, grad_var).add_(grad_mean)
    return (
        grad_x.to(x.dtype),
        grad_weight.view(weight_dw.shape),
        grad_bias,
        grad_weight_pw,
        grad_norm_weight,
        grad_shift,
    )
