"""Modulated deformable convolution (DCNv2, https://arxiv.org/abs/1811.11168) at about the price of a dense convolution.

For every output pixel p and every tap k of the kernel the input is sampled bilinearly at a learned position,

    y(p) = bias + sum_k  W_k · m_k(p) · x(p·stride - padding + k·dilation + offset_k(p)),

where x is zero outside the map. With ``mask=None`` (m = 1) this is DCNv1 (https://arxiv.org/abs/1703.06211).

**Backends.** ``torchvision`` is the reference: ``torchvision.ops.deform_conv2d``, which also is what exporters understand
(one DeformConv node in ONNX). Its CPU kernel costs four to nine dense convolutions. ``bag`` is plain PyTorch:

1. *Plan.* For each (pixel, tap) the four neighbours become four row numbers of the input seen as a (B·H·W, C) table, and
   four weights: bilinear weight x mask, zero outside the map. This touches no channel, so it is cheap, and ordinary
   autograd differentiates it: offsets and mask get their gradients through the weights.
2. *Sampling.* A weighted sum of four rows is what ``embedding_bag`` computes, with a vectorised kernel on the CPU. It
   reads and writes memory once and does 1/(2·O) of the arithmetic of step 3.
3. *Contraction.* The sampled rows, (pixels, taps·C), are multiplied by the weight matrix: the same multiply-adds as a
   dense convolution. Steps 2 and 3 go through a few hundred pixels at a time, so the columns stay in cache and never
   exist as a whole; the backward pass samples them again instead of keeping them.

**Private operators.** Weights are packed once per call for oneDNN by ``torch.ops.mkldnn._reorder_linear_weight`` and
``_linear_pointwise`` (what torch.compile's CPU code uses; MKL's plain sgemm is 8 to 30 % slower). They are used only when
a tiny trial run gives the right answer; otherwise ``F.linear`` takes their place. The backward pass calls
``aten::_embedding_bag_per_sample_weights_backward``, the operator behind ``F.embedding_bag``'s own gradient.

**Non-finite inputs.** A sample that lies wholly outside the map multiplies a border pixel by zero, so an Inf or NaN there
becomes NaN, where torchvision gives 0. Finite inputs are not affected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import deform_conv2d

Backend = Literal["auto", "bag", "torchvision"]
Pair = tuple[int, int]

_INT32_LIMIT = 2**31


def modulated_deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Deformable convolution v2 (v1 when ``mask`` is None), with the semantics of ``torchvision.ops.deform_conv2d``.

    The number of groups is C / ``weight.shape[1]``; the number of offset groups G is ``offset.shape[1]`` / (2·K), where
    K = kh·kw.

    Under autocast ``x``, ``weight`` and ``bias`` are cast to the autocast dtype, as for a convolution; sampling positions
    are computed in float32 (float64 for float64 inputs) whatever the dtype of ``x``.

    Args:
        x: (B, C, H, W). channels_last spares the ``bag`` backend a copy.
        offset: (B, 2·K·G, Ho, Wo) in input pixels: (dy, dx) pairs, taps row by row. Any floating dtype.
        mask: (B, K·G, Ho, Wo), a factor per sample, or None for 1. Any floating dtype.
        weight: (O, C / groups, kh, kw), of the dtype of ``x``.
        bias: (O,), of the dtype of ``x``, or None.
        stride: of the sampling grid, in input pixels; an int or (vertical, horizontal).
        padding: zeros around the input, likewise.
        dilation: distance of the taps, likewise.
        backend: ``auto`` is ``bag`` on the CPU where it applies (one group, one offset group, and neither compiling,
            exporting nor tracing), else ``torchvision``.

    Returns:
        (B, O, Ho, Wo) of the dtype of ``x`` (of autocast, where that is on); channels_last from ``bag``.

    Raises:
        ValueError: shapes, dtypes or the backend do not fit.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        cast_bias = None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return modulated_deform_conv2d(
                x.to(dtype), offset, mask, weight.to(dtype), cast_bias, stride, padding, dilation, backend=backend
            )
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not tracing:  # a traced comparison of sizes would become a constraint on the sizes of the exported graph
        _check(x, offset, mask, weight, bias, stride, padding, dilation)
    obstacle = _why_not_bag(x, offset, weight)
    if backend == "bag" and obstacle is not None:
        raise ValueError(f"backend 'bag' {obstacle}; use backend='torchvision' or 'auto'")
    if backend not in ("auto", "bag", "torchvision"):
        raise ValueError(f"backend {backend!r} is unknown: choose 'auto', 'bag' or 'torchvision'")
    use_bag = backend == "bag" or (backend == "auto" and obstacle is None and device == "cpu" and not tracing)
    if use_bag and offset.numel() > 0:
        return _bag_conv(x, offset, mask, weight, bias, stride, padding, dilation)
    return _reference_conv(x, offset, mask, weight, bias, stride, padding, dilation)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _check(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> None:
    """Raise a ValueError that names the shapes if the arguments do not belong together."""
    for name, tensor in (("x", x), ("offset", offset), ("mask", mask), ("weight", weight)):
        if tensor is not None and tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(tensor.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but x is {x.dtype}: convert one of them, or use autocast")
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(f"need stride and dilation >= 1 and padding >= 0, got {stride=}, {dilation=}, {padding=}")
    batch, channels, *size = x.shape
    out_channels, group_channels, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    if group_channels == 0 or channels % group_channels or out_channels % (channels // group_channels):
        raise ValueError(
            f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}: expected (O, C / groups, kh, kw)"
        )
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({out_channels},)")
    offset_groups = offset.shape[1] // (2 * taps)
    if offset_groups == 0 or offset.shape[1] % (2 * taps) or channels % offset_groups:
        raise ValueError(
            f"offset has {offset.shape[1]} channels; a {kernel[0]}x{kernel[1]} kernel needs {2 * taps}, (dy, dx) per tap, "
            f"or a multiple of it whose factor divides the {channels} channels of x"
        )
    out_size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    if min(out_size) < 1:
        raise ValueError(
            f"a {kernel[0]}x{kernel[1]} kernel does not fit x {tuple(x.shape)} with {padding=}, {dilation=}"
        )
    for name, tensor, count in (("offset", offset, 2 * taps * offset_groups), ("mask", mask, taps * offset_groups)):
        expected = (batch, count, *out_size)
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {expected} for x {tuple(x.shape)}, "
                f"weight {tuple(weight.shape)}, {stride=}, {padding=}, {dilation=}"
            )


def _why_not_bag(x: Tensor, offset: Tensor, weight: Tensor) -> str | None:
    """What keeps the ``bag`` backend from handling these arguments, or None."""
    taps = weight.shape[2] * weight.shape[3]
    if weight.shape[1] != x.shape[1]:
        return f"handles one group, not {x.shape[1] // weight.shape[1]}"
    if offset.shape[1] != 2 * taps:
        return f"handles one offset group, not {offset.shape[1] // (2 * taps)}"
    samples = offset.shape[0] * offset.shape[2] * offset.shape[3] * taps * 4
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    if max(samples, rows) >= _INT32_LIMIT:
        return f"counts samples and pixels in int32, and {max(samples, rows)} does not fit"
    return None


def _position_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _reference_conv(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """torchvision's operator; it wants one dtype throughout, and on the CPU knows no bfloat16."""
    dtype = _position_dtype(x.dtype)
    out = deform_conv2d(
        x.to(dtype),
        offset.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        stride,
        padding,
        dilation,
        None if mask is None else mask.to(dtype),
    )
    return out.to(x.dtype)


