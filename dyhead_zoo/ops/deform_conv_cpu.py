"""Modulated deformable convolution on CPUs in plain PyTorch, at about the price of a dense convolution.

1. *Plan.* For each (pixel, tap) the four neighbours become four row numbers of the input seen as a (B·H·W, C) table,
   and four weights: bilinear weight times mask, zero outside the map. This touches no channel, so it is cheap; offsets
   and mask get their gradients through the weights.
2. *Sampling.* A weighted sum of a few rows of a table is what ``embedding_bag`` computes, with a vectorised kernel on
   the CPU: 4 multiply-adds for each sampled value, where step 3 does O of them.
3. *Contraction.* The samples, (pixels, K·C), are multiplied by the weight matrix: the multiply-adds of a dense
   convolution. Steps 2 and 3 take a thousand pixels at a time, so that the samples stay in the cache and never exist
   as a whole; the backward pass takes them again instead of keeping them.

Groups and offset groups are done one by one.

**Private operators.** For float32 the matrix is packed for oneDNN by ``torch.ops.mkldnn._reorder_linear_weight`` and
applied by ``_linear_pointwise``, the operators of torch.compile's CPU code; plain ``F.linear`` is 8 to 30 % slower.
They are used only after a tiny trial run gave the right answer; otherwise ``F.linear`` takes their place. The backward
pass calls ``aten::_embedding_bag_per_sample_weights_backward``, which is behind the gradient of ``F.embedding_bag``.

**Non-finite inputs.** A neighbour outside the map is replaced by a border pixel of weight zero. Where the border holds
an Inf or NaN, which zero does not cancel, the map gets a border of zeros first, as torchvision's operator behaves.
Infinite offsets are outside the map; NaN offsets give NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Pair = tuple[int, int]
Linear = Callable[[Tensor, Tensor | None], Tensor]

INT32_LIMIT = 2**31
_PACKING_PAYS = 10**9  # multiply-adds from which on packing the matrix costs less than it saves
_CHUNK_PIXELS = 1024  # per matrix product: samples small enough for the cache
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


def deform_conv2d(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """The three steps above, for arguments that ``modulated_deform_conv2d`` has checked; channels_last output."""
    if not border_is_finite(x):
        (top, left), x = geometry.padding, F.pad(x, (1, 1, 1, 1))
        geometry = geometry._replace(padding=(top - 1, left - 1))
    groups, offset_groups = x.shape[1] // weight.shape[1], offset.shape[1] // (2 * geometry.taps)
    parts = math.lcm(groups, offset_groups)  # of the channels, with one group and one offset group each
    if parts == 1:
        return _one_group(x, offset, mask, weight, geometry, bias)
    per_group = parts // groups
    # each offset group for all parts that it moves
    spread = [group for group in range(offset_groups) for _ in range(parts // offset_groups)]
    offsets = [offset.chunk(offset_groups, 1)[group] for group in spread]
    masks = [None if mask is None else mask.chunk(offset_groups, 1)[group] for group in spread]
    weights = [part for rows in weight.chunk(groups) for part in rows.chunk(per_group, 1)]
    outputs = [_one_group(*part, geometry) for part in zip(x.chunk(parts, 1), offsets, masks, weights, strict=True)]
    sums = [sum(outputs[first + 1 : first + per_group], outputs[first]) for first in range(0, parts, per_group)]
    out = torch.cat(sums, 1)
    return out if bias is None else out + bias[:, None, None]


def _one_group(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    geometry: Geometry,
    bias: Tensor | None = None,
) -> Tensor:
    batch, _, out_h, out_w = offset.shape
    dtype = position_dtype(x.dtype)
    offset, mask = offset.to(dtype), None if mask is None else mask.to(dtype)
    table, in_size = as_table(x), (x.shape[2], x.shape[3])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, offset, mask, weight, bias)):
        (out,) = convolve_table(table, [Convolution([(0, in_size)], [(offset, mask)], weight, bias, geometry)])
    else:
        out = _without_gradients(table, offset, mask, in_size, geometry, as_matrix(weight), bias)
    return out.view(batch, out_h, out_w, -1).permute(0, 3, 1, 2)


class Convolution(NamedTuple):
    """Deformable convolutions of some of the maps in a table, with the same weights.

    Attributes:
        sources: for each map of the output the first row of the map that it samples, and that map's (height, width).
        fields: for each its offsets (B, 2·K, Ho, Wo) and masks (B, K, Ho, Wo), float32 or float64.
        weight: (O, C, kh, kw).
        bias: (O,) or None.
        geometry: of the kernel.
    """

    sources: Sequence[tuple[int, Pair]]
    fields: Sequence[tuple[Tensor, Tensor | None]]
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry


def convolve_table(table: Tensor, convolutions: Sequence[Convolution]) -> list[Tensor]:
    """Convolutions of the maps in one table (R, C), differentiable; see ``deform_conv2d`` for a single one.

    Each weight is laid out once and gets its gradient at once for all maps that it serves, small maps share matrix
    products, and all convolutions add to one gradient of the table.

    Returns:
        For each convolution (P, O), a row for each output pixel: map after map, image after image, row after row. Of
        the dtype of ``table``, to which weights and biases are converted.
    """
    inputs: list[Tensor | None] = []
    for sources, fields, weight, bias, geometry in convolutions:
        plans = [
            sampling_plan(offset, mask, size, geometry, first_row)
            for (offset, mask), (first_row, size) in zip(fields, sources, strict=True)
        ]
        index, sample_weight = (joined(parts) for parts in zip(*plans, strict=True))
        matrix = as_matrix(weight).to(table.dtype)
        inputs += [index, sample_weight.to(table.dtype), matrix, None if bias is None else bias.to(table.dtype)]
    return list(_SampleAndContract.apply(table, *inputs))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One below the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _without_gradients(
    table: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    in_size: Pair,
    geometry: Geometry,
    matrix: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """All three steps for a few rows of output pixels at a time, so that the plan never exists as a whole: (P, O)."""
    pixels = offset[:, 0].numel()
    out = table.new_empty(pixels, len(matrix))
    linear = packed_linear(matrix, pixels)
    entries = (_pixels_of_block(offset), geometry.taps, 4)
    index_buffer = torch.empty(entries, dtype=torch.int32, device=table.device)
    weight_buffer = table.new_empty(entries)
    for block in _blocks(offset, mask):
        count = block.pixels.stop - block.pixels.start
        index, weight = index_buffer[:count], weight_buffer[:count]
        first_row = block.image * in_size[0] * in_size[1]
        _write_rows(index, weight, block.offset, block.mask, in_size, geometry, first_row, block.top)
        sample_and_contract(table, index.flatten(), weight.flatten(), matrix, bias, linear, out[block.pixels])
    return out


def position_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where that is the dtype: bfloat16 has no fractions left beyond pixel 128."""
    return torch.promote_types(dtype, torch.float32)


