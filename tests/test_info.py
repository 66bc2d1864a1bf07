"""What a detector costs: multiply-adds by formula, of every family, and the table of them."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from dyhead_zoo import create_detector, registry
from dyhead_zoo.engine.info import count_macs, count_parameters, describe
from dyhead_zoo.layers.dyhead import DeformConv3x3

ROOT = Path(__file__).parent.parent


def test_multiply_adds_of_dense_and_deformable_convolutions() -> None:
    class Two(nn.Module):
        in_chans = 3

        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.deform = DeformConv3x3(8, 16)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.dense(images.float())
            return self.deform(x, x.new_zeros(1, 18, *x.shape[2:]), x.new_zeros(1, 9, *x.shape[2:]))

    model = Two()
    places = 10 * 20
    assert count_macs(model, 20, 40) == places * (9 * 3 * 8 + 9 * 8 * 16)  # type: ignore[arg-type]
    assert not next(model.parameters()).is_meta and next(model.parameters()).requires_grad


def test_regions_count_as_many_as_there_may_be() -> None:
    def macs(**arguments: object) -> int:
        return count_macs(create_detector("test_mask_rcnn", **arguments), 64, 64)  # type: ignore[arg-type]

    box = 32 * 7 * 7 * 32 + 32 * (81 + 80 * 4)
    mask = 4 * 14 * 14 * 32 * 32 * 9 + 28 * 28 * (32 * 32 + 32 * 80)
    least = macs(proposals=(200, 1), max_detections=1)
    assert macs(proposals=(200, 31), max_detections=1) - least == 30 * box
    assert macs(proposals=(200, 1), max_detections=8) - least == 7 * mask


def test_attention_is_counted() -> None:
    def macs(height: int, **arguments: object) -> int:
        return count_macs(create_detector("test_detr", **arguments), height, 64)  # type: ignore[arg-type]

    without = macs(128, encoder_layers=0), macs(256, encoder_layers=0)
    tokens, channels, hidden = (8, 16), 32, 64
    for n, with_layer, base in zip(tokens, (macs(128), macs(256)), without, strict=True):
        projections, products = 4 * n * channels**2, 2 * n * n * channels
        assert with_layer - base == projections + products + 2 * n * channels * hidden


def test_deformable_attention_is_counted() -> None:
    def macs(layers: int) -> int:
        return count_macs(create_detector("test_deformable_detr", encoder_layers=layers), 128, 128)

    tokens, channels, samples = 16 * 16 + 8 * 8 + 4 * 4 + 2 * 2, 32, 8 * 4 * 4
    projections = tokens * channels * (2 * channels + 2 * samples + samples)
    weighted_sums = tokens * samples * channels // 8
    assert macs(2) - macs(1) == projections + weighted_sums + 2 * tokens * channels * 64


@pytest.mark.parametrize("name", ["test_detr_dyhead1", "test_deformable_detr_dyhead1", "test_borderdet_dyhead1"])
def test_info_describes_families_of_all_kinds(name: str) -> None:
    assert "multiply-adds: " in describe(name)


def rows() -> list[dict[str, str]]:
    return list(csv.DictReader((ROOT / "hub" / "sizes.csv").open()))


def test_the_table_has_every_family_with_and_without_dyhead() -> None:
    registry.list_detectors()
    names = {row["name"] for row in rows()}
    assert {f"{family}_resnet50{dyhead}" for family in registry._families for dyhead in ("", "_dyhead6")} <= names
    assert {name for name in registry.list_detectors("*_lite0*")} <= names


SAMPLE = ["mask_rcnn_resnet50", "detr_resnet50_dyhead6", "atss_resnet50_dyhead6", "deformable_detr_lite0_dyhead2"]


@pytest.mark.parametrize("name", SAMPLE)
def test_the_table_is_fresh(name: str) -> None:
    (row,) = (row for row in rows() if row["name"] == name)
    with torch.device("meta"):
        detector = create_detector(name)
    fresh = count_parameters(detector), count_macs(detector, int(row["height"]), int(row["width"]))
    assert fresh == (int(row["parameters"]), int(row["multiply_adds"])), "run python hub/sizes.py"


@pytest.mark.parametrize(
    ("name", "published"),
    [("faster_rcnn_resnet50", 207.07e9), ("mask_rcnn_resnet50", 260e9), ("atss_resnet50", 205e9)],
)
def test_multiply_adds_are_the_published_ones(name: str, published: float) -> None:
    """At 800 x 1280 pixels: by mmdetection's tool, then those of Swin's paper (arXiv:2103.14030, table 2)."""
    with torch.device("meta"):
        assert math.isclose(count_macs(create_detector(name), 800, 1280), published, rel_tol=0.01)
