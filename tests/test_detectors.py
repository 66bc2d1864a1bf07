"""What every registered detector must keep, over the whole registry."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from dyhead_zoo import TrainStep, create_detector, list_detectors, list_tags

NAMES = [f"{name}.{tag}" if tag else name for name in list_detectors() for tag in (list_tags(name) or [""])]
SMALL = [name for name in NAMES if name.startswith("test_")]
KEYS = Path(__file__).parent / "state_dict_keys.json"


def images(batch=2, height=96, width=160, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


TARGETS = [
    {"boxes": torch.tensor([[10.0, 12, 70, 80], [90, 20, 150, 90]]), "labels": torch.tensor([0, 2])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]


def with_masks(detector, targets, sizes):
    """The targets, with the rectangles of the boxes as masks for detectors that learn them; ``sizes`` (B, 2)."""
    if not getattr(detector.head, "wants_masks", False):
        return targets
    results = []
    for target, (height, width) in zip(targets, sizes.tolist(), strict=True):
        masks = torch.zeros(len(target["boxes"]), height, width, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, target["boxes"].int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
        results.append({**target, "masks": masks})
    return results


def first_map(raw):
    """The first tensor of a raw output."""
    return raw[0][0] if isinstance(raw[0], tuple) else raw[0]


def fingerprint(detector):
    lines = [f"{key} {tuple(value.shape)}" for key, value in sorted(detector.state_dict().items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_keys_are_frozen(name):
    """Published weights depend on these names and shapes; a deliberate change is made in state_dict_keys.json too."""
    with torch.device("meta"):
        detector = create_detector(name)
    assert fingerprint(detector) == json.loads(KEYS.read_text())[name]


@pytest.mark.parametrize("name", [name for name in NAMES if "detr" not in name])
def test_raw_outputs_have_the_strides_of_the_pyramid(name):
    with torch.device("meta"):
        detector = create_detector(name)
        raw = detector(torch.zeros(1, 3, 256, 384))
    two_stages = hasattr(raw, "features")
    sizes = [(256 // s, 384 // s) for s in (detector.neck.strides if two_stages else (8, 16, 32, 64, 128))]
    assert [tuple(x.shape[-2:]) for x in (raw.objectness if two_stages else raw.cls_logits)] == sizes
    assert raw.canvas == (256, 384) and raw.image_sizes.shape == (1, 2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_every_trainable_parameter_gets_a_finite_gradient(name, training):
    detector = create_detector(name, num_classes=3).train(training)
    sizes = torch.tensor([[96, 160], [60, 100]])
    losses = TrainStep(detector)(images(), sizes, with_masks(detector, TARGETS, sizes))
    sum(losses.values()).backward()
    lacking = [k for k, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.requires_grad)
    assert detector.training is training


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "boxes", [[], [[5.0, 5, 6, 6]], [[0.0, 0, 160, 96]], [[7.2, 3.1, 7.2, 3.1]], [[3.0, 3, 90, 90]] * 60]
)
def test_losses_are_finite_for_awkward_objects(name, boxes):
    """No object, one pixel, the whole picture, an empty box, sixty at one place."""
    detector = create_detector(name, num_classes=3).train()
    target = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.zeros(len(boxes), dtype=torch.int64)}
    raw = detector(images(1))
    losses = detector.loss(raw, with_masks(detector, [target], raw.image_sizes))
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total)
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", SMALL)
def test_an_image_alone_gives_what_it_gives_in_a_batch(name):
    detector = create_detector(name, score_threshold=0.0)
    batch, sizes = images(), torch.tensor([[96, 160], [60, 100]])
    with torch.no_grad():
        together = detector.decode(detector(batch, sizes))
        for i in range(2):
            (alone,) = detector.decode(detector(batch[i : i + 1], sizes[i : i + 1]))
            assert len(alone) == len(together[i]) == 100
            torch.testing.assert_close(alone.scores, together[i].scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_what_lies_outside_a_picture_does_not_matter(name):
    detector = create_detector(name)
    sizes = torch.tensor([[60, 100]])
    clean, dirty = images(1), images(1)
    clean[:, :, 60:], clean[:, :, :, 100:] = 0, 0
    with torch.no_grad():
        assert torch.equal(first_map(detector(clean, sizes)), first_map(detector(dirty, sizes)))


@pytest.mark.parametrize("name", SMALL)
def test_detections_are_sorted_clipped_and_counted(name):
    detector = create_detector(name, score_threshold=0.0, max_detections=20)
    sizes = torch.tensor([[96, 160], [60, 100]])
    with torch.no_grad():
        raw = detector(images(), sizes)
        out = detector.decode_tensors(raw)
    assert out.boxes.shape == (2, 20, 4) and out.scores.shape == out.labels.shape == (2, 20)
    for i, detections in enumerate(detector.decode(raw)):
        assert len(detections) == out.count[i] <= 20
        assert (detections.scores.diff() <= 0).all()
        height, width = sizes[i].tolist()
        assert detections.boxes.min() >= 0
        assert detections.boxes[:, 2].max() <= width and detections.boxes[:, 3].max() <= height


@pytest.mark.parametrize("name", SMALL)
def test_uint8_and_float_images_agree(name):
    detector = create_detector(name)
    with torch.no_grad():
        a, b = detector(images(1)), detector(images(1).float())
    assert torch.equal(first_map(a), first_map(b))


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_gives_the_same_gradients(name):
    detector = create_detector(name, num_classes=3)
    gradients = []
    for enabled in (False, True):
        detector.set_grad_checkpointing(enabled)
        detector.train()
        detector.backbone.eval()  # BatchNorm statistics would move between the two passes
        raw = detector(images())
        torch.manual_seed(0)  # the same anchors and regions are drawn
        loss = sum(detector.loss(raw, with_masks(detector, TARGETS, raw.image_sizes)).values())
        gradients.append(torch.autograd.grad(loss, [p for p in detector.parameters() if p.requires_grad]))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(3, 64, 64), r"expected \(batch, 3, height, width\)"),
        (torch.zeros(1, 1, 64, 64), r"expected \(batch, 3, height, width\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int32), "int32"),
        (torch.zeros(1, 3, 16, 64), "16 x 64 px"),
    ],
)
def test_wrong_images_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        create_detector("test_atss")(wrong)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"boxes": torch.zeros(1, 4), "labels": torch.tensor([3])}, r"labels 3\.\.3, expected 0\.\.2"),
        ({"boxes": torch.zeros(2, 4), "labels": torch.tensor([0])}, r"boxes \(2, 4\) and labels \(1,\)"),
        ({"boxes": torch.zeros(4), "labels": torch.tensor([0])}, r"expected \(N, 4\)"),
        ({"boxes": torch.full((1, 4), float("nan")), "labels": torch.tensor([0])}, "not finite"),
        ({"boxes": torch.tensor([[30.0, 9, 12, 40]]), "labels": torch.tensor([0])}, "end before they begin"),  # xywh
        ({"boxes": torch.zeros(1, 4), "labels": torch.tensor([0.0])}, "labels of torch.float32"),
    ],
)
def test_wrong_targets_are_named(target, message):
    detector = create_detector("test_atss", num_classes=3)
    with pytest.raises(ValueError, match=message):
        detector.loss(detector(images(1)), [target])
    with pytest.raises(ValueError, match="2 targets for 1 images"):
        detector.loss(detector(images(1)), [target, target])


def test_frozen_stages_and_norms_stay_as_they_are():
    detector = create_detector("test_atss", frozen_stages=1, norm_eval=True, num_classes=3).train()
    body = detector.backbone.body
    before = {k: v.clone() for k, v in body.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.1)
    sum(detector.loss(detector(images()), TARGETS).values()).backward()
    optimizer.step()
    changed = {k for k, v in body.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and not any(k.startswith(("conv1", "bn1", "layer1")) or "running" in k for k in changed)


def test_predict_moves_boxes_back_to_the_photo():
    detector = create_detector("test_atss", score_threshold=0.0)
    photos = [torch.randint(0, 256, (3, 100, 300), dtype=torch.uint8), torch.zeros(3, 500, 40, dtype=torch.uint8)]
    found = detector.predict(photos)
    for photo, detections in zip(photos, found, strict=True):
        assert detections.boxes[:, 2].max() <= photo.shape[2] and detections.boxes[:, 3].max() <= photo.shape[1]
    assert found[0].boxes[:, 2].max() > 200  # in pixels of the photo, not of the resized one
    assert len(detector.predict(photos[0], score_threshold=2.0)[0]) == 0
