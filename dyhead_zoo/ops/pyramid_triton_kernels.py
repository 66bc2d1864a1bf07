"""Triton kernels of a whole DyHead block on a pyramid; ``layers/dyhead_cuda.py`` launches them and says what they do.

Checked in Triton's interpreter and compiled for several GPUs, but not yet run on a GPU.

Terms, for all kernels. A *pyramid* is (batch, height and width of the finest level): the other sides follow, since they
halve from level to level, rounded up, so that a launch needs no table of sizes and one compiled kernel serves all. A
*table* has a row for each pixel: level after level, in a level image after image, row after row. A *branch* is 0 (mid),
1 (low) or 2 (high). A *map* is what the convolution of one branch gives for one level: mid those of all levels, low and
high those of all but the finest, each of the size of that level (for high that is the level *sampled*, which is then
upsampled to the next finer one). All maps together lie like three tables one below the other, two of them without their
finest level. A *tile* is a run of TILE_P pixels of one image of one level; tiles are numbered in the order of the rows.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from dyhead_zoo.ops.deform_conv_triton_kernels import _corners, _load_rows, _sample

_SIZES = ["batch", "height", "width"]  # else Triton compiles again for sizes that are 1 or multiples of 16
_TAPS = tl.constexpr(9)
_FIELD = tl.constexpr(27)  # numbers of a pixel's field: (dy, dx) of each tap, then the mask of each tap


@triton.jit
def _side(finest, level):
    """A side on ``level``: halved, rounded up, so many times."""
    return ((finest - 1) >> level) + 1


@triton.jit
def _start(level, pyramid, LEVELS: tl.constexpr, UNIT: tl.constexpr):
    """Units before a level, where each image of a level takes its pixels / UNIT units, rounded up: rows or tiles."""
    batch, height, width = pyramid
    start = level * 0
    for i in tl.static_range(LEVELS - 1):
        start += tl.where(i < level, batch * tl.cdiv(_side(height, i) * _side(width, i), UNIT), 0)
    return start


@triton.jit
def _beyond_finest(pyramid, LEVELS: tl.constexpr, UNIT: tl.constexpr):
    """Units of all levels but the finest: by so many the maps of a branch follow those of the branch before."""
    batch, height, width = pyramid
    units = batch * 0
    for i in tl.static_range(1, LEVELS):
        units += batch * tl.cdiv(_side(height, i) * _side(width, i), UNIT)
    return units


@triton.jit
def _tile(number, pyramid, LEVELS: tl.constexpr, TILE_P: tl.constexpr):
    """Of a tile: branch, level, rows before the level, number in its image, and its pixels as ``_corners`` takes them.

    Tiles of a table are those of branch 0.
    """
    batch, height, width = pyramid
    of_a_branch = _beyond_finest(pyramid, LEVELS, TILE_P)
    first = batch * tl.cdiv(height * width, TILE_P)
    branch = tl.maximum(number - first, 0) // tl.maximum(of_a_branch, 1)
    number -= branch * of_a_branch
    level = number * 0
    row = number * 0
    tile = number * 0
    next_row = batch * 0
    next_tile = batch * 0
    for i in tl.static_range(LEVELS):
        reached = number >= next_tile
        level = tl.where(reached, i, level)
        row = tl.where(reached, next_row, row)
        tile = tl.where(reached, next_tile, tile)
        pixels = _side(height, i) * _side(width, i)
        next_row += batch * pixels
        next_tile += batch * tl.cdiv(pixels, TILE_P)
    map_width = _side(width, level)
    pixels = _side(height, level) * map_width
    tiles = tl.cdiv(pixels, TILE_P)
    image = (number - tile) // tiles
    number = (number - tile) % tiles
    place = number * TILE_P + tl.arange(0, TILE_P)
    return branch, level, row, number, (place, image, place // map_width, place % map_width, place < pixels)


@triton.jit
def _and(live, condition):
    """A mask and a scalar condition; Triton 3.9's interpreter fails at ``&`` of these two."""
    return tl.where(live, condition.to(tl.int32), 0) != 0


