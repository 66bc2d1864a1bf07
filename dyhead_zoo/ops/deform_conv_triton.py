"""Modulated deformable convolution on NVIDIA GPUs: sampling and product fused into one Triton kernel.

Checked in Triton's interpreter and compiled for compute capabilities 8.0 and 9.0, but **not yet run on a GPU**: no
speed is claimed, and the tile sizes below were chosen by what the compiler says of registers. ``hub/gpu_check.py``
checks and measures everything in one command. (In inference ``layers/dyhead_cuda.py`` runs whole blocks of DyHead.)

The reference writes the samples of all taps, 9 times the input, to memory, for a matrix product to read. Here each
program makes the samples of its tile of pixels, a few channels of one tap at a time, and multiplies them by the weights
at once (an implicit matrix product on the tensor cores, summed in float32). The backward pass takes the samples again
instead of keeping them, so nothing but the inputs is saved:

* x, offset and mask: one kernel that computes the gradient of the samples tile by tile, distributes it to the four
  neighbours with atomic additions into a float32 map (**not reproducible** bit by bit), and sums over the channels what
  belongs to offset and mask (reproducible).
* weight: one kernel that multiplies the samples by the gradient of the output (reproducible).

**Precision.** Samples are interpolated in float32 and rounded to the type of ``weight`` for the product. float32
products run on the tensor cores: as TF32 if ``torch.backends.cuda.matmul.allow_tf32`` (what PyTorch's own matrix
products follow), otherwise as three TF32 products whose sum is about as accurate as float32.

**PyTorch.** ``torch.ops.dyhead_zoo.deform_conv2d`` and its two gradients are custom operators with fake tensors,
autograd and autocast rules: one node for ``torch.compile`` and ``torch.export``. No launch waits for the GPU or
allocates outside PyTorch's pool, so that CUDA graphs can record them, after one ordinary run in which Triton compiles.
The operators are always defined, Triton is imported with the first launch.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

Pair = tuple[int, int]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INT32_LIMIT = 2**31
_GRID_LIMIT = 65535
_TRIAL_TOLERANCE = 0.03  # of the largest value: bfloat16's rounding, not a wrong index
_PART = 4096  # pixels whose weight gradient is summed in one go: fewer fill more of the GPU, and cost memory


class Tiles(NamedTuple):
    """How a kernel cuts its work: extents in pixels, output and input channels; warps and stages of a program."""

    pixels: int
    outputs: int
    channels: int
    warps: int
    stages: int


def chosen(backend: str, x: Tensor, offset: Tensor, weight: Tensor) -> bool:
    """Whether ``modulated_deform_conv2d(..., backend=backend)`` shall call ``triton_deform_conv2d``.

    ``triton`` means yes unless there is nothing to compute. ``auto`` means yes on a CUDA device where there is no
    obstacle and a small trial gave what torchvision gives; but not while exporting, since runtimes know torchvision's
    operator and not ours. The trial runs once per process, device and dtype, and compiles three kernels (some seconds
    the first time; Triton keeps them on disk), so it must not happen inside the capture of a CUDA graph.

    Raises:
        ValueError: ``backend`` is ``triton`` and there is an obstacle.
    """
    if backend not in ("auto", "triton"):
        return False
    if backend == "auto" and (x.device.type != "cuda" or torch.compiler.is_exporting() or torch.jit.is_tracing()):
        return False
    if 0 in (x.numel(), offset.numel(), weight.numel()):
        return False
    reason = obstacle(x, offset, weight)
    if backend == "auto":
        return reason is None and _passes_trial(x.device, x.dtype)
    if reason is not None:
        raise ValueError(f"backend 'triton' cannot do this: {reason}. Choose 'auto' or 'torchvision'")
    return True


def obstacle(x: Tensor, offset: Tensor, weight: Tensor) -> str | None:
    """Why the kernels cannot convolve these tensors (see ``triton_deform_conv2d``), or None if they can.

    They cannot: tensors that are not on a CUDA device (in Triton's interpreter: on the CPU), without Triton, on GPUs
    older than compute capability 8.0, other dtypes than float32, bfloat16 and float16, 2^31 or more input or output
    pixels or numbers in one image's offsets, more than 65535 outputs or offset groups x taps, and gradients of x while
    ``torch.use_deterministic_algorithms`` is on.
    """
    reason = _device_obstacle(x.device)
    if reason is not None:
        return reason
    if x.dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {x.dtype}"
    if torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled() and x.requires_grad:
        return "atomic additions make the gradient of x irreproducible"
    if torch.compiler.is_compiling():  # comparing traced sizes would constrain the sizes that a graph accepts
        return None
    return _size_obstacle(x, offset, weight)


def _size_obstacle(x: Tensor, offset: Tensor, weight: Tensor) -> str | None:
    batch, _, out_h, out_w = offset.shape
    if max(x.numel() // x.shape[1], batch * out_h * out_w, offset.numel() // batch) >= _INT32_LIMIT:
        return "there are more pixels than int32 can count"
    if max(offset.shape[1] // 2, weight.shape[0]) > _GRID_LIMIT:
        return f"a CUDA grid has at most {_GRID_LIMIT} rows"
    return None


@torch.compiler.assume_constant_result
def _device_obstacle(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu" and interpreting():
        return None
    if device.type != "cuda":
        return f"Triton needs a CUDA device, not {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: the variable ``TRITON_INTERPRET`` asks for it."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@torch.compiler.assume_constant_result
def _passes_trial(device: torch.device, dtype: torch.dtype) -> bool:
    return _trial(device, dtype)  # Dynamo looks through caches, so the mark must not be on one


@functools.cache
def _trial(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a small convolution and its gradients come out on this device as torchvision computes them on the CPU.

    Triton compiles on the user's machine, which may lack a C compiler or have a GPU that nobody tried; then the
    answer is no, with a warning, not an error.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 16, 5, 4), (1, 18, 5, 4), (1, 9, 5, 4), (16, 16, 3, 3), (1, 16, 5, 4))
    x, offset, mask, weight, grad_out = (torch.randn(shape, generator=generator) for shape in shapes)
    geometry = ([1, 1], [1, 1], [1, 1])
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [t.to(dtype).double().requires_grad_() for t in (x, offset, mask, weight)]
        reference = deform_conv2d(leaves[0], leaves[1], leaves[3], padding=1, mask=leaves[2])
        expected = [reference, *torch.autograd.grad(reference, leaves, grad_out.to(dtype).double())]
    arguments = [t.detach().to(device, dtype) for t in leaves]
    upstream = grad_out.to(device, dtype)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            found = [
                _forward(*arguments, None, *geometry),
                *_backward_samples(upstream, *arguments, *geometry),
                _backward_weight(upstream, *arguments, *geometry),
            ]
        errors = [((a.cpu() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)]
    except Exception as error:  # whatever a compiler, a driver or a launch can raise
        warnings.warn(f"deformable convolution by torchvision: Triton's failed on {device}: {error!r}", stacklevel=2)
        return False
    if not all(error <= _TRIAL_TOLERANCE for error in errors):  # a NaN does not pass
        warnings.warn(f"deformable convolution by torchvision: Triton's errs on {device}: {errors}", stacklevel=2)
        return False
    return True


def triton_deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """Deformable convolution by the operator of this module; see ``modulated_deform_conv2d`` for the arguments.

    Args:
        x: (B, C, H, W); channels_last spares a copy.
        offset: (B, 2·K·G, Ho, Wo), any floating dtype and any strides.
        mask: (B, K·G, Ho, Wo), likewise, or None.
        weight: (O, C / groups, kh, kw), of the dtype of ``x``; channels_last spares a copy.
        bias: (O,) or None.
        stride: (vertical, horizontal), like ``padding`` and ``dilation``.
        padding: zeros around the input.
        dilation: distance of the taps.

    Returns:
        (B, O, Ho, Wo), channels_last, of the dtype of ``x``.
    """
    return torch.ops.dyhead_zoo.deform_conv2d(x, offset, mask, weight, bias, [*stride], [*padding], [*dilation])


@torch.library.custom_op("dyhead_zoo::deform_conv2d", mutates_args=())
def _forward(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    from dyhead_zoo.ops import deform_conv_triton_kernels as kernels

    problem = _Problem.of(x, offset, mask, weight, stride, padding, dilation)
    out = _fake_forward(x, offset, mask, weight, bias, stride, padding, dilation)
    tiles = forward_tiles(x.dtype, problem.segment, problem.group_outputs)
    grid = (_ceil_div(problem.pixels, tiles.pixels), problem.groups * _ceil_div(problem.group_outputs, tiles.outputs))
    with _on(x):
        kernels.forward[grid](
            _channels_last(x), offset, mask, _channels_last(weight), bias, out, **problem.arguments(tiles, x.dtype)
        )
    return out


@_forward.register_fake
def _fake_forward(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    shape = (offset.shape[0], weight.shape[0], offset.shape[2], offset.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("dyhead_zoo::deform_conv2d_backward_samples", mutates_args=())
def _backward_samples(
    grad_out: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, offset and mask; the last is empty without a mask."""
    from dyhead_zoo.ops import deform_conv_triton_kernels as kernels

    problem = _Problem.of(x, offset, mask, weight, stride, padding, dilation)
    _, grad_offset, grad_mask = _fake_backward_samples(grad_out, x, offset, mask, weight, stride, padding, dilation)
    grad_x = torch.zeros_like(x, dtype=torch.float32, memory_format=torch.channels_last)
    tiles = backward_samples_tiles(x.dtype, problem.segment, problem.group_outputs)
    grid = (_ceil_div(problem.pixels, tiles.pixels), problem.taps * problem.offset_groups)
    with _on(x):
        kernels.backward_samples[grid](
            _channels_last(grad_out),
            _channels_last(x),
            offset,
            mask,
            _channels_last(weight),
            grad_x,
            grad_offset,
            grad_mask,
            **problem.arguments(tiles, x.dtype),
        )
    return grad_x.to(x.dtype), grad_offset, grad_mask


@_backward_samples.register_fake
def _fake_backward_samples(
    grad_out: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.channels_last),
        torch.empty_like(offset, memory_format=torch.contiguous_format),
        offset.new_empty(0) if mask is None else torch.empty_like(mask, memory_format=torch.contiguous_format),
    )


