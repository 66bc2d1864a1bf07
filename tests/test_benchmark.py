from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from dyhead_zoo.engine.benchmark import benchmark_op


def test_rows_table_and_csv_tell_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    rows = benchmark_op(3, tmp_path / "op.csv", sizes=((5, 6), (3, 4)), channels=4)
    assert torch.get_num_threads() == threads
    assert {(row.size, row.direction, row.subject, row.baseline) for row in rows} == {
        (size, direction, *pair)
        for size in ("5x6x4", "3x4x4")
        for direction in ("forward", "forward+backward")
        for pair in (("bag", "dense"), ("torchvision", "bag"))
    }
    assert all(0 < row.lower <= row.ratio <= row.upper for row in rows)

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(rows)
    assert all(row.size in line and f"{row.ratio:.2f}" in line for row, line in zip(rows, lines[1:], strict=True))

    with (tmp_path / "op.csv").open() as file:
        records = list(csv.DictReader(file))
    assert [float(record["ratio"]) for record in records] == [row.ratio for row in rows]
    assert {record["torch"] for record in records} == {torch.__version__}
    assert all(record["machine"] and record["threads"] == "1" for record in records)


def test_one_turn_has_no_quartiles() -> None:
    with pytest.raises(ValueError, match="reps must be at least 2, got 1"):
        benchmark_op(1)
