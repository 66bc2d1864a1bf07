"""A user's own checkpoint of another library to a detector: which one it is, told by its keys and shapes.

Keys tell the family, the backbone, the number of classes and the like. They do not tell how pictures are resized and
normalised, nor switches without parameters; those are taken from published weights of the same family and library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dyhead_zoo import registry
from dyhead_zoo.convert import CheckpointError, Conversion
from dyhead_zoo.convert.clues import (
    FAMILIES,
    Shapes,
    arguments,
    backbone_of,
    class_arguments,
    dyhead_blocks,
    family_of,
)
from dyhead_zoo.data.label_space import COCO_80, LabelSpace
from dyhead_zoo.detector import Detector, Head
from dyhead_zoo.layers.backbone import ALIASES
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.saved import saved_config
from dyhead_zoo.weights import check_shapes, classes_in, convert_state_dict, read_state_dict, stated_labels

_SHORT = {long: alias for alias, long in ALIASES.items()} | {"mobilenetv3_large_100": "mobilenetv3_large"}
"""Backbones under the names that registered detectors have for them."""

_SIBLINGS = {"cascade_rcnn": "cascade_mask_rcnn"}
"""Families with the settings of which others can do where their library published none."""

_SETTINGS = (
    *("mean", "std", "channel_order", "short_side", "long_side", "interpolation", "antialias", "rounding"),
    *("pad_divisor", "arch"),
)
"""Fields of a cfg that make another detector of the same weights."""


@dataclass(frozen=True)
class Guess:
    """What a checkpoint is.

    Attributes:
        source: layout of its keys.
        name: of the detector, registered or by the grammar.
        labels: of its classes; ``labels_from`` says who named them.
        cfg: input and architecture.
        settings: ``name.tag`` of the weights that they are those of.
        others: those of other settings that fit the keys too, with what is different.
        conversion: the tensors in our layout.
    """

    source: str
    name: str
    labels: LabelSpace
    labels_from: str
    cfg: PretrainedCfg
    settings: str
    others: dict[str, str]
    conversion: Conversion

    def summary(self) -> str:
        """A few lines: what it is, what had to be assumed, and what became of its keys."""
        names = self.labels.names
        shown = ", ".join(names[:5]) + (", .." if len(names) > 5 else "")
        lines = [
            f"{self.source} checkpoint: {self.name}, {len(names)} classes ({shown}; {self.labels_from})",
            f"input and all that keys do not tell: as for {self.settings or 'detectors without weights'}",
        ]
        lines += [f"  or as for {name}, which fits too: {difference}" for name, difference in self.others.items()]
        lines += ["  the name after --as decides"] if self.others else []
        for what, keys in (("left out", self.conversion.dropped), ("added", self.conversion.created)):
            for reason in sorted(set(keys.values())):
                lines.append(f"{sum(value == reason for value in keys.values())} tensors {what}: {reason}")
        return "\n".join(lines)


def import_checkpoint(
    path: str | Path,
    name: str | None = None,
    *,
    class_names: Sequence[str] | None = None,
    arch: Mapping[str, Any] | None = None,
) -> tuple[Detector, Guess]:
    """Convert a checkpoint of mmdetection, detectron2, torchvision, their relatives or DETR's authors into a detector.

    Args:
        path: see ``read_state_dict``; nothing in the file is run.
        name: what it is, as far as that is known: a family, a detector's name, or ``name.tag``.
        class_names: of its classes, in the order of its labels; by default those that the file names, or COCO's if it
            has 80 classes.
        arch: arguments of ``create_detector`` that keys do not tell and that differ from those of published weights,
            such as ``{"norm_eps": 1e-5}``.

    Returns:
        The detector, and how its nature was told.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it cannot be read, or is of no known detector; the message says which keys do not fit.
        ValueError: for an unknown name, or one of our own files.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is {'a folder' if Path(path).is_dir() else 'no file'}: give a weight file")
    if saved_config(path) is not None:
        raise ValueError(f"{path} was written by dyhead_zoo: create_detector('local-dir:{path}') loads it as it is")
    tensors, metadata = read_state_dict(path)
    try:
        found = guess(tensors, metadata, name, class_names, arch)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return _build(found.name, found.cfg, found.labels, found.conversion.tensors), found


