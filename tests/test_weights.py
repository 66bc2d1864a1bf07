"""Weight files: read without running them, loaded key by key and class by class."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from dyhead_zoo.data.label_space import COCO_80, LabelSpace
from dyhead_zoo.detector import Detector
from dyhead_zoo.factory import create_detector
from dyhead_zoo.weights import (
    CheckpointError,
    ClassRows,
    detect_source,
    load_checkpoint,
    read_state_dict,
    write_safetensors,
)

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and torch.equal(actual[key], value), key


class Payload:
    """Runs a command when unpickled, if it is let."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    path, usual = tmp_path / "weights.safetensors", tmp_path / "usual"
    usual.touch()
    write_safetensors(path, {"a": torch.zeros(1)})
    assert path.stat().st_mode == usual.stat().st_mode


def test_safetensors_round_trip_with_metadata(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    transposed = torch.arange(6.0).reshape(2, 3).T
    write_safetensors(path, {**TENSORS, "shared": TENSORS["b"], "t": transposed}, {"note": "x"})
    tensors, metadata = read_state_dict(path)
    assert_same(tensors, {**TENSORS, "shared": TENSORS["b"], "t": transposed})
    assert metadata == {"format": "pt", "note": "x"}
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, TENSORS)
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"strings.*\{'epoch': 3\}"):
        write_safetensors(path, {}, {"epoch": 3})  # type: ignore[dict-item]

    def disk_full(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="no space left"):
        write_safetensors(path, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_with_and_without_wrapper(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"w{suffix}"
    torch.save(OrderedDict(TENSORS), path, _use_new_zipfile_serialization=zipped)
    assert read_state_dict(path)[1] == {}
    torch.save({"meta": {"CLASSES": ("cat",)}, "state_dict": TENSORS}, path, _use_new_zipfile_serialization=zipped)
    tensors, metadata = read_state_dict(path)
    assert_same(tensors, TENSORS)
    assert metadata == {"CLASSES": ("cat",)}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("wrapped", [True, False])
def test_pickled_numpy_arrays(tmp_path: Path, protocol: int, wrapped: bool) -> None:
    arrays = {key: value.numpy() for key, value in TENSORS.items()}
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "x"} if wrapped else arrays, protocol))
    assert_same(read_state_dict(path)[0], TENSORS)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path: Path, suffix: str, zipped: bool) -> None:
    trace, path = tmp_path / "trace", tmp_path / f"w{suffix}"
    content = {"a": TENSORS["a.weight"].numpy() if suffix == ".pkl" else TENSORS["a.weight"], "x": Payload(trace)}
    if suffix == ".pth":
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=rf"w\{suffix}: .*system[\s\S]*"):
        read_state_dict(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        np.array([{}], dtype=object),
        np.array(["x"]),
        np.zeros(2, dtype=[("a", "f4")]),
        np.float32(1),
        np.zeros(2).tobytes,
        eval,
        pickle.Unpickler,
        "abc".encode,
    ],
)
def test_pickles_of_anything_but_arrays_of_numbers_are_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"x": content}, 4))
    with pytest.raises(CheckpointError, match=r"w\.pkl: refused"):
        read_state_dict(path)


def test_pickle_with_another_codec_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pkl"
    path.write_bytes(b"c_codecs\nencode\n(Vx\nVzlib_codec\ntR.")
    with pytest.raises(CheckpointError, match="codec 'zlib_codec'"):
        read_state_dict(path)


def _bytes_of(suffix: str) -> bytes:
    buffer = io.BytesIO()
    if suffix == ".safetensors":
        from safetensors.torch import save

        return save(TENSORS)
    if suffix == ".pkl":
        return pickle.dumps({key: value.numpy() for key, value in TENSORS.items()})
    torch.save(TENSORS, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pkl"])
def test_truncated_files_are_named_with_a_remedy(tmp_path: Path, suffix: str) -> None:
    whole = _bytes_of(suffix)
    for length in {0, 1, 7, 9, len(whole) // 2, len(whole) - 1}:
        path = tmp_path / f"w{suffix}"
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"w\{suffix}: .*[Ff]etch it again"):
            read_state_dict(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from([".safetensors", ".pth", ".pkl"]),
    start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", (20).to_bytes(8, "little") + b"{"]),
    rest=st.binary(max_size=200),
)
def test_garbage_is_a_checkpoint_error_whatever_it_is(tmp_path: Path, suffix: str, start: bytes, rest: bytes) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(start + rest)
    with pytest.raises(CheckpointError):
        read_state_dict(path)


def test_header_larger_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="its header alone would need"):
        read_state_dict(path)


def test_missing_files_and_unknown_suffixes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="it is a directory"):
        read_state_dict(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weight file at"):
        read_state_dict(tmp_path / "w.pth")
    (tmp_path / "w.onnx").touch()
    with pytest.raises(CheckpointError, match=r"unknown suffix '\.onnx'.*\.safetensors"):
        read_state_dict(tmp_path / "w.onnx")


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def detector() -> Detector:
    return create_detector("test_atss_dyhead1")


def changed(detector: Detector) -> dict[str, Tensor]:
    """A checkpoint that differs from the detector everywhere."""
    return {key: value + 1 for key, value in detector.state_dict().items()}


def snapshot(detector: Detector) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in detector.state_dict().items()}


