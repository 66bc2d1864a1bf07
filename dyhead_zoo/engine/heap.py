"""What the C library keeps of the memory that tensors on a CPU have left; elsewhere than with glibc nothing happens.

glibc takes large blocks from the system one by one and returns each when it is free, but raises the limit for "large"
as it goes, up to 32 MB (mallopt(3), M_MMAP_THRESHOLD). Smaller ones come from a heap that hardly shrinks: training
that frees what it will compute again then holds most of what it freed.
"""

from __future__ import annotations

import ctypes
from typing import Any

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD in glibc's malloc.h


def return_large_blocks(size: int = 2**24) -> None:
    """From now on blocks of ``size`` bytes or more go back to the system when they are free, in the whole process.

    Fresh blocks have to be cleared by the system, so that the smaller ``size``, the more time this takes.
    """
    if mallopt := _function("mallopt"):
        mallopt(_MMAP_THRESHOLD, size)


def trim() -> None:
    """Return what is free to the system, once."""
    if malloc_trim := _function("malloc_trim"):
        malloc_trim(0)


def _function(name: str) -> Any:
    """A function of glibc, or None where there is another C library."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None
