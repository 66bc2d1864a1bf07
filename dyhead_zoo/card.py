"""Model cards: the README.md of a repository, its metadata and ``.eval_results``, all from one record.

The record is what ``engine.record.evaluation_record`` wrote; no figure is typed by hand. Figures that we measured and
figures that others report stand in different sections.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import huggingface_hub
from huggingface_hub import EvalResult, ModelCardData

from dyhead_zoo import registry
from dyhead_zoo.citations import citations
from dyhead_zoo.engine.evaluate import MASK_METRIC_NAMES, METRIC_NAMES
from dyhead_zoo.layers.backbone import resolve_backbone_name
from dyhead_zoo.pretrained import HUB_ORGANISATION, PretrainedCfg

LIBRARY, TASK, MASK_TASK = "dyhead_zoo", "object-detection", "image-segmentation"
MARK = "<!-- Written by dyhead_zoo from the record; remove this line to keep changes of your own. -->"
"""Last line of every card written here: such a card may be written anew."""
LICENCES = {
    "apache-2.0": "Apache License 2.0",
    "mit": "MIT License",
    "bsd-2-clause": "BSD 2-Clause License",
    "bsd-3-clause": "BSD 3-Clause License",
    "cc-by-4.0": "Creative Commons Attribution 4.0",
    "cc0-1.0": "Creative Commons Zero 1.0",
}
"""The Hub's names of licences that permit to publish weights again, with or without changes."""

MEANINGS = {
    "AP": "IoU .50 to .95, the main figure",
    "AP50": "IoU .50",
    "AP75": "IoU .75",
    "APs": "small objects, below 32 x 32 pixels",
    "APm": "medium ones",
    "APl": "large ones, from 96 x 96 pixels",
    "AR1": "recall with one detection per image",
    "AR10": "with ten",
    "AR100": "with a hundred",
    "ARs": "recall of small objects",
    "ARm": "of medium ones",
    "ARl": "of large ones",
}
_ENOUGH = 10
"""Objects of a class, below which its figure says little."""
_NAMED = 5
"""Classes that are named as the best and as the worst."""
_RUN_ONLY = {
    *("device", "num_workers", "cache_images", "eval_every", "eval_batch_size", "log_every"),
    *("checkpoint_every_steps", "tensorboard", "progress"),
}
"""Settings of a training run that do not shape its weights."""


def render_card(
    config: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    *,
    recipe: Mapping[str, Any] | None = None,
    benchmark: Sequence[Mapping[str, Any]] | None = None,
    repo_id: str | None = None,
    golden: bool = True,
) -> str:
    """The card of one set of weights, with its metadata as front matter.

    Args:
        config: ``Detector.config()``.
        record: ``eval.json`` of these weights; None if there is none, which the card then says.
        recipe: ``recipe.json``: ``config`` (the settings of the run) and ``notes`` (what else happened, in sentences).
        benchmark: measured speeds, one mapping each: ``hardware``, ``runtime``, ``canvas`` (height, width),
            ``batch_size`` and ``images_per_second``.
        repo_id: where the weights are, ``org/name``; None for a folder.
        golden: whether golden tensors lie beside the weights.

    Returns:
        Markdown, with ``MARK`` as its last line.

    Raises:
        KeyError: for a paper of the cfg that ``citations`` does not know.
    """
    cfg = PretrainedCfg.from_dict(config["pretrained_cfg"])
    title = repo_id.rpartition("/")[2] if repo_id else str(config["name"])
    sections = [
        f"# {title}\n\n{_summary(config, cfg)}",
        _usage(config, title, repo_id),
        _labels(cfg),
        _input(cfg),
        _measured(cfg, record),
        _reported(cfg),
        _size_and_speed(record, benchmark),
        _training(cfg, recipe),
        _limits(cfg, record),
        _licences(cfg),
        _proof(record, repo_id, golden),
        _citation(config, cfg),
        MARK,
    ]
    front = ModelCardData(**card_metadata(config, record, title=title)).to_yaml()
    return f"---\n{front}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def card_metadata(
    config: Mapping[str, Any], record: Mapping[str, Any] | None, *, title: str | None = None
) -> dict[str, Any]:
    """Arguments of ``huggingface_hub.ModelCardData``: what the Hub shows and filters by.

    Args:
        config: ``Detector.config()``.
        record: ``eval.json``, or None; its figures become the ``model-index``, in percent: the twelve of boxes and,
            under the task ``image-segmentation``, the twelve of masks.
        title: name of the model in the ``model-index``; by default that of the detector.
    """
    cfg = PretrainedCfg.from_dict(config["pretrained_cfg"])
    tags = [TASK, "vision", LIBRARY, "timm", registry.family_of(config["name"])]
    tags += ["dyhead"] if config["arch"].get("dyhead") else []
    tags += [MASK_TASK, "instance-segmentation"] if config["arch"].get("mask_heads") else []
    metadata: dict[str, Any] = {"library_name": LIBRARY, "pipeline_tag": TASK, "tags": list(dict.fromkeys(tags))}
    if cfg.license:
        metadata["license"] = cfg.license
    if cfg.datasets:
        metadata["datasets"] = list(cfg.datasets)
    if cfg.base_model:
        metadata |= {"base_model": cfg.base_model, "base_model_relation": "finetune"}
    if record is not None:
        metadata |= {"model_name": title or str(config["name"]), "eval_results": _eval_results(cfg, record)}
    return metadata


