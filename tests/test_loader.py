from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import FUZZ, coco_dict, small_coco, write_coco
from hypothesis import given, settings
from hypothesis import strategies as st

from dyhead_zoo.data.coco import CocoDataset
from dyhead_zoo.data.loader import make_eval_loader, make_train_loader, prepare_images
from dyhead_zoo.data.transforms import SmallDataTrain, StandardTrain, resize_to_protocol
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.structures import Batch

SMALL = SmallDataTrain(32)
STANDARD = StandardTrain((16, 24, 32), 64)
CFG = PretrainedCfg(short_side=24, long_side=40, pad_divisor=8)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return CocoDataset(*small_coco(tmp_path_factory.mktemp("coco"), count=11))


def train(dataset: CocoDataset, transform: Any = SMALL, **options: Any) -> list[Batch]:
    options = {"batch_size": 4, "seed": 5, "epoch": 0, "pad_divisor": 16, **options}
    return list(make_train_loader(dataset, transform, **options))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.image_ids == b.image_ids
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.image_sizes, b.image_sizes) and torch.equal(a.original_sizes, b.original_sizes)
        for x, y in zip(a.targets, b.targets, strict=True):
            assert torch.equal(x["boxes"], y["boxes"]) and torch.equal(x["labels"], y["labels"])


