"""Loading weights strictly: every key accounted for, classifier rows matched by class name."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dyhead_zoo.convert import (
    CheckpointError,
    Conversion,
    detectron2,
    detr,
    listing,
    maskrcnn_benchmark,
    mmdet,
    torchvision,
    unwrap,
)
from dyhead_zoo.data.label_space import COCO_80, LabelSpace
from dyhead_zoo.download import fetch, sha256_of
from dyhead_zoo.weight_files import read_state_dict, write_safetensors

if TYPE_CHECKING:
    from dyhead_zoo.detector import Detector, Head

__all__ = [
    "CheckpointError",
    "ClassRows",
    "LoadReport",
    "check_shapes",
    "classes_in",
    "convert_state_dict",
    "fetch",
    "load_checkpoint",
    "read_state_dict",
    "sha256_of",
    "stated_labels",
    "write_safetensors",
]

# --- layouts ----------------------------------------------------------------------------------------------------------


def _keep(state_dict: Mapping[str, Tensor]) -> Conversion:
    return Conversion(dict(state_dict))


_CONVERTERS: dict[str, Callable[[Mapping[str, Tensor]], Conversion]] = {
    "native": _keep,
    "mmdet": mmdet.convert,
    "detectron2": detectron2.convert,
    "torchvision": torchvision.convert,
    "maskrcnn_benchmark": maskrcnn_benchmark.convert,
    "detr": detr.convert,
}


def detect_source(keys: Iterable[str]) -> str:
    """The layout of a state dict, told by its keys: see ``load_checkpoint``.

    Raises:
        CheckpointError: if it is none of them.
    """
    keys = [key.removeprefix("module.") for key in keys]

    def has(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    if has("backbone.bottom_up.", "backbone.backbone."):
        return "detectron2"
    if has("bbox_head.", "neck.0.", "neck.lateral_convs."):
        return "mmdet"
    if has("backbone.fpn.inner_blocks."):
        return "torchvision"
    if has("backbone.fpn.fpn_inner"):
        return "maskrcnn_benchmark"
    if has("backbone.0.body."):
        return "detr"
    if has("backbone.body.") and not has("backbone.fpn."):
        return "native"
    raise CheckpointError(
        f"layout not recognised from its {len(keys)} keys:\n{listing(keys, 5)}\n"
        "Detectors have keys such as neck.fpn.* (ours), bbox_head.* (mmdet), backbone.bottom_up.* (detectron2) or "
        "backbone.fpn.* (torchvision, maskrcnn-benchmark); "
        "weights of a backbone alone are no detector"
    )


def convert_state_dict(tensors: Mapping[str, Tensor], source: str = "auto") -> tuple[str, Conversion]:
    """The layout of a state dict, and what becomes of it in ours.

    Args:
        tensors: foreign keys to tensors; not changed.
        source: see ``load_checkpoint``.

    Raises:
        CheckpointError: for keys of no known layout, or that its converter does not know.
        ValueError: for an unknown ``source``.
    """
    if source != "auto" and source not in _CONVERTERS:
        raise ValueError(f"source={source!r}: expected auto, {', '.join(_CONVERTERS)}")
    bare, counters = _without_wrapper(tensors)
    layout = detect_source(bare) if source == "auto" else source
    conversion = _CONVERTERS[layout](bare)
    conversion.dropped |= dict.fromkeys(counters, "counts the steps of a running mean of the weights")
    return layout, conversion


def _without_wrapper(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors as if saved from the detector itself, not from a module that has it as ``module`` or ``model``.

    Such are DistributedDataParallel, running means of the weights, which count their steps, and Lightning's modules.

    Returns:
        The tensors, and the keys of the counters left out.
    """
    bare = {key: tensor for key, tensor in tensors.items() if key not in ("n_averaged", "steps")}
    counters = [key for key in tensors if key not in bare]
    for prefix in ("model.", "module.", "model."):
        if all(key.startswith(prefix) for key in bare):
            bare = {key.removeprefix(prefix): tensor for key, tensor in bare.items()}
    return bare, counters


# --- classes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassRows:
    """How the first dimension of a classifier's parameter is laid out.

    It has ``groups`` blocks (anchors), each of ``rows_per_class`` rows for every class in turn, then ``extra`` rows
    that belong to no class (background).
    """

    groups: int = 1
    rows_per_class: int = 1
    extra: int = 0

    def num_classes(self, rows: int) -> int | None:
        """Number of classes of a parameter with that many rows; None if no number fits."""
        per_group, odd_group = divmod(rows, self.groups)
        classes, odd_class = divmod(per_group - self.extra, self.rows_per_class)
        return classes if classes > 0 and not odd_group and not odd_class else None

    def indices(self, classes: Iterable[int], num_classes: int) -> Tensor:
        """Rows of some of ``num_classes`` classes, in the order given, and the extra rows, group after group."""
        per_group = num_classes * self.rows_per_class + self.extra
        rows = [c * self.rows_per_class + r for c in classes for r in range(self.rows_per_class)]
        rows += range(num_classes * self.rows_per_class, per_group)
        return torch.tensor([group * per_group + row for group in range(self.groups) for row in rows])