def eval_results_yaml(config: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    """Files of ``.eval_results/``, the Hub's newer form of results, by their path in the repository.

    Empty where the installed huggingface_hub does not know that form, or no data set of the Hub is named.
    """
    cfg = PretrainedCfg.from_dict(config["pretrained_cfg"])
    if not (hasattr(huggingface_hub, "EvalResultEntry") and cfg.datasets):
        return {}
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    data = record["dataset"]
    slug = re.sub(r"[^a-z0-9]+", "_", f"{data['name']} {data['split']}".lower()).strip("_")
    entries = [
        EvalResultEntry(
            dataset_id=cfg.datasets[0],
            task_id=f"{slug}_{name.lower()}",  # says that it is not the data set's own validation part
            value=round(100 * record["metrics"][name], 2),
            date=record["date"],
            notes=f"{name}, % of {data['name']}, {data['split']}, {data['images']} images{_between(record, name)}",
        )
        for name in ("AP", "AP50", "mask_AP", "mask_AP50")
        if record["metrics"].get(name) is not None
    ]
    return {f".eval_results/{slug}.yaml": yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False)}


def _eval_results(cfg: PretrainedCfg, record: Mapping[str, Any]) -> list[EvalResult]:
    data = record["dataset"]
    return [
        EvalResult(
            task_type=MASK_TASK if name in MASK_METRIC_NAMES else TASK,
            dataset_type=cfg.datasets[0] if cfg.datasets else "coco",
            dataset_name=data["name"],
            dataset_split=data["split"],
            metric_type=name.lower(),
            metric_name=name,
            metric_value=round(100 * record["metrics"][name], 2),
        )
        for name in (*METRIC_NAMES, *MASK_METRIC_NAMES)
        if record["metrics"].get(name) is not None
    ]


# --- sections ---------------------------------------------------------------------------------------------------------


def _summary(config: Mapping[str, Any], cfg: PretrainedCfg) -> str:
    blocks = config["arch"].get("dyhead")
    backbone = resolve_backbone_name(config["arch"]["backbone"])
    made_of = f"`{config['name']}` with the timm backbone `{backbone}`"
    made_of += f" and {blocks} Dynamic Head block{'s' * (blocks > 1)}" if blocks else ""
    kind = "An object detector that also draws masks," if config["arch"].get("mask_heads") else "An object detector"
    return f"{kind} for {len(cfg.class_names)} classes: {made_of}.\n\n{cfg.description}".strip()