@torch.library.custom_op("dyhead_zoo::deform_conv2d_backward_weight", mutates_args=())
def _backward_weight(
    grad_out: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Gradient of weight, whose values are not read."""
    from dyhead_zoo.ops import deform_conv_triton_kernels as kernels

    problem = _Problem.of(x, offset, mask, weight, stride, padding, dilation)
    tiles = backward_weight_tiles(x.dtype, problem.segment, problem.group_outputs)
    tiles_per_part = _ceil_div(min(_PART, problem.pixels), tiles.pixels)
    parts = _ceil_div(problem.pixels, tiles_per_part * tiles.pixels)
    outputs, group_channels, kernel_h, kernel_w = weight.shape
    sums = x.new_empty((parts, outputs, kernel_h, kernel_w, group_channels), dtype=torch.float32)
    segments = x.shape[1] // problem.segment
    grid = (
        problem.taps * segments * _ceil_div(problem.segment, tiles.channels),
        _ceil_div(problem.group_outputs, tiles.outputs),
        parts,
    )
    with _on(x):
        kernels.backward_weight[grid](
            _channels_last(grad_out),
            _channels_last(x),
            offset,
            mask,
            sums,
            tiles_per_part=tiles_per_part,
            **problem.arguments(tiles, x.dtype),
        )
    return sums.sum(0).permute(0, 3, 1, 2).to(weight.dtype, memory_format=torch.channels_last)


@_backward_weight.register_fake
def _fake_backward_weight(
    grad_out: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offset, mask, weight, _, *ctx.geometry = inputs
    ctx.save_for_backward(x, offset, mask, weight)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, offset, mask, weight = ctx.saved_tensors
    arguments = (grad_out, x, offset, mask, weight, *ctx.geometry)
    grad_x = grad_offset = grad_mask = grad_weight = grad_bias = None
    if any(ctx.needs_input_grad[:3]):
        if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(
                "the gradient of a deformable convolution by Triton is not reproducible: choose another backend, or "
                "torch.use_deterministic_algorithms(True, warn_only=True)"
            )
        grad_x, grad_offset, grad_mask = torch.ops.dyhead_zoo.deform_conv2d_backward_samples(*arguments)
    if ctx.needs_input_grad[3]:
        grad_weight = torch.ops.dyhead_zoo.deform_conv2d_backward_weight(*arguments)
    if ctx.needs_input_grad[4]:
        grad_bias = grad_out.sum((0, 2, 3))
    return grad_x, grad_offset, None if mask is None else grad_mask, grad_weight, grad_bias, None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def _autocast(device: str, x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    """As for a convolution, but positions keep their precision. (``register_autocast`` would cast them as well.)"""
    dtype = torch.get_autocast_dtype(device)
    bias, *geometry = rest
    with torch.autocast(device, enabled=False):
        return torch.ops.dyhead_zoo.deform_conv2d(
            x.to(dtype), offset, mask, weight.to(dtype), None if bias is None else bias.to(dtype), *geometry
        )


_library = torch.library.Library("dyhead_zoo", "FRAGMENT")
_library.impl("deform_conv2d", functools.partial(_autocast, "cuda"), "AutocastCUDA")
_library.impl("deform_conv2d", functools.partial(_autocast, "cpu"), "AutocastCPU")  # for the interpreter


class _Problem(NamedTuple):
    """Numbers that the launches need."""

    sizes: tuple[int, int, int, int, int]
    conv: tuple[Pair, Pair, Pair, Pair]
    offset_strides: tuple[int, ...]
    mask_strides: tuple[int, ...]
    channels: int
    outputs: int
    groups: int
    offset_groups: int

    @classmethod
    def of(
        cls,
        x: Tensor,
        offset: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> _Problem:
        reason = _size_obstacle(x, offset, weight)
        if reason is not None:
            raise ValueError(f"deformable convolution of {tuple(x.shape)} by Triton: {reason}; use a smaller batch")
        batch, channels, height, width = x.shape
        outputs, group_channels, kernel_h, kernel_w = weight.shape
        return cls(
            sizes=(batch, height, width, offset.shape[2], offset.shape[3]),
            conv=((kernel_h, kernel_w), _pair(stride), _pair(padding), _pair(dilation)),
            offset_strides=offset.stride(),
            mask_strides=(0, 0, 0, 0) if mask is None else mask.stride(),
            channels=channels,
            outputs=outputs,
            groups=channels // group_channels,
            offset_groups=offset.shape[1] // (2 * kernel_h * kernel_w),
        )

    @property
    def pixels(self) -> int:
        return self.sizes[0] * self.sizes[3] * self.sizes[4]

    @property
    def taps(self) -> int:
        return self.conv[0][0] * self.conv[0][1]

    @property
    def group_outputs(self) -> int:
        return self.outputs // self.groups

    @property
    def segment(self) -> int:
        """Channels that have both their group and their offset group in common."""
        return math.gcd(self.channels // self.groups, self.channels // self.offset_groups)

    def arguments(self, tiles: Tiles, dtype: torch.dtype) -> dict[str, Any]:
        """What all kernels take by the same names."""
        return {
            "offset_strides": self.offset_strides,
            "mask_strides": self.mask_strides,
            "sizes": self.sizes,
            "CONV": self.conv,
            "IN": self.channels,
            "OUT": self.outputs,
            "GROUPS": self.groups,
            "OFFSET_GROUPS": self.offset_groups,
            "SEGMENT": self.segment,
            "TILE_P": tiles.pixels,
            "TILE_O": tiles.outputs,
            "TILE_C": tiles.channels,
            "PRECISION": _precision(dtype),
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }


def forward_tiles(dtype: torch.dtype, channels: int, outputs: int) -> Tiles:
    """Tiles of the forward kernel: all outputs at once where they fit, for then each sample is taken only once."""
    if dtype == torch.float32:
        return Tiles(64, _extent(outputs, 128), _extent(channels, 32), warps=8, stages=2)
    return Tiles(64, _extent(outputs, 256), _extent(channels, 32), warps=8, stages=3)


def backward_samples_tiles(dtype: torch.dtype, channels: int, outputs: int) -> Tiles:
    """Tiles of the kernel of grad x, offset and mask: every channel tile reads all of grad_out again."""
    wide = 32 if dtype == torch.float32 else 64
    return Tiles(64, _extent(outputs, 32), _extent(channels, wide), warps=8, stages=2)


def backward_weight_tiles(dtype: torch.dtype, channels: int, outputs: int) -> Tiles:
    """Tiles of the kernel of grad weight: every tile of outputs takes the samples again."""
    wide = 128 if dtype == torch.float32 else 256
    return Tiles(32, _extent(outputs, wide), _extent(channels, 32), warps=8, stages=2)


def _extent(count: int, most: int) -> int:
    """The power of two that covers ``count``, from 16, the least that a tensor core takes, to ``most``."""
    return min(max(16, 1 << (count - 1).bit_length()), most)


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        return "tf32x3"
    return "tf32"  # has no meaning for narrower types


def _pair(values: list[int]) -> Pair:
    vertical, horizontal = values
    return vertical, horizontal


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _on(tensor: Tensor) -> Any:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device_of(tensor)
