"""One flat record per set of weights: where they come from, what labels and inputs mean, what is claimed of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dyhead_zoo.data.label_space import COCO_80, LabelSpace

BUNDLED = Path(__file__).parent / "bundled"
"""Folder of the weights that ship with the package."""
HUB_ORGANISATION = "dyhead-zoo"
"""Whose repositories ``<organisation>/<name.tag>`` hold the weights that we publish."""

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class PretrainedCfg:
    """Everything that must be known to use a set of weights. Flat, JSON-able, immutable; see ``to_dict``.

    Attributes:
        file: name of a file in ``dyhead_zoo/bundled``, or an absolute path.
        url: original URL; ``mirrors`` are tried in turn when it fails.
        hf_hub_id: Hub repository, with ``hf_hub_revision``; comes before the URL once ``sha256`` is known.
        sha256: of the file. ``hash_prefix``: its first digits where the publisher puts them into the file name.
        source: key layout of the file, see ``load_checkpoint``.
        class_names, category_ids: the label space, by rows of the classifier.
        mean, std: per channel, in units of 0..255, in ``channel_order``.
        short_side, long_side: the image is scaled so that its shorter side is ``short_side`` unless the longer would
            pass ``long_side``. ``rounding``: ``half_up`` (mmdet, detectron2) or ``floor`` (torchvision).
        pad_divisor: the canvas is rounded up to a multiple of it.
        arch: arguments of the architecture that the weights need; they apply whenever the tag is selected.
        license: of the weights, by the Hub's name (``apache-2.0``), or of the code they came with where
            ``license_url``, the page on which their publisher licenses the weights themselves, is missing.
        data_license: terms of the training data, in a sentence.
        datasets: Hub ids of the training data.
        base_model: Hub id of the weights that the backbone started from, such as ``timm/resnet50.a1_in1k``.
        limits: what the weights are bad at or must not be used for, a sentence each.
        reported: figures that somebody else states, in percent, with ``reported_by``; ``measured``: ours, in 0..1 as
            ``evaluate`` gives them, with ``measured_on``.
    """

    # weights
    file: str | None = None
    url: str | None = None
    mirrors: tuple[str, ...] = ()
    hf_hub_id: str | None = None
    hf_hub_revision: str | None = None
    sha256: str | None = None
    hash_prefix: str | None = None
    source: str = "native"
    # labels
    class_names: tuple[str, ...] = COCO_80.names
    category_ids: tuple[int, ...] = COCO_80.category_ids
    # input
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    channel_order: str = "rgb"
    short_side: int = 800
    long_side: int = 1333
    interpolation: str = "bilinear"
    antialias: bool = True
    rounding: str = "half_up"
    pad_divisor: int = 32
    # architecture
    arch: Mapping[str, Any] = field(default_factory=dict)
    # provenance
    license: str | None = None
    license_url: str | None = None
    data_license: str = ""
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    limits: tuple[str, ...] = ()
    description: str = ""
    origin_url: str | None = None
    paper_ids: tuple[str, ...] = ()
    # figures
    reported: Mapping[str, float] = field(default_factory=dict)
    reported_by: str | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    measured_on: str | None = None

    @property
    def label_space(self) -> LabelSpace:
        return LabelSpace(self.class_names, self.category_ids)

    @property
    def has_weights(self) -> bool:
        return bool(self.file or self.url or self.hf_hub_id)

    @property
    def status(self) -> str:
        """``bundled`` (in the package), ``hub``, ``url`` (its authors' server; liveness not checked) or ``none``."""
        return "bundled" if self.file else "hub" if self.hf_hub_id else "url" if self.url else "none"

    def replace(self, **changes: Any) -> PretrainedCfg:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_labels(self, labels: LabelSpace) -> PretrainedCfg:
        """A copy with another label space."""
        return self.replace(class_names=labels.names, category_ids=labels.category_ids)

    def without_claims(self) -> PretrainedCfg:
        """A copy for other weights: without the figures, licence, data, limits and sources of these."""
        nothing = PretrainedCfg()
        return self.replace(**{name: getattr(nothing, name) for name in _CLAIMS})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; tuples become lists."""
        return {
            key: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
            for key, value in ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PretrainedCfg:
        """Inverse of ``to_dict``; unknown keys (of a newer version) are an error that names them."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(
                f"unknown pretrained-cfg keys {unknown}: written by a newer dyhead_zoo? Known: {sorted(known)}"
            )
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**fields)


def bundled_record(name: str) -> dict[str, Any]:
    """What a cfg must say of weights that ship with the package: file and hash, place on the Hub, figures.

    It stands in ``<name.tag>.json`` beside the weights; both files are written by ``hub/bundle.py``, never by hand.

    Args:
        name: ``name.tag``.

    Returns:
        ``file``, ``sha256``, ``hf_hub_id``, ``hf_hub_revision``, ``measured`` and ``measured_on``.
    """
    record: dict[str, Any] = json.loads((BUNDLED / f"{name}.json").read_text())
    return record


_CLAIMS = (
    *("file", "url", "mirrors", "hf_hub_id", "hf_hub_revision", "sha256", "hash_prefix", "source"),
    *("license", "license_url", "data_license", "datasets", "limits", "description", "origin_url"),
    *("reported", "reported_by", "measured", "measured_on"),
)
"""Fields that are true of one set of weights only."""

COCO_SUBSET: dict[str, Any] = {
    "datasets": ("detection-datasets/coco",),
    "data_license": "COCO annotations are CC BY 4.0 (COCO Consortium); the photos belong to their authors on Flickr, "
    "under the licences that cocodataset.org/#termsofuse points to.",
    "limits": (
        "It was trained on 2,148 photos, most of which show a person; small objects and rare classes are mostly "
        "missed.",
        "Most of the training photos, and all that it was measured on, are from COCO val2017: it must not be scored "
        "on val2017.",
        "Half of the objects are smaller than 32 px at this size, and the S/M/L figures use box areas instead of mask "
        "areas, so they do not compare with official ones.",
    ),
}
"""What the cfgs of all weights trained on the 2,148 photos say of their data; see ``hub/data``."""