def as_table(x: Tensor) -> Tensor:
    """(B, C, H, W) -> contiguous (B·H·W, C): a view of a channels_last tensor."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).flatten(0, 2).contiguous()
    # image by image: the copy of a 2-D transpose is blocked, that of a 4-D permutation is not and takes twice as long
    return joined([image.flatten(1).t().contiguous() for image in x])


def as_matrix(weight: Tensor) -> Tensor:
    """(O, C, kh, kw) -> (O, K·C): a view of a channels_last tensor."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def border_is_finite(x: Tensor) -> bool:
    """Whether the outermost pixels of (B, C, H, W), which alone stand in for others, hold neither Inf nor NaN."""
    strips = (x[:, :, 0], x[:, :, -1], x[..., 0], x[..., -1])
    return all(bool(strip.detach().sum(dtype=position_dtype(x.dtype)).isfinite()) for strip in strips)


# -- step 1 ------------------------------------------------------------------------------------------------------------


def sampling_plan(
    offset: Tensor, mask: Tensor | None, in_size: Pair, geometry: Geometry, first_row: int = 0
) -> tuple[Tensor, Tensor]:
    """Which rows of the table make up each sample, and with which weights.

    Args:
        offset: (B, 2·K, Ho, Wo) in input pixels, (dy, dx) pairs, float32 or float64. channels_last spares a copy.
        mask: (B, K, Ho, Wo), of the dtype of ``offset``, or None for 1.
        in_size: (height, width) of the maps that are sampled.
        geometry: of the convolution.
        first_row: row of the table at which the first map begins.

    Returns:
        index: (P·K·4,) int32, ordered by pixel (b, y, x), tap, corner.
        weight: (P·K·4,) like ``offset``, differentiable in ``offset`` and ``mask``; zero where a corner is off the map.
    """
    index, weight = _SamplingPlan.apply(offset, mask, in_size, geometry, first_row)
    return index, weight


