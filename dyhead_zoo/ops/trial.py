"""Trying out, once per process, what may or may not work here, whatever the caller is in the middle of."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def undisturbed(work: Callable[[], Result]) -> Result:
    """The result of ``work``, run in a thread of its own.

    Autocast, whether gradients are recorded, hooks on what autograd saves (checkpointing), fake tensors, functorch's
    transforms and other modes are those of a thread: none of them is on in a new one.
    """
    with ThreadPoolExecutor(1, "trial") as thread:
        return thread.submit(work).result()
