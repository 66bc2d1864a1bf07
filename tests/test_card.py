from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from dyhead_zoo import create_detector, get_pretrained_cfg, list_pretrained
from dyhead_zoo.card import LICENCES, card_metadata, eval_results_yaml, render_card
from dyhead_zoo.citations import BACKBONES, PAPERS, bibtex, citations
from dyhead_zoo.engine.evaluate import MASK_METRIC_NAMES, METRIC_NAMES
from dyhead_zoo.layers.backbone import resolve_backbone_name

ROOT = Path(__file__).parents[1]
RECORD: dict[str, Any] = {
    "record_version": 1,
    "detector": "test_atss_dyhead1",
    "date": "2026-01-31",
    "metrics": {name: 0.1234 + 0.01 * i for i, name in enumerate(METRIC_NAMES)} | {"APs": None},
    "intervals": {
        "AP": [0.1111, 0.1357],
        "AP50": [0.12, 0.14],
        "level": 0.95,
        "resamples": 7,
        "seed": 3,
        "method": "percentile bootstrap over images",
    },
    "dataset": {
        "name": "COCO few, 384 px",
        "split": "val",
        "images": 1234,
        "objects": 5678,
        "annotations_sha256": "a" * 64,
    },
    "model": {"parameters": 1_230_000, "macs": 2_500_000_000, "canvas": [384, 416]},
    "predictions": {"count": 4321, "sha256": "b" * 64},
    "evaluator": "hotcoco 1.3.0",
    "num_images": 1234,
    "unknown_classes": ["unicorn"],
    "environment": {
        "device": "cpu",
        "hardware": "A Processor",
        "torch": "2.9",
        "timm": "1.0",
        "dyhead_zoo": "0.1",
        "commit": "c" * 40,
    },
    "per_class": [
        {"name": f"kind{i}", "category_id": i + 1, "AP": 0.02 * i, "AP50": 0.04 * i, "num_gts": 5 + 3 * i}
        for i in range(20)
    ],
}
RECIPE = {"notes": ["It rained all day."], "config": {"epochs": 17, "lr": 0.0012, "num_workers": 3, "test_size": None}}


def config(**changes: Any) -> dict[str, Any]:
    detector = create_detector("test_atss_dyhead1")
    record = detector.config()
    fields = {
        "license": "apache-2.0",
        "base_model": "timm/test_efficientnet.r160_in1k",
        "datasets": ("detection-datasets/coco",),
        "limits": ("It has never seen the sea.",),
        "data_license": "Photos belong to their authors.",
    }
    record["pretrained_cfg"] = detector.pretrained_cfg.replace(**{**fields, **changes}).to_dict()
    return record


@pytest.fixture(scope="module")
def card() -> str:
    return render_card(config(), RECORD, recipe=RECIPE, repo_id="somebody/test_atss_dyhead1.mine")


# -- front matter ------------------------------------------------------------------------------------------------------

PIPELINE_TAGS = {"object-detection", "image-segmentation"}
"""Those of the Hub's tasks (huggingface.co/tasks) that a detector may have."""
HUB_LICENCES = {
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "cc0-1.0", "cc-by-4.0"),
    *("cc-by-sa-4.0", "cc-by-nc-4.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "openrail", "unknown", "other"),
}
"""Identifiers of hub-docs' list of licences, as far as detectors' weights have them."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return dict(yaml.safe_load(text.split("---\n")[1]))


def check_front_matter(data: dict[str, Any]) -> None:
    """What the Hub demands of a card's metadata, and what this zoo promises of its cards."""
    assert data["library_name"] == "dyhead_zoo"
    assert data["pipeline_tag"] in PIPELINE_TAGS
    assert data["license"] in HUB_LICENCES
    assert data["tags"] and all(isinstance(tag, str) and tag for tag in data["tags"])
    assert len(set(data["tags"])) == len(data["tags"])
    assert all(HUB_ID.fullmatch(name) for name in data["datasets"])
    if "base_model" in data:  # not of a detector that was trained from scratch
        assert HUB_ID.fullmatch(data["base_model"]) and data["base_model"].startswith("timm/")
        assert data["base_model_relation"] in {"adapter", "merge", "quantized", "finetune"}
    (entry,) = data["model-index"]
    assert isinstance(entry["name"], str) and entry["results"]
    for result in entry["results"]:
        assert result["task"]["type"] in PIPELINE_TAGS
        assert {"type", "name", "split"} <= result["dataset"].keys()
        for metric in result["metrics"]:
            assert isinstance(metric["type"], str) and 0 <= metric["value"] <= 100