class _SamplingPlan(torch.autograd.Function):
    """``sampling_plan`` with in-place arithmetic, and its derivative written out."""

    @staticmethod
    def forward(
        ctx: Any, offset: Tensor, mask: Tensor | None, in_size: Pair, geometry: Geometry, first_row: int
    ) -> tuple[Tensor, Tensor]:
        pixels = offset[:, 0].numel()
        index = torch.empty(pixels, geometry.taps, 4, dtype=torch.int32, device=offset.device)
        weight = offset.new_empty(index.shape)
        if any(ctx.needs_input_grad[:2]):
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
        return grad_offset.flatten(3).permute(0, 3, 1, 2), grad_mask, None, None, None


def write_plan(
    index: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    in_size: Pair,
    geometry: Geometry,
    first_row: int,
) -> None:
    """``sampling_plan`` without gradients into given tensors, a few rows of output pixels at a time.

    Args:
        index: (P, K, 4) int32, contiguous.
        weight: (P, K, 4) of any floating dtype, contiguous.
        offset, mask, in_size, geometry, first_row: as for ``sampling_plan``.
    """
    for block in _blocks(offset, mask):
        first = first_row + block.image * in_size[0] * in_size[1]
        _write_rows(
            index[block.pixels], weight[block.pixels], block.offset, block.mask, in_size, geometry, first, block.top
        )


class _Block(NamedTuple):
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


def _blocks(offset: Tensor, mask: Tensor | None) -> Iterator[_Block]:
    """All output pixels, as many at a time as a plan is made for."""
    batch, _, out_h, out_w = offset.shape
    height = _pixels_of_block(offset) // max(out_w, 1)
    for image in range(batch):
        for top in range(0, out_h, max(height, 1)):
            part = (slice(image, image + 1), slice(None), slice(top, top + height))
            start = (image * out_h + top) * out_w
            rows = min(height, out_h - top)
            part_mask = None if mask is None else mask[part]
            yield _Block(image, top, slice(start, start + rows * out_w), offset[part], part_mask)