def _usage(config: Mapping[str, Any], title: str, repo_id: str | None) -> str:
    lines = [
        "from dyhead_zoo import create_detector",
        "",
        f'detector = create_detector("{_source(repo_id)}")',
        '(found,) = detector.predict("photo.jpg", score_threshold=0.3)  # a path, PIL image, array or tensor',
        "for box, score, label in zip(found.boxes, found.scores, found.labels):",
        '    print(detector.label_space.names[label], f"{score:.2f}", box.tolist())  # x1, y1, x2, y2 in pixels',
    ]
    text = "## Use\n\n```python\n" + "\n".join(lines) + "\n```"
    if config["arch"].get("mask_heads"):
        text += (
            "\n\n`found.paste(height, width)` gives the masks in a photo of that size: one for each box, of booleans."
        )
    if repo_id and repo_id.startswith(f"{HUB_ORGANISATION}/") and registry.is_detector(title):
        text += f'\n\nBy name, it is `create_detector("{title}", pretrained=True)`.'
    return text + (
        "\n\nFor classes of your own, pass `class_names=[...]` and train: rows of classes that both name are kept, the "
        "others start fresh."
    )


def _source(repo_id: str | None) -> str:
    """What ``create_detector`` takes for these weights."""
    return f"hf-hub:{repo_id}" if repo_id else "local-dir:PATH_OF_THIS_FOLDER"


def _labels(cfg: PretrainedCfg) -> str:
    rows = zip(cfg.class_names, cfg.category_ids, strict=True)
    listed = ", ".join(f"{label} {html.escape(name)} ({category})" for label, (name, category) in enumerate(rows))
    return (
        f"## Labels\n\nLabels are 0-based, without background: {len(cfg.class_names)} classes, in brackets the "
        f"category id of the data set, which `to_coco` writes.\n\n<details><summary>All classes</summary>\n\n{listed}"
        "\n\n</details>"
    )


def _input(cfg: PretrainedCfg) -> str:
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (cfg.mean, cfg.std))
    antialias = "antialiased" if cfg.antialias else "not antialiased"
    size = f"the shorter side has {cfg.short_side} pixels, unless the longer would pass {cfg.long_side}"
    if cfg.short_side == cfg.long_side:
        size = f"the longer side has {cfg.long_side} pixels"
    rows = [
        "RGB, uint8 or float in 0..255. `predict` does all that follows; `forward` expects resized, padded images.",
        f"Resized ({cfg.interpolation}, {antialias}) so that {size}.",
        f"Padded at the right and bottom to a multiple of {cfg.pad_divisor}; the padding is zero after normalisation.",
        f"The model itself normalises, in {cfg.channel_order.upper()} order: mean {mean}; standard deviation {std}.",
        "Boxes come back as x1, y1, x2, y2 in pixels of the original photo.",
    ]
    return "## Input and output\n\n" + "\n".join(f"* {row}" for row in rows)


def _measured(cfg: PretrainedCfg, record: Mapping[str, Any] | None) -> str:
    if record is None and cfg.measured:
        figures = "\n".join(f"| {name} | {_percent(value)} |" for name, value in cfg.measured.items())
        return f"## Results measured by us\n\nOn {cfg.measured_on}, in percent.\n\n| | % |\n|---|---:|\n{figures}"
    if record is None:
        return "## Results measured by us\n\nNo record of an evaluation was given with these weights."
    data, ran = record["dataset"], record["environment"]
    head = (
        f"## Results measured by us\n\nOn **{data['name']}, {data['split']}** ({data['images']:,} images, "
        f"{data['objects']:,} objects), with COCOeval ({record['evaluator']}), in percent."
    )
    notes = (
        f"Evaluated {record['date']} on {ran['device']} ({ran['hardware']}), torch {ran['torch']}, timm {ran['timm']}, "
        f"dyhead_zoo {ran['dyhead_zoo']}" + (f" at commit `{ran['commit']}`" if ran["commit"] else "") + "."
    )
    if record["intervals"]:
        drawn = record["intervals"]
        notes += (
            f" Intervals: {drawn['method']}, {drawn['resamples']} draws, seed {drawn['seed']}; intervals of AP lie "
            "somewhat high by this method, which is not corrected."
        )
    return "\n\n".join(
        [head, _metric_table(record), _extremes(record["per_class"]), _class_table(record["per_class"]), notes]
    )


