"""Benchmarks: the figures belong together, and every case does what it says (nothing here depends on the clock)."""

from __future__ import annotations

import csv
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dyhead_zoo import create_detector
from dyhead_zoo.engine import benchmark, benchmark_cases, benchmark_parts, benchmark_torchvision
from dyhead_zoo.engine.benchmark import Case, run_benchmark
from dyhead_zoo.engine.benchmark_parts import numba_works
from dyhead_zoo.layers import dyhead_inference

IMAGE = (256, 128)
OURS = ("ours", "bag") if numba_works() else ("ours",)


def test_rows_table_and_csv_tell_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    work = {name: lambda: torch.zeros(100).sum() for name in "abc"}
    cases = [Case("one", work, (("a", "b"), ("c", "a"))), Case("two", work, (("b", "c"),))]
    rows = run_benchmark(cases, 3, tmp_path / "new" / "op.csv")
    assert torch.get_num_threads() == threads
    assert [(r.case, r.subject, r.baseline) for r in rows] == [("one", "a", "b"), ("one", "c", "a"), ("two", "b", "c")]
    assert all(0 < row.lower <= row.ratio <= row.upper for row in rows)

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(rows)
    assert all(row.case in line and f"{row.ratio:.2f}" in line for row, line in zip(rows, lines[1:], strict=True))

    with (tmp_path / "new" / "op.csv").open() as file:
        records = list(csv.DictReader(file))
    assert [float(record["ratio"]) for record in records] == [row.ratio for row in rows]
    assert {record["torch"] for record in records} == {torch.__version__}
    assert all(record["machine"] and record["threads"] == "1" for record in records)


def test_the_ratio_is_that_of_the_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "process_time", lambda: now[0])
    takes = {"a": iter([9.0, 2.0, 4.0, 6.0]), "b": iter([1.0, 1.0, 1.0, 2.0])}

    def contestant(name: str) -> Any:
        def work() -> None:
            now[0] += next(takes[name])

        return work

    (row,) = run_benchmark([Case("x", {name: contestant(name) for name in takes}, (("a", "b"),))], 3)
    assert (row.lower, row.ratio, row.upper) == (2.5, 3.0, 3.5)
    assert (row.subject_ms, row.baseline_ms, row.reps) == (4000, 1000, 3)


def test_one_turn_has_no_quartiles() -> None:
    with pytest.raises(ValueError, match="reps must be at least 2, got 1"):
        run_benchmark([], 1)


def test_an_interrupted_run_keeps_its_rows(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    work = {"a": lambda: torch.zeros(9), "b": lambda: torch.zeros(9), "stop": stop}
    with pytest.raises(KeyboardInterrupt):
        run_benchmark([Case("x", work, (("a", "b"), ("a", "stop")))], 2, tmp_path / "rows.csv")
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(("path", "reason"), [("file/rows.csv", "cannot be written"), ("folder", "no regular file")])
def test_a_path_that_cannot_be_written_is_told_before_measuring(tmp_path: Path, path: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    work: Any = {"a": pytest.fail, "b": pytest.fail}
    with pytest.raises(OSError, match=f"{path} .*{reason}.*: give another path"):
        run_benchmark([Case("x", work, (("a", "b"),))], 2, tmp_path / path)


def test_the_first_error_is_the_one_that_is_told(tmp_path: Path) -> None:
    def vanish() -> None:
        (tmp_path / "new").rmdir()
        raise KeyboardInterrupt

    work = {"a": lambda: torch.zeros(9), "b": lambda: torch.zeros(9), "vanish": vanish}
    with (
        pytest.raises(KeyboardInterrupt),
        pytest.warns(UserWarning, match=r"known so far were not written: .*rows.csv"),
    ):
        run_benchmark([Case("x", work, (("a", "b"), ("a", "vanish")))], 2, tmp_path / "new" / "rows.csv")


def test_unknown_benchmarks_are_named() -> None:
    with pytest.raises(ValueError, match="unknown benchmark 'ops': choose op, head"):
        benchmark_cases.cases("ops")


@pytest.mark.parametrize(
    ("what", "given", "flag"),
    [
        ("op", {"name": "test_atss"}, "NAME"),
        ("photo", {"size": (64, 64)}, "--size"),
        ("eval", {"images": "x"}, "--images"),
    ],
)
def test_what_a_benchmark_has_no_use_for_is_named(what: str, given: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=f"benchmark {what} has no use for {flag}"):
        benchmark_cases.cases(what, **given)


def outputs(case: Case) -> dict[str, Any]:
    """What each contestant gives; every name in a pair is a contestant."""
    assert {name for pair in case.pairs for name in pair} <= set(case.contestants)
    return {name: contestant() for name, contestant in case.contestants.items()}


def assert_close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_operators_do_the_same_work() -> None:
    cases = list(benchmark_cases.op_cases([(9, 6)], channels=4))
    assert [case.name for case in cases] == [
        f"9x6x4 stride {stride} {way}" for stride in (1, 2) for way in ("forward", "forward+backward")
    ]
    for case in cases:
        given = outputs(case)
        if isinstance(given["ours"], Tensor):
            assert given["dense"].shape == given["ours"].shape
            for name in OURS:
                assert_close(given[name], given["torchvision"], 1e-5)
                assert_close(given[f"{name} bf16"].float(), given["torchvision"], 0.02)
            for runtime in given.keys() & {"onnxruntime", "openvino"}:
                assert_close(torch.as_tensor(given[runtime][0]), given["torchvision"], 1e-5)
        else:
            for name in OURS:
                for ours, theirs in zip(given[name], given["torchvision"], strict=True):
                    assert_close(ours, theirs, 1e-5)


@pytest.mark.skipif(
    not (importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime")), reason="needs onnxruntime"
)
def test_other_runtimes_take_part_where_installed() -> None:
    case = next(benchmark_cases.op_cases([(9, 6)], channels=4))
    assert ("ours", "onnxruntime") in case.pairs


def test_heads_do_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fused = dyhead_inference.forward
    monkeypatch.setattr(dyhead_inference, "forward", lambda *args: calls.append(1) or fused(*args))
    (case,) = benchmark_cases.head_cases([IMAGE], [2], blocks=1, channels=16)
    given = outputs(case)
    alone = ["fused, bag"] if numba_works() else []
    assert len(calls) == 3 + len(alone)  # "fused", "fused, packed" and "fused bf16"; not "modules"
    for level in range(5):
        for name in ("fused", "fused, packed", *alone, "torchvision op"):
            assert_close(given[name][level], given["modules"][level], 1e-4)


def test_training_steps_leave_no_gradients_behind() -> None:
    (case,) = benchmark_cases.train_cases([IMAGE], blocks=1, channels=16, reference=True)
    outputs(case)
    assert len(case.pairs) == 2 + len(OURS)


def test_without_numba_nothing_else_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_cases, "numba_works", lambda: False)
    heads = benchmark_cases.head_cases([IMAGE], [1], blocks=1, channels=16)
    steps = benchmark_cases.train_cases([IMAGE], blocks=1, channels=16)
    for case in (next(benchmark_cases.op_cases([(9, 6)], channels=4)), next(heads), next(steps)):
        assert not any("bag" in name for name in case.contestants)
        assert {name for pair in case.pairs for name in pair} <= set(case.contestants)


def test_detector_cases() -> None:
    detector = create_detector("atss_lite0_dyhead2")
    inference, *parts, training = benchmark_cases.detector_cases(detector, IMAGE)
    found = outputs(inference)
    for name in ("ours", "ours, bag") if numba_works() else ("ours",):
        for ours, theirs in zip(found[name], found["torchvision op"], strict=True):
            torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=1e-3)
    for case in (*parts, training):
        outputs(case)
    assert {subject for subject, _ in parts[0].pairs} == {"normalise", "backbone", "FPN", "DyHead", "head", "decode"}
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in detector.modules())  # the original is untouched


