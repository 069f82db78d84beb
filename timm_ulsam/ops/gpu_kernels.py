"""Triton kernels of ULSAM's forward pass, and what the backward pass shares with them.

Arithmetic is in float32 whatever the dtype of x. What all kernels have in common:

- A 1x1 depthwise convolution and the batch norm behind it are one affine step per channel,
  `y = (x - centre) * scale + shift`. Every kernel folds it from the raw parameters by itself: a few loads, instead of
  launches that prepare constants. Likewise the batch norm of the maps.
- An affine step and ReLU keep or reverse the order of values, so the 3x3 max pool runs on `sign(scale) * x`, which is
  exact, and the affine step follows once for each pooled value.
- Programs walk down the rows of a map and carry the maxima of the last rows in registers. A row outside of the map is
  replaced by the nearest one inside, which is in the window anyway.
- Pixels are addressed through one stride, so W strides of H must be flat; either that stride or the one of channels
  is 1 in the common memory formats, and Triton lays out its tiles accordingly.
- C_STEP, P_STEP and S_STEP divide the strides of channels and of pixels and the number of pixels: so the compiler
  knows where it may read wide words.
- Offsets inside a sample are 32 bits wide, those of samples 64.
"""

import threading

import triton
import triton.language as tl

# Where the constants of an affine step come from: statistics of this batch, running ones, or a folded layer.
BATCH = tl.constexpr(0)
RUNNING = tl.constexpr(1)
FOLDED = tl.constexpr(2)


@triton.jit
def nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


# without a GPU driver there is nothing to time: the interpreter takes the default of every option
INTERPRETED = not isinstance(nan_maximum, triton.JITFunction)


def tuned(*num_warps: int, key: tuple[str, ...] = ("K", "H", "W", "stride_c"), options: tuple[dict, ...] = ({},)):
    """Choose among warps and options by timing, once for each of `key` and the dtypes of the arguments."""
    if INTERPRETED:
        return lambda kernel: kernel
    tune = triton.autotune([triton.Config(o, num_warps=n) for o in options for n in num_warps], key=list(key))

    def one_at_a_time(kernel):
        tuner = tune(kernel)
        tuner.__class__ = OneAtATime
        return tuner

    return one_at_a_time


class OneAtATime(triton.runtime.Autotuner):
    """Triton's autotuner for many threads, as of `nn.DataParallel`: it keeps the arguments of a launch on itself.

    See https://github.com/triton-lang/triton/issues/11494.
    """

    lock = threading.RLock()

    def run(self, *args, **kwargs):
        with self.lock:
            return super().run(*args, **kwargs)


@triton.jit
def channel_affine(c, mask, channels, weight, bias, gamma, beta, mean, var, eps, MODE: tl.constexpr):
    """Scale, centre and shift of channels `c`; in mode BATCH `mean` holds two rows, the mean and the variance of x."""
    a = tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    if MODE == BATCH:
        # the centre is kept apart: where the mean is large, scale * x + shift would cancel
        centre = tl.load(mean + c, mask=mask, other=0.0)
        inverse = tl.rsqrt(a * a * tl.load(mean + channels + c, mask=mask, other=0.0) + eps)
        scale = tl.load(gamma + c, mask=mask, other=0.0).to(tl.float32) * a * inverse
        shift = tl.load(beta + c, mask=mask, other=0.0).to(tl.float32)
    else:
        b = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
        centre = tl.zeros_like(a)
        if MODE == RUNNING:
            inverse = tl.rsqrt(tl.load(var + c, mask=mask, other=1.0).to(tl.float32) + eps)
            inverse *= tl.load(gamma + c, mask=mask, other=0.0).to(tl.float32)
            scale = a * inverse
            shift = (b - tl.load(mean + c, mask=mask, other=0.0).to(tl.float32)) * inverse
            shift += tl.load(beta + c, mask=mask, other=0.0).to(tl.float32)
        else:
            scale = a
            shift = b
    return scale, centre, shift


@triton.jit
def sign_of(scale):
    return tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))


