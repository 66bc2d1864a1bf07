"""The end of a DyHead block as loops compiled by numba (see ``ops.loops``): the branches become the output.

For one level of one image

    out = max(a1 F + b1, a2 F + b2),    F = s_mid mid + s_low low + s_high up(high),

where ``up`` is bilinear upsampling, corners on corners, and the seven coefficients are numbers of each channel (see
``dyhead_tail``). One pass over the maps gives the output, two give all gradients; upsampled maps never exist.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from dyhead_zoo.ops.deform_conv_plan import Pair
from dyhead_zoo.ops.loops import HEAD, UNBOUNDED, expect, inlined, pointer, run, share

DTYPES = (torch.float32, torch.float64)
"""Of the maps."""
_COEFFICIENTS = 7
_BLOCK = HEAD + 17  # numbers that a loop is handed at most


class Branches(NamedTuple):
    """What the convolutions gave for one level of one image; all contiguous and of one of ``DTYPES``.

    Attributes:
        size: (H, W) of the level.
        coarse: (h, w) of the coarser level; of no meaning without ``high``.
        mid: (H·W, C).
        low: (H·W, C) or None.
        high: (h·w, C) or None.
    """

    size: Pair
    coarse: Pair
    mid: Tensor
    low: Tensor | None
    high: Tensor | None


def combine(branches: Branches, coefficients: Tensor, out: Tensor) -> None:
    """Write the output.

    Args:
        branches: of the level.
        coefficients: (7, C), contiguous: s_mid, s_low, s_high, a1, b1, a2, b2.
        out: (H·W, C), contiguous; may be ``branches.mid``.
    """
    _run(_combine, branches, coefficients, out)


def write_gradients(
    branches: Branches, coefficients: Tensor, grad_out: Tensor, grads: Branches, grad_coefficients: Tensor
) -> None:
    """The derivative of ``combine``: fills ``grads``, shaped as ``branches``, and ``grad_coefficients``, (7, C)."""
    (height, _), channels = branches.size, branches.mid.shape[1]
    # sums of each row, then over the rows: they neither lose digits nor depend on the number of threads
    sums = coefficients.new_empty(height, *coefficients.shape)
    scratch = coefficients.new_empty(torch.get_num_threads(), 3, channels)
    _run(_differentiate, branches, coefficients, grad_out, sums, scratch, grads.mid, grads.low)
    if grads.high is not None:
        _run(_downsample, branches, coefficients, grads.mid, grads.high)
    grads.mid.mul_(coefficients[0])
    torch.sum(sums, 0, out=grad_coefficients)


def _run(build: Callable[..., Any], branches: Branches, coefficients: Tensor, *others: Tensor | None) -> None:
    size, coarse, mid, low, high = branches
    for tensor in (mid, low, high, coefficients, *others):
        expect(tensor, mid.dtype)
    zeros = mid.new_zeros(1, mid.shape[1])  # a map of one pixel in place of those that are missing
    if high is None:
        coarse, high = (1, 1), zeros
    axes = [_positions(length, smaller, mid.dtype) for length, smaller in zip(size, coarse, strict=True)]
    numbers = (*size, *coarse, mid.shape[1], int(low is not None))
    turns = coarse[0] if build is _downsample else size[0]
    arguments = [*numbers, mid, zeros if low is None else low, high, coefficients, *axes, *others]
    run(build, mid.dtype, turns, size[0] * size[1] * mid.shape[1] // turns, arguments)


@functools.lru_cache(maxsize=64)
def _positions(length: int, coarse: int, dtype: torch.dtype) -> Tensor:
    """Where the pixels of an axis lie on one of ``coarse`` pixels, rounded as ``F.interpolate`` does it: (length,)."""
    with torch.inference_mode(False):
        ends = torch.tensor([coarse - 1, max(length - 1, 1)], dtype=dtype, device="cpu")
        return torch.arange(length, dtype=dtype, device="cpu") * (ends[0] / ends[1])


# -- the loops ---------------------------------------------------------------------------------------------------------
# A turn is a row of pixels. Loops over channels touch few arrays each, or LLVM would not vectorise them.


@inlined
def _maps(block: Any, real: Any) -> Any:
    """H, (h, w), W, C, the step of ``low`` from pixel to pixel, maps, coefficients, positions of rows and columns."""
    channels = block[7]
    mid = numba.carray(pointer(block[9]), (UNBOUNDED, channels), real)
    low = numba.carray(pointer(block[10]), (UNBOUNDED, channels), real)
    high = numba.carray(pointer(block[11]), (UNBOUNDED, channels), real)
    coefficients = numba.carray(pointer(block[12]), (_COEFFICIENTS, channels), real)
    rows = numba.carray(pointer(block[13]), (UNBOUNDED,), real)
    columns = numba.carray(pointer(block[14]), (UNBOUNDED,), real)
    return block[3], (block[5], block[6]), block[4], channels, block[8], (mid, low, high), coefficients, rows, columns


@inlined
def _between(positions: Any, place: Any, coarse: Any, real: Any) -> Any:
    """Between which two pixels of an axis of ``coarse`` a pixel lies, and how far."""
    position = positions[place]
    first = min(np.int64(position), coarse - 1)
    return first, min(first + 1, coarse - 1), position - real(first)


@inlined
def _upsampled(high: Any, row: Any, column: Any, width: Any, target: Any, real: Any) -> None:
    """A pixel of the upsampled map, between two rows and two columns."""
    (y0, y1, down), (x0, x1, right) = row, column
    up, left = real(1) - down, real(1) - right
    w00, w01, w10, w11 = up * left, up * right, down * left, down * right
    h00, h01, h10, h11 = high[y0 * width + x0], high[y0 * width + x1], high[y1 * width + x0], high[y1 * width + x1]
    for c in range(len(target)):
        target[c] = w00 * h00[c] + w01 * h01[c] + w10 * h10[c] + w11 * h11[c]


@inlined
def _sum_branches(mid: Any, low: Any, coefficients: Any, target: Any) -> None:
    """F of a pixel, where ``target`` is that of the upsampled map."""
    s_mid, s_low, s_high = coefficients[0], coefficients[1], coefficients[2]
    for c in range(len(target)):
        target[c] = s_mid[c] * mid[c] + s_low[c] * low[c] + s_high[c] * target[c]


def _combine(_: Any, real: Any) -> Callable[[Any], None]:
    """The output."""

    def loop(address: Any) -> None:
        block = numba.carray(address, (_BLOCK,), np.int64)
        _, _, first, last = share(block)
        _, (coarse_h, coarse_w), width, channels, low_step, maps, coefficients, rows, columns = _maps(block, real)
        mid, low, high = maps
        out = numba.carray(pointer(block[15]), (UNBOUNDED, channels), real)
        scratch = np.empty(channels, real)
        a1, b1, a2, b2 = coefficients[3], coefficients[4], coefficients[5], coefficients[6]
        for y in range(first, last):
            row = _between(rows, y, coarse_h, real)
            for x in range(width):
                pixel = y * width + x
                _upsampled(high, row, _between(columns, x, coarse_w, real), coarse_w, scratch, real)
                _sum_branches(mid[pixel], low[pixel * low_step], coefficients, scratch)
                target = out[pixel]
                for c in range(channels):
                    one, other = a1[c] * scratch[c] + b1[c], a2[c] * scratch[c] + b2[c]
                    target[c] = one if one >= other else other

    return loop


def _differentiate(_: Any, real: Any) -> Callable[[Any], None]:
    """For each row of pixels the gradients of the coefficients; those of ``low``, and of F in place of ``mid``."""

    def loop(address: Any) -> None:
        block = numba.carray(address, (_BLOCK,), np.int64)
        thread, _, first, last = share(block)
        _, (coarse_h, coarse_w), width, channels, low_step, maps, coefficients, rows, columns = _maps(block, real)
        mid, low, high = maps
        grad_out = numba.carray(pointer(block[15]), (UNBOUNDED, channels), real)
        sums = numba.carray(pointer(block[16]), (UNBOUNDED, _COEFFICIENTS, channels), real)
        upsampled, total, chosen = numba.carray(pointer(block[17]), (UNBOUNDED, 3, channels), real)[thread]
        grad_total = numba.carray(pointer(block[18]), (UNBOUNDED, channels), real)
        need_low = block[19] != 0
        grad_low = numba.carray(pointer(block[19]), (UNBOUNDED, channels), real)
        s_low, a1, b1, a2, b2 = coefficients[1], coefficients[3], coefficients[4], coefficients[5], coefficients[6]
        for y in range(first, last):
            row = _between(rows, y, coarse_h, real)
            of_mid, of_low, of_high, of_a1, of_b1, of_a2, of_b2 = sums[y]
            sums[y] = 0
            for x in range(width):
                pixel = y * width + x
                _upsampled(high, row, _between(columns, x, coarse_w, real), coarse_w, upsampled, real)
                for c in range(channels):
                    total[c] = upsampled[c]
                own, finer, grad, grad_f = mid[pixel], low[pixel * low_step], grad_out[pixel], grad_total[pixel]
                _sum_branches(own, finer, coefficients, total)
                for c in range(channels):
                    chosen[c] = grad[c] if a1[c] * total[c] + b1[c] >= a2[c] * total[c] + b2[c] else real(0)
                for c in range(channels):
                    grad_f[c] = a1[c] * chosen[c] + a2[c] * (grad[c] - chosen[c])
                for c in range(channels):
                    of_a1[c] += chosen[c] * total[c]
                    of_b1[c] += chosen[c]
                for c in range(channels):
                    of_a2[c] += (grad[c] - chosen[c]) * total[c]
                    of_b2[c] += grad[c] - chosen[c]
                for c in range(channels):
                    of_mid[c] += grad_f[c] * own[c]
                    of_low[c] += grad_f[c] * finer[c]
                for c in range(channels):
                    of_high[c] += grad_f[c] * upsampled[c]
                if need_low:
                    target = grad_low[pixel]
                    for c in range(channels):
                        target[c] = s_low[c] * grad_f[c]

    return loop


def _downsample(_: Any, real: Any) -> Callable[[Any], None]:
    """The gradient of ``high`` from that of F; a turn is a row of ``high``, which gathers it from the rows near it."""

    def loop(address: Any) -> None:
        block = numba.carray(address, (_BLOCK,), np.int64)
        _, _, first, last = share(block)
        height, (coarse_h, coarse_w), width, channels, _, _, coefficients, rows, columns = _maps(block, real)
        grad_total = numba.carray(pointer(block[15]), (UNBOUNDED, channels), real)
        grad_high = numba.carray(pointer(block[16]), (UNBOUNDED, channels), real)
        s_high = coefficients[2]
        for number in range(first, last):
            grad_high[number * coarse_w : (number + 1) * coarse_w] = 0
            start, stop = 0, height
            if coarse_h > 1:  # a row more on either side: what does not reach this one is left out below
                start = max((number - 1) * (height - 1) // (coarse_h - 1) - 1, 0)
                stop = min((number + 1) * (height - 1) // (coarse_h - 1) + 3, height)
            for y in range(start, stop):
                y0, y1, down = _between(rows, y, coarse_h, real)
                share_of_row = real(0)
                if y0 == number:
                    share_of_row += real(1) - down
                if y1 == number:
                    share_of_row += down
                if share_of_row == 0:
                    continue
                for x in range(width):
                    x0, x1, right = _between(columns, x, coarse_w, real)
                    grad = grad_total[y * width + x]
                    left_target, right_target = grad_high[number * coarse_w + x0], grad_high[number * coarse_w + x1]
                    left_share, right_share = share_of_row * (real(1) - right), share_of_row * right
                    for c in range(channels):
                        left_target[c] += left_share * s_high[c] * grad[c]
                    for c in range(channels):
                        right_target[c] += right_share * s_high[c] * grad[c]

    return loop
