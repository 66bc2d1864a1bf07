"""Triton kernels of modulated deformable convolution; ``deform_conv_triton.py`` launches them and says what they do.

Checked in Triton's interpreter and compiled for several GPUs, but not yet run on a GPU.

Terms, for all kernels: x is the input as a table of rows (b, y, x) of IN channels; a *pixel* is an output position,
also numbered (b, y, x); a *tap* is a cell of the kernel; a *segment* is a run of channels that lie in one group and in
one offset group (SEGMENT divides the channels of both). ``sizes`` is (batch, height, width, out_h, out_w) and CONV is
(kernel, stride, padding, dilation), each a pair (vertical, horizontal). Sampling positions, bilinear weights and sums
are float32 whatever the type of the tensors.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pixels(tile, sizes, TILE_P: tl.constexpr):
    """A tile of TILE_P output pixels: number, image, y, x, and whether there is such a pixel."""
    batch, _, _, out_h, out_w = sizes
    pixel = tile * TILE_P + tl.arange(0, TILE_P)
    place = pixel % (out_h * out_w)
    return pixel, pixel // (out_h * out_w), place // out_w, place % out_w, pixel < batch * out_h * out_w


@triton.jit
def _corners(offset, offset_strides, mask, mask_strides, sizes, pixels, group, tap, CONV):
    """Where ``pixels`` (of ``_pixels``) sample the input with ``tap`` in offset group ``group``.

    Of CONV the kernel must be known to the compiler, the rest may be numbers of the program.

    Returns:
        row: of the top left of the four neighbours, in x; meaningless where that one lies outside the map.
        top, bottom, left, right: which rows and columns of the neighbours lie inside the map.
        fraction_y, fraction_x: of the position, from the top left neighbour.
        factor: the mask, 1 without one.
        touching: whether the sample lies within less than a pixel of the map, where it can be other than zero; not of
            positions that are NaN.
    """
    kernel_h: tl.constexpr = CONV[0][0]
    kernel_w: tl.constexpr = CONV[0][1]
    _, height, width, _, _ = sizes
    _, image, y, x, live = pixels
    channel = group * (kernel_h * kernel_w) + tap
    at = offset + image.to(tl.int64) * offset_strides[0] + y * offset_strides[2] + x * offset_strides[3]
    at += 2 * channel * offset_strides[1]
    dy = tl.load(at, mask=live, other=0.0).to(tl.float32)
    dx = tl.load(at + offset_strides[1], mask=live, other=0.0).to(tl.float32)
    position_y = dy + (y * CONV[1][0] - CONV[2][0] + tap // kernel_w * CONV[3][0]).to(tl.float32)
    position_x = dx + (x * CONV[1][1] - CONV[2][1] + tap % kernel_w * CONV[3][1]).to(tl.float32)
    # far outside is as good as just outside, and fits into an integer; NaN stays and makes the sample NaN
    position_y = tl.clamp(position_y, -2.0, height + 1.0, tl.PropagateNan.ALL)
    position_x = tl.clamp(position_x, -2.0, width + 1.0, tl.PropagateNan.ALL)
    floor_y = tl.floor(position_y)
    floor_x = tl.floor(position_x)
    y0 = floor_y.to(tl.int32)
    x0 = floor_x.to(tl.int32)
    row = image.to(tl.int64) * (height * width) + y0 * width + x0
    factor = tl.full(y.shape, 1.0, tl.float32)
    if mask is not None:
        at = mask + image.to(tl.int64) * mask_strides[0] + y * mask_strides[2] + x * mask_strides[3]
        factor = tl.load(at + channel * mask_strides[1], mask=live, other=0.0).to(tl.float32)
    return (
        row,
        live & (y0 >= 0) & (y0 < height),
        live & (y0 >= -1) & (y0 < height - 1),
        (x0 >= 0) & (x0 < width),
        (x0 >= -1) & (x0 < width - 1),
        position_y - floor_y,
        position_x - floor_x,
        factor,
        (position_y > -1) & (position_x > -1),
    )


@triton.jit
def _load_rows(x, row, channel, row_live, channel_live, IN: tl.constexpr):
    """float32 (rows, channels) of the table x, zero where not live."""
    live = row_live[:, None] & channel_live[None, :]
    return tl.load(x + row[:, None] * IN + channel[None, :], mask=live, other=0.0).to(tl.float32)


@triton.jit
def _sample(x, channel, channel_live, width, corners, IN: tl.constexpr):
    """Bilinear interpolation times the mask: float32 (pixels, channels). Neighbours outside the map count as zero."""
    row, top, bottom, left, right, fraction_y, fraction_x, factor, touching = corners
    top &= touching
    bottom &= touching
    weight_top = (1 - fraction_y) * factor
    weight_bottom = fraction_y * factor
    value = (weight_top * (1 - fraction_x))[:, None] * _load_rows(x, row, channel, top & left, channel_live, IN)
    value += (weight_top * fraction_x)[:, None] * _load_rows(x, row + 1, channel, top & right, channel_live, IN)
    row += width
    value += (weight_bottom * (1 - fraction_x))[:, None] * _load_rows(x, row, channel, bottom & left, channel_live, IN)
    value += (weight_bottom * fraction_x)[:, None] * _load_rows(x, row + 1, channel, bottom & right, channel_live, IN)
    return value


@triton.jit
def forward(
    x,
    offset,
    mask,
    weight,
    bias,
    out,
    offset_strides,
    mask_strides,
    sizes,
    CONV: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    OFFSET_GROUPS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (pixel, OUT) = bias + samples · weight: a matrix product whose left factor is made as it is needed.

    weight is (OUT, tap, IN / GROUPS). A program computes TILE_P x TILE_O results of one group, TILE_C of the inner
    dimension (tap, channel) at a time. Grid: (tiles of pixels, GROUPS · tiles of a group's outputs).
    """
    group_c: tl.constexpr = IN // GROUPS
    group_o: tl.constexpr = OUT // GROUPS
    taps: tl.constexpr = CONV[0][0] * CONV[0][1]
    tiles_o: tl.constexpr = (group_o + TILE_O - 1) // TILE_O
    group = tl.program_id(1) // tiles_o
    pixels = _pixels(tl.program_id(0), sizes, TILE_P)
    pixel, _, _, _, live = pixels
    output = tl.program_id(1) % tiles_o * TILE_O + tl.arange(0, TILE_O)
    output_live = output < group_o
    output += group * group_o
    total = tl.zeros((TILE_P, TILE_O), tl.float32)
    for tap in range(taps):
        for segment in range(0, group_c, SEGMENT):
            offset_group = (group * group_c + segment) // (IN // OFFSET_GROUPS)
            corners = _corners(offset, offset_strides, mask, mask_strides, sizes, pixels, offset_group, tap, CONV)
            for first in range(0, SEGMENT, TILE_C):
                channel = first + tl.arange(0, TILE_C)
                channel_live = channel < SEGMENT
                channel += segment
                samples = _sample(x, group * group_c + channel, channel_live, sizes[2], corners, IN)
                matrix = tl.load(
                    weight + output[None, :] * (taps * group_c) + (tap * group_c + channel)[:, None],
                    mask=channel_live[:, None] & output_live[None, :],
                    other=0.0,
                )
                total = tl.dot(samples.to(matrix.dtype), matrix, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + output, mask=output_live, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + pixel.to(tl.int64)[:, None] * OUT + output[None, :],
        total.to(out.dtype.element_ty),
        mask=live[:, None] & output_live[None, :],
    )


