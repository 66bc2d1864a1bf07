from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import FUZZ, coco_dict, small_coco, write_coco
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dyhead_zoo.data.coco import CocoDataset
from dyhead_zoo.data.label_space import LabelSpace

VALID = coco_dict(
    [(30, 40), (20, 20)],
    [(10, 3, [1, 2, 10, 12.5], 0), (20, 1, [0, 0, 20, 20], 0), (10, 7, [5, 5, 20, 20], 1), (10, 1, [39, 29, 1, 1], 0)],
)


def dataset(folder: Path, content: Any, **options: Any) -> CocoDataset:
    options.setdefault("check", "none")
    return CocoDataset(*write_coco(folder, content, pictures=False), **options)


def changed(**changes: Any) -> dict[str, Any]:
    """``VALID`` with fields set by path, e.g. ``annotations__0__bbox=...``; ``...`` as the value deletes the field."""
    content = copy.deepcopy(VALID)
    for path, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("__")]
        node: Any = content
        for part in parents:
            node = node[part]
        if value is ...:
            del node[last]
        else:
            node[last] = value
    return content


# ---- what is read


def test_records_have_xyxy_boxes_and_labels_by_ascending_category_id(tmp_path: Path) -> None:
    data = dataset(tmp_path, VALID)
    assert data.label_space == LabelSpace(("ant", "cat", "bee"), (1, 3, 7))
    assert data.image_ids == [10, 20] and [data.size(i) for i in range(2)] == [(30, 40), (20, 20)]
    record = data.record(0)
    assert (record.image_id, record.path.name, record.height, record.width) == (10, "0.png", 30, 40)
    assert record.boxes.tolist() == [[1, 2, 11, 14.5], [39, 29, 40, 30]] and record.boxes.dtype == torch.float32
    assert record.labels.tolist() == [1, 0] and record.labels.dtype == torch.int64
    assert record.crowd_boxes.tolist() == [[5, 5, 25, 25]] and record.crowd_labels.tolist() == [2]
    assert not data.report.repairs and not data.report.remarks


def test_items_are_picture_boxes_labels_without_crowds(tmp_path: Path) -> None:
    data = CocoDataset(*small_coco(tmp_path), check="size")
    image, boxes, labels, masks = data[1]
    assert image.shape == (3, *data.size(1)) and image.dtype == torch.uint8
    assert len(boxes) == len(labels) == 1 and len(data.record(1).crowd_boxes) == 1
    assert masks is None
    image, boxes, labels, _ = data[0]
    assert boxes.shape == (0, 4) and labels.shape == (0,)
    assert data.report.totals == {
        "images": 7, "boxes": 6, "crowd regions": 1, "classes": 3, "images without objects": 3
    }  # fmt: skip


def test_negative_indices_count_from_the_end(tmp_path: Path) -> None:
    data = CocoDataset(*small_coco(tmp_path), cache=True)
    for a, b in zip(data[-1][:3], data[6][:3], strict=True):
        assert torch.equal(a, b)
    assert len(list(data)) == 7
    for index in (7, -8):
        with pytest.raises(IndexError):
            data[index]


def test_cache_gives_the_same_pictures_without_reading_again(tmp_path: Path) -> None:
    images, annotations = small_coco(tmp_path)
    plain, cached = CocoDataset(images, annotations), CocoDataset(images, annotations, cache=True)
    first = [cached.image(i).clone() for i in range(len(cached))]
    assert all(torch.equal(first[i], plain.image(i)) for i in range(len(plain)))
    for file in images.iterdir():
        file.unlink()
    assert all(torch.equal(first[i], cached.image(i)) for i in range(len(plain)))


def test_max_images_takes_the_first_and_says_so(tmp_path: Path) -> None:
    data = dataset(tmp_path, VALID, max_images=1)
    assert data.image_ids == [10] and data.report.totals["boxes"] == 2
    assert "1 images left out" in data.report.summary()
    assert len(dataset(tmp_path, VALID, max_images=5)) == 2
    with pytest.raises(ValueError, match="max_images=0"):
        dataset(tmp_path, VALID, max_images=0)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    images, path = write_coco(tmp_path, VALID, pictures=False)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(CocoDataset(images, path, check="none")) == 2


# ---- labels, by name


