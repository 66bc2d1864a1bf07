"""Modulated deformable convolution (DCNv2, https://arxiv.org/abs/1811.11168) at about the price of a dense convolution.

For every output pixel p and every tap k of the kernel the input is sampled bilinearly at a learned position,

    y(p) = bias + sum_k  W_k · m_k(p) · x(p·stride - padding + k·dilation + offset_k(p)),

where x is zero outside the map. With ``mask=None`` (m = 1) this is DCNv1 (https://arxiv.org/abs/1703.06211).

**Backends.**

* ``torchvision``, the reference: ``torchvision.ops.deform_conv2d``, which is also what exporters understand (one
  DeformConv node in ONNX). On one CPU thread, with 256 channels, it costs 4 to 6.5 dense convolutions, and 9 to 15 with
  the backward pass.
* ``bag``, plain PyTorch for CPUs (``deform_conv_cpu.py``): about 1.15 to 1.4 dense convolutions, in both.
  ``dyhead-zoo benchmark op`` measures it; it costs more when other processes contend for the cache, and with fewer
  output channels, which leave less to pay for the sampling.
* ``numba``, the same with loops that numba compiles (``deform_conv_loops.py``), where it is installed.
* ``triton``, one fused kernel for CUDA (``deform_conv_triton.py``).
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torchvision.ops import deform_conv2d

from dyhead_zoo.ops import deform_conv_cpu, deform_conv_triton
from dyhead_zoo.ops.deform_conv_plan import Geometry, Pair, position_dtype
from dyhead_zoo.ops.deform_conv_samples import INT32_LIMIT, compiled_loops, obstacle

Backend = Literal["auto", "numba", "bag", "triton", "torchvision"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


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
        backend: ``auto`` is ``numba`` on the CPU, or ``bag`` where numba is not installed or does not work, if they
            apply (less than 2^31 samples, and neither compiling, exporting nor tracing); ``triton`` on CUDA devices
            where it applies (see ``deform_conv_triton.chosen``); else ``torchvision``.

    Returns:
        (B, O, Ho, Wo) of the dtype of ``x`` (of autocast, where that is on); channels_last unless from ``torchvision``.

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
    geometry = Geometry((kernel_h, kernel_w), _pair(stride), _pair(padding), _pair(dilation))
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, FakeTensor)
    if not tracing:  # comparing traced sizes would constrain the sizes that an exported graph accepts
        _check(x, offset, mask, weight, bias, geometry)
    if _use_cpu(backend, x, offset, geometry, tracing):
        return deform_conv_cpu.deform_conv2d(x, offset, mask, weight, bias, geometry, cpu_loops(backend, x.dtype))
    if deform_conv_triton.chosen(backend, x, offset, weight):
        return deform_conv_triton.triton_deform_conv2d(x, offset, mask, weight, bias, *geometry[1:])
    return _reference_conv(x, offset, mask, weight, bias, geometry)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _check(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> None:
    """Raise a ValueError that names the shapes if the arguments do not belong together."""
    if min(geometry.stride) < 1 or min(geometry.dilation) < 1 or min(geometry.padding) < 0:
        raise ValueError(f"stride and dilation must be at least 1 and padding at least 0, got {geometry}")
    for name, tensor in (("x", x), ("offset", offset), ("mask", mask), ("weight", weight)):
        if tensor is not None and tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(tensor.shape)}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x on {x.device}: move one of them")
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


def cpu_loops(backend: Backend, dtype: torch.dtype) -> ModuleType | None:
    """The loops for tables of ``dtype`` on the CPU; None for those of PyTorch's operators.

    Raises:
        ValueError: ``backend`` is ``numba``, and it is not there or cannot do this.
    """
    if backend == "bag":
        return None
    if backend == "numba" and (reason := obstacle(dtype)):
        raise ValueError(f"backend 'numba' cannot be used: {reason}; or choose 'auto' or 'bag'")
    return compiled_loops(dtype)


def _use_cpu(backend: str, x: Tensor, offset: Tensor, geometry: Geometry, tracing: bool) -> bool:
    """Whether ``deform_conv_cpu`` is to do it.

    Raises:
        ValueError: ``backend`` is unknown, or is ``bag`` or ``numba`` and cannot do this.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose {', '.join(map(repr, BACKENDS))}")
    if backend == "numba" and x.device.type != "cpu":
        raise ValueError(f"backend 'numba' is for CPUs, but x is on {x.device}: choose 'auto'")
    if backend in ("triton", "torchvision") or (backend == "auto" and (tracing or x.device.type != "cpu")):
        return False
    samples = offset.shape[0] * offset.shape[2] * offset.shape[3] * geometry.taps * 4
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    if max(samples, rows) >= INT32_LIMIT:
        if backend != "auto":
            raise ValueError(
                f"backend {backend!r} counts in int32, not {samples} samples of {rows} pixels: choose 'auto' or "
                "'torchvision'"
            )
        return False
    return samples * rows > 0  # without any there is nothing to gain, and no first chunk


def _reference_conv(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """torchvision's operator, which wants one dtype throughout and knows no bfloat16 on the CPU."""
    dtype = position_dtype(x.dtype)
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