def test_native_file_loads_whole(detector: Detector, tmp_path: Path) -> None:
    checkpoint = changed(detector)
    write_safetensors(tmp_path / "w.safetensors", checkpoint)
    report = load_checkpoint(detector, tmp_path / "w.safetensors")
    assert_same(detector.state_dict(), checkpoint)
    assert report.source == "native" and set(report.loaded) == set(checkpoint)
    assert report.copied_classes == COCO_80.names and not report.fresh_classes
    assert report.summary() == f"{len(checkpoint)} tensors loaded from a native checkpoint"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("head.scales"), r"1 keys missing from the checkpoint:\n  head\.scales \(5,\)"),
        (lambda c: c.update({"head.x": torch.zeros(3)}), r"1 keys unknown to the detector:\n  head\.x \(3,\)"),
        (
            lambda c: c.update({"head.scales": torch.ones(4)}),
            r"1 keys of another shape:\n  head\.scales \(4,\), the detector has \(5,\)",
        ),
        (
            lambda c: c.update({"head.cls_logits.weight": c["head.cls_logits.weight"].repeat(1, 1, 3, 3)}),
            r"of another shape:\n  head\.cls_logits\.weight",
        ),
    ],
)
def test_every_key_must_fit_and_nothing_changes_if_not(
    detector: Detector, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    checkpoint, before = changed(detector), snapshot(detector)
    change(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(detector, checkpoint)
    assert_same(snapshot(detector), before)


def test_another_architecture_is_named(detector: Detector) -> None:
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in create_detector("atss_resnet50_dyhead6").state_dict().items()}
    other = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(detector, other)
    message = str(caught.value)
    assert "3-4-6-3 backbone blocks, 6 DyHead blocks, 0 tower convolutions" in message
    assert "1 DyHead blocks" in message
    assert "... and " in message and message.count("\n") < 80


def test_not_strict_reports_what_is_missing_and_unused(detector: Detector) -> None:
    checkpoint, before = changed(detector), snapshot(detector)
    checkpoint["head.x"] = checkpoint.pop("head.scales")
    report = load_checkpoint(detector, checkpoint, strict=False)
    assert (report.missing, report.unused) == (("head.scales",), ("head.x",))
    assert torch.equal(detector.state_dict()["head.scales"], before["head.scales"])
    assert torch.equal(detector.state_dict()["head.box_deltas.bias"], checkpoint["head.box_deltas.bias"])
    assert "1 missing" in report.summary() and "1 unused" in report.summary()
    checkpoint["head.centerness.bias"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match="of another shape"):
        load_checkpoint(detector, checkpoint, strict=False)


@pytest.mark.parametrize(
    ("keys", "source"),
    [
        (["backbone.body.conv1.weight", "neck.fpn.output.0.weight"], "native"),
        (["backbone.conv1.weight", "neck.lateral_convs.0.conv.weight", "bbox_head.atss_cls.weight"], "mmdet"),
        (["backbone.backbone.bottom_up.stem.conv1.weight", "head.cls_logits.weight"], "detectron2"),
    ],
)
def test_layouts_are_told_from_keys(keys: list[str], source: str) -> None:
    assert detect_source(keys) == source


@pytest.mark.parametrize("keys", [["conv1.weight", "fc.weight"], ["backbone.body.conv1.weight", "backbone.fpn.x"]])
def test_unknown_layouts_show_what_was_seen(keys: list[str]) -> None:
    with pytest.raises(CheckpointError, match=rf"layout not recognised[\s\S]*{keys[0]}"):
        detect_source(keys)


def test_errors_name_the_file_and_unknown_sources(detector: Detector, tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"resnet\.pth: layout not recognised"):
        load_checkpoint(detector, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"source='caffe': expected auto, native"):
        load_checkpoint(detector, changed(detector), "caffe")


# --- classes ----------------------------------------------------------------------------------------------------------

PETS = LabelSpace.from_names(["traffic light", "unicorn", "cat"])


@pytest.mark.parametrize("where", ["file", "argument", "mmdet meta", "mmdet 1 meta", "dataset_meta", "own labels"])
def test_rows_follow_class_names(tmp_path: Path, where: str) -> None:
    source = create_detector("test_atss_dyhead1")
    checkpoint = changed(source)
    detector = create_detector("test_atss_dyhead1", class_names=PETS)
    before = snapshot(detector)
    path, label_space = tmp_path / "w.safetensors", None
    if where == "file":
        write_safetensors(path, checkpoint, {"label_space": json.dumps(COCO_80.to_dict())})
    elif where == "argument":
        label_space = COCO_80
        write_safetensors(path, checkpoint)
    else:
        path = tmp_path / "w.pth"
        meta = {
            "mmdet meta": {"CLASSES": COCO_80.names},
            "mmdet 1 meta": {"CLASSES": tuple(name.replace(" ", "_") for name in COCO_80.names)},
            "dataset_meta": {"dataset_meta": {"classes": COCO_80.names, "palette": [(0, 0, 0)]}},
            "own labels": {},
        }[where]
        torch.save({"state_dict": checkpoint, "meta": meta}, path)
    if where == "own labels":
        with pytest.raises(CheckpointError, match="80 classes without names and the detector has 3"):
            load_checkpoint(detector, path)
        return
    report = load_checkpoint(detector, path, label_space=label_space)
    assert report.copied_classes == ("traffic light", "cat") and report.fresh_classes == ("unicorn",)
    assert "classes that start fresh: unicorn" in report.summary()
    for key in ("head.cls_logits.weight", "head.cls_logits.bias"):
        after = detector.state_dict()[key]
        assert torch.equal(after[0], checkpoint[key][COCO_80.names.index("traffic light")])
        assert torch.equal(after[1], before[key][1])
        assert torch.equal(after[2], checkpoint[key][COCO_80.names.index("cat")])
    assert torch.equal(detector.state_dict()["head.scales"], checkpoint["head.scales"])


def test_the_same_names_in_another_order_are_permuted() -> None:
    backwards = LabelSpace.from_names(COCO_80.names[::-1])
    checkpoint = changed(create_detector("test_atss_dyhead1"))
    checkpoint["head.cls_logits.bias"] = torch.arange(80.0)
    detector = create_detector("test_atss_dyhead1", class_names=backwards)
    report = load_checkpoint(detector, checkpoint, label_space=COCO_80)
    assert not report.fresh_classes
    assert detector.state_dict()["head.cls_logits.bias"].tolist() == list(range(79, -1, -1))


@pytest.mark.parametrize("names", [["left", "right"], ["class_0", "class_1"]])
def test_without_shared_names_every_row_is_fresh(names: list[str]) -> None:
    """Placeholder names are places: class_0 of five and class_0 of two need not be the same thing."""
    unnamed = create_detector("test_atss_dyhead1", num_classes=5)
    detector = create_detector("test_atss_dyhead1", class_names=names)
    before = snapshot(detector)
    report = load_checkpoint(detector, changed(unnamed), label_space=unnamed.label_space)
    assert report.copied_classes == () and report.fresh_classes == tuple(names)
    assert "none, no class name is shared" in report.summary()
    assert torch.equal(detector.state_dict()["head.cls_logits.weight"], before["head.cls_logits.weight"])


def test_unnamed_classes_reload_into_the_same_space() -> None:
    detector = create_detector("test_atss_dyhead1", num_classes=5)
    checkpoint = changed(detector)
    assert not load_checkpoint(detector, checkpoint).fresh_classes
    assert_same(detector.state_dict(), checkpoint)


def test_what_the_caller_knows_comes_before_mmdets_names_but_not_before_our_record(tmp_path: Path) -> None:
    detector = create_detector("test_atss_dyhead1", class_names=["a", "b"])
    checkpoint, swapped = changed(detector), LabelSpace.from_names(["b", "a"])
    torch.save({"state_dict": checkpoint, "meta": {"CLASSES": ["a", "b"]}}, tmp_path / "w.pth")
    write_safetensors(tmp_path / "w.safetensors", checkpoint, {"label_space": json.dumps(swapped.to_dict())})
    for path, argument in (("w.pth", swapped), ("w.safetensors", detector.label_space)):
        load_checkpoint(detector, tmp_path / path, label_space=argument)
        assert torch.equal(
            detector.state_dict()["head.cls_logits.weight"], checkpoint["head.cls_logits.weight"].flip(0)
        )


def test_a_single_class_written_as_a_string(tmp_path: Path) -> None:
    detector = create_detector("test_atss_dyhead1", class_names=["person"])
    torch.save({"state_dict": changed(detector), "meta": {"CLASSES": "person"}}, tmp_path / "w.pth")
    assert load_checkpoint(detector, tmp_path / "w.pth").copied_classes == ("person",)


def test_a_label_space_of_another_length_is_an_error(detector: Detector) -> None:
    with pytest.raises(CheckpointError, match="rows for 80 classes, but its label space names 3"):
        load_checkpoint(detector, changed(detector), label_space=PETS)


def test_weight_and_bias_must_agree_on_the_number_of_classes(detector: Detector) -> None:
    checkpoint = changed(detector)
    checkpoint["head.cls_logits.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError, match=r"cannot be told[\s\S]*weight.*: 80 classes\n.*bias \(7,\): 7 classes"):
        load_checkpoint(detector, checkpoint)


@pytest.mark.parametrize("record", ["{", '{"names": ["a"]}', '["a"]', '{"names": ["a", "a"], "category_ids": [1, 2]}'])
def test_a_broken_record_of_classes_is_an_error(detector: Detector, tmp_path: Path, record: str) -> None:
    write_safetensors(tmp_path / "w.safetensors", changed(detector), {"label_space": record})
    with pytest.raises(CheckpointError, match=r"w\.safetensors: its record of class names cannot be read"):
        load_checkpoint(detector, tmp_path / "w.safetensors")


class AnchorHead(nn.Module):
    """Three anchors; two rows a class, then one of background."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.logits = nn.Linear(4, 3 * (2 * num_classes + 1))

    def class_rows(self) -> dict[str, ClassRows]:
        return {"logits.weight": ClassRows(3, 2, 1), "logits.bias": ClassRows(3, 2, 1)}


class AnchorDetector(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.label_space = LabelSpace.from_names(names)
        self.head = AnchorHead(len(names))


def test_anchors_rows_per_class_and_background_move_together() -> None:
    source: Any = AnchorDetector("a", "b", "c")
    target: Any = AnchorDetector("c", "new", "a")
    before = target.head.logits.bias.detach().clone().reshape(3, 7)
    load_checkpoint(target, source.state_dict(), "native", label_space=source.label_space)
    theirs, ours = source.head.logits.bias.reshape(3, 7), target.head.logits.bias.reshape(3, 7)
    assert torch.equal(ours[:, 0:2], theirs[:, 4:6])  # c
    assert torch.equal(ours[:, 2:4], before[:, 2:4])  # new
    assert torch.equal(ours[:, 4:6], theirs[:, 0:2])  # a
    assert torch.equal(ours[:, 6], theirs[:, 6])  # background


def test_rows_that_no_number_of_classes_explains() -> None:
    target: Any = AnchorDetector("a", "b")
    wrong = {"head.logits.weight": torch.zeros(16, 4), "head.logits.bias": torch.zeros(16)}
    with pytest.raises(CheckpointError, match=r"weight \(16, 4\): no whole number of classes"):
        load_checkpoint(target, wrong, "native")


@given(
    groups=st.integers(1, 4),
    per_class=st.integers(1, 3),
    extra=st.integers(0, 2),
    num_classes=st.integers(1, 6),
    data=st.data(),
)
def test_class_rows_are_those_of_the_reshaped_parameter(
    groups: int, per_class: int, extra: int, num_classes: int, data: st.DataObject
) -> None:
    layout = ClassRows(groups, per_class, extra)
    rows = groups * (num_classes * per_class + extra)
    assert layout.num_classes(rows) == num_classes
    classes = data.draw(st.permutations(range(num_classes)))[: data.draw(st.integers(1, num_classes))]
    table = torch.arange(rows).reshape(groups, -1)
    body = table[:, : num_classes * per_class].reshape(groups, num_classes, per_class)[:, classes].flatten(1)
    expected = torch.cat([body, table[:, num_classes * per_class :]], 1).flatten()
    assert torch.equal(layout.indices(classes, num_classes), expected)


def test_file_header_is_readable_by_others(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", TENSORS)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
