"""Triton's kernels against torchvision in float64: on a GPU where there is one, else in Triton's interpreter.

``conftest.py`` turns the interpreter on. It is slow (some milliseconds for each operation of a program): tiny problems.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import deform_conv2d
from triton_helpers import DEVICE, make_dot_exact

from dyhead_zoo.ops import deform_conv_triton as op
from dyhead_zoo.ops import modulated_deform_conv2d

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


class Case(NamedTuple):
    """One call, without its tensors."""

    size: tuple[int, int] = (5, 4)
    kernel: tuple[int, int] = (1, 2)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    batch: int = 1
    channels: int = 4
    outputs: int = 3
    groups: int = 1
    offset_groups: int = 1
    spread: float = 2.0
    masked: bool = True
    biased: bool = True

    def tensors(self) -> list[Any]:
        """x, offset, mask (or None), weight, bias (or None) in float64."""
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

        x = randn(self.batch, self.channels, *self.size)
        weight = randn(self.outputs, self.channels // self.groups, *self.kernel)
        out_size = F.conv2d(x, weight, None, *self.geometry, self.groups).shape[2:]
        count = math.prod(self.kernel) * self.offset_groups
        offset = randn(self.batch, 2 * count, *out_size) * self.spread
        mask = randn(self.batch, count, *out_size).sigmoid() if self.masked else None
        return [x, offset, mask, weight, randn(self.outputs) if self.biased else None]

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return self.stride, self.padding, self.dilation


CASES = {
    "3x3": Case(size=(3, 4), kernel=(3, 3)),
    "uneven geometry": Case(size=(7, 5), stride=(3, 2), padding=(0, 3), dilation=(1, 2), batch=2),
    "groups and offset groups across": Case(channels=12, outputs=4, groups=2, offset_groups=3, kernel=(1, 1)),
    "more than one tile of all": Case(size=(9, 10), channels=70, outputs=130, kernel=(1, 1), padding=(0, 0)),
    "whole-pixel positions on the border": Case(spread=0.0),
    "mostly outside": Case(spread=30.0),
    "DCNv1, without bias": Case(masked=False, biased=False),
}


def reference(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, case: Case
) -> Tensor:
    return deform_conv2d(x, offset, weight, bias, *case.geometry, mask)


def ours(x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, case: Case) -> Tensor:
    return op.triton_deform_conv2d(x, offset, mask, weight, bias, *case.geometry)


def with_gradients(function: Any, tensors: list[Any], case: Case) -> list[Tensor]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, case)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], grad_out.to(out))]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_torchvision(name: str) -> None:
    case = CASES[name]
    tensors = case.tensors()
    single = [None if t is None else t.float() for t in tensors]
    assert_close(with_gradients(ours, single, case), with_gradients(reference, tensors, case), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, exact_dot: None) -> None:
    case = Case(channels=16)
    tensors = [t.to(dtype) if i in (0, 3, 4) else t.float() for i, t in enumerate(case.tensors())]
    results = with_gradients(ours, tensors, case)
    assert [t.dtype for t in results] == [dtype, dtype, torch.float32, torch.float32, dtype, dtype]
    assert_close(results, with_gradients(reference, [t.double() for t in tensors], case), TOLERANCE[dtype])


@pytest.fixture
def exact_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    make_dot_exact(monkeypatch)


@settings(max_examples=6)
@given(
    case=st.builds(
        Case,
        size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
        kernel=st.sampled_from([(1, 1), (2, 1), (1, 2)]),
        stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
        dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        batch=st.integers(1, 3),
        channels=st.sampled_from([4, 8, 36]),
        outputs=st.sampled_from([4, 20]),
        groups=st.sampled_from([1, 2, 4]),
        offset_groups=st.sampled_from([1, 2]),
        spread=st.sampled_from([0.3, 3.0, 1e6]),
        masked=st.booleans(),
        biased=st.booleans(),
    )
)
def test_forward_of_any_geometry(case: Case) -> None:
    tensors = case.tensors()
    single = [None if t is None else t.float() for t in tensors]
    assert_close([ours(*single, case)], [reference(*tensors, case)], 1e-5)


def test_weight_gradient_is_summed_over_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(size=(9, 9), kernel=(1, 1), padding=(0, 0))
    tensors = [t.float().requires_grad_(i == 3) for i, t in enumerate(case.tensors())]
    whole = torch.autograd.grad(ours(*tensors, case).sum(), tensors[3])
    monkeypatch.setattr(op, "_PART", 32)
    assert_close(list(torch.autograd.grad(ours(*tensors, case).sum(), tensors[3])), [whole[0].double()], 1e-6)


def test_any_strides() -> None:
    case = Case(kernel=(1, 1), padding=(0, 0))
    x, offset, mask, weight, bias = (t.float() for t in case.tensors())
    fields = torch.cat((offset, mask), 1).contiguous(memory_format=torch.channels_last)  # as the offset conv makes them
    strided = [x.mT.contiguous().mT, fields[:, :2], fields[:, 2:], weight, bias]
    dense = with_gradients(ours, [x, offset, mask, weight, bias], case)
    assert_close(with_gradients(ours, strided, case), [t.double() for t in dense], 1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_pixels_spread_as_in_torchvision(bad: float) -> None:
    """A sample that lies wholly outside the map does not see the border."""
    case = Case(size=(3, 3), kernel=(1, 1), padding=(1, 1), spread=1.0, masked=False)
    x, offset, _, weight, bias = case.tensors()
    x[:, 0, 0, 0] = x[:, 0, 2, 1] = bad
    offset[:, :, 2, 2], offset[:, :, 0, 0], offset[:, :, 0, 4] = math.inf, 0.0, -50.0
    expected = reference(x, offset, None, weight, bias, case)
    out = ours(x.float(), offset.float(), None, weight.float(), bias.float(), case)
    assert 0 < expected.isfinite().sum() < expected.numel()
    torch.testing.assert_close(out.double(), expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_nan_positions_are_nan() -> None:
    case = Case(kernel=(1, 1), padding=(0, 0), masked=False)
    x, offset, _, weight, bias = (None if t is None else t.float() for t in case.tensors())
    offset[0, 0, 1, 1] = math.nan
    nan = ours(x, offset, None, weight, bias, case).isnan().any(1)
    assert nan.nonzero().tolist() == [[0, 1, 1]]


# -- PyTorch's machinery -----------------------------------------------------------------------------------------------

SMALL = Case(size=(2, 2), kernel=(1, 1), padding=(0, 0))


class Conv(torch.nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        op.chosen("triton", tensors[0], tensors[1], tensors[3])  # must be traceable
        return ours(*tensors, case=SMALL)  # type: ignore[misc]


def test_operators_obey_the_rules_of_torch_library() -> None:
    tensors = [t.float() for t in SMALL.tensors()]
    geometry = [list(pair) for pair in SMALL.geometry]
    out = ours(*tensors, SMALL)
    torch.library.opcheck(
        torch.ops.dyhead_zoo.deform_conv2d.default, (*(t.requires_grad_() for t in tensors), *geometry)
    )
    backward = (out.detach(), *(t.detach() for t in tensors[:4]), *geometry)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dyhead_zoo.deform_conv2d_backward_samples.default, backward, test_utils=tests)
    torch.library.opcheck(torch.ops.dyhead_zoo.deform_conv2d_backward_weight.default, backward, test_utils=tests)


def test_compiled_code_makes_the_trial_while_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(op, "_trial", lambda device, dtype: calls.append((device.type, dtype)) or True)
    compiled = torch.compile(
        lambda x: x + 1 if op._passes_trial(x.device, x.dtype) else x, fullgraph=True, backend="eager"
    )
    assert [compiled(torch.zeros(1, device=DEVICE)).item() for _ in range(2)] == [1, 1]
    assert calls == [(DEVICE, torch.float32)]


def test_compiles_without_graph_breaks() -> None:
    tensors = [t.float() for t in SMALL.tensors()]
    compiled = torch.compile(Conv(), fullgraph=True, backend="aot_eager")
    results = with_gradients(lambda *args: compiled(*args[:-1]), tensors, SMALL)
    assert_close(results, [t.double() for t in with_gradients(ours, tensors, SMALL)], 1e-6)


def test_exports_as_one_node() -> None:
    tensors = tuple(t.float() for t in SMALL.tensors())
    batch = torch.export.Dim("batch")
    shapes = ({0: batch}, {0: batch}, {0: batch}, None, None)
    two = [torch.cat((t, t)) if i < 3 else t for i, t in enumerate(tensors)]
    program = torch.export.export(Conv(), tuple(two), dynamic_shapes=(shapes,))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.dyhead_zoo.deform_conv2d.default]
    assert torch.equal(program.module()(*tensors), ours(*tensors, SMALL))


def test_autocast_leaves_positions_alone(exact_dot: None) -> None:
    x, offset, mask, weight, bias = (t.float() for t in SMALL.tensors())
    offset[0, 0, 0, 0] = 1.0 + 2**-12  # no bfloat16
    expected = ours(x.bfloat16(), offset, mask, weight.bfloat16(), bias.bfloat16(), SMALL)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = ours(x, offset, mask, weight, bias, SMALL)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


# -- when it does not apply --------------------------------------------------------------------------------------------


def test_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    x, offset, _, weight, _ = (t.float() for t in SMALL.tensors())
    assert op.obstacle(x, offset, weight) is None
    assert "float64" in str(op.obstacle(x.double(), offset, weight))
    assert "int32" in str(op.obstacle(x.expand(1, 4, 2, 2).expand(2**30, 4, 2, 2), offset, weight))
    assert "meta" in str(op.obstacle(x.to("meta"), offset, weight))
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "not installed" in str(op.obstacle(x, offset, weight))


def test_choice_of_the_backend() -> None:
    x, offset, _, weight, _ = (t.float() for t in SMALL.tensors())
    assert op.chosen("triton", x, offset, weight)
    assert op.chosen("auto", x, offset, weight) == (DEVICE == "cuda")
    assert not op.chosen("torchvision", x, offset, weight)
    assert not op.chosen("triton", x[:0], offset[:0], weight)
    with pytest.raises(ValueError, match=r"float64.*Choose"):
        op.chosen("triton", x.double(), offset, weight)


def test_the_public_function_reaches_it() -> None:
    x, offset, mask, weight, bias = (t.float() for t in SMALL.tensors())
    out = modulated_deform_conv2d(x, offset, mask, weight, bias, backend="triton")
    assert torch.equal(out, ours(x, offset, mask, weight, bias, SMALL))
    empty = modulated_deform_conv2d(x[:0], offset[:0], mask[:0], weight, bias, backend="triton")
    assert empty.shape == (0, *out.shape[1:])


def test_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    op._trial.cache_clear()
    with torch.inference_mode():
        assert op._trial(torch.device(DEVICE), torch.float32)
    op._trial.cache_clear()
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="errs"):
        backward = op._backward_weight
        patch.setattr(op, "_backward_weight", lambda *args: backward(*args) * math.nan)
        assert not op._trial(torch.device(DEVICE), torch.float32)
    op._trial.cache_clear()
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="no compiler"):
        patch.setattr(op, "forward_tiles", lambda *_: (_ for _ in ()).throw(RuntimeError("no compiler")))
        assert not op._trial(torch.device(DEVICE), torch.float32)
    op._trial.cache_clear()


def test_deterministic_algorithms() -> None:
    x, offset, mask, weight, bias = (t.float() for t in SMALL.tensors())
    out = ours(x.requires_grad_(), offset, mask, weight, bias, SMALL)
    torch.use_deterministic_algorithms(True)
    try:
        assert "irreproducible" in str(op.obstacle(x, offset, weight))
        with torch.no_grad():
            assert op.obstacle(x, offset, weight) is None
        with pytest.raises(RuntimeError, match="not reproducible"):
            out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_operators_exist_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from dyhead_zoo.ops import deform_conv_triton\n"
        "x = torch.zeros(1, 1, 2, 2); print(torch.ops.dyhead_zoo.deform_conv2d.default.name())"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.split() == ["dyhead_zoo::deform_conv2d"]


def test_kernels_compile_for_gpus() -> None:
    """The interpreter accepts what the compiler does not; the compiler needs no GPU."""
    script = Path(__file__).with_name("compile_triton_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    of_a_block = ["predict_fields", "coarse_fields", "convolve", "statistics", "coefficients", "combine"]
    variants = ["coarse_fields_again", "coefficients_again"]  # the other convention, without attentions
    assert run.stdout.split() == ["forward", "backward_samples", "backward_weight", *of_a_block, *variants]