def rows(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """One entry per image, without its batch."""
    return [
        (
            image_id,
            *batch.image_sizes[k].tolist(),
            batch.images[k].flatten().tolist(),
            *map(str, batch.targets[k].values()),
        )
        for batch in batches
        for k, image_id in enumerate(batch.image_ids)
    ]


# ---- training


@pytest.mark.parametrize("transform", [SMALL, STANDARD])
def test_training_batches_are_full_uint8_and_padded_with_zeros(dataset: CocoDataset, transform: Any) -> None:
    batches = train(dataset, transform)
    assert len(batches) == 3  # 11 images in batches of 4
    for batch in batches:
        assert batch.images.dtype == torch.uint8 and batch.images.shape[:2] == (4, 3)
        assert all(side % 16 == 0 for side in batch.images.shape[2:])
        assert len(batch.targets) == len(batch.image_ids) == 4
        assert batch.image_sizes.dtype == batch.original_sizes.dtype == torch.int64
        for image, (height, width), target in zip(batch.images, batch.image_sizes.tolist(), batch.targets, strict=True):
            assert not image[:, height:].any() and not image[:, :, width:].any()
            assert image[:, :height, :width].any()
            boxes = target["boxes"]
            assert (boxes >= 0).all() and (boxes[:, 0::2] <= width).all() and (boxes[:, 1::2] <= height).all()
    seen = [image_id for batch in batches for image_id in batch.image_ids]
    assert set(seen) == set(dataset.image_ids)


def test_a_batch_larger_than_the_data_set_repeats_images(dataset: CocoDataset) -> None:
    (batch,) = train(dataset, batch_size=25)
    assert len(batch.image_ids) == 25 and set(batch.image_ids) == set(dataset.image_ids)


@pytest.mark.parametrize("transform", [SMALL, STANDARD])
def test_the_number_of_workers_changes_nothing(dataset: CocoDataset, transform: Any) -> None:
    assert_same(train(dataset, transform), train(dataset, transform, num_workers=2))


def test_batches_can_be_sent_to_workers_that_do_not_fork(dataset: CocoDataset) -> None:
    for loader in (make_train_loader(dataset, STANDARD, 4, 5, 0, 16), make_eval_loader(dataset, CFG, 3)):
        sent = pickle.loads(pickle.dumps(loader.dataset))
        assert_same([sent[k] for k in range(len(loader))], list(loader))


def test_seed_and_epoch_change_order_and_samples(dataset: CocoDataset) -> None:
    base = train(dataset)
    assert_same(base, train(dataset))
    for other in (train(dataset, seed=6), train(dataset, epoch=1)):
        assert [b.image_ids for b in other] != [b.image_ids for b in base]
        pixels = {row[0]: row[3] for row in rows(base)}
        assert any(pixels[row[0]] != row[3] for row in rows(other))


def test_samples_depend_on_seed_epoch_and_index_only(dataset: CocoDataset) -> None:
    by_id = {row[0]: row for row in rows(train(dataset))}
    for row in rows(train(dataset, batch_size=2, world_size=2, rank=1)):
        assert row == by_id[row[0]]


@pytest.mark.parametrize("transform", [SMALL, STANDARD])
def test_resuming_within_an_epoch_continues_the_same_batches(dataset: CocoDataset, transform: Any) -> None:
    whole = train(dataset, transform, batch_size=2)
    assert_same(whole[2:], train(dataset, transform, batch_size=2, start_batch=2))
    assert train(dataset, transform, batch_size=2, start_batch=len(whole)) == []


@pytest.mark.parametrize("transform", [SMALL, STANDARD])
@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_the_global_batch_does_not_depend_on_how_it_is_spread(
    dataset: CocoDataset, transform: Any, world_size: int, accumulate: int
) -> None:
    whole = train(dataset, transform, batch_size=8)
    parts = [
        train(
            dataset,
            transform,
            batch_size=8 // world_size // accumulate,
            world_size=world_size,
            rank=r,
            accumulate=accumulate,
        )
        for r in range(world_size)
    ]
    assert {len(part) for part in parts} == {len(whole) * accumulate}
    for step, batch in enumerate(whole):
        members = [parts[r][step * accumulate + a] for a in range(accumulate) for r in range(world_size)]
        assert torch.equal(torch.cat([member.images for member in members]), batch.images)
        assert [i for member in members for i in member.image_ids] == batch.image_ids


def test_standard_batches_share_a_scale_and_mostly_a_shape(dataset: CocoDataset) -> None:
    batches = [batch for epoch in range(6) for batch in train(dataset, STANDARD, batch_size=2, epoch=epoch)]
    mixed_shapes = 0
    for batch in batches:
        short = {min(size) for size in batch.image_sizes.tolist()}
        assert len(short) == 1
        largest = batch.image_sizes.amax(0).tolist()
        assert list(batch.images.shape[2:]) == [-(-side // 16) * 16 for side in largest]
        mixed_shapes += len({w >= h for h, w in batch.original_sizes.tolist()}) > 1
    assert len(batches) == 36 and mixed_shapes <= 6  # at most what is left over of the wide and tall images
    assert {min(b.image_sizes[0].tolist()) for b in batches} == {16, 24, 32}


def test_crowd_regions_are_no_targets(dataset: CocoDataset) -> None:
    transform = StandardTrain((24,), 40, flip=0.0)
    counts = {
        i: len(t["boxes"]) for b in train(dataset, transform) for i, t in zip(b.image_ids, b.targets, strict=True)
    }
    assert counts == {10 * (k + 1): k % 3 for k in range(11)}


def test_the_global_generator_is_left_alone(dataset: CocoDataset) -> None:
    state = torch.get_rng_state()
    train(dataset)
    list(make_eval_loader(dataset, CFG))
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_share_the_cache(tmp_path: Path) -> None:
    images, annotations = small_coco(tmp_path)
    cached, plain = CocoDataset(images, annotations, cache=True), CocoDataset(images, annotations)
    first = train(cached, SmallDataTrain(32, mosaic=0.0), num_workers=2)
    assert_same(first, train(plain, SmallDataTrain(32, mosaic=0.0)))
    for file in images.iterdir():
        file.unlink()
    assert_same(first, train(cached, SmallDataTrain(32, mosaic=0.0)))


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"rank": 1}, {"rank": -1}, {"world_size": 0}, {"seed": -1}, {"epoch": -1}, {"accumulate": 0},
     {"pad_divisor": 0}, {"start_batch": -1}],
)  # fmt: skip
def test_impossible_numbers_are_refused(dataset: CocoDataset, options: dict[str, int]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        train(dataset, **options)


def test_an_unreadable_picture_names_itself(tmp_path: Path) -> None:
    images, annotations = small_coco(tmp_path)
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"3\.png"):
        train(CocoDataset(images, annotations))


# ---- evaluation


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_sees_every_image_once_whatever_the_batches(
    dataset: CocoDataset, batch_size: int, world_size: int
) -> None:
    ranks = [list(make_eval_loader(dataset, CFG, batch_size, rank=r, world_size=world_size)) for r in range(world_size)]
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(i for b in batches for i in b.image_ids) == dataset.image_ids
    assert max(len(b.image_ids) for b in batches) <= batch_size
    alone = {b.image_ids[0]: b for b in make_eval_loader(dataset, CFG)}
    for batch in batches:
        for k, image_id in enumerate(batch.image_ids):
            assert torch.equal(batch.images[k], alone[image_id].images[0])
            assert torch.equal(batch.image_sizes[k], alone[image_id].image_sizes[0])


