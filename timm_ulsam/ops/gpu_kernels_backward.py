"""Triton kernels of ULSAM's backward pass; what they share with the forward pass is told in `gpu_kernels`.

Batch norm couples all samples through sums, which are known only after every program has seen its share. The gradient
of a score is linear in those sums: `dz = weight * inverse * (e - mean(e) - zhat * mean(e * zhat))`, where e is the
gradient behind the batch norm. So `map_gradient_kernel` sums channel gradients for the three maps e, 1 and zhat, and
`parameter_gradient_kernel` puts them together: x is read once for both.

Max pooling passes its gradient to the first largest value of each window, in the order of rows. Which one that is takes
9 codes, 3 * row + column; they live between two kernels of the backward pass, one byte each.
"""

import triton
import triton.language as tl

from .gpu_kernels import (
    BATCH,
    FOLDED,
    RUNNING,
    border_of,
    channel_affine,
    map_affine,
    nan_maximum,
    neighbours,
    sign_of,
    softmax_statistics,
    tuned,
)


@triton.jit
def row_winner(pixel, stride_p, in_left, in_middle, in_right, border, sign, MASKED: tl.constexpr):
    """First largest of three neighbours in a row, and its column."""
    left, middle, right = neighbours(pixel, stride_p, in_left, in_middle, in_right, border, sign, MASKED)
    code = tl.where(middle > left, 1, 0)
    best = tl.maximum(left, middle)
    code = tl.where(right > best, 2, code)
    return tl.maximum(best, right), code