def _pixels_of_block(offset: Tensor) -> int:
    """Output pixels of the largest of the ``_blocks``: whole rows of one image."""
    out_h, out_w = offset.shape[2:]
    return min(max(_PLAN_PIXELS // max(out_w, 1), 1), out_h) * out_w


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


# -- steps 2 and 3 -----------------------------------------------------------------------------------------------------


def sample_and_contract(
    table: Tensor,
    index: Tensor,
    sample_weight: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    linear: Linear | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Steps 2 and 3, out = (samples of the table, (P, K·C)) @ matrix.T + bias, without gradients.

    Args:
        table: (R, C).
        index: (P·K·4,) int32, from ``sampling_plan``.
        sample_weight: (P·K·4,), of the dtype of ``table``.
        matrix: (O, K·C), of the dtype of ``table``.
        bias: (O,) or None.
        linear: ``packed_linear`` of ``matrix``, if that has been made before.
        out: (P, O), where the result goes; default: a new tensor.

    Returns:
        (P, O).
    """
    per_pixel = matrix.shape[1] // table.shape[1] * 4
    pixels = len(index) // per_pixel
    chunk = min(_chunk_pixels(), pixels)
    bag_starts = torch.arange(0, chunk * per_pixel, 4, dtype=torch.int32, device=table.device)
    linear = linear or packed_linear(matrix, pixels)
    out = table.new_empty(pixels, len(matrix)) if out is None else out
    for start in range(0, pixels, chunk):
        part = slice(start * per_pixel, (start + chunk) * per_pixel)
        part_index = index[part]
        samples = _sum_bags(table, part_index, bag_starts[: len(part_index) // 4], sample_weight[part])
        out[start : start + chunk] = linear(samples.view(-1, matrix.shape[1]), bias)
        del samples  # the next ones take its memory, which is in the cache
    return out


class _SampleAndContract(torch.autograd.Function):
    """``sample_and_contract`` of one table by several matrices, with gradients.

    The inputs after the table are, for each of the matrices: index, weights of the samples, matrix and bias.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # nothing is to be done for outputs that no loss depends on
        ctx.save_for_backward(table, *(value for *saved, _ in _fours(inputs) for value in saved))
        return tuple(sample_and_contract(table, *one) for one in _fours(inputs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: Tensor | None) -> tuple[Tensor | None, ...]:
        table, *saved = ctx.saved_tensors
        # sums over many chunks
        grad_table = torch.zeros_like(table, dtype=position_dtype(table.dtype)) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        # backward() may be called inside an autocast region, which would change the dtype of the products
        with torch.autocast(table.device.type, enabled=False):
            for number, (grad_out, needs) in enumerate(zip(grads_out, _fours(ctx.needs_input_grad[1:]), strict=True)):
                index, sample_weight, matrix = saved[3 * number : 3 * number + 3]
                inputs = (table, index, sample_weight, matrix, needs, grad_table)
                grads += [None] * 4 if grad_out is None else _backward(grad_out.contiguous(), *inputs)
        return None if grad_table is None else grad_table.to(table.dtype), *grads


def _fours(values: Sequence[Any]) -> list[Sequence[Any]]:
    return [values[start : start + 4] for start in range(0, len(values), 4)]


def _backward(
    grad_out: Tensor,
    table: Tensor,
    index: Tensor,
    sample_weight: Tensor,
    matrix: Tensor,
    needs: Sequence[bool],
    grad_table: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients for one of the matrices; adds to ``grad_table`` if there is one.

    Returns:
        Those of index (None), weights of the samples, matrix and bias; None for what ``needs`` does not ask for.
    """
    _, need_sample_weight, need_matrix, need_bias = needs
    rows, channels = table.shape
    pixels, per_pixel = len(grad_out), matrix.shape[1] // channels * 4
    chunk = min(_chunk_pixels() // 2, pixels)  # half: samples and their gradients are in the cache together
    grad_sample_weight = torch.empty_like(sample_weight) if need_sample_weight else None
    grad_matrix = torch.zeros_like(matrix, dtype=position_dtype(table.dtype)) if need_matrix else None
    bag_starts = torch.arange(0, chunk * per_pixel, 4, dtype=torch.int32, device=table.device)
    # shifts in place of // 4 here and below: integer division is not vectorised
    bag_of_sample = torch.arange(chunk * per_pixel, dtype=torch.int32, device=table.device) >> 2
    buffer = matrix.new_empty(chunk, matrix.shape[1])  # a new one for each chunk costs page faults
    readers = None if grad_table is None else _readers(index, rows, chunk * per_pixel)
    for number, start in enumerate(range(0, pixels, chunk)):
        part = slice(start * per_pixel, (start + chunk) * per_pixel)
        part_index, part_weight, part_grad = index[part], sample_weight[part], grad_out[start : start + chunk]
        part_starts = bag_starts[: len(part_index) // 4]
        if grad_matrix is not None:
            samples = _sum_bags(table, part_index, part_starts, part_weight).view(-1, matrix.shape[1])
            _add_product(grad_matrix, part_grad.t(), samples)
            del samples
        if grad_sample_weight is None and grad_table is None:
            continue
        grad_samples = torch.mm(part_grad, matrix, out=buffer[: len(part_grad)]).view(-1, channels)
        if grad_sample_weight is not None:
            grad_sample_weight[part] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                grad_samples, table, part_index, part_starts, bag_of_sample[: len(part_index)], 0, -1
            )
        if grad_table is not None and readers is not None:
            key, position = readers[0][part], readers[1][part] - start * per_pixel
            _scatter(grad_table, key, number * rows, position, grad_samples, part_weight)
    return (
        None,
        grad_sample_weight,
        None if grad_matrix is None else grad_matrix.to(matrix.dtype),
        grad_out.sum(0) if need_bias else None,
    )


def _readers(index: Tensor, rows: int, chunk_length: int) -> tuple[Tensor, Tensor]:
    """The plan transposed, chunk by chunk: by whom each row of the table is read. One sort is far cheaper than many.

    Returns:
        key: ``chunk · rows + row``, ascending.
        position: int32, that of the entry of ``index`` that reads this row.
    """
    chunks = -(-len(index) // chunk_length)
    key = index.to(torch.int32 if chunks * rows < INT32_LIMIT else torch.int64, copy=True)
    for number in range(1, chunks):
        key[number * chunk_length : (number + 1) * chunk_length] += number * rows
    key, position = torch.sort(key, stable=True)
    return key, position.to(torch.int32)


def _scatter(
    grad_table: Tensor, key: Tensor, first_key: int, position: Tensor, grad_samples: Tensor, weight: Tensor
) -> None:
    """Add to each row of ``grad_table`` the gradients of the samples that read it.

    Again this is a weighted sum per bag, one bag for each row from the first to the last that is read. ``key`` and
    ``position`` are those of a chunk, from ``_readers``; ``first_key`` is the key of row 0, and positions count from
    the chunk's first entry.
    """
    first, last = int(key[0]), int(key[-1])
    starts = torch.searchsorted(key, torch.arange(first, last + 1, dtype=key.dtype, device=key.device), out_int32=True)
    sums = _sum_bags(grad_samples, position >> 2, starts, weight.index_select(0, position))
    grad_table[first - first_key : last + 1 - first_key] += sums


def _sum_bags(table: Tensor, index: Tensor, starts: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight · table[index] over each bag; a bag extends to the start of the next."""
    return torch.embedding_bag(table.detach(), index, starts, False, 0, False, weight.detach())[0]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be of a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _chunk_pixels() -> int:
    """Pixels of a matrix product: enough to keep every thread busy between two barriers."""
    return max(_CHUNK_PIXELS, 128 * torch.get_num_threads())


def packed_linear(matrix: Tensor, rows: int | None = None) -> Linear:
    """A function (values (n, in), bias) -> values @ matrix.T + bias for ``matrix`` (out, in).

    Args:
        matrix: packed if it is float32 and on a CPU.
        rows: values that it is going to be called for in all, if these may be too few for packing to pay.
    """
    matrix = matrix.contiguous()
    suitable = matrix.device.type == "cpu" and matrix.dtype == torch.float32
    pays = rows is None or rows * matrix.numel() >= _PACKING_PAYS
    if suitable and pays and _packed_linear_works():
        chunk = _chunk_pixels() if rows is None else min(rows, _chunk_pixels())
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix, chunk)
        return lambda values, bias: torch.ops.mkldnn._linear_pointwise(values, packed, bias, "none", [], "")
    return lambda values, bias: F.linear(values, matrix, bias)


@functools.cache
def _packed_linear_works() -> bool:
    """Whether this build of torch has oneDNN's packed linear with the private signature that we rely on."""
    matrix, values, bias = torch.arange(6.0).view(2, 3), torch.ones(4, 3), torch.ones(2)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix, 4)
        out = torch.ops.mkldnn._linear_pointwise(values, packed, bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(out, F.linear(values, matrix, bias))
