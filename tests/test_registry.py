"""Names, tags, wildcards and what is said when they are wrong."""

from __future__ import annotations

import pytest

from dyhead_zoo import (
    create_detector,
    detector_entrypoint,
    get_pretrained_cfg,
    is_detector,
    list_detectors,
    list_pretrained,
    list_tags,
    register_detector,
    registry,
)


def test_listing_is_in_natural_order_and_filtered():
    names = list_detectors("atss_resnet50_dyhead*")
    assert names == [f"atss_resnet50_dyhead{n}" for n in (1, 2, 4, 6, 8, 10)]
    assert list_detectors(["atss_swin*", "atss_resnet101"], exclude="*large*") == [
        "atss_resnet101",
        "atss_swin_dyhead6",
    ]
    assert list_detectors(module="atss") and not list_detectors(module="no_such_family")
    assert list_detectors("no_such*") == []


def test_pretrained_listing_names_every_tag_with_weights():
    tags = list_detectors("atss_resnet50_dyhead6", pretrained=True)
    assert tags == list_pretrained("atss_resnet50_dyhead6") and len(tags) == 4
    assert all(get_pretrained_cfg(tag).has_weights for tag in list_pretrained())


def test_default_tag_is_the_first():
    assert list_tags("atss_resnet50_dyhead6")[0] == "mmdet_1x_coco"
    default, official = (get_pretrained_cfg(f"atss_resnet50_dyhead6{t}") for t in ("", ".official_1x_coco"))
    assert default.reported == {"AP": 43.3} and official.reported == {"AP": 42.4}


@pytest.mark.parametrize(
    ("name", "known"),
    [("atss_resnet50", True), ("atss_resnet50.mmdet_1x_coco", True), ("atss_resnet50.other", False), ("atss", False)],
)
def test_is_detector(name, known):
    assert is_detector(name) is known


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("atss_resnet50_dyhaed6", "Did you mean atss_resnet50_dyhead6"),
        ("atss_resnet50_dyhead6.oficial_1x_coco", "official_1x_coco"),
        ("yolo_resnet50", "family of \\['atss', "),
        ("atss_resnot50_dyhead6x", "timm has no backbone named 'resnot50_dyhead6x'"),
        ("runs/model", "local-dir:runs/model"),
        ("atss_resnet50_dyhead999", "asks for 999 DyHead blocks: use at most 32"),
        ("atss_resnet18_dyhead1.tag", "no weight tag 'tag'"),
    ],
)
def test_unknown_names_get_a_hint(name, hint):
    with pytest.raises(ValueError, match=hint):
        create_detector(name)


@pytest.mark.parametrize("number", [-1, 33])
def test_number_of_blocks_is_bounded(number):
    with pytest.raises(ValueError, match=rf"dyhead={number}: use 0..32 blocks"):
        create_detector("test_atss", dyhead=number)


def test_deprecated_names_warn_and_work(monkeypatch):
    monkeypatch.setitem(registry._deprecated, "old_atss", "test_atss")
    with pytest.warns(DeprecationWarning, match="'old_atss' is now 'test_atss'"):
        assert create_detector("old_atss").name == "test_atss"


def test_a_name_registers_once():
    with pytest.raises(ValueError, match="registered already"):
        register_detector(detector_entrypoint("test_atss"))


def test_names_are_functions():
    entrypoint = detector_entrypoint("test_atss_dyhead1")
    assert entrypoint.__name__ == "test_atss_dyhead1" and entrypoint.__doc__
    assert entrypoint(num_classes=2).label_space.names == ("class_0", "class_1")