def _metric_table(record: Mapping[str, Any]) -> str:
    """The twelve figures of boxes and, beside them, those of masks."""
    kinds = {"": "%", "mask_": "masks, %"} if MASK_METRIC_NAMES[0] in record["metrics"] else {"": "%"}
    head = "".join(f" {title} | 95 % interval |" for title in kinds.values())
    rows = []
    for name in METRIC_NAMES:
        pairs = [(_percent(record["metrics"][kind + name]), _interval(record, kind + name)) for kind in kinds]
        rows.append(" | ".join([name, *(text for pair in pairs for text in pair), MEANINGS[name]]))
    return "\n".join([f"| |{head} |", f"|---|{'---:|---|' * len(kinds)}---|", *(f"| {row} |" for row in rows)])


def _extremes(per_class: Sequence[Mapping[str, Any]]) -> str:
    """The best and the worst classes, as far as they have enough objects to say so."""
    common = [row for row in per_class if row["num_gts"] >= _ENOUGH and row["AP"] is not None]
    if len(common) <= 2 * _NAMED:
        return ""
    ranked = sorted(common, key=lambda row: -row["AP"])
    best, worst = (
        ", ".join(f"{html.escape(row['name'])} {_percent(row['AP'])}" for row in rows)
        for rows in (ranked[:_NAMED], ranked[: -_NAMED - 1 : -1])
    )
    return (
        f"Of the {len(common)} classes with at least {_ENOUGH} objects, the best by AP: {best}; the worst: {worst}. "
        f"{len(per_class) - len(common)} classes have fewer objects, and their figures say little."
    )


def _class_table(per_class: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in ("AP", "AP50", "mask_AP", "mask_AP50") if per_class and name in per_class[0]]
    head = " | ".join(["class", *(name.replace("_", " ") for name in names), "objects"])
    rows = [
        " | ".join([html.escape(r["name"]), *(_percent(r[name]) for name in names), str(r["num_gts"])])
        for r in per_class
    ]
    table = "\n".join([f"| {head} |", f"|---|{'---:|' * len(names)}---:|", *(f"| {row} |" for row in rows)])
    return f"<details><summary>Every class</summary>\n\n{table}\n\n</details>"


def _reported(cfg: PretrainedCfg) -> str:
    if not cfg.reported:
        return ""
    figures = "\n".join(f"| {name} | {value:.4g} |" for name, value in cfg.reported.items())
    return (
        f"## Results reported by others\n\nBy {cfg.reported_by or 'the authors'}, in percent; not measured by us.\n\n"
        f"| | % |\n|---|---:|\n{figures}"
    )


def _size_and_speed(record: Mapping[str, Any] | None, benchmark: Sequence[Mapping[str, Any]] | None) -> str:
    rows = []
    if record is not None:
        model = record["model"]
        height, width = model["canvas"]
        rows.append(f"* {model['parameters'] / 1e6:.2f} M parameters")
        rows.append(f"* {model['macs'] / 1e9:.2f} G multiply-adds on {height} x {width} pixels, decoding left out")
    for run in benchmark or ():
        height, width = run["canvas"]
        rows.append(
            f"* {run['images_per_second']:.3g} images a second on {run['hardware']} ({run['runtime']}), "
            f"{height} x {width} pixels, batches of {run['batch_size']}"
        )
    if not benchmark:
        rows.append("* Speed: not measured.")
    return "## Size and speed\n\n" + "\n".join(rows)