@triton.jit
def backward_samples(
    grad_out,
    x,
    offset,
    mask,
    weight,
    grad_x,
    grad_offset,
    grad_mask,
    offset_strides,
    mask_strides,
    sizes,
    CONV: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    OFFSET_GROUPS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of all that decides a sample: grad_x += (float32, like x), grad_offset = and grad_mask = (contiguous).

    The gradient of a sample, grad_out · weight, is computed in the program that needs it. A program has TILE_P samples
    of one tap and offset group, so the sums over channels, which make the gradients of offset and mask, are its own;
    only those of x are shared between programs and need atomic additions, whose order is not reproducible.
    Grid: (tiles of pixels, taps · OFFSET_GROUPS).
    """
    group_c: tl.constexpr = IN // GROUPS
    group_o: tl.constexpr = OUT // GROUPS
    offset_c: tl.constexpr = IN // OFFSET_GROUPS
    taps: tl.constexpr = CONV[0][0] * CONV[0][1]
    tap = tl.program_id(1) % taps
    offset_group = tl.program_id(1) // taps
    width, out_h, out_w = sizes[2], sizes[3], sizes[4]
    pixels = _pixels(tl.program_id(0), sizes, TILE_P)
    pixel, image, y_out, x_out, live = pixels
    row, top, bottom, left, right, fraction_y, fraction_x, factor, _ = _corners(
        offset, offset_strides, mask, mask_strides, sizes, pixels, offset_group, tap, CONV
    )
    weight_top = (1 - fraction_y) * factor
    weight_bottom = fraction_y * factor
    dot_00 = tl.zeros((TILE_P,), tl.float32)  # (gradient of the sample) · (neighbour), summed over the channels
    dot_01 = tl.zeros((TILE_P,), tl.float32)
    dot_10 = tl.zeros((TILE_P,), tl.float32)
    dot_11 = tl.zeros((TILE_P,), tl.float32)
    for segment in range(0, offset_c, SEGMENT):
        group = (offset_group * offset_c + segment) // group_c
        for first in range(0, SEGMENT, TILE_C):
            channel = first + tl.arange(0, TILE_C)
            channel_live = channel < SEGMENT
            channel += offset_group * offset_c + segment
            grad = tl.zeros((TILE_P, TILE_C), tl.float32)
            for first_output in range(0, group_o, TILE_O):
                output = first_output + tl.arange(0, TILE_O)
                output_live = output < group_o
                output += group * group_o
                upstream = tl.load(
                    grad_out + pixel.to(tl.int64)[:, None] * OUT + output[None, :],
                    mask=live[:, None] & output_live[None, :],
                    other=0.0,
                )
                matrix = tl.load(
                    weight + (output * taps + tap)[:, None] * group_c + (channel - group * group_c)[None, :],
                    mask=output_live[:, None] & channel_live[None, :],
                    other=0.0,
                )
                grad = tl.dot(upstream, matrix, grad, input_precision=PRECISION)
            dot_00 += _share(x, grad_x, row, channel, grad, weight_top * (1 - fraction_x), top & left, channel_live, IN)
            dot_01 += _share(x, grad_x, row + 1, channel, grad, weight_top * fraction_x, top & right, channel_live, IN)
            below = row + width
            dot_10 += _share(
                x, grad_x, below, channel, grad, weight_bottom * (1 - fraction_x), bottom & left, channel_live, IN
            )
            dot_11 += _share(
                x, grad_x, below + 1, channel, grad, weight_bottom * fraction_x, bottom & right, channel_live, IN
            )
    upper = (1 - fraction_x) * dot_00 + fraction_x * dot_01
    lower = (1 - fraction_x) * dot_10 + fraction_x * dot_11
    size = out_h * out_w
    place = y_out * out_w + x_out
    at = (image.to(tl.int64) * OFFSET_GROUPS + offset_group) * taps + tap
    grad_y = factor * (lower - upper)
    grad_x_position = factor * ((1 - fraction_y) * (dot_01 - dot_00) + fraction_y * (dot_11 - dot_10))
    tl.store(grad_offset + 2 * at * size + place, grad_y.to(grad_offset.dtype.element_ty), mask=live)
    tl.store(grad_offset + (2 * at + 1) * size + place, grad_x_position.to(grad_offset.dtype.element_ty), mask=live)
    if mask is not None:
        value = (1 - fraction_y) * upper + fraction_y * lower
        tl.store(grad_mask + at * size + place, value.to(grad_mask.dtype.element_ty), mask=live)


@triton.jit
def _share(x, grad_x, row, channel, grad, weight, row_live, channel_live, IN: tl.constexpr):
    """Add weight · grad to rows of grad_x; return the scalar product of grad with the same rows of x."""
    tl.atomic_add(
        grad_x + row[:, None] * IN + channel[None, :],
        weight[:, None] * grad,
        mask=row_live[:, None] & channel_live[None, :],
        sem="relaxed",
    )
    return tl.sum(grad * _load_rows(x, row, channel, row_live, channel_live, IN), 1)


@triton.jit
def backward_weight(
    grad_out,
    x,
    offset,
    mask,
    grad_weight,
    offset_strides,
    mask_strides,
    sizes,
    tiles_per_part,
    CONV: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    OFFSET_GROUPS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_weight (part, OUT, tap, IN / GROUPS) = grad_out · samples, summed over the pixels of each part.

    The samples are taken again. A program computes TILE_O x TILE_C results from ``tiles_per_part`` tiles of TILE_P.
    Grid: (taps · IN / SEGMENT · tiles of a segment, tiles of a group's outputs, parts).
    """
    group_c: tl.constexpr = IN // GROUPS
    group_o: tl.constexpr = OUT // GROUPS
    taps: tl.constexpr = CONV[0][0] * CONV[0][1]
    tiles_c: tl.constexpr = (SEGMENT + TILE_C - 1) // TILE_C
    tap = tl.program_id(0) % taps
    segment = tl.program_id(0) // taps // tiles_c * SEGMENT
    channel = tl.program_id(0) // taps % tiles_c * TILE_C + tl.arange(0, TILE_C)
    channel_live = channel < SEGMENT
    channel += segment
    group = segment // group_c
    output = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    output_live = output < group_o
    output += group * group_o
    total = tl.zeros((TILE_O, TILE_C), tl.float32)
    first_tile = tl.program_id(2) * tiles_per_part
    for tile in range(first_tile, first_tile + tiles_per_part):
        pixels = _pixels(tile, sizes, TILE_P)
        pixel, _, _, _, live = pixels
        corners = _corners(
            offset, offset_strides, mask, mask_strides, sizes, pixels, segment // (IN // OFFSET_GROUPS), tap, CONV
        )
        samples = _sample(x, channel, channel_live, sizes[2], corners, IN)
        upstream = tl.load(
            grad_out + pixel.to(tl.int64)[None, :] * OUT + output[:, None],
            mask=live[None, :] & output_live[:, None],
            other=0.0,
        )
        total = tl.dot(upstream, samples.to(upstream.dtype), total, input_precision=PRECISION)
    tl.store(
        grad_weight
        + ((tl.program_id(2) * OUT + output) * taps + tap)[:, None] * group_c
        + (channel - group * group_c)[None, :],
        total,
        mask=output_live[:, None] & channel_live[None, :],
    )