def test_labels_follow_the_given_names_and_ids_stay_the_files(tmp_path: Path) -> None:
    space = LabelSpace(("bee", "ant", "cat"), (100, 200, 300))
    data = dataset(tmp_path, VALID, label_space=space)
    assert data.label_space == LabelSpace(("bee", "ant", "cat"), (7, 1, 3))
    assert data.record(0).labels.tolist() == [2, 1] and data.record(0).crowd_labels.tolist() == [0]
    by_names = dataset(tmp_path, VALID, class_names=["bee", "ant", "cat"])
    assert by_names.label_space == data.label_space


def test_fewer_classes_drop_objects_and_count_them(tmp_path: Path) -> None:
    data = dataset(tmp_path, VALID, class_names=["cat"], strict=True)
    assert data.label_space == LabelSpace(("cat",), (3,))
    assert [len(data.record(i).boxes) for i in range(2)] == [1, 0] and len(data.record(0).crowd_boxes) == 0
    assert data.report.remarks["object of a class outside the label space"] == 3


def test_more_classes_stay_empty_with_unused_ids(tmp_path: Path) -> None:
    data = dataset(tmp_path, VALID, class_names=["dog", "cat", "ant", "bee", "elk"])
    assert data.label_space.names == ("dog", "cat", "ant", "bee", "elk")
    assert data.label_space.category_ids == (8, 3, 1, 7, 9)
    assert data.record(0).labels.tolist() == [1, 2]
    assert data.report.remarks == {"class without a category in the file": 2}


def test_names_that_do_not_match_are_listed_on_both_sides(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"Only in the label space: \['Cat', 'dog'\]. Only in the file: \['cat', 'bee'\]"
    ):
        dataset(tmp_path, VALID, class_names=["Cat", "dog", "ant"])
    with pytest.raises(ValueError, match="not both"):
        dataset(tmp_path, VALID, class_names=["cat"], label_space=LabelSpace.from_names(["cat"]))


# ---- repairs


@pytest.mark.parametrize(
    ("bbox", "kept", "kind"),
    [
        ([-5, 10, 10, 10], [0, 10, 5, 20], "box clipped to the image"),
        ([35, 25, 10, 10], [35, 25, 40, 30], "box clipped to the image"),
        ([-100, -100, 1e6, 1e6], [0, 0, 40, 30], "box clipped to the image"),
        ([39.5, 0, 0.51, 30.01], [39.5, 0, 40, 30], None),
        ([50, 5, 10, 10], None, "box dropped: outside the image, or too small for float32"),
        ([40, 5, 10, 10], None, "box dropped: outside the image, or too small for float32"),
        ([30, 5, 1e-9, 10], None, "box dropped: outside the image, or too small for float32"),
        ([5, 5, 0, 10], None, "box dropped: width or height is not positive"),
        ([5, 5, 10, -3], None, "box dropped: width or height is not positive"),
        ([math.nan, 5, 10, 10], None, "box dropped: not finite"),
        ([5, 5, math.inf, 10], None, "box dropped: not finite"),
        ([5, 5, 10**400, 10], None, "box dropped: not finite"),
    ],
)
def test_boxes_are_repaired_and_counted_or_refused(tmp_path: Path, bbox: Any, kept: Any, kind: str | None) -> None:
    content = changed(annotations__0__bbox=bbox)
    data = dataset(tmp_path, content)
    found = data.record(0).boxes.tolist()
    assert found == [*([kept] if kept else []), [39, 29, 40, 30]]
    assert data.report.repairs == ({kind: 1} if kind else {})
    if kind:
        assert f"repaired: 1 x {kind} (annotation id 1, image id 10" in data.report.summary()
        with pytest.raises(ValueError, match="annotation id 1") as error:
            dataset(tmp_path, content, strict=True)
        assert kind in str(error.value)
    else:
        dataset(tmp_path, content, strict=True)


def test_the_report_shows_a_few_examples_of_many(tmp_path: Path) -> None:
    content = changed()
    content["annotations"] = [{**content["annotations"][0], "id": k, "bbox": [1, 1, 0, 0]} for k in range(50)]
    summary = dataset(tmp_path, content).report.summary()
    assert "50 x box dropped" in summary and summary.count("annotation id") == 3 and ", ...)" in summary


def test_a_file_listed_twice_is_remarked(tmp_path: Path) -> None:
    data = dataset(tmp_path, changed(images__1__file_name="0.png"))
    assert data.report.remarks == {"file listed again under another image id": 1}


