"""What the tests of our Triton kernels share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU in Triton's interpreter, see conftest.py


def make_dot_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter keeps bfloat16 as its bits in uint16, and its dot multiplies those as integers."""
    if DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        a, b = (t if t.dtype.is_fp32() else self.create_fp_ext(t, interpreter.tl.float32) for t in (a, b))
        return interpreter.TensorHandle(a.data @ b.data + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