def test_training_steps_freeze_what_the_weights_of_the_name_are_trained_with() -> None:
    assert benchmark_parts.frozen_as_trained(create_detector("atss_resnet50_dyhead6")) == {
        "frozen_stages": 1,
        "norm_eval": True,
    }
    assert benchmark_parts.frozen_as_trained(create_detector("test_atss_dyhead1")) == {}


def test_settings_reach_every_deformable_convolution() -> None:
    detector = benchmark_parts.with_settings(create_detector("test_reppoints_dyhead1"), backend="torchvision")
    backends = [part.backend for part in detector.modules() if "backend" in vars(part)]
    assert len(backends) == 5 and set(backends) == {"torchvision"}


@pytest.mark.parametrize("name", benchmark_torchvision.BUILDERS)
def test_torchvisions_detectors_find_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = 25  # masks take their time
    build = partial(benchmark_torchvision.BUILDERS[name], box_detections_per_img=few)
    monkeypatch.setattr(benchmark_torchvision, "BUILDERS", {name: build})
    monkeypatch.setattr(benchmark_torchvision, "create_detector", partial(create_detector, max_detections=few))
    (case,) = benchmark_torchvision.torchvision_cases((64, 96))
    found = outputs(case)
    (theirs,) = found["torchvision"]
    for ours in (found["ours"], found["ours fused"]):
        assert len(ours) == len(theirs["scores"]) > 20
        same = (ours.scores - theirs["scores"]).abs() < 1e-3
        assert same.float().mean() > 0.9  # rounding may save or suppress a few boxes
    assert (ours.masks is not None) == ("masks" in theirs) == ("mask" in case.name)


@torch.no_grad()
def test_random_weights_spread_as_trained_ones_do() -> None:
    name, size = next(iter(benchmark_torchvision.BUILDERS)), (64, 96)
    theirs: Any = benchmark_torchvision.same_weights(name, size)[0]
    levels = theirs.backbone(torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))).values()
    objectness, deltas = theirs.rpn.head(list(levels))
    for ordinary, tensors in ((1, levels), (1, objectness), (0.25, deltas)):
        spread = [float(x.std() / ordinary) for x in tensors if x.numel() > 50]
        assert len(spread) >= 3 and all(0.4 < s < 2.5 for s in spread)


def test_photo_cases(tmp_path: Path) -> None:
    from PIL import Image

    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (90, 70), "red").save(photo)
    (case,) = benchmark_cases.photo_cases(create_detector("atss_lite0_dyhead2"), photo)
    given = outputs(case)
    torch.testing.assert_close(given["predict, fused"][0].scores, given["predict"][0].scores, atol=1e-4, rtol=1e-3)
    assert ("read", "predict") in case.pairs and ("DyHead", "predict") in case.pairs
