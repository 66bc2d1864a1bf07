"""Modulated deformable convolution (DCNv2, https://arxiv.org/abs/1811.11168) at about the price of a dense convolution.

For every output pixel p and every tap k of the kernel the input is sampled bilinearly at a learned position,

    y(p) = bias + sum_k  W_k · m_k(p) · x(p·stride - padding + k·dilation + offset_k(p)),

where x is zero outside the map. With ``mask=None`` (m = 1) this is DCNv1 (https://arxiv.org/abs/1703.06211).

**Backends.** ``torchvision`` is the reference: ``torchvision.ops.deform_conv2d``, which is also what exporters
understand (one DeformConv node in ONNX). On one CPU thread, with 256 channels, it costs 4 to 6.5 dense convolutions,
and 9 to 15 with the backward pass. ``bag`` is plain PyTorch and costs 1.25 to 1.5 in both (``engine/benchmark.py``;
more when other processes contend for the cache, and with fewer output channels, which leave less to pay for step 2):

1. *Plan.* For each (pixel, tap) the four neighbours become four row numbers of the input seen as a (B·H·W, C) table,
   and four weights: bilinear weight times mask, zero outside the map. This touches no channel, so it is cheap, and
   ordinary autograd differentiates it: offsets and mask get their gradients through the weights.
2. *Sampling.* A weighted sum of a few rows of a table is what ``embedding_bag`` computes, with a vectorised kernel on
   the CPU: 4 multiply-adds for each sampled value, where step 3 does O of them.
3. *Contraction.* The samples, (pixels, K·C), are multiplied by the weight matrix: the multiply-adds of a dense
   convolution. Steps 2 and 3 take a few hundred pixels at a time, so that the samples stay in the cache and never exist
   as a whole; the backward pass takes them again instead of keeping them.

**Private operators.** For float32 the matrix is packed for oneDNN by ``torch.ops.mkldnn._reorder_linear_weight`` and
applied by ``_linear_pointwise``, the operators of torch.compile's CPU code; plain ``F.linear`` is 8 to 30 % slower.
They are used only after a tiny trial run gave the right answer; otherwise ``F.linear`` takes their place. The backward
pass calls ``aten::_embedding_bag_per_sample_weights_backward``, which is behind the gradient of ``F.embedding_bag``.

**Non-finite inputs.** A sample that lies wholly outside the map is a border pixel times zero, so an Inf or NaN in that
pixel gives NaN, where torchvision gives 0. Infinite offsets are outside the map; NaN offsets give NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import deform_conv2d

Backend = Literal["auto", "bag", "torchvision"]
Pair = tuple[int, int]

_INT32_LIMIT = 2**31
_PACKING_PAYS = 10**9  # multiply-adds from which on packing the matrix costs less than it saves


class _Geometry(NamedTuple):
    """Where the taps of a convolution lie; every field is (vertical, horizontal)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def out_size(self, in_size: Pair) -> Pair:
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(in_size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return height, width


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

    With K = kh·kw, the number of groups is C / ``weight.shape[1]`` and the number of offset groups G is
    ``offset.shape[1]`` / 2K.

    Under autocast ``x``, ``weight`` and ``bias`` are cast to the autocast dtype, as for a convolution. Sampling
    positions are computed in float32 whatever the dtype of ``x`` (float64 for float64); offsets that were themselves
    made in bfloat16 are only as fine as that.

    Args:
        x: (B, C, H, W). channels_last spares the ``bag`` backend a copy.
        offset: (B, 2·K·G, Ho, Wo) in input pixels: (dy, dx) pairs, taps row by row. Any floating dtype.
        mask: (B, K·G, Ho, Wo), a factor per sample, or None for 1. Any floating dtype.
        weight: (O, C / groups, kh, kw), of the dtype of ``x``.
        bias: (O,), of the dtype of ``x``, or None.
        stride: of the sampling grid, in input pixels; an int or (vertical, horizontal).
        padding: zeros around the input, likewise.
        dilation: distance of the taps, likewise.
        backend: ``auto`` is ``bag`` on the CPU where it applies (one group, one offset group, less than 2^31 samples,
            and neither compiling, exporting nor tracing), else ``torchvision``.

    Returns:
        (B, O, Ho, Wo) of the dtype of ``x`` (of autocast, where that is on); channels_last from ``bag``.

    Raises:
        ValueError: shapes, dtypes or the backend do not fit.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return modulated_deform_conv2d(x, offset, mask, weight, bias, stride, padding, dilation, backend=backend)
    kernel_h, kernel_w = weight.shape[-2:]
    geometry = _Geometry((kernel_h, kernel_w), _pair(stride), _pair(padding), _pair(dilation))
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not tracing:  # comparing traced sizes would constrain the sizes that an exported graph accepts
        _check(x, offset, mask, weight, bias, geometry)
    if _use_bag(backend, x, offset, weight, geometry, tracing):
        return _bag_conv(x, offset, mask, weight, bias, geometry)
    return _reference_conv(x, offset, mask, weight, bias, geometry)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _check(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: _Geometry
) -> None:
    """Raise a ValueError that names the shapes if the arguments do not belong together."""
    if min(geometry.stride) < 1 or min(geometry.dilation) < 1 or min(geometry.padding) < 0:
        raise ValueError(f"stride and dilation must be at least 1 and padding at least 0, got {geometry}")
    for name, tensor in (("x", x), ("offset", offset), ("mask", mask), ("weight", weight)):
        if tensor is not None and tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(tensor.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but x is {x.dtype}: convert one of them, or use autocast")
    channels, taps = x.shape[1], geometry.taps
    out_channels, group_channels = weight.shape[:2]
    given = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, {geometry}"
    if group_channels == 0 or channels % group_channels or out_channels % (channels // group_channels):
        raise ValueError(f"weight must be (O, C / groups, kh, kw) with C and O divisible by groups, got {given}")
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"bias must have shape ({out_channels},), got {tuple(bias.shape)}")
    offset_groups = offset.shape[1] // (2 * taps)
    if offset_groups == 0 or offset.shape[1] % (2 * taps) or channels % offset_groups:
        raise ValueError(
            f"offset has {offset.shape[1]} channels, but {taps} taps need {2 * taps}, a pair (dy, dx) each, or a "
            f"multiple of that for offset groups that divide the {channels} channels of x"
        )
    out_size = geometry.out_size((x.shape[2], x.shape[3]))
    if min(out_size) < 1:
        raise ValueError(f"the kernel is larger than the padded input: {given}")
    for name, tensor, count in (("offset", offset, 2 * taps), ("mask", mask, taps)):
        expected = (x.shape[0], count * offset_groups, *out_size)
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}, for {given}")


def _use_bag(backend: str, x: Tensor, offset: Tensor, weight: Tensor, geometry: _Geometry, tracing: bool) -> bool:
    """Choose the backend.

    Raises:
        ValueError: ``backend`` is unknown, or is ``bag`` and cannot do this.
    """
    if backend not in ("auto", "bag", "torchvision"):
        raise ValueError(f"unknown backend {backend!r}: choose 'auto', 'bag' or 'torchvision'")
    if backend == "torchvision" or (backend == "auto" and (tracing or x.device.type != "cpu")):
        return False
    samples = offset.shape[0] * offset.shape[2] * offset.shape[3] * geometry.taps * 4
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    if weight.shape[1] != x.shape[1]:
        obstacle = f"one group, not {x.shape[1] // weight.shape[1]}"
    elif offset.shape[1] != 2 * geometry.taps:
        obstacle = f"one offset group, not {offset.shape[1] // (2 * geometry.taps)}"
    elif max(samples, rows) >= _INT32_LIMIT:
        obstacle = f"what int32 can count, not {samples} samples of {rows} pixels"
    else:
        return samples * rows > 0  # without any there is nothing to gain, and no first chunk
    if backend == "bag":
        raise ValueError(f"backend 'bag' handles {obstacle}: choose 'auto' or 'torchvision'")
    return False


def _position_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where that is the dtype: bfloat16 has no fractions left beyond pixel 128."""
    return torch.promote_types(dtype, torch.float32)


def _reference_conv(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: _Geometry
) -> Tensor:
    """torchvision's operator, which wants one dtype throughout and knows no bfloat16 on the CPU."""
    dtype = _position_dtype(x.dtype)
    out = deform_conv2d(
        x.to(dtype),
        offset.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        None if mask is None else mask.to(dtype),
    )
    return out.to(x.dtype)


def _bag_conv(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: _Geometry
) -> Tensor:
    """The three steps of the module's docstring; channels_last output."""
    batch, _, out_h, out_w = offset.shape
    dtype = _position_dtype(x.dtype)
    index, sample_weight = _sampling_plan(
        offset.to(dtype), None if mask is None else mask.to(dtype), (x.shape[2], x.shape[3]), geometry
    )
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    out = _SampleAndContract.apply(_as_table(x), index, sample_weight.to(x.dtype), matrix, bias)
    return out.view(batch, out_h, out_w, -1).permute(0, 3, 1, 2)


def _as_table(x: Tensor) -> Tensor:
    """(B, C, H, W) -> contiguous (B·H·W, C): a view of a channels_last tensor."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).flatten(0, 2).contiguous()
    # image by image: the copy of a 2-D transpose is blocked, that of a 4-D permutation is not and takes twice as long
    images = [image.flatten(1).t().contiguous() for image in x]
    return images[0] if len(images) == 1 else torch.cat(images)


def _sampling_plan(offset: Tensor, mask: Tensor | None, in_size: Pair, geometry: _Geometry) -> tuple[Tensor, Tensor]:
    """Which rows of the table make up each sample, and with which weights.

    Returns:
        index: (P·K·4,) int32, ordered by pixel (b, y, x), tap, corner.
        weight: (P·K·4,) like ``offset``, differentiable in ``offset`` and ``mask``; zero where a corner is off the map.
    """
    batch, _, out_h, out_w = offset.shape
    height, width = in_size
    _, kernel_w = geometry.kernel
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    device = offset.device
    tap = torch.arange(geometry.taps, device=device)[:, None, None]
    grid_y = torch.arange(out_h, device=device)[:, None] * stride[0] - padding[0] + tap // kernel_w * dilation[0]
    grid_x = torch.arange(out_w, device=device) * stride[1] - padding[1] + tap % kernel_w * dilation[1]
    offset = offset.contiguous()
    y0, y1, weight_y0, weight_y1 = _neighbours(offset[:, 0::2] + grid_y, height)
    x0, x1, weight_x0, weight_x1 = _neighbours(offset[:, 1::2] + grid_x, width)
    first_row = torch.arange(batch, dtype=torch.int32, device=device).view(-1, 1, 1, 1) * (height * width)
    row0, row1 = y0 * width + first_row, y1 * width + first_row
    if mask is not None:
        mask = mask.contiguous()
        weight_y0, weight_y1 = weight_y0 * mask, weight_y1 * mask
    # so far everything is (B, K, Ho, Wo); only the results, (B, K·4, Ho, Wo), are brought into the order of pixels
    index = torch.stack((row0 + x0, row0 + x1, row1 + x0, row1 + x1), 2).flatten(1, 2)
    weight = torch.stack(
        (weight_y0 * weight_x0, weight_y0 * weight_x1, weight_y1 * weight_x0, weight_y1 * weight_x1), 2
    ).flatten(1, 2)
    return _as_table(index).flatten(), _as_table(weight).flatten()


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Linear interpolation along an axis of ``size`` pixels.

    Returns:
        The lower and the upper neighbour, int32, moved into the axis, and their weights, zero if they had to be moved.
    """
    # further out everything is zero, and a huge position would overflow int32
    position = position.clamp(-2, size + 1)
    floor = position.detach().floor()
    low = floor.to(torch.int32)
    high = low + 1
    low_inside, high_inside = low.clamp(0, size - 1), high.clamp(0, size - 1)
    fraction = position - floor
    # products, not torch.where: a NaN must come through
    return low_inside, high_inside, (1 - fraction) * (low == low_inside), fraction * (high == high_inside)


def _chunk_pixels() -> int:
    """Output pixels per matrix product: samples small enough for the cache, yet enough work for each thread."""
    return 512 if torch.get_num_threads() == 1 else 1024


class _SampleAndContract(torch.autograd.Function):
    """Steps 2 and 3: out = (samples of the table, (P, K·C)) @ matrix.T + bias.

    table (R, C), index (P·K·4,) int32, sample_weight (P·K·4,), matrix (O, K·C), bias (O,) or None -> (P, O).
    """

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, index: Tensor, sample_weight: Tensor, matrix: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(table, index, sample_weight, matrix)
        per_pixel = matrix.shape[1] // table.shape[1] * 4
        pixels = len(index) // per_pixel
        chunk = min(_chunk_pixels(), pixels)
        bag_starts = torch.arange(0, chunk * per_pixel, 4, dtype=torch.int32, device=table.device)
        linear = _linear(matrix, pixels, chunk)
        out = table.new_empty(pixels, len(matrix))
        for start in range(0, pixels, chunk):
            part = slice(start * per_pixel, (start + chunk) * per_pixel)
            part_index = index[part]
            samples = _sum_bags(table, part_index, bag_starts[: len(part_index) // 4], sample_weight[part])
            out[start : start + chunk] = linear(samples.view(-1, matrix.shape[1]), bias)
            del samples  # the next ones take its memory, which is in the cache
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        table, index, sample_weight, matrix = ctx.saved_tensors
        # backward() may be called inside an autocast region, which would change the dtype of the products
        with torch.autocast(grad_out.device.type, enabled=False):
            return _backward(grad_out.contiguous(), table, index, sample_weight, matrix, ctx.needs_input_grad)


def _backward(
    grad_out: Tensor, table: Tensor, index: Tensor, sample_weight: Tensor, matrix: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the five inputs of ``_SampleAndContract``, None for those that ``needs`` does not ask for."""
    need_table, _, need_sample_weight, need_matrix, need_bias = needs
    rows, channels = table.shape
    pixels, per_pixel = len(grad_out), matrix.shape[1] // channels * 4
    chunk = min(_chunk_pixels(), pixels)
    sum_dtype = _position_dtype(table.dtype)  # sums over many chunks
    grad_table = torch.zeros_like(table, dtype=sum_dtype) if need_table else None
    grad_sample_weight = torch.empty_like(sample_weight) if need_sample_weight else None
    grad_matrix = torch.zeros_like(matrix, dtype=sum_dtype) if need_matrix else None
    bag_starts = torch.arange(0, chunk * per_pixel, 4, dtype=torch.int32, device=table.device)
    bag_of_sample = torch.arange(chunk * per_pixel, dtype=torch.int32, device=table.device) // 4
    linear = _linear(matrix.t(), pixels, chunk)
    readers = _readers(index, rows, chunk * per_pixel) if need_table else None
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
        grad_samples = linear(part_grad, None).view(-1, channels)
        if grad_sample_weight is not None:
            grad_sample_weight[part] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                grad_samples, table, part_index, part_starts, bag_of_sample[: len(part_index)], 0, -1
            )
        if grad_table is not None and readers is not None:
            key, corner = (values[part] for values in readers)
            _scatter(grad_table, key - number * rows, corner, grad_samples, part_weight)
    return (
        None if grad_table is None else grad_table.to(table.dtype),
        None,
        grad_sample_weight,
        None if grad_matrix is None else grad_matrix.to(matrix.dtype),
        grad_out.sum(0) if need_bias else None,
    )


def _readers(index: Tensor, rows: int, chunk_length: int) -> tuple[Tensor, Tensor]:
    """The plan transposed, chunk by chunk: by whom each row of the table is read. One sort is far cheaper than many.

    Returns:
        key: ``chunk · rows + row``, ascending.
        corner: int32, the position within the chunk of the entry of ``index`` that reads this row.
    """
    chunks = -(-len(index) // chunk_length)
    dtype = torch.int32 if chunks * rows < _INT32_LIMIT else torch.int64
    chunk = torch.arange(len(index), dtype=torch.int32, device=index.device) // chunk_length
    key, order = torch.sort(chunk.to(dtype) * rows + index, stable=True)
    return key, order.to(torch.int32) % chunk_length


def _scatter(grad_table: Tensor, row: Tensor, corner: Tensor, grad_samples: Tensor, weight: Tensor) -> None:
    """Add to each row of ``grad_table`` the gradients of the samples that read it; ``row`` is ascending.

    Again this is a weighted sum per bag, one bag for each row from the first to the last that is read.
    """
    first, last = int(row[0]), int(row[-1])
    starts = torch.searchsorted(row, torch.arange(first, last + 1, dtype=row.dtype, device=row.device), out_int32=True)
    grad_table[first : last + 1] += _sum_bags(grad_samples, corner // 4, starts, weight[corner])


def _sum_bags(table: Tensor, index: Tensor, starts: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight · table[index] over each bag; a bag extends to the start of the next."""
    return torch.embedding_bag(table.detach(), index, starts, False, 0, False, weight.detach())[0]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be of a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _linear(matrix: Tensor, rows: int, chunk: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A function (values (n, in), bias) -> values @ matrix.T + bias for ``matrix`` (out, in).

    It is going to be called for ``rows`` values in all, n = ``chunk`` at a time.
    """
    matrix = matrix.contiguous()
    suitable = matrix.device.type == "cpu" and matrix.dtype == torch.float32
    if suitable and rows * matrix.numel() >= _PACKING_PAYS and _packed_linear_works():
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix, chunk)
        return lambda values, bias: torch.ops.mkldnn._linear_pointwise(values, packed, bias, "none", [], "")
    return lambda values, bias: F.linear(values, matrix, bias)


@functools.cache
def _packed_linear_works() -> bool:
    """Whether this build of torch has oneDNN's packed linear with the private signature that ``_linear`` relies on."""
    matrix, values, bias = torch.arange(6.0).view(2, 3), torch.ones(4, 3), torch.ones(2)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix, 4)
        out = torch.ops.mkldnn._linear_pointwise(values, packed, bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(out, F.linear(values, matrix, bias))
