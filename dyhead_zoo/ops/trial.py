"""What may or may not work here: trials, once per process, and what the caller is in the middle of."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def undisturbed(work: Callable[[], Result]) -> Result:
    """The result of ``work``, run in a thread of its own.

    Autocast, whether gradients are recorded, hooks on what autograd saves (checkpointing), fake tensors, functorch's
    transforms and other modes are those of a thread: none of them is on in a new one.
    """
    with ThreadPoolExecutor(1, "trial") as thread:
        return thread.submit(work).result()


def tensors_are_plain(*tensors: Tensor) -> bool:
    """Whether these tensors, and new ones, are numbers at an address, as under torch.func they are not."""
    try:
        return all(type(t) is Tensor and t.data_ptr() != 0 for t in (*tensors, torch.empty(1, device="cpu")))
    except RuntimeError:
        return False