def guess(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    name: str | None = None,
    class_names: Sequence[str] | None = None,
    arch: Mapping[str, Any] | None = None,
) -> Guess:
    """Tell what a state dict is, by its keys and shapes.

    Tensors may be on the meta device, except for the branches of Deformable DETR, which may be equal or not.

    Args:
        tensors: foreign keys to tensors.
        metadata: what came with them, see ``read_state_dict``.
        name, class_names, arch: see ``import_checkpoint``.

    Raises:
        CheckpointError, ValueError: see ``import_checkpoint``.
    """
    metadata = metadata or {}
    source, conversion = convert_state_dict(tensors)
    if source == "native":
        raise CheckpointError(
            "its keys are ours, but it has no record of its detector: create_detector(NAME, checkpoint=FILE) loads it"
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in conversion.tensors.items()}
    family, backbone, dyhead = family_of(shapes), backbone_of(shapes), dyhead_blocks(shapes)
    ours = _name(family, backbone, dyhead)
    _check_hint(name, ours, family, backbone, dyhead)
    rows = class_arguments(shapes, family, source)
    labels, labels_from = _labels(_count_classes(family, rows, conversion.tensors), metadata, class_names)
    told = rows | ({"coarse_offsets": "reinterpret"} if dyhead else {})  # as every DyHead of others has them
    told |= arch or {}
    settings = list(_settings(name if name and "." in name else None, ours, family, dyhead, source))
    fits, misfits = _fitting(shapes, ours, labels, settings, told)
    if not fits:  # as no published weights are: what the keys tell comes before settings
        fits, misfits = _fitting(shapes, ours, labels, settings, arguments(shapes, family) | told)
    if not fits:
        raise CheckpointError(
            f"it looks like a {family} with {backbone} and {dyhead} DyHead blocks, from {source}, but "
            + min(misfits, key=len)
            + (f"\n{len(misfits) - 1} other settings fit no better" if len(misfits) > 1 else "")
        )
    chosen = _by_recorded_style(fits, metadata)
    others = {tag: _difference(cfg, fits[chosen]) for tag, cfg in fits.items() if tag != chosen}
    return Guess(source, ours, labels, labels_from, fits[chosen], chosen, others, conversion)


# --- from keys --------------------------------------------------------------------------------------------------------


def _fitting(
    shapes: Shapes,
    name: str,
    labels: LabelSpace,
    settings: Iterable[tuple[str, PretrainedCfg]],
    told: Mapping[str, Any],
) -> tuple[dict[str, PretrainedCfg], list[str]]:
    """Settings that with the arguments ``told`` give just these keys and shapes; what is wrong with the others."""
    fits: dict[str, PretrainedCfg] = {}
    misfits = []
    for tag, published in settings:
        cfg = published.replace(arch={**published.arch, **told})
        try:
            check_shapes(shapes, _state_dict(name, cfg, labels))
            fits[tag] = cfg
        except ValueError as error:  # caffe=True, which is for ResNets only, too
            misfits.append(f"as {name}{f' with the settings of {tag}' if tag else ''}: {error}")
    return fits, misfits


def _name(family: str, backbone: str, dyhead: int) -> str:
    """The registered name of a detector, if it has one, else that of the grammar."""
    suffix = f"_dyhead{dyhead}" if dyhead else ""
    registered = f"{family}_{_SHORT.get(backbone, backbone)}{suffix}"
    return registered if registry.is_detector(registered) else f"{family}_{backbone}{suffix}"


def _check_hint(name: str | None, ours: str, family: str, backbone: str, dyhead: int) -> None:
    """Refuse a hint that contradicts the keys.

    Raises:
        UnknownDetectorError: for a hint that is no family and no name.
        CheckpointError: for another family, backbone or number of blocks.
    """
    if name is None or name in (family, ours) or name.partition(".")[0] == ours:
        return
    if name not in FAMILIES:
        if registry.is_detector(name.partition(".")[0]):
            registry.get_pretrained_cfg(name)
        else:
            registry.parse_grammar(name)
    raise CheckpointError(
        f"it is no {name}: by its keys it is a {family} with the backbone {backbone} and {dyhead} DyHead blocks, {ours}"
    )


# --- what keys do not tell --------------------------------------------------------------------------------------------


