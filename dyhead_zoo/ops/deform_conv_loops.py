"""The loops of the deformable convolution on CPUs, compiled by numba (see ``loops``).

They do what ``deform_conv_plan`` and ``deform_conv_samples`` do with PyTorch's operators, where the steps are
explained, but in one pass each: no intermediate tensors, results in memory that is there already, no sorting in the
backward pass. Every function takes tensors whose shapes its caller has seen to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from dyhead_zoo.ops.deform_conv_plan import Geometry, Pair, position_dtype
from dyhead_zoo.ops.loops import (
    STORED,
    UNBOUNDED,
    as_number,
    as_stored,
    expect,
    inlined,
    is_plain,
    pointer,
    run,
    share,
    usable,
)

__all__ = ["STORED", "add_gradients", "plan_gradients", "sum_corners", "usable", "write_rows"]

_PLAN_BLOCK, _SUM_BLOCK, _ADD_BLOCK = 29, 9, 10  # numbers that a loop is handed, see ``loops.run``


def write_rows(
    index: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    in_size: Pair,
    geometry: Geometry,
    first_row: int,
    top: int,
) -> None:
    """``deform_conv_plan._write_rows``; ``weight`` is of the dtype of ``offset``.

    But neighbours off the map have index -1, and count as zero whatever the map holds at its border. Where there are
    any, the first one is marked: its index i becomes -2 - i unless it is -1.
    """
    expect(index, torch.int32)
    expect(weight, offset.dtype)
    arguments = _fields(offset, mask, in_size, geometry, top)
    run(_write, offset.dtype, offset[:, 0].numel(), 4 * geometry.taps, [*arguments, first_row, index, weight])


def plan_gradients(
    grad_weight: Tensor, offset: Tensor, mask: Tensor | None, in_size: Pair, geometry: Geometry
) -> tuple[Tensor, Tensor | None]:
    """Gradients of offset (B, 2·K, Ho, Wo) and mask (B, K, Ho, Wo) from that of the weights of the samples (P·K·4,)."""
    expect(grad_weight, offset.dtype)
    batch, _, out_h, out_w = offset.shape
    grad_offset = offset.new_empty(batch, out_h, out_w, 2 * geometry.taps)
    grad_mask = None if mask is None else offset.new_empty(batch, out_h, out_w, geometry.taps)
    arguments = _fields(offset, mask, in_size, geometry, 0)
    pixels = batch * out_h * out_w
    run(_differentiate, offset.dtype, pixels, 4 * geometry.taps, [*arguments, grad_weight, grad_offset, grad_mask])
    return grad_offset.permute(0, 3, 1, 2), None if grad_mask is None else grad_mask.permute(0, 3, 1, 2)


def sum_corners(table: Tensor, index: Tensor, weight: Tensor, out: Tensor) -> None:
    """Samples: ``out[n]`` becomes the sum of ``weight[4n + c] · table[index[4n + c]]`` over the corners c = 0, .., 3.

    Args:
        table: (R, C), contiguous.
        index: (4·N,) int32.
        weight: (4·N,), float32, or float64 with such a table.
        out: (N, C), contiguous, of the dtype of ``table``.
    """
    expect(table, table.dtype)
    expect(index, torch.int32)
    expect(weight, position_dtype(table.dtype))
    expect(out, table.dtype)
    zeros = table.new_zeros(table.shape[1])  # in place of neighbours off the map
    run(_sum, table.dtype, len(out), table.shape[1], [table.shape[1], table, index, weight, out, zeros])


def add_gradients(
    table: Tensor,
    index: Tensor,
    weight: Tensor,
    grad_out: Tensor,
    grad_weight: Tensor | None,
    grad_table: Tensor | None,
) -> None:
    """The derivative of ``sum_corners``: writes ``grad_weight`` and adds to ``grad_table``.

    Args:
        table, index, weight: as there.
        grad_out: (N, C), contiguous, of the dtype of ``table``.
        grad_weight: (4·N,) like ``weight``, or None.
        grad_table: (R, C) like ``weight``, or None.
    """
    expect(table, table.dtype)
    expect(index, torch.int32)
    expect(grad_out, table.dtype)
    for wide in (weight, grad_weight, grad_table):
        expect(wide, position_dtype(table.dtype))
    arguments = (table.shape[1], table, index, weight, grad_out, grad_weight, grad_table)
    run(_add, table.dtype, len(grad_out), 4 * table.shape[1], arguments)


def _fields(offset: Tensor, mask: Tensor | None, in_size: Pair, geometry: Geometry, top: int) -> list[Any]:
    """What ``_geometry`` reads, after the addresses of offsets and masks."""
    offset, mask = offset.resolve_neg(), None if mask is None else mask.resolve_neg()
    for field in (offset, mask):
        if field is not None and not (field.dtype == offset.dtype and is_plain(field)):
            raise TypeError(
                f"expected plain {offset.dtype} offsets and masks on the CPU, got a {type(field).__name__} of "
                f"{field.dtype} on {field.device}"
            )
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    numbers = [number for pair in (*geometry, in_size, offset.shape[2:]) for number in pair]
    return [offset, mask, *numbers, top, *offset.stride(), *mask_strides]


@inlined
def _geometry(block: Any) -> Any:
    """The numbers of ``_fields``, out of memory that results may be thought to overlap."""
    g = block
    return (
        *((g[5], g[6]), (g[7], g[8]), (g[9], g[10]), (g[11], g[12]), (g[13], g[14]), (g[15], g[16])),
        *(g[17], (g[18], g[19], g[20], g[21]), (g[22], g[23], g[24], g[25])),
    )


@inlined
def _neighbours(position: Any, size: Any, real: Any) -> Any:
    """``deform_conv_plan._neighbours`` of one position."""
    if position < real(-2):
        position = real(-2)
    elif position > real(size + 1):
        position = real(size + 1)
    low = np.floor(position)
    fraction = position - low
    first: Any = np.int64(low) if low == low else np.int64(-2)  # NaN has no integer, and is not inside
    second = first + 1
    inside0 = real(1) if 0 <= first < size else real(0)
    inside1 = real(1) if 0 <= second < size else real(0)
    # products, so that a NaN comes through
    weight0, weight1 = inside0 - fraction * inside0, fraction * inside1
    first, second = max(min(first, size - 1), 0), max(min(second, size - 1), 0)
    return first, second, weight0, weight1, inside0, inside1


@inlined
def _site(geometry: Any, offset: Any, mask: Any, image: Any, y: Any, x: Any, ky: Any, kx: Any, real: Any) -> Any:
    """For a tap of an output pixel the ``_neighbours`` in both directions, and the mask."""
    kernel, stride, padding, dilation, in_size, _, top, offset_strides, mask_strides = geometry
    tap = ky * kernel[1] + kx
    at = image * offset_strides[0] + 2 * tap * offset_strides[1] + y * offset_strides[2] + x * offset_strides[3]
    row = offset[at] + real((y + top) * stride[0] - padding[0] + ky * dilation[0])
    column = offset[at + offset_strides[1]] + real(x * stride[1] - padding[1] + kx * dilation[1])
    factor = real(1)
    if mask.size:
        factor = mask[image * mask_strides[0] + tap * mask_strides[1] + y * mask_strides[2] + x * mask_strides[3]]
    return _neighbours(row, in_size[0], real), _neighbours(column, in_size[1], real), factor


# -- the loops ---------------------------------------------------------------------------------------------------------


def _write(_: Any, real: Any) -> Callable[[Any], None]:
    """Index and weights of all samples; a turn is an output pixel."""

    def loop(address: Any) -> None:
        block = numba.carray(address, (_PLAN_BLOCK,), np.int64)
        _, _, first, last = share(block)
        geometry = _geometry(block)
        (kernel_h, kernel_w), in_size, (out_h, out_w) = geometry[0], geometry[4], geometry[5]
        offset = numba.carray(pointer(block[3]), (UNBOUNDED,), real)
        mask = numba.carray(pointer(block[4]), (UNBOUNDED if block[4] else 0,), real)
        first_row = block[26]
        index = numba.carray(pointer(block[27]), (UNBOUNDED,), np.int32)
        weight = numba.carray(pointer(block[28]), (UNBOUNDED,), real)
        n = first * kernel_h * kernel_w * 4
        for pixel in range(first, last):
            image, y, x = pixel // (out_h * out_w), pixel // out_w % out_h, pixel % out_w
            start = first_row + image * in_size[0] * in_size[1]
            for ky in range(kernel_h):
                for kx in range(kernel_w):
                    rows, columns, factor = _site(geometry, offset, mask, image, y, x, ky, kx, real)
                    upper, lower = start + rows[0] * in_size[1], start + rows[1] * in_size[1]
                    weight_upper, weight_lower = rows[2] * factor, rows[3] * factor
                    index[n], index[n + 1] = upper + columns[0], upper + columns[1]
                    index[n + 2], index[n + 3] = lower + columns[0], lower + columns[1]
                    weight[n], weight[n + 1] = weight_upper * columns[2], weight_upper * columns[3]
                    weight[n + 2], weight[n + 3] = weight_lower * columns[2], weight_lower * columns[3]
                    if min(rows[4], rows[5], columns[4], columns[5]) == 0:
                        inside = (
                            rows[4] * columns[4],
                            rows[4] * columns[5],
                            rows[5] * columns[4],
                            rows[5] * columns[5],
                        )
                        index[n] = -2 - index[n]
                        for corner in range(4):
                            # a weight that is not zero is NaN, of an offset or the mask, and must come through
                            if inside[corner] == 0 and weight[n + corner] == 0:
                                index[n + corner] = -1
                    n += 4

    return loop


def _differentiate(_: Any, real: Any) -> Callable[[Any], None]:
    """Gradients of offsets and masks from those of the weights; a turn is an output pixel."""

    def loop(address: Any) -> None:
        block = numba.carray(address, (_PLAN_BLOCK,), np.int64)
        _, _, first, last = share(block)
        geometry = _geometry(block)
        (kernel_h, kernel_w), (out_h, out_w) = geometry[0], geometry[5]
        offset = numba.carray(pointer(block[3]), (UNBOUNDED,), real)
        mask = numba.carray(pointer(block[4]), (UNBOUNDED if block[4] else 0,), real)
        grad_weight = numba.carray(pointer(block[26]), (UNBOUNDED, 4), real)
        grad_offset = numba.carray(pointer(block[27]), (UNBOUNDED, 2), real)
        grad_mask = numba.carray(pointer(block[28]), (UNBOUNDED,), real)
        n = first * kernel_h * kernel_w
        for pixel in range(first, last):
            image, y, x = pixel // (out_h * out_w), pixel // out_w % out_h, pixel % out_w
            for ky in range(kernel_h):
                for kx in range(kernel_w):
                    rows, columns, factor = _site(geometry, offset, mask, image, y, x, ky, kx, real)
                    _, _, y0, y1, inside_y0, inside_y1 = rows
                    _, _, x0, x1, inside_x0, inside_x1 = columns
                    g = grad_weight[n]
                    upper, lower = g[0] * x0 + g[1] * x1, g[2] * x0 + g[3] * x1
                    left, right = g[0] * y0 + g[2] * y1, g[1] * y0 + g[3] * y1
                    # the weights of the neighbours are 1 - fraction and fraction, inside the map
                    grad_offset[n, 0] = factor * (lower * inside_y1 - upper * inside_y0)
                    grad_offset[n, 1] = factor * (right * inside_x1 - left * inside_x0)
                    if mask.size:
                        grad_mask[n] = upper * y0 + lower * y1
                    n += 1

    return loop


def _sum(stored: Any, real: Any) -> Callable[[Any], None]:
    """Weighted sums of four rows; a turn is a sample."""

    def loop(address: Any) -> None:
        block = numba.carray(address, (_SUM_BLOCK,), np.int64)
        _, _, first, last = share(block)
        channels = block[3]
        table = numba.carray(pointer(block[4]), (UNBOUNDED, channels), stored)
        index = numba.carray(pointer(block[5]), (UNBOUNDED, 4), np.int32)
        weight = numba.carray(pointer(block[6]), (UNBOUNDED, 4), real)
        out = numba.carray(pointer(block[7]), (UNBOUNDED, channels), stored)
        zeros = numba.carray(pointer(block[8]), (channels,), stored)
        for n in range(first, last):
            w0, w1, w2, w3 = weight[n, 0], weight[n, 1], weight[n, 2], weight[n, 3]
            i0, i1, i2, i3 = index[n, 0], index[n, 1], index[n, 2], index[n, 3]
            if i0 >= 0:
                r0, r1, r2, r3 = table[i0], table[i1], table[i2], table[i3]
            else:
                r0 = table[-2 - i0] if i0 != -1 else zeros
                r1 = table[i1] if i1 != -1 else zeros
                r2 = table[i2] if i2 != -1 else zeros
                r3 = table[i3] if i3 != -1 else zeros
            target = out[n]
            for c in range(channels):
                total = w0 * as_number(r0[c]) + w1 * as_number(r1[c]) + w2 * as_number(r2[c]) + w3 * as_number(r3[c])
                target[c] = as_stored(total, target[c])

    return loop


def _add(stored: Any, real: Any) -> Callable[[Any], None]:
    """Derivative of the sums. A turn is a sample, and every thread takes all of them, for the rows that are its own.

    So nothing is written by two threads, and the sums do not depend on their number. A thread owns eight rows, passes
    over those of the others, and so on: the neighbours of a sample mostly belong to one thread.
    """

    def loop(address: Any) -> None:
        block = numba.carray(address, (_ADD_BLOCK,), np.int64)
        thread, threads, _, _ = share(block)
        turns, channels = block[2], block[3]
        table = numba.carray(pointer(block[4]), (UNBOUNDED, channels), stored)
        index = numba.carray(pointer(block[5]), (UNBOUNDED, 4), np.int32)
        weight = numba.carray(pointer(block[6]), (UNBOUNDED, 4), real)
        grad_out = numba.carray(pointer(block[7]), (UNBOUNDED, channels), stored)
        need_weight, need_table = block[8] != 0, block[9] != 0
        grad_weight = numba.carray(pointer(block[8]), (UNBOUNDED, 4), real)
        grad_table = numba.carray(pointer(block[9]), (UNBOUNDED, channels), real)
        for n in range(turns):
            grad = grad_out[n]
            for corner in range(4):
                number = index[n, corner]
                if number < -1:
                    number = -2 - number
                if number == -1:
                    if need_weight and thread == 0:
                        grad_weight[n, corner] = 0
                    continue
                if (number >> 3) % threads != thread:
                    continue
                if need_weight and need_table:
                    row, product, total, factor = table[number], real(0), grad_table[number], weight[n, corner]
                    for c in range(channels):
                        value = as_number(grad[c])
                        product += value * as_number(row[c])
                        total[c] += factor * value
                    grad_weight[n, corner] = product
                elif need_weight:
                    row, product = table[number], real(0)
                    for c in range(channels):
                        product += as_number(grad[c]) * as_number(row[c])
                    grad_weight[n, corner] = product
                elif need_table:
                    total, factor = grad_table[number], weight[n, corner]
                    for c in range(channels):
                        total[c] += factor * as_number(grad[c])

    return loop