def classes_in(tensors: Mapping[str, Tensor], rows: Mapping[str, ClassRows]) -> int | None:
    """Number of classes that the classifier of a checkpoint has, by the layout of its parameters' rows.

    Returns:
        The number; None if it has no classifier.

    Raises:
        CheckpointError: if the parameters do not agree.
    """
    counts = {key: layout.num_classes(len(tensors[key])) for key, layout in rows.items() if key in tensors}
    if len(set(counts.values())) > 1 or None in counts.values():
        lines = (
            f"{key} {tuple(tensors[key].shape)}: {count or 'no whole number of'} classes"
            for key, count in counts.items()
        )
        raise CheckpointError(
            f"the number of classes cannot be told from the rows of its classifier:\n{listing(lines)}"
        )
    return next(iter(counts.values()), None)


def stated_labels(metadata: Mapping[str, Any], argument: LabelSpace | None) -> LabelSpace | None:
    """Label space of a checkpoint: its own record in our files, what the caller knows, the names in mmdet's files.

    Raises:
        CheckpointError: for a record that cannot be read.
    """
    try:
        if "label_space" in metadata:
            return LabelSpace.from_dict(json.loads(metadata["label_space"]))
        return argument or _mmdet_labels(metadata)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"its record of class names cannot be read ({error}): pass label_space=") from error


def _mmdet_labels(meta: Mapping[str, Any]) -> LabelSpace | None:
    dataset = meta.get("dataset_meta") or {}
    names = meta.get("CLASSES") or dataset.get("classes") or dataset.get("CLASSES")
    if names is None:
        return None
    labels = LabelSpace.from_names([names] if isinstance(names, str) else names)
    # mmdet 1 wrote traffic_light
    return COCO_80 if tuple(name.replace("_", " ") for name in labels.names) == COCO_80.names else labels


def _pair_classes(theirs: LabelSpace, ours: LabelSpace) -> list[tuple[int, int]]:
    """(row of the checkpoint, row of the model) of every class that both name."""
    if theirs.names != ours.names and LabelSpace.unnamed(len(theirs)).names == theirs.names:
        return []  # class_0, class_1, ... are places, not names
    position = {name: i for i, name in enumerate(theirs.names)}
    return [(position[name], i) for i, name in enumerate(ours.names) if name in position]


def _rehead(
    tensors: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    rows: Mapping[str, ClassRows],
    theirs: LabelSpace,
    ours: LabelSpace,
) -> tuple[str, ...]:
    """Replace the classifier in ``tensors`` by one for our classes; returns the names of those that were copied."""
    pairs = _pair_classes(theirs, ours)
    for key, layout in rows.items():
        if key not in tensors or key not in expected or tensors[key].shape[1:] != expected[key].shape[1:]:
            continue  # left for the comparison of keys and shapes to report
        result = expected[key].detach().clone()
        if pairs:
            source = layout.indices((p[0] for p in pairs), len(theirs))
            target = layout.indices((p[1] for p in pairs), len(ours))
            result[target.to(result.device)] = tensors[key][source].to(result)
        tensors[key] = result
    return tuple(ours.names[i] for _, i in pairs)


# --- loading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """What became of every key of a checkpoint, and of every key and class of the model.

    Attributes:
        source: layout of the checkpoint.
        loaded: keys of the model that were set.
        missing: keys of the model that the checkpoint does not have (``strict=False`` only); they kept their values.
        unused: keys that the model does not have (``strict=False`` only).
        dropped: foreign keys left out on purpose, with the reason.
        created: keys that the source does not have, with the reason for their value.
        copied_classes: names of classes whose rows were copied.
        fresh_classes: names of classes that kept the model's initial rows.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    created: Mapping[str, str] = field(default_factory=dict)
    copied_classes: tuple[str, ...] = ()
    fresh_classes: tuple[str, ...] = ()

    def summary(self) -> str:
        """A few lines for a log."""
        lines = [f"{len(self.loaded)} tensors loaded from a {self.source} checkpoint"]
        lines += [f"{len(keys)} {what}" for what, keys in (("missing", self.missing), ("unused", self.unused)) if keys]
        for what, reasons in (("dropped", self.dropped), ("created", self.created)):
            by_reason: dict[str, int] = defaultdict(int)
            for reason in reasons.values():
                by_reason[reason] += 1
            lines += [f"{count} {what}: {reason}" for reason, count in by_reason.items()]
        if self.fresh_classes:
            copied = ", ".join(self.copied_classes) or "none, no class name is shared"
            lines += [f"classes copied: {copied}", f"classes that start fresh: {', '.join(self.fresh_classes)}"]
        return "\n".join(lines)


