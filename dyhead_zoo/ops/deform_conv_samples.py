"""Step 2 of the deformable convolution on CPUs: samples of a table, and what their gradients add to it.

A weighted sum of a few rows of a table is what ``embedding_bag`` computes, with a vectorised kernel on the CPU. The
backward pass calls ``aten::_embedding_bag_per_sample_weights_backward``, which is behind the gradient of
``F.embedding_bag``, and for the gradient of the table sums bags again, over the plan transposed.

Where numba is installed, ``deform_conv_loops`` does the same in less time and memory.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dyhead_zoo.ops.deform_conv_plan import Geometry, position_dtype, sampling_plan
from dyhead_zoo.ops.trial import tensors_are_plain, undisturbed

INT32_LIMIT = 2**31

AddGradients = Callable[[slice, Tensor], None]


class Samples:
    """By PyTorch's operators.

    Args:
        table: (R, C).
        taps: samples of a pixel, K.
    """

    def __init__(self, table: Tensor, taps: int) -> None:
        self.table, self.taps = table.detach(), taps

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the weights of the samples."""
        return self.table.dtype

    def take(self, index: Tensor, weight: Tensor) -> Tensor:
        """Samples of some pixels.

        Args:
            index, weight: (P·K·4,), from a ``sampling_plan``.

        Returns:
            (P, K·C), which the next call may overwrite.
        """
        return _sum_bags(self.table, index, _starts(index), weight).view(-1, self.taps * self.table.shape[1])

    def derivative(
        self, index: Tensor, weight: Tensor, chunk: int, grad_weight: Tensor | None, grad_table: Tensor | None
    ) -> AddGradients:
        """The derivative of all samples of a plan, to be taken chunk by chunk.

        Args:
            index, weight: (P·K·4,), of all pixels.
            chunk: pixels of a chunk.
            grad_weight: like ``weight``, written by the derivative; or None.
            grad_table: like the table, in the ``position_dtype`` of its dtype, added to; or None.

        Returns:
            A function of a slice of pixels, which begins at a multiple of ``chunk`` and is as long, but for the last;
            and of the gradients of the samples there, (pixels · K, C).
        """
        per_pixel, rows = 4 * self.taps, len(self.table)
        readers = None if grad_table is None else _readers(index, rows, chunk * per_pixel)

        def add(pixels: slice, grad_samples: Tensor) -> None:
            part = slice(pixels.start * per_pixel, pixels.stop * per_pixel)
            if grad_weight is not None:
                starts = _starts(index[part])
                # a shift in place of // 4, here and below: integer division is not vectorised
                bag_of_sample = torch.arange(len(index[part]), dtype=torch.int32, device=index.device) >> 2
                grad_weight[part] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                    grad_samples, self.table, index[part], starts, bag_of_sample, 0, -1
                )
            if grad_table is not None and readers is not None:
                key, position = readers[0][part], readers[1][part] - part.start
                _scatter(grad_table, key, pixels.start // chunk * rows, position, grad_samples, weight[part])

        return add


class CompiledSamples(Samples):
    """By ``deform_conv_loops``.

    Args:
        table, taps: as above.
        loops: the module.
        buffer: (pixels, K·C), contiguous, of the table's dtype, for the samples of so many pixels at a time; made when
            it is needed, if it is not given or too small.
    """

    def __init__(self, table: Tensor, taps: int, loops: ModuleType, buffer: Tensor | None = None) -> None:
        super().__init__(table.resolve_neg(), taps)
        self._loops = loops
        self._buffer = table.new_empty(0, taps * table.shape[1]) if buffer is None else buffer

    @property
    def weight_dtype(self) -> torch.dtype:
        return position_dtype(self.table.dtype)

    def take(self, index: Tensor, weight: Tensor) -> Tensor:
        pixels = len(index) // (4 * self.taps)
        if len(self._buffer) < pixels:
            self._buffer = self._buffer.new_empty(pixels, self._buffer.shape[1])
        samples = self._buffer[:pixels]
        self._loops.sum_corners(self.table, index, weight, samples.view(-1, self.table.shape[1]))
        return samples

    def derivative(
        self, index: Tensor, weight: Tensor, chunk: int, grad_weight: Tensor | None, grad_table: Tensor | None
    ) -> AddGradients:
        def add(pixels: slice, grad_samples: Tensor) -> None:
            part = slice(pixels.start * 4 * self.taps, pixels.stop * 4 * self.taps)
            part_grad = None if grad_weight is None else grad_weight[part]
            self._loops.add_gradients(self.table, index[part], weight[part], grad_samples, part_grad, grad_table)

        return add


def samples_of(table: Tensor, taps: int, loops: ModuleType | None, buffer: Tensor | None = None) -> Samples:
    """By ``loops``, if there are any; only these make use of a ``buffer``."""
    return CompiledSamples(table, taps, loops, buffer) if loops else Samples(table, taps)


# -- with numba --------------------------------------------------------------------------------------------------------


def compiled_loops(dtype: torch.dtype) -> ModuleType | None:
    """``deform_conv_loops``, if they work for tables of this dtype on as many threads as PyTorch has now; else None.

    Used only after a tiny trial gave the right answer.
    """
    return None if obstacle(dtype) else _tried(dtype).loops


def obstacle(dtype: torch.dtype) -> str | None:
    """Why there are no ``compiled_loops``, and what to do about it; None if there are."""
    loops, reason = _tried(dtype)
    if loops is not None and not loops.usable():
        threads = torch.get_num_threads()
        return f"PyTorch's OpenMP cannot run its loops on {threads} threads: call torch.set_num_threads(1)"
    return reason or (None if tensors_are_plain() else "its loops cannot follow torch.func or FakeTensorMode")


class _Tried(NamedTuple):
    """The loops, or the reason why there are none."""

    loops: ModuleType | None
    reason: str | None = None


@functools.cache
def _tried(dtype: torch.dtype) -> _Tried:
    if importlib.util.find_spec("numba") is None:
        return _Tried(None, "numba is not installed: pip install 'dyhead-zoo[numba]'")
    try:
        import numba

        if numba.config.DISABLE_JIT:
            return _Tried(None, "NUMBA_DISABLE_JIT is set: unset it")
        from dyhead_zoo.ops import deform_conv_loops as loops

        if dtype not in loops.STORED:
            return _Tried(
                None, f"its loops take {', '.join(map(str, loops.STORED))}, not {dtype}: convert x and weight"
            )
        right = undisturbed(lambda: _agree(_trial(dtype, loops), _trial(dtype, None), 100 * torch.finfo(dtype).eps))
    except Exception as error:  # whatever a numba that does not fit its surroundings may raise
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    else:
        if right:
            return _Tried(loops)
        problem = "a trial gave wrong numbers"
    problem = f"numba is installed but fails ({problem}): install another version"
    warnings.warn(f"deformable convolutions are slower than need be: {problem}", stacklevel=4)
    return _Tried(None, problem)


def _agree(ours: list[Tensor], reference: list[Tensor], tolerance: float) -> bool:
    return all(torch.allclose(a, b, tolerance, tolerance) for a, b in zip(ours, reference, strict=True))


def _trial(dtype: torch.dtype, loops: ModuleType | None) -> list[Tensor]:
    """Samples of a small map and the gradients of all that they depend on: the map, offsets and masks."""
    geometry, size, channels = Geometry((3, 3), (1, 1), (1, 1), (1, 1)), (6, 7), 96
    real, generator = position_dtype(dtype), torch.Generator().manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64, device="cpu")
    offset, mask = (3 * randn(1, 18, *size)).to(real), randn(1, 9, *size).to(real)
    index, weight = sampling_plan(offset.requires_grad_(), mask.requires_grad_(), size, geometry, 0, loops)
    table = randn(size[0] * size[1], channels).to(dtype)
    samples = samples_of(table, geometry.taps, loops)
    plan = (index, weight.detach().to(samples.weight_dtype))
    taken = samples.take(*plan)
    grad_weight, grad_table = torch.zeros_like(plan[1]), torch.zeros_like(table, dtype=real)
    grad_samples = taken.sin().view(-1, channels)
    samples.derivative(*plan, len(table), grad_weight, grad_table)(slice(0, len(table)), grad_samples)
    grads = torch.autograd.grad(weight, (offset, mask), grad_weight.to(real))
    return [t.to(real) for t in (taken, grad_table, *grads)]


# -- with PyTorch's operators ------------------------------------------------------------------------------------------


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


def _starts(index: Tensor) -> Tensor:
    """Where the bags of four corners begin."""
    return torch.arange(0, len(index), 4, dtype=torch.int32, device=index.device)
