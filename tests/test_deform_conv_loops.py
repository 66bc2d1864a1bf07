"""The loops that numba compiles: when they are used, and what becomes of calls that they cannot serve."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from test_deform_conv import Case, assert_same_as_torchvision, conv

pytest.importorskip("numba")
from dyhead_zoo.ops import deform_conv_loops, deform_conv_samples, loops


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def forget_trials() -> Iterator[None]:
    deform_conv_samples._tried.cache_clear()
    yield
    deform_conv_samples._tried.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_samples_and_their_gradients_are_the_same_on_any_number_of_threads(
    dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """The products are PyTorch's, which promises no such thing; everything else is ours."""
    loops = deform_conv_samples.compiled_loops(dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        assert deform_conv_samples.compiled_loops(dtype) is loops is not None
        results.append(deform_conv_samples._trial(dtype, loops))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.usefixtures("forget_trials")
def test_a_numba_that_gives_wrong_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deform_conv_loops, "sum_corners", lambda table, index, weight, out: out.zero_())
    tensors = Case().tensors()
    with pytest.warns(UserWarning, match="numba is installed but fails .a trial gave wrong numbers"):
        out = conv(*tensors, padding=1)
    torch.testing.assert_close(out, conv(*tensors, padding=1, backend="bag"))
    with pytest.raises(ValueError, match=r"backend 'numba' cannot be used: numba is installed but fails"):
        conv(*tensors, padding=1, backend="numba")


@pytest.mark.usefixtures("forget_trials")
def test_without_numba_it_is_bag(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(deform_conv_samples.importlib.util, "find_spec", lambda name: None)
    tensors = Case().tensors()
    assert torch.equal(conv(*tensors, padding=1), conv(*tensors, padding=1, backend="bag"))
    assert not recwarn.list
    with pytest.raises(ValueError, match=r"pip install 'dyhead-zoo\[numba\]'"):
        conv(*tensors, padding=1, backend="numba")


IN_THE_MIDDLE = {
    "checkpointing": """
        head, features = DyHead(32, num_blocks=2), [torch.randn(1, 32, n, n, requires_grad=True) for n in (16, 8)]
        head.grad_checkpointing = True
        sum(out.sum() for out in head(features)).backward()""",
    "torch.func": """
        torch.func.jvp(lambda t: conv().sum() * t.sum(), (x,), (x,))""",
    "fake tensors": """
        with FakeTensorMode(allow_non_fake_inputs=True), contextlib.suppress(DataDependentOutputException):
            conv()""",
    "autocast": """
        with torch.autocast("cpu", torch.bfloat16):
            conv()""",
    "inference": """
        with torch.inference_mode():
            conv()""",
}


@pytest.mark.parametrize("first", IN_THE_MIDDLE.values(), ids=IN_THE_MIDDLE.keys())
def test_the_first_call_may_come_in_the_middle_of_anything(first: str) -> None:
    program = f"""
import contextlib, torch, warnings
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from dyhead_zoo.layers.dyhead import DyHead
from dyhead_zoo.ops import modulated_deform_conv2d
from dyhead_zoo.ops.deform_conv_samples import compiled_loops

x, offset, mask, weight = (torch.randn(1, n, 9, 9) for n in (8, 18, 9, 8))
conv = lambda: modulated_deform_conv2d(x, offset, mask, weight[..., :3, :3], padding=1)
warnings.simplefilter("error", UserWarning)
if True:{first}
assert compiled_loops(torch.float32) is not None
assert conv().isfinite().all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_without_openmp_functions_one_thread_remains(
    monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    monkeypatch.setattr(loops, "_openmp", lambda: None)
    threads(2)
    assert deform_conv_samples.compiled_loops(torch.float32) is None
    threads(1)
    assert deform_conv_samples.compiled_loops(torch.float32) is deform_conv_loops


def test_without_a_place_on_disk_numba_compiles_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    caching = pytest.importorskip("numba.core.caching")
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    loops._compiled.cache_clear()
    try:
        assert_same_as_torchvision(Case().tensors(), 1, 1, tolerance=1e-13, backend="numba")
    finally:
        loops._compiled.cache_clear()


def test_loops_are_given_nothing_that_they_would_misread() -> None:
    table, index, weight = torch.zeros(6, 4), torch.zeros(8, dtype=torch.int32), torch.zeros(8)
    for name, wrong in (("table", table.t()), ("index", index.long()), ("weight", weight.double())):
        arguments = {"table": table, "index": index, "weight": weight, "out": torch.zeros(2, 4)} | {name: wrong}
        with pytest.raises(TypeError, match="expected a plain contiguous torch"):
            deform_conv_loops.sum_corners(**arguments)
