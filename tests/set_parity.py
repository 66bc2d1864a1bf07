"""mmdetection's outputs and losses of set-prediction detectors, against ours."""

from __future__ import annotations

import torch
from parity_kit import assert_near, assert_same_detections

from dyhead_zoo.convert.mmdet import convert_mmdet

TERMS = {"loss_cls": "loss_cls", "loss_box": "loss_bbox", "loss_giou": "loss_iou"}


def check_outputs(kit, detector, batch):
    """Features, memory, predictions of every stored layer, and detections."""
    reference = {k.removeprefix(f"{batch}."): v for k, v in kit.outputs.items() if k.startswith(f"{batch}.")}
    images, sizes = kit.pictures(kit.batches[batch])
    memory = []
    detector.head.transformer.encoder[-1].register_forward_hook(lambda module, inputs, output: memory.append(output))
    with torch.no_grad():
        x = detector.normalise(images, sizes)
        assert list(x.shape) == reference["input_shape"].tolist()
        features = detector.backbone(x)
        for i, feature in enumerate(features):
            assert_near(feature[:, :8], reference[f"backbone.{i}"], f"backbone {i}")
        for i, level in enumerate(detector.neck(features)):
            assert_near(level[:, :16], reference[f"fpn.{i}"], f"projection {i}")
        raw = detector(images, sizes)
        assert_near(memory[-1][..., :16], reference["encoder.0"], "memory")
        layers = sum(key.startswith("cls.") for key in reference)
        for i in range(layers):
            assert_near(raw.cls_logits[i - layers], reference[f"cls.{i}"], f"classes of layer {i}")
            assert_near(raw.boxes[i - layers], reference[f"box.{i}"], f"boxes of layer {i}")
        for i, detections in enumerate(detector.decode(raw)):
            assert_same_detections(detections, {k: reference[f"det.{k}.{i}"] for k in ("boxes", "scores", "labels")})


def check_losses(kit, detector):
    """Loss terms of the last layer, of those before it together, of the proposals, and three gradients."""
    images, sizes = kit.pictures(kit.losses["images"])
    targets = [{"boxes": torch.tensor(gt["boxes"]), "labels": torch.tensor(gt["labels"])} for gt in kit.losses["gt"]]
    for parameter in detector.parameters():
        parameter.requires_grad_(True)
    losses = detector.loss(detector(images, sizes), targets)
    stored = kit.losses["losses"]
    expected = {}
    for ours, theirs in TERMS.items():
        expected[ours] = stored[theirs]
        expected[f"{ours}_aux"] = sum(value for key, value in stored.items() if key.endswith(f".{theirs}"))
        if f"enc_{theirs}" in stored:
            expected[f"{ours}_proposal"] = stored[f"enc_{theirs}"]
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss.detach(), torch.tensor(expected[name]), rtol=1e-4, atol=1e-6)
    total = sum(losses.values())
    torch.testing.assert_close(total.detach(), torch.tensor(kit.losses["total"]), rtol=1e-4, atol=1e-6)
    total.backward()
    parameters, theirs = dict(detector.named_parameters()), kit.state_dict()
    for name, norm in kit.losses["grad_norms"].items():
        (key,) = convert_mmdet({name: theirs[name]})
        torch.testing.assert_close(parameters[key].grad.norm(), torch.tensor(norm), rtol=2e-3, atol=0)