def test_evaluation_follows_the_protocol(dataset: CocoDataset) -> None:
    for batch in make_eval_loader(dataset, CFG.replace(antialias=False, rounding="floor"), 2, num_workers=1):
        for k, image_id in enumerate(batch.image_ids):
            index = dataset.image_ids.index(image_id)
            record = dataset.record(index)
            expected = resize_to_protocol(dataset.image(index), 24, 40, antialias=False, rounding="floor")
            height, width = expected.shape[1:]
            assert batch.image_sizes[k].tolist() == [height, width]
            assert torch.equal(batch.images[k, :, :height, :width], expected)
            assert list(batch.images.shape[2:]) == [-(-height // 8) * 8, -(-width // 8) * 8]
            assert batch.original_sizes[k].tolist() == [record.height, record.width]
            scale = torch.tensor([width / record.width, height / record.height] * 2)
            torch.testing.assert_close(batch.targets[k]["boxes"], record.boxes * scale)
            assert torch.equal(batch.targets[k]["labels"], record.labels)


def test_evaluation_refuses_impossible_ranks(dataset: CocoDataset) -> None:
    with pytest.raises(ValueError, match="rank=2"):
        make_eval_loader(dataset, CFG, rank=2, world_size=2)


# ---- pictures in memory


def test_prepared_images_are_those_of_evaluation(dataset: CocoDataset) -> None:
    images = [dataset.image(i) for i in range(len(dataset))]
    expected = {b.image_ids[0]: b for b in make_eval_loader(dataset, CFG)}
    positions = []
    for indices, batch in prepare_images(images, CFG, batch_size=3):
        assert batch.image_ids == indices and len(indices) <= 3
        positions += indices
        for k, position in enumerate(indices):
            assert torch.equal(batch.images[k], expected[dataset.image_ids[position]].images[0])
            assert batch.targets[k]["boxes"].shape == (0, 4)
    assert sorted(positions) == list(range(11))
    assert list(prepare_images([], CFG, 4)) == []
    with pytest.raises(ValueError, match="batch_size=0"):
        list(prepare_images(images, CFG, 0))


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=12), st.integers(1, 5))
@settings(max_examples=30 * FUZZ, deadline=None)
def test_prepared_batches_have_one_canvas_that_each_image_gets_alone(sizes: list[tuple[int, int]], size: int) -> None:
    images = [torch.full((3, h, w), 7, dtype=torch.uint8) for h, w in sizes]
    found = list(prepare_images(images, CFG, size))
    assert sorted(i for indices, _ in found for i in indices) == list(range(len(sizes)))
    for indices, batch in found:
        for k, position in enumerate(indices):
            ((_, alone),) = prepare_images([images[position]], CFG, 1)
            assert torch.equal(alone.images[0], batch.images[k])
            assert batch.original_sizes[k].tolist() == list(sizes[position])


# ---- real photographs


def test_small_coco_photographs(data_dir: Path) -> None:
    folder = data_dir / "coco_small"
    data = CocoDataset(
        folder / "images" / "val", folder / "annotations" / "instances_val_tiny.json", check="size", strict=True
    )
    assert data.report.totals["images"] == 64 and len(data.label_space) == 80
    cfg = PretrainedCfg(short_side=320, long_side=320)
    assert sum(len(b.image_ids) for b in make_eval_loader(data, cfg, 8)) == 64
    for batch in train(data, SmallDataTrain(), batch_size=16, pad_divisor=32):
        assert batch.images.shape == (16, 3, 320, 320) and sum(len(t["boxes"]) for t in batch.targets) > 16


def test_planning_reads_no_picture(tmp_path: Path) -> None:
    content = coco_dict([(20, 30)] * 50, [])
    data = CocoDataset(*write_coco(tmp_path, content, pictures=False), check="none")
    assert len(make_train_loader(data, STANDARD, 8, 0, 0, 32)) == 7
    assert len(make_eval_loader(data, CFG, 8)) == 7
