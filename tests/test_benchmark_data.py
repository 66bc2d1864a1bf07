"""Benchmarks of making batches and of scoring: the stages are those of the whole, and both evaluations agree."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from dyhead_zoo import cli
from dyhead_zoo.data.coco import CocoDataset
from dyhead_zoo.data.images import read_image
from dyhead_zoo.data.transforms import SmallDataTrain
from dyhead_zoo.engine import benchmark_data
from dyhead_zoo.engine.benchmark import run_benchmark
from dyhead_zoo.engine.benchmark_data import data_cases, eval_cases, write_pictures
from tests.data_helpers import small_coco


def test_every_stage_of_every_recipe_runs() -> None:
    seen = {}
    for case in data_cases(["test_atss"], size=(30, 40), count=5):
        for contestant in case.contestants.values():
            contestant()
        seen[case.name.partition(":")[0]] = case.images, len(case.contestants)
    assert seen == {"small recipe": (16, 5), "standard recipe": (16, 5), "eval 384/384": (5, 5)}  # 16: a full batch


def test_images_per_second_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = data_cases(["test_atss"], size=(30, 40), count=3)  # whose folder lives as long as it
    rows = run_benchmark(islice(cases, 1), 2, tmp_path / "data.csv")
    assert [(row.subject, row.baseline) for row in rows] == [
        (stage, "whole") for stage in ("read", "decode", "augment", "batch")
    ]
    assert (
        f"{rows[0].baseline_ms:.1f} ms, {1000 * rows[0].images / rows[0].baseline_ms:.1f} images/s"
        in capsys.readouterr().out
    )
    assert ",images,machine," in (tmp_path / "data.csv").read_text()


def test_data_of_the_users_own(tmp_path: Path) -> None:
    images, annotations = small_coco(tmp_path, count=7)
    case = next(data_cases(["test_atss"], count=4, images=images, annotations=annotations))
    assert "4 files of images" in case.name


def test_faults_are_told_before_anything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="give both"):
        data_cases(["test_atss"], images=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none.json"):
        data_cases(["test_atss"], images=tmp_path, annotations=tmp_path / "none.json")
    with pytest.raises(ValueError, match="pictures of 9x7: use --size of at least 8 pixels"):
        data_cases(["test_atss"], size=(9, 7))
    assert cli.main(["benchmark", "data", "test_ats"]) == 2
    captured = capsys.readouterr()
    assert "Did you mean test_atss" in captured.err and not captured.out


def test_augmentation_alone_makes_the_very_batches(tmp_path: Path) -> None:
    write_pictures(tmp_path, tmp_path / "a.json", 6, (30, 40))
    dataset, transform = CocoDataset(tmp_path, tmp_path / "a.json"), SmallDataTrain(size=32, mosaic=0.5)
    case = benchmark_data._train_case("x", dataset, transform)
    loader = benchmark_data.make_train_loader(dataset, transform, 16, seed=0, epoch=0, pad_divisor=32)
    (batch,) = list(loader)
    samples = case.contestants["augment"]()
    assert isinstance(samples, list) and len(samples) == len(batch.targets)
    for sample, image, target in zip(samples, batch.images, batch.targets, strict=True):
        height, width = sample.image.shape[1:]
        assert torch.equal(sample.image, image[:, :height, :width])
        assert torch.equal(sample.boxes, target["boxes"])


def test_synthetic_pictures_are_as_stated(tmp_path: Path) -> None:
    kilobytes = write_pictures(tmp_path, tmp_path / "annotations.json", 4)
    dataset = CocoDataset(tmp_path, tmp_path / "annotations.json", strict=True, check="size")
    assert 100 < kilobytes < 200
    assert [tuple(read_image(dataset.record(i).path).shape[1:]) for i in range(4)] == [(480, 640)] * 3 + [(640, 480)]
    assert len(dataset[0].boxes) == 7


def test_both_evaluations_give_the_same() -> None:
    (case,) = eval_cases(images=5, objects=3, detections=10)
    assert case.name == "5 images, 80 classes, 15 objects, 50 detections"
    for _ in range(2):  # no contestant spoils what the others work on
        figures = {name: contestant() for name, contestant in case.contestants.items()}
        for subject, baseline in case.pairs:
            assert figures[subject] == pytest.approx(figures[baseline], nan_ok=True, abs=1e-9), subject
        assert 0.05 < figures["pycocotools"][0] < 1  # type: ignore[index]