def _training(cfg: PretrainedCfg, recipe: Mapping[str, Any] | None) -> str:
    rows = []
    if cfg.base_model:
        rows.append(f"* The backbone started from [{cfg.base_model}](https://huggingface.co/{cfg.base_model}).")
    if cfg.origin_url:
        rows.append(f"* Trained by others, with {cfg.origin_url}.")
    rows += [f"* {note}" for note in (recipe or {}).get("notes", ())]
    settings = {k: v for k, v in (recipe or {}).get("config", {}).items() if k not in _RUN_ONLY and v is not None}
    if settings:
        table = "\n".join(["| setting | |", "|---|---|", *(f"| `{k}` | {v} |" for k, v in settings.items())])
        rows.append(f"\n<details><summary>All settings, from recipe.json</summary>\n\n{table}\n\n</details>")
    return "## Training\n\n" + "\n".join(rows) if rows else ""


def _limits(cfg: PretrainedCfg, record: Mapping[str, Any] | None) -> str:
    rows = list(cfg.limits)
    if record is not None:
        missed = [r["name"] for r in record["per_class"] if r["num_gts"] >= _ENOUGH and r["AP50"] is not None]
        blind = [r["name"] for r in record["per_class"] if r["name"] in missed and r["AP50"] < 0.05]
        if blind:
            rows.append(f"Nearly blind (AP50 below 5 %, of at least {_ENOUGH} objects) to: {', '.join(blind)}.")
        if record["unknown_classes"]:
            rows.append(f"It has no class for: {', '.join(record['unknown_classes'])}; they counted as misses.")
    rows.append("Scores are not calibrated probabilities. Nothing here was tested for uses where a miss does harm.")
    return "## Limits and failure modes\n\n" + "\n".join(f"* {row}" for row in rows)


def _licences(cfg: PretrainedCfg) -> str:
    name = LICENCES.get(cfg.license or "", cfg.license or "not stated")
    if cfg.origin_url and not cfg.license_url:
        name += f" is the licence of {cfg.origin_url}; its authors do not state one for the weights"
    elif cfg.license_url:
        name += f", stated at {cfg.license_url}"
    rows = [f"* Weights: {name}."]
    if cfg.base_model:
        rows.append(f"* Backbone's first weights: see [{cfg.base_model}](https://huggingface.co/{cfg.base_model}).")
    if cfg.data_license:
        rows.append(f"* Training data: {cfg.data_license}")
    return "## Licences\n\n" + "\n".join(rows)


def _proof(record: Mapping[str, Any] | None, repo_id: str | None, golden: bool) -> str:
    text = "## Verify\n\nThere are no golden tensors beside these weights."
    if golden:
        text = (
            f"## Verify\n\n`dyhead-zoo verify {_source(repo_id)}` recomputes the golden tensors that lie "
            "beside the weights, and says which stage departs and by how much."
        )
    if record is not None:
        made, data = record["predictions"], record["dataset"]
        text += (
            f"\n\nThe figures above come from `eval.json`: {made['count']:,} predictions with SHA-256 "
            f"`{made['sha256']}`, on annotations with SHA-256 `{data['annotations_sha256']}`."
        )
    return text


def _citation(config: Mapping[str, Any], cfg: PretrainedCfg) -> str:
    entries = citations(cfg.paper_ids, resolve_backbone_name(config["arch"]["backbone"]))
    return "## Citation\n\nThe detector, its backbone, and timm, which the backbone's code is from:\n\n" + (
        "```bibtex\n" + "\n\n".join(entries) + "\n```"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _interval(record: Mapping[str, Any], name: str) -> str:
    low, high = (record["intervals"] or {}).get(name, (None, None))
    return "" if low is None else f"{_percent(low)} to {_percent(high)}"


def _between(record: Mapping[str, Any], name: str) -> str:
    interval = _interval(record, name)
    return f", 95 % interval {interval}" if interval else ""