@tuned(4, 8)
@triton.jit
def map_gradient_kernel(
    x, grad_out, z,
    grad_map,  # (N, g, H, W): gradient behind the batch norm of the scores
    codes,  # (N, C, H, W): winner of each window
    sums,  # (6, N, C): of winners above zero, for each of the maps e, 1 and zhat: gradient, gradient * (x - centre)
    map_sums,  # (2, g, N): of e and e * zhat
    softmax,  # (2, N * g): peak of the scores and height of the map
    weight_dw, bias_dw, gamma_dw, beta_dw, mean_dw, var_dw, gamma_pw, beta_pw, mean_pw, var_pw, map_scale,
    eps_dw, eps_pw, H, W, groups, batch, stride_n, stride_c, stride_p, grad_stride_n, grad_stride_c, grad_stride_p,
    code_stride_n, code_stride_c, code_stride_p,
    C_STEP: tl.constexpr, P_STEP: tl.constexpr, S_STEP: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr,
    P_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr, KW_BLOCK: tl.constexpr, W_BLOCK: tl.constexpr,
    MODE_DW: tl.constexpr, MODE_PW: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Gradient of a group's map, and its share in the gradients of the parameters. Grid: (N * g,)."""
    stride_c = stride_c // C_STEP * C_STEP
    stride_p = stride_p // P_STEP * P_STEP
    grad_stride_c = grad_stride_c // C_STEP * C_STEP
    grad_stride_p = grad_stride_p // P_STEP * P_STEP
    n = (tl.program_id(0) // groups).to(tl.int64)
    g = tl.program_id(0) % groups
    size = H * W // S_STEP * S_STEP
    channels = groups * K
    x_map = x + n * stride_n + g * K * stride_c
    z_map = z + tl.program_id(0).to(tl.int64) * size
    e_map = grad_map + tl.program_id(0).to(tl.int64) * size
    z_centre, z_inverse, z_weight, z_shift = map_affine(g, groups, gamma_pw, beta_pw, mean_pw, var_pw, eps_pw, MODE_PW)
    z_factor = z_inverse * z_weight
    peak, total = softmax_statistics(z_map, size, z_centre, z_factor, z_shift, S_BLOCK)
    height = 1.0 / total
    map_factor = 1.0
    if SCALED:
        map_factor = tl.load(map_scale + n).to(tl.float32)

    grad_group = grad_out + n * grad_stride_n + g * K * grad_stride_c
    dot = 0.0
    for first in range(0, size, P_BLOCK):
        p = first + tl.arange(0, P_BLOCK)
        product = tl.zeros([K_BLOCK, P_BLOCK], tl.float32)
        for channel in range(0, K, K_BLOCK):
            k = (channel + tl.arange(0, K_BLOCK))[:, None]
            mask = (k < K) & (p < size)[None, :]
            value = tl.load(x_map + k * stride_c + p[None, :] * stride_p, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(grad_group + k * grad_stride_c + p[None, :] * grad_stride_p, mask=mask, other=0.0)
            product += value * grad.to(tl.float32)
        grad = tl.sum(product, axis=0) * map_factor
        score = (tl.load(z_map + p, mask=p < size, other=0.0) - z_centre) * z_factor + z_shift
        attention = tl.exp(nan_maximum(score, 0.0) - peak) * height
        dot += tl.sum(tl.where(p < size, attention * grad, 0.0), axis=0)
        tl.store(e_map + p, grad, mask=p < size)
    tl.debug_barrier()  # other threads wrote some of what is read next
    sum_e = 0.0
    sum_ez = 0.0
    for first in range(0, size, P_BLOCK):
        p = first + tl.arange(0, P_BLOCK)
        grad = tl.load(e_map + p, mask=p < size, other=0.0)
        z_hat = (tl.load(z_map + p, mask=p < size, other=0.0) - z_centre) * z_inverse
        score = z_hat * z_weight + z_shift
        attention = tl.exp(nan_maximum(score, 0.0) - peak) * height
        # a score that is not a number must not turn its gradient into zero
        e = tl.where(score <= 0.0, 0.0, attention * (grad - dot))
        e = tl.where(p < size, e, 0.0)
        sum_e += tl.sum(e, axis=0)
        sum_ez += tl.sum(tl.where(p < size, e * z_hat, 0.0), axis=0)
        tl.debug_barrier()  # and is overwritten only when all threads have read it
        tl.store(e_map + p, e, mask=p < size)
    tl.store(map_sums + g * batch + n, sum_e)
    tl.store(map_sums + (groups + g) * batch + n, sum_ez)
    tl.store(softmax + tl.program_id(0), peak)
    tl.store(softmax + tl.num_programs(0) + tl.program_id(0), height * map_factor)
    tl.debug_barrier()

    code_map = codes + n * code_stride_n + g * K * code_stride_c
    sums += n * channels + g * K
    plane = batch * channels
    for channel in range(0, K, KW_BLOCK):
        k = channel + tl.arange(0, KW_BLOCK)
        inside = k < K
        scale, centre, shift = channel_affine(
            g * K + k, inside, channels, weight_dw, bias_dw, gamma_dw, beta_dw, mean_dw, var_dw, eps_dw, MODE_DW
        )
        # where the scale is zero all values tie, and no value tells which x was first
        flat = tl.max((inside & (scale == 0.0)).to(tl.int32), axis=0)
        k = k[:, None]
        inside = inside[:, None]
        scale = scale[:, None]
        centre = centre[:, None]
        shift = shift[:, None]
        sign = sign_of(scale)
        border = border_of(sign, x.dtype.element_ty)
        MASKED: tl.constexpr = K % KW_BLOCK != 0
        e_on = tl.zeros([KW_BLOCK, W_BLOCK], tl.float32)
        e_x = tl.zeros([KW_BLOCK, W_BLOCK], tl.float32)
        one_on = tl.zeros([KW_BLOCK, W_BLOCK], tl.float32)
        one_x = tl.zeros([KW_BLOCK, W_BLOCK], tl.float32)
        z_on = tl.zeros([KW_BLOCK, W_BLOCK], tl.float32)
        z_x = tl.zeros([KW_BLOCK, W_BLOCK], tl.float32)
        for column in range(0, W, W_BLOCK):
            w = column + tl.arange(0, W_BLOCK)
            offset = k * stride_c + (tl.minimum(w, W - 1) * stride_p)[None, :]
            code_offset = k * code_stride_c + w[None, :] * code_stride_p
            valid = inside & (w < W)[None, :]
            in_left = valid & (w > 0)[None, :]
            in_right = valid & (w + 1 < W)[None, :]
            above = tl.full([KW_BLOCK, W_BLOCK], float("-inf"), tl.float32)
            above_code = tl.zeros([KW_BLOCK, W_BLOCK], tl.int32)
            here, here_code = row_winner(x_map + offset, stride_p, in_left, inside, in_right, border, sign, MASKED)
            for h in range(0, H):
                # below the last row that row again, which wins nothing: it is not larger than itself
                x_row = x_map + tl.minimum(h + 1, H - 1) * W * stride_p
                below, below_code = row_winner(
                    x_row + offset, stride_p, in_left, inside, in_right, border, sign, MASKED
                )
                code = tl.where(here > above, here_code + 3, above_code)
                best = tl.maximum(above, here)
                code = tl.where(below > best, below_code + 6, code)
                best = tl.maximum(best, below)
                tl.store(code_map + h * W * code_stride_p + code_offset, code.to(tl.int8), mask=valid)
                value = best * sign
                if flat > 0:
                    corner = tl.maximum(h - 1, 0) * W + tl.maximum(w - 1, 0)
                    leader = tl.load(x_map + k * stride_c + corner[None, :] * stride_p, mask=valid, other=0.0)
                    value = tl.where(scale == 0.0, leader.to(tl.float32), value)
                value -= centre
                on = tl.where(valid & (value * scale + shift > 0.0), 1.0, 0.0)
                value = tl.where(on > 0.0, value, 0.0)
                e = tl.load(e_map + h * W + w, mask=w < W, other=0.0)[None, :]
                e_on += on * e
                e_x += value * e
                if MODE_PW == BATCH:
                    z_hat = (tl.load(z_map + h * W + w, mask=w < W, other=0.0)[None, :] - z_centre) * z_inverse
                    one_on += on
                    one_x += value
                    z_on += on * z_hat
                    z_x += value * z_hat
                above = here
                above_code = here_code
                here = below
                here_code = below_code
        k = channel + tl.arange(0, KW_BLOCK)
        tl.store(sums + k, tl.sum(e_on, axis=1), mask=k < K)
        tl.store(sums + plane + k, tl.sum(e_x, axis=1), mask=k < K)
        if MODE_PW == BATCH:
            tl.store(sums + 2 * plane + k, tl.sum(one_on, axis=1), mask=k < K)
            tl.store(sums + 3 * plane + k, tl.sum(one_x, axis=1), mask=k < K)
            tl.store(sums + 4 * plane + k, tl.sum(z_on, axis=1), mask=k < K)
            tl.store(sums + 5 * plane + k, tl.sum(z_x, axis=1), mask=k < K)


@triton.jit
def sum_samples(rows, batch, channels, k, K, K_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr):
    total = tl.zeros([N_BLOCK, K_BLOCK], tl.float32)
    for first in range(0, batch, N_BLOCK):
        n = (first + tl.arange(0, N_BLOCK))[:, None]
        total += tl.load(rows + n * channels + k[None, :], mask=(n < batch) & (k < K)[None, :], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def parameter_gradient_kernel(
    sums, map_sums,
    grads_dw,  # (7, C): weight, bias, weight and bias of the norm, weight of the pointwise convolution, 2 terms of dx
    grads_pw,  # (5, g): bias, weight and bias of the norm, 2 terms of dz
    weight_dw, bias_dw, gamma_dw, beta_dw, mean_dw, var_dw, weight_pw, gamma_pw, beta_pw, mean_pw, var_pw,
    eps_dw, eps_pw, batch, size, groups,
    K: tl.constexpr, K_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, MODE_DW: tl.constexpr, MODE_PW: tl.constexpr,
):  # fmt: skip
    """Gradients of all parameters. Grid: (g, blocks of a group's channels)."""
    g = tl.program_id(0)
    channels = groups * K
    plane = batch * channels
    count = (batch * 1.0) * size
    _, inverse, weight, _ = map_affine(g, groups, gamma_pw, beta_pw, mean_pw, var_pw, eps_pw, MODE_PW)
    sum_e = tl.zeros([N_BLOCK], tl.float32)
    sum_ez = tl.zeros([N_BLOCK], tl.float32)
    for first in range(0, batch, N_BLOCK):
        n = first + tl.arange(0, N_BLOCK)
        sum_e += tl.load(map_sums + g * batch + n, mask=n < batch, other=0.0)
        sum_ez += tl.load(map_sums + (groups + g) * batch + n, mask=n < batch, other=0.0)
    total_e = tl.sum(sum_e, axis=0)
    total_ez = tl.sum(sum_ez, axis=0)
    k = tl.program_id(1) * K_BLOCK + tl.arange(0, K_BLOCK)
    inside = k < K
    rows = sums + g * K
    on = sum_samples(rows, batch, channels, k, K, K_BLOCK, N_BLOCK)
    moved = sum_samples(rows + plane, batch, channels, k, K, K_BLOCK, N_BLOCK)
    mean_e = 0.0
    mean_ez = 0.0
    if MODE_PW == BATCH:
        # sums cancel the gradient of a bias in front of a batch norm, in exact arithmetic
        grad_bias = 0.0
        mean_e = total_e / count
        mean_ez = total_ez / count
        on -= mean_e * sum_samples(rows + 2 * plane, batch, channels, k, K, K_BLOCK, N_BLOCK)
        moved -= mean_e * sum_samples(rows + 3 * plane, batch, channels, k, K, K_BLOCK, N_BLOCK)
        on -= mean_ez * sum_samples(rows + 4 * plane, batch, channels, k, K, K_BLOCK, N_BLOCK)
        moved -= mean_ez * sum_samples(rows + 5 * plane, batch, channels, k, K, K_BLOCK, N_BLOCK)
    else:
        grad_bias = total_e * weight * inverse
    if tl.program_id(1) == 0:
        tl.store(grads_pw + g, grad_bias)
        tl.store(grads_pw + groups + g, total_ez)
        tl.store(grads_pw + 2 * groups + g, total_e)
        tl.store(grads_pw + 3 * groups + g, mean_e)
        tl.store(grads_pw + 4 * groups + g, mean_ez)

    on *= weight * inverse
    moved *= weight * inverse
    c = g * K + k
    scale, _, shift_dw = channel_affine(
        c, inside, channels, weight_dw, bias_dw, gamma_dw, beta_dw, mean_dw, var_dw, eps_dw, MODE_DW
    )
    grad_weight_pw = scale * moved + shift_dw * on
    w = tl.load(weight_pw + c, mask=inside, other=0.0).to(tl.float32)
    grad_scale = w * moved
    grad_shift = w * on
    a = tl.load(weight_dw + c, mask=inside, other=0.0).to(tl.float32)
    constant = tl.zeros_like(a)
    slope = tl.zeros_like(a)
    if MODE_DW == FOLDED:
        grad_a = grad_scale
        grad_b = grad_shift
        grad_gamma = tl.zeros_like(a)
    else:
        gamma = tl.load(gamma_dw + c, mask=inside, other=0.0).to(tl.float32)
        if MODE_DW == RUNNING:
            r = tl.rsqrt(tl.load(var_dw + c, mask=inside, other=1.0).to(tl.float32) + eps_dw)
            offset = tl.load(bias_dw + c, mask=inside, other=0.0).to(tl.float32)
            offset -= tl.load(mean_dw + c, mask=inside, other=0.0).to(tl.float32)
            grad_a = gamma * r * grad_scale
            grad_b = gamma * r * grad_shift
            grad_gamma = (a * grad_scale + offset * grad_shift) * r
        else:
            r = tl.rsqrt(a * a * tl.load(mean_dw + channels + c, mask=inside, other=1.0) + eps_dw)
            grad_a = grad_scale * gamma * eps_dw * r * r * r
            grad_b = tl.zeros_like(a)
            grad_gamma = a * r * grad_scale
            constant = -scale * grad_shift / count
            slope = -(gamma * a * r) * (a * r) * (a * r) * grad_scale / count
    tl.store(grads_dw + c, grad_a, mask=inside)
    tl.store(grads_dw + channels + c, grad_b, mask=inside)
    tl.store(grads_dw + 2 * channels + c, grad_gamma, mask=inside)
    tl.store(grads_dw + 3 * channels + c, grad_shift, mask=inside)
    tl.store(grads_dw + 4 * channels + c, grad_weight_pw, mask=inside)
    tl.store(grads_dw + 5 * channels + c, constant, mask=inside)
    tl.store(grads_dw + 6 * channels + c, slope, mask=inside)


@triton.jit
def score_gradient(e_row, z_row, w, valid, centre, inverse, factor, mean_e, mean_ez):
    e = tl.load(e_row + w, mask=valid, other=0.0)
    z_hat = (tl.load(z_row + w, mask=valid, other=0.0) - centre) * inverse
    return ((e - mean_e - z_hat * mean_ez) * factor)[None, :]


@tuned(2, 4, 8)
@triton.jit
def input_gradient_kernel(
    x, grad_out, z, grad_map, codes, softmax, grads_dw, grads_pw, grad_x,
    weight_dw, bias_dw, gamma_dw, beta_dw, mean_dw, var_dw, weight_pw, gamma_pw, beta_pw, mean_pw, var_pw,
    eps_dw, eps_pw, H, W, groups, stride_n, stride_c, stride_p, grad_stride_n, grad_stride_c, grad_stride_p,
    out_stride_n, out_stride_c, out_stride_p,  # of codes as well
    rows,  # of each program
    C_STEP: tl.constexpr, P_STEP: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, W_BLOCK: tl.constexpr,
    MODE_DW: tl.constexpr, MODE_PW: tl.constexpr,
):  # fmt: skip
    """Gradient of x. Grid: (N * g, tiles of rows, blocks of a group's channels times tiles of columns)."""
    stride_c = stride_c // C_STEP * C_STEP
    stride_p = stride_p // P_STEP * P_STEP
    grad_stride_c = grad_stride_c // C_STEP * C_STEP
    grad_stride_p = grad_stride_p // P_STEP * P_STEP
    out_stride_c = out_stride_c // C_STEP * C_STEP
    out_stride_p = out_stride_p // P_STEP * P_STEP
    n = (tl.program_id(0) // groups).to(tl.int64)
    g = tl.program_id(0) % groups
    channels = groups * K
    blocks = tl.cdiv(K, K_BLOCK)
    k = (tl.program_id(2) % blocks) * K_BLOCK + tl.arange(0, K_BLOCK)
    w = (tl.program_id(2) // blocks) * W_BLOCK + tl.arange(0, W_BLOCK)
    x_map = x + n * stride_n + g * K * stride_c
    grad_group = grad_out + n * grad_stride_n + g * K * grad_stride_c
    out_map = n * out_stride_n + g * K * out_stride_c
    z_map = z + tl.program_id(0).to(tl.int64) * H * W
    e_map = grad_map + tl.program_id(0).to(tl.int64) * H * W

    z_centre, z_inverse, z_weight, z_shift = map_affine(g, groups, gamma_pw, beta_pw, mean_pw, var_pw, eps_pw, MODE_PW)
    z_factor = z_inverse * z_weight
    mean_e = tl.load(grads_pw + 3 * groups + g)
    mean_ez = tl.load(grads_pw + 4 * groups + g)
    peak = tl.load(softmax + tl.program_id(0))
    height = tl.load(softmax + tl.num_programs(0) + tl.program_id(0))
    inside = k < K
    c = g * K + k
    scale, centre, shift = channel_affine(
        c, inside, channels, weight_dw, bias_dw, gamma_dw, beta_dw, mean_dw, var_dw, eps_dw, MODE_DW
    )
    factor = (scale * tl.load(weight_pw + c, mask=inside, other=0.0).to(tl.float32))[:, None]
    constant = tl.load(grads_dw + 5 * channels + c, mask=inside, other=0.0)[:, None]
    slope = tl.load(grads_dw + 6 * channels + c, mask=inside, other=0.0)[:, None]
    scale = scale[:, None]
    centre = centre[:, None]
    shift = shift[:, None]

    mask = inside[:, None] & (w < W)[None, :]
    in_left = inside[:, None] & ((w > 0) & (w <= W))[None, :]
    in_right = inside[:, None] & (w + 1 < W)[None, :]
    x_offset = k[:, None] * stride_c + w[None, :] * stride_p
    grad_offset = k[:, None] * grad_stride_c + w[None, :] * grad_stride_p
    out_offset = k[:, None] * out_stride_c + w[None, :] * out_stride_p
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, H)
    # what windows up to the row above gave to the row above, and to this one
    upper = tl.zeros([K_BLOCK, W_BLOCK], tl.float32)
    lower = tl.zeros([K_BLOCK, W_BLOCK], tl.float32)
    for h in range(first - 1, last + 1):
        row = tl.zeros_like(w) + h
        there = (row >= 0) & (row < H)
        finished = mask & (row > first)[None, :]  # the row above, after the windows of this row
        done = (h - 1) * W
        value = tl.load(x_map + done * stride_p + x_offset, mask=finished, other=0.0).to(tl.float32)
        grad = tl.load(grad_group + done * grad_stride_p + grad_offset, mask=finished, other=0.0).to(tl.float32)
        score = tl.load(z_map + done + w, mask=(row > first) & (w < W), other=0.0)
        code = codes + (out_map + h * W * out_stride_p) + out_offset
        left = tl.load(code - out_stride_p, mask=in_left & there[None, :], other=-1).to(tl.int32)
        middle = tl.load(code, mask=mask & there[None, :], other=-1).to(tl.int32)
        right = tl.load(code + out_stride_p, mask=in_right & there[None, :], other=-1).to(tl.int32)
        e_row = e_map + h * W
        z_row = z_map + h * W
        dz_left = score_gradient(
            e_row, z_row, w - 1, (w > 0) & (w <= W) & there, z_centre, z_inverse, z_factor, mean_e, mean_ez
        )
        dz_middle = score_gradient(e_row, z_row, w, (w < W) & there, z_centre, z_inverse, z_factor, mean_e, mean_ez)
        dz_right = score_gradient(
            e_row, z_row, w + 1, (w + 1 < W) & there, z_centre, z_inverse, z_factor, mean_e, mean_ez
        )
        # the winner of the window to the left lies in that window's right column, and so on
        upper = tl.where(left == 2, upper + dz_left, upper)
        upper = tl.where(middle == 1, upper + dz_middle, upper)
        upper = tl.where(right == 0, upper + dz_right, upper)
        attention = tl.exp(nan_maximum((score - z_centre) * z_factor + z_shift, 0.0) - peak) * height
        result = grad + grad * attention[None, :]
        value -= centre
        result = tl.where(value * scale + shift > 0.0, result + upper * factor, result)
        if MODE_DW == BATCH:
            result += constant + slope * value
        tl.store(grad_x + (out_map + done * out_stride_p) + out_offset, result, mask=finished)
        upper = tl.where(left == 5, lower + dz_left, lower)
        upper = tl.where(middle == 4, upper + dz_middle, upper)
        upper = tl.where(right == 3, upper + dz_right, upper)
        lower = tl.where(left == 8, dz_left, 0.0)
        lower = tl.where(middle == 7, lower + dz_middle, lower)
        lower = tl.where(right == 6, lower + dz_right, lower)