def test_front_matter_is_what_the_hub_takes(card: str) -> None:
    data = front_matter(card)
    check_front_matter(data)
    assert {"atss", "dyhead", "timm", "object-detection"} <= set(data["tags"])
    assert data["base_model"] == "timm/test_efficientnet.r160_in1k"
    metrics = {m["name"]: m["value"] for r in data["model-index"][0]["results"] for m in r["metrics"]}
    assert metrics["AP"] == pytest.approx(12.34) and "APs" not in metrics and len(metrics) == 11


def test_front_matter_goes_round_by_the_client(card: str) -> None:
    parsed = ModelCard(card)
    assert parsed.data.library_name == "dyhead_zoo" and parsed.data.model_name == "test_atss_dyhead1.mine"
    assert {r.metric_name: r.metric_value for r in parsed.data.eval_results}["AP50"] == pytest.approx(13.34)
    assert yaml.safe_load(parsed.data.to_yaml()) == front_matter(card)


def test_detector_without_dyhead_and_data_says_less() -> None:
    plain = create_detector("test_atss").config()
    data = card_metadata(plain, None)
    assert "dyhead" not in data["tags"] and not {"eval_results", "base_model", "datasets"} & data.keys()
    assert ModelCardData(**data).to_yaml()
    assert "No record of an evaluation" in render_card(plain, None)


@pytest.mark.parametrize(
    ("name", "family", "masks"),
    [
        ("test_mask_rcnn_dyhead1", "mask_rcnn", True),
        ("test_cascade_rcnn", "cascade_rcnn", False),
        ("deformable_detr_test_resnet", "deformable_detr", False),
    ],
)
def test_tags_name_the_family_and_what_it_makes(name: str, family: str, masks: bool) -> None:
    tags = set(card_metadata(create_detector(name, num_classes=2, channels=32).config(), None)["tags"])
    assert family in tags
    assert ({"instance-segmentation", "image-segmentation"} <= tags) is masks


def test_licences_of_the_table_have_the_hubs_names() -> None:
    assert set(LICENCES) <= HUB_LICENCES


# -- text --------------------------------------------------------------------------------------------------------------


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text, flags=re.M)[1:][[m for m in re.findall(r"^## (.+)$", text, re.M)].index(title)]


def test_card_shows_the_figures_of_the_record(card: str) -> None:
    measured = section(card, "Results measured by us")
    assert "| AP | 12.3 | 11.1 to 13.6 |" in measured and "| APs | - |" in measured
    assert "COCO few, 384 px, val" in measured and "1,234 images" in measured and "A Processor" in measured
    assert "7 draws, seed 3" in measured and "c" * 40 in measured
    assert "kind19 38.0" in measured and "| kind7 | 14.0 | 28.0 | 26 |" in measured
    assert "1.23 M" in card and "2.50 G" in card and "384 x 416" in card


