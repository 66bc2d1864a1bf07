"""Step 1 of the deformable convolution on CPUs: which pixels each sample reads, and with which weights.

For each (pixel, tap) the four neighbours of its position become four row numbers of the input seen as a (B·H·W, C)
table, and four weights: bilinear weight times mask, zero outside the map. This touches no channel, so it is cheap;
offsets and masks get their gradients through the weights.

A neighbour outside the map is replaced by a border pixel of weight zero. Where the border holds an Inf or NaN, which
zero does not cancel, the map has to get a border of zeros before (``deform_conv_cpu.deform_conv2d``); not so with
numba's loops, which leave such neighbours out. Infinite offsets are outside the map; NaN offsets give NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Pair = tuple[int, int]

_PLAN_PIXELS = 4096  # of a plan made at a time: its intermediate results stay in the cache


class Geometry(NamedTuple):
    """Where the taps of a convolution lie; every field is (vertical, horizontal)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def taps(self) -> int:
        """Number of taps, K."""
        return self.kernel[0] * self.kernel[1]

    def out_size(self, in_size: Pair) -> Pair:
        """(height, width) of the output for an input of that (height, width)."""
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(in_size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return height, width


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One below the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def as_table(x: Tensor) -> Tensor:
    """(B, C, H, W) -> contiguous (B·H·W, C): a view of a channels_last tensor."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).flatten(0, 2).contiguous()
    # image by image: the copy of a 2-D transpose is blocked, that of a 4-D permutation is not and takes twice as long
    return joined([image.flatten(1).t().contiguous() for image in x])


def position_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where that is the dtype: bfloat16 has no fractions left beyond pixel 128."""
    return torch.promote_types(dtype, torch.float32)


def sampling_plan(
    offset: Tensor,
    mask: Tensor | None,
    in_size: Pair,
    geometry: Geometry,
    first_row: int = 0,
    loops: ModuleType | None = None,
) -> tuple[Tensor, Tensor]:
    """Which rows of the table make up each sample, and with which weights.

    Args:
        offset: (B, 2·K, Ho, Wo) in input pixels, (dy, dx) pairs, float32 or float64. channels_last spares a copy.
        mask: (B, K, Ho, Wo), of the dtype of ``offset``, or None for 1.
        in_size: (height, width) of the maps that are sampled.
        geometry: of the convolution.
        first_row: row of the table at which the first map begins.
        loops: ``deform_conv_loops``, where they are to be used; see ``deform_conv_samples.compiled_loops``.

    Returns:
        index: (P·K·4,) int32, ordered by pixel (b, y, x), tap, corner. Of ``loops`` it is for them alone: they mark
            corners off the map by negative numbers.
        weight: (P·K·4,) like ``offset``, differentiable in ``offset`` and ``mask``; zero where a corner is off the map.
    """
    index, weight = _SamplingPlan.apply(offset, mask, in_size, geometry, first_row, loops)
    return index, weight


class _SamplingPlan(torch.autograd.Function):
    """``sampling_plan`` with in-place arithmetic, and its derivative written out."""

    @staticmethod
    def forward(
        ctx: Any,
        offset: Tensor,
        mask: Tensor | None,
        in_size: Pair,
        geometry: Geometry,
        first_row: int,
        loops: ModuleType | None,
    ) -> tuple[Tensor, Tensor]:
        pixels = offset[:, 0].numel()
        index = torch.empty(pixels, geometry.taps, 4, dtype=torch.int32, device=offset.device)
        weight = offset.new_empty(index.shape)
        ctx.differentiate = None
        if loops:
            loops.write_rows(index, weight, offset, mask, in_size, geometry, first_row, 0)
            ctx.save_for_backward(offset, mask)
            ctx.differentiate = functools.partial(loops.plan_gradients, in_size=in_size, geometry=geometry)
        elif any(ctx.needs_input_grad[:2]):
            saved = _write_rows(index, weight, offset, mask, in_size, geometry, first_row, 0)
            ctx.save_for_backward(*saved, *(() if mask is None else (mask,)))
        else:
            write_plan(index, weight, offset, mask, in_size, geometry, first_row)
        index = index.flatten()
        ctx.mark_non_differentiable(index)
        return index, weight.flatten()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.differentiate:
            return *ctx.differentiate(grad_weight.contiguous(), *ctx.saved_tensors), None, None, None, None
        y0, y1, inside_y0, inside_y1, x0, x1, inside_x0, inside_x1, *masks = ctx.saved_tensors
        g00, g01, g10, g11 = grad_weight.view(*y0.shape, 4).unbind(-1)
        upper, lower = g00 * x0 + g01 * x1, g10 * x0 + g11 * x1
        left, right = g00 * y0 + g10 * y1, g01 * y0 + g11 * y1
        grad_offset = grad_weight.new_empty(*y0.shape, 2)
        # the weights of the neighbours are 1 - fraction and fraction, inside the map
        torch.sub(lower * inside_y1, upper * inside_y0, out=grad_offset[..., 0])
        torch.sub(right * inside_x1, left * inside_x0, out=grad_offset[..., 1])
        grad_mask = None
        if masks:
            grad_offset *= _pixels_first(masks[0])[..., None]
            grad_mask = (upper * y0 + lower * y1).permute(0, 3, 1, 2)
        return grad_offset.flatten(3).permute(0, 3, 1, 2), grad_mask, None, None, None, None


def write_plan(
    index: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    in_size: Pair,
    geometry: Geometry,
    first_row: int,
    loops: ModuleType | None = None,
) -> None:
    """``sampling_plan`` without gradients into given tensors, a few rows of output pixels at a time.

    Args:
        index: (P, K, 4) int32, contiguous.
        weight: (P, K, 4), contiguous, of any floating dtype; of that of ``offset`` if ``loops`` are given.
        offset, mask, in_size, geometry, first_row, loops: as for ``sampling_plan``.
    """
    for block in blocks(offset, mask):
        write_block(index[block.pixels], weight[block.pixels], block, in_size, geometry, first_row, loops)


class Block(NamedTuple):
    """A few rows of output pixels of one image.

    Attributes:
        image: its number.
        top: the first of the rows.
        pixels: which of all P output pixels these are.
        offset, mask: there, (1, 2·K or K, rows, Wo).
    """

    image: int
    top: int
    pixels: slice
    offset: Tensor
    mask: Tensor | None


def blocks(offset: Tensor, mask: Tensor | None) -> Iterator[Block]:
    """All output pixels, as many at a time as a plan is made for."""
    batch, _, out_h, out_w = offset.shape
    height = pixels_of_block(offset) // max(out_w, 1)
    for image in range(batch):
        for top in range(0, out_h, max(height, 1)):
            part = (slice(image, image + 1), slice(None), slice(top, top + height))
            start = (image * out_h + top) * out_w
            rows = min(height, out_h - top)
            part_mask = None if mask is None else mask[part]
            yield Block(image, top, slice(start, start + rows * out_w), offset[part], part_mask)


def pixels_of_block(offset: Tensor) -> int:
    """Output pixels of the largest of the ``blocks``: whole rows of one image."""
    out_h, out_w = offset.shape[2:]
    return min(max(_PLAN_PIXELS // max(out_w, 1), 1), out_h) * out_w


def write_block(
    index: Tensor,
    weight: Tensor,
    block: Block,
    in_size: Pair,
    geometry: Geometry,
    first_row: int = 0,
    loops: ModuleType | None = None,
) -> None:
    """``write_plan`` for one of the ``blocks``."""
    first_row += block.image * in_size[0] * in_size[1]
    write = loops.write_rows if loops else _write_rows
    write(index, weight, block.offset, block.mask, in_size, geometry, first_row, block.top)


def _write_rows(
    index: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    in_size: Pair,
    geometry: Geometry,
    first_row: int,
    top: int,
) -> tuple[Tensor, ...]:
    """``write_plan`` at once for rows of output pixels of which the first is number ``top``.

    Returns:
        What the derivative needs: for rows, then for columns, the weights of both neighbours without the mask, and 1 or
        0 for whether they lie inside; (B, Ho, Wo, K) each.
    """
    offset = _pixels_first(offset)
    batch, out_h, out_w, _ = offset.shape
    grid_y, grid_x = _grid((out_h, out_w), geometry, offset, top)
    y0, y1, *rows = _neighbours(offset[..., 0::2] + grid_y, in_size[0])
    x0, x1, *columns = _neighbours(offset[..., 1::2] + grid_x, in_size[1])
    if first_row or batch > 1:
        images = torch.arange(batch, dtype=torch.int32, device=offset.device).view(-1, 1, 1, 1)
        for x in (x0, x1):
            x.add_(images * (in_size[0] * in_size[1]) + first_row)
    weight_y0, weight_y1 = rows[:2] if mask is None else (w * _pixels_first(mask) for w in rows[:2])
    weight_x0, weight_x1 = columns[:2]
    index, weight = (plan.view(*y0.shape, 4) for plan in (index, weight))
    for corner, (row, column) in enumerate(((y0, x0), (y0, x1), (y1, x0), (y1, x1))):
        torch.add(column, row, alpha=in_size[1], out=index[..., corner])
    pairs = ((weight_y0, weight_x0), (weight_y0, weight_x1), (weight_y1, weight_x0), (weight_y1, weight_x1))
    for corner, (vertical, horizontal) in enumerate(pairs):
        torch.mul(vertical, horizontal, out=weight[..., corner])
    return (*rows, *columns)


def _pixels_first(field: Tensor) -> Tensor:
    """(B, K, H, W) -> (B, H, W, K) with neighbouring numbers side by side; a view of (part of) a channels_last map."""
    view = field.permute(0, 2, 3, 1)
    if view.stride(-1) == 1:
        return view
    batch, count, height, width = field.shape
    return as_table(field).view(batch, height, width, count)


def _grid(out_size: Pair, geometry: Geometry, like: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Positions without offsets: rows (Ho, 1, K) from output row ``top`` on and columns (Wo, K), in input pixels."""
    tap = torch.arange(geometry.taps, device=like.device)
    rows, columns = (
        torch.arange(first, first + n, device=like.device)[:, None] * stride - padding + tap_position * dilation
        for first, n, stride, padding, dilation, tap_position in zip(
            (top, 0),
            out_size,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            (tap // geometry.kernel[1], tap % geometry.kernel[1]),
            strict=True,
        )
    )
    return rows[:, None].to(like.dtype), columns.to(like.dtype)


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Linear interpolation along an axis of ``size`` pixels; overwrites ``position``.

    Returns:
        The lower and the upper neighbour, int32, moved into the axis; their weights, zero if they had to be moved; and
        1 or 0 for whether they lie inside.
    """
    # further out everything is zero, and a huge position would overflow int32
    position.clamp_(-2, size + 1)
    low = position.floor()
    high = low + 1
    fraction = position.sub_(low)
    low_inside, high_inside = low.clamp(0, size - 1), high.clamp(0, size - 1)
    inside0, inside1 = low.eq_(low_inside), high.eq_(high_inside)
    # products, not torch.where: a NaN must come through
    weight0 = torch.addcmul(inside0, fraction, inside0, value=-1)
    weight1 = fraction.mul_(inside1)
    # clamped again, for NaN
    first, second = (i.to(torch.int32).clamp_(0, size - 1) for i in (low_inside, high_inside))
    return first, second, weight0, weight1, inside0, inside1
