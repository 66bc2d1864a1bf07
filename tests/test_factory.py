"""From a name and arguments to a detector, and what is said of arguments that do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from dyhead_zoo import COCO_80, create_detector, get_pretrained_cfg
from dyhead_zoo.engine.checkpoint import write_weights
from dyhead_zoo.layers.dyhead import DyHead
from dyhead_zoo.weights import write_safetensors

IMAGES = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_convnext", "mobilenetv3_small_050"])
@pytest.mark.parametrize("blocks", [0, 1])
def test_grammar_composes_any_backbone(backbone, blocks):
    detector = create_detector(f"atss_{backbone}" + (f"_dyhead{blocks}" if blocks else ""), channels=32)
    assert isinstance(detector.neck.dyhead, DyHead) == bool(blocks)
    assert len(detector.head.cls_tower) == (0 if blocks else 4)  # DyHead replaces the towers
    assert [tuple(x.shape[-2:]) for x in detector(IMAGES).cls_logits] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]


def test_grammar_takes_mean_and_std_from_the_backbone():
    cfg = create_detector("atss_tf_efficientnet_lite0_dyhead1", channels=32).pretrained_cfg
    assert cfg.mean == (127.5, 127.5, 127.5) and cfg.std == (127.5, 127.5, 127.5)


def test_default_labels_are_coco():
    assert create_detector("test_atss").label_space == COCO_80


def test_classes_by_number_or_name():
    assert create_detector("test_atss", num_classes=80).label_space == COCO_80
    assert create_detector("test_atss", num_classes=3).label_space.names == ("class_0", "class_1", "class_2")
    detector = create_detector("test_atss", class_names=["cat", "kiwi"])
    assert detector.label_space.names == ("cat", "kiwi")
    assert detector(IMAGES).cls_logits[0].shape[1] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"num_classes": 3, "class_names": ["a", "b"]}, "num_classes=3 but 2 class names"),
        ({"class_names": ["a", "a"]}, "'a' appears twice"),
        ({"class_names": "cat"}, "give a list"),
        ({"class_names": []}, "at least one class"),
        ({"coarse_offset": "aligned"}, "did you mean 'coarse_offsets'"),
        ({"coarse_offsets": "crop", "dyhead": 1}, "coarse_offsets='crop'"),
        ({"extra_from": "p6"}, "extra_from='p6'"),
        ({"backbone": "resnet5O"}, "Did you mean resnet50"),
        ({"channels": 40, "dyhead": 1}, "multiple of 16"),
        ({"frozen_stages": 9}, "has stages 0..4"),
        ({"backbone": "test_efficientnet", "caffe": True}, "has none"),
        ({"pretrained": True}, "test_atss has no published weights"),
        ({"pretrainde": True}, "did you mean 'pretrained'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_detector("test_atss", **arguments)


def test_the_tag_decides_the_architecture_also_without_weights():
    assert create_detector("atss_resnet50_dyhead6").head.box_deltas.kernel_size == (3, 3)
    official = create_detector("atss_resnet50_dyhead6.official_1x_coco")
    assert official.head.box_deltas.kernel_size == (1, 1)
    assert official.backbone.body.layer2[0].conv1.stride == (2, 2)
    assert official.pretrained_cfg.channel_order == "bgr"
    assert official.neck.dyhead.blocks[0].spatial.coarse_offsets == "reinterpret"


def test_arguments_that_contradict_the_weights_are_refused():
    with pytest.raises(ValueError, match=r"coarse_offsets='aligned' contradicts the weights"):
        create_detector("atss_resnet50_dyhead6", pretrained=True, coarse_offsets="aligned")
    with pytest.raises(ValueError, match=r"backbone='resnet18' contradicts"):
        create_detector("atss_resnet50_dyhead6", pretrained=True, backbone="resnet18")
    with pytest.raises(ValueError, match=r"extra_relu=True contradicts the weights .* need extra_relu=False"):
        create_detector("atss_resnet50_dyhead6", pretrained=True, extra_relu=True)  # a default that the tag leaves


def test_strides_reach_the_backbone():
    detector = create_detector("test_atss", strides=(4, 8, 16, 32))
    assert [x.shape[-1] for x in detector(IMAGES).cls_logits] == [24, 12, 6, 3, 2, 1]


def test_a_checkpoint_of_other_settings_is_refused_unless_they_are_given(tmp_path):
    path = tmp_path / "mine.safetensors"
    write_weights(path, create_detector("test_atss_dyhead1", coarse_offsets="reinterpret"), {})
    with pytest.raises(ValueError, match=r"trained with coarse_offsets='reinterpret', this detector has .*'aligned'"):
        create_detector("test_atss_dyhead1", checkpoint=path)
    create_detector("test_atss_dyhead1", checkpoint=path, coarse_offsets="aligned")
    assert create_detector(f"local-dir:{path}").neck.dyhead.blocks[0].spatial.coarse_offsets == "reinterpret"


def test_a_damaged_weight_file_is_called_damaged(tmp_path):
    path = tmp_path / "mine.safetensors"
    write_weights(path, create_detector("test_atss"), {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"^\S+mine.safetensors: damaged or truncated"):
        create_detector("test_atss", checkpoint=path)


def test_pretrained_loads_a_file_and_no_backbone_weights(tmp_path, monkeypatch):
    source = create_detector("test_atss_dyhead1")
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, source.state_dict(), {})
    cfg = get_pretrained_cfg("test_atss_dyhead1").replace(file=str(path), sha256=None)
    monkeypatch.setattr(
        "timm.models._builder.load_pretrained", lambda *_, **__: pytest.fail("backbone weights asked for")
    )
    loaded = create_detector("test_atss_dyhead1", pretrained=True, pretrained_cfg=cfg, pretrained_backbone=True)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in source.state_dict().items())


def test_backbone_weights_from_a_file(tmp_path):
    import timm

    body = timm.create_model("test_resnet", num_classes=0)
    path = tmp_path / "body.safetensors"
    save_file(body.state_dict(), path)
    detector = create_detector("test_atss", pretrained_backbone=path)
    assert all(torch.equal(v, detector.backbone.body.state_dict()[k]) for k, v in body.state_dict().items())
    with pytest.raises(ValueError, match="does not fit timm's test_efficientnet"):
        create_detector("test_atss_dyhead1", pretrained_backbone=path)


def test_backbone_weights_for_other_channels(tmp_path):
    import timm

    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    detector = create_detector("test_atss", in_chans=5, pretrained_backbone=state)
    assert detector(torch.zeros(1, 5, 64, 64)).cls_logits[0].shape == (1, 80, 8, 8)


def test_a_saved_folder_comes_back(tmp_path):
    source = create_detector("atss_test_resnet_dyhead1", class_names=["a", "b"], channels=32, anchor_offset=0.5)
    (tmp_path / "config.json").write_text(json.dumps(source.config()))
    write_safetensors(tmp_path / "model.safetensors", source.state_dict(), {})
    loaded = create_detector(f"local-dir:{tmp_path}")
    assert loaded.label_space == source.label_space and loaded.head.anchors.offset == 0.5
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(source(images).cls_logits[0], loaded(images).cls_logits[0])


def test_a_wrong_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json"):
        create_detector(f"local-dir:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="nowhere: expected a folder"):
        create_detector(f"local-dir:{tmp_path / 'nowhere'}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no detector that this dyhead_zoo can read: .* have a format_version"):
        create_detector(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps(create_detector("test_atss").config() | {"format_version": 99}))
    with pytest.raises(ValueError, match="it has format 99, this dyhead_zoo reads up to 1: upgrade"):
        create_detector(f"local-dir:{tmp_path}")


def test_a_weight_file_brings_its_detector_and_its_classes(tmp_path):
    source = create_detector("test_atss_dyhead1", class_names=["kiwi", "person"], anchor_offset=0.5)
    path = tmp_path / "best.safetensors"
    write_weights(path, source, {})
    whole = create_detector(f"local-dir:{path}")
    assert whole.label_space == source.label_space and whole.head.anchors.offset == 0.5
    named = create_detector("test_atss_dyhead1", checkpoint=path, anchor_offset=0.5)
    assert named.label_space == source.label_space
    for loaded in (whole, named):
        assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in source.state_dict().items())
    mine = create_detector(f"local-dir:{path}", class_names=["person", "plum"])
    assert torch.equal(mine.head.cls_logits.weight[0], source.head.cls_logits.weight[1])  # by name
    bare = tmp_path / "bare.safetensors"
    write_safetensors(bare, source.state_dict(), {})
    with pytest.raises(ValueError, match="does not say which detector"):
        create_detector(f"local-dir:{bare}")


def test_a_tags_frozen_stages_apply_only_where_weights_are_loaded():
    import timm

    name = "atss_resnet50_dyhead6"
    with torch.device("meta"):
        assert all(p.requires_grad for p in create_detector(name).parameters())
        assert not create_detector(name, frozen_stages=0).backbone.body.conv1.weight.requires_grad  # asked for
        weights = timm.create_model("resnet50", num_classes=0).state_dict()
        loaded = create_detector(name, pretrained_backbone=weights).backbone.body
    assert not loaded.layer1[0].conv1.weight.requires_grad and loaded.layer2[0].conv1.weight.requires_grad


def test_two_sources_of_weights_are_one_too_many(tmp_path):
    with pytest.raises(ValueError, match="choose one"):
        create_detector("atss_lite0_dyhead2", pretrained=True, checkpoint=tmp_path / "a.safetensors")


def test_figures_stay_with_the_weights_that_they_are_of():
    assert create_detector("test_atss_dyhead1", pretrained=True).pretrained_cfg.measured
    for other in ({}, {"pretrained": True, "class_names": ["person", "cup"]}):
        cfg = create_detector("test_atss_dyhead1", **other).pretrained_cfg
        assert not cfg.measured and not cfg.has_weights and not cfg.limits
        assert cfg.short_side == 192 and cfg.paper_ids  # what remains true of the detector