def masked() -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and record of a detector that makes masks."""
    own = config()
    own["arch"] = {**own["arch"], "mask_heads": 1}
    record = copy.deepcopy(RECORD)
    record["metrics"] |= {name: 0.0777 + 0.01 * i for i, name in enumerate(MASK_METRIC_NAMES)}
    record["intervals"]["mask_AP"] = [0.0666, 0.0888]
    record["per_class"] = [{**row, "mask_AP": 0.5, "mask_AP50": 0.75} for row in record["per_class"]]
    return own, record


def test_figures_of_masks_stand_beside_those_of_boxes(card: str) -> None:
    text = render_card(*masked())
    measured = section(text, "Results measured by us")
    assert "| AP | 12.3 | 11.1 to 13.6 | 7.8 | 6.7 to 8.9 |" in measured
    assert "| kind7 | 14.0 | 28.0 | 50.0 | 75.0 | 26 |" in measured
    assert "found.paste(height, width)" in text and "mask" not in card
    data = front_matter(text)
    check_front_matter(data)
    boxes, masks = data["model-index"][0]["results"]
    assert [r["task"]["type"] for r in (boxes, masks)] == ["object-detection", "image-segmentation"]
    assert {m["name"]: m["value"] for m in masks["metrics"]}["mask_AP"] == pytest.approx(7.77)
    assert len(boxes["metrics"]) == 11 and len(masks["metrics"]) == 12


def test_every_figure_follows_the_record() -> None:
    changed = copy.deepcopy(RECORD)
    changed["metrics"]["AP"] = 0.4567
    before, after = (render_card(config(), record) for record in (RECORD, changed))
    assert (
        "45.7" not in before
        and "| AP | 45.7 |" in after
        and front_matter(after)["model-index"] != front_matter(before)["model-index"]
    )


def test_reported_figures_stand_apart_and_stay_out_of_the_metadata() -> None:
    text = render_card(config(reported={"AP": 77.7}, reported_by="A Paper"), RECORD)
    assert "77.7" in section(text, "Results reported by others") and "A Paper" in text
    assert "77.7" not in section(text, "Results measured by us") and "77.7" not in text.split("---\n")[1]
    assert "reported by others" not in render_card(config(), RECORD)


def test_weak_classes_are_named_by_the_record(card: str) -> None:
    limits = section(card, "Limits and failure modes")
    assert "It has never seen the sea." in limits and "unicorn" in limits
    # with at least ten objects, that is from kind2 on, only those with an AP50 below 5 %
    assert "Nearly blind" not in limits
    dim = {**RECORD, "per_class": [{**row, "AP50": row["AP50"] / 4} for row in RECORD["per_class"]]}
    assert "to: kind2, kind3, kind4." in render_card(config(), dim)


def test_recipe_licences_and_speed(card: str) -> None:
    training = section(card, "Training")
    assert "It rained all day." in training and "| `epochs` | 17 |" in training
    assert "num_workers" not in training and "test_size" not in training  # not of the weights; not set
    assert "timm/test_efficientnet.r160_in1k" in training
    assert "Apache License 2.0" in section(card, "Licences") and "Photos belong" in section(card, "Licences")
    assert "Speed: not measured" in section(card, "Size and speed")
    run = {"hardware": "A GPU", "runtime": "eager", "canvas": [384, 512], "batch_size": 2, "images_per_second": 41.26}
    assert "41.3 images a second on A GPU (eager), 384 x 512 pixels, batches of 2" in render_card(
        config(), RECORD, benchmark=[run]
    )


def test_licence_of_somebody_elses_weights_is_not_made_up() -> None:
    text = section(render_card(config(origin_url="https://example.org/code"), None), "Licences")
    assert "licence of https://example.org/code; its authors do not state one for the weights" in text


def test_snippet_loads_the_detector(card: str, tmp_path: Path) -> None:
    assert 'create_detector("hf-hub:somebody/test_atss_dyhead1.mine")' in section(card, "Use")
    code = re.findall(r"```python\n(.+?)```", render_card(config(), None), flags=re.S)[0]
    compile(code, "card", "exec")
    assert "local-dir:" in code


def test_eval_results_say_that_it_is_a_subset() -> None:
    if not hasattr(huggingface_hub, "EvalResultEntry"):
        pytest.skip("this huggingface_hub knows no .eval_results")
    ((path, text),) = eval_results_yaml(config(), RECORD).items()
    assert path == ".eval_results/coco_few_384_px_val.yaml"
    entries = huggingface_hub.parse_eval_result_entries(yaml.safe_load(text))
    assert [e.value for e in entries] == [12.34, 13.34] and entries[0].dataset_id == "detection-datasets/coco"
    assert entries[0].task_id == "coco_few_384_px_val_ap" and "11.1 to 13.6" in str(entries[0].notes)
    assert eval_results_yaml(config(datasets=()), RECORD) == {}
    ((_, text),) = eval_results_yaml(*masked()).items()
    entries = huggingface_hub.parse_eval_result_entries(yaml.safe_load(text))
    assert [e.value for e in entries] == [12.34, 13.34, 7.77, 8.77] and "6.7 to 8.9" in str(entries[2].notes)


# -- citations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_pretrained())
def test_every_tag_can_be_cited(name: str) -> None:
    cfg = get_pretrained_cfg(name)
    entries = citations(cfg.paper_ids, "resnet50")
    assert len(entries) == len(cfg.paper_ids) + 2 and all(entry.count("{") == entry.count("}") for entry in entries)


def test_backbones_are_cited_by_the_beginning_of_their_name() -> None:
    assert set(BACKBONES.values()) <= set(PAPERS)
    for backbone, author in (("swin", "Liu, Ze"), ("lite0", "Tan, Mingxing"), ("resnet50", "He, Kaiming")):
        assert author in citations((), resolve_backbone_name(backbone))[0]
    (timm,) = citations((), "xcit_nano_12_p16_224")
    assert "Wightman" in timm


def test_unknown_paper_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"9999\.99999"):
        bibtex("arXiv:9999.99999")


# -- the cards of the repository ---------------------------------------------------------------------------------------


def test_cards_of_the_repository_are_those_of_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "hub")
    from cards import bundled_names, card_of

    names = bundled_names()
    assert names
    for name in names:
        path = ROOT / "hub" / name / "README.md"
        assert path.read_text() == card_of(name), f"{path} is stale: run python hub/cards.py"


@pytest.mark.parametrize("path", sorted((ROOT / "hub").glob("*.*/README.md")), ids=lambda path: path.parent.name)
def test_cards_of_the_repository_pass_the_hubs_schema(path: Path) -> None:
    check_front_matter(front_matter(path.read_text()))