@triton.jit
def map_affine(g, groups, gamma, beta, mean, var, eps, MODE: tl.constexpr):
    """Centre, inverse deviation, weight and shift of the batch norm of map `g`; rows of `mean` as in channels."""
    if MODE == FOLDED:
        return 0.0, 1.0, 1.0, 0.0
    else:
        centre = tl.load(mean + g).to(tl.float32)
        variance = tl.load(mean + groups + g) if MODE == BATCH else tl.load(var + g).to(tl.float32)
        weight = tl.load(gamma + g).to(tl.float32)
        return centre, tl.rsqrt(variance + eps), weight, tl.load(beta + g).to(tl.float32)


@triton.jit
def softmax_statistics(z_map, size, centre, factor, shift, P_BLOCK: tl.constexpr):
    """Largest score behind ReLU, and the sum of exponentials relative to it."""
    # ReLU leaves nothing below zero, so the peak may start there; NaN reaches the sum through exp
    peak = 0.0
    total = 0.0
    for first in range(0, size, P_BLOCK):
        p = first + tl.arange(0, P_BLOCK)
        score = (tl.load(z_map + p, mask=p < size, other=0.0) - centre) * factor + shift
        score = tl.where(p < size, nan_maximum(score, 0.0), float("-inf"))
        higher = tl.maximum(peak, tl.max(score, axis=0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(score - higher), axis=0)
        peak = higher
    return peak, total


@triton.jit
def border_of(sign, dtype: tl.constexpr):
    """What stands beside a map: `sign` times it is never the largest."""
    return tl.where(sign > 0, float("-inf"), tl.where(sign < 0, float("inf"), 0.0)).to(dtype)


@triton.jit
def neighbours(pixel, stride_p, in_left, in_middle, in_right, border, sign, MASKED: tl.constexpr):
    """`sign` times the values to the left of, at and to the right of pointers to pixels."""
    left = tl.load(pixel - stride_p, mask=in_left, other=border).to(tl.float32)
    middle = (tl.load(pixel, mask=in_middle, other=0.0) if MASKED else tl.load(pixel)).to(tl.float32)
    right = tl.load(pixel + stride_p, mask=in_right, other=border).to(tl.float32)
    return left * sign, middle * sign, right * sign


@triton.jit
def row_maximum(pixel, stride_p, in_left, in_middle, in_right, border, sign, MASKED: tl.constexpr):
    left, middle, right = neighbours(pixel, stride_p, in_left, in_middle, in_right, border, sign, MASKED)
    return nan_maximum(nan_maximum(left, middle), right)


@triton.jit
def score_rows(
    x_map,  # first channel of the group in its sample
    z_map, first, last, first_column, g, channels, weight_dw, bias_dw, gamma_dw, beta_dw, mean_dw, var_dw,
    weight_pw, bias_pw, eps, H, W, stride_c, stride_p, K: tl.constexpr, K_BLOCK: tl.constexpr,
    W_BLOCK: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Write rows `first` to `last` of a group's scores; their number, mean and sum of squared deviations."""
    w = first_column + tl.arange(0, W_BLOCK)
    valid = w < W
    columns = (tl.minimum(w, W - 1) * stride_p)[None, :]
    stride_h = W * stride_p
    k = tl.arange(0, K_BLOCK)
    inside = k < K
    in_left = inside[:, None] & ((w > 0) & valid)[None, :]
    in_middle = inside[:, None]
    in_right = inside[:, None] & (w + 1 < W)[None, :]
    MASKED: tl.constexpr = K % K_BLOCK != 0
    scale, centre, shift = channel_affine(
        g * K + k, inside, channels, weight_dw, bias_dw, gamma_dw, beta_dw, mean_dw, var_dw, eps, MODE
    )
    weight = tl.load(weight_pw + g * K + k, mask=inside, other=0.0).to(tl.float32)[:, None]
    sign = sign_of(scale)[:, None]
    border = border_of(sign, x_map.dtype.element_ty)
    scale = scale[:, None]
    centre = centre[:, None]
    shift = shift[:, None]
    offset = (k * stride_c)[:, None] + columns
    bias = tl.load(bias_pw + g).to(tl.float32)
    mean = tl.zeros([W_BLOCK], tl.float32)
    squares = tl.zeros([W_BLOCK], tl.float32)
    if K <= K_BLOCK:
        x_row = x_map + tl.maximum(first - 1, 0) * stride_h
        above = row_maximum(x_row + offset, stride_p, in_left, in_middle, in_right, border, sign, MASKED)
        x_row = x_map + first * stride_h
        here = row_maximum(x_row + offset, stride_p, in_left, in_middle, in_right, border, sign, MASKED)
        x_row = x_map + tl.minimum(first + 1, H - 1) * stride_h
        below = row_maximum(x_row + offset, stride_p, in_left, in_middle, in_right, border, sign, MASKED)
        for h in range(first, last):
            # asked for one row ahead: memory answers while this row is summed
            x_row = x_map + tl.minimum(h + 2, H - 1) * stride_h
            beyond = row_maximum(x_row + offset, stride_p, in_left, in_middle, in_right, border, sign, MASKED)
            y = nan_maximum(nan_maximum(above, here), below)
            y = (y - sign * centre) * tl.abs(scale) + shift
            score = tl.sum(nan_maximum(y, 0.0) * weight, axis=0) + bias
            tl.store(z_map + h * W + w, score, mask=valid)
            deviation = score - mean
            mean += deviation / (h - first + 1)
            squares += deviation * (score - mean)
            above = here
            here = below
            below = beyond
    else:
        # too many channels to carry rows of all of them
        for h in range(first, last):
            total = tl.zeros([K_BLOCK, W_BLOCK], tl.float32)
            for first_channel in range(0, K, K_BLOCK):
                k = first_channel + tl.arange(0, K_BLOCK)
                inside = k < K
                in_left = inside[:, None] & ((w > 0) & valid)[None, :]
                in_middle = inside[:, None]
                in_right = inside[:, None] & (w + 1 < W)[None, :]
                part_scale, part_centre, part_shift = channel_affine(
                    g * K + k, inside, channels, weight_dw, bias_dw, gamma_dw, beta_dw, mean_dw, var_dw, eps, MODE
                )
                weight = tl.load(weight_pw + g * K + k, mask=inside, other=0.0).to(tl.float32)[:, None]
                sign = sign_of(part_scale)[:, None]
                border = border_of(sign, x_map.dtype.element_ty)
                offset = (k * stride_c)[:, None] + columns
                y = tl.full([K_BLOCK, W_BLOCK], float("-inf"), tl.float32)
                for step in tl.static_range(-1, 2):
                    x_row = x_map + tl.minimum(tl.maximum(h + step, 0), H - 1) * stride_h
                    row = row_maximum(x_row + offset, stride_p, in_left, in_middle, in_right, border, sign, MASKED)
                    y = nan_maximum(y, row)
                y = (y - sign * part_centre[:, None]) * tl.abs(part_scale)[:, None] + part_shift[:, None]
                total += nan_maximum(y, 0.0) * weight
            score = tl.sum(total, axis=0) + bias
            tl.store(z_map + h * W + w, score, mask=valid)
            deviation = score - mean
            mean += deviation / (h - first + 1)
            squares += deviation * (score - mean)
    rows = (last - first) * 1.0
    width = tl.minimum(W - first_column, W_BLOCK) * 1.0
    average = tl.sum(tl.where(valid, mean, 0.0), axis=0) / width
    deviation = tl.where(valid, mean - average, 0.0)
    squares = tl.sum(tl.where(valid, squares, 0.0), axis=0) + rows * tl.sum(deviation * deviation, axis=0)
    return rows * width, average, squares


@tuned(4, 8, key=("channels", "size", "stride_c"))
@triton.jit
def statistics_kernel(
    x,
    partials,  # (parts, 3, C): count, mean, sum of squared deviations
    batch, size, channels, stride_n, stride_c, stride_p,
    samples,  # of each part
    pixels,  # a multiple of P_BLOCK
    C_STEP: tl.constexpr, P_STEP: tl.constexpr, S_STEP: tl.constexpr,
    C_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of C_BLOCK channels over a part of the batch. Grid: (blocks of channels, parts)."""
    stride_c = stride_c // C_STEP * C_STEP
    stride_p = stride_p // P_STEP * P_STEP
    size = size // S_STEP * S_STEP
    part = tl.program_id(1)
    tiles = tl.cdiv(size, pixels)
    first = (part // tiles) * samples
    begin = (part % tiles) * pixels
    end = tl.minimum(begin + pixels, size)
    c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    inside = c < channels
    x_sample = x + first.to(tl.int64) * stride_n
    # every lane keeps its own mean (Welford): no cancellation, and nothing to exchange until the end
    count = tl.zeros([1, P_BLOCK], tl.float32)
    mean = tl.zeros([C_BLOCK, P_BLOCK], tl.float32)
    squares = tl.zeros([C_BLOCK, P_BLOCK], tl.float32)
    for _ in range(first, tl.minimum(first + samples, batch)):
        for pixel in range(begin, end, P_BLOCK):
            p = (pixel + tl.arange(0, P_BLOCK))[None, :]
            offset = c[:, None] * stride_c + p * stride_p
            value = tl.load(x_sample + offset, mask=inside[:, None] & (p < size), other=0.0).to(tl.float32)
            count += (p < size).to(tl.float32)
            deviation = tl.where(p < size, value - mean, 0.0)
            mean += deviation * (1.0 / tl.maximum(count, 1.0))
            squares += deviation * (value - mean)
        x_sample += stride_n
    total = tl.sum(count, axis=1)
    average = tl.sum(mean * count, axis=1) / total
    deviation = mean - average[:, None]
    squares = tl.sum(squares + count * deviation * deviation, axis=1)
    row = partials + part * 3 * channels + c
    tl.store(row, tl.zeros_like(average) + total, mask=inside)
    tl.store(row + channels, average, mask=inside)
    tl.store(row + 2 * channels, squares, mask=inside)


@triton.jit
def merge_statistics_kernel(
    partials,
    statistics,  # (4, C): mean and biased variance of x; mean and unbiased variance as published, of a * x + b
    weight_dw, bias_dw, parts, channels, count, C_BLOCK: tl.constexpr, PART_BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of all parts. Grid: (blocks of channels,)."""
    c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    inside = c < channels
    total = tl.zeros([PART_BLOCK, C_BLOCK], tl.float32)
    for first in range(0, parts, PART_BLOCK):
        part = (first + tl.arange(0, PART_BLOCK))[:, None]
        mask = (part < parts) & inside[None, :]
        row = partials + part * 3 * channels + c[None, :]
        total += tl.load(row, mask=mask, other=0.0) * tl.load(row + channels, mask=mask, other=0.0)
    mean = tl.sum(total, axis=0) / (count * 1.0)
    total = tl.zeros([PART_BLOCK, C_BLOCK], tl.float32)
    for first in range(0, parts, PART_BLOCK):
        part = (first + tl.arange(0, PART_BLOCK))[:, None]
        mask = (part < parts) & inside[None, :]
        row = partials + part * 3 * channels + c[None, :]
        deviation = tl.load(row + channels, mask=mask, other=0.0) - mean[None, :]
        total += tl.load(row + 2 * channels, mask=mask, other=0.0)
        total += tl.load(row, mask=mask, other=0.0) * deviation * deviation
    squares = tl.sum(total, axis=0)
    a = tl.load(weight_dw + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias_dw + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(statistics + c, mean, mask=inside)
    tl.store(statistics + channels + c, squares / (count * 1.0), mask=inside)
    tl.store(statistics + 2 * channels + c, a * mean + b, mask=inside)
    tl.store(statistics + 3 * channels + c, a * a * squares / (count * 1.0 - 1.0), mask=inside)


@tuned(2, 4, 8)
@triton.jit
def score_kernel(
    x,
    z,  # (N, g, H, W)
    partials,  # (g, N * tiles, 3) as in statistics_kernel
    weight_dw, bias_dw, gamma_dw, beta_dw, mean_dw, var_dw, weight_pw, bias_pw, eps, H, W, groups, batch,
    stride_n, stride_c, stride_p,
    rows,  # of each program
    C_STEP: tl.constexpr, P_STEP: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, W_BLOCK: tl.constexpr,
    MODE: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """Scores before their batch norm. Grid: (N * g, tiles of rows, tiles of columns)."""
    stride_c = stride_c // C_STEP * C_STEP
    stride_p = stride_p // P_STEP * P_STEP
    n = tl.program_id(0) // groups
    g = tl.program_id(0) % groups
    x_map = x + n.to(tl.int64) * stride_n + g * K * stride_c
    z_map = z + tl.program_id(0).to(tl.int64) * H * W
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, H)
    count, mean, squares = score_rows(
        x_map, z_map, first, last, tl.program_id(2) * W_BLOCK, g, groups * K,
        weight_dw, bias_dw, gamma_dw, beta_dw, mean_dw, var_dw, weight_pw, bias_pw, eps,
        H, W, stride_c, stride_p, K, K_BLOCK, W_BLOCK, MODE,
    )  # fmt: skip
    if STATISTICS:
        tiles = tl.num_programs(1) * tl.num_programs(2)
        tile = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
        row = partials + ((g * batch + n) * tiles + tile) * 3
        tl.store(row, count)
        tl.store(row + 1, mean)
        tl.store(row + 2, squares)


@triton.jit
def merge_map_statistics(partials, g, parts, PART_BLOCK: tl.constexpr):
    """Count, mean and sum of squared deviations of map `g` over the batch."""
    count = tl.zeros([PART_BLOCK], tl.float32)
    total = tl.zeros([PART_BLOCK], tl.float32)
    for first in range(0, parts, PART_BLOCK):
        part = first + tl.arange(0, PART_BLOCK)
        row = partials + (g * parts + part) * 3
        here = tl.load(row, mask=part < parts, other=0.0)
        count += here
        total += here * tl.load(row + 1, mask=part < parts, other=0.0)
    number = tl.sum(count, axis=0)
    mean = tl.sum(total, axis=0) / number
    total = tl.zeros([PART_BLOCK], tl.float32)
    for first in range(0, parts, PART_BLOCK):
        part = first + tl.arange(0, PART_BLOCK)
        row = partials + (g * parts + part) * 3
        deviation = tl.load(row + 1, mask=part < parts, other=0.0) - mean
        total += tl.load(row + 2, mask=part < parts, other=0.0)
        total += tl.load(row, mask=part < parts, other=0.0) * deviation * deviation
    return number, mean, tl.sum(total, axis=0)


@tuned(4, 8, key=("K", "size", "stride_c"))
@triton.jit
def attend_kernel(
    x, z, out, partials,
    statistics,  # (4, g): mean and biased variance of the scores; mean and unbiased variance again, as published
    gamma_pw, beta_pw, mean_pw, var_pw, map_scale, eps, size, groups, parts, stride_n, stride_c, stride_p,
    out_stride_n, out_stride_c, out_stride_p,
    share,  # channels of each program
    pixels,  # likewise, a multiple of P_BLOCK
    C_STEP: tl.constexpr, P_STEP: tl.constexpr, S_STEP: tl.constexpr,
    K: tl.constexpr, K_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr,
    PART_BLOCK: tl.constexpr, MODE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """`x * A + x` from the scores. Grid: (N * g, shares of a group's channels, of its pixels)."""
    size = size // S_STEP * S_STEP
    stride_c = stride_c // C_STEP * C_STEP
    stride_p = stride_p // P_STEP * P_STEP
    out_stride_c = out_stride_c // C_STEP * C_STEP
    out_stride_p = out_stride_p // P_STEP * P_STEP
    n = (tl.program_id(0) // groups).to(tl.int64)
    g = tl.program_id(0) % groups
    z_map = z + tl.program_id(0).to(tl.int64) * size
    if MODE == BATCH:
        number, centre, squares = merge_map_statistics(partials, g, parts, PART_BLOCK)
        factor = tl.load(gamma_pw + g).to(tl.float32) * tl.rsqrt(squares / number + eps)
        shift = tl.load(beta_pw + g).to(tl.float32)
        if (tl.program_id(0) < groups) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
            tl.store(statistics + g, centre)
            tl.store(statistics + groups + g, squares / number)
            tl.store(statistics + 2 * groups + g, centre)
            tl.store(statistics + 3 * groups + g, squares / (number - 1.0))
    else:
        centre, inverse, weight, shift = map_affine(g, groups, gamma_pw, beta_pw, mean_pw, var_pw, eps, MODE)
        factor = inverse * weight
    peak, total = softmax_statistics(z_map, size, centre, factor, shift, S_BLOCK)
    height = 1.0 / total
    if SCALED:
        height *= tl.load(map_scale + n).to(tl.float32)
    x_map = x + n * stride_n + g * K * stride_c
    out_map = out + n * out_stride_n + g * K * out_stride_c
    first_channel = tl.program_id(1) * share
    begin = tl.program_id(2) * pixels
    for first in range(begin, tl.minimum(begin + pixels, size), P_BLOCK):
        p = first + tl.arange(0, P_BLOCK)
        score = nan_maximum((tl.load(z_map + p, mask=p < size, other=0.0) - centre) * factor + shift, 0.0)
        attention = tl.exp(score - peak) * height
        for channel in range(first_channel, tl.minimum(first_channel + share, K), K_BLOCK):
            k = (channel + tl.arange(0, K_BLOCK))[:, None]
            mask = (k < K) & (p < size)[None, :]
            value = tl.load(x_map + k * stride_c + p[None, :] * stride_p, mask=mask, other=0.0).to(tl.float32)
            value += value * attention[None, :]
            tl.store(out_map + k * out_stride_c + p[None, :] * out_stride_p, value, mask=mask)


@tuned(2, 4, 8, options=({"KEEP": True}, {"KEEP": False}))
@triton.jit
def fused_kernel(
    x, z, out, weight_dw, bias_dw, gamma_dw, beta_dw, mean_dw, var_dw, weight_pw, bias_pw, gamma_pw, beta_pw,
    mean_pw, var_pw, map_scale, eps_dw, eps_pw, H, W, groups, stride_n, stride_c, stride_p, out_stride_n,
    out_stride_c, out_stride_p, K: tl.constexpr, K_BLOCK: tl.constexpr, W_BLOCK: tl.constexpr,
    P_BLOCK: tl.constexpr, C_STEP: tl.constexpr, P_STEP: tl.constexpr, S_STEP: tl.constexpr, MODE_DW: tl.constexpr,
    MODE_PW: tl.constexpr, SCALED: tl.constexpr, KEEP: tl.constexpr = True,
):  # fmt: skip
    """All of ULSAM on constants, where one group of one sample fits on chip. Grid: (N * g,)."""
    stride_c = stride_c // C_STEP * C_STEP
    stride_p = stride_p // P_STEP * P_STEP
    out_stride_c = out_stride_c // C_STEP * C_STEP
    out_stride_p = out_stride_p // P_STEP * P_STEP
    n = (tl.program_id(0) // groups).to(tl.int64)
    g = tl.program_id(0) % groups
    size = H * W // S_STEP * S_STEP
    x_map = x + n * stride_n + g * K * stride_c
    z_map = z + tl.program_id(0).to(tl.int64) * size
    k = tl.arange(0, K_BLOCK)[:, None]
    p = tl.arange(0, P_BLOCK)
    mask = (k < K) & (p < size)[None, :]
    pixels = x_map + k * stride_c + p[None, :] * stride_p
    if KEEP:
        # read at once and kept for the end: one trip to memory, the rows below come out of the L1 cache
        value = tl.load(pixels, mask=mask, other=0.0)
    score_rows(
        x_map, z_map, 0, H, 0, g, groups * K,
        weight_dw, bias_dw, gamma_dw, beta_dw, mean_dw, var_dw, weight_pw, bias_pw, eps_dw,
        H, W, stride_c, stride_p, K, K_BLOCK, W_BLOCK, MODE_DW,
    )  # fmt: skip
    tl.debug_barrier()  # other threads wrote the scores read next
    centre, inverse, weight, shift = map_affine(g, groups, gamma_pw, beta_pw, mean_pw, var_pw, eps_pw, MODE_PW)
    score = (tl.load(z_map + p, mask=p < size, other=0.0) - centre) * (inverse * weight) + shift
    score = tl.where(p < size, nan_maximum(score, 0.0), float("-inf"))
    attention = tl.exp(score - tl.max(score, axis=0))
    height = 1.0 / tl.sum(attention, axis=0)
    if SCALED:
        height *= tl.load(map_scale + n).to(tl.float32)
    if not KEEP:
        value = tl.load(pixels, mask=mask, other=0.0)
    result = value.to(tl.float32)
    result += result * (attention * height)[None, :]
    out_map = out + n * out_stride_n + g * K * out_stride_c
    tl.store(out_map + k * out_stride_c + p[None, :] * out_stride_p, result, mask=mask)
