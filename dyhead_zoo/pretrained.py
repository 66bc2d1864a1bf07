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
        source: key layout of the file: ``native``, ``mmdet`` or ``detectron2``.
        class_names, category_ids: the label space, by rows of the classifier.
        mean, std: per channel, in units of 0..255, in ``channel_order``.
        short_side, long_side: the image is scaled so that its shorter side is ``short_side`` unless the longer would
            pass ``long_side``. ``rounding``: ``half_up`` (mmdet, detectron2) or ``floor`` (torchvision).
        pad_divisor: the canvas is rounded up to a multiple of it.
        arch: arguments of the architecture that the weights need; they apply whenever the tag is selected.
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
    """``file``, ``sha256``, ``measured`` and ``measured_on`` of weights that ship with the package.

    They stand in ``<name.tag>.json`` beside the weights; both files are written by ``hub/bundle.py``, never by hand.
    """
    record: dict[str, Any] = json.loads((BUNDLED / f"{name}.json").read_text())
    return record