@triton.jit(do_not_specialize=_SIZES)
def predict_fields(
    x,
    weight,
    bias,
    fields,
    batch,
    height,
    width,
    LEVELS: tl.constexpr,
    IN: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """fields (table, 27), float32: the ordinary 3x3 convolution of all levels with weight (27, tap, IN); masks in 0..1.

    Grid: tiles of the table.
    """
    pyramid = (batch, height, width)
    _, level, level_row, _, pixels = _tile(tl.program_id(0), pyramid, LEVELS, TILE_P)
    place, image, y, x_out, live = pixels
    map_height = _side(height, level)
    map_width = _side(width, level)
    first_row = (level_row + image * (map_height * map_width)).to(tl.int64)
    output = tl.arange(0, TILE_O)
    output_live = output < _FIELD
    total = tl.zeros((TILE_P, TILE_O), tl.float32)
    for tap in range(_TAPS):
        row_y = y + (tap // 3 - 1)
        row_x = x_out + (tap % 3 - 1)
        inside = live & (row_y >= 0) & (row_y < map_height) & (row_x >= 0) & (row_x < map_width)
        row = first_row + row_y * map_width + row_x
        for first in range(0, IN, TILE_C):
            channel = first + tl.arange(0, TILE_C)
            channel_live = channel < IN
            matrix = tl.load(
                weight + output[None, :] * (_TAPS * IN) + (tap * IN + channel)[:, None],
                mask=channel_live[:, None] & output_live[None, :],
                other=0.0,
            )
            samples = _load_rows(x, row, channel, inside, channel_live, IN).to(matrix.dtype)
            total = tl.dot(samples, matrix, total, input_precision=PRECISION)
    total += tl.load(bias + output, mask=output_live, other=0.0).to(tl.float32)[None, :]
    total = tl.where((output >= 2 * _TAPS)[None, :], tl.sigmoid(total), total)
    at = fields + (first_row + place)[:, None] * _FIELD + output[None, :]
    tl.store(at, total, mask=live[:, None] & output_live[None, :])


@triton.jit(do_not_specialize=_SIZES)
def coarse_fields(
    fields,
    coarse,
    batch,
    height,
    width,
    LEVELS: tl.constexpr,
    REINTERPRET: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """coarse (table without its finest level, 27): the fields of each level for its coarser neighbour.

    See ``SpatialAttention`` for the two conventions. Grid: tiles of the table without its finest level.
    """
    pyramid = (batch, height, width)
    number = tl.program_id(0) + batch * tl.cdiv(height * width, TILE_P)
    _, level, level_row, _, pixels = _tile(number, pyramid, LEVELS, TILE_P)
    place, image, y, x, live = pixels
    map_height = _side(height, level)
    map_width = _side(width, level)
    finer_height = _side(height, level - 1)
    finer_width = _side(width, level - 1)
    channel = tl.arange(0, 32)
    live = live[:, None] & (channel < _FIELD)[None, :]
    finer_row = level_row - (batch - image) * (finer_height * finer_width)
    fields += finer_row.to(tl.int64) * _FIELD
    if REINTERPRET:  # the numbers of an image in the order of (channel, y, x), offsets and masks apart
        first_channel = tl.where(channel < 2 * _TAPS, 0, 2 * _TAPS)[None, :]
        index = (channel[None, :] - first_channel) * (map_height * map_width) + place[:, None]
        finer_channel = first_channel + index // (finer_height * finer_width)
        value = tl.load(fields + index % (finer_height * finer_width) * _FIELD + finer_channel, mask=live, other=0.0)
    else:  # adaptive average pooling: of a side that was rounded up, inner bins are three wide and overlap
        top = y * finer_height // map_height
        bottom = tl.cdiv((y + 1) * finer_height, map_height)
        left = x * finer_width // map_width
        right = tl.cdiv((x + 1) * finer_width, map_width)
        value = tl.zeros((TILE_P, 32), tl.float32)
        for cell in tl.static_range(9):
            row = top + cell // 3
            column = left + cell % 3
            inside = live & ((row < bottom) & (column < right))[:, None]
            at = fields + (row * finer_width + column)[:, None] * _FIELD + channel[None, :]
            value += tl.load(at, mask=inside, other=0.0)
        value /= ((bottom - top) * (right - left)).to(tl.float32)[:, None]
    first_row = level_row - batch * height * width + image * (map_height * map_width)
    tl.store(coarse + (first_row.to(tl.int64) + place)[:, None] * _FIELD + channel[None, :], value, mask=live)


@triton.jit(do_not_specialize=_SIZES)
def convolve(
    x,
    fields,
    weights,
    biases,
    out,
    partial,
    batch,
    height,
    width,
    LEVELS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (maps, OUT): the deformable convolutions of all branches and levels; and what is to be known of each tile.

    weights are three matrices (OUT, tap, IN), biases three vectors. ``fields`` are those of ``predict_fields`` and,
    below them, those of ``coarse_fields``. partial (3, tile, OUT), float32: of each tile the mean, the sum of squares
    of the differences from it, and the tile's share of the mean of the map as its level gets it (upsampled, of high).
    Grid: (tiles of the maps, tiles of the outputs).
    """
    pyramid = (batch, height, width)
    branch, level, level_row, number, pixels = _tile(tl.program_id(0), pyramid, LEVELS, TILE_P)
    place, image, y, x_out, live = pixels
    map_height = _side(height, level)
    map_width = _side(width, level)
    low = (branch == 1).to(tl.int32)
    source_height = _side(height, level - low)
    source_width = _side(width, level - low)
    x += (level_row - low * batch * (source_height * source_width)).to(tl.int64) * IN
    of_a_branch = _beyond_finest(pyramid, LEVELS, 1)
    fields += (level_row + tl.where(branch == 2, of_a_branch, 0)).to(tl.int64) * _FIELD
    strides = (map_height * map_width * _FIELD, 1, map_width * _FIELD, _FIELD)
    sizes = (batch, source_height, source_width, map_height, map_width)
    stride = 1 + low
    conv = ((3, 3), (stride, stride), (1, 1), (1, 1))
    weight, bias = weights[0], biases[0]
    if branch == 1:
        weight, bias = weights[1], biases[1]
    if branch == 2:
        weight, bias = weights[2], biases[2]
    output = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    output_live = output < OUT
    total = tl.zeros((TILE_P, TILE_O), tl.float32)
    for tap in range(_TAPS):
        corners = _corners(fields, strides, fields + 2 * _TAPS, strides, sizes, pixels, 0, tap, conv)
        for first in range(0, IN, TILE_C):
            channel = first + tl.arange(0, TILE_C)
            channel_live = channel < IN
            samples = _sample(x, channel, channel_live, source_width, corners, IN)
            matrix = tl.load(
                weight + output[None, :] * (_TAPS * IN) + (tap * IN + channel)[:, None],
                mask=channel_live[:, None] & output_live[None, :],
                other=0.0,
            )
            total = tl.dot(samples.to(matrix.dtype), matrix, total, input_precision=PRECISION)
    total += tl.load(bias + output, mask=output_live, other=0.0).to(tl.float32)[None, :]
    first_row = level_row + branch * of_a_branch + image * (map_height * map_width)
    at = out + (first_row.to(tl.int64) + place)[:, None] * OUT + output[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=live[:, None] & output_live[None, :])

    total = tl.where(live[:, None], total, 0.0)
    mean = tl.sum(total, 0) / tl.minimum(map_height * map_width - number * TILE_P, TILE_P).to(tl.float32)
    difference = tl.where(live[:, None], total - mean[None, :], 0.0)
    finer_height = tl.where(branch == 2, _side(height, level - 1), map_height)
    finer_width = tl.where(branch == 2, _side(width, level - 1), map_width)
    share = _axis_share(y, map_height, finer_height) * _axis_share(x_out, map_width, finer_width)
    at = partial + tl.program_id(0).to(tl.int64) * OUT + output
    step = tl.num_programs(0).to(tl.int64) * OUT
    tl.store(at, mean, mask=output_live)
    tl.store(at + step, tl.sum(difference * difference, 0), mask=output_live)
    tl.store(at + 2 * step, tl.sum(total * share[:, None], 0), mask=output_live)


@triton.jit
def _axis_share(position, size, upsampled):
    """What each of ``size`` numbers counts in the mean of their linear interpolation, ends on ends, at ``upsampled``.

    In integers until the end: point p lies at p (size - 1) / (upsampled - 1) and counts 1 - its distance. Sides that
    double put at most seven points less than 1 from a number; of as many points as numbers each counts its own.
    """
    last = tl.maximum(upsampled - 1, 1)
    first = (position - 1) * last // tl.maximum(size - 1, 1)
    total = position * 0
    for i in tl.static_range(8):
        point = first + i
        near = tl.maximum(last - tl.abs(point * (size - 1) - position * last), 0)
        total += tl.where((point >= 0) & (point < upsampled), near, 0)
    return total.to(tl.float32) / (last * upsampled).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def statistics(
    partial,
    moments,
    batch,
    height,
    width,
    LEVELS: tl.constexpr,
    OUT: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """moments (3, maps · batch, OUT): mean and variance of each map, mean of it upsampled, from ``convolve``'s partial.

    In an order that is always the same. Grid: (maps · batch, tiles of the channels).
    """
    pyramid = (batch, height, width)
    level = tl.program_id(0) // batch
    image = tl.program_id(0) % batch
    branch = tl.maximum(level - 1, 0) // max(LEVELS - 1, 1)
    level -= branch * (LEVELS - 1)
    pixels = _side(height, level) * _side(width, level)
    tiles = tl.cdiv(pixels, TILE_P)
    of_a_branch = _beyond_finest(pyramid, LEVELS, TILE_P)
    first = _start(level, pyramid, LEVELS, TILE_P) + branch * of_a_branch + image * tiles
    step = (batch * tl.cdiv(height * width, TILE_P) + 3 * of_a_branch).to(tl.int64) * OUT
    channel = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    channel_live = channel < OUT
    partial += first.to(tl.int64) * OUT
    total = tl.zeros((TILE_T, TILE_C), tl.float32)
    pooled = tl.zeros((TILE_T, TILE_C), tl.float32)
    for start in range(0, tiles, TILE_T):
        at, count, live = _tiles_of_an_image(partial, start, tiles, pixels, channel, channel_live, OUT, TILE_P, TILE_T)
        total += count * tl.load(at, mask=live, other=0.0)
        pooled += tl.load(at + 2 * step, mask=live, other=0.0)
    mean = tl.sum(total, 0) / pixels.to(tl.float32)
    squares = tl.zeros((TILE_T, TILE_C), tl.float32)
    for start in range(0, tiles, TILE_T):
        at, count, live = _tiles_of_an_image(partial, start, tiles, pixels, channel, channel_live, OUT, TILE_P, TILE_T)
        difference = tl.where(live, tl.load(at, mask=live, other=0.0) - mean[None, :], 0.0)
        squares += tl.load(at + step, mask=live, other=0.0) + count * difference * difference
    at = moments + tl.program_id(0).to(tl.int64) * OUT + channel
    step = tl.num_programs(0).to(tl.int64) * OUT
    tl.store(at, mean, mask=channel_live)
    tl.store(at + step, tl.sum(squares, 0) / pixels.to(tl.float32), mask=channel_live)
    tl.store(at + 2 * step, tl.sum(pooled, 0), mask=channel_live)


@triton.jit
def _tiles_of_an_image(
    partial, start, tiles, pixels, channel, channel_live, OUT: tl.constexpr, TILE_P: tl.constexpr, TILE_T: tl.constexpr
):
    """Addresses of TILE_T tiles (rows of ``partial``), the pixels of each, and which there are."""
    tile = start + tl.arange(0, TILE_T)
    count = tl.clamp((pixels - tile * TILE_P).to(tl.float32), 0.0, TILE_P)
    at = partial + tile[:, None] * OUT + channel[None, :]
    return at, count[:, None], (tile < tiles)[:, None] & channel_live[None, :]


@triton.jit(do_not_specialize=_SIZES[:1])
def coefficients(
    moments,
    norms,
    gate,
    task,
    scales,
    pieces,
    batch,
    LEVELS: tl.constexpr,
    OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    EPS: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE_G: tl.constexpr,
    TILE_H: tl.constexpr,
):
    """Every number that will multiply a map or be added to it: what follows the convolutions, as affine maps.

    scales (maps · batch, OUT): gate · slope of GroupNorm / branches of the level. pieces (4, level · batch, OUT): slope
    and intercept, twice, of the two affine maps of their sum whose larger one is the result.

    norms are (weight, bias) of the three branches, one after the other; gate is (weight, bias) of ScaleAttention's
    layer and task the same of TaskAttention's two, or None. TILE_G covers the channels of a group.
    Grid: levels · batch.
    """
    level = tl.program_id(0) // batch
    image = tl.program_id(0) % batch
    member = tl.arange(0, GROUPS * TILE_G)
    channel = member // TILE_G * (OUT // GROUPS) + member % TILE_G
    live = member % TILE_G < OUT // GROUPS
    step = (3 * LEVELS - 2) * batch.to(tl.int64) * OUT
    branches = 1 + (level > 0).to(tl.int32) + (level < LEVELS - 1).to(tl.int32)
    shift = tl.zeros((GROUPS * TILE_G,), tl.float32)
    pooled = tl.zeros((GROUPS * TILE_G,), tl.float32)
    for branch in tl.static_range(3):
        map_level = level
        exists = level >= 0
        if branch == 1:
            exists = level > 0
        if branch == 2:
            exists = level < LEVELS - 1
            map_level = level + 1
        here = _and(live, exists)
        at = ((map_level + branch * (LEVELS - 1)) * batch + image) * OUT + channel
        mean = tl.load(moments + at, mask=here, other=0.0)
        variance = tl.load(moments + at + step, mask=here, other=0.0)
        centre = _group_mean(mean, OUT // GROUPS, GROUPS, TILE_G)
        spread = tl.where(here, variance + (mean - centre) * (mean - centre), 0.0)
        spread = _group_mean(spread, OUT // GROUPS, GROUPS, TILE_G)
        norm_weight = tl.load(norms[2 * branch] + channel, mask=here, other=0.0).to(tl.float32)
        norm_bias = tl.load(norms[2 * branch + 1] + channel, mask=here, other=0.0).to(tl.float32)
        slope = norm_weight / tl.sqrt_rn(spread + EPS[branch])
        intercept = norm_bias - slope * centre
        average = (tl.load(moments + at + 2 * step, mask=here, other=0.0) - centre) * slope + norm_bias
        average = tl.where(here, average, 0.0)
        factor = 1.0 / branches.to(tl.float32)
        if gate is not None:
            value = tl.sum(average * tl.load(gate[0] + channel, mask=here, other=0.0).to(tl.float32))
            factor *= _hard_sigmoid(_relu(value + tl.load(gate[1]).to(tl.float32)))
        tl.store(scales + at, slope * factor, mask=here)
        shift += tl.where(here, intercept * factor, 0.0)
        pooled += tl.where(here, average * factor, 0.0)
    at = pieces + tl.program_id(0).to(tl.int64) * OUT + channel
    step = tl.num_programs(0).to(tl.int64) * OUT
    if task is None:
        tl.store(at, tl.full(shift.shape, 1.0, tl.float32), mask=live)
        tl.store(at + step, shift, mask=live)
        tl.store(at + 2 * step, tl.zeros_like(shift), mask=live)
        tl.store(at + 3 * step, tl.zeros_like(shift), mask=live)
    else:
        a1 = _theta_bias(task[3], 0, channel, live, OUT)
        b1 = _theta_bias(task[3], 1, channel, live, OUT)
        a2 = _theta_bias(task[3], 2, channel, live, OUT)
        b2 = _theta_bias(task[3], 3, channel, live, OUT)
        for first in range(0, HIDDEN, TILE_H):
            unit = first + tl.arange(0, TILE_H)
            unit_live = unit < HIDDEN
            matrix = tl.load(
                task[0] + unit[:, None] * OUT + channel[None, :], mask=unit_live[:, None] & live[None, :], other=0.0
            )
            hidden = tl.sum(matrix.to(tl.float32) * pooled[None, :], 1)
            hidden = _relu(hidden + tl.load(task[1] + unit, mask=unit_live, other=0.0).to(tl.float32))
            a1 += _theta_share(task[2], 0, channel, live, unit, unit_live, hidden, OUT, HIDDEN)
            b1 += _theta_share(task[2], 1, channel, live, unit, unit_live, hidden, OUT, HIDDEN)
            a2 += _theta_share(task[2], 2, channel, live, unit, unit_live, hidden, OUT, HIDDEN)
            b2 += _theta_share(task[2], 3, channel, live, unit, unit_live, hidden, OUT, HIDDEN)
        slope1 = 2 * _hard_sigmoid(a1)
        slope2 = 2 * _hard_sigmoid(a2) - 1
        tl.store(at, slope1, mask=live)
        tl.store(at + step, slope1 * shift + (_hard_sigmoid(b1) - 0.5), mask=live)
        tl.store(at + 2 * step, slope2, mask=live)
        tl.store(at + 3 * step, slope2 * shift + (_hard_sigmoid(b2) - 0.5), mask=live)


@triton.jit
def _group_mean(values, members, GROUPS: tl.constexpr, TILE_G: tl.constexpr):
    """Mean over each group's ``members`` of values (GROUPS · TILE_G), which are 0 beyond them; for each value."""
    mean = tl.sum(tl.reshape(values, (GROUPS, TILE_G)), 1) / members
    return tl.reshape(tl.broadcast_to(mean[:, None], (GROUPS, TILE_G)), (GROUPS * TILE_G,))


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _hard_sigmoid(x):
    return tl.clamp(x + 3.0, 0.0, 6.0, tl.PropagateNan.ALL) / 6.0


@triton.jit
def _theta_bias(bias, part, channel, live, OUT: tl.constexpr):
    return tl.load(bias + part * OUT + channel, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _theta_share(weight, part, channel, live, unit, unit_live, hidden, OUT: tl.constexpr, HIDDEN: tl.constexpr):
    """What some hidden units add to one of the four parts of TaskAttention's second layer: (channels,)."""
    at = weight + (part * OUT + channel)[:, None] * HIDDEN + unit[None, :]
    matrix = tl.load(at, mask=live[:, None] & unit_live[None, :], other=0.0).to(tl.float32)
    return tl.sum(matrix * tl.where(unit_live, hidden, 0.0)[None, :], 1)


@triton.jit(do_not_specialize=_SIZES)
def combine(
    maps,
    scales,
    pieces,
    out,
    batch,
    height,
    width,
    LEVELS: tl.constexpr,
    OUT: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """out (table, OUT): the larger of the two affine maps of the sum of scale · map, high upsampled as it is read.

    Bilinear with corners on corners. Grid: (tiles of the table, tiles of the channels).
    """
    pyramid = (batch, height, width)
    _, level, level_row, _, pixels = _tile(tl.program_id(0), pyramid, LEVELS, TILE_P)
    place, image, y, x, live = pixels
    map_height = _side(height, level)
    map_width = _side(width, level)
    channel = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    channel_live = channel < OUT
    row = (level_row + image * (map_height * map_width)).to(tl.int64) + place
    scale = _scale(scales, 0, level, image, level >= 0, channel, channel_live, batch, LEVELS, OUT)
    total = scale[None, :] * _load_rows(maps, row, channel, live, channel_live, OUT)
    if LEVELS > 1:
        of_a_branch = _beyond_finest(pyramid, LEVELS, 1)
        scale = _scale(scales, 1, level, image, level > 0, channel, channel_live, batch, LEVELS, OUT)
        low_live = _and(live, level > 0)
        total += scale[None, :] * _load_rows(maps, row + of_a_branch, channel, low_live, channel_live, OUT)
        coarse_height = _side(height, level + 1)
        coarse_width = _side(width, level + 1)
        y0, fraction_y = _between(y, map_height, coarse_height)
        x0, fraction_x = _between(x, map_width, coarse_width)
        coarse_row = level_row + batch * (map_height * map_width) + 2 * of_a_branch
        coarse_row += image * (coarse_height * coarse_width)
        at = coarse_row.to(tl.int64) + y0 * coarse_width + x0
        live_high = _and(live, level < LEVELS - 1)
        right = live_high & (x0 + 1 < coarse_width)
        below = y0 + 1 < coarse_height
        upper = (1 - fraction_x)[:, None] * _load_rows(maps, at, channel, live_high, channel_live, OUT)
        upper += fraction_x[:, None] * _load_rows(maps, at + 1, channel, right, channel_live, OUT)
        at += coarse_width
        lower = (1 - fraction_x)[:, None] * _load_rows(maps, at, channel, live_high & below, channel_live, OUT)
        lower += fraction_x[:, None] * _load_rows(maps, at + 1, channel, right & below, channel_live, OUT)
        high = (1 - fraction_y)[:, None] * upper + fraction_y[:, None] * lower
        scale = _scale(scales, 2, level + 1, image, level < LEVELS - 1, channel, channel_live, batch, LEVELS, OUT)
        total += scale[None, :] * high
    at = pieces + (level * batch + image) * OUT + channel
    step = LEVELS * batch * OUT
    first = tl.load(at, mask=channel_live, other=0.0)[None, :] * total
    first += tl.load(at + step, mask=channel_live, other=0.0)[None, :]
    second = tl.load(at + 2 * step, mask=channel_live, other=0.0)[None, :] * total
    second += tl.load(at + 3 * step, mask=channel_live, other=0.0)[None, :]
    value = tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)
    at = out + row[:, None] * OUT + channel[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=live[:, None] & channel_live[None, :])


@triton.jit
def _scale(scales, branch, level, image, exists, channel, channel_live, batch, LEVELS: tl.constexpr, OUT: tl.constexpr):
    at = ((level + branch * (LEVELS - 1)) * batch + image) * OUT + channel
    return tl.load(scales + at, mask=_and(channel_live, exists), other=0.0)


@triton.jit
def _between(position, size, coarse):
    """Where a pixel lies between two of a coarser axis, ends on ends: the lower one, and how far beyond it."""
    ratio = tl.div_rn((coarse - 1).to(tl.float32), tl.maximum(size - 1, 1).to(tl.float32))
    at = position.to(tl.float32) * ratio
    lower = tl.minimum(at.to(tl.int32), coarse - 1)
    return lower, at - lower.to(tl.float32)
