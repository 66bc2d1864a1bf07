"""Modulated deformable convolution on CPUs at about the price of a dense convolution.

1. *Plan* (``deform_conv_plan``). For each (pixel, tap) four row numbers of the input seen as a (B·H·W, C) table, and
   four weights. This touches no channel, so it is cheap.
2. *Sampling* (``deform_conv_samples``): weighted sums of four rows. 4 multiply-adds for each sampled value, where step
   3 does O of them.
3. *Contraction.* The samples, (pixels, K·C), are multiplied by the weight matrix: the multiply-adds of a dense
   convolution. Steps 2 and 3 take a thousand pixels at a time, so that the samples stay in the cache and never exist
   as a whole; the backward pass takes them again instead of keeping them.

Steps 1 and 2 are done by PyTorch's operators, or where numba is installed by loops that it compiles. Groups and offset
groups are done one by one.

**Private operators.** The matrix is packed for oneDNN by ``torch.ops.mkldnn._reorder_linear_weight`` and applied by
``_linear_pointwise``, the operators of torch.compile's CPU code; plain ``F.linear`` is 8 to 30 % slower in float32, and
some 2 % in bfloat16.
They are used only after a tiny trial run gave the right answer; otherwise ``F.linear`` takes their place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dyhead_zoo.ops.deform_conv_plan import (
    Geometry,
    Pair,
    as_table,
    blocks,
    joined,
    pixels_of_block,
    position_dtype,
    sampling_plan,
    write_block,
    write_plan,
)
from dyhead_zoo.ops.deform_conv_samples import Samples, samples_of
from dyhead_zoo.ops.trial import undisturbed

Linear = Callable[[Tensor, Tensor | None], Tensor]

# multiply-adds from which on packing the matrix costs less than it saves
_PACKING_PAYS: dict[torch.dtype, float] = {torch.float32: 5e8, torch.bfloat16: 5e9}
_CHUNK_PIXELS = 1024  # per matrix product: samples small enough for the cache


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    loops: ModuleType | None = None,
) -> Tensor:
    """The three steps above, for arguments that ``modulated_deform_conv2d`` has checked; channels_last output.

    Args:
        x, offset, mask, weight, bias: as there.
        geometry: of the convolution.
        loops: ``deform_conv_loops``, to use these in place of PyTorch's operators; see ``compiled_loops``.
    """
    if loops is None and not border_is_finite(x):
        (top, left), x = geometry.padding, F.pad(x, (1, 1, 1, 1))
        geometry = geometry._replace(padding=(top - 1, left - 1))
    groups, offset_groups = x.shape[1] // weight.shape[1], offset.shape[1] // (2 * geometry.taps)
    parts = math.lcm(groups, offset_groups)  # of the channels, with one group and one offset group each
    if parts == 1:
        return _one_group(x, offset, mask, weight, geometry, loops, bias)
    per_group = parts // groups
    # each offset group for all parts that it moves
    spread = [group for group in range(offset_groups) for _ in range(parts // offset_groups)]
    offsets = [offset.chunk(offset_groups, 1)[group] for group in spread]
    masks = [None if mask is None else mask.chunk(offset_groups, 1)[group] for group in spread]
    weights = [part for rows in weight.chunk(groups) for part in rows.chunk(per_group, 1)]
    outputs = [
        _one_group(*part, geometry, loops) for part in zip(x.chunk(parts, 1), offsets, masks, weights, strict=True)
    ]
    sums = [sum(outputs[first + 1 : first + per_group], outputs[first]) for first in range(0, parts, per_group)]
    out = torch.cat(sums, 1)
    return out if bias is None else out + bias[:, None, None]


def _one_group(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    geometry: Geometry,
    loops: ModuleType | None,
    bias: Tensor | None = None,
) -> Tensor:
    batch, _, out_h, out_w = offset.shape
    dtype = position_dtype(x.dtype)
    offset, mask = offset.to(dtype), None if mask is None else mask.to(dtype)
    table, in_size = as_table(x), (x.shape[2], x.shape[3])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, offset, mask, weight, bias)):
        (out,) = convolve_table(table, [Convolution([(0, in_size)], [(offset, mask)], weight, bias, geometry)], loops)
    else:
        out = _without_gradients(table, offset, mask, in_size, geometry, as_matrix(weight), bias, loops)
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


def convolve_table(table: Tensor, convolutions: Sequence[Convolution], loops: ModuleType | None = None) -> list[Tensor]:
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
            sampling_plan(offset, mask, size, geometry, first_row, loops)
            for (offset, mask), (first_row, size) in zip(fields, sources, strict=True)
        ]
        index, sample_weight = (joined(parts) for parts in zip(*plans, strict=True))
        samples = samples_of(table, geometry.taps, loops)
        matrix = as_matrix(weight).to(table.dtype)
        inputs += [
            index,
            sample_weight.to(samples.weight_dtype),
            matrix,
            None if bias is None else bias.to(table.dtype),
        ]
    return list(_SampleAndContract.apply(loops, table, *inputs))


def _without_gradients(
    table: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    in_size: Pair,
    geometry: Geometry,
    matrix: Tensor,
    bias: Tensor | None,
    loops: ModuleType | None,
) -> Tensor:
    """All three steps for a few rows of output pixels at a time, so that the plan never exists as a whole: (P, O)."""
    pixels = offset[:, 0].numel()
    linear = packed_linear(matrix, pixels)
    samples = samples_of(table, geometry.taps, loops)
    single = pixels <= chunk_pixels()
    entries = (pixels if single else pixels_of_block(offset), geometry.taps, 4)
    index_buffer = torch.empty(entries, dtype=torch.int32, device=table.device)
    weight_buffer = table.new_empty(entries, dtype=samples.weight_dtype)
    if single:  # no need to put pieces together
        write_plan(index_buffer, weight_buffer, offset, mask, in_size, geometry, 0, loops)
        return linear(samples.take(index_buffer.flatten(), weight_buffer.flatten()), bias)
    out = table.new_empty(pixels, len(matrix))
    for block in blocks(offset, mask):
        count = block.pixels.stop - block.pixels.start
        index, weight = index_buffer[:count], weight_buffer[:count]
        write_block(index, weight, block, in_size, geometry, loops=loops)
        plan = (index.flatten(), weight.flatten())
        sample_and_contract(samples, *plan, matrix, bias, linear, out[block.pixels])
    return out


def as_matrix(weight: Tensor) -> Tensor:
    """(O, C, kh, kw) -> (O, K·C): a view of a channels_last tensor."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def border_is_finite(x: Tensor) -> bool:
    """Whether the outermost pixels of (B, C, H, W), which alone stand in for others, hold neither Inf nor NaN."""
    strips = (x[:, :, 0], x[:, :, -1], x[..., 0], x[..., -1])
    return all(bool(strip.detach().sum(dtype=position_dtype(x.dtype)).isfinite()) for strip in strips)


