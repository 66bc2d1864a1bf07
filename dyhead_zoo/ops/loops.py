"""What loops compiled by numba have in common; without numba this module cannot be imported.

**Threads.** A loop runs on the threads of PyTorch's own operators: its C entry point is handed to ``GOMP_parallel``,
the function behind ``#pragma omp parallel``, of the OpenMP library that PyTorch is linked to. Numba's pools would be a
second set of threads, and the two would wait for each other's cores. Where PyTorch has another OpenMP (macOS,
Windows), there is no such function, and ``usable`` says so unless PyTorch is to use one thread.

**bfloat16**, which numba does not know, is handled as its 16 bits, the upper half of a float32.

Numba keeps what it compiled on disk (in ``NUMBA_CACHE_DIR``, or beside the file of the loop), for the next process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor
from torch.nn import Parameter

STORED = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.uint16}
"""Dtypes of tables, and how numba sees their elements."""
UNBOUNDED = 2**31  # rows of a table, which are not checked
HEAD = 3  # numbers that a loop is handed before its arguments, see ``run``
_ENOUGH = 2**15  # numbers from which on more threads pay


def usable() -> bool:
    """Whether the loops can run on as many threads as PyTorch has now."""
    return torch.get_num_threads() == 1 or _openmp() is not None


# -- calling -----------------------------------------------------------------------------------------------------------


class _OpenMP(NamedTuple):
    """Functions of PyTorch's OpenMP library: one to call, and the addresses of two."""

    parallel: Callable[..., None]
    thread_num: int
    num_threads: int


@functools.cache
def _openmp() -> _OpenMP | None:
    try:  # a symbol is looked up in a library and in those that it is linked to
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel, *others = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return _OpenMP(parallel, *(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in others))


def expect(tensor: Tensor | None, dtype: torch.dtype) -> None:
    """Raise a TypeError for what a loop, which sees nothing but an address, would take for something else."""
    if tensor is not None and not (tensor.dtype == dtype and tensor.is_contiguous() and is_plain(tensor)):
        raise TypeError(
            f"expected a plain contiguous {dtype} tensor on the CPU, got a {type(tensor).__name__} of {tensor.dtype} "
            f"on {tensor.device} with strides {tensor.stride()}"
        )


def is_plain(tensor: Tensor) -> bool:
    """Whether the numbers are those at its address."""
    return type(tensor) in (Tensor, Parameter) and tensor.device.type == "cpu" and not tensor.is_neg()


def run(
    build: Callable[..., Any], dtype: torch.dtype, turns: int, width: int, arguments: Sequence[Tensor | int | None]
) -> None:
    """Run a loop of so many turns of that width for a dtype.

    The C function gets one array of int64: the addresses of the two functions of OpenMP, or zeros, the number of turns,
    and the arguments, numbers as they are and tensors as the address of their first element (None is 0).
    """
    entry = _compiled(build, dtype)
    threads = torch.get_num_threads()
    openmp = _openmp() if threads > 1 and turns * width >= _ENOUGH else None
    numbers = [0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    head = (0, 0) if openmp is None else openmp[1:]
    block = (ctypes.c_int64 * (HEAD + len(numbers)))(*head, turns, *numbers)
    if openmp is None:
        entry.ctypes(ctypes.addressof(block))
    else:
        openmp.parallel(entry.address, ctypes.addressof(block), threads, 0)


@functools.cache
def _stamp() -> str:
    """Tells versions of this file apart; those of the file with the loop numba tells apart itself."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


@functools.cache
def _compiled(build: Callable[..., Any], dtype: torch.dtype) -> Any:
    loop = build(STORED[dtype], np.float64 if dtype == torch.float64 else np.float32)
    loop.__qualname__ += f".{_stamp()}"  # in the name of the file on disk: what is inlined from here may have changed
    compiler = functools.partial(numba.cfunc, types.void(types.voidptr), **_OPTIONS)
    try:
        return compiler(cache=True)(loop)
    except Exception:  # there is no place on disk, or it is full, or what lies there is damaged
        return compiler()(loop)


# -- the language of the loops -----------------------------------------------------------------------------------------

# NaN and Inf remain what they are
_OPTIONS = {"fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}
inlined = numba.njit(inline="always", **_OPTIONS)


@intrinsic
def pointer(_: Any, address: Any) -> Any:
    """An address as a pointer."""
    return types.voidptr(address), lambda _, builder, __, args: builder.inttoptr(args[0], cgutils.voidptr_t)


@intrinsic
def _call(_: Any, address: Any) -> Any:
    """What the C function ``int f(void)`` at an address returns."""

    def code(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.call(builder.inttoptr(args[0], ir.FunctionType(ir.IntType(32), []).as_pointer()), [])

    return types.int32(address), code


@intrinsic
def _as_float32(_: Any, bits: Any) -> Any:
    """The number whose bits these are."""
    return types.float32(types.uint32), lambda _, builder, __, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _as_bits(_: Any, number: Any) -> Any:
    """The bits of a number."""
    return types.uint32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], ir.IntType(32))


def as_number(stored: Any) -> Any:
    """An element of a table as the number that it is: of bfloat16, given as uint16, the float32; others unchanged."""


def as_stored(number: Any, like: Any) -> Any:
    """A number as the element ``like`` is of; to bfloat16 it is rounded to the nearest, ties to even."""


@overload(as_number, inline="always")
def _(stored: Any) -> Any:
    def widened(stored: Any) -> Any:
        return _as_float32(np.uint32(stored) << np.uint32(16))

    def unchanged(stored: Any) -> Any:
        return stored

    return widened if stored == types.uint16 else unchanged


@overload(as_stored, inline="always")
def _(number: Any, like: Any) -> Any:
    def rounded(number: Any, like: Any) -> Any:
        bits = _as_bits(number)
        nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.uint16(nearest if number == number else np.uint32(0x7FC0))

    def unchanged(number: Any, like: Any) -> Any:
        return number

    return rounded if like == types.uint16 else unchanged


@inlined
def share(block: Any) -> Any:
    """Number of this thread, count of threads, and the turns of this thread: from the first to before the last."""
    thread, threads = (0, 1) if block[0] == 0 else (_call(block[0]), _call(block[1]))
    turns = block[2]
    return thread, threads, turns * thread // threads, turns * (thread + 1) // threads
