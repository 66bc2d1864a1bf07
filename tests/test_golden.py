"""Golden tensors: they agree with the detector that made them, and tell where another one departs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from dyhead_zoo import cli, create_detector, push_to_hub, save_for_hub
from dyhead_zoo.detector import Detector
from dyhead_zoo.golden import STAGES, golden_path, make_golden, read_golden, verify, write_golden
from dyhead_zoo.testing import LoopbackHub
from dyhead_zoo.weights import CheckpointError, write_safetensors

BUNDLED = "atss_lite0_dyhead2.coco2148"


@pytest.fixture(scope="module")
def detector() -> Detector:
    return create_detector(BUNDLED, pretrained=True)


@pytest.fixture(scope="module")
def golden(detector: Detector) -> dict[str, torch.Tensor]:
    return make_golden(detector)


def changed(detector: Detector, change: Callable[[Detector], None]) -> Detector:
    other = copy.deepcopy(detector)
    with torch.no_grad():
        change(other)
    return other


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_atss", {}),
        ("test_atss_dyhead1", {"in_chans": 1, "num_classes": 2}),
        ("atss_test_vit_dyhead1", {"channels": 32}),
        ("atss_xcit_nano_12_p16_224", {"channels": 32, "towers": 1}),  # of one canvas only
        ("test_faster_rcnn_dyhead1", {"num_classes": 3}),
        ("test_mask_rcnn", {"score_threshold": 0.0}),
        ("test_cascade_mask_rcnn", {"num_classes": 5, "score_threshold": 0.0}),
        ("test_detr", {}),
        ("test_deformable_detr_dyhead1", {}),
    ],
)
def test_any_detector_agrees_with_itself(name, options, tmp_path):
    detector = create_detector(name, **options)
    path = write_golden(detector, tmp_path)
    assert path.name == "golden.safetensors" and path.stat().st_size < 200_000
    golden, made_with = read_golden(path)
    assert made_with["torch"] == torch.__version__ and made_with["dtype"] == "float32"
    result = verify(detector.train(), golden)  # the mode does not matter
    assert result.passed and {d.stage for d in result.deviations} == set(STAGES)
    assert max(d.relative for d in result.deviations) == 0
    assert detector.training


def test_input_is_two_pictures_of_different_size_and_never_changes(golden):
    images, sizes = golden["input.images"], golden["input.image_sizes"]
    assert images.shape == (2, 3, 96, 128) and sizes.tolist() == [[96, 128], [72, 80]]
    assert not images[1, :, 72:].any() and not images[1, :, :, 80:].any()
    assert images.int().sum((1, 2, 3)).tolist() == [4120787, 1613615]


def test_bundled_detector_finds_something_in_it(golden):
    assert all(len(golden[f"detections.{i}.scores"]) > 10 for i in range(2))


def scale(key: str, factor: float = 1.1) -> Callable[[Detector], None]:
    return lambda detector: detector.get_parameter(key).mul_(factor)


def permute_classes(detector: Detector) -> None:
    for key in ("weight", "bias"):
        parameter = detector.get_parameter(f"head.cls_logits.{key}")
        parameter.copy_(parameter.roll(1, dims=0))


@pytest.mark.parametrize(
    ("change", "stage", "name"),
    [
        (lambda d: d.mean.add_(2), "backbone", "backbone."),
        (lambda d: d.std.mul_(1.02), "backbone", "backbone."),
        (scale("backbone.body.blocks.6.0.bn3.weight"), "backbone", "backbone.2"),
        (scale("neck.fpn.extra.1.conv.weight", -1), "pyramid", "pyramid."),
        (scale("neck.dyhead.blocks.1.task.fc1.weight", -1), "pyramid", "pyramid."),
        (permute_classes, "raw", "raw.cls_logits."),
        (scale("head.scales"), "raw", "raw.box_deltas."),
        (lambda d: setattr(d.head, "nms_threshold", 0.2), "detections", "detections."),
        (lambda d: setattr(d.head, "max_detections", 20), "detections", "detections."),
    ],
)
def test_change_is_reported_at_its_stage(detector, golden, change, stage, name):
    result = verify(changed(detector, change), golden)
    assert not result.passed
    assert result.departs.stage == stage and result.departs.name.startswith(name)
    assert all(d.relative == 0 for d in result.deviations if STAGES.index(d.stage) < STAGES.index(stage))
    assert f"departs at {result.departs.name}: " in result.report()


@pytest.fixture(scope="module")
def drawing() -> Detector:
    return create_detector("test_mask_rcnn", num_classes=3, score_threshold=0.0)


@pytest.mark.parametrize(
    ("key", "name"),
    [("head.box.0.fcs.0.weight", "raw.regions.0.0."), ("head.mask.0.convs.2.conv.weight", "raw.regions.1")],
)
def test_what_is_said_of_regions_is_compared(drawing, key, name):
    assert verify(changed(drawing, scale(key, -1)), make_golden(drawing)).departs.name.startswith(name)


def test_other_masks_depart(drawing):
    golden = make_golden(drawing)
    assert golden["detections.0.masks"].shape == (100, 64)
    near, far = (golden | {"detections.0.masks": golden["detections.0.masks"] + change} for change in (0.01, 0.3))
    assert verify(drawing, near).passed
    assert verify(drawing, far).departs.name == "detections.0"


def test_masks_that_nobody_made_or_expects_depart(drawing):
    golden = make_golden(drawing)
    boxes_only = {key: value for key, value in golden.items() if not key.endswith(".masks")}
    notes = {d.name: d.note for d in verify(drawing, boxes_only).deviations}
    assert notes["detections.0"].startswith("its masks are missing from the golden tensors, ")
    other = changed(drawing, lambda d: setattr(d.head, "wants_masks", False))
    notes = {d.name: d.note for d in verify(other, golden).deviations}
    assert notes["detections.1"] == "its masks are missing from what the detector gives"


def test_a_second_stage_that_detects_nothing_is_compared_all_the_same():
    detector = create_detector("test_mask_rcnn")
    golden = make_golden(detector)
    assert not len(golden["detections.0.scores"])
    assert not verify(changed(detector, scale("head.mask.0.logits.weight", -1)), golden).passed


def test_files_from_before_regions_were_looked_at_fail_and_say_what_to_do(drawing):
    older = {key: value for key, value in make_golden(drawing).items() if not key.startswith("raw.regions.")}
    result = verify(drawing, older)
    assert result.departs.name.startswith("raw.regions.")
    assert "files of older versions: " in result.report() and "write_golden(detector, FOLDER)" in result.report()
    assert all(d.passed for d in result.deviations if not d.name.startswith("raw.regions."))


def test_noise_of_rounding_is_tolerated(detector, golden):
    def noise(d: Detector) -> None:
        for parameter in d.parameters():
            parameter.mul_(1 + 1e-6 * torch.randn_like(parameter))

    result = verify(changed(detector, noise), golden)
    assert result.passed and max(d.relative for d in result.deviations) > 0
    assert result.report().endswith("agrees with the golden tensors")


def test_half_precision_is_run_in_float32():
    """As those run it who load a file of half precision."""
    detector = create_detector("test_atss").half()
    assert verify(detector.float(), make_golden(copy.deepcopy(detector).half())).passed
    assert verify(copy.deepcopy(detector).half(), make_golden(detector)).passed


def test_output_that_is_nan_departs(detector, golden):
    result = verify(changed(detector, lambda d: d.get_parameter("head.scales").fill_(torch.nan)), golden)
    assert result.departs.name.startswith("raw.box_deltas")


def test_detector_that_gives_nan_has_no_golden_tensors(detector):
    with pytest.raises(ValueError, match=r"atss_lite0_dyhead2 gives NaN in raw.box_deltas.0"):
        make_golden(changed(detector, lambda d: d.get_parameter("head.scales").fill_(torch.nan)))


def test_another_number_of_classes_or_levels_departs_by_shape_or_absence(golden):
    classes = verify(create_detector(BUNDLED, pretrained=True, num_classes=3), golden)
    assert classes.departs.note == "its shape is [2, 3, 12, 16], that of the golden tensor [2, 80, 12, 16]"
    levels = verify(create_detector("atss_lite0_dyhead2", num_extra=1), golden)
    notes = {d.name: d.note for d in levels.deviations}
    assert notes["pyramid.4"] == "is missing from what the detector gives"


def test_order_of_detections_does_not_matter(detector, golden):
    shuffled = dict(golden)
    for part in ("boxes", "scores", "labels"):
        shuffled[f"detections.0.{part}"] = golden[f"detections.0.{part}"].flip(0)
    assert verify(detector, shuffled).passed


@pytest.mark.parametrize("part", ["boxes", "scores", "labels"])
def test_other_detections_depart(detector, golden, part):
    other = golden | {f"detections.1.{part}": golden[f"detections.1.{part}"] + 5}
    result = verify(detector, other)
    assert result.departs.name == "detections.1" and "detections have no counterpart" in result.departs.note


def test_damaged_and_foreign_files_are_refused(detector, golden, tmp_path):
    path = write_golden(detector, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"golden.safetensors.*damaged or truncated"):
        read_golden(path)
    for key in ("input.images", "raw.cls_logits.0.sample", "detections.1.labels"):
        write_safetensors(path, {k: v for k, v in golden.items() if k != key})
        with pytest.raises(CheckpointError, match=rf"golden.safetensors: .*incomplete.*{key}.*write_golden"):
            read_golden(path)
    write_safetensors(path, detector.state_dict())
    with pytest.raises(CheckpointError, match="no golden tensors"):
        read_golden(path)
    with pytest.raises(FileNotFoundError, match=r"no golden tensors at .*none.safetensors: save_for_hub"):
        read_golden(tmp_path / "none.safetensors")


# -- dyhead-zoo verify -------------------------------------------------------------------------------------------------


def test_bundled_weights_agree_with_the_golden_tensors_that_ship(capsys):
    path = golden_path("atss_lite0_dyhead2")
    assert path.name == f"{BUNDLED}.golden.safetensors" and path.stat().st_size < 200_000
    assert cli.main(["verify", "atss_lite0_dyhead2"]) == 0
    out = capsys.readouterr().out
    assert "name atss_lite0_dyhead2" in out and out.endswith("agrees with the golden tensors\n")


def test_saved_folder_departs_once_its_weights_change(tmp_path, capsys):
    detector = create_detector("test_atss")
    save_for_hub(detector, tmp_path / "saved")
    assert cli.main(["verify", f"local-dir:{tmp_path / 'saved'}"]) == 0
    golden = (tmp_path / "saved" / "golden.safetensors").read_bytes()
    save_for_hub(changed(detector, scale("neck.fpn.lateral.0.weight", -1)), tmp_path / "saved")
    (tmp_path / "saved" / "golden.safetensors").write_bytes(golden)
    assert cli.main(["verify", f"local-dir:{tmp_path / 'saved'}"]) == 1
    assert "departs at pyramid.0: deviates by" in capsys.readouterr().out


def test_repository_is_verified_at_its_revision(tmp_path, monkeypatch, capsys):
    folder = save_for_hub(create_detector("test_atss"), tmp_path / "saved")
    with LoopbackHub({"hf_token": "someone"}) as hub:
        for key, value in hub.environment(tmp_path / "cache", token="hf_token").items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        push_to_hub(folder, "someone/detector", tag="v1")
        assert cli.main(["verify", "hf-hub:someone/detector@v1"]) == 0
        assert cli.main(["verify", "hf-hub:someone/detector@v2"]) == 2
    assert "no branch, tag or commit 'v2'" in capsys.readouterr().err


def test_names_without_golden_tensors_are_told(tmp_path, capsys):
    assert cli.main(["verify", "atss_resnet50"]) == 2
    assert "atss_resnet50 has no golden tensors" in capsys.readouterr().err
    assert cli.main(["verify", f"local-dir:{tmp_path}"]) == 2
    assert "golden.safetensors" in capsys.readouterr().err
    assert cli.main(["verify", "saved/x"]) == 2
    assert "for a folder use 'local-dir:saved/x'" in capsys.readouterr().err
    assert cli.main(["verify", "local-dir:nope"]) == 2
    assert "nope does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "golden"), [("model.safetensors", "golden.safetensors"), ("last.safetensors", "last.golden.safetensors")]
)
def test_golden_tensors_lie_beside_a_weight_file(tmp_path, file, golden):
    (tmp_path / file).touch()
    assert golden_path(f"local-dir:{tmp_path / file}") == tmp_path / golden