def _settings(
    wanted: str | None, ours: str, family: str, dyhead: int, source: str
) -> Iterator[tuple[str, PretrainedCfg]]:
    """``name.tag`` and cfg of the published weights whose settings may be those of a checkpoint, the likeliest first.

    Those of the same detector, else of the family or its sibling, from the same library; without repetitions.
    """
    if wanted is not None:
        yield wanted, registry.get_pretrained_cfg(wanted)
        return
    tags = _tags_from(source, family) or _tags_from(source, _SIBLINGS.get(family, family))
    body = ours.partition("_dyhead")[0]
    tags = [tag for tag in tags if tag.partition(".")[0] == ours] or sorted(
        tags, key=lambda tag: (("_dyhead" in tag) != bool(dyhead), not tag.startswith(f"{body}."))
    )
    seen: list[dict[str, Any]] = []
    for tag in tags:
        cfg = registry.get_pretrained_cfg(tag)
        if (key := _relevant(cfg)) not in seen:
            seen.append(key)
            yield tag, cfg
    if not tags:
        yield "", PretrainedCfg()


def _tags_from(source: str, family: str) -> list[str]:
    tags = [f"{name}.{tag}" for name in registry.list_detectors(f"{family}_*") for tag in registry.list_tags(name)]
    return [tag for tag in tags if registry.get_pretrained_cfg(tag).source == source]


def _relevant(cfg: PretrainedCfg) -> dict[str, Any]:
    values = cfg.to_dict()
    return {key: values[key] for key in _SETTINGS}


def _difference(cfg: PretrainedCfg, chosen: PretrainedCfg) -> str:
    """Settings of a cfg that another has otherwise, as text."""
    (theirs, their_arch), (ours, our_arch) = ((fields, fields.pop("arch")) for fields in map(_relevant, (cfg, chosen)))
    theirs, ours = {**theirs, **their_arch}, {**ours, **our_arch}
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    return ", ".join(f"{key}={theirs[key]!r}" if key in theirs else f"no {key}" for key in keys)


def _by_recorded_style(fits: Mapping[str, PretrainedCfg], metadata: Mapping[str, Any]) -> str:
    """The first settings that agree with mmdetection's configuration, which its checkpoints hold as text."""
    recorded = re.search(r"style=['\"](caffe|pytorch)['\"]", str(metadata.get("cfg") or metadata.get("config") or ""))
    if recorded:
        for tag, cfg in fits.items():
            if bool(cfg.arch.get("caffe")) == (recorded[1] == "caffe"):
                return tag
    return next(iter(fits))


def _count_classes(family: str, rows: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    with torch.device("meta"):  # any of the family
        head = cast(Head, _build(f"test_{family}", PretrainedCfg(arch=rows), COCO_80).head)
    count = classes_in(tensors, {f"head.{key}": rows for key, rows in head.class_rows().items()})
    if count is None:
        raise CheckpointError("it has no classifier")
    return count


def _labels(count: int, metadata: Mapping[str, Any], class_names: Sequence[str] | None) -> tuple[LabelSpace, str]:
    """Names of the classes, and who says so."""
    stated = LabelSpace.from_names(class_names) if class_names else stated_labels(metadata, None)
    if stated is not None:
        whose = "as given" if class_names else "named in the file"
        if len(stated) != count:
            raise CheckpointError(f"its classifier has rows for {count} classes, but {len(stated)} are {whose}")
        return stated, whose
    if count == len(COCO_80):
        return COCO_80, "not named in the file: taken for COCO's"
    return LabelSpace.unnamed(count), "not named in the file: give --class-names"


# --- building ---------------------------------------------------------------------------------------------------------


def _build(
    name: str, cfg: PretrainedCfg, labels: LabelSpace, checkpoint: Mapping[str, Tensor] | None = None
) -> Detector:
    own = cfg.replace(license=None, license_url=None)  # those of other weights
    user = {"pretrained_cfg": own, "class_names": labels} | ({"checkpoint": checkpoint} if checkpoint else {})
    if registry.is_detector(name):
        return registry.detector_entrypoint(name)(False, **user)
    family, backbone, dyhead = registry.parse_grammar(name)
    return family(name, False, user, backbone=backbone, dyhead=dyhead)


def _state_dict(name: str, cfg: PretrainedCfg, labels: LabelSpace) -> dict[str, Tensor]:
    with torch.device("meta"):
        return _build(name, cfg, labels).state_dict()