def sample_and_contract(
    samples: Samples,
    index: Tensor,
    weight: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    linear: Linear,
    out: Tensor,
) -> None:
    """Steps 2 and 3, out = (samples, (P, K·C)) @ matrix.T + bias, without gradients.

    Args:
        samples: of a table (R, C).
        index: (P·K·4,) int32, from ``sampling_plan``.
        weight: (P·K·4,), of the dtype that ``samples`` wants.
        matrix: (O, K·C), of the dtype of the table.
        bias: (O,) or None.
        linear: ``packed_linear`` of ``matrix``.
        out: (P, O), where the result goes.
    """
    per_pixel, chunk = 4 * samples.taps, chunk_pixels()
    for start in range(0, len(out), chunk):
        part = slice(start * per_pixel, (start + chunk) * per_pixel)
        # not named: memory that PyTorch's operators took for samples is free again, and in the cache, for the next
        out[start : start + chunk] = linear(samples.take(index[part], weight[part]), bias)


class _SampleAndContract(torch.autograd.Function):
    """``sample_and_contract`` of one table by several matrices, with gradients.

    The inputs after the table are, for each of the matrices: index, weights of the samples, matrix and bias.
    """

    @staticmethod
    def forward(ctx: Any, loops: ModuleType | None, table: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # nothing is to be done for outputs that no loss depends on
        ctx.loops = loops
        ctx.save_for_backward(table, *(value for *saved, _ in _fours(inputs) for value in saved))
        outputs = []
        for index, weight, matrix, bias in _fours(inputs):
            samples = samples_of(table, matrix.shape[1] // table.shape[1], loops)
            outputs.append(table.new_empty(len(index) // (4 * samples.taps), len(matrix)))
            pixels = len(outputs[-1])
            linear = packed_linear(matrix, pixels)
            sample_and_contract(samples, index, weight, matrix, bias, linear, outputs[-1])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: Tensor | None) -> tuple[Tensor | None, ...]:
        table, *saved = ctx.saved_tensors
        # sums over many chunks
        grad_table = torch.zeros_like(table, dtype=position_dtype(table.dtype)) if ctx.needs_input_grad[1] else None
        grads: list[Tensor | None] = []
        # backward() may be called inside an autocast region, which would change the dtype of the products
        with torch.autocast(table.device.type, enabled=False):
            for number, (grad_out, needs) in enumerate(zip(grads_out, _fours(ctx.needs_input_grad[2:]), strict=True)):
                index, weight, matrix = saved[3 * number : 3 * number + 3]
                inputs = (table, index, weight, matrix, needs, grad_table, ctx.loops)
                grads += [None] * 4 if grad_out is None else _backward(grad_out.contiguous(), *inputs)
        return None, None if grad_table is None else grad_table.to(table.dtype), *grads


def _fours(values: Sequence[Any]) -> list[Sequence[Any]]:
    return [values[start : start + 4] for start in range(0, len(values), 4)]


def _backward(
    grad_out: Tensor,
    table: Tensor,
    index: Tensor,
    weight: Tensor,
    matrix: Tensor,
    needs: Sequence[bool],
    grad_table: Tensor | None,
    loops: ModuleType | None,
) -> tuple[Tensor | None, ...]:
    """Gradients for one of the matrices; adds to ``grad_table`` if there is one.

    Returns:
        Those of index (None), weights of the samples, matrix and bias; None for what ``needs`` does not ask for.
    """
    _, need_weight, need_matrix, need_bias = needs
    channels, pixels = table.shape[1], len(grad_out)
    chunk = min(chunk_pixels() // 2, pixels)  # half: samples and their gradients are in the cache together
    grad_weight = torch.empty_like(weight) if need_weight else None
    # (K·C, O): products of this shape are the faster ones on several threads
    grad_transposed = matrix.new_zeros(matrix.shape[::-1], dtype=position_dtype(matrix.dtype)) if need_matrix else None
    buffer = matrix.new_empty(chunk, matrix.shape[1])  # new memory for each chunk may cost page faults
    samples = samples_of(table, matrix.shape[1] // channels, loops, buffer)
    add_gradients = samples.derivative(index, weight, chunk, grad_weight, grad_table)
    need_samples = grad_weight is not None or grad_table is not None
    to_samples = packed_linear(matrix.t(), pixels) if need_samples else None
    for start in range(0, pixels, chunk):
        part = slice(start, min(start + chunk, pixels))
        part_grad = grad_out[part]
        if grad_transposed is not None:
            entries = slice(part.start * 4 * samples.taps, part.stop * 4 * samples.taps)
            _add_product(grad_transposed, samples.take(index[entries], weight[entries]).t(), part_grad)
        if to_samples is not None:
            add_gradients(part, to_samples(part_grad, None).view(-1, channels))
    return (
        None,
        grad_weight,
        None if grad_transposed is None else grad_transposed.t().contiguous().to(matrix.dtype),
        grad_out.sum(0) if need_bias else None,
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be of a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def chunk_pixels() -> int:
    """Pixels of a matrix product: enough to keep every thread busy between two barriers."""
    return max(_CHUNK_PIXELS, 128 * torch.get_num_threads())


def packed_linear(matrix: Tensor, rows: int | None = None) -> Linear:
    """A function (values (n, in), bias) -> values @ matrix.T + bias for ``matrix`` (out, in).

    Args:
        matrix: packed if it is float32 or bfloat16 and on a CPU.
        rows: values that it is going to be called for in all, if these may be too few for packing to pay.
    """
    matrix = matrix.contiguous()
    suitable = matrix.device.type == "cpu" and matrix.dtype in _PACKING_PAYS
    pays = suitable and (rows is None or rows * matrix.numel() >= _PACKING_PAYS[matrix.dtype])
    if pays and _packed_linear_works(matrix.dtype):
        chunk = chunk_pixels() if rows is None else min(rows, chunk_pixels())
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix, chunk)
        return lambda values, bias: torch.ops.mkldnn._linear_pointwise(values, packed, bias, "none", [], "")
    return lambda values, bias: F.linear(values, matrix, bias)


@functools.cache
def _packed_linear_works(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN's packed linear with the private signature that we rely on."""
    return undisturbed(functools.partial(_packed_linear_trial, dtype))


def _packed_linear_trial(dtype: torch.dtype) -> bool:
    matrix, values, bias = (t.to(dtype) for t in (torch.arange(6.0).view(2, 3), torch.ones(4, 3), torch.ones(2)))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix, 4)
        out = torch.ops.mkldnn._linear_pointwise(values, packed, bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(out, F.linear(values, matrix, bias))
