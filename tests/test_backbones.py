"""timm backbones under a detector: the smallest architecture of each timm module takes a training step."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch

from dyhead_zoo import create_detector
from dyhead_zoo.layers.backbone import Backbone

ROOT = Path(__file__).parents[1]
SMALLEST = json.loads((Path(__file__).parent / "smallest_backbones.json").read_text())


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("sweep_backbones", ROOT / "hub" / "sweep_backbones.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("module", SMALLEST)
def test_the_smallest_of_each_module_trains(sweep, module):
    row = sweep.check(SMALLEST[module], limit=170)
    assert row["result"] == "ok", row
    assert row["checked"] == "gradients" or row["parameters"] > 170e6


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "swin_tiny_patch4_window7_224"])
def test_body_has_timms_names_and_goes_back_into_timm(name):
    with torch.device("meta"):
        body = Backbone(name, strides=(16, 32)).body.state_dict()
        whole = timm.create_model(name, num_classes=0).state_dict()
    assert body and set(body) <= set(whole)
    assert all(body[key].shape == whole[key].shape for key in body)


def test_a_whole_timm_checkpoint_drops_in_and_a_trained_body_goes_back(tmp_path):
    model = timm.create_model("test_efficientnet", num_classes=10)
    backbone = Backbone("test_efficientnet", pretrained=model.state_dict())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in backbone.body.state_dict().items())
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 1
    missing, unexpected = model.load_state_dict(backbone.body.state_dict(), strict=False)
    assert not unexpected and all(key.startswith(("conv_head", "bn2", "classifier")) for key in missing)


def test_reference_weights_drop_in_with_no_key_missing(data_dir):
    path = data_dir / "backbones" / "tf_efficientnet_lite0.in1k.safetensors"
    backbone = Backbone("lite0", pretrained=path).eval()
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    model.load_state_dict(timm.models.load_state_dict(str(path)), strict=False)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True)[-3:]
        assert all(torch.equal(a, b) for a, b in zip(backbone(images), expected, strict=True))


@pytest.mark.parametrize("stride", [4, 8, 16, 32, 64])
def test_plain_vit_gives_any_stride(stride):
    (level,) = Backbone("test_vit", strides=(stride,)).eval()(torch.randn(1, 3, 100, 70))
    assert level.shape[-2:] == (-(-100 // stride), -(-70 // stride))


def test_resampled_levels_stay_in_place():
    """A step edge at x = 64 of 128 lies at half the width of every level, whatever the patch size."""
    from dyhead_zoo.layers.backbone import Resample

    for source, stride in ((14, 8), (14, 16), (16, 8), (16, 32)):
        layer = Resample(1, source / stride)
        torch.nn.init.ones_(layer.proj.weight)
        torch.nn.init.zeros_(layer.proj.bias)
        ramp = ((torch.arange(224 // source) + 0.5) * source).expand(1, 1, 224 // source, -1)
        out = layer(ramp)[0, 0, 0]
        centres = (torch.arange(len(out)) + 0.5) * stride
        inner = slice(2, -2)
        torch.testing.assert_close(out[inner], centres[inner], atol=1.0, rtol=0)  # the antialiasing filter is not exact


def test_fixed_canvas_pads_smaller_images_and_refuses_larger_ones():
    name = "convit_tiny"
    backbone = Backbone(name).eval()
    assert backbone.image_size == (224, 224)
    assert [tuple(x.shape[-2:]) for x in backbone(torch.randn(1, 3, 100, 224))] == [(28, 28), (14, 14), (7, 7)]
    with pytest.raises(ValueError, match=r"canvas of 224 x 224 px and got 224 x 256.*image_size=\(224, 256\)"):
        backbone(torch.randn(1, 3, 224, 256))


@pytest.mark.parametrize("name", ["eca_halonext26ts", "haloregnetz_b", "bat_resnext26ts"])
def test_attention_within_blocks_takes_any_canvas(name):
    """Blocks of 8, 7 and 8 cells: the canvas is padded to whole blocks, the levels are cut back to the image."""
    with torch.device("meta"):
        levels = Backbone(name)(torch.zeros(2, 3, 100, 260))
    assert [tuple(x.shape[-2:]) for x in levels] == [(13, 33), (7, 17), (4, 9)]


def test_branches_of_hrnet_that_no_level_reads_are_frozen():
    def frozen(*strides):
        with torch.device("meta"):
            body = Backbone("hrnet_w18_small", strides=strides).body
        return {key.rpartition(".fuse_layers")[2][:3] for key, p in body.named_parameters() if not p.requires_grad}

    assert not frozen(4, 8, 16, 32)
    assert ".0." in frozen(8, 16, 32)


def test_checkpointed_and_plain_gradients_agree():
    backbone = Backbone("test_convnext")
    images = torch.randn(1, 3, 64, 64)
    gradients = []
    for enabled in (False, True):
        backbone.set_grad_checkpointing(enabled)
        loss = sum(x.square().sum() for x in backbone(images))
        gradients.append(torch.autograd.grad(loss, list(backbone.parameters())))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("strides", [(), (0, 8), (8.0, 16.0), "8", (16, 8)])
def test_wrong_strides_are_named(strides):
    with pytest.raises(ValueError, match="strides=.*: give "):
        Backbone("test_resnet", strides=strides)


def test_a_part_that_a_body_lacks_is_named():
    with pytest.raises(ValueError, match="read_from names 'blocks.5.0', which ResNet lacks; it has conv1, "):
        create_detector("faster_rcnn_resnet18", strides=(32, 32), read_from=("blocks.5.0", None))