# ---- errors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": ...}, "'images' must be a list"),
        ({"annotations": {}}, "'annotations' must be a list"),
        ({"categories": []}, "'categories' is empty"),
        ({"images": [], "annotations": []}, "'images' is empty"),
        ({"images__0": 5}, "images[0]: expected an object"),
        ({"images__0__id": ...}, "images[0]: 'id' is missing"),
        ({"images__0__id": "10"}, "images[0]: id='10' must be an integer"),
        ({"images__0__id": True}, "must be an integer"),
        ({"images__0__id": 2**70}, "must be an integer"),
        ({"images__1__id": 10}, "images[1]: id 10 was already used by images[0]"),
        ({"images__0__height": ...}, "image id 10: 'height' is missing"),
        ({"images__0__width": 0}, "image id 10: height=30, width=0"),
        ({"images__0__width": 10**9}, "not the size of a picture"),
        ({"images__0__file_name": 3}, "file_name=3 must be a string"),
        ({"images__0__file_name": ""}, "must be a string"),
        ({"images__0__file_name": "/etc/passwd"}, "leaves the image folder"),
        ({"images__0__file_name": "a/../../b.jpg"}, "leaves the image folder"),
        ({"images__0__file_name": "..\\b.jpg"}, "leaves the image folder"),
        ({"images__0__file_name": "C:b.jpg"}, "leaves the image folder"),
        ({"images__0__file_name": "\\\\host\\b.jpg"}, "leaves the image folder"),
        ({"images__0__file_name": "a\0b"}, "cannot be the name of a file"),
        ({"images__0__file_name": "\ud800.jpg"}, "cannot be the name of a file"),
        ({"categories__0__name": 5}, "categories[0]: name=5"),
        ({"categories__0__name": "ant"}, "the name 'ant' is used by two categories"),
        ({"categories__0__id": 7}, "id 7 was already used by categories[0]"),
        ({"annotations__1__id": 1}, "annotations[1]: id 1 was already used by annotations[0]"),
        ({"annotations__0__id": ...}, "annotations[0]: 'id' is missing"),
        ({"annotations__0__image_id": 11}, "annotation id 1: image_id=11 is not among the images"),
        ({"annotations__0__category_id": 2}, "annotation id 1: category_id=2 is not among the categories"),
        ({"annotations__0__category_id": 3.0}, "category_id=3.0 must be an integer"),
        ({"annotations__0__iscrowd": 2}, "iscrowd=2"),
        ({"annotations__0__bbox": ...}, "'bbox' is missing"),
        ({"annotations__0__bbox": None}, "bbox=None must be a list of four numbers"),
        ({"annotations__0__bbox": [1, 2, 3]}, "bbox=[1, 2, 3]"),
        ({"annotations__0__bbox": ["1", 2, 3, 4]}, "bbox=['1', 2, 3, 4]"),
        ({"annotations__0__bbox": {"x": 1}}, "must be a list"),
    ],
)
def test_faults_are_errors_that_say_where(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="instances.json") as error:
        dataset(tmp_path, changed(**changes))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b'{"images": [', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"images": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"[]", "results file"),
        (b"{}", "'categories' must be a list"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json") as error:
        CocoDataset(tmp_path, path)
    assert words in str(error.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    images, path = small_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CocoDataset(tmp_path / "nowhere", path)
    with pytest.raises(FileNotFoundError, match="nothing.json"):
        CocoDataset(images, tmp_path / "nothing.json")
    (images / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 7 images .*3\.png"):
        CocoDataset(images, path)
    lazy = CocoDataset(images, path, check="none")
    lazy[2]
    with pytest.raises(FileNotFoundError, match=r"3\.png"):
        lazy[3]
    with pytest.raises(ValueError, match="check='all'"):
        CocoDataset(images, path, check="all")  # type: ignore[arg-type]


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    images, path = small_coco(tmp_path)
    (tmp_path / "secret.png").write_bytes((images / "0.png").read_bytes())
    (images / "0.png").unlink()
    (images / "0.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="outside the image folder"):
        CocoDataset(images, path)
    with pytest.raises(ValueError, match="outside the image folder"):
        CocoDataset(images, path, check="none")[0]
    (tmp_path / "link").symlink_to(images)  # the folder itself may be a link
    CocoDataset(tmp_path / "link", path, check="none")[1]


@pytest.mark.parametrize("cache", [False, True])
def test_a_size_other_than_the_files_is_an_error(tmp_path: Path, cache: bool) -> None:
    images, path = small_coco(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored as before, but seen turned by 90 degrees
    Image.open(images / "2.png").save(images / "2.png", exif=exif)
    with pytest.raises(ValueError, match=r"image id 30 is said to be 32 x 40, but .*2\.png' is 40 x 32"):
        CocoDataset(images, path, check="size")
    data = CocoDataset(images, path, cache=cache)
    data[1]
    with pytest.raises(ValueError, match="image id 30"):
        data[2]


# ---- wild files

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=8)
    | st.sampled_from([0, 1, 3, 7, 10, 20]),
    lambda child: (
        st.lists(child, max_size=5) | st.dictionaries(st.sampled_from(["id", "name", "bbox"]), child, max_size=3)
    ),
    max_leaves=5,
)
NUMBERS = st.floats(-60, 60, width=32) | st.floats() | st.integers(-60, 60)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every node of a JSON document."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def mutate(content: Any, data: st.DataObject) -> Any:
    *parents, last = data.draw(st.sampled_from(places(content)[1:]))
    node = content
    for part in parents:
        node = node[part]
    action = data.draw(st.sampled_from(["replace", "delete", "copy"]))
    if action == "delete":
        del node[last]
    elif action == "copy" and isinstance(node, list):
        node.append(copy.deepcopy(node[last]))
    else:
        node[last] = data.draw(JSON)
    return content


def check_against(content: dict[str, Any], data: CocoDataset) -> None:
    """What was read is right: every box valid and from its annotation, every label of the annotation's class."""
    names = {c["id"]: c["name"] for c in content["categories"]}
    expected: dict[int, list[tuple[str, list[float], bool]]] = {image["id"]: [] for image in content["images"]}
    for row in content["annotations"]:
        x, y, w, h = row["bbox"]
        if all(map(math.isfinite, (x, y, w, h))) and names[row["category_id"]] in data.label_space.names:
            expected[row["image_id"]].append(
                (names[row["category_id"]], [x, y, x + w, y + h], bool(row.get("iscrowd", 0)))
            )
    for i, image in enumerate(content["images"]):
        record = data.record(i)
        limit = torch.tensor([image["width"], image["height"]] * 2)
        for boxes, labels, crowd in (
            (record.boxes, record.labels, False),
            (record.crowd_boxes, record.crowd_labels, True),
        ):
            assert boxes.isfinite().all() and (boxes >= 0).all() and (boxes <= limit).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            rows = [
                (name, torch.tensor(box, dtype=torch.float64).clamp(min=0).minimum(limit.double()))
                for name, box, is_crowd in expected[image["id"]]
                if is_crowd == crowd
            ]
            rows = [(name, box) for name, box in rows if (box[2:].float() > box[:2].float()).all()]
            assert [data.label_space.names[label] for label in labels.tolist()] == [name for name, _ in rows]
            if rows:
                torch.testing.assert_close(boxes, torch.stack([box for _, box in rows]).float(), atol=1e-4, rtol=0)


@settings(max_examples=80 * FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_document_is_read_rightly_or_refused_clearly(tmp_path: Path, data: st.DataObject) -> None:
    content: Any = copy.deepcopy(VALID)
    for row in content["annotations"]:
        row["bbox"] = data.draw(st.lists(NUMBERS, min_size=4, max_size=4))
        row["category_id"] = data.draw(st.sampled_from([1, 3, 7]))
    for _ in range(data.draw(st.integers(0, 2))):
        content = mutate(content, data)
        if len(places(content)) == 1:
            break
    names = data.draw(st.none() | st.permutations(["ant", "bee", "cat"]) | st.just(["cat"]))
    try:
        found = dataset(tmp_path, content, class_names=names)
    except ValueError as error:
        assert "instances.json" in str(error)
    else:
        check_against(json.loads(json.dumps(content)), found)
        found.report.summary().encode()  # can be logged


@settings(max_examples=40 * FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 2000), noise=st.binary(max_size=5))
def test_damaged_bytes_are_refused_clearly(tmp_path: Path, cut: int, noise: bytes) -> None:
    text = json.dumps(VALID).encode()
    path = tmp_path / "damaged.json"
    path.write_bytes(text[:cut] + noise + text[cut + len(noise) :])
    try:
        CocoDataset(tmp_path, path, check="none")
    except ValueError as error:
        assert "damaged.json" in str(error)