def load_checkpoint(
    model: Detector,
    checkpoint: str | Path | Mapping[str, Tensor],
    source: str = "auto",
    *,
    label_space: LabelSpace | None = None,
    strict: bool = True,
) -> LoadReport:
    """Load weights into a detector; if that fails, the detector is as it was.

    Rows of the classifier are matched by class name: those of classes that both label spaces name are copied, wherever
    they stand; the others keep the detector's initialisation.

    Args:
        model: a detector, built for the architecture of the checkpoint.
        checkpoint: a file (see ``read_state_dict``) or a state dict.
        source: ``native``, ``mmdet``, ``detectron2``, ``torchvision``, ``maskrcnn_benchmark``, ``detr``, or ``auto``:
            told from the keys, which may all begin with the ``module.`` or ``model.`` of a wrapper.
        label_space: of the checkpoint. A record in one of our files comes first; without either, the names in mmdet's
            ``meta``, else the detector's own label space if the number of classes agrees.
        strict: whether missing and unused keys are errors. A wrong shape always is.

    Raises:
        CheckpointError: with the keys that do not fit.
        FileNotFoundError: if there is no such file.
    """
    if isinstance(checkpoint, Mapping):
        name, (tensors, metadata) = "state dict", unwrap(checkpoint)
    else:
        name, (tensors, metadata) = str(checkpoint), read_state_dict(checkpoint)
    try:
        return _load(model, tensors, metadata, source, label_space, strict)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _load(
    model: Detector,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    source: str,
    label_space: LabelSpace | None,
    strict: bool,
) -> LoadReport:
    layout, conversion = convert_state_dict(tensors, source)
    new, expected, ours = conversion.tensors, model.state_dict(), model.label_space
    rows = {f"head.{key}": value for key, value in cast("Head", model.head).class_rows().items()}
    copied: tuple[str, ...] = ()
    if count := classes_in(new, rows):
        theirs = _agreed_labels(stated_labels(metadata, label_space), count, ours)
        copied = _rehead(new, expected, rows, theirs, ours)
    missing = tuple(key for key in expected if key not in new)
    unused = tuple(key for key in new if key not in expected)
    wrong = [key for key in expected if key in new and new[key].shape != expected[key].shape]
    if wrong or (strict and (missing or unused)):
        raise CheckpointError(_mismatch(new, expected, missing, unused, wrong))
    loaded = {key: new[key] for key in expected if key in new}
    model.load_state_dict(loaded, strict=False)
    return LoadReport(
        layout,
        tuple(loaded),
        missing,
        unused,
        conversion.dropped,
        conversion.created,
        copied,
        tuple(name for name in ours.names if name not in copied),
    )


def _agreed_labels(stated: LabelSpace | None, count: int, ours: LabelSpace) -> LabelSpace:
    if stated is None and count == len(ours):
        return ours
    if stated is None:
        raise CheckpointError(
            f"it has {count} classes without names and the detector has {len(ours)}: pass label_space= with the names "
            "of the checkpoint's classes, so that rows are copied by name"
        )
    if len(stated) != count:
        raise CheckpointError(f"its classifier has rows for {count} classes, but its label space names {len(stated)}")
    return stated


def check_shapes(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor]) -> None:
    """Compare the shapes in a native file's header with a state dict, which may be on the meta device.

    Raises:
        CheckpointError: with the keys that do not fit.
    """
    new = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    missing = [key for key in expected if key not in new]
    unused = [key for key in new if key not in expected]
    wrong = [key for key in expected if key in new and new[key].shape != expected[key].shape]
    if missing or unused or wrong:
        raise CheckpointError(_mismatch(new, expected, missing, unused, wrong))


def _mismatch(
    new: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    missing: Iterable[str],
    unused: Iterable[str],
    wrong: Iterable[str],
) -> str:
    groups = {
        "missing from the checkpoint": [f"{key} {tuple(expected[key].shape)}" for key in missing],
        "unknown to the detector": [f"{key} {tuple(new[key].shape)}" for key in unused],
        "of another shape": [
            f"{key} {tuple(new[key].shape)}, the detector has {tuple(expected[key].shape)}" for key in wrong
        ],
    }
    parts = [f"{len(lines)} keys {what}:\n{listing(lines)}" for what, lines in groups.items() if lines]
    theirs, ours = _describe(new), _describe(expected)
    if theirs == ours:
        advice = f"Both look like {ours}: another tag's arguments (pred_kernel, for one), or a damaged checkpoint?"
    else:
        advice = f"The checkpoint looks like {theirs}, the detector is {ours}: create the detector that it belongs to"
    return "\n".join(["it does not fit this detector; nothing was loaded.", *parts, advice])


def _describe(keys: Iterable[str]) -> str:
    """The architecture as far as keys tell it, for error messages."""
    keys = list(keys)

    def numbers(pattern: str) -> set[tuple[str, ...]]:
        return {match.groups() for key in keys if (match := re.match(pattern, key))}

    blocks: dict[str, int] = defaultdict(int)
    for stage, _ in numbers(r"backbone\.body\.(\D+\d+)\.(?:blocks\.)?(\d+)\."):
        blocks[stage] += 1
    depths = "-".join(str(blocks[stage]) for stage in sorted(blocks))
    dyhead, tower = (len(numbers(prefix + r"\.(\d+)")) for prefix in (r"neck\.dyhead\.blocks", r"head\.cls_tower"))
    return f"({depths or 'no known'} backbone blocks, {dyhead} DyHead blocks, {tower} tower convolutions)"
