"""The page on speed and memory says what the CSV files say, whichever of them exist."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from dyhead_zoo.engine.benchmark import BenchmarkRow, write_csv
from dyhead_zoo.engine.benchmark_cases import USES
from dyhead_zoo.engine.benchmark_memory import MemoryRow

ROOT = Path(__file__).parent.parent
STEP = "atss_resnet50_dyhead6 640x640 training"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module that makes the page, with an empty folder of measurements."""
    pytest.importorskip("matplotlib", reason="the figures show its sample photograph")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import benchmarks

    monkeypatch.setattr(benchmarks, "FOLDER", tmp_path)
    yield benchmarks
    del sys.modules["benchmarks"]


def times(case: str, subject: str, baseline: str, ratio: float, images: int = 0) -> BenchmarkRow:
    return BenchmarkRow(case, subject, baseline, ratio, ratio * 0.9, ratio * 1.1, 200 * ratio, 200.0, 7, images)


def peak(case: str, contestant: str, extra: float, process: float) -> MemoryRow:
    return MemoryRow(case, contestant, extra, extra - 1, extra + 1, process, 3)


def cells(markdown: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]


def verdicts(page: ModuleType) -> dict[str, list[str]]:
    """Goal, measured and verdict by what is limited."""
    return {row[0]: row[1:] for row in cells(page.goals())}


def test_every_benchmark_has_a_place() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert set(re.findall(r"<!-- begin (\w+) -->", text)) == {"goals", *USES}


def test_without_files_nothing_is_claimed(page: ModuleType) -> None:
    for name, make in page.pages().items():
        if name == "goals":
            assert {row[3] for row in cells(make())[2:]} == {"not measured yet"}
        else:
            assert make() == f"Not measured yet: `dyhead-zoo benchmark {name} --csv hub/benchmarks/{name}.csv`."
    assert page.figures() == {}


def test_goals_are_judged_by_what_was_measured(page: ModuleType, tmp_path: Path) -> None:
    rows = [times(f"{size} stride 1 forward", "ours", "dense", ratio) for size, ratio in (("a", 1.254), ("b", 1.4))]
    rows += [times("a stride 1 forward+backward", "ours", "dense", 1.31), times("a forward", "ours", "openvino", 0.7)]
    rows.append(times("a forward", "bag", "dense", 1.5))
    write_csv(rows, tmp_path / "op.csv", 1)
    detectors = [
        times("x inference", "torchvision op", name, ratio) for name, ratio in (("ours", 3.6), ("ours, bag", 3.5))
    ]
    write_csv(detectors, tmp_path / "detector.csv", 2)
    peaks = [peak("op 100x168x256 inference", "ours", 35.4, 800), peak("op 100x168x256 training", "ours", 105.6, 800)]
    peaks.append(peak("op 100x168x256 training", "bag", 35, 800))
    peaks += [peak(STEP, "ours", 900, 1500), peak(STEP, "torchvision op", 1200, 2000)]
    write_csv(peaks, tmp_path / "memory.csv", 1)
    given = verdicts(page)
    forward = given["operator, forward, over a dense convolution"]
    assert forward == ["≤ 1.25", "1.25 to 1.40", "missed in 1 of 2", "1.50 missed"]
    assert given["operator, forward and backward, over a dense convolution"] == ["≤ 1.30", "1.31", "missed"]
    assert given["operator over OpenVINO's"] == ["≤ 1.00", "0.70", "met"]
    assert given["whole detector: torchvision's operator over ours"] == ["≥ 3.50", "3.60", "met", "3.50 met"]
    assert given["memory of the operator, inference"] == ["≤ 35 MB", "35", "met"]
    assert given["memory of the operator, training"] == ["≤ 105 MB", "106", "missed", "35 met"]
    process = "process that makes a training step of the detector, over torchvision's operator"
    assert given[process] == ["≤ 1.00", "0.75", "met"]
    assert given["operator over onnxruntime's"][2] == "not measured yet"


def test_pairs_stand_beside_their_goals_and_conditions(page: ModuleType, tmp_path: Path) -> None:
    write_csv(
        [times("a forward", "ours", "dense", 1.2), times("a forward", "torchvision", "ours", 5.0)],
        tmp_path / "op.csv",
        1,
    )
    text = page.pages()["op"]()
    assert re.search(r"Measured on: .+, 1 thread; dyhead_zoo .+ torch .+\. Medians of 7 turns\.", text)
    assert cells(text)[2:] == [
        ["a forward", "ours / dense", "1.20", "1.08 to 1.32", "240 / 200", "≤ 1.25, met"],
        ["a forward", "torchvision / ours", "5.00", "4.50 to 5.50", "1000 / 200"],
    ]


def test_stages_add_up_to_a_whole_and_what_is_reported_stays_apart(page: ModuleType, tmp_path: Path) -> None:
    rows = [times("d inference", "torchvision op", "ours", 4.0)]
    rows += [times("d ours", stage, "whole", share) for stage, share in (("backbone", 0.3), ("DyHead", 0.5))]
    write_csv(rows, tmp_path / "detector.csv", 2)
    measured, reported = page.pages()["detector"]().split("reported, on another machine")
    assert ["d ours", "DyHead", "100", "50.0 %"] in cells(measured)
    assert ["d ours", "**whole**", "200"] in [row[:3] for row in cells(measured)]
    assert "mmdetection" not in measured and "mmdetection 3 (reported)" in reported
    assert "mmdetection 3 (reported)" in page.figures()["benchmark_detector.svg"]

    write_csv([times("e", "decode", "whole", 0.5, images=50)], tmp_path / "data.csv", 1)
    assert "**whole**, 250 images/s" in page.pages()["data"]()
    write_csv(
        [times("p", "read", "predict", 0.1), times("p", "predict, fused", "predict", 0.8)], tmp_path / "photo.csv", 2
    )
    assert "predict, fused / predict | 0.80" in page.pages()["photo"]()
    assert "fused" not in page.figures()["benchmark_photo.svg"]


def test_figures_are_pictures_with_every_name(page: ModuleType, tmp_path: Path) -> None:
    for name in page.COMPARED:
        write_csv([times(f"case {name}", "ours", "dense", 1.2)], tmp_path / f"{name}.csv", 1)
    for name in page.STAGED:
        write_csv([times(f"case {name}", "decode", "whole", 0.4)], tmp_path / f"{name}.csv", 1)
    write_csv([peak("op 1x1x1 inference", "ours", 20, 800)], tmp_path / "memory.csv", 1)
    figures = page.figures()
    assert len(figures) == 9 and figures == page.figures()
    for name, figure in figures.items():
        text = " ".join(ElementTree.fromstring(figure).itertext())
        what = name.removeprefix("benchmark_").removesuffix(".svg")
        assert ("op 1x1x1 inference" if what == "memory" else f"case {what}") in text
        assert f"assets/{name}" in page.pages()[what]()