def _bag_conv(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    batch, _, out_h, out_w = offset.shape
    out_channels, _, kernel_h, kernel_w = weight.shape
    index, sample_weight = _sampling_plan(
        offset,
        mask,
        (x.shape[2], x.shape[3]),
        (kernel_h, kernel_w),
        stride,
        padding,
        dilation,
        _position_dtype(x.dtype),
    )
    matrix = weight.permute(0, 2, 3, 1).reshape(out_channels, -1)
    out = _SampleAndContract.apply(_as_table(x), index, sample_weight.to(x.dtype), matrix, bias)
    return out.view(batch, out_h, out_w, out_channels).permute(0, 3, 1, 2)


def _as_table(x: Tensor) -> Tensor:
    """(B, C, H, W) -> contiguous (B·H·W, C): a view of a channels_last tensor."""
    channels = x.shape[1]
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1, channels).contiguous()
    # copies of 2-D transposes are blocked, those of 4-D permutations are not and take twice as long
    images = [image.reshape(channels, -1).t().contiguous() for image in x]
    return images[0] if len(images) == 1 else torch.cat(images)


def _sampling_plan(
    offset: Tensor,
    mask: Tensor | None,
    in_size: Pair,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Which rows of the table make up each sample, and with which weights.

    Returns:
        index: (P·K·4,) int32, ordered by pixel (b, y, x), tap, corner.
        weight: (P·K·4,) of ``dtype``, differentiable in ``offset`` and ``mask``; zero where a corner is off the map.
    """
    batch, _, out_h, out_w = offset.shape
    height, width = in_size
    taps = kernel[0] * kernel[1]
    device = offset.device
    offset = offset.permute(0, 2, 3, 1).reshape(batch, out_h, out_w, taps, 2).to(dtype)
    tap = torch.arange(taps, device=device)
    grid_y = torch.arange(out_h, device=device)[:, None, None] * stride[0] - padding[0] + tap // kernel[1] * dilation[0]
    grid_x = torch.arange(out_w, device=device)[:, None] * stride[1] - padding[1] + tap % kernel[1] * dilation[1]
    y0, y1, weight_y0, weight_y1 = _neighbours(offset[..., 0] + grid_y, height)
    x0, x1, weight_x0, weight_x1 = _neighbours(offset[..., 1] + grid_x, width)
    first_row = torch.arange(batch, device=device, dtype=torch.int32).view(-1, 1, 1, 1) * (height * width)
    row0, row1 = y0 * width + first_row, y1 * width + first_row
    index = torch.stack((row0 + x0, row0 + x1, row1 + x0, row1 + x1), -1)
    if mask is not None:
        mask = mask.permute(0, 2, 3, 1).to(dtype)
        weight_y0, weight_y1 = weight_y0 * mask, weight_y1 * mask
    weight = torch.stack(
        (weight_y0 * weight_x0, weight_y0 * weight_x1, weight_y1 * weight_x0, weight_y1 * weight_x1), -1
    )
    return index.view(-1), weight.view(-1)


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Linear interpolation on an axis of ``size`` pixels: both neighbours (int32, within the axis) and their weights."""
    # beyond one pixel outside everything is zero; the clamp keeps huge positions from overflowing int32
    position = position.clamp(-2, size + 1)
    floor = position.detach().floor()
    low = floor.to(torch.int32)
    high = low + 1
    high_weight = position - floor
    low_weight = (1 - high_weight) * ((low >= 0) & (low < size))
    high_weight = high_weight * ((high >= 0) & (high < size))
    return low.clamp_(0, size - 1), high.clamp_(0, size - 1), low_weight, high_weight


def _chunk_pixels() -> int:
    """Output pixels per matrix product: columns small enough for the cache, yet enough work for every thread."""
    return 512 if torch.get_num_threads() == 1 else 1024


class _SampleAndContract(torch.autograd.Function):
    """(table, index, sample weight, matrix, bias) -> (P, O), see steps 2 and 3 above.

    table (R, C), index (P·K·4,) int32, sample weight (P·K·4,), matrix (O, K·C), bias (O,) or None.
    """

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, index: Tensor, sample_weight: Tensor, matrix: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(table, index, sample_weight, matrix)
        per_pixel = matrix.shape[1] // table.shape[1] * 4
        pixels = index.numel() // per_pixel
        chunk = min(_chunk_pixels(), pixels)
        bag_starts = torch.arange(0, chunk * per_pixel, 4, dtype=torch.int32, device=table.device)
        linear = _linear(matrix, chunk)
        out = table.new_empty(pixels, matrix.shape[0])
        for start in range(0, pixels, chunk):
            part = slice(start * per_pixel, (start + chunk) * per_pixel)
            part_index = index[part]
            columns = _bag(table, part_index, bag_starts[: len(part_index) // 4], sample_weight[part])
            out[start : start + chunk] = linear(columns.view(-1, matrix.shape[1]), bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        # whoever calls backward() inside an autocast region must not get other products than the forward pass made
        with torch.autocast(grad_out.device.type, enabled=False):
            gradients = _sample_and_contract_backward(grad_out.contiguous(), *ctx.saved_tensors, ctx.needs_input_grad)
        return gradients


def _sample_and_contract_backward(
    grad_out: Tensor, table: Tensor, index: Tensor, sample_weight: Tensor, matrix: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``_SampleAndContract``; ``needs`` says for which of its five arguments."""
    need_table, _, need_sample_weight, need_matrix, need_bias = needs
    pixels = grad_out.shape[0]
    rows, channels = table.shape
    per_pixel = matrix.shape[1] // channels * 4
    chunk = min(_chunk_pixels(), pixels)
    # sums over many chunks are kept in float32 at least
    sum_dtype = _position_dtype(table.dtype)
    grad_table = torch.zeros_like(table, dtype=sum_dtype) if need_table else None
    grad_sample_weight = torch.empty_like(sample_weight) if need_sample_weight else None
    grad_matrix = torch.zeros_like(matrix, dtype=sum_dtype) if need_matrix else None
    bag_starts = torch.arange(0, chunk * per_pixel, 4, dtype=torch.int32, device=table.device)
    bag_of_sample = torch.arange(chunk * per_pixel, dtype=torch.int32, device=table.device) // 4
    linear = _linear(matrix.t().contiguous(), chunk)
    if grad_table is not None:
        sorted_key, order = _sort_by_chunk_and_row(index, rows, chunk * per_pixel)
    for number, start in enumerate(range(0, pixels, chunk)):
        part = slice(start * per_pixel, (start + chunk) * per_pixel)
        part_index, part_weight, part_grad = index[part], sample_weight[part], grad_out[start : start + chunk]
        starts = bag_starts[: len(part_index) // 4]
        if grad_matrix is not None:
            columns = _bag(table, part_index, starts, part_weight).view(-1, matrix.shape[1])
            _add_product(grad_matrix, part_grad.t(), columns)
            del columns  # its memory serves the next allocation
        if grad_table is None and grad_sample_weight is None:
            continue
        grad_columns = linear(part_grad, None).view(-1, channels)
        if grad_sample_weight is not None:
            grad_sample_weight[part] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                grad_columns, table, part_index, starts, bag_of_sample[: len(part_index)], 0, -1
            )
        if grad_table is not None:
            # the transposed plan: every row of the table sums up the samples that read it, again by embedding_bag
            key, sample = sorted_key[part], order[part]
            first, last = int(key[0]), int(key[-1])
            row_starts = torch.searchsorted(key, torch.arange(first, last + 1, dtype=key.dtype), out_int32=True)
            sums = _bag(grad_columns, sample // 4, row_starts, part_weight[sample])
            grad_table[first - number * rows : last + 1 - number * rows] += sums
    return (
        None if grad_table is None else grad_table.to(table.dtype),
        None,
        grad_sample_weight,
        None if grad_matrix is None else grad_matrix.to(matrix.dtype),
        grad_out.sum(0) if need_bias else None,
    )


def _sort_by_chunk_and_row(index: Tensor, rows: int, chunk_samples: int) -> tuple[Tensor, Tensor]:
    """One sort for all chunks, far cheaper than one each.

    Returns:
        key: sorted ``chunk number · rows + row``.
        sample: int32, the number of the sample within its chunk.
    """
    chunks = -(-len(index) // chunk_samples)
    dtype = torch.int32 if chunks * rows < _INT32_LIMIT else torch.int64
    position = torch.arange(len(index), dtype=torch.int32, device=index.device)
    key, order = torch.sort(position // chunk_samples * rows + index.to(dtype), stable=True)
    return key, order.to(torch.int32) % chunk_samples


def _bag(table: Tensor, index: Tensor, starts: Tensor, weight: Tensor) -> Tensor:
    """Sum over each bag of weight · table row; every bag extends to the next start."""
    return torch.embedding_bag(table, index, starts, False, 0, False, weight)[0]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _linear(matrix: Tensor, rows: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A function (columns (n, K), bias) -> columns @ matrix.T + bias, fastest for n = ``rows``."""
    if matrix.device.type == "cpu" and matrix.dtype == torch.float32 and _packed_linear_works():
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), rows)
        return lambda columns, bias: torch.ops.mkldnn._linear_pointwise(columns, packed, bias, "none", [], "")
    return lambda columns, bias: F.linear(columns, matrix, bias)


@functools.cache
def _packed_linear_works() -> bool:
    """Whether this build of torch has oneDNN's packed linear with the private signature that ``_linear`` relies on."""
    matrix, columns = torch.arange(6.0).view(2, 3), torch.ones(4, 3)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix, 4)
        out = torch.ops.mkldnn._linear_pointwise(columns, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(out, F.linear(columns, matrix))
